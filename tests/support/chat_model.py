"""A tiny chat model in the hub's layout: random weights, a byte-level tokenizer, the ChatML template."""

import json

import numpy as np
import pytest

from tinyllm import Llama, LlamaConfig, nn
from tinyllm.tokenizers.tiktoken import BYTE_ORDER, SYMBOLS

tokenizers = pytest.importorskip("tokenizers")

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BYTE_ID = {byte: i for i, byte in enumerate(BYTE_ORDER)}  # every token is one byte
START, END = 256, 257
ANSWER = "<|im_start|>assistant\n"


def turn(role, words):
    return f"<|im_start|>{role}\n{words}<|im_end|>\n"


def write_model(folder, template=CHATML, context=256, seed=0):
    """Write a random Llama in the hub's layout, with a byte-level tokenizer and a chat template."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.3,
    )
    Llama(config, rng=np.random.default_rng(seed)).save_pretrained(folder)
    vocabulary = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": template}
    given = {key: value for key, value in described.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(given), encoding="utf-8")
    return folder


class Script(list):
    """A list of answers to return instead of the model's; ``prompts`` records the prompts.

    An answer is a str, to which END is added, or a list of byte values, END, and exceptions to raise.
    """

    prompts = ()

    def generate(self, model, ids, max_new_tokens, temperature, top_k, top_p, rng, stop_ids, **_):
        self.prompts = [*self.prompts, list(ids[0])]
        answer = self.pop(0)
        answer = [*answer.encode("utf-8"), END] if isinstance(answer, str) else answer
        for token in answer[:max_new_tokens]:
            if isinstance(token, BaseException):
                raise token
            yield np.array([BYTE_ID.get(token, token)])


def put_lora(model, **options):
    """LoRA whose B is random, so that the output changes."""
    nn.add_lora(model, rng=0, **options)
    for layer in nn.lora_layers(model).values():
        B = layer.lora_B.weight
        B.replace(np.random.default_rng(1).standard_normal(B.shape, dtype=np.float32))
    return model

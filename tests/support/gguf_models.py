"""Random models of transformers, of every architecture that GGUF files are written for."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from pydoc_data import topics

from tinyllm.models.base import BOOKKEEPING, FIXED
from tinyllm.tokenizers import BPETokenizer, gguf_writer, train_bpe
from tinyllm.weights.safetensors import Weights

ROWS = 320

SIZES = dict(vocab_size=ROWS, hidden_size=64, intermediate_size=96, num_hidden_layers=3, head_dim=16)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
WINDOWS = dict(num_hidden_layers=7, sliding_window=8, query_pre_attn_scalar=16)
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0},
}
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0)
LLAMA3_ROPE |= dict(high_freq_factor=4.0, original_max_position_embeddings=8192)

YARN = dict(rope_type="yarn", rope_theta=5000.0, factor=4.0, original_max_position_embeddings=32)

# name -> class of the config, fields
MODELS = {
    "gpt2": ("GPT2", dict(vocab_size=ROWS, n_embd=64, n_layer=3, n_head=4, n_positions=128)),
    "llama": ("Llama", SIZES | ROPE | dict(attention_bias=True, mlp_bias=True)),
    "llama3": ("Llama", SIZES | dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "llama3_128": (
        "Llama",
        SIZES | dict(rope_parameters=LLAMA3_ROPE | dict(original_max_position_embeddings=128)),
    ),
    "mistral": ("Mistral", SIZES | ROPE | dict(sliding_window=None)),
    "mixtral": (
        "Mixtral",
        SIZES | ROPE | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    ),
    "qwen2": ("Qwen2", {k: v for k, v in SIZES.items() if k != "head_dim"} | ROPE),
    "yarn": ("Qwen2", {k: v for k, v in SIZES.items() if k != "head_dim"} | dict(rope_parameters=YARN)),
    "qwen3": ("Qwen3", SIZES | ROPE | dict(head_dim=32, tie_word_embeddings=True)),
    "qwen3_moe": ("Qwen3Moe", SIZES | ROPE | EXPERTS | dict(num_experts=4, norm_topk_prob=True)),
    "gemma2": ("Gemma2", SIZES | ROPE | WINDOWS),
    "gemma3": ("Gemma3Text", SIZES | WINDOWS | dict(rope_parameters=GEMMA3_ROPE)),
}


def random_model(name: str):
    """A model with weights so large that its tokens differ, and norms and biases other than 1 and 0."""
    import torch
    import transformers

    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**fields, initializer_range=0.2)
    for eps in ("rms_norm_eps", "layer_norm_epsilon"):
        if hasattr(config, eps):
            setattr(config, eps, 2.0**-17)  # the same in float32
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.normal_(std=0.2)
    return model


def folder_of(model, folder: Path) -> tuple[dict, Weights]:
    """A model saved as on the hub: the fields of its config that matter, and its tensors."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "num_local_experts" in config and config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")  # as published
    left = BOOKKEEPING | FIXED.keys() | {"_sliding_window_pattern"}
    return {name: value for name, value in config.items() if name not in left}, Weights(folder)


@cache
def tokenizer() -> BPETokenizer:
    return BPETokenizer(train_bpe(list(topics.topics.values())[:20], ROWS))


def tokenizer_keys() -> dict:
    """The keys of ``tokenizer`` in a file."""
    return gguf_writer.tokenizer_keys(tokenizer(), ROWS)

"""The keys of a GGUF file as the content of a ``config.json``, and a config as the keys of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.errors import Error
from tinyllm.weights.gguf_tables import ARCHITECTURES, Table, table_of_file

ROPE_FACTORS = "rope_freqs.weight"
INSTEAD = "use the model's Hugging Face folder"

# Keys of a model that ``read_config`` reads besides its table's. A key in FIXED must have that value; any
# other key of the model's is an error, because it might change what the model computes.
UNDERSTOOD = set(
    "vocab_size attention.value_length rope.dimension_count rope.freq_base rope.scaling.type "
    "rope.scaling.factor rope.scale_linear "
    "rope.scaling.original_context_length rope.scaling.finetuned".split()  # the last two: for YaRN only
)
WINDOW_KEYS = {"attention.sliding_window_pattern", "rope.freq_base_swa"}  # optional, of files with windows
FIXED = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "tensor_data_layout": "Meta AI original pth",
}
OPTIONAL = {"attention.head_count_kv", "attention.key_length", "expert_feed_forward_length"}


class Metadata:
    """The keys of a file at ``path``, checked as they are read; those of the model by their last part."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values
        self.architecture = self.value("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            raise Error(
                f"{path}: architecture {self.architecture!r} is not supported in a GGUF file: give one of "
                f"{', '.join(ARCHITECTURES)}, or the model's Hugging Face folder"
            )
        self.table = table_of_file(self.architecture, self.experts())
        self._check()

    def experts(self) -> int:
        count = self.values.get(f"{self.architecture}.expert_count", 0)
        return self.whole("expert_count") if not same(count, 0) else 0

    def value(self, key: str, kind, default=None):
        """The value of a key, or the default. Raises ``Error`` if it is missing or not of this type."""
        value = self.values.get(key, default)
        if value is None and not isinstance(value, kind):
            raise Error(f"{self.path} has no key {key}: convert the model again")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = type(value).__name__
            raise Error(f"{self.path}: {key} has the wrong type, {found}: convert the model again")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return self.value(f"{self.architecture}.{key}", int | float, default)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int) or value < 1:
            raise Error(
                f"{self.path}: {self.architecture}.{key} is {value!r}, not a whole number ≥ 1: convert the "
                "model again"
            )
        return value

    def _check(self) -> None:
        """Raise ``Error`` for a key that might change the model and is not understood."""
        if not same(self.values.get("split.count", 1), 1):
            raise Error(f"{self.path} is one part of a model: join the parts with `llama-gguf-split --merge`")
        known = UNDERSTOOD | self.table.keys.keys() | (WINDOW_KEYS if self.table.window else set())
        for key, value in self.values.items():
            # Only keys in these two namespaces change what llama.cpp computes; others describe the file.
            space, _, name = key.partition(".")
            if space not in (self.architecture, "adapter") or name in known:
                continue
            if space == "adapter" or name not in FIXED:
                raise Error(f"{self.path} has the unknown key {key!r}, which may change the model: {INSTEAD}")
            if not same(value, FIXED[name]):
                raise Error(f"{self.path} has {key} = {value!r}, but only {FIXED[name]!r} works: {INSTEAD}")


def read_config(metadata: Metadata, shapes: Mapping[str, tuple], factors: np.ndarray | None) -> dict:
    """The ``config.json`` of a file whose tensors have these names and shapes, Hugging Face's.

    ``factors`` are the divisors of RoPE's frequencies, if the file has them.
    """
    table = metadata.table
    named = table.keys
    embedding = f"{table.prefix}{table.outside['token_embd']}.weight"
    config = {
        "architectures": [table.hub_class],
        "model_type": table.model_type,
        "vocab_size": metadata.whole("vocab_size", shapes.get(embedding, (0,))[0]),
    }
    for key, name in named.items():
        is_number = key.endswith(("epsilon", "softcapping"))
        if key not in OPTIONAL:
            config[name] = metadata.number(key) if is_number else metadata.whole(key)
    heads, hidden = (metadata.whole(key) for key in ("attention.head_count", "embedding_length"))
    if "attention.head_count_kv" in named:
        config["num_key_value_heads"] = metadata.whole("attention.head_count_kv", heads)
    if "expert_feed_forward_length" in named:
        share = config["intermediate_size"] // config["num_experts_per_tok"]  # llama.cpp's default
        config["moe_intermediate_size"] = metadata.whole("expert_feed_forward_length", share)
    head_dim = metadata.whole("attention.key_length", hidden // heads)
    if "attention.key_length" in named:
        config["head_dim"] = head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.whole(key, head_dim) != head_dim:
            raise Error(
                f"{metadata.path} has {table.architecture}.{key} = {metadata.whole(key)}, but only the size "
                f"of a head, {head_dim}, is supported: {INSTEAD}"
            )
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    config |= {name: values[0] for name, values in table.constants.items()}
    if table.rope:
        config["rope_parameters"] = _rope_parameters(metadata, head_dim, factors)
    if table.window is not None:
        config |= _windows(metadata, config)
    for field, part in table.bias_fields.items():
        config[field] = f"{table.prefix}{table.blocks}.0.{table.inside[part]}.bias" in shapes
    for name in ("bos_token_id", "eos_token_id"):
        if f"tokenizer.ggml.{name}" in metadata.values:
            config[name] = metadata.value(f"tokenizer.ggml.{name}", int)
    return config


def _rope_parameters(metadata: Metadata, head_dim: int, factors: np.ndarray | None) -> dict:
    theta = metadata.number("rope.freq_base", 10000.0)
    # As in llama.cpp: the default type is "linear", and without a factor, or with 0, nothing is scaled.
    kind = metadata.value(f"{metadata.architecture}.rope.scaling.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        raise Error(
            f"{metadata.path} has RoPE scaling {kind!r}, but only none, linear, yarn and Llama 3's factors "
            f"are supported in a GGUF file: {INSTEAD}"
        )
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 0.0))
    scaled = kind != "none" and factor not in (0, 1)
    if factors is not None and scaled:
        raise Error(
            f"{metadata.path} has two RoPE scalings, {kind} and {ROPE_FACTORS}: convert the model again"
        )
    if factors is not None:
        trained = metadata.whole(
            "rope.scaling.original_context_length", LLAMA3["original_max_position_embeddings"]
        )
        found = llama3_parameters(factors, theta, head_dim, trained)
        if found is None:
            raise Error(f"{metadata.path} has a {ROPE_FACTORS} other than Llama 3.1's: {INSTEAD}")
        return found
    if not scaled:
        return {"rope_type": "default", "rope_theta": theta}
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":  # llama.cpp's default is the model's context
        context = metadata.whole("rope.scaling.original_context_length", metadata.whole("context_length"))
        rope["original_max_position_embeddings"] = context
    return rope


def llama3_parameters(factors: np.ndarray, theta: float, head_dim: int, trained: int) -> dict | None:
    """The parameters of Llama 3.1's RoPE scaling, recovered from its D/2 factors, which the file stores.

    The largest factor, that of the lowest frequency, is ``factor`` itself. The other three parameters are
    the same in every published model (arXiv 2407.21783 and their configs); a file of ours may have another
    original context, ``trained``. None if these are not the factors.
    """
    parameters = LLAMA3 | {"rope_theta": theta, "factor": float(factors.max())}
    parameters["original_max_position_embeddings"] = trained
    with np.errstate(all="ignore"):  # a damaged file's factors may be 0, infinite or NaN
        expected = llama3_factors(parameters, head_dim)
    # The factors were computed in float32, and near `factor` a division magnifies the rounding error.
    same_shape = factors.shape == expected.shape
    return parameters if same_shape and np.allclose(factors, expected, rtol=1e-4, atol=0) else None


LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(parameters: Mapping, head_dim: int) -> np.ndarray:
    """The divisors (D/2,) of the RoPE frequencies in Llama 3.1.

    A channel with frequency f makes n = L f / 2π turns within the original context of
    L = ``original_max_position_embeddings`` tokens. Its divisor is 1 for n ≥ ``high_freq_factor``,
    ``factor`` for n ≤ ``low_freq_factor``, and 1 / ((1 - s) / factor + s) between them, with
    s = (n - low) / (high - low). Source: ``apply_scaling`` in Meta's llama-models, arXiv 2407.21783.
    """
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    frequencies = parameters["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    s = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - s) / parameters["factor"] + s)


def _windows(metadata: Metadata, config: dict) -> dict:
    """The fields of a model with windows in most layers, Gemma."""
    table, layers = metadata.table, config["num_hidden_layers"]
    period = metadata.whole("attention.sliding_window_pattern", table.window)
    rope = config["rope_parameters"]
    theta = metadata.number("rope.freq_base_swa", table.local_rope or rope["rope_theta"])
    if table.local_rope is not None:
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}
    elif theta != rope["rope_theta"]:
        raise Error(
            f"{metadata.path} has {table.architecture}.rope.freq_base_swa = {theta}, but only that of all "
            f"layers, {rope['rope_theta']}, is supported: {INSTEAD}"
        )
    return {
        "rope_parameters": rope,
        "layer_types": layer_types(layers, period),
        "query_pre_attn_scalar": query_scalar(table, config),
    }


def layer_types(layers: int, period: int) -> list[str]:
    """Hugging Face's names: every layer has a window but every ``period``-th."""
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]


def query_scalar(table: Table, config: Mapping) -> int:
    """The number whose root divides attention scores: the size of a head, but for the largest Gemma."""
    if config["num_hidden_layers"] == table.largest:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def same(value, expected) -> bool:
    return type(value) is type(expected) and value == expected

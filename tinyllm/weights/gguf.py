"""A Llama in a GGUF file, llama.cpp's format, converted to the names and layout of a Hugging Face folder.

A GGUF file (``gguf_format.py``) differs from such a folder in three ways: the keys of the config, the names
of the tensors, and the order of the rows in Q and K, because llama.cpp's RoPE rotates channels 2i and 2i+1
together, and Hugging Face's Llama rotates channels i and i + D/2.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinyllm.errors import Error
from tinyllm.weights import StoredTensors
from tinyllm.weights.gguf_format import Entry, read_header, read_tensor

ARCHITECTURES = ("llama",)

OUTSIDE_BLOCKS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSOR_NAME = re.compile(r"(?:blk\.(0|[1-9]\d*)\.)?(\w+)\.(weight|bias)", re.ASCII)
ROPE_FACTORS = "rope_freqs.weight"
INSTEAD = "use the model's Hugging Face folder"

# Keys that _make_config reads. A key in FIXED must have that value; any other llama.* key is an error.
UNDERSTOOD = set(
    "vocab_size context_length embedding_length block_count feed_forward_length attention.head_count "
    "attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon "
    "rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scale_linear "
    "rope.scaling.original_context_length rope.scaling.finetuned".split()  # the last two: for YaRN only
)
FIXED = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "tensor_data_layout": "Meta AI original pth",
}


class GGUFFile(StoredTensors):
    """The tensors of a Llama in a GGUF file, read-only, under Hugging Face's names.

    The constructor reads only the header: ``config`` (the content of a ``config.json`` of Hugging Face's
    Llama), ``shapes`` (name to tuple), ``dtypes`` (name to GGUF's type, such as "Q4_1") and ``metadata``, the
    file's own keys: numbers, strings, lists of strings, NumPy arrays of numbers. ``weights[name]`` reads the
    tensor as a new float32 array, dequantised a few rows at a time, with the rows of Q and K in Hugging
    Face's order. No file stays open.

    Raises ``Error`` if the package gguf is not installed, if the file is missing, damaged or not a Llama, or
    has an unknown key that might change what the model computes. Reading a tensor raises ``Error`` if the
    file has changed since its header was read or gguf cannot dequantise the tensor's type.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._header = read_header(self.path)
        self.metadata = self._header.metadata
        self._check_metadata()
        self._entries = self._rename(self._header.entries)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.type for name, entry in self._entries.items()}
        self.config: dict = self._make_config()
        self._check_heads()

    def value(self, key: str, kind, default=None):
        """The value of a key, or the default. Raises ``Error`` if it is missing or not of this type."""
        value = self.metadata.get(key, default)
        if value is None and not isinstance(value, kind):
            raise Error(f"{self.path} has no key {key}: convert the model again")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = type(value).__name__
            raise Error(f"{self.path}: {key} has the wrong type, {found}: convert the model again")
        return value

    def __getitem__(self, name: str) -> np.ndarray:
        array = read_tensor(self.path, self._header, self._entries[name])
        heads = self._heads(name)
        if heads is None:
            return array
        # GGUF stores the rows of a head in pairs that are rotated together: (D/2, 2) becomes (2, D/2).
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    def _heads(self, name: str) -> int | None:
        """The number of heads in a tensor whose rows are permuted, or None if they are not."""
        if ".q_proj." in name:
            return self.config["num_attention_heads"]
        if ".k_proj." in name:
            return self.config["num_key_value_heads"]
        return None

    def _check_heads(self) -> None:
        head_dim = self.config["head_dim"]
        for name, shape in self.shapes.items():
            heads = self._heads(name)
            if heads is not None and shape[0] != heads * head_dim:
                problem = f"{name} has {shape[0]} rows, not {heads} heads of {head_dim}"
                raise Error(f"{self.path}: {problem}: copy or convert the file again")

    def _check_metadata(self) -> None:
        architecture = self.value("general.architecture", str)
        if architecture not in ARCHITECTURES:
            raise Error(
                f"{self.path}: architecture {architecture!r} is not supported in a GGUF file: give one of "
                f"{', '.join(ARCHITECTURES)}, or the model's Hugging Face folder"
            )
        if not _same(self.metadata.get("split.count", 1), 1):
            raise Error(f"{self.path} is one part of a model: join the parts with `llama-gguf-split --merge`")
        for key, value in self.metadata.items():
            # Only keys in these two namespaces change what llama.cpp computes; others describe the file.
            space, _, name = key.partition(".")
            if space not in ("llama", "adapter") or name in UNDERSTOOD:
                continue
            if space == "adapter" or name not in FIXED:
                raise Error(f"{self.path} has the unknown key {key!r}, which may change the model: {INSTEAD}")
            if not _same(value, FIXED[name]):
                raise Error(f"{self.path} has {key} = {value!r}, but only {FIXED[name]!r} works: {INSTEAD}")

    def _rename(self, entries: list[Entry]) -> dict[str, Entry]:
        """The tensors under Hugging Face's names."""
        names = {entry.name: hugging_face_name(entry.name) for entry in entries if entry.name != ROPE_FACTORS}
        unknown = [repr(name) for name in names if names[name] is None]
        if unknown:
            raise Error(f"{self.path} has tensors that are not a Llama's, {', '.join(unknown)}: {INSTEAD}")
        return {
            names[entry.name]: dataclasses.replace(entry, name=names[entry.name])
            for entry in entries
            if entry.name in names
        }

    def _make_config(self) -> dict:
        heads = self._whole("attention.head_count")
        hidden = self._whole("embedding_length")
        head_dim = self._whole("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._whole(key, head_dim) != head_dim:
                raise Error(
                    f"{self.path} has llama.{key} = {self._whole(key)}, but only the size of a head, "
                    f"{head_dim}, is supported: {INSTEAD}"
                )
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._whole("vocab_size", self.shapes.get("model.embed_tokens.weight", (0,))[0]),
            "hidden_size": hidden,
            "intermediate_size": self._whole("feed_forward_length"),
            "num_hidden_layers": self._whole("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._whole("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._whole("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope_parameters(head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.shapes,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self.shapes,
            "hidden_act": "silu",
        }
        for name in ("bos_token_id", "eos_token_id"):
            if f"tokenizer.ggml.{name}" in self.metadata:
                config[name] = self.metadata[f"tokenizer.ggml.{name}"]
        return config

    def _number(self, key: str, default: float | None = None) -> float:
        return self.value(f"llama.{key}", int | float, default)

    def _whole(self, key: str, default: int | None = None) -> int:
        value = self._number(key, default)
        if not isinstance(value, int) or value < 1:
            raise Error(
                f"{self.path}: llama.{key} is {value!r}, not a whole number ≥ 1: convert the model again"
            )
        return value

    def _rope_parameters(self, head_dim: int) -> dict:
        theta = self._number("rope.freq_base", 10000.0)
        # As in llama.cpp: the default type is "linear", and without a factor, or with 0, nothing is scaled.
        kind = self.value("llama.rope.scaling.type", str, "linear")
        if kind not in ("none", "linear"):
            raise Error(
                f"{self.path} has RoPE scaling {kind!r}, but only none, linear and Llama 3's factors are "
                f"supported in a GGUF file: {INSTEAD}"
            )
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 0.0))
        linear = kind == "linear" and factor not in (0, 1)
        factors = next((entry for entry in self._header.entries if entry.name == ROPE_FACTORS), None)
        if factors is not None and linear:
            raise Error(
                f"{self.path} has two RoPE scalings, linear and {ROPE_FACTORS}: convert the model again"
            )
        if factors is not None:
            return self._llama3_parameters(factors, theta, head_dim)
        if linear:
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        return {"rope_type": "default", "rope_theta": theta}

    def _llama3_parameters(self, entry: Entry, theta: float, head_dim: int) -> dict:
        """The parameters of Llama 3.1's RoPE scaling, recovered from its D/2 factors, which the file stores.

        The largest factor, that of the lowest frequency, is ``factor`` itself. The other three parameters are
        the same in every published model (arXiv 2407.21783 and their configs).
        """
        factors = read_tensor(self.path, self._header, entry)
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        with np.errstate(all="ignore"):  # a damaged file's factors may be 0, infinite or NaN
            expected = llama3_factors(parameters, head_dim)
        # The factors were computed in float32, and near `factor` a division magnifies the rounding error.
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
            raise Error(f"{self.path} has a {ROPE_FACTORS} other than Llama 3.1's: {INSTEAD}")
        return parameters


def hugging_face_name(name: str) -> str | None:
    """Hugging Face's name of a tensor of GGUF's Llama, or None if it has no such tensor.

    For example, ``blk.0.ffn_up.weight`` is ``model.layers.0.mlp.up_proj.weight``.
    """
    found = TENSOR_NAME.fullmatch(name)
    if found is None:
        return None
    block, part, kind = found.groups()
    if block is None:
        return f"{OUTSIDE_BLOCKS[part]}.{kind}" if part in OUTSIDE_BLOCKS else None
    return f"model.layers.{block}.{IN_BLOCK[part]}.{kind}" if part in IN_BLOCK else None


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


def _same(value, expected) -> bool:
    return isinstance(value, type(expected)) and value == expected

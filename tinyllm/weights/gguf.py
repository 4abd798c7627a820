"""How does a GGUF file become the same names and arrays as a Hugging Face folder?

GGUF is llama.cpp's format: one file with a header (keys with values, then every tensor's name, shape,
type and offset) followed by the numbers, most of them quantised: blocks of 32 or 256 weights with 2 to
8 bits each and a scale in common. Between it and a folder stand three translations: the keys of the
config, the names of the tensors, and the order of the rows in Q and K, because llama.cpp rotates
channels 2i and 2i+1 together and Hugging Face's Llama channels i and i + D/2.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The blocks are turned into numbers by
llama.cpp's own package, gguf. The header is read here: gguf.GGUFReader takes 3 seconds for a vocabulary
of 49,152 tokens, and a damaged count can keep it busy until the memory is full.
"""

import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyllm.errors import Error
from tinyllm.files import check_is_file

MAGIC, VERSIONS = b"GGUF", (2, 3)

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

STRING, ARRAY = 8, 9  # the other codes of a value's type; SCALARS has struct's letters for the simple ones

MAX_DIMS = 4

ALIGNMENT = 32

BLOCK = 2**17  # numbers dequantised at once; gguf's working arrays for them stay in the cache: twice as fast

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

# Keys that the config is made of; a key in FIXED must have that value, any other llama.* key is refused.
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


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes lie. ``shape`` as in NumPy: GGUF writes it the other way round."""

    name: str
    shape: tuple[int, ...]
    type: str
    row_bytes: int
    offset: int


class GGUFFile(Mapping[str, np.ndarray]):
    """A Llama in a GGUF file, read-only, under Hugging Face's names; a tensor is read when asked for.

    Making one reads the header only: ``config`` (as a ``config.json`` of Hugging Face's Llama),
    ``shapes`` (name to tuple), ``dtypes`` (name to GGUF's type, such as "Q4_1") and ``metadata``, the
    file's own keys: numbers, strings, lists of strings, NumPy arrays of numbers. Every
    ``weights[name]`` is a new float32 array, dequantised a few rows at a time, with Q and K in
    Hugging Face's order, and leaves no file open.

    Raises Error if the file is missing, damaged, changed since its header was read or no Llama; for a
    key that might change what the model computes and is not understood; and, when a tensor is asked
    for, if gguf is not installed or cannot dequantise its type.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            check_is_file(self.path)
            with open(self.path, "rb") as file:
                self._written = os.fstat(file.fileno()).st_mtime_ns
                self.metadata, entries = _read_header(file)
        except OSError as error:
            raise Error(f"{path} cannot be read ({error.strerror}): check the path") from error
        except (ValueError, struct.error) as error:
            raise Error(f"{path} is not a complete GGUF file ({error}): copy it again") from error
        self._check_metadata()
        self._entries = self._rename(entries)
        self.shapes: dict[str, tuple[int, ...]] = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes: dict[str, str] = {name: entry.type for name, entry in self._entries.items()}
        self.config: dict = self._make_config({entry.name: entry for entry in entries})
        self._check_heads()

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._dequantize(name, self._entries[name])
        heads = self._heads(name)
        if heads is None:
            return array
        # GGUF's rows of a head come in pairs that are rotated together: (D/2, 2) becomes (2, D/2).
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _dequantize(self, name: str, entry: Entry) -> np.ndarray:
        gguf = _import_gguf()
        type_ = gguf.GGMLQuantizationType[entry.type]
        array = np.empty(entry.shape, np.float32)
        rows = array.reshape(-1, entry.shape[-1])
        step = max(1, BLOCK // entry.shape[-1])
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns != self._written:
                    raise Error(f"{self.path} was replaced while it was being read: load the model again")
                file.seek(entry.offset)
                for start in range(0, len(rows), step):
                    block = rows[start : start + step]
                    raw = np.fromfile(file, np.uint8, len(block) * entry.row_bytes)
                    block[:] = gguf.dequantize(raw.reshape(len(block), entry.row_bytes), type_)
        except NotImplementedError as error:
            raise Error(
                f"{self.path} stores {name} as {entry.type}, which gguf cannot dequantise: convert it to "
                "F16 or to Q8_0"
            ) from error
        except (OSError, ValueError) as error:
            raise Error(f"{self.path}: {name} cannot be read ({error}): copy the file again") from error
        return array

    def _heads(self, name: str) -> int | None:
        """The number of heads whose rows are permuted in this tensor."""
        if ".q_proj." in name:
            return self.config["num_attention_heads"]
        if ".k_proj." in name:
            return self.config["num_key_value_heads"]
        return None

    def _check_heads(self) -> None:
        for name, shape in self.shapes.items():
            heads = self._heads(name)
            if heads is not None and shape[0] != heads * self.config["head_dim"]:
                raise Error(
                    f"{self.path}: {name} has {shape[0]} rows, not {heads} heads of "
                    f"{self.config['head_dim']}: copy or convert the file again"
                )

    def _check_metadata(self) -> None:
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise Error(
                f"{self.path}: the architecture {_show(architecture)} is not supported in a GGUF file; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        if not _same(self.metadata.get("split.count", 1), 1):
            raise Error(f"{self.path} is one part of a model: join the parts with `llama-gguf-split --merge`")
        for key, value in self.metadata.items():
            # llama.cpp takes what it computes from these two name spaces; the others describe the file.
            space, _, name = key.partition(".")
            if space not in ("llama", "adapter") or name in UNDERSTOOD:
                continue
            if space == "adapter" or name not in FIXED:
                raise Error(
                    f"{self.path} has the key {key!r}, which might change the model and is not understood"
                )
            if not _same(value, FIXED[name]):
                raise Error(f"{self.path} has {key} = {_show(value)}, and only {FIXED[name]!r} is supported")

    def _rename(self, entries: list[Entry]) -> dict[str, Entry]:
        """The tensors under Hugging Face's names."""
        renamed, unknown = {}, []
        for entry in entries:
            name = hugging_face_name(entry.name)
            if name is not None:
                renamed[name] = entry
            elif entry.name != ROPE_FACTORS:
                unknown.append(entry.name)
        if unknown:
            raise Error(
                f"{self.path} holds tensors that a Llama does not have: {', '.join(map(repr, unknown))}"
            )
        return renamed

    def _make_config(self, entries: dict[str, Entry]) -> dict:
        heads = self._whole("attention.head_count")
        hidden = self._whole("embedding_length")
        head_dim = self._whole("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._whole(key, head_dim) != head_dim:
                raise Error(
                    f"{self.path} has llama.{key} = {self._whole(key)}, and only the size of a head, "
                    f"{head_dim}, is supported"
                )
        embedding = self.shapes.get("model.embed_tokens.weight", (0,))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._whole("vocab_size", embedding[0]),
            "hidden_size": hidden,
            "intermediate_size": self._whole("feed_forward_length"),
            "num_hidden_layers": self._whole("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._whole("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._whole("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope_parameters(entries.get(ROPE_FACTORS), head_dim),
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
        value = self.metadata.get(f"llama.{key}", default)
        if value is None:
            raise Error(f"{self.path} has no key llama.{key}: convert the model again")
        if isinstance(value, bool) or not isinstance(value, int | float):
            kind = type(value).__name__
            raise Error(f"{self.path}: llama.{key} must be one number for all layers, not of type {kind}")
        return value

    def _whole(self, key: str, default: int | None = None) -> int:
        value = self._number(key, default)
        if not isinstance(value, int) or value < 1:
            raise Error(f"{self.path}: llama.{key} must be a whole number of at least 1, not {value!r}")
        return value

    def _rope_parameters(self, factors: Entry | None, head_dim: int) -> dict:
        theta = self._number("rope.freq_base", 10000.0)
        # Where no type is written, llama.cpp reads "linear"; where no factor is, or 0, nothing is scaled.
        kind = self.metadata.get("llama.rope.scaling.type", "linear")
        if not isinstance(kind, str) or kind not in ("none", "linear"):
            raise Error(
                f"{self.path} scales RoPE by {_show(kind)}; supported in a GGUF file: none, linear, and "
                "Llama 3's factors"
            )
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 0.0))
        linear = kind == "linear" and factor not in (0, 1)
        if factors is not None:
            if linear:
                raise Error(
                    f"{self.path} scales RoPE twice, by a factor and by {ROPE_FACTORS}: convert it again"
                )
            return self._llama3_parameters(self._dequantize(ROPE_FACTORS, factors), theta, head_dim)
        if linear:
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        return {"rope_type": "default", "rope_theta": theta}

    def _llama3_parameters(self, factors: np.ndarray, theta: float, head_dim: int) -> dict:
        """What Llama 3.1's formula was given, from what came out: the file keeps only that.

        The largest of the D/2 factors is the slowest channel's, ``factor`` itself; the other three
        parameters are the same in every published model (arXiv 2407.21783 and their configs).
        """
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        with np.errstate(
            all="ignore"
        ):  # what a damaged file makes of this is not a number, and close to none
            expected = llama3_factors(parameters, head_dim)
        # Not closer: they were computed in float32, and near `factor` a division magnifies the rounding.
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
            raise Error(
                f"{self.path} scales RoPE by a {ROPE_FACTORS} that is not Llama 3.1's: use the model's "
                "Hugging Face folder"
            )
        return parameters


def hugging_face_name(name: str) -> str | None:
    """``blk.0.ffn_up.weight`` is ``model.layers.0.mlp.up_proj.weight``; None for what no Llama has."""
    found = TENSOR_NAME.fullmatch(name)
    if found is None:
        return None
    block, part, kind = found.groups()
    if block is None:
        return f"{OUTSIDE_BLOCKS[part]}.{kind}" if part in OUTSIDE_BLOCKS else None
    return f"model.layers.{block}.{IN_BLOCK[part]}.{kind}" if part in IN_BLOCK else None


def llama3_factors(parameters: Mapping, head_dim: int) -> np.ndarray:
    """What Llama 3.1 divides each of the D/2 RoPE frequencies by: (D/2,).

    With L = original_max_position_embeddings and n = L / wavelength, the turns a channel makes within
    the original context: 1 for n ≥ high_freq_factor, ``factor`` for n ≤ low_freq_factor, and between
    them 1 / ((1 - s) / factor + s), s = (n - low) / (high - low).
    """
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    frequencies = parameters["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    s = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - s) / parameters["factor"] + s)


def _same(value, expected) -> bool:
    return isinstance(value, type(expected)) and value == expected


def _show(value) -> str:
    return f"an array of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)


def _import_gguf():
    try:
        import gguf
    except ImportError as error:
        raise Error("reading a GGUF file needs the package gguf: pip install 'tinyllm[models]'") from error
    return gguf


# ---------------------------------------------------------------------------- the header


class _Header:
    """A file read field by field, never past its end: a damaged length is noticed before memory is taken."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.position = file, os.fstat(file.fileno()).st_size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise ValueError("it ends inside its header")
        self.position += count
        return self.file.read(count)

    def number(self, letter: str) -> int | float | bool:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, code: int):
        if code in SCALARS:
            return self.number(SCALARS[code])
        if code == STRING:
            return self.text()
        if code == ARRAY:
            return self.array()
        raise ValueError(f"{code} is no type of a value")

    def array(self) -> list[str] | np.ndarray:
        code, count = self.number("I"), self.number("Q")
        if code == STRING:
            return [self.text() for _ in range(count)]
        if code in SCALARS:
            dtype = np.dtype("<" + SCALARS[code])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        raise ValueError(f"{code} is no type of an array's elements")


def _read_header(file: BinaryIO) -> tuple[dict, list[Entry]]:
    header = _Header(file)
    if header.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with the letters GGUF")
    version = header.number("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, not 2 or 3 in little-endian order")
    tensor_count, key_count = header.number("Q"), header.number("Q")
    metadata = {}
    for _ in range(key_count):
        key = header.text()
        if key in metadata:
            raise ValueError(f"{key!r} is there twice")
        metadata[key] = header.value(header.number("I"))
    infos = [_read_tensor_info(header) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, no power of two")
    start = -(-header.position // alignment) * alignment
    entries = [_locate(header, start, *info) for info in infos]
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError("two tensors have the same name")
    _check_places(entries, start, alignment)
    return metadata, entries


def _read_tensor_info(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = header.text(), header.number("I")
    if not 1 <= dims <= MAX_DIMS:
        raise ValueError(f"{name!r} has {dims} dimensions")
    shape = tuple(header.number("Q") for _ in range(dims))[::-1]
    return name, shape, header.number("I"), header.number("Q")


def _locate(header: _Header, start: int, name: str, shape: tuple[int, ...], code: int, offset: int) -> Entry:
    gguf = _import_gguf()
    if code not in gguf.GGMLQuantizationType.__members__.values():
        raise Error(
            f"{header.file.name} stores {name!r} in the type number {code}, unknown to the installed gguf: "
            "update gguf, or convert the file to F16 or to Q8_0"
        )
    type_ = gguf.GGMLQuantizationType(code)
    block_length, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    if min(shape) < 1 or shape[-1] % block_length:
        raise ValueError(
            f"{name!r} has the shape {shape}, and {type_.name} comes in blocks of {block_length}"
        )
    row_bytes = shape[-1] // block_length * block_bytes
    if start + offset + math.prod(shape[:-1]) * row_bytes > header.size:
        raise ValueError(f"{name!r} lies beyond its end")
    return Entry(name, shape, type_.name, row_bytes, start + offset)


def _check_places(entries: list[Entry], start: int, alignment: int) -> None:
    """One after another in the header's order, as llama.cpp has it: a thousand tensors of the same bytes
    would make a small file a large model."""
    for entry in entries:
        if entry.offset != start:
            raise ValueError(f"{entry.name!r} does not begin where the tensor before it ends")
        size = math.prod(entry.shape[:-1]) * entry.row_bytes
        start += -(-size // alignment) * alignment

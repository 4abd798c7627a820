"""Broken models in Hugging Face's layout: safetensors files, their index, and config.json.

Safetensors files are written and parsed here independently of the reader under test, to check that every
array is the one that the header describes.
"""

from __future__ import annotations

import json
import math
import struct
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from parity.fuzz.mutations import (
    Mutation,
    byte_mutations,
    file_mutations,
    fixed_edit,
    json_mutations,
    mutations_of_json,
    number_mutations,
    read_json,
    write_json,
)
from tinyllm import no_grad
from tinyllm.models import GPT2, GPT2Config, Llama, LlamaConfig, load_model
from tinyllm.nn import Module
from tinyllm.weights.safetensors import CONFIG, INDEX, SINGLE_FILE, Weights

# ---------------------------------------------------------------------------- safetensors

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16 as raw 16-bit integers


def safetensors(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A safetensors file with these names, dtypes and shapes, and random numbers."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return with_header(b"", json.dumps(header)) + np.random.default_rng(0).bytes(end)


def parts_of(data: bytes) -> tuple[str, bytes]:
    """(header, data) of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length].decode("utf-8"), data[8 + length :]


def with_header(data: bytes, header: str) -> bytes:
    encoded = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + (parts_of(data)[1] if data else b"")


TENSORS = {
    "a": ("F32", (3, 4)),
    "b": ("F64", (2, 2, 2)),
    "nothing": ("F32", (0, 4)),
    "c": ("BF16", (5,)),
    "d": ("F16", (2, 3)),
    "one number": ("F32", ()),
}


def make_single(folder: Path) -> None:
    (folder / SINGLE_FILE).write_bytes(safetensors(TENSORS))


def load_single(folder: Path) -> None:
    check_weights(Weights(folder), [folder / SINGLE_FILE])


def check_weights(weights: Mapping[str, np.ndarray], files: list[Path]) -> None:
    """Check the dtype, shape and bytes of every array against the headers, parsed independently."""
    seen = set()
    for file in files:
        header, numbers = parts_of(file.read_bytes())
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            array = weights[name]
            start, end = entry["data_offsets"]
            assert array.shape == tuple(entry["shape"]) == weights.shapes[name], name
            assert array.dtype.itemsize == np.dtype(NUMPY[entry["dtype"]]).itemsize, name
            assert array.tobytes() == numbers[start:end], name
            seen.add(name)
    assert seen == set(weights), f"{seen} in the headers, {set(weights)} in the weights"


def header_mutations(file: str, data: bytes) -> list[Mutation]:
    header = json.loads(parts_of(data)[0])
    start = 8 + len(parts_of(data)[0])
    ends = [start + entry["data_offsets"][1] for entry in header.values() if "dtype" in entry]
    return [
        *json_mutations(file, header, with_header),
        *number_mutations(file, {"the header's length": (0, 8)}),
        *byte_mutations(data, file, [1, 8, 9, start, *ends]),
        *file_mutations(file),
        *_tensor_changes(file, header),
    ]


def _tensor_changes(file: str, header: dict) -> list[Mutation]:
    """Other dtypes; tensors that overlap, leave gaps or have reversed offsets; sizes that overflow."""
    changes = {
        "a overlaps b": {"data_offsets": header["b"]["data_offsets"]},
        "a has reversed offsets": {"data_offsets": header["a"]["data_offsets"][::-1]},
        "a is one byte short": {"data_offsets": [0, 47]},
        "a begins late": {"data_offsets": [4, 48]},
        "a ends after the file": {"data_offsets": [0, 2**40]},
        "a's size overflows 64 bits": {"shape": [2**32, 2**32, 3, 4]},
        "a's size overflows to 0": {"shape": [2**63, 2], "data_offsets": [0, 0]},
        "a has a thousand dimensions": {"shape": [1] * 1000 + [3, 4]},
        "a has a hundred dimensions": {"shape": [1] * 100 + [3, 4]},
    }
    for dtype in ("BOOL", "U8", "I64", "C64", "F8_E4M3", "F4", "f32", "F128"):
        changes[f"a is {dtype}"] = {"dtype": dtype}
    mutations = [
        _with_tensor(file, name, header, "a", change, expect="refused") for name, change in changes.items()
    ]
    for name, shape in (("huge", [0, 2**62]), ("of many dimensions", [0] * 100), ("overflowing", [0, 2**64])):
        named = f"an empty tensor whose shape is {name}"
        mutations.append(_with_tensor(file, named, header, "nothing", {"shape": shape}))
    return mutations


def _with_tensor(file: str, name: str, header: dict, tensor: str, change: dict, **options) -> Mutation:
    text = json.dumps(header | {tensor: header[tensor] | change})
    return fixed_edit(file, name, lambda data: with_header(data, text), **options)


def single_mutations(folder: Path) -> list[Mutation]:
    return header_mutations(SINGLE_FILE, (folder / SINGLE_FILE).read_bytes())


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def make_shards(folder: Path) -> None:
    names = list(TENSORS)
    for shard, part in zip(SHARDS, (names[:3], names[3:])):
        (folder / shard).write_bytes(safetensors({name: TENSORS[name] for name in part}))
    weight_map = {name: SHARDS[i >= 3] for i, name in enumerate(names)}
    write_json(folder / INDEX, {"metadata": {"total_size": 156}, "weight_map": weight_map})


def load_shards(folder: Path) -> None:
    weights = Weights(folder)
    files = set(read_json(folder / INDEX)["weight_map"].values())
    check_weights(weights, [folder / file for file in files])


def shard_mutations(folder: Path) -> list[Mutation]:
    places = "../{}", "./{}", "sub/{}", "..\\{}", "{folder}/{}", "{}/", "{}\0"
    return [
        *mutations_of_json(folder, INDEX),
        *file_mutations(SHARDS[1]),
        *header_mutations(SHARDS[0], (folder / SHARDS[0]).read_bytes()),
        *(_outside(read_json(folder / INDEX), place) for place in places),
    ]


def _outside(index: dict, name: str) -> Mutation:
    """The index refers to a valid shard in a forbidden place, which a careless reader would load."""

    def apply(folder: Path, rng: np.random.Generator) -> None:
        (folder / "sub").mkdir()
        for place in (folder.parent, folder / "sub"):
            (place / SHARDS[0]).write_bytes((folder / SHARDS[0]).read_bytes())
        shard = name.format(SHARDS[0], folder=folder.parent)
        weight_map = {
            key: shard if value == SHARDS[0] else value for key, value in index["weight_map"].items()
        }
        write_json(folder / INDEX, index | {"weight_map": weight_map})

    return Mutation(f"the index refers to {name!r}", apply, expect="refused")


# ---------------------------------------------------------------------------- models

SMALL_GPT2 = GPT2Config(vocab_size=7, n_positions=6, n_embd=4, n_layer=2, n_head=2)

SMALL_LLAMA = LlamaConfig(
    vocab_size=7,
    hidden_size=8,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=6,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
)

BOOKKEEPING = {"architectures": ["X"], "bos_token_id": 0, "eos_token_id": [0, 1], "torch_dtype": "float32"}


def make_gpt2(folder: Path) -> None:
    _make_model(folder, GPT2(SMALL_GPT2, rng=np.random.default_rng(0)))


def make_llama(folder: Path) -> None:
    _make_model(folder, Llama(SMALL_LLAMA, rng=np.random.default_rng(0)))


def _make_model(folder: Path, model: Module) -> None:
    model.save_pretrained(folder)
    write_json(folder / CONFIG, read_json(folder / CONFIG) | BOOKKEEPING)


def load_hugging_face(folder: Path) -> None:
    check_model(load_model(folder))


def check_model(model: Module) -> None:
    """Check that the config's values have their declared types, and that the model computes logits."""
    for name, parameter in model.named_parameters():
        assert parameter.data.dtype == np.float32, name
    hints = typing.get_type_hints(type(model.config))
    for field in fields(model.config):
        value = getattr(model.config, field.name)
        assert is_a(value, hints[field.name]), f"{field.name} is {value!r}"
    positions = getattr(model.config, "n_positions", None) or model.config.max_position_embeddings
    ids = np.array([[0, model.config.vocab_size - 1]])[:, :positions]
    with no_grad(), np.errstate(all="ignore"):
        assert model(ids).shape == (*ids.shape, model.config.vocab_size)


def is_a(value, hint) -> bool:
    """Whether a config's value has its field's type; an int is a valid float, but a bool is not."""
    types = typing.get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in types
    if isinstance(value, int | float) and float in types:
        return math.isfinite(value)
    return isinstance(value, types)


def config_mutations(folder: Path) -> list[Mutation]:
    weights = (folder / SINGLE_FILE).read_bytes()
    return mutations_of_json(folder, CONFIG) + byte_mutations(weights, SINGLE_FILE)

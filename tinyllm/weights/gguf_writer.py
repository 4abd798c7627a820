"""Writing a GGUF file, tensor by tensor, with the package gguf."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.backend.device import to_device
from tinyllm.errors import Error
from tinyllm.files import replacing
from tinyllm.weights.gguf_config import ROPE_FACTORS
from tinyllm.weights.gguf_export import INSTEAD, model_keys, rope_factors, table_of_model
from tinyllm.weights.gguf_format import import_gguf
from tinyllm.weights.gguf_tables import EXPERT, Table

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # of --type: GGUF's names
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # general.file_type, llama.cpp's enum llama_ftype
SINGLE = ("ffn_gate_inp", "position_embd")  # parts that llama.cpp expects in float32
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}  # Q8_0: a block's scale is its largest weight / 127
EARLIER = "choose a checkpoint from before the loss became so"
BLOCK = 2**20  # weights converted at once


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its name, shape and type in the file, and the arrays it consists of.

    The rows of ``heads`` heads are reordered if it is not 0, and ``offset`` is added to every element.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    arrays: tuple[np.ndarray, ...]
    heads: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Written:
    """What ``write_gguf`` wrote: the number of tensors, and of those that q8_0 cannot hold (in float16)."""

    tensors: int
    not_quantized: int


def write_gguf(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    type: str = "f32",
    about: Mapping[str, Any] | None = None,
) -> Written:
    """Write a model as a GGUF file, atomically.

    ``config`` is the content of a ``config.json``, ``tensors`` maps Hugging Face's names to arrays in their
    layout, and ``about`` has further keys: those of the tokenizer, and ``general.name``. ``type`` is that of
    the matrices: "f32", "f16", "bf16" or "q8_0". Vectors, GPT-2's positions and the routers of experts are
    float32, and matrices whose rows are not a multiple of 32 long are float16 instead of q8_0, as in
    llama.cpp's converter.

    Raises ``Error`` if llama.cpp would compute something else than the model (see ``model_keys``), if a
    weight is not finite or too large for float16, if the file exists or if gguf is not installed, and OSError
    if the file cannot be written.
    """
    gguf, path = import_gguf("writing"), Path(path)
    if type not in TYPES:
        raise Error(f"type {type!r} is not one of {', '.join(TYPES)}: choose one of them")
    _check_new(path)
    table = table_of_model(config["model_type"])
    keys = {**(about or {}), **model_keys(table, config)}
    keys |= {"general.file_type": FILE_TYPES[type], "general.quantization_version": 2}
    planned = _plan(gguf, table, config, tensors, TYPES[type])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            _write(gguf, new, table, keys, planned)
            _check_new(path)  # another program may have written it meanwhile
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}): check the path and disk space"
        ) from error
    short = [each for each in planned if type == "q8_0" and each.type == "F16"]
    return Written(len(planned), len(short))


def _check_new(path: Path) -> None:
    if os.path.lexists(path):
        raise Error(f"{path} exists already: choose another name")


def _plan(gguf, table: Table, config: Mapping, tensors: Mapping[str, np.ndarray], type: str) -> list[Planned]:
    """The tensors of the file in order. Raises ``Error`` for one that the format has no place for."""
    found: dict[str, dict] = {}
    for name, array in tensors.items():
        place = table.tensor_of(name)
        if place is None:
            raise Error(f"a GGUF file of a {table.architecture} has no place for {name}: {INSTEAD}")
        part, gguf_name, expert = place
        is_bias = gguf_name.endswith(".bias")
        if is_bias and part == "output":
            raise Error(
                f"neither llama.cpp nor transformers has {name}, so that only tinyllm can run the model"
            )
        if (is_bias and part not in table.biases) or (part == "output" and table.tied):
            raise Error(f"llama.cpp's {table.architecture} has no {name}: {INSTEAD}")
        if part in table.transposed:  # of a bias nothing changes
            array = array.T
        found.setdefault(gguf_name, {"part": part, "arrays": {}})["arrays"][expert or 0] = array
    for part in table.needed_biases:
        for name in [name for name in found if f".{part}.weight" in name]:
            zeros = np.zeros(len(found[name]["arrays"][0]), np.float32)
            found.setdefault(name.replace(".weight", ".bias"), {"part": part, "arrays": {0: zeros}})
    heads = {"attn_q": config.get("num_attention_heads"), "attn_k": config.get("num_key_value_heads")}
    planned = []
    for name, each in found.items():
        part, arrays = each["part"], tuple(each["arrays"][e] for e in sorted(each["arrays"]))
        shape = arrays[0].shape
        if EXPERT in table.inside.get(part, ""):
            shape = len(arrays), *shape
        kind = "F32" if len(shape) == 1 or part in SINGLE else type
        if kind == "Q8_0" and shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]:
            kind = "F16"
        permuted_heads = heads[part] if part in table.permuted else 0
        offset = int(table.offset_norms and part.endswith("norm"))
        planned.append(Planned(name, shape, kind, arrays, permuted_heads, offset))
    factors = rope_factors(table, config)
    if factors is not None:
        planned.append(Planned(ROPE_FACTORS, factors.shape, "F32", (factors,)))
    return planned


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a Llama's Q or K in GGUF's order, in which those that are rotated together are adjacent."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _write(gguf, path: Path, table: Table, keys: Mapping[str, Any], planned: list[Planned]) -> None:
    from tqdm import tqdm

    writer = gguf.GGUFWriter(path, table.architecture)
    try:
        for key, value in keys.items():
            _add_key(writer, key, value)
        for each in planned:
            type_ = gguf.GGMLQuantizationType[each.type]
            num_bytes = math.prod(_bytes_shape(gguf, each))
            writer.add_tensor_info(each.name, each.shape, np.dtype(np.float32), num_bytes, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in tqdm(planned, desc="tensors", delay=2, leave=False):
            writer.write_tensor_data(_encoded(gguf, each))
    finally:
        writer.close()


def _add_key(writer, key: str, value: Any) -> None:
    """Add a key with the type that llama.cpp reads it as: its integers are unsigned, its floats single."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _encoded(gguf, each: Planned) -> np.ndarray:
    """The bytes of a tensor (rows, bytes of a row), converted a few rows at a time."""
    type_ = gguf.GGMLQuantizationType[each.type]
    encoded = np.empty(_bytes_shape(gguf, each), np.uint8)
    done = 0
    for rows in _rows(each, max(1, BLOCK // each.shape[-1])):
        largest = np.abs(rows).max()
        if not np.isfinite(largest):
            raise Error(f"{each.name} has a weight that is not finite: {EARLIER}")
        if largest > LARGEST.get(each.type, np.inf):
            raise Error(
                f"{each.name} has a weight of {largest:.3g}, too large for {each.type}: choose bf16 or f32"
            )
        block = np.ascontiguousarray(gguf.quantize(rows, type_))
        encoded[done : done + len(rows)] = block.view(np.uint8).reshape(len(rows), -1)
        done += len(rows)
    return encoded


def _bytes_shape(gguf, each: Planned) -> tuple[int, int]:
    """(rows, bytes of a row) of a tensor."""
    length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[each.type]]
    return math.prod(each.shape[:-1]), each.shape[-1] // length * size


def _rows(each: Planned, step: int) -> Iterator[np.ndarray]:
    """The rows of a tensor in float32, ``step`` at a time, those of the experts one after another."""
    for array in each.arrays:
        array = to_device(array, "cpu")
        if each.heads:
            array = permuted(array, each.heads)
        array = array.reshape(-1, each.shape[-1])
        for start in range(0, len(array), step):
            rows = np.ascontiguousarray(array[start : start + step], dtype=np.float32)
            yield rows + np.float32(each.offset)

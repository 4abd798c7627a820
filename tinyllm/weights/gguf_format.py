"""The file format GGUF: reading the header and the data of a tensor.

The header (keys with values, then the name, shape, type and offset of every tensor) is followed by the data.
Most tensors are quantised: blocks of 32 or 256 weights with 2 to 8 bits each share a scale.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Blocks are dequantised by llama.cpp's own
package, gguf. The header is parsed here, because gguf.GGUFReader takes 3 seconds for a vocabulary of 49,152
tokens and, given a damaged count, may loop until memory is exhausted.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyllm.checks import is_integer, pip_install
from tinyllm.errors import Error
from tinyllm.files import open_regular

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_DIMS, ALIGNMENT = 4, 32

# The type codes of values; those of numbers with struct's format character.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

BLOCK = 2**17  # weights dequantised at once; gguf's temporary arrays then fit in the CPU cache: twice as fast


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes are. ``shape`` is in NumPy's order; GGUF stores it reversed."""

    name: str
    shape: tuple[int, ...]
    type: str
    row_bytes: int
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Header:
    """The content of a file's header, and the time when the file was last written (``mtime_ns``).

    ``metadata`` maps the file's keys to numbers, strings, lists of strings or NumPy arrays of numbers.
    """

    metadata: dict
    entries: list[Entry]
    mtime_ns: int


def read_header(path: Path) -> Header:
    """The header of a GGUF file. Raises ``Error`` if it cannot be read, is not GGUF or is incomplete."""
    try:
        with open_regular(path) as file:
            mtime_ns = os.fstat(file.fileno()).st_mtime_ns
            return Header(*_read(_Fields(file)), mtime_ns)
    except OSError as error:
        raise Error(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, struct.error) as error:
        raise Error(f"{path} is not a complete GGUF file ({error}): copy it again") from error


def read_tensor(path: Path, header: Header, entry: Entry) -> np.ndarray:
    """A tensor as a new float32 array, dequantised a few rows at a time; no file stays open.

    Raises ``Error`` if the package gguf is missing or does not support the type, or if the file was replaced
    since its header was read.
    """
    gguf = import_gguf("reading")
    array = np.empty(entry.shape, np.float32)
    rows = array.reshape(-1, entry.shape[-1])
    step = max(1, BLOCK // entry.shape[-1])
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_mtime_ns != header.mtime_ns:
                raise Error(f"{path} was replaced while it was being read: load the model again")
            file.seek(entry.offset)
            for start in range(0, len(rows), step):
                block = rows[start : start + step]
                raw = np.fromfile(file, np.uint8, len(block) * entry.row_bytes)
                raw = raw.reshape(len(block), entry.row_bytes)
                block[:] = gguf.dequantize(raw, gguf.GGMLQuantizationType[entry.type])
    except NotImplementedError as error:
        raise Error(
            f"{path} stores {entry.name} as {entry.type}, which gguf cannot dequantise: convert it to F16 or "
            "Q8_0"
        ) from error
    except (OSError, ValueError) as error:
        raise Error(f"{path}: {entry.name} cannot be read ({error}): copy the file again") from error
    return array


def import_gguf(use: str):
    """The package gguf. Raises ``Error``, saying that it is needed for reading or writing, without it."""
    try:
        import gguf
    except ImportError as error:
        raise Error(f"{use} a GGUF file needs the package gguf: {pip_install('models')}") from error
    return gguf


class _Fields:
    """Reads the fields of a file; a damaged length beyond its end is an error before memory is allocated."""

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
        raise ValueError(f"{code} is not the type of a value")

    def array(self) -> list[str] | np.ndarray:
        code, count = self.number("I"), self.number("Q")
        if code == STRING:
            return [self.text() for _ in range(count)]
        if code in SCALARS:
            dtype = np.dtype("<" + SCALARS[code])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        raise ValueError(f"{code} is not the type of an array's elements")


def _read(fields: _Fields) -> tuple[dict, list[Entry]]:
    if fields.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with the letters GGUF")
    version = fields.number("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, not 2 or 3 in little-endian order")
    tensor_count, key_count = fields.number("Q"), fields.number("Q")
    metadata = {}
    for _ in range(key_count):
        key = fields.text()
        if key in metadata:
            raise ValueError(f"it has the key {key!r} twice")
        metadata[key] = fields.value(fields.number("I"))
    infos = [_read_tensor_info(fields) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not is_integer(alignment) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    start = -(-fields.position // alignment) * alignment
    entries = [_locate(fields, start, *info) for info in infos]
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError("two tensors have the same name")
    _check_places(entries, start, alignment)
    return metadata, entries


def _read_tensor_info(fields: _Fields) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = fields.text(), fields.number("I")
    if not 1 <= dims <= MAX_DIMS:
        raise ValueError(f"{name!r} has {dims} dimensions")
    *shape, code, offset = struct.unpack(f"<{dims}QIQ", fields.take(8 * dims + 12))
    return name, tuple(shape[::-1]), code, offset


def _locate(fields: _Fields, start: int, name: str, shape: tuple[int, ...], code: int, offset: int) -> Entry:
    gguf = import_gguf("reading")
    try:
        type_ = gguf.GGMLQuantizationType(code)
    except ValueError:
        raise Error(
            f"{fields.file.name} stores {name!r} as type {code}, which the installed gguf does not support: "
            "update gguf, or convert the file to F16 or Q8_0"
        ) from None
    block_length, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    if min(shape) < 1 or shape[-1] % block_length:
        raise ValueError(f"{name!r} has the shape {shape}, not whole blocks of {block_length} ({type_.name})")
    entry = Entry(name, shape, type_.name, shape[-1] // block_length * block_bytes, start + offset)
    if entry.offset + entry.num_bytes > fields.size:
        raise ValueError(f"{name!r} extends beyond its end")
    return entry


def _check_places(entries: list[Entry], start: int, alignment: int) -> None:
    """Raise ``ValueError`` unless the tensors are contiguous and in header order, as llama.cpp requires.

    Otherwise a thousand overlapping tensors could turn a small file into a large model.
    """
    for entry in entries:
        if entry.offset != start:
            raise ValueError(f"{entry.name!r} does not begin where the tensor before it ends")
        start += -(-entry.num_bytes // alignment) * alignment

"""A model in a GGUF file, llama.cpp's format, converted to the names and layout of a Hugging Face folder.

A GGUF file (``gguf_format.py``) differs from such a folder in the keys of the config (``gguf_config.py``),
the names of the tensors (``gguf_tables.py``), and, for some architectures, in the arrays:

- llama's Q and K have their rows in another order, because llama.cpp's RoPE rotates channels 2i and 2i + 1 of
  a Llama together, and Hugging Face's rotates channels i and i + D/2;
- GPT-2's matrices are (out, in), as those of all others, where OpenAI's are (in, out);
- Gemma's norms are stored as 1 + w, by which they multiply;
- the experts of a layer are one array (E, out, in) instead of E matrices.
"""

import dataclasses
from pathlib import Path

import numpy as np

from tinyllm.errors import Error
from tinyllm.weights import StoredTensors
from tinyllm.weights.gguf_config import INSTEAD, ROPE_FACTORS, Metadata, read_config
from tinyllm.weights.gguf_format import Entry, read_header, read_tensor
from tinyllm.weights.gguf_tables import EXPERT


class GGUFFile(StoredTensors):
    """The tensors of a model in a GGUF file, read-only, under Hugging Face's names.

    The constructor reads only the header: ``config`` (the content of a ``config.json`` of the class in
    ``transformers``), ``shapes`` (name to tuple), ``dtypes`` (name to GGUF's type, such as "Q4_1") and
    ``metadata``, the file's own keys: numbers, strings, lists of strings, NumPy arrays of numbers.
    ``weights[name]`` reads the tensor as a new float32 array, dequantised a few rows at a time, in Hugging
    Face's layout. No file stays open.

    Raises ``Error`` if the package gguf is not installed, if the file is missing, damaged or of an
    architecture that has no table, or has an unknown key that might change what the model computes. Reading a
    tensor raises ``Error`` if the file has changed since its header was read or gguf cannot dequantise the
    tensor's type.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._header = read_header(self.path)
        self.metadata = self._header.metadata
        self._keys = Metadata(self.path, self.metadata)
        self._table = self._keys.table
        self._parts: dict[str, str] = {}  # Hugging Face's name -> the part in GGUF's name
        self._entries = self._rename(self._header.entries)
        self.shapes = {name: self._shape(name) for name in self._entries}
        self.dtypes = {name: entry.type for name, entry in self._entries.items()}
        self.config: dict = read_config(self._keys, self.shapes, self._rope_factors())
        self._check_heads()

    def value(self, key: str, kind, default=None):
        """The value of a key, or the default. Raises ``Error`` if it is missing or not of this type."""
        return self._keys.value(key, kind, default)

    def __getitem__(self, name: str) -> np.ndarray:
        array, part = read_tensor(self.path, self._header, self._entries[name]), self._parts[name]
        if part in self._table.transposed:  # of a bias nothing changes
            return array.T
        if part.endswith("norm") and self._table.offset_norms:
            return array - 1
        if part in self._table.permuted:
            # The rows of a head are stored in pairs that are rotated together: (D/2, 2) becomes (2, D/2).
            pairs = array.reshape(self._heads(part), -1, 2, *array.shape[1:])
            return pairs.swapaxes(1, 2).reshape(array.shape)
        return array

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._entries[name].shape
        return shape[::-1] if self._parts[name] in self._table.transposed else shape

    def _heads(self, part: str) -> int:
        """The number of heads in a part whose rows are permuted."""
        return self.config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]

    def _check_heads(self) -> None:
        for name, part in self._parts.items():
            rows, head_dim = self.shapes[name][0], self.config.get("head_dim")
            if part in self._table.permuted and rows != self._heads(part) * head_dim:
                problem = f"{name} has {rows} rows, not {self._heads(part)} heads of {head_dim}"
                raise Error(f"{self.path}: {problem}: copy or convert the file again")

    def _rope_factors(self) -> np.ndarray | None:
        entries = [entry for entry in self._header.entries if entry.name == ROPE_FACTORS]
        return read_tensor(self.path, self._header, entries[0]) if entries else None

    def _rename(self, entries: list[Entry]) -> dict[str, Entry]:
        """The tensors under Hugging Face's names; an array of experts becomes one tensor for each."""
        renamed, unknown = {}, []
        for entry in entries:
            found = self._table.module_of(entry.name)
            if found is None or (EXPERT in found[1] and not self._holds_experts(entry)):
                unknown += [repr(entry.name)] if entry.name != ROPE_FACTORS else []
                continue
            part, name = found
            for each in self._split(entry, name):
                renamed[each.name], self._parts[each.name] = each, part
        if unknown:
            kind = self._table.architecture
            raise Error(f"{self.path} has tensors that are not of a {kind}, {', '.join(unknown)}: {INSTEAD}")
        return renamed

    def _holds_experts(self, entry: Entry) -> bool:
        return len(entry.shape) == 3 and entry.shape[0] == self._keys.experts()

    def _split(self, entry: Entry, name: str) -> list[Entry]:
        """An entry under its new name, or those of its experts."""
        if EXPERT not in name:
            return [dataclasses.replace(entry, name=name)]
        experts, *shape = entry.shape
        each = dataclasses.replace(entry, shape=tuple(shape))
        return [
            dataclasses.replace(
                each, name=name.replace(EXPERT, str(e)), offset=entry.offset + e * each.num_bytes
            )
            for e in range(experts)
        ]

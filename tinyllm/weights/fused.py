"""Experts whose matrices are stored as one array, as ``transformers`` 5 holds them in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from tinyllm.errors import Error
from tinyllm.weights import StoredTensors

FUSED = re.compile(r"(.*\.)?mlp\.experts\.(gate_up_proj|down_proj)")


def per_expert(arrays: Mapping, block: str, parts: Sequence[str]) -> Mapping:
    """``PerExpert`` of these arrays if some of them are fused, otherwise the arrays as they are."""
    is_fused = isinstance(arrays, Mapping) and any(FUSED.fullmatch(str(key)) for key in arrays)
    return PerExpert(arrays, block, parts) if is_fused else arrays


class PerExpert(StoredTensors):
    """``arrays`` with the matrices of each expert by themselves, under the names of published files.

    ``mlp.experts.gate_up_proj`` (E, 2 I, C) becomes E pairs of matrices (I, C), ``<block>.experts.0.<gate>``,
    ``<block>.experts.0.<up>`` …, and ``mlp.experts.down_proj`` (E, C, I) E matrices (C, I),
    ``<block>.experts.0.<down>`` …; ``mlp.gate`` becomes ``<block>.gate``. All others keep their names.
    ``parts`` are the names of gate, up and down. Raises ``Error`` if a matrix is there twice.
    """

    def __init__(self, arrays: Mapping, block: str, parts: Sequence[str]):
        self._arrays, self._places, self._read = arrays, {}, {}
        shapes = getattr(arrays, "shapes", None) or {key: arrays[key].shape for key in arrays}
        self.shapes, (gate, up, down) = {}, parts
        for key, shape in shapes.items():
            found = FUSED.fullmatch(key)
            names = (gate, up) if found and found[2] == "gate_up_proj" else (down,)
            if found is None or len(shape) != 3 or shape[1] % len(names):
                self._add(re.sub(r"\bmlp\.gate\.", f"{block}.gate.", key), shape, key, ...)
                continue
            E, rows, C = shape[0], shape[1] // len(names), shape[2]
            for e in range(E):
                for i, name in enumerate(names):
                    place = e, slice(i * rows, (i + 1) * rows)
                    self._add(f"{found[1] or ''}{block}.experts.{e}.{name}.weight", (rows, C), key, place)

    def _add(self, name: str, shape: tuple, key: str, place) -> None:
        if name in self._places:
            raise Error(f"{key} and {self._places[name][0]} are the same parameter: keep one of them")
        self.shapes[name], self._places[name] = shape, (key, place)

    def __getitem__(self, name: str) -> np.ndarray:
        key, place = self._places[name]
        if place is ...:
            return self._arrays[key]
        if key not in self._read:  # an array is read once for all of its experts, who are read in turn
            self._read = dict([*self._read.items()][-1:])
            self._read[key] = self._arrays[key]
        return self._read[key][place]

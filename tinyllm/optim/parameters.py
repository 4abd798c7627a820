"""The parameters that are given to an optimizer or to clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tinyllm.backend.threads import blocks_of, one_blas_thread, run_tasks
from tinyllm.errors import Error
from tinyllm.nn import Module
from tinyllm.tensor import Tensor

Parameters = Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]  # accepted by optimizers and clipping


def named(parameters: Parameters) -> list[tuple[str, Tensor]]:
    """(name, parameter) pairs; Tensors without a name are named by their index."""
    if isinstance(parameters, Module):
        return list(parameters.named_parameters())
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise Error(
            f"parameters must be a model or a list of Tensors, not a {type(parameters).__name__}: "
            "pass the model, model.parameters() or [tensor]"
        )
    entries = [
        (str(number), entry) if isinstance(entry, Tensor) else entry
        for number, entry in enumerate(parameters)
    ]
    if not entries and isinstance(parameters, Iterator):
        raise Error(
            "the iterator of parameters is empty, perhaps because it was consumed before: "
            "call model.parameters() again, or pass the model"
        )
    for entry in entries:
        match entry:
            case (str(), Tensor()):
                continue
        raise Error(
            f"parameters must be Tensors or (name, Tensor) pairs, and one is a {type(entry).__name__}: "
            "pass the model, model.parameters() or [tensor]"
        )
    return entries


def groups_of(parameters) -> list[dict]:
    """The given groups, or a single group of all parameters."""
    if isinstance(parameters, Module | Tensor) or not isinstance(parameters, Iterable):
        return [{"params": parameters}]
    entries = list(parameters)
    if entries and all(isinstance(entry, dict) for entry in entries):
        return entries
    return [{"params": entries or parameters}]


def is_rate(x) -> bool:
    return isinstance(x, int | float | np.number) and 0 <= x < math.inf


def rows(array):
    """The array with at least one axis, to be split into blocks along the first."""
    return array if array.ndim else array.reshape(1)


def each_block_of(arrays: Sequence, function) -> None:
    """Call ``function(i, block)`` for blocks of rows of every ``arrays[i]``, of all together on all cores.

    A small model has many parameters of a few thousand elements: one by one they would occupy one thread.
    """
    tasks, elements = [], 0
    for i, array in enumerate(arrays):
        if isinstance(array, np.ndarray):
            width = math.prod(array.shape[1:])
            tasks += [
                (width * (block.stop - block.start), i, block) for block in blocks_of(len(array), width)
            ]
            elements += array.size
        else:
            function(i, slice(0, len(array)))
    tasks.sort(key=lambda task: -task[0])  # the largest first, so that no thread ends with it
    with one_blas_thread():
        run_tasks(lambda task: function(*task[1:]), tasks, elements)

"""The memory of a training step and of inference, counted without taking it.

A real training step, forward, backward and update, runs on meta arrays (``meta.py``), which have no elements
and count the bytes they would take. That covers any layer and any optimizer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tinyllm.backend.threads import first_task_only
from tinyllm.checks import is_integer
from tinyllm.errors import Error
from tinyllm.nn import Module, evaluating
from tinyllm.optim import AdamW
from tinyllm.tensor import no_grad
from tinyllm.tools.meta import MetaArray, Tally, meta_copy

DTYPES = ("float32", "float64")  # what models compute in on a CPU


def dtype_of(dtype) -> np.dtype:
    name = getattr(dtype, "__name__", str(dtype))  # np.float32, "float32" and np.dtype("float32") alike
    if name not in DTYPES:
        raise Error(f"dtype {name!r} is not one that models compute in: choose {' or '.join(DTYPES)}")
    return np.dtype(name)


def check_context(model: Module, context: int) -> None:
    if not is_integer(context) or not 1 <= context <= model.context:
        raise Error(f"context is {context!r}: this model takes 1 to {model.context} tokens")


MOST_TOKENS = 2**40  # more than any array of ids can have in memory
LONG = 4096  # tokens; beyond, all sizes grow linearly and are extrapolated


class Memory(NamedTuple):
    """Bytes."""

    weights: int
    gradients: int  # of all parameters that require one, after the backward pass
    optimizer: int  # its running averages: AdamW's m and v
    activations: int  # alive after the forward pass: kept for backward, or gradients computed by the loss
    forward: int  # the peaks of a training step's phases, including all of the above alive at the time
    backward: int
    update: int
    inference: int  # peak of a forward pass for the next token, including the weights
    cache: int  # keys and values of all positions

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward, self.update)


def memory(
    model: Module, batch: int, context: int, dtype="float32", optimizer: type[AdamW] | None = AdamW
) -> Memory:
    """The memory of a training step on ``batch`` x ``context`` tokens, and of inference, in bytes.

    Counts all arrays of a forward and backward pass of this model and of an update by this kind of
    ``optimizer``, from the second step on, when it holds its averages (None: without one), and with the
    scratch memory of one thread. Python, its libraries and BLAS are not included. A context above 4,096
    tokens is extrapolated linearly from two shorter ones, all but the cache, which does not grow beyond a
    layer's window. ``dtype`` is float32 or float64. Raises Error for a context outside the model's, a batch
    below 1 or of more than 2**40 tokens, or another dtype.
    """
    dtype = dtype_of(dtype)
    check_context(model, context)
    if not is_integer(batch) or batch < 1:
        raise Error(f"batch is {batch!r}: it must be a whole number of at least 1")
    if batch * context > MOST_TOKENS:
        raise Error(f"batch is {batch:,}: choose at most {MOST_TOKENS // context:,} sequences of {context}")
    weights = dtype.itemsize * model.num_parameters()
    gradients = dtype.itemsize * sum(p.size for p in model.parameters() if p.requires_grad)
    averages, scratch = (0, 0) if optimizer is None else _count_update(model, dtype, optimizer)
    found = _count(model, batch, min(context, LONG), dtype)
    if context > LONG:
        half = _count(model, batch, LONG // 2, dtype)
        found = found + (found - half) * (context - LONG) // (LONG // 2)
    activations, forward, backward, inference = map(int, found)
    return Memory(
        weights,
        gradients,
        averages,
        activations,
        forward=forward + averages,
        backward=backward + averages,
        update=weights + gradients + averages + scratch,
        inference=inference,
        cache=_cache_bytes(model, batch, context, dtype),
    )


def _count(model: Module, batch: int, context: int, dtype: np.dtype) -> np.ndarray:
    """Bytes of activations, and of the peaks of forward, backward and inference."""
    model = meta_copy(model, dtype)
    ids, weights = np.zeros((batch, context), np.int64), Tally.restart()
    with first_task_only():
        loss = model.loss(ids, ids)
        activations, forward = Tally.held - weights, Tally.peak
        Tally.restart()
        if loss.requires_grad:
            loss.backward()
        backward = Tally.peak
        model.zero_grad()
        del loss
        with evaluating(model), no_grad():
            Tally.restart()
            model(ids, last_only=True)
            inference = Tally.peak
    return np.array([activations, forward, backward, inference], object)


def _count_update(model: Module, dtype: np.dtype, kind: type[AdamW]) -> tuple[int, int]:
    """Bytes of the optimizer's averages, and the peak of what an update allocates besides."""
    model = meta_copy(model, dtype)
    optimizer = kind(model)
    optimizer.reserve()
    for parameter in model.parameters():
        parameter.grad = MetaArray(parameter.shape, dtype) if parameter.requires_grad else None
    held = Tally.restart()
    with first_task_only():
        optimizer.step()
    return optimizer.averages_nbytes, Tally.peak - held


def _cache_bytes(model: Module, batch: int, context: int, dtype: np.dtype) -> int:
    cache = meta_copy(model, dtype).new_cache(batch, context)
    return sum(entries.nbytes for entries in cache.keys + cache.values)

"""Addressed random numbers: dropout masks from a counter-based generator."""

from __future__ import annotations

import math
import threading

import numpy as np

from tinyllm.backend import dtypes
from tinyllm.backend.cuda import launch

# --------------------------------------------------------------------------- random numbers


class _Stream(threading.local):
    seed, step, micro_batch, op = 0, 0, 0, 0


_stream = _Stream()


def manual_seed(seed: int, step: int = 0, micro_batch: int = 0) -> None:
    """Dropout from here on, in this thread, follows from these three numbers alone.

    Every dropout is addressed by (seed, step, micro_batch, number of the op since this call), so a
    mask can be drawn again for the backward pass, and a resumed run needs no generator state.
    """
    _stream.seed, _stream.step, _stream.micro_batch, _stream.op = seed, step, micro_batch, 0


def next_address() -> tuple[int, int, int, int]:
    """The address (seed, step, micro_batch, op) of one op's random numbers; the next call gets another."""
    address = (_stream.seed, _stream.step, _stream.micro_batch, _stream.op)
    _stream.op += 1
    return address


def dropout_mask(address, block: int, shape, p: float, like):
    """0 with probability ``p``, else 1/(1 - p), in ``like``'s dtype: the same every time for an address.

    Philox is a function from a counter and a key to random bits (Salmon et al., "Parallel Random
    Numbers: As Easy as 1, 2, 3", SC 2011): nothing is remembered between draws. ``block`` tells
    apart the parts of one op that are drawn one after the other. Sixteen bits decide each element (a
    quarter of the cost of a float32), so it is zero with probability round(65536 p) / 65536.
    """
    if launch.library_of(like) is not None:
        kept = launch.dropout_kept(address, [block], math.prod(shape), p, like).reshape(shape)
        return (kept * dtypes.wide(like.dtype).type(1 / (1 - p))).astype(like.dtype, copy=False)
    seed, step, micro_batch, op = address
    key, counter = np.array([seed, step], np.uint64), np.array([0, block, op, micro_batch], np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    size = math.prod(shape)
    draws = bits.random_raw(-(-size // 4)).view(np.uint16)[:size].reshape(shape)  # four in 64 bits
    mask = np.multiply(draws >= round(p * 65536), 1 / (1 - p), dtype=like.dtype)
    return np.asarray(mask, like=like)

"""Addressed random numbers: dropout masks from a counter-based generator.

Philox is a function from a counter and a key to random bits (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", SC 2011), so nothing is remembered between draws: a mask is drawn again in the backward
pass, a resumed run needs no generator state, and a batch divided otherwise (micro-batches, several
processes) drops the same elements. The key is (seed, step); the counter says which row of the global batch,
which op, and where in them.
"""

from __future__ import annotations

import math
import threading

import numpy as np

from tinyllm.backend.cuda import launch
from tinyllm.backend.dtypes import accumulation_dtype

PER_COUNT = 16  # elements that one value of the counter decides: 256 bits, of which each takes 16


class _Stream(threading.local):
    seed, step, first_row, op = 0, 0, 0, 0


_stream = _Stream()


def manual_seed(seed: int, step: int = 0, first_row: int = 0) -> None:
    """Dropout from here on, in this thread, follows from these three numbers alone.

    Every dropout is addressed by (seed, step, row of the global batch, number of the op since this call).
    ``first_row`` is the row of the global batch that the first row of the arrays to come is: 0 for a whole
    batch, 8 for the second of two micro-batches of 8 rows. All of them are padded to the same length.
    """
    _stream.seed, _stream.step, _stream.first_row, _stream.op = seed, step, first_row, 0


def next_address() -> tuple[int, int, int, int]:
    """The address (seed, step, first_row, op) of one op's random numbers; the next call gets another."""
    address = (_stream.seed, _stream.step, _stream.first_row, _stream.op)
    _stream.op += 1
    return address


def dropout_mask(address, shape, p: float, like, part: int | None = None):
    """0 with probability ``p``, else 1/(1 - p), in ``like``'s dtype: the same every time for an address.

    Axis 0 of ``shape`` is the row of the batch, and each row begins at a value of the counter. With
    ``part`` the shape is one part of the op instead, such as a block of one head's attention weights, whose
    number tells it apart from all others of the global batch. Sixteen bits decide each element (a quarter
    of the cost of a float32), so it is zero with probability round(65536 p) / 65536.
    """
    seed, step, first_row, op = address
    size = math.prod(shape)
    rows = 1 if part is not None or not shape else shape[0]
    counts = -(-size // max(rows, 1) // PER_COUNT)  # values of the counter that a row takes
    start = first_row * counts if part is None else 0
    if launch.library_of(like) is not None:
        kept = launch.dropout_kept(address, [part or 0], rows * counts * PER_COUNT, p, like, start)
        kept = kept.reshape(rows, counts * PER_COUNT)[:, : size // max(rows, 1)].reshape(shape)
        return (kept * accumulation_dtype(like.dtype).type(1 / (1 - p))).astype(like.dtype, copy=False)
    key, counter = np.array([seed, step], np.uint64), np.array([start, part or 0, op, 0], np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    draws = bits.random_raw(rows * counts * 4).view(np.uint16).reshape(rows, counts * PER_COUNT)
    draws = draws[:, : size // max(rows, 1)].reshape(shape)
    mask = np.multiply(draws >= round(p * 65536), 1 / (1 - p), dtype=like.dtype)
    return np.asarray(mask, like=like)

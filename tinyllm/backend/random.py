"""Dropout masks from a counter-based random number generator.

Philox is a function from a key and a counter to random bits (Salmon et al., "Parallel Random Numbers: As Easy
as 1, 2, 3", SC 2011) and has no state. So a mask can be regenerated in the backward pass, a resumed run needs
no generator state, and a batch split differently (into micro-batches or among processes) drops the same
elements. The key is (seed, step); the counter encodes the row of the global batch, the op, and the position.
"""

from __future__ import annotations

import math
import threading

import numpy as np

from tinyllm.backend.cuda import launch
from tinyllm.backend.dtypes import accumulation_dtype
from tinyllm.checks import check_at_least
from tinyllm.errors import Error


class _Stream(threading.local):
    seed, step, first_row, op = 0, 0, 0, 0


_stream = _Stream()


def manual_seed(seed: int, step: int = 0, first_row: int = 0) -> None:
    """Seed dropout in this thread: all following masks depend on these three numbers alone.

    A mask's elements are addressed by (seed, step, row of the global batch, index of the op since this call).
    ``first_row`` is the global row of the first row of the following arrays: 0 for a whole batch, 8 for the
    second of two micro-batches of 8 rows. All micro-batches must be padded to the same length.
    """
    for name, number in (("seed", seed), ("step", step), ("first_row", first_row)):
        if check_at_least(number, 0, name) >= 2**64:
            raise Error(f"{name} is {number}: choose a number below 2**64")
    _stream.seed, _stream.step, _stream.first_row, _stream.op = seed, step, first_row, 0


def next_address() -> tuple[int, int, int, int]:
    """The address (seed, step, first_row, op) of an op's random numbers. Every call increments op."""
    address = (_stream.seed, _stream.step, _stream.first_row, _stream.op)
    _stream.op += 1
    return address


def rounded(p: float) -> tuple[int, int, float]:
    """How ``p`` is sampled: (bits for each element, threshold, scale of a kept element).

    An element is dropped if its random bits are below the threshold, with the probability
    P = threshold / 2^bits. Kept ones are multiplied by 1/(1 - P), not 1/(1 - p): the mean of a mask is 1.
    Sixteen bits cost a quarter of a float32 and round p by up to 2^-17, less than 0.2 % of p and of 1 - p
    unless one of them is below 2^-8: there 32 bits are used. At P = 1 nothing is kept.
    """
    bits = 16 if 2**-8 <= p <= 1 - 2**-8 else 32
    threshold = round(p * 2**bits)
    return bits, threshold, 2**bits / (2**bits - threshold) if threshold < 2**bits else 0.0


def dropout_mask(address, shape, p: float, like, part: int | None = None):
    """0 with probability ``p``, else 1/(1 - p), both as ``rounded``; a function of ``address``.

    Axis 0 of ``shape`` is the row of the batch, and each row starts at a new counter value. With ``part``,
    ``shape`` is one part of the op instead, such as a block of one head's attention weights, and ``part``
    is its number, unique within the global batch. The mask has the dtype of ``like``.
    """
    bits, threshold, scale = rounded(p)
    per_count = 256 // bits  # elements per counter value, which gives 256 bits
    seed, step, first_row, op = address
    size = math.prod(shape)
    rows = 1 if part is not None or not shape else shape[0]
    per_row = size // max(rows, 1)
    counts = -(-per_row // per_count)  # counter values per row
    drawn, start = counts * per_count, first_row * counts if part is None else 0
    if launch.library_of(like) is not None:
        kept = launch.dropout_kept(address, [part or 0], rows * drawn, bits, threshold, like, start)
        kept = kept.reshape(rows, drawn)[:, :per_row].reshape(shape)
        return (kept * accumulation_dtype(like.dtype).type(scale)).astype(like.dtype, copy=False)
    key, counter = np.array([seed, step], np.uint64), np.array([start, part or 0, op, 0], np.uint64)
    generator = np.random.Philox(key=key, counter=counter)
    samples = generator.random_raw(rows * counts * 4).view(f"u{bits // 8}")
    samples = samples.reshape(rows, drawn)[:, :per_row].reshape(shape)
    mask = np.multiply(samples >= threshold, scale, dtype=like.dtype)
    return np.asarray(mask, like=like)

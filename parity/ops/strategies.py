"""Hypothesis strategies for inputs of ops: shapes, memory layouts, values and options.

Hypothesis draws shapes, layouts, options and seeds; the values are generated from a seed. Normal numbers of
unit scale make a wrong gradient distinguishable from rounding, which Hypothesis's extreme floats would not
(extreme values have tests of their own), and they keep the report of a failing example short.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

SEEDS = st.integers(0, 2**32 - 1)

INTEGERS = st.sampled_from([np.int64, np.int32, np.int16, np.uint8, np.uint16])  # dtypes of token ids


# --------------------------------------------------------------------------- memory layouts
# Each takes a contiguous array of at least one axis and returns the same values in another layout.


def contiguous(x):
    return x


def transposed(x):
    return np.asfortranarray(x)


def stepped(x):
    """Every second element of the last axis of a buffer."""
    return np.repeat(x, 2, axis=-1)[..., ::2]


def inner(x):
    """The middle of a larger buffer, as a head is within the rows of a qkv projection."""
    return np.pad(x, 1)[(slice(1, -1),) * x.ndim]


def reversed_axes(x):
    """Negative strides along every axis."""
    return np.flip(np.flip(x).copy())


LAYOUTS = st.sampled_from([contiguous, transposed, stepped, inner, reversed_axes])


# --------------------------------------------------------------------------------- values
# Each takes a generator and a shape and returns float64 values of unit scale.


def normal(rng, shape):
    return rng.standard_normal(shape)


def positive(rng, shape):
    """At least 0.5: for log, sqrt and broken powers."""
    return 0.5 + np.abs(rng.standard_normal(shape))


def nonzero(rng, shape):
    """At least 0.5 away from zero, of both signs: for division and negative powers."""
    return positive(rng, shape) * rng.choice([-1.0, 1.0], shape)


def distinct(rng, shape):
    """No two closer than 4/size: a small step does not change which element is the maximum."""
    size = int(np.prod(shape))
    return rng.permutation(size).reshape(shape) * (4 / max(size, 1)) - 2


def spread(rng, shape):
    """Neighbours on the last axis about 1 apart: for norms, whose gradient is steep where all are equal."""
    return np.arange(shape[-1]) - shape[-1] / 2 + 0.2 * rng.standard_normal(shape)


@st.composite
def arrays(draw, shape, values=normal):
    """A float64 array of ``shape``, in any layout, read-only: an op that writes into its input fails."""
    array = np.asarray(values(np.random.default_rng(draw(SEEDS)), tuple(shape)))
    if array.ndim:
        array = draw(LAYOUTS)(array)
    array.flags.writeable = False
    return array


# ----------------------------------------------------------------------- shapes and options


def shapes(min_dims=0, max_dims=3, min_side=0, max_side=4):
    return hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=min_side, max_side=max_side)


@st.composite
def broadcastable(draw, count):
    """``count`` shapes that broadcast together, including axes of length 0 and 1."""
    drawn = hnp.mutually_broadcastable_shapes(num_shapes=count, min_side=0, max_side=4, max_dims=3)
    return draw(drawn).input_shapes


@st.composite
def axes(draw, ndim):
    """None, one axis, or a tuple of axes of an array of ``ndim`` axes; some negative."""
    if ndim == 0:
        return None
    some = draw(st.lists(st.integers(0, ndim - 1), min_size=1, unique=True))
    some = tuple(axis - ndim * draw(st.booleans()) for axis in some)
    return draw(st.sampled_from([None, some[0], some]))


@st.composite
def indices(draw, shape):
    """A NumPy index: slices, ints, None, Ellipsis; integer arrays with repetitions; boolean masks."""
    kind = draw(st.sampled_from(["basic", "ids", "arrays", "mask", "rows and columns"]))
    rng = np.random.default_rng(draw(SEEDS))
    if kind == "basic" or not shape or 0 in shape:
        return draw(hnp.basic_indices(shape, allow_newaxis=True, allow_ellipsis=True))
    first = rng.integers(-shape[0], shape[0], draw(shapes(max_dims=2)), dtype=np.int64)
    if kind == "ids":
        dtype = draw(INTEGERS)
        return (first if np.issubdtype(dtype, np.signedinteger) else first % shape[0]).astype(dtype)
    if kind == "arrays":  # combined with Ellipsis and new axes
        return draw(st.sampled_from([(first,), (first, ...), (..., None, first % shape[-1]), (None, first)]))
    if kind == "mask":
        return rng.random(shape[: draw(st.integers(1, len(shape)))]) < 0.5
    return tuple(rng.integers(-n, n, (3,)) for n in shape)


@st.composite
def subsets(draw, count):
    """Which of ``count`` inputs require a gradient: at least one."""
    return draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))

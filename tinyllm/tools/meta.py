"""Meta arrays: arrays without elements, which count the bytes that real arrays would take."""

from __future__ import annotations

import copy
import functools
import math
import mmap

import numpy as np

from tinyllm.nn import Module
from tinyllm.tensor import Tensor


class Tally:
    """Bytes of all meta arrays alive now, and their peak since ``restart``."""

    held = peak = 0

    @classmethod
    def restart(cls) -> int:
        """Reset the peak; returns the bytes held now."""
        cls.peak = cls.held
        return cls.held

    @classmethod
    def add(cls, size: int) -> None:
        cls.held += size
        cls.peak = max(cls.peak, cls.held)


class _Memory:
    """The bytes of one array, counted while the array or a view of it is alive."""

    def __init__(self, size: int):
        self.size = size
        Tally.add(size)

    def __del__(self):
        Tally.add(-self.size)


class MetaArray(np.ndarray):
    """An array with a shape, dtype, strides and views, whose elements all share one block of zeros.

    Ufuncs and matrix products return the right shape and dtype without computing anything. NumPy's other
    functions run on the zeros, which takes time but gives the right shape. Nothing is ever written. Where
    values decide about shapes, as in a mixture of experts, they are taken to be spread evenly.
    """

    def __new__(cls, shape, dtype, strides=None):
        dtype = np.dtype(dtype)
        size = dtype.itemsize * math.prod(shape)
        array = super().__new__(cls, shape, dtype, buffer=_zeros(size), strides=strides)
        array.memory, array.base = _Memory(size), None
        return array

    def __array_finalize__(self, source):
        self.memory = getattr(source, "memory", None)
        self.base = source  # the engine tests whether an array is a view

    base = None  # hides NumPy's base, since every meta array is a view of the zeros

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if out is not None or method == "at":
            return out and out[0]
        first = inputs[0]
        if method == "reduce":
            shape = _reduced_shape(first.shape, options.get("axis", 0), options.get("keepdims", False))
        elif ufunc is np.matmul:
            a, b = (x.shape for x in inputs)
            matrices = np.broadcast_shapes(a[:-2], b[:-2])
            shape = (*matrices, *a[-2:-1], *b[-1:]) if len(b) > 1 else a[:-1]
        else:
            shape = np.broadcast_shapes(*map(_shape, inputs))
        dtype = options.get("dtype") or _result_dtype(ufunc, method, *map(_type, inputs))
        strides = None
        if method == "__call__" and shape == _shape(first):  # with the layout of the input
            strides = _strides_like(first, dtype)
        return MetaArray(shape, dtype, strides)

    def __array_function__(self, function, types, args, kwargs):
        if function is np.put_along_axis:
            return None
        if function in (np.empty_like, np.zeros_like) and not kwargs:
            return MetaArray(args[0].shape, args[0].dtype, _strides_like(args[0], args[0].dtype))
        if function in (np.empty, np.zeros):  # with like=
            return MetaArray(*args)
        if function is np.searchsorted:  # evenly spread values among 0, 1, 2 …
            return np.arange(len(args[1])) * len(args[0]) // max(len(args[1]), 1)
        return _wrap(function(*_plain(args), **_plain(kwargs)), self)

    def __getitem__(self, index):
        if isinstance(index, np.ndarray) and index.dtype.kind in "iu" and self.flags.c_contiguous:
            return MetaArray(index.shape + self.shape[1:], self.dtype)  # NumPy would copy every row
        if all(type(i) in _BASIC for i in (index if isinstance(index, tuple) else (index,))):
            return super().__getitem__(index)
        return _wrap(_plain(self)[index], self)

    def __setitem__(self, index, value):
        pass

    def reshape(self, *shape, **options):
        if self.flags.c_contiguous and not options:
            return super().reshape(*shape)  # a view
        return _wrap(_plain(self).reshape(*shape, **options), self)

    def astype(self, dtype, copy=True, **_):
        if not copy and dtype == self.dtype:
            return self
        return MetaArray(self.shape, dtype, _strides_like(self, dtype))

    def copy(self, order="C"):
        return MetaArray(self.shape, self.dtype)


_BASIC = {int, slice, type(None), type(Ellipsis)}  # indices that give a view

# Read-only, so that no system reserves memory for it. Windows has no such flags.
_READ_ONLY = dict(flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) if hasattr(mmap, "PROT_READ") else {}

_largest_zeros = mmap.mmap(-1, mmap.PAGESIZE, **_READ_ONLY)


def _zeros(size: int) -> mmap.mmap:
    """At least ``size`` zero bytes, shared by all arrays."""
    global _largest_zeros
    if len(_largest_zeros) < size:
        _largest_zeros = mmap.mmap(-1, size, **_READ_ONLY)
    return _largest_zeros


def _shape(x) -> tuple[int, ...]:
    return x.shape if isinstance(x, np.ndarray) else np.shape(x)  # np.shape of a meta array is slow


def _type(x) -> np.dtype | type:
    """What NumPy promotes by: an array's dtype, or the type of a number."""
    if isinstance(x, np.ndarray):
        return x.dtype
    return type(x) if isinstance(x, int | float | complex) else np.asarray(x).dtype


@functools.cache
def _result_dtype(ufunc, method: str, *types) -> np.dtype:
    compute = getattr(np.multiply if ufunc is np.matmul else ufunc, method)
    return compute(*(np.ones(1, kind) if isinstance(kind, np.dtype) else kind(1) for kind in types)).dtype


def _strides_like(array, dtype) -> tuple[int, ...]:
    """The strides of a contiguous array whose axes have the same order in memory."""
    strides, step = {}, np.dtype(dtype).itemsize
    for axis in sorted(range(array.ndim), key=lambda axis: (array.strides[axis], -axis)):
        strides[axis], step = step, step * array.shape[axis]
    return tuple(strides[axis] for axis in range(array.ndim))


def _plain(x):
    """Replace meta arrays by plain views of their zeros, also in lists, tuples and dicts."""
    if isinstance(x, MetaArray):
        return x.view(np.ndarray)
    if isinstance(x, (list, tuple)):
        return type(x)(map(_plain, x))
    return {key: _plain(value) for key, value in x.items()} if isinstance(x, dict) else x


def _wrap(result, source: MetaArray):
    """NumPy's result as meta arrays: a view shares the memory of ``source``, a new array has its own."""
    if isinstance(result, (list, tuple)):
        return type(result)(_wrap(x, source) for x in result)
    if not isinstance(result, np.ndarray):
        return result
    owner = result
    while isinstance(below := np.ndarray.base.__get__(owner), np.ndarray):
        owner = below
    if below is None:
        array = MetaArray(result.shape, result.dtype, result.strides)
        array.base = None if owner is result else array.memory  # None unless it is a view of a new array
        return array
    view = result.view(MetaArray)
    view.memory, view.base = source.memory, source
    return view


def _reduced_shape(shape, axis, keepdims) -> tuple[int, ...]:
    axes = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = {a % len(shape) for a in axes}
    return tuple(1 if i in axes else n for i, n in enumerate(shape) if keepdims or i not in axes)


def meta_copy(model: Module, dtype: np.dtype) -> Module:
    """A copy in training mode with meta parameters of ``dtype``."""
    parameters = {
        id(p): Tensor(MetaArray(p.shape, dtype), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, parameters).train()

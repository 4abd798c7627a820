"""Arrays without elements, which count the bytes that the real ones would take."""

from __future__ import annotations

import math
import mmap

import numpy as np


class Tally:
    """Bytes of all arrays that are alive, and the most there were since ``restart``."""

    held = peak = 0

    @classmethod
    def restart(cls) -> int:
        """Begin a new peak; returns the bytes that are held now."""
        cls.peak = cls.held
        return cls.held

    @classmethod
    def add(cls, size: int) -> None:
        cls.held += size
        cls.peak = max(cls.peak, cls.held)


class _Memory:
    """One array's bytes: they are counted as long as it, or a view of it, is alive."""

    def __init__(self, size: int):
        self.size = size
        Tally.add(size)

    def __del__(self):
        Tally.add(-self.size)


class MetaArray(np.ndarray):
    """An array with shape, dtype, strides and views as any other, and no elements: all lie in the same zeros.

    Results of ufuncs and products have the shape and dtype they would have, and are not computed. NumPy's
    other functions are, on the zeros, which takes time but gives the right shape. Nothing is ever written.
    """

    def __new__(cls, shape, dtype, strides=None):
        dtype = np.dtype(dtype)
        size = dtype.itemsize * math.prod(shape)
        array = super().__new__(cls, shape, dtype, buffer=_zeros(size), strides=strides)
        array.memory, array.base = _Memory(size), None
        return array

    def __array_finalize__(self, source):
        self.memory = getattr(source, "memory", None)
        self.base = source  # the engine asks whether an array is a view

    base = None  # hides NumPy's own: every one of these is a view of the zeros

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if out is not None or method == "at":
            return out and out[0]
        first = inputs[0]
        if method == "reduce":
            shape = _reduced_shape(first.shape, options.get("axis", 0), options.get("keepdims", False))
        elif ufunc is np.matmul:
            a, b = (x.shape for x in inputs)
            shape = (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])
        else:
            shape = np.broadcast_shapes(*map(np.shape, inputs))
        compute = getattr(np.multiply if ufunc is np.matmul else ufunc, method)
        ones = [np.ones(1, x.dtype) if isinstance(x, np.ndarray) else x for x in inputs]
        dtype = options.get("dtype") or compute(*ones).dtype
        strides = None
        if method == "__call__" and shape == np.shape(first):  # in memory as the input is
            strides = _strides_like(first, dtype)
        return MetaArray(shape, dtype, strides)

    def __array_function__(self, function, types, args, kwargs):
        if function is np.put_along_axis:
            return None
        if function in (np.empty_like, np.zeros_like) and not kwargs:
            return MetaArray(args[0].shape, args[0].dtype, _strides_like(args[0], args[0].dtype))
        if function in (np.empty, np.zeros):  # with like=
            return MetaArray(*args)
        return _settled(function(*_plain(args), **_plain(kwargs)), self)

    def __getitem__(self, index):
        return _settled(_plain(self)[index], self)

    def __setitem__(self, index, value):
        pass

    def reshape(self, *shape, **options):
        return _settled(_plain(self).reshape(*shape, **options), self)

    def astype(self, dtype, copy=True, **_):
        if not copy and dtype == self.dtype:
            return self
        return MetaArray(self.shape, dtype, _strides_like(self, dtype))

    def copy(self, order="C"):
        return MetaArray(self.shape, self.dtype)


# Read only: then no system reserves memory for it. Windows has no such flags.
_READ_ONLY = dict(flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) if hasattr(mmap, "PROT_READ") else {}

_zeros_so_far = mmap.mmap(-1, mmap.PAGESIZE, **_READ_ONLY)


def _zeros(size: int) -> mmap.mmap:
    """At least as many zero bytes."""
    global _zeros_so_far
    if len(_zeros_so_far) < size:
        _zeros_so_far = mmap.mmap(-1, size, **_READ_ONLY)
    return _zeros_so_far


def _strides_like(array, dtype) -> tuple[int, ...]:
    """Of an array without gaps whose axes lie in memory in the same order."""
    strides, step = {}, np.dtype(dtype).itemsize
    for axis in sorted(range(array.ndim), key=lambda axis: (array.strides[axis], -axis)):
        strides[axis], step = step, step * array.shape[axis]
    return tuple(strides[axis] for axis in range(array.ndim))


def _plain(x):
    """The same with NumPy's own arrays, in lists and tuples too."""
    if isinstance(x, MetaArray):
        return x.view(np.ndarray)
    if isinstance(x, (list, tuple)):
        return type(x)(map(_plain, x))
    return {key: _plain(value) for key, value in x.items()} if isinstance(x, dict) else x


def _settled(result, source: MetaArray):
    """What NumPy returned: a view of the zeros shares the memory of ``source``, an array gets its own."""
    if isinstance(result, (list, tuple)):
        return type(result)(_settled(x, source) for x in result)
    if not isinstance(result, np.ndarray):
        return result
    owner = result
    while isinstance(below := np.ndarray.base.__get__(owner), np.ndarray):
        owner = below
    if below is None:
        array = MetaArray(result.shape, result.dtype, result.strides)
        array.base = None if owner is result else array.memory  # a copy's reshaped view, as of reshape
        return array
    view = result.view(MetaArray)
    view.memory, view.base = source.memory, source
    return view


def _reduced_shape(shape, axis, keepdims) -> tuple[int, ...]:
    axes = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = {a % len(shape) for a in axes}
    return tuple(1 if i in axes else n for i, n in enumerate(shape) if keepdims or i not in axes)

"""Record the NumPy calls of a computation, and repeat them without running its Python code.

A decoding step of a small model makes about a thousand calls of NumPy, and their arguments are the same at
every step: what lies between them, the layers, checks and Tensors, computes nothing. ``recording`` runs a
step on arrays that write down the calls in which they take part, with the very arrays that each reads and
writes. Views (reshaped, transposed, sliced) describe the same memory, so nothing needs to be called to make
them again, and calling the recorded functions on the recorded arrays computes the next step in their memory.

Some arrays grow by one token per step: the cached keys, the scores. So two steps are recorded, and ``Plan``
extrapolates what differs: an array's offset, shape and strides are linear in the number of steps. Anything
else that differs, such as a number that was computed outside the recording, raises ``NotRepeatable``.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np


class NotRepeatable(Exception):
    """A computation that cannot be repeated by its NumPy calls alone, as far as ``Plan`` can tell."""


@dataclass
class Call:
    """``function(*args, **kwargs)``, which writes into ``out`` and nothing else."""

    function: Callable
    args: tuple
    kwargs: dict
    out: Any


class _Active(threading.local):
    calls: list[Call] | None = None


_active = _Active()


@contextlib.contextmanager
def recording():
    """Within this block, calls on ``recorded`` arrays in this thread are appended to the list it gives."""
    _active.calls = calls = []
    try:
        yield calls
    finally:
        _active.calls = None


def recorded(array: np.ndarray) -> np.ndarray:
    """A view of an array that records the calls in which it takes part, as their results do."""
    return array.view(_Recorded)


def _record(function, args, kwargs, out) -> None:
    if _active.calls is not None:
        _active.calls.append(Call(function, args, kwargs, out))


def _plain(x):
    """The plain array of a recorded one, also within tuples, lists and dicts."""
    if isinstance(x, _Recorded):
        return x.view(np.ndarray)
    if isinstance(x, tuple | list):
        return type(x)(map(_plain, x))
    return {name: _plain(value) for name, value in x.items()} if isinstance(x, dict) else x


def _is_same(a, b) -> bool:
    """Whether b is an array of the very elements of a."""
    return isinstance(b, np.ndarray) and a.__array_interface__ == b.__array_interface__


def _assign(out, function, *args, **kwargs) -> None:
    """Call a function that cannot write its result into an array."""
    np.copyto(out, function(*args, **kwargs), casting="unsafe")


def _result(result, function, *args, **kwargs):
    """The ``result`` of a call, recorded unless it is a view of an argument."""
    if not isinstance(result, np.ndarray | np.generic):  # a shape, say
        return result
    array = np.asarray(result)
    if any(isinstance(x, np.ndarray) and np.may_share_memory(array, x) for x in args):
        return recorded(array)
    if function is np.einsum:
        _record(function, args, kwargs | {"out": array}, array)
    else:
        _record(_assign, (array, function, *args), kwargs, array)
    return recorded(array)


def as_one_call(function):
    """``function(*args)``, which writes into its last argument and returns it, recorded as a single call.

    For a function that does more than call NumPy, such as using several threads.
    """

    @functools.wraps(function)
    def call(*args):
        plain = _plain(args)
        function(*plain)
        _record(function, plain, {}, plain[-1])
        return args[-1]

    return call


# Functions of NumPy that only read their arguments, and that return one array or a Python value.
_READING = (np.asarray, np.ascontiguousarray, np.broadcast_to, np.einsum, np.full_like, np.ones_like)
_READING += (np.reshape, np.repeat, np.take, np.where, np.zeros, np.zeros_like, np.shape, np.ndim)


class _Recorded(np.ndarray):
    def __array_ufunc__(self, ufunc, method, *inputs, out=(None,), **kwargs):
        if ufunc.nout > 1 or method == "at":
            raise NotRepeatable(f"{ufunc.__name__} does not have one result")
        function = ufunc if method == "__call__" else getattr(ufunc, method)
        inputs, kwargs = _plain(inputs), _plain(kwargs)
        given = {} if out[0] is None else {"out": _plain(out[0])}
        array = np.asarray(function(*inputs, **kwargs, **given))
        _record(function, inputs, kwargs | {"out": array}, array)
        return out[0] if given else recorded(array)

    def __array_function__(self, function, types, args, kwargs):
        args, kwargs = _plain(args), _plain(kwargs)
        if function in (np.empty, np.empty_like):
            return recorded(function(*args, **kwargs))
        if function not in _READING or "out" in kwargs:
            raise NotRepeatable(f"{function.__name__} is not one of the functions that are recorded")
        return _result(function(*args, **kwargs), function, *args, **kwargs)

    def __getitem__(self, index):
        array, index = _plain(self), _plain(index)
        return _result(array[index], operator.getitem, array, index)

    def __setitem__(self, index, value):
        array, index, value = _plain(self), _plain(index), _plain(value)
        array[index] = value
        target = array[index]
        if _is_same(target, value):  # of ``x[index] += y``, which ends by assigning x[index] to itself
            return
        if np.may_share_memory(target, array):
            _record(np.copyto, (target, value), {"casting": "unsafe"}, target)
        else:  # a copy of elements that are selected by integers
            _record(operator.setitem, (array, index, value), {}, array)

    def reshape(self, *shape, **kwargs):
        array, shape = _plain(self), shape[0] if isinstance(shape[0], tuple | list) else shape
        return _result(array.reshape(shape, **kwargs), np.reshape, array, shape, **kwargs)

    def astype(self, dtype, **kwargs):
        array = _plain(self)
        return _result(array.astype(dtype, **kwargs), np.asarray, array, dtype)

    def copy(self, order="C"):
        array = _plain(self)
        return _result(array.copy(order), np.asarray, array)


# ------------------------------------------------------------------------------------ repeating


class _Moving:
    """An array whose offset in ``memory``, shape and strides are linear in the number of steps.

    Most are slices of an array that holds all ``steps``, which takes a tenth of the time of making an array:
    if only the offset changes, steps are its first axis; if only the length of an axis does, it has the last.
    """

    def __init__(self, memory: np.ndarray, a: np.ndarray, b: np.ndarray, steps: int):
        self.memory, self.dtype, self.ndim, self.array = memory, b.dtype, b.ndim, b
        before, self.start = ((offset(x), *x.shape, *x.strides) for x in (a, b))
        self.change = tuple(y - x for x, y in zip(before, self.start, strict=True))
        self.all, self.axis, self.steps = None, None, steps
        with contextlib.suppress(ValueError):  # of a layer with a window, whose entries move back in between
            self._hold_all()

    def _hold_all(self) -> None:
        offset, *sizes = self.start
        changing = [i for i, change in enumerate(self.change) if change]
        if changing == [0]:
            shape, strides = (self.steps + 1, *sizes[: self.ndim]), (self.change[0], *sizes[self.ndim :])
            self.all = np.ndarray(shape, self.dtype, self.memory, offset, strides)
        elif len(changing) == 1 and changing[0] <= self.ndim:
            self.axis, self.all = changing[0] - 1, self._made(self.steps)

    def move(self, t: int) -> None:
        if self.all is None or not 0 <= t <= self.steps:
            self.array = self._made(t)
        elif self.axis is None:
            self.array = self.all[t]
        else:
            length = slice(self.start[1 + self.axis] + t * self.change[1 + self.axis])
            self.array = self.all[(slice(None),) * self.axis + (length,)]

    def _made(self, t: int) -> np.ndarray:
        offset, *sizes = [start + t * change for start, change in zip(self.start, self.change)]
        shape, strides = sizes[: self.ndim], sizes[self.ndim :]
        return np.ndarray(shape, self.dtype, self.memory, offset, strides)


class Plan:
    """The calls of two consecutive steps, extrapolated: ``plan(t)`` repeats step t, 0 for the second one.

    It returns the array that is ``result`` in the second step, to be read before the next call. ``steps`` is
    the largest t. Raises ``NotRepeatable``.
    """

    def __init__(self, first: list[Call], second: list[Call], result: np.ndarray, steps: int):
        kinds = (
            [(call.function, len(call.args), *call.kwargs) for call in calls] for calls in (first, second)
        )
        if next(kinds) != next(kinds):
            raise NotRepeatable("the steps call different functions")
        self.result, self.steps = result, steps
        self.twins = {}  # id of an array that owns memory in the first step -> that of the second
        self.grown = {}  # id of an array of the second step that grows -> larger memory
        self.moving, self.written, self.calls = {}, set(), []
        for a, b in zip(first, second):
            args = [self._common(*pair, a) for pair in zip(a.args, b.args)]
            kwargs = {name: self._common(a.kwargs[name], value, a) for name, value in b.kwargs.items()}
            self.written.add(id(owner(b.out)))
            self.calls.append(Call(b.function, args, kwargs, b.out))
        self._bind()

    def _common(self, a, b, call: Call):
        """An argument of a ``call`` in both steps: itself if it is the same, or a ``_Moving``."""
        if type(a) is not type(b):
            raise NotRepeatable(f"an argument is {a!r}, then {b!r}")
        if not isinstance(b, np.ndarray):
            several = isinstance(b, list | tuple) and any(isinstance(x, np.ndarray) for x in b)
            if several or a != b:
                raise NotRepeatable(f"an argument is {a!r}, then {b!r}")
            return b
        owner_a, memory = owner(a), owner(b)
        if self.twins.setdefault(id(owner_a), memory) is not memory or a.ndim != b.ndim:
            raise NotRepeatable("the steps use their memory in different ways")
        computed = a is call.out or id(memory) in self.written
        if owner_a is not memory and not computed and not np.array_equal(a, b):
            raise NotRepeatable("an argument was computed outside the recording")
        growth = memory.nbytes - owner_a.nbytes
        if growth and id(memory) not in self.grown:
            self.grown[id(memory)] = np.empty(memory.nbytes + max(0, growth) * self.steps, np.uint8)
        moving = _Moving(self.grown.get(id(memory), memory), a, b, self.steps)
        if not growth and not any(moving.change):
            return b
        return self.moving.setdefault((id(memory), moving.start, moving.change, b.dtype), moving)

    def fuse_products(self, adjacent: Callable[[list[np.ndarray]], np.ndarray | None]) -> None:
        """Compute the products of one row with several matrices as one: q, k and v, or gate and up.

        ``adjacent`` maps matrices (out, in) to one of all their rows. A short product spends as long on
        starting BLAS's threads as on reading its matrix.
        """
        fused, removed, places = {}, set(), {}
        for group in self._groups(_is_row_product):
            matrix = adjacent([call.args[1].T for call in group])
            if matrix is None:
                continue
            out = np.empty((1, len(matrix)), matrix.dtype)
            fused[id(group[0])] = Call(np.matmul, [group[0].args[0], matrix.T], {"out": out}, out)
            removed |= {id(call) for call in group}
            start = 0
            for call in group:
                places[id(owner(call.out))] = out, start
                start += call.out.nbytes

        def placed(x):
            out, start = places.get(id(owner(x)), (None, 0)) if isinstance(x, np.ndarray) else (None, 0)
            return x if out is None else np.ndarray(x.shape, x.dtype, out, start + offset(x), x.strides)

        kept = [
            fused.get(id(call), call) for call in self.calls if id(call) in fused or id(call) not in removed
        ]
        for call in kept:
            call.args, call.out = list(map(placed, call.args)), placed(call.out)
            call.kwargs = {name: placed(x) for name, x in call.kwargs.items()}
        self.calls, self.result = kept, placed(self.result)
        self._bind()

    def merge(self, function: Callable) -> None:
        """Make calls ``function(a, x, out)`` with the same a one: ``function(a, x, out, x, out, ...)``."""

        def selected(call: Call) -> bool:
            if call.function is not function or not all(isinstance(x, np.ndarray) for x in call.args):
                return False
            a, x, out = call.args
            given = id(owner(x)) not in self.written  # and so the same before the first of the calls
            return given and a.flags.c_contiguous and owner(out).nbytes == out.nbytes

        removed = set()
        for first, *others in self._groups(selected):
            first.args = [*first.args, *(x for call in others for x in call.args[1:])]
            removed |= set(map(id, others))
        self.calls = [call for call in self.calls if id(call) not in removed]
        self._bind()

    def _groups(self, selected: Callable[[Call], bool]) -> list[list[Call]]:
        """Of the calls that are ``selected``, those that follow one another with the same first argument."""
        groups, open_groups = [], {}
        for call in self.calls:
            written = id(owner(call.out))
            open_groups = {key: group for key, group in open_groups.items() if key[0] != written}
            if selected(call):
                row = call.args[0]
                key = id(owner(row)), offset(row), row.shape, row.dtype
                if key not in open_groups:
                    open_groups[key] = []
                    groups.append(open_groups[key])
                open_groups[key].append(call)
        return [group for group in groups if len(group) > 1]

    def _bind(self) -> None:
        self.run = []
        for call in self.calls:
            args, kwargs = list(call.args), dict(call.kwargs)
            places = [(args, i, x) for i, x in enumerate(args) if isinstance(x, _Moving)]
            places += [(kwargs, name, x) for name, x in kwargs.items() if isinstance(x, _Moving)]
            if places:
                self.run.append(partial(_call_moved, places, call.function, args, kwargs))
            else:
                self.run.append(_without_iterator(call.function, args, kwargs))

    def __call__(self, t: int) -> np.ndarray:
        for moving in self.moving.values():
            moving.move(t)
        with np.errstate(all="ignore"):
            for call in self.run:
                call()
        return self.result


def _call_moved(places, function, args, kwargs):
    for container, key, moving in places:
        container[key] = moving.array
    function(*args, **kwargs)


def _without_iterator(function, args: list, kwargs: dict) -> Callable[[], object]:
    """The call; if elementwise, with views without axes of length 1, and with arrays in place of numbers.

    For operands of one shape, or of one element, NumPy needs no iterator, and a few hundred elements take
    0.2 microseconds instead of 0.7 to 1.3.
    """
    out = kwargs.get("out")
    arrays = [x for x in (*args, out) if isinstance(x, np.ndarray)]
    elementwise = isinstance(function, np.ufunc) and function.signature is None and kwargs.keys() == {"out"}
    floats = {x.dtype for x in arrays} == {getattr(out, "dtype", None)} and out.dtype.kind == "f"
    if not (elementwise and floats and all(isinstance(x, np.ndarray | int | float) for x in args)):
        return partial(function, *args, **kwargs)

    def view(x):
        x = np.asarray(x, out.dtype)
        x = x[(*(0 if n == 1 else slice(None) for n in out.shape[out.ndim - x.ndim :]), ...)]
        return x.reshape(()) if x.size == 1 else x

    return partial(function, *map(view, args), out=view(out))


def owner(array: np.ndarray) -> np.ndarray:
    """The array that owns the memory of this one."""
    while isinstance(getattr(array, "base", None), np.ndarray):
        array = array.base
    return array


def offset(array: np.ndarray) -> int:
    """In bytes, from the beginning of its memory."""
    return array.__array_interface__["data"][0] - owner(array).__array_interface__["data"][0]


def _is_row_product(call: Call) -> bool:
    """Whether a call is a row (1, in) @ a transposed matrix (in, out), into memory of its own."""
    if call.function is not np.matmul or not all(isinstance(x, np.ndarray) for x in (*call.args, call.out)):
        return False
    row, matrix = call.args
    shapes = row.ndim == matrix.ndim == 2 and len(row) == 1
    return shapes and matrix.T.flags.c_contiguous and owner(call.out).nbytes == call.out.nbytes

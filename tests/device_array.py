"""A strict stand-in for a CuPy array: what runs on it reads as NumPy and runs on CuPy, and needs no GPU.

`DeviceArray` hides a NumPy array behind the protocols through which NumPy hands its calls to other libraries
(NEP 13 `__array_ufunc__`, NEP 18 `__array_function__`, NEP 35 `like=`) and has CuPy's limits: host arrays do
not mix with it, nothing turns it into a Python value on the way, and a call that CuPy has no twin for is
refused. It is stricter than CuPy where CuPy would silently copy: to the host (`bool(x)`, `for row in x`, an
array as a shape) or to the device (a list or a host array as index). Every refusal is a `TypeError`.

The lists are CuPy 14's signatures; `test_device_array.py` compares them with the installed package. What is
not on them is refused: before adding a line, see that CuPy has it.
"""

import inspect
import numbers
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from einops._backends import AbstractBackend
from numpy.lib.mixins import NDArrayOperatorsMixin


def _by_name(groups: dict[str, Callable]) -> dict[str, inspect.Signature]:
    return {name: inspect.signature(call) for names, call in groups.items() for name in names.split()}


# NumPy function -> what CuPy's function of that name takes. Left out on purpose: `ones`, `full` and `eye`
# (NumPy 2 hands their `like=` twins a `device` that CuPy lacks: use `ones_like(x, shape=...)`) and `subok`,
# which CuPy takes only as None. `argmax`'s third argument is `out` here and `dtype` there: keywords only.
FUNCTIONS = _by_name(
    {
        "all any amax amin max min": lambda a, axis=None, out=None, keepdims=False: ...,
        "mean prod sum": lambda a, axis=None, dtype=None, out=None, keepdims=False: ...,
        "std var": lambda a, axis=None, dtype=None, out=None, ddof=0, keepdims=False: ...,
        "argmax argmin": lambda a, axis=None, *, dtype=None, out=None, keepdims=False: ...,
        "count_nonzero squeeze flip": lambda a, axis=None: ...,
        "cumsum": lambda a, axis=None, dtype=None, out=None: ...,
        "linalg.norm": lambda x, ord=None, axis=None, keepdims=False: ...,
        "argsort sort": lambda a, axis=-1, kind=None: ...,
        "argpartition partition": lambda a, kth, axis=-1: ...,
        "searchsorted": lambda a, v, side="left", sorter=None: ...,
        "unique": lambda ar, return_index=False, return_inverse=False, return_counts=False, axis=None, *,
        equal_nan=True: ...,
        "bincount": lambda x, weights=None, minlength=None: ...,
        "arange": lambda start, stop=None, step=1, dtype=None: ...,
        "empty zeros": lambda shape, dtype=float, order="C": ...,
        "empty_like": lambda prototype, dtype=None, order="K", *, shape=None: ...,
        "ones_like zeros_like": lambda a, dtype=None, order="K", *, shape=None: ...,
        "full_like": lambda a, fill_value, dtype=None, order="K", *, shape=None: ...,
        "array": lambda obj, dtype=None, copy=True, order="K", ndmin=0: ...,
        "asarray": lambda a, dtype=None, order=None, *, copy=None: ...,
        "ascontiguousarray": lambda a, dtype=None: ...,
        "concatenate stack": lambda tup, axis=0, out=None, *, dtype=None, casting="same_kind": ...,
        "split": lambda ary, indices_or_sections, axis=0: ...,
        "copyto": lambda dst, src, casting="same_kind", where=None: ...,
        "reshape": lambda a, newshape, order="C", *, copy=None: ...,
        "broadcast_to": lambda array, shape: ...,
        "ravel": lambda a, order="C": ...,
        "expand_dims": lambda a, axis: ...,
        "transpose": lambda a, axes=None: ...,
        "swapaxes": lambda a, axis1, axis2: ...,
        "moveaxis": lambda a, source, destination: ...,
        "roll": lambda a, shift, axis=None: ...,
        "repeat": lambda a, repeats, axis=None: ...,
        "tile": lambda A, reps: ...,
        "tril triu": lambda m, k=0: ...,
        "take": lambda a, indices, axis=None, out=None: ...,
        "take_along_axis": lambda a, indices, axis: ...,
        "put_along_axis": lambda arr, indices, values, axis: ...,
        "where": lambda condition, x=None, y=None: ...,
        "clip": lambda a, a_min, a_max, out=None: ...,
        "round": lambda a, decimals=0, out=None: ...,
        "nan_to_num": lambda x, copy=True, nan=0.0, posinf=None, neginf=None: ...,
        "dot outer": lambda a, b, out=None: ...,
        "vdot": lambda a, b: ...,
        "tensordot": lambda a, b, axes=2: ...,
        "einsum": lambda *operands, dtype=None, optimize=False: ...,
        "allclose isclose": lambda a, b, rtol=1e-5, atol=1e-8, equal_nan=False: ...,
        "array_equal": lambda a1, a2, equal_nan=False: ...,
        "may_share_memory shares_memory": lambda a, b, max_work=None: ...,
        "ndim nonzero shape": lambda a: ...,
        "result_type": lambda *arrays_and_dtypes: ...,
    }
)  # fmt: skip

# Methods of an array take what the function of that name takes, apart from these.
METHODS = {name: FUNCTIONS[name] for name in FUNCTIONS if hasattr(np.ndarray, name)} | _by_name(
    {
        "astype": lambda self, dtype, order="K", *, copy=True: ...,
        "clip": lambda self, min=None, max=None, out=None: ...,
        "copy flatten": lambda self, order="C": ...,
        "fill": lambda self, value: ...,
        "reshape": lambda self, *shape, order="C", copy=None: ...,
        "transpose": lambda self, *axes: ...,
        "view": lambda self, dtype=None: ...,
    }
)

# Ufuncs take no `where=`, and reduce with add and multiply alone (`np.max` is there, `np.maximum.reduce` is
# not). `erf` is scipy.special's, which CuPy answers with cupyx.scipy.special's.
UFUNCS = _by_name(
    {
        """absolute add arccos arcsin arctan arctan2 bitwise_and bitwise_or bitwise_xor cbrt ceil conjugate
        copysign cos cosh divide equal erf exp exp2 expm1 fabs floor floor_divide fmax fmin greater
        greater_equal hypot invert isfinite isinf isnan left_shift less less_equal log log10 log1p log2
        logaddexp logical_and logical_not logical_or logical_xor maximum minimum multiply negative not_equal
        positive power reciprocal remainder right_shift rint sign signbit sin sinh sqrt square subtract tan
        tanh trunc multiply.outer""": lambda *inputs, out=None, dtype=None, casting="same_kind": ...,
        "matmul": lambda *inputs, axes=None, axis=None, keepdims=False, casting="same_kind", dtype=None,
        signature=None, order="K", out=None: ...,
        "add.reduce multiply.reduce": lambda array, axis=0, dtype=None, out=None, keepdims=False: ...,
        "add.at": lambda a, indices, b=None: ...,
    }
)  # fmt: skip
ADD_AT_DTYPES = {"int32", "int64", "uint32", "uint64", "float16", "float32", "float64"}

# These parameters are Python numbers, alone or in a sequence, never arrays. Everywhere else a number may
# stand alone, but a sequence of numbers is a host array in disguise.
PLAIN = {"shape", "newshape", "axis", "axes", "axis1", "axis2", "source", "destination", "shift", "ord", "k"}
PLAIN |= {"reps", "repeats", "indices_or_sections", "kth", "decimals", "ddof", "start", "stop", "step"}
NUMBERS = (numbers.Number, np.generic)
CONVERSIONS = {"array", "asarray", "ascontiguousarray"}  # with like=x, the explicit way from host to device
ZERO_D_RESULTS = {"allclose", "array_equal", "count_nonzero"}  # Python values in NumPy, 0-d arrays in CuPy


class Flags(NamedTuple):
    """CuPy's flags: there is no `writeable`."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


class DeviceArray(NDArrayOperatorsMixin):
    """A CuPy array as far as the code under test can tell; `of` builds one, `get` brings it back."""

    __slots__ = ("__weakref__", "_array")

    def __init__(self, array: np.ndarray):
        self._array = array

    @classmethod
    def of(cls, array) -> "DeviceArray":
        """A copy of a NumPy array (or a number, or a nested list of numbers)."""
        return cls(np.array(array))

    def get(self) -> np.ndarray:
        """A copy on the host."""
        return self._array.copy()

    def item(self):
        """The only element, as a Python number."""
        return self._array.item()

    def __getattr__(self, name: str):
        if name in ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides"):
            return getattr(self._array, name)
        if name in ("T", "mT", "real", "imag"):
            return DeviceArray(getattr(self._array, name))
        if name in METHODS:
            method = getattr(np.ndarray, name)
            return lambda *args, **kwargs: _call(name, METHODS[name], method, (self, *args), kwargs)
        raise AttributeError(f"{name!r} is not on the list of attributes that a CuPy array has")

    @property
    def base(self) -> "DeviceArray | None":
        owner = self._array.base
        return None if owner is None else DeviceArray(owner)

    @property
    def flags(self) -> Flags:
        flags = self._array.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, flags.owndata)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        name = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
        if name not in UFUNCS:
            raise TypeError(f"numpy.{name} is not on the list of ufuncs that CuPy has")
        for value in inputs:
            if not isinstance(value, (DeviceArray, *NUMBERS)):
                raise TypeError(f"numpy.{name} got a {type(value).__name__} beside a device array")
        if method == "at" and inputs[0].dtype.name not in ADD_AT_DTYPES:
            raise TypeError(f"numpy.{name} has no {inputs[0].dtype} in CuPy")
        return _call(name, UFUNCS[name], getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, func, types, args, kwargs):
        name = f"{func.__module__}.{func.__name__}".removeprefix("numpy.")
        if name not in FUNCTIONS:
            raise TypeError(f"numpy.{name} is not on the list of functions that CuPy has")
        if name in CONVERSIONS and not isinstance(args[0], DeviceArray):
            args = (DeviceArray.of(args[0]), *args[1:])
        result = _call(name, FUNCTIONS[name], func, args, kwargs)
        python_value = name in ZERO_D_RESULTS and not isinstance(result, DeviceArray)
        return DeviceArray.of(result) if python_value else result

    def __len__(self) -> int:
        return len(self._array)

    def __repr__(self) -> str:
        return f"DeviceArray({self._array!r})"

    def __getitem__(self, index) -> "DeviceArray":
        return DeviceArray(self._array[_to_index(index)])

    def __setitem__(self, index, value) -> None:
        if not isinstance(value, (DeviceArray, *NUMBERS)):
            raise TypeError(f"a {type(value).__name__} cannot be assigned into a device array")
        self._array[_to_index(index)] = _to_host(value, {})

    def _refuse(self, *args, **kwargs):
        raise TypeError("a device array is not converted implicitly: .item() makes a number, .get() a copy")

    __array__ = __bool__ = __int__ = __float__ = __complex__ = __index__ = __iter__ = _refuse

    def __imatmul__(self, other):
        # CuPy has no such method: there "a @= b" makes a new array, NumPy writes into the old one.
        raise TypeError("a @= b means another thing in CuPy than in NumPy: use np.matmul(a, b, out=a)")


def _call(name, signature, function, args, kwargs):
    """Run NumPy's function on the hidden arrays, if CuPy's twin would take these arguments."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"CuPy's {name} does not take this call: {error}") from None
    for parameter, value in bound.arguments.items():
        if parameter in PLAIN and _holds(value, DeviceArray):
            raise TypeError(f"{name}: {parameter} is read on the host and cannot be a device array")
        in_sequence = isinstance(value, (list, tuple)) and _holds(value, NUMBERS)
        if in_sequence and parameter not in (*PLAIN, "inputs", "arrays_and_dtypes"):
            raise TypeError(f"{name}: {parameter} is a sequence of host numbers, not a device array")
    given = {}
    host_kwargs = {key: _to_host(value, given) for key, value in kwargs.items()}
    return _to_device(function(*_to_host(args, given), **host_kwargs), given)


def _holds(value, kinds) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds(element, kinds) for element in value)
    return isinstance(value, kinds)


def _to_host(value, given: dict[int, DeviceArray]):
    """The hidden array of every device array in `value`; `given` remembers which array each was hidden in."""
    if isinstance(value, DeviceArray):
        given[id(value._array)] = value
        return value._array
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array beside a device array: move it with np.asarray(array, like=...) first")
    if isinstance(value, (list, tuple)):
        return type(value)([_to_host(element, given) for element in value])
    return value


def _to_device(result, given: dict[int, DeviceArray]):
    """Arrays and NumPy scalars become device arrays; an argument that comes back (`out=`) is itself."""
    if isinstance(result, (list, tuple)) and _holds(result, np.ndarray):
        return type(result)([_to_device(element, given) for element in result])
    if isinstance(result, (np.ndarray, np.generic)):
        return given.get(id(result), DeviceArray(np.asarray(result)))
    return result


def _to_index(index) -> tuple:
    items = []
    for item in index if isinstance(index, tuple) else (index,):
        plain = item is None or item is Ellipsis or isinstance(item, (int, np.integer, slice))
        if not plain and not isinstance(item, DeviceArray):
            raise TypeError(f"a {type(item).__name__} as index would be copied to the device at every use")
        items.append(_to_host(item, {}))
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)  # so that a single element is a 0-d view too, as in CuPy
    return tuple(items)


class DeviceArrayBackend(AbstractBackend):
    """Lets einops take a DeviceArray: it asks each subclass whose `framework_name` is an imported module."""

    framework_name = __name__

    def is_appropriate_type(self, tensor):
        return isinstance(tensor, DeviceArray)

    def add_axis(self, x, new_position):
        return np.expand_dims(x, new_position)

    def tile(self, x, repeats):
        return np.tile(x, repeats)

    def stack_on_zeroth_dimension(self, tensors):
        return np.stack(tensors)

    def concat(self, tensors, axis):
        return np.concatenate(tensors, axis=axis)

    def is_float_type(self, x):
        return x.dtype.kind == "f"

    def einsum(self, pattern, *x):
        return np.einsum(pattern, *x)

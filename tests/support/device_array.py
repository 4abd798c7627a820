"""A strict fake of a CuPy array: code that runs on it is NumPy code that also runs on CuPy. It needs no GPU.

`DeviceArray` wraps a NumPy array in the protocols through which NumPy dispatches to other libraries (NEP 13
`__array_ufunc__`, NEP 18 `__array_function__`, NEP 35 `like=`) and has CuPy's limits: it cannot be mixed with
host arrays or converted implicitly to a Python value, and functions that CuPy does not have are refused. It
is stricter than CuPy where CuPy would copy silently: to the host (`bool(x)`, `for row in x`, an array as a
shape) or to the device (a list or a host array as index). Every refusal is a `TypeError`.

The lists have CuPy 14's signatures; `test_device_array.py` compares them with the installed package.
Everything that is not listed is refused: before adding a line, check that CuPy has it.
"""

import numbers
import operator
import weakref
from typing import ClassVar, NamedTuple

import ml_dtypes
import numpy as np
from einops._backends import AbstractBackend
from numpy.lib.mixins import NDArrayOperatorsMixin
from support.cupy_signatures import FUNCTIONS, METHODS, UFUNCS

ADD_AT_DTYPES = {"int32", "int64", "uint32", "uint64", "float16", "float32", "float64"}

# These parameters are Python numbers or sequences of them, never arrays. All others may be a single number,
# but a sequence of numbers would be converted to a host array.
PLAIN = {"shape", "newshape", "axis", "axes", "axis1", "axis2", "source", "destination", "shift", "ord", "k"}
PLAIN |= {"reps", "repeats", "indices_or_sections", "kth", "decimals", "ddof", "start", "stop", "step"}
NUMBERS = (int, float, np.generic, numbers.Number)  # the last is slow to ask for
CONVERSIONS = {"array", "asarray", "ascontiguousarray"}  # with like=x, the explicit copy from host to device
ZERO_D_RESULTS = {"allclose", "array_equal", "count_nonzero"}  # Python values in NumPy, 0-d arrays in CuPy


class Flags(NamedTuple):
    """CuPy's flags, which have no `writeable`."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


class Device:
    """A GPU by its index, by default the current one: of the last `use()` or the enclosing `with`."""

    current: ClassVar[int] = 0

    def __init__(self, id: int | None = None):
        self.id = Device.current if id is None else id
        self._before: list[int] = []

    def use(self) -> "Device":
        Device.current = self.id
        return self

    def __enter__(self) -> "Device":
        self._before.append(Device.current)
        return self.use()

    def __exit__(self, *_) -> None:
        Device.current = self._before.pop()

    def __eq__(self, other) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def synchronize(self) -> None:
        """Do nothing."""


class Pointer(NamedTuple):
    """The address of an array, as passed to kernels and cuBLAS."""

    ptr: int


_LIVING: "weakref.WeakValueDictionary[int, DeviceArray]" = (
    weakref.WeakValueDictionary()
)  # by id of the wrapped array


class DeviceArray(NDArrayOperatorsMixin):
    """A CuPy array as far as the code under test can tell. `of` creates one, `get` copies it to the host."""

    __slots__ = ("__weakref__", "_array", "device")

    def __init__(self, array: np.ndarray, device: Device | None = None):
        self._array = array
        self.device = Device() if device is None else device
        _LIVING[id(array)] = self

    @classmethod
    def of(cls, array, device: Device | None = None) -> "DeviceArray":
        """A copy of a NumPy array, a number or a nested list on ``device`` (default: the current one)."""
        return cls(np.array(array), device)

    def get(self) -> np.ndarray:
        """A copy on the host."""
        return self._array.copy()

    def item(self):
        """The only element, as a Python number."""
        return self._array.item()

    def tolist(self) -> list:
        """All elements, as Python numbers, through a copy on the host."""
        return self.get().tolist()

    shape, dtype, ndim, size, nbytes, itemsize, strides = (
        property(operator.attrgetter(f"_array.{name}"))
        for name in ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides")
    )

    def __getattr__(self, name: str):
        if name in ("T", "mT", "real", "imag"):
            return DeviceArray(getattr(self._array, name), self.device)
        if name in METHODS:
            method = getattr(np.ndarray, name)
            return lambda *args, **kwargs: _call(
                name, METHODS[name], method, (self, *args), kwargs, self.device
            )
        raise AttributeError(f"{name!r} is not on the list of attributes that a CuPy array has")

    @property
    def data(self) -> Pointer:
        return Pointer(self._array.__array_interface__["data"][0])

    @property
    def base(self) -> "DeviceArray | None":
        """The array that owns the memory: the original object while it is alive."""
        owner = self._array.base
        if owner is None:
            return None
        living = _LIVING.get(id(owner))
        return DeviceArray(owner, self.device) if living is None else living

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
                raise TypeError(f"numpy.{name} got a {type(value).__name__} together with a device array")
        if method == "at" and inputs[0].dtype.name not in ADD_AT_DTYPES:
            raise TypeError(f"numpy.{name} has no {inputs[0].dtype} in CuPy")
        return _call(name, UFUNCS[name], getattr(ufunc, method), inputs, kwargs, self.device)

    def __array_function__(self, func, types, args, kwargs):
        name = f"{func.__module__}.{func.__name__}".removeprefix("numpy.")
        if name not in FUNCTIONS:
            raise TypeError(f"numpy.{name} is not on the list of functions that CuPy has")
        device = self.device
        if name in CONVERSIONS:  # to the current GPU, wherever the argument and ``like`` are
            device = Device()
            if not isinstance(args[0], DeviceArray):
                args = (DeviceArray.of(args[0], device), *args[1:])
            elif args[0].device != device:
                args = (DeviceArray.of(args[0].get(), device), *args[1:])
        result = _call(name, FUNCTIONS[name], func, args, kwargs, device)
        python_value = name in ZERO_D_RESULTS and not isinstance(result, DeviceArray)
        return DeviceArray.of(result, device) if python_value else result

    def __len__(self) -> int:
        return len(self._array)

    def __repr__(self) -> str:
        return f"DeviceArray({self._array!r})"

    def __getitem__(self, index) -> "DeviceArray":
        return DeviceArray(self._array[_to_index(index, self.device)], self.device)

    def __setitem__(self, index, value) -> None:
        if not isinstance(value, (DeviceArray, *NUMBERS)):
            raise TypeError(f"a {type(value).__name__} cannot be assigned into a device array")
        given = {}
        value = _to_host(value, given)
        _check_devices("an assignment", given, self.device)
        self._array[_to_index(index, self.device)] = value

    def _refuse(self, *args, **kwargs):
        raise TypeError("a device array is not converted implicitly: .item() makes a number, .get() a copy")

    __array__ = __bool__ = __int__ = __float__ = __complex__ = __index__ = __iter__ = _refuse

    def __imatmul__(self, other):
        # CuPy has no such method: "a @= b" creates a new array there, whereas NumPy modifies a.
        raise TypeError("a @= b does not work in place in CuPy: use np.matmul(a, b, out=a)")


def _call(name, signature, function, args, kwargs, device):
    """Run NumPy's function on the wrapped arrays if CuPy's function would accept these arguments."""
    try:
        arguments = _bind(signature, args, kwargs)
    except TypeError as error:
        raise TypeError(f"CuPy's {name} does not take this call: {error}") from None
    for parameter, value in arguments:
        if parameter in PLAIN and _holds(value, DeviceArray):
            raise TypeError(f"{name}: {parameter} is read on the host and cannot be a device array")
        mixed = parameter in PLAIN or parameter in ("inputs", "arrays_and_dtypes")
        if not mixed and isinstance(value, (list, tuple)) and _holds(value, NUMBERS):
            raise TypeError(f"{name}: {parameter} is a sequence of host numbers, not a device array")
    given = {}
    host_args = _to_host(args, given)
    host_kwargs = {key: _to_host(value, given) for key, value in kwargs.items()}
    _check_devices(name, given, device)
    if any(_is_bfloat16(array._array) for array in given.values()):
        function = _IN_FLOAT32.get(name, lambda function: function)(function)
        # With a Python float ml_dtypes 0.6 gives float32, 0.7 bfloat16: the wider one shows more mistakes.
        host_args = tuple(np.float32(x) if type(x) is float else x for x in host_args)
    return _to_device(function(*host_args, **host_kwargs), given, device)


_BOUND: dict[tuple, dict] = {}


def _bind(signature, args, kwargs) -> list[tuple]:
    """(parameter, value) for every parameter that gets one. Raises TypeError like ``signature.bind``.

    Which argument a parameter gets does not depend on the values, so that is remembered: ``bind`` is slow.
    """
    form = (id(signature), len(args), *kwargs)
    if form not in _BOUND:
        _BOUND[form] = signature.bind(*range(len(args)), **{key: key for key in kwargs}).arguments
    found = []
    for parameter, place in _BOUND[form].items():
        if isinstance(place, tuple):  # of *args
            found.append((parameter, args[place[0] :]))
        else:
            found.append((parameter, args[place] if isinstance(place, int) else kwargs[place]))
    return found


def _check_devices(name, given, device) -> None:
    for array in given.values():
        if array.device != device:
            raise TypeError(f"{name}: arrays on {device} and on {array.device}")


# Elementwise ops on bfloat16 are those of ml_dtypes, as in CuPy. Sums, matrix products and `where` differ.


def _add_in_float32(function):
    """Reduce bfloat16 in float32 and round the result."""

    def reduce(array, *axis, dtype=None, **kwargs):
        if len(axis) > 1:
            raise TypeError("pass dtype and out of a bfloat16 sum by name")
        if dtype is not None and np.dtype(dtype).itemsize > array.itemsize:
            return function(array, *axis, dtype=dtype, **kwargs)
        result = function(np.asarray(array, np.float32), *axis, **kwargs)
        return result if kwargs.get("out") is not None else result.astype(array.dtype)

    return reduce


def _multiply_in_float32(function):
    """Multiply bfloat16 matrices in float32 and round the result. Batches are refused, as in CuPy."""

    def matmul(a, b, **kwargs):
        if a.dtype != b.dtype:
            return function(a, b, **kwargs)
        if a.ndim > 2 or b.ndim > 2:
            raise TypeError("matmul: CuPy has no batched product in bfloat16")
        product = function(np.asarray(a, np.float32), np.asarray(b, np.float32))
        if kwargs.get("out") is None:
            return product.astype(kwargs.get("dtype") or a.dtype)
        kwargs["out"][0][...] = product
        return kwargs["out"][0]

    return matmul


def _is_bfloat16(x) -> bool:
    return isinstance(x, np.ndarray) and x.dtype == ml_dtypes.bfloat16


def _choose_in_float32(function):
    """Return float32 from `where` of bfloat16, as CuPy does."""

    def where(condition, *choices):
        wider = [x.astype(np.float32) if _is_bfloat16(x) else x for x in choices]
        return function(condition, *wider)

    return where


_SUMS = ("sum", "mean", "prod", "add.reduce", "multiply.reduce")
_IN_FLOAT32 = dict.fromkeys(_SUMS, _add_in_float32)
_IN_FLOAT32 |= {"matmul": _multiply_in_float32, "where": _choose_in_float32}


def _holds(value, kinds) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds(element, kinds) for element in value)
    return isinstance(value, kinds)


def _to_host(value, given: dict[int, DeviceArray]):
    """Replace every device array in `value` by its wrapped array, recording it in `given`."""
    if isinstance(value, DeviceArray):
        given[id(value._array)] = value
        return value._array
    if isinstance(value, np.ndarray):
        raise TypeError(
            "a NumPy array together with a device array: move it with np.asarray(array, like=...)"
        )
    if isinstance(value, (list, tuple)):
        return type(value)([_to_host(element, given) for element in value])
    return value


def _to_device(result, given: dict[int, DeviceArray], device: Device):
    """Wrap arrays and NumPy scalars. A returned argument (`out=`) is its original device array."""
    if isinstance(result, (list, tuple)) and _holds(result, np.ndarray):
        return type(result)([_to_device(element, given, device) for element in result])
    if isinstance(result, (np.ndarray, np.generic)):
        return given.get(id(result), DeviceArray(np.asarray(result), device))
    return result


def _to_index(index, device: Device) -> tuple:
    items, given = [], {}
    for item in index if isinstance(index, tuple) else (index,):
        plain = item is None or item is Ellipsis or isinstance(item, (int, np.integer, slice))
        if not plain and not isinstance(item, DeviceArray):
            raise TypeError(f"a {type(item).__name__} as index would be copied to the device at every use")
        items.append(_to_host(item, given))
    _check_devices("an index", given, device)
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)  # so that a single element is a 0-d view too, as in CuPy
    return tuple(items)


class DeviceArrayBackend(AbstractBackend):
    """The einops backend of DeviceArray. einops tries each subclass whose `framework_name` is imported."""

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

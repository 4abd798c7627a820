"""Validators of token ids, arrays, numbers, random generators, config fields, and tensor names and shapes."""

import contextlib
import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import Field, fields
from numbers import Real

import numpy as np

from tinyllm.errors import Error


def check_ids(ids, vocab_size: int, name: str = "ids") -> np.ndarray:
    """Validate token ids of any shape and return them as an int64 array.

    Raises ``Error`` if ``ids`` is empty, or naming the position and value of the first entry that is not an
    integer (a float or a bool) or not in 0..vocab_size-1. Ids are checked on the host because a GPU wraps an
    out-of-range index silently.
    """
    array = check_integers(ids, name)
    if array.size == 0:
        raise Error(f"{name} is empty: give at least one token id")
    outside = np.asarray((array < 0) | (array >= vocab_size))
    if outside.any():
        where, value = _first(array, outside, name)
        raise Error(
            f"{where} is {value}, but token ids run from 0 to {vocab_size - 1}: "
            "encode the text with the model's own tokenizer"
        )
    return array.astype(np.int64)


def check_integers(values, name: str) -> np.ndarray:
    """Values of any shape as an array. Raises ``Error`` naming the first that is not an integer."""
    # dtype=object preserves each value's type: NumPy would convert [1, True, 2.0] to floats.
    array = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=object)
    if array.dtype.kind in "iu":
        return array
    if array.dtype.kind == "O":
        wrong = np.array([not is_integer(value) for value in array.flat], dtype=bool).reshape(array.shape)
    else:
        wrong = np.full(array.shape, True)
    if wrong.any():
        where, value = _first(array, wrong, name)
        raise Error(f"{where} is {value!r}, not an integer: give token ids as whole numbers")
    return array


def is_integer(value) -> bool:
    """Whether a value is a Python or NumPy integer. True and 2.0 are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_at_least(value: int, minimum: int, name: str) -> int:
    """The value as a Python int. Raises ``Error`` unless it is an integer of at least ``minimum``."""
    if not is_integer(value) or value < minimum:
        raise Error(f"{name} is {value!r}: choose a whole number of at least {minimum}")
    return int(value)


def check_not_negative(value: float, name: str) -> None:
    """Raise ``Error`` unless the value is a finite number of at least 0."""
    with contextlib.suppress(OverflowError):  # of 10**400
        if isinstance(value, Real) and 0 <= float(value) < math.inf:
            return
    raise Error(f"{name} is {value!r}: choose a finite number of at least 0")


def check_shape(shape) -> tuple[int, ...]:
    """The shape of a parameter, one size or several, as a tuple. Raises ``Error`` for another or negative."""
    sizes = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    if not all(is_integer(size) and size >= 0 for size in sizes):
        raise Error(f"a parameter cannot have shape {shape!r}: give whole numbers of at least 0")
    return sizes


def check_model(model, attribute: str) -> None:
    """Raise ``Error`` unless it is a model, not the name or the class of one: it has this attribute."""
    if isinstance(model, type) or not hasattr(model, attribute):
        raise Error(f"model is {described(model)}: pass a model, such as load_model('smollm2')")


def described(value) -> str:
    """What an argument of a wrong type is, in a message: its value if that is short."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    short = value is None or isinstance(value, str | int | float | np.generic | os.PathLike)
    return repr(value) if short else f"a {type(value).__name__}"


def check_gradient(grad, shape: tuple, dtype: np.dtype) -> None:
    """Raise ``Error`` unless a gradient is None or an array, not a Tensor, of this shape and dtype."""
    is_array = hasattr(grad, "dtype") and not hasattr(grad, "requires_grad")
    if grad is not None and (not is_array or grad.shape != shape or grad.dtype != dtype):
        got = f"{grad.dtype} {grad.shape}" if is_array else f"a {type(grad).__name__}"
        raise Error(f"grad must be an array of shape {shape} and dtype {dtype}, not {got}")


def pip_install(extra: str) -> str:
    """The command that installs an extra. (On PyPI, ``tinyllm`` is another project.)"""
    return f"pip install 'tinyllm-numpy[{extra}]'"


def as_array(x):
    """An array as it is; a number or lists of numbers as one. Raises Error for what is not numbers."""
    if type(x) is np.ndarray:
        return x
    dtype = getattr(x, "dtype", None)
    if isinstance(dtype, np.dtype):  # a GPU's, or a NumPy scalar, the result of a full reduction
        return np.asarray(x) if isinstance(x, np.generic) else x
    if dtype is not None:
        library = type(x).__module__.partition(".")[0]
        raise Error(
            f"a {type(x).__name__} of {library} is not a NumPy array: convert it, such as with .numpy()"
        )
    with contextlib.suppress(ValueError):  # of lists of different lengths
        array = np.asarray(x)
        if array.dtype.kind not in "OSU":
            return array
    raise Error(f"a {type(x).__name__} is not an array of numbers: give numbers, or lists of equal lengths")


def as_generator(rng) -> np.random.Generator | None:
    """The generator for an integer seed; a generator or None is returned unchanged. Else raises ``Error``."""
    if rng is None or isinstance(rng, np.random.Generator):
        return rng
    if is_integer(rng) and rng >= 0:
        return np.random.default_rng(int(rng))
    raise Error(f"rng is {described(rng)}: pass a non-negative integer seed or np.random.default_rng(seed)")


def check_fraction(validation_fraction: float) -> None:
    if not 0 < validation_fraction < 1:
        raise Error(f"validation_fraction is {validation_fraction}: choose one between 0 and 1, such as 0.1")


def _first(array: np.ndarray, wrong: np.ndarray, name: str) -> tuple[str, object]:
    """The position (as ``name[i, j]``) and value of the first entry where ``wrong`` is true."""
    position = tuple(int(i) for i in np.unravel_index(wrong.argmax(), wrong.shape))
    value = array[position]
    where = f"{name}[{', '.join(str(i) for i in position)}]" if position else name
    return where, value.item() if isinstance(value, np.generic) else value


# Far above the sizes of any real model. Layers and widths take memory even in a model without weights.
MAX_LAYERS, MAX_WIDTH, MAX_SIZE = 2**10, 2**20, 2**31 - 1
MAX_WEIGHTS = 2**39  # layers x width²: Llama 3.1 405B with 126 layers and 53,248 channels has 2**38.4

FIELD_TYPES = {
    "int": int,
    "int | None": int | None,
    "float": int | float,
    "float | None": int | float | None,
    "list | None": list | None,
    "bool": bool,
    "str": str,
    "dict": Mapping,
}


def declared_type(field: Field) -> str:
    """A field's type as in its source, with ``from __future__ import annotations`` there or without."""
    return field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)


def is_integer_field(field: Field) -> bool:
    return declared_type(field) in ("int", "int | None")


def check_fields(config, layers: tuple[str, ...], widths: tuple[str, ...]) -> None:
    """Raise ``Error`` unless every field of a config has its declared type and a finite, plausible value.

    Unlike in Python, a bool is not a number. Types that are not in ``FIELD_TYPES`` are not checked.
    ``layers`` and ``widths`` name the sizes that cost time and memory as soon as the model is built, before
    any weights are loaded.
    """
    limits = dict.fromkeys(layers, MAX_LAYERS) | dict.fromkeys(widths, MAX_WIDTH)
    for field in fields(config):
        name, value, declared = field.name, getattr(config, field.name), declared_type(field)
        truth = isinstance(value, bool) and declared.startswith(("int", "float"))
        if not isinstance(value, FIELD_TYPES.get(declared, object)) or truth:
            kind = "a whole number of at least 1" if is_integer_field(field) else f"a {declared}"
            raise Error(f"{name} must be {kind}, not {value!r}")
        if isinstance(value, int | float) and not abs(value) <= limits.get(name, MAX_SIZE):
            raise Error(f"{name} must be at most {limits.get(name, MAX_SIZE):,}, not {value!r}")
    deepest, widest = (
        max((getattr(config, name) or 1 for name in names), default=1) for names in (layers, widths)
    )
    if deepest * widest**2 > MAX_WEIGHTS:
        names = ", ".join((*layers, *widths))
        raise Error(f"{deepest:,} layers of width {widest:,} are too large: correct {names}")


def check_range(name: str, array, dtype: np.dtype, instead: str = "another dtype") -> None:
    """Raise ``Error``, naming what to choose ``instead``, if the largest number is too large for ``dtype``.

    An array with infinity or nan is not checked: it stays as wrong as it is.
    """
    if np.can_cast(array.dtype, dtype) or not array.size:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        largest = max(abs(array.max().item()), abs(array.min().item()))  # without a copy of the array
        lost = np.isfinite(largest) and not np.isfinite(np.float64(largest).astype(dtype))
    if lost:
        raise Error(f"{name} has a weight of {largest:.3g}, too large for {dtype}: choose {instead}")


def check_names_and_shapes(expected: dict[str, tuple], found: dict[str, tuple], source: str) -> None:
    """Raise one ``Error`` that lists every missing, unexpected and misshaped tensor, if there are any.

    ``expected`` maps the model's tensor names to shapes, ``found`` those of ``source`` (such as a folder).
    """
    both = [name for name in expected if name in found]
    kinds = {
        "Missing": [name for name in expected if name not in found],
        "Unexpected": [name for name in found if name not in expected],
        "Wrong shape": [f"{n} is {found[n]}, not {expected[n]}" for n in both if found[n] != expected[n]],
    }
    problems = [f"{kind} ({len(names)}): {', '.join(names)}" for kind, names in kinds.items() if names]
    if problems:
        listed = "; ".join(problems)
        raise Error(f"{source} does not fit the model: use the config it was saved with ({listed})")

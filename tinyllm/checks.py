"""Validators of token ids, numbers, the fields of a config and the names and shapes of tensors."""

from collections.abc import Mapping
from dataclasses import fields

import numpy as np

from tinyllm.errors import Error


def check_ids(ids, vocab_size: int, name: str = "ids") -> np.ndarray:
    """Token ids of any shape as an int64 array, checked, on the host (a GPU wraps a wrong index silently).

    Raises ``Error`` naming the first value that is not an integer (a float or a bool) or lies outside
    0..vocab_size-1, with its position; also if there are no ids at all.
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
    # As objects, what is not an array keeps its values as they were: [1, True, 2.0] would become floats.
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
    """Whether a value is a whole number, Python's or NumPy's; True and 2.0 are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_at_least(value: int, minimum: int, name: str) -> int:
    """The value as Python's int. Raises ``Error`` unless it is a whole number, and not too small."""
    if not is_integer(value) or value < minimum:
        raise Error(f"{name} is {value!r}: choose a whole number of at least {minimum}")
    return int(value)


def pip_install(extra: str) -> str:
    """The command that installs an extra. (On PyPI, ``tinyllm`` is another project.)"""
    return f"pip install 'tinyllm-numpy[{extra}]'"


def check_fraction(validation_fraction: float) -> None:
    if not 0 < validation_fraction < 1:
        raise Error(f"validation_fraction is {validation_fraction}: choose one between 0 and 1, such as 0.1")


def _first(array: np.ndarray, wrong: np.ndarray, name: str) -> tuple[str, object]:
    """The first wrong value, and where it is."""
    position = tuple(int(i) for i in np.unravel_index(wrong.argmax(), wrong.shape))
    value = array[position]
    where = f"{name}[{', '.join(str(i) for i in position)}]" if position else name
    return where, value.item() if isinstance(value, np.generic) else value


# Far above any model's. Layers and widths take memory even in a model without weights.
MAX_LAYERS, MAX_WIDTH, MAX_SIZE = 2**12, 2**20, 2**31 - 1

FIELD_TYPES = {
    "int": int,
    "int | None": int | None,
    "float": int | float,
    "bool": bool,
    "str": str,
    "dict": Mapping,
}


def check_fields(config, layers: tuple[str, ...], widths: tuple[str, ...]) -> None:
    """Raise Error unless a config's fields have their types, its numbers are finite and its sizes sane.

    A bool does not count as a number, as it does in Python. ``layers`` and ``widths`` name the sizes for
    which building a model takes time and memory, before its weights are looked at.
    """
    limits = dict.fromkeys(layers, MAX_LAYERS) | dict.fromkeys(widths, MAX_WIDTH)
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        truth = isinstance(value, bool)
        if not isinstance(value, FIELD_TYPES[field.type]) or truth != (field.type == "bool"):
            kind = "a whole number of at least 1" if field.type.startswith("int") else f"a {field.type}"
            raise Error(f"{name} must be {kind}, not {value!r}")
        if isinstance(value, int | float) and not abs(value) <= limits.get(name, MAX_SIZE):
            raise Error(f"{name} must be at most {limits.get(name, MAX_SIZE):,}, not {value!r}")


def check_names_and_shapes(expected: dict[str, tuple], found: dict[str, tuple], source: str) -> None:
    """Raise one Error that lists every missing, unexpected and misshaped tensor; else do nothing.

    ``expected`` is what the model has and ``found`` what ``source`` (a folder, say) offers: name to shape.
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
        raise Error(f"{source} does not fit the model: use the config it was made with ({listed})")

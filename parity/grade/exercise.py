"""What an exercise is: functions to write, the inputs they are tried on, the truth, and the usual mistakes.

An exercise file (``examples/exercises/05_layer_norm.py``) has one function for each ``Part``. The truth is
computed by PyTorch. A ``Mistake`` is a wrong formula, written out like the right one: if a learner's function
agrees with it on every input, its hint says what to look at. So a hint never guesses from the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

Inputs = Mapping[str, Any]  # the name of a parameter -> its argument, in order


@dataclass(frozen=True)
class Mistake:
    """A usual mistake: ``wrong(**inputs)`` returns what a function with it returns."""

    name: str
    hint: str
    wrong: Callable[..., Any]


@dataclass(frozen=True)
class Part:
    """One function of an exercise.

    ``inputs`` draws its arguments, small ones first: the smallest that fails is shown. ``truth(**inputs)``
    returns what it should return: an array, a number or a list, or a tuple of these, one per name in
    ``returns``.
    """

    function: str
    returns: tuple[str, ...]
    inputs: st.SearchStrategy[Inputs]
    truth: Callable[..., Any]
    mistakes: tuple[Mistake, ...] = ()


@dataclass(frozen=True)
class Exercise:
    """The parts of one exercise file, named like the file without its number."""

    name: str
    parts: tuple[Part, ...]


COURSE: dict[str, Exercise] = {}  # filled by ``exercise``


def exercise(name: str, *parts: Part) -> None:
    """Add an exercise to the course."""
    COURSE[name] = Exercise(name, parts)


# ---------------------------------------------------------------------------- drawing inputs

MOST = 4  # rows, columns …

# The largest of the multiples of 1/2, which are short to print, in halves; None: normal numbers
LARGEST = st.sampled_from([0, 1, 6, None, None, None])


@st.composite
def arrays(draw, *shape: int):
    """A float64 array of multiples of 1/2, or of normal numbers, whose mistakes no coincidence hides.

    Two choices make all elements, and a smaller array is the corner of a larger one: so when an input fails,
    smaller shapes and simpler numbers are tried on their own.
    """
    full, largest = [max(size, MOST) for size in shape], draw(LARGEST)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    array = rng.standard_normal(full) if largest is None else rng.integers(-largest, largest + 1, full) / 2
    return array[tuple(map(slice, shape))].copy()


def sizes(least: int = 1, most: int = MOST) -> st.SearchStrategy[int]:
    return st.integers(least, most)


# -------------------------------------------------------------------------------- the truth


def gradients(function: Callable[..., Any], grad: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """dL/d(array) for each of ``arrays``, where ``grad`` = dL/d(function(*arrays)), by PyTorch's autograd."""
    import torch

    leaves = [torch.tensor(array, requires_grad=True) for array in arrays]
    function(*leaves).backward(torch.tensor(grad))
    return tuple(leaf.grad.numpy() for leaf in leaves)


def value(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """``function(*arrays)``, computed by PyTorch."""
    import torch

    return function(*(torch.tensor(array) for array in arrays)).numpy()

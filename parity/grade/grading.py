"""Grading: run a learner's functions on drawn inputs and say what is wrong with the smallest that fails."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from parity.grade.exercise import Exercise, Inputs, Part
from tinyllm.errors import Error

RELATIVE, FLOOR = 1e-9, 1e-12  # of the largest element of the truth; absolute

DRAWN = 100  # inputs on which a function is tried

SECONDS = 20  # for one call of a learner's function

DONE, WRONG, OPEN = "done", "wrong", "open"


@dataclass(frozen=True)
class Failure:
    """What is wrong: ``problem`` in words, for ``inputs``."""

    problem: str
    inputs: Inputs | None = None


class Verdict(NamedTuple):
    """The grade of one function."""

    function: str
    status: str  # DONE, WRONG or OPEN
    failure: Failure | None = None
    hint: str | None = None


def grade(exercise: Exercise, path: Path) -> list[Verdict]:
    """The verdict on each function of a learner's file. Raises ``Error`` if the file cannot be run."""
    module = load(path)
    return [_grade_part(part, module, path) for part in exercise.parts]


def load(path: Path):
    """Run a Python file and return it as a module. Raises ``Error`` with the line of a failure."""
    spec = importlib.util.spec_from_file_location(f"graded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        with _time_limit():
            spec.loader.exec_module(module)
    except OSError as error:
        raise Error(f"{path} cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        raise Error(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise Error(f"{path} cannot be run: {_what(error, path)}") from None
    return module


def _grade_part(part: Part, module, path: Path) -> Verdict:
    function = getattr(module, part.function, None)
    if not callable(function):
        problem = f"{path} has no function {part.function}: its name and parameters must stay as they were"
        return Verdict(part.function, WRONG, Failure(problem))
    return grade_function(part, function, path)


def grade_function(part: Part, function: Callable, path: Path | None = None) -> Verdict:
    """The verdict on a function, whose file is ``path``."""
    try:
        failure = _smallest_failure(part, function, path)
    except NotImplementedError:
        return Verdict(part.function, OPEN)
    if failure is None:
        return Verdict(part.function, DONE)
    return Verdict(part.function, WRONG, failure, hint_of(part, function))


def _smallest_failure(part: Part, function: Callable, path: Path | None) -> Failure | None:
    """The failure on the smallest of the drawn inputs that fail, or None. The same in every run."""
    last: list[Failure] = []

    @seed(0)
    @settings(
        max_examples=DRAWN,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(part.inputs)
    def attempt(inputs):
        failure = _try(part, function, inputs, path)
        if failure is not None:
            last[:] = [failure]
            raise AssertionError

    try:
        attempt()
    except AssertionError:
        return last[0]  # Hypothesis ends with the smallest
    return None


def _try(part: Part, function: Callable, inputs: Inputs, path: Path | None) -> Failure | None:
    """What is wrong with ``function(**inputs)``, or None. NotImplementedError passes through."""
    given_to_it = copy.deepcopy(dict(inputs))
    try:
        with _time_limit(), np.errstate(all="ignore"):
            found = function(**given_to_it)
    except NotImplementedError:
        raise
    except Exception as error:
        return Failure(_what(error, path), inputs)
    changed = [name for name in inputs if not _equal(given_to_it[name], inputs[name])]
    if changed:
        return Failure(f"{changed[0]} was changed: compute with a copy of the arguments", inputs)
    problem = compare(found, part.truth(**inputs), part.returns)
    return Failure(problem, inputs) if problem else None


def compare(found, truth, names: tuple[str, ...]) -> str | None:
    """How ``found`` differs from ``truth``, in words; None if it does not."""
    if len(names) == 1:
        found, truth = (found,), (truth,)
    if not isinstance(found, (tuple, list)) or len(found) != len(names):
        return f"returned {_kind(found)} instead of ({', '.join(names)})"
    problems = [_difference(*each) for each in zip(found, truth)]
    if not any(problems):
        return None
    right = [name for name, problem in zip(names, problems) if not problem]
    wrong = [f"{name} {problem}" for name, problem in zip(names, problems) if problem]
    return "; ".join(wrong) + (f" ({', '.join(right)}: right)" if right else "")


def _difference(found, truth) -> str | None:
    if isinstance(truth, list) and truth and isinstance(truth[0], np.ndarray):
        if not isinstance(found, (list, tuple)) or len(found) != len(truth):
            return f"is {_kind(found)} instead of a list of {len(truth)}"
        each = ((i, _difference(*pair)) for i, pair in enumerate(zip(found, truth)))
        return next((f"[{i}] {problem}" for i, problem in each if problem), None)
    if not isinstance(truth, (np.ndarray, float)):
        return None if _equal(found, truth) else f"is {found!r}, but should be {truth!r}"
    if not isinstance(found, (np.ndarray, float, int, np.generic)):
        return f"is {_kind(found)} instead of an array of shape {np.shape(truth)}"
    found = np.asarray(found)
    if found.shape != np.shape(truth):
        return f"has shape {found.shape} instead of {np.shape(truth)}"
    if found.dtype.kind not in "fiu":
        return f"has dtype {found.dtype} instead of float64"
    if _close(found, truth):
        return None
    return f"is {_shown(found)}, but should be {_shown(truth)}: {_error(found, truth)}"


def _close(found, truth) -> bool:
    with np.errstate(invalid="ignore"):
        bound = RELATIVE * np.abs(truth, where=np.isfinite(truth), out=np.zeros(np.shape(truth))).max(
            initial=0
        )
        return bool(((found == truth) | (np.abs(found - truth) <= bound + FLOOR)).all())


def _error(found, truth) -> str:
    if not np.isfinite(found).all() and np.isfinite(truth).all():
        return "not all elements are finite"
    with np.errstate(invalid="ignore"):
        return f"off by up to {np.nanmax(np.abs(found - truth)):.3g}"


def _equal(a, b) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b))


# ------------------------------------------------------------------------------------ hints


def hint_of(part: Part, function: Callable) -> str | None:
    """The hint of the mistake that explains what ``function`` returns for every drawn input, or None."""
    inputs = [each for each in _drawn(part) if not _agrees(function, part.truth, part, each)]
    for mistake in part.mistakes:
        if inputs and all(_agrees(function, mistake.wrong, part, each) for each in inputs):
            return mistake.hint
    return None


def _drawn(part: Part, number: int = 40) -> list[Inputs]:
    """Inputs of all sizes, the same in every run."""
    drawn: list[Inputs] = []

    @seed(1)
    @settings(max_examples=number, database=None, deadline=None, phases=(Phase.generate,),
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(part.inputs)
    def collect(inputs):
        drawn.append(inputs)

    collect()
    return drawn


def _agrees(function: Callable, other: Callable, part: Part, inputs: Inputs) -> bool:
    """Whether both functions return the same."""
    with np.errstate(all="ignore"), _time_limit():
        try:
            found = function(**copy.deepcopy(dict(inputs)))
            expected = other(**copy.deepcopy(dict(inputs)))
        except Exception:
            return False
    return compare(found, expected, part.returns) is None


# -------------------------------------------------------------------------------- in words


def _what(error: Exception, path: Path | None) -> str:
    """An exception in words, with the line of the learner's file that raised it."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}: {error}"


def _kind(x) -> str:
    if x is None:
        return "nothing (None)"
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {len(x)}"
    return f"an array of shape {x.shape}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"


def _shown(x) -> str:
    return np.array2string(np.asarray(x), precision=6, separator=", ", threshold=20, suppress_small=True)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer than ``SECONDS``; Windows cannot."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise TimeoutError(f"did not return within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""Grading: run a learner's functions on drawn inputs and say what is wrong with the smallest that fails."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import Flaky

from parity.grade.exercise import Exercise, Inputs, Mistake, Part
from tinyllm.errors import Error

RELATIVE, FLOOR = 1e-9, 1e-12  # of the largest element of the truth; absolute

DRAWN = 100  # inputs on which a function is tried

ENOUGH = 3  # of them must show a mistake by value before its hint is given

SECONDS = 10  # for one call of a learner's function

DONE, WRONG, OPEN = "done", "wrong", "open"


@dataclass(frozen=True)
class Failure:
    """What is wrong: ``problem`` in words, for ``inputs``, and what the function printed."""

    problem: str
    inputs: Inputs | None = None
    printed: str = ""
    slow: bool = False  # stopped after ``SECONDS``


class Verdict(NamedTuple):
    """The grade of one function."""

    function: str
    status: str  # DONE, WRONG or OPEN
    failure: Failure | None = None
    hint: str | None = None


class TooSlow(BaseException):
    """Ends a call after ``SECONDS``, and Hypothesis's search. Not an Exception, which code may catch."""


def grade(exercise: Exercise, path: Path) -> list[Verdict]:
    """The verdict on each function of a learner's file. Raises ``Error`` if the file cannot be run."""
    module = load(path)
    return [_grade_part(part, module, path) for part in exercise.parts]


def load(path: Path, limited: bool = True):
    """Run a Python file and return it as a module. Raises ``Error`` with the line of a failure.

    A ``limited`` file fails after ``SECONDS``.
    """
    spec = importlib.util.spec_from_file_location(f"graded_{path.stem}", path)
    if spec is None:
        raise Error(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        with _time_limit() if limited else contextlib.nullcontext():
            spec.loader.exec_module(module)
    except OSError as error:
        raise Error(f"{path} cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise Error(f"{path}{line}: {error.msg}") from None
    except (Exception, SystemExit, TooSlow) as error:
        raise Error(f"{path} cannot be run: {in_words(error, path)}") from None
    return module


def _grade_part(part: Part, module, path: Path) -> Verdict:
    function = getattr(module, part.function, None)
    if not callable(function):
        problem = f"{path} has no function {part.function}: its name and parameters must stay as they were"
        return Verdict(part.function, WRONG, Failure(problem))
    return grade_function(part, function, path)


def grade_function(part: Part, function: Callable, path: Path | None = None) -> Verdict:
    """The verdict on a function, whose file is ``path``."""
    if problem := _wrong_parameters(part, function):
        return Verdict(part.function, WRONG, Failure(problem))
    try:
        failure = _first_failure(part, function, path)
        if failure is None:
            return Verdict(part.function, DONE)
        if failure.slow:
            return Verdict(part.function, WRONG, failure)
        failure = _smallest_failure(part, function, path) or failure
    except NotImplementedError:
        return Verdict(part.function, OPEN)
    return Verdict(part.function, WRONG, failure, hint_of(part, function))


def _wrong_parameters(part: Part, function: Callable) -> str | None:
    names = _trials(part)[0][0].keys()
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function of NumPy may not tell: the call will
        return None
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError:
        has = ", ".join(signature.parameters)
        return f"{part.function} has the parameters ({has}), but they must be ({', '.join(names)})"
    return None


def _first_failure(part: Part, function: Callable, path: Path | None) -> Failure | None:
    return next(filter(None, (_try(part, function, *trial, path) for trial in _trials(part))), None)


def _smallest_failure(part: Part, function: Callable, path: Path | None) -> Failure | None:
    """The failure on the smallest of the inputs that fail. None if no input fails a second time."""
    last: list[Failure] = []

    @_search(Phase.generate, Phase.shrink)
    @given(part.inputs)
    def attempt(inputs):
        failure = _try(part, function, inputs, part.truth(**inputs), path)
        if failure is not None:
            last[:] = [failure]
            if failure.slow:
                raise TooSlow
            raise AssertionError

    # Hypothesis ends with the smallest, or complains of a function that fails only sometimes
    with contextlib.suppress(AssertionError, Flaky, TooSlow):
        attempt()
    return last[0] if last else None


def _search(*phases: Phase) -> Callable:
    """A decorator: the same inputs in every run, of all sizes, and no word from Hypothesis."""
    quiet = settings(
        max_examples=DRAWN,
        database=None,
        deadline=None,
        phases=phases,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(0)(quiet(test))


@functools.cache
def _trials(part: Part) -> list[tuple[Inputs, object]]:
    """The inputs on which a function is tried, and the truth for each."""
    drawn: list[Inputs] = []

    @_search(Phase.generate)
    @given(part.inputs)
    def collect(inputs):
        drawn.append(inputs)

    collect()
    return [(inputs, part.truth(**copy.deepcopy(dict(inputs)))) for inputs in drawn]


def _try(part: Part, function: Callable, inputs: Inputs, truth, path: Path | None) -> Failure | None:
    """What is wrong with ``function(**inputs)``, or None. NotImplementedError passes through."""
    given_to_it, printed = copy.deepcopy(dict(inputs)), io.StringIO()
    try:
        with _time_limit(), np.errstate(all="ignore"), contextlib.redirect_stdout(printed):
            found = function(**given_to_it)
    except NotImplementedError:
        raise
    except (Exception, SystemExit, TooSlow) as error:
        slow = isinstance(error, TooSlow)
        return Failure(in_words(error, path), inputs, printed.getvalue(), slow)
    changed = [name for name in inputs if not _equal(given_to_it[name], inputs[name])]
    if changed:
        problem = f"{changed[0]} was changed: compute with a copy of the arguments"
    else:
        problem = compare(found, truth, part.returns)
    return Failure(problem, inputs, printed.getvalue()) if problem else None


def compare(found, truth, names: tuple[str, ...]) -> str | None:
    """How ``found`` differs from ``truth``, in words; None if it does not."""
    if found is None and truth is not None:
        return f"returned nothing (None): end with return {', '.join(names)}"
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
        return f"is {_kind(found)} instead of {_kind(truth)}"
    found = np.asarray(found)
    if found.shape != np.shape(truth):
        return f"has shape {found.shape} instead of {np.shape(truth)}"
    if found.dtype.kind not in "iu" and found.dtype != np.float64:
        return f"has dtype {found.dtype} instead of float64"
    if _close(found, truth):
        return None
    return f"is {_shown(found)}, but should be {_shown(truth)}: {_error(found, truth)}"


def _close(found, truth) -> bool:
    with np.errstate(invalid="ignore"):
        sizes = np.abs(truth, where=np.isfinite(truth), out=np.zeros(np.shape(truth)))
        bound = RELATIVE * sizes.max(initial=0) + FLOOR
        return bool(((found == truth) | (np.abs(found - truth) <= bound)).all())


def _error(found, truth) -> str:
    if not np.isfinite(found).all() and np.isfinite(truth).all():
        return "not all elements are finite"
    with np.errstate(invalid="ignore"):
        return f"off by up to {np.nanmax(np.abs(found - truth), initial=0):.3g}"


def _equal(a, b) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b))


# ------------------------------------------------------------------------------------ hints


def hint_of(part: Part, function: Callable) -> str | None:
    """The hint of the mistake that explains what ``function`` returns for every drawn input, or None."""
    trials = _trials(part)
    try:
        with _time_limit():
            found = [_outcome(function, inputs) for inputs, _ in trials]
    except TooSlow:
        return None
    wrong = [not _same(mine, truth, part) for mine, (_, truth) in zip(found, trials)]
    for mistake in part.mistakes:
        if _explains(_outcomes(part, mistake), found, wrong, part):
            return mistake.hint
    return None


def _explains(expected: list, found: list, wrong: list[bool], part: Part) -> bool:
    """Whether a mistake, whose outcomes are ``expected``, explains all that a function returned.

    Where the mistake raises or gives another shape, it says nothing of the function: a loop may end early
    where a product of matrices raises. Where it gives nan, the function must be wrong, but how depends on the
    way it is written: ``math.exp`` raises where NumPy gives inf. So some results must be equally wrong.
    """
    equal = 0
    for (_, truth), other, mine, is_wrong in zip(_trials(part), expected, found, wrong):
        if _same(mine, other, part):
            equal += is_wrong
        elif _has_shapes_of(other, truth):
            if _finite(other) or not is_wrong:
                return False
            equal += 1
    return any(wrong) and equal >= min(sum(wrong), ENOUGH)


@functools.cache
def _outcomes(part: Part, mistake: Mistake) -> list:
    return [_outcome(mistake.wrong, inputs) for inputs, _ in _trials(part)]


RAISED = object()


def _outcome(function: Callable, inputs: Inputs):
    """What ``function(**inputs)`` returns, or RAISED."""
    try:
        with np.errstate(all="ignore"), contextlib.redirect_stdout(io.StringIO()):
            return function(**copy.deepcopy(dict(inputs)))
    except (Exception, SystemExit):
        return RAISED


def _same(found, expected, part: Part) -> bool:
    if found is RAISED or expected is RAISED:
        return False
    return compare(found, expected, part.returns) is None


def _has_shapes_of(outcome, truth) -> bool:
    shapes = [[np.shape(array) for array in _arrays(each)] for each in (outcome, truth)]
    return outcome is not RAISED and shapes[0] == shapes[1]


def _finite(outcome) -> bool:
    return all(np.isfinite(array).all() for array in _arrays(outcome))


def _arrays(outcome) -> list:
    if isinstance(outcome, (tuple, list)):
        return [array for each in outcome for array in _arrays(each)]
    return [outcome] if isinstance(outcome, (np.ndarray, float)) else []


# -------------------------------------------------------------------------------- in words


def in_words(error: BaseException, path: Path | None) -> str:
    """An exception in words, with the line of the learner's file that raised it."""
    frames = traceback.extract_tb(error.__traceback__) if path else ()
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
    where = f" in line {lines[-1]}" if lines else ""
    if isinstance(error, TooSlow):
        return f"stopped{where} after {SECONDS} seconds: does a loop never end?"
    if isinstance(error, SystemExit):
        return f"the program is ended{where}: leave exit() out"
    missing = ": is an import missing?" if isinstance(error, NameError) else ""
    return f"{type(error).__name__}{where}: {error}{missing}"


def _kind(x) -> str:
    if x is None:
        return "nothing (None)"
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {len(x)}"
    if isinstance(x, np.ndarray):
        return f"an array of shape {x.shape}"
    return "a number" if isinstance(x, float) else f"a {type(x).__name__}"


def _shown(x) -> str:
    return np.array2string(np.asarray(x), precision=6, separator=", ", threshold=20, suppress_small=True)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TooSlow in a block that takes longer than ``SECONDS``; Windows cannot."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.2)  # again and again, if it is caught
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

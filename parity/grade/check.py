"""A learner's own op, layer or model against a reference: ``python -m parity check my_model.py``.

The file defines ``implementation``, ``reference`` and ``inputs``. The first two are both functions, of NumPy
arrays, tinyllm Tensors or torch tensors, or both modules, of tinyllm or torch. ``inputs(rng)`` returns the
arguments of one call, NumPy arrays that depend on the generator: those of floating-point numbers get a
gradient. A function of NumPy arrays has none of its own; ``implementation_gradient(grad, *inputs)`` may
compute it, one array for each argument that has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from parity import tables
from parity.compare import compare
from parity.compare.capture import upstream
from parity.grade.grading import in_words, load
from parity.ops.cases import FLOOR, RELATIVE
from tinyllm import nn
from tinyllm.errors import Error
from tinyllm.tensor import Tensor

NEEDED = "implementation", "reference", "inputs"

TRIALS = 20


@dataclass
class Line:
    """The largest difference found in one result, and the inputs that gave it."""

    name: str
    error: float = 0.0  # divided by the bound
    relative: float = 0.0
    seed: int = 0
    shapes: tuple = ()


def check(path: Path) -> int:
    """Compare the two sides of a file and print the result; return 0 if they agree, else 1."""
    file = load(path, limited=False)  # it may load a model
    if missing := [name for name in NEEDED if not hasattr(file, name)]:
        raise Error(f"{path} does not define {' and '.join(missing)}: see python -m parity check --help")
    sides = file.implementation, file.reference
    modules = [isinstance(side, (nn.Module, torch.nn.Module)) for side in sides]
    if all(modules):
        return _check_modules(*sides, _drawn(file, path, 0), path)
    if any(modules) or not all(map(callable, sides)):
        raise Error(f"{path}: implementation and reference must be two functions or two modules")
    return _check_functions(file, path)


def _drawn(file, path: Path, seed: int) -> tuple[np.ndarray, ...]:
    drawn = _called(file.inputs, path, "inputs(rng)", np.random.default_rng(seed))
    drawn = drawn if isinstance(drawn, tuple) else (drawn,)
    if not all(isinstance(x, np.ndarray) for x in drawn):
        kinds = ", ".join(type(x).__name__ for x in drawn)
        raise Error(f"{path}: inputs(rng) must return NumPy arrays, not {kinds}")
    return tuple(x.astype(np.float64) if x.dtype.kind == "f" else x for x in drawn)


def _called(function: Callable, path: Path, name: str, *arguments):
    try:
        with np.errstate(all="ignore"):
            return function(*arguments)
    except Error:
        raise
    except Exception as error:
        raise Error(f"{path}: {name} fails: {in_words(error, path)}") from None


# ---------------------------------------------------------------------------------- modules


def _check_modules(ours, theirs, inputs: tuple, path: Path) -> int:
    _copy_parameters(ours, theirs)
    comparison = _called(compare, path, "the comparison", ours, theirs, inputs)
    print(comparison)
    return 0 if comparison.first is None else 1


def _copy_parameters(ours, theirs) -> None:
    """Give our module their weights, in float64, if the names are the same; otherwise they must be equal."""
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for module in (ours, theirs):
        module.astype(np.float64) if isinstance(module, nn.Module) else module.double()
    if mine.keys() != other.keys():
        alone = mine.keys() - other.keys(), other.keys() - mine.keys()
        names = (", ".join(sorted(each)) or "none" for each in alone)
        print(
            "No weights are copied, because the parameters have different names: only implementation has "
            "{}; only reference has {}. Rename them, or give both the same weights.\n".format(*names)
        )
        return
    for name, parameter in other.items():
        target = mine[name]
        array = np.array(parameter.data if isinstance(parameter, Tensor) else parameter.detach().numpy())
        if tuple(target.shape) != array.shape:
            raise Error(f"{name} has shape {tuple(target.shape)}, but {array.shape} in the reference")
        target.data = array if isinstance(target, Tensor) else torch.tensor(array)


# --------------------------------------------------------------------------------- functions


def _check_functions(file, path: Path) -> int:
    first = _drawn(file, path, 0)
    sides = {name: _runner(getattr(file, name), name, first, path) for name in NEEDED[:2]}
    by_hand = getattr(file, "implementation_gradient", None)
    lines: dict[str, Line] = {}
    without = None
    for seed in range(TRIALS):
        inputs = _drawn(file, path, seed)
        results = {}
        for name, run in sides.items():
            results[name] = _called(run, path, f"{name} for inputs(rng of seed {seed})", inputs, seed)
        (ours, gradients), (theirs, their_gradients) = (results[name] for name in NEEDED[:2])
        if by_hand is not None:
            arguments = upstream(theirs.shape, seed), *(x.copy() for x in inputs)
            gradients = _called(by_hand, path, "implementation_gradient", *arguments)
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        names = ["output", *(f"gradient of input {i}" for i, x in enumerate(inputs) if x.dtype.kind == "f")]
        if gradients is None or their_gradients is None:
            without = "implementation" if gradients is None else "reference"
            names, gradients, their_gradients = names[:1], (), ()
        if len(gradients) != len(names) - 1:
            raise Error(
                f"{path}: implementation_gradient returned {len(gradients)} arrays, not {len(names) - 1}"
            )
        for name, mine, other in zip(names, (ours, *gradients), (theirs, *their_gradients)):
            _note(lines.setdefault(name, Line(name)), mine, other, seed, inputs)
    code = _print(lines.values())
    if without and any(x.dtype.kind == "f" for x in first):
        print(f"\nNo gradient is compared: {without} returns an array without one. See --help.")
    return code


def _note(line: Line, mine, other, seed: int, inputs: Sequence[np.ndarray]) -> None:
    """Keep the largest difference; a wrong shape and nan are infinitely large."""
    mine, scale = np.asarray(mine), np.abs(other).max(initial=0)
    difference = np.abs(mine - other).max(initial=0) if mine.shape == other.shape else np.inf
    error = difference / (RELATIVE * scale + FLOOR)
    error = np.inf if np.isnan(error) else error
    if not line.shapes or error > line.error:
        shapes = tuple(x.shape for x in inputs)
        line.error, line.relative = float(error), float(difference / scale if scale else difference)
        line.seed, line.shapes = seed, (mine.shape, other.shape, *shapes)


def _print(lines) -> int:
    rows = []
    for line in lines:
        mine, other, *shapes = line.shapes
        shape = "" if mine == other else f"shape {mine} instead of {other}; "
        relative = "" if shape else f"{line.relative:.1e}"
        verdict = "agrees" if line.error <= 1 else "DIFFERS"
        place = f"{shape}inputs(rng of seed {line.seed}) of {', '.join(map(str, shapes))}"
        rows.append((line.name, verdict, relative, place if line.error > 1 else ""))
    print(tables.markdown(("", "", "largest error / largest element", "where"), rows))
    return 1 if any(line.error > 1 for line in lines) else 0


def _runner(function: Callable, name: str, inputs: tuple, path: Path) -> Callable:
    """How to call a function: with Tensors, torch tensors or arrays, whichever it returns its own kind of."""
    problems: dict[str, list[str]] = {}
    for library, run in {"tinyllm": _run_tinyllm, "PyTorch": _run_torch, "NumPy": _run_numpy}.items():
        try:
            with np.errstate(all="ignore"):
                run(function, inputs, 0)
        except Exception as error:
            problems.setdefault(in_words(error, path), []).append(library)
        else:
            return lambda inputs, seed: run(function, inputs, seed)
    reasons = "; ".join(f"{problem} (of {', '.join(of)})" for problem, of in problems.items())
    raise Error(f"{path}: {name} must return one array from arrays, of tinyllm, PyTorch or NumPy. {reasons}")


def _run_tinyllm(function: Callable, inputs: tuple, seed: int):
    given = [Tensor(x.copy(), requires_grad=True) if x.dtype.kind == "f" else x for x in inputs]
    out = function(*given)
    if not isinstance(out, Tensor):
        raise TypeError(f"it returned a {type(out).__name__}")
    if out.node is None:
        return out.data, None
    out.backward(upstream(out.shape, seed))
    leaves = [x for x in given if isinstance(x, Tensor)]
    return out.data, [np.zeros(x.shape) if x.grad is None else x.grad for x in leaves]


def _run_torch(function: Callable, inputs: tuple, seed: int):
    given = [torch.tensor(x, requires_grad=x.dtype.kind == "f") for x in inputs]
    out = function(*given)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"it returned a {type(out).__name__}")
    if not out.requires_grad:
        return out.numpy(), None
    out.backward(torch.tensor(upstream(tuple(out.shape), seed)))
    leaves = [x for x in given if x.requires_grad]
    return out.detach().numpy(), [np.zeros(x.shape) if x.grad is None else x.grad.numpy() for x in leaves]


def _run_numpy(function: Callable, inputs: tuple, seed: int):
    out = function(*(x.copy() for x in inputs))
    if not isinstance(out, (np.ndarray, np.generic, float, int)):
        raise TypeError(f"it returned a {type(out).__name__}")
    return np.asarray(out), None

"""Comparison of two models, layer by layer: which is the first to differ, forward or backward?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from parity.compare.capture import OUTPUT, Call, Capture, capture
from parity.compare.match import match
from tinyllm.errors import Error

FLOAT64 = 1e-10  # correct float64 computations agree far better; an error in the 9th digit exceeds it

FLOAT32_ROUNDING = 2.0**-24

FLOOR = 1e-3  # of the largest element at the end of the pass: errors are not relative to less

OUTPUTS, GRADIENTS, PARAMETERS = "output", "gradient of the output", "gradient"

BOUNDS = """\
Relative error: the largest absolute difference divided by the largest element of the reference, or by a \
thousandth of the largest element at the end of the pass (logits forward, their gradient backward) if that \
is larger.
Bound in float64: 1e-10.
Bound in float32: 8 u sqrt(n), where u = 2^-24 and n is the number of terms summed so far, layer after layer \
(each layer adds its longest axis, once forward and once backward). n independent roundings accumulate to \
about u sqrt(n) (Higham and Mary 2019); the factor 8 is 2 sides times 4 standard deviations."""


@dataclass(frozen=True)
class Row:
    """The comparison of one of our arrays with its counterpart."""

    kind: str  # OUTPUTS; or backward GRADIENTS (dL/d(output)) or PARAMETERS (dL/d(parameter))
    name: str  # of our module or parameter
    their_name: str
    shape: tuple[int, ...]
    absolute: float  # largest difference of two elements
    relative: float  # relative error as defined in ``BOUNDS``
    bound: float  # largest allowed ``relative``

    @property
    def agrees(self) -> bool:
        return self.relative <= self.bound  # False for nan

    def __str__(self) -> str:
        return f"{self.kind} of {self.name}"


@dataclass
class Comparison:
    """The result of ``compare``: ``rows`` in the order of computation, forward and then backward."""

    rows: list[Row] = field(default_factory=list)
    only_ours: list[str] = field(default_factory=list)  # names that ran or have a gradient on one side only
    only_theirs: list[str] = field(default_factory=list)

    @property
    def first(self) -> Row | None:
        """The first row that exceeds its bound, or None."""
        return next((row for row in self.rows if not row.agrees), None)

    @property
    def worst(self) -> Row:
        """The row with the largest error relative to its bound."""
        return max(self.rows, key=lambda r: math.inf if math.isnan(r.relative) else r.relative / r.bound)

    def verdict(self) -> str:
        """One sentence: all rows agree, or the first that differs."""
        first = self.first
        if first is None:
            return (
                f"All {len(self.rows)} rows agree. The closest to its bound is the {self.worst} "
                f"(error {self.worst.relative:.1e}, bound {self.worst.bound:.1e})."
            )
        place = self.rows.index(first)
        last = f"The last to agree is the {self.rows[place - 1]}." if place else "It is the first row."
        return (
            f"First diverging layer: {first.name} ({first}, error {first.relative:.1e}, "
            f"bound {first.bound:.1e}). {last}"
        )

    def __str__(self) -> str:
        """The table, the names that exist on one side only, and the verdict."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'layer':<{width}}  {'':22}  {'shape':<18}  {'max abs':>8}  {'relative':>8}  {'bound':>8}"]
        for r in self.rows:
            lines.append(
                f"{r.name:<{width}}  {r.kind:<22}  {r.shape!s:<18}  {r.absolute:8.1e}  {r.relative:8.1e}  "
                f"{r.bound:8.1e}  {'agrees' if r.agrees else 'DIFFERS'}"
            )
        for side, names in {"ours": self.only_ours, "theirs": self.only_theirs}.items():
            if names:
                lines.append(f"Only in {side} and not compared: {', '.join(names)}.")
        return "\n".join([*lines, self.verdict()])


def compare(
    ours,
    theirs,
    inputs,
    names: Mapping[str, str | None] | None = None,
    *,
    bound: float | None = None,
    calls: tuple[Call | None, Call | None] = (None, None),
    seed: int = 0,
) -> Comparison:
    """Run two models on the same inputs and compare every layer's output and every gradient.

    ``ours`` and ``theirs`` are tinyllm or torch modules in any combination, in float32 or float64 (float64
    distinguishes a bug from rounding). They must already have the same weights: nothing is copied from one to
    the other, and both are restored. ``inputs`` is an array or a tuple of arrays.

    ``names`` maps our modules or parameters to theirs, or to None if there is no counterpart. Without it they
    are paired by name, or by the shapes of their parameters in the order in which they run. ``bound`` is the
    largest relative error (default: ``BOUNDS``). ``calls`` are the ``call`` arguments of ``capture`` for each
    side, for a model whose first returned tensor is not the one to differentiate. ``seed`` determines the
    upstream gradient.

    Both run in eval mode. Raises Error if ``names`` misses layers, if no layers can be paired, and if shapes
    differ (all are listed).
    """
    runs = capture(ours, inputs, calls[0], seed), capture(theirs, inputs, calls[1], seed)
    return compare_captures(*runs, names, bound=bound)


def compare_captures(
    ours: Capture, theirs: Capture, names: Mapping[str, str | None] | None = None, *, bound=None
) -> Comparison:
    """``compare`` for two runs that have already been captured."""
    modules, parameters = match(ours, theirs, names)
    outputs = _labels(ours.outputs, theirs.outputs, modules) | {OUTPUT: OUTPUT}
    gradients = _labels(ours.gradients, theirs.gradients, modules)
    _check_shapes(ours, theirs, outputs, parameters)
    bounds = _Bounds(ours, theirs, bound)
    result = Comparison()

    def add(kind: str, name: str, their_name: str, mine, other, scale: float) -> None:
        absolute, relative = difference(mine, other, scale)
        shape = () if mine is None else mine.shape
        result.rows.append(Row(kind, name, their_name, shape, absolute, relative, bounds.at(name)))

    scale = _largest(theirs.outputs[OUTPUT])
    for name, other in sorted(outputs.items(), key=lambda pair: list(ours.outputs).index(pair[0])):
        add(OUTPUTS, name, other, ours.outputs[name], theirs.outputs[other], scale)

    scale = _largest(next(iter(theirs.gradients.values()), np.zeros(())))
    waiting = dict(parameters)
    for name in ours.gradients:
        if name in gradients:
            other = gradients[name]
            add(GRADIENTS, name, other, ours.gradients[name], theirs.gradients[other], scale)
        for parameter in ours.layers.get(name, {}).values():  # complete now, unless it is tied
            if parameter in waiting and parameter.rpartition(".")[0] == name:
                other = waiting.pop(parameter)
                add(PARAMETERS, parameter, other, ours.parameters[parameter], theirs.parameters[other], scale)
    for parameter, other in waiting.items():
        add(PARAMETERS, parameter, other, ours.parameters[parameter], theirs.parameters[other], scale)
    for name in (name for name in ours.inputs if name in theirs.inputs):
        add(PARAMETERS, name, name, ours.inputs[name], theirs.inputs[name], scale)

    result.only_ours = _unpaired(ours, outputs.keys(), gradients.keys(), parameters.keys())
    result.only_theirs = _unpaired(theirs, outputs.values(), gradients.values(), parameters.values())
    return result


def difference(mine, other, scale: float) -> tuple[float, float]:
    """(largest absolute difference, relative error) with ``other`` as the reference; see ``BOUNDS``."""
    if mine is None and other is None:  # neither has a gradient
        return 0.0, 0.0
    if mine is None or other is None:
        return math.inf, math.inf
    other = other.reshape(mine.shape)
    if np.array_equal(mine, other):
        return 0.0, 0.0
    if not (np.isfinite(mine).all() and np.isfinite(other).all()):
        return math.nan, math.nan
    absolute = _largest(mine.astype(np.float64) - other)
    reference = max(_largest(other), FLOOR * scale)
    return absolute, absolute / reference if reference else math.inf


def _largest(array) -> float:
    return float(np.abs(array).max(initial=0))


class _Bounds:
    """The bound of each row; ``at`` must be called in the order of computation."""

    def __init__(self, ours: Capture, theirs: Capture, bound: float | None):
        self.ours, self.terms, self.bound = ours, 0, bound
        results = {ours.outputs[OUTPUT].dtype, theirs.outputs[OUTPUT].dtype}
        if bound is None and results == {np.dtype(np.float64)}:
            self.bound = FLOAT64

    def at(self, name: str) -> float:
        own = self.ours.layers.get(name.partition(" #")[0], {}).values()
        self.terms += max((max(self.ours.shapes[p], default=1) for p in own), default=1)
        return self.bound if self.bound is not None else 8 * FLOAT32_ROUNDING * math.sqrt(self.terms)


def _labels(ours: dict, theirs: dict, modules: dict[str, str]) -> dict[str, str]:
    """Our label -> theirs: the k-th call of a module is paired with the k-th call of its counterpart."""
    pairs = {}
    for label in ours:
        name, mark, call = label.partition(" #")
        other = f"{modules[name]}{mark}{call}" if name in modules else None
        if other in theirs:
            pairs[label] = other
    return pairs


def _check_shapes(ours: Capture, theirs: Capture, outputs: dict, parameters: dict) -> None:
    """Check all shapes; (B, T, C), (1, B, T, C) and (B·T, C) count as equal outputs."""

    def rows(shape):
        return math.prod(shape), shape[-1:] if math.prod(shape) > 1 else ()

    pairs = [(name, ours.shapes[name], theirs.shapes[other]) for name, other in parameters.items()]
    problems = [f"{name} is {a}, not {b}" for name, a, b in pairs if a != b]
    pairs = [(name, ours.outputs[name].shape, theirs.outputs[other].shape) for name, other in outputs.items()]
    problems += [f"the output of {name} is {a}, not {b}" for name, a, b in pairs if rows(a) != rows(b)]
    if problems:
        raise Error(f"{len(problems)} shapes differ between the two models: {'; '.join(problems)}")


def _unpaired(run: Capture, outputs, gradients, parameters) -> list[str]:
    """The names that ran or received a gradient and were not compared."""
    modules = [name for name in run.outputs if name not in outputs]
    lone = [
        f"{name} (its gradient)" for name in run.gradients if name in set(outputs) and name not in gradients
    ]
    return modules + lone + [f"{name} (parameter)" for name in run.parameters if name not in parameters]

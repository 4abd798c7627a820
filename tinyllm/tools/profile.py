"""Where the time of a training step goes.

The model's own steps are run and watched, op by op: how long each takes forward and backward, how much of
that is matrix products, what it keeps for the backward pass, and what memory it needs meanwhile.
Products are what a BLAS does as fast as the machine can; the rest is what an implementation adds.

The engine tells of every op and of every backward pass that ends (``watching``); the call stack says where in
the model an op is. A watched step computes the same numbers to the last bit.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from tinyllm.backend.threads import in_task, num_threads
from tinyllm.errors import Error
from tinyllm.nn import Module
from tinyllm.tensor import mode

MOST_ROWS = 30  # in the table; the smallest are one row together


@dataclass(eq=False)
class Row:
    """What an op at one place of the model takes in one step, alike layers (``h.*``) taken together."""

    place: str  # the module's name; for the last rows, the part of the step
    op: str  # the function's name; "" for a part of the step without ops
    calls: int = 0
    forward: float = 0.0  # seconds
    backward: float = 0.0  # seconds, with the adding up of the gradients it gave
    other: float = 0.0  # seconds of a part of the step outside all ops
    products: float = 0.0  # seconds of these inside matrix products
    keeps: int = 0  # bytes that its gradient holds, and no earlier op's, until it has run backward
    needs: int = 0  # bytes: the most that one call allocates, its result with it, forward or backward
    faults: float = 0.0  # pages of memory that the system had to hand out; nan where it does not say

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.other


class Profile(NamedTuple):
    """A step, taken apart: the rows' seconds add up to ``seconds``. ``print`` shows it as a table."""

    rows: list[Row]  # the longest first
    seconds: float  # of one step, the mean of all that were timed
    products: float  # seconds of these inside matrix products
    peak: int  # bytes: the most allocated at one time, beyond what was there before the step
    steps: int  # that were timed
    threads: int

    def __str__(self) -> str:
        return "\n".join(_page(self))


def profile(
    model: Module, step: Mapping[str, Callable[[], object]], warmup: int = 2, steps: int = 3
) -> Profile:
    """Where the time and the memory of a step of ``model`` go.

    ``step`` names the parts of one training step, in order, such as ``{"gradients": …, "clip_grad_norm": …,
    "AdamW": optimizer.step, "zero_grad": optimizer.zero_grad}``. It runs ``warmup`` times unwatched,
    ``steps`` times against the clock, once to follow the memory and once to see which share of every row is
    matrix products. These are real steps: they change the weights, and the optimiser counts them.

    Time belongs to the op that ends it: what Python does between two ops counts for the later one. What
    belongs to no op has a row by the part's name. Products that run on several threads count by their
    share of the threads. Only this thread's ops are seen. Raises Error for a model on a GPU, where work goes
    on after a call has returned, or if no step is to be run.
    """
    if warmup < 1 or steps < 1:
        raise Error(f"a profile needs at least 1 step to warm up and 1 to time, not {warmup} and {steps}")
    if not all(isinstance(parameter.data, np.ndarray) for parameter in model.parameters()):
        raise Error("a profile is of a model on the CPU: move it there with model.to('cpu')")
    for _ in range(warmup):
        for part in step.values():
            part()
    timed = _watched(model, step, steps)
    with _tracing():
        traced = _watched(model, step, 1, bytes_too=True)
    with _timed_products(model):
        multiplied = _watched(model, step, 1)

    for key, row in timed.rows.items():
        _finish(row, traced.row(*key), multiplied.row(*key), steps)
    rows = sorted(timed.rows.values(), key=lambda row: -row.seconds)
    products = sum(row.products for row in rows)
    return Profile(rows, timed.elapsed / steps, products, traced.peak, steps, num_threads())


def _finish(row: Row, traced: Row, multiplied: Row, steps: int) -> None:
    """Sums of all steps become those of one; memory and products come from runs of their own."""
    for name in ("forward", "backward", "other", "faults"):
        setattr(row, name, getattr(row, name) / steps)
    row.calls, row.keeps, row.needs = row.calls // steps, traced.keeps, traced.needs
    # A share of the time that passed in the very same step: the machine may be busier in one than in another.
    row.products = row.seconds * multiplied.products / (multiplied.seconds or 1)


# -------------------------------------------------------------------------------- watching


class _Account:
    """Everything since the last event is put to the account of one row, at every event."""

    def __init__(self, model: Module, bytes_too: bool):
        names = {id(module): re.sub(r"\.\d+\b", ".*", name) for name, module in model.named_modules()}
        self.names = names | {id(model): type(model).__name__}
        self.parameters = {id(_owner(parameter.data)) for parameter in model.parameters()}
        self.bytes_too = bytes_too
        self.rows: dict[tuple[str, str], Row] = {}
        self.kept, self.seen = Counter(), set(self.parameters)  # of this forward pass: row -> bytes; arrays
        self.elapsed = self.peak = 0

    def row(self, place: str, op: str) -> Row:
        return self.rows.setdefault((place, op), Row(place, op))

    def begin(self) -> None:
        """A step begins."""
        self.faults, self.last = _page_faults(), time.perf_counter_ns()
        if self.bytes_too:
            tracemalloc.reset_peak()
            self.held = self.before = tracemalloc.get_traced_memory()[0]

    def begin_part(self, name: str) -> None:
        self.rest = self.row(name, "")
        self.rest.calls += 1
        self.running = self.rest, "other"  # who gets what comes next, unless an op claims it

    def settle(self, row: Row, kind: str) -> None:
        """Time, products, page faults and memory since the last event were this row's."""
        now, faults = time.perf_counter_ns(), _page_faults()
        seconds = (now - self.last) / 1e9
        setattr(row, kind, getattr(row, kind) + seconds)
        row.faults += faults - self.faults
        self.elapsed, self.last, self.faults = self.elapsed + seconds, now, faults
        for beside_others, nanoseconds in _Timed.products:
            row.products += nanoseconds / 1e9 / (num_threads() if beside_others else 1)
        _Timed.products.clear()
        if self.bytes_too:
            held, peak = tracemalloc.get_traced_memory()
            row.needs = max(row.needs, peak - self.held)
            self.peak, self.held = max(self.peak, peak - self.before), held
            tracemalloc.reset_peak()

    def __call__(self, out, parents) -> None:
        """The engine's news: an op has made ``out``, or a backward pass has ended."""
        if out is None:
            self.settle(*self.running)
            self.running = self.rest, "other"
            self.forget_kept()
            return
        op, module = who_called()
        row = self.row(self.names.get(id(module), type(module).__name__) if module else "", op)
        row.calls += 1
        self.settle(row, "forward")
        self.rest.op = "outside its ops"
        if out.node is not None:
            if self.bytes_too:
                self.keep(row, out.node.vjp)
            out.node.vjp = self.timed(out.node.vjp, row)

    def timed(self, vjp, row: Row):
        def timed_vjp(grad):
            self.settle(*self.running)
            self.running = row, "backward"
            return vjp(grad)

        return timed_vjp

    def keep(self, row: Row, vjp) -> None:
        """The arrays that the closure of a gradient holds, if no other's did before."""
        for array in map(_owner, _arrays_in(vjp)):
            if id(array) not in self.seen:
                self.seen.add(id(array))
                self.kept[row] += array.nbytes

    def forget_kept(self) -> None:
        """A forward pass has been run backward; the next micro-batch keeps as much again."""
        for row, size in self.kept.items():
            row.keeps = max(row.keeps, size)
        self.kept, self.seen = Counter(), set(self.parameters)


def _watched(model: Module, step: Mapping, steps: int, bytes_too: bool = False) -> _Account:
    account = _Account(model, bytes_too)
    with watching(account):
        for _ in range(steps):
            account.begin()
            for name, part in step.items():
                account.begin_part(name)
                part()
                account.settle(*account.running)
    return account


@contextlib.contextmanager
def watching(watch):
    """Within this block, in this thread, ``watch(out, parents)`` is called after every op.

    And ``watch(None, ())`` after every backward pass.
    """
    before, mode.watch = mode.watch, watch
    try:
        yield
    finally:
        mode.watch = before


def who_called() -> tuple[str, Module | None]:
    """Of the op that the engine tells of: the function that was called, and the module that called it.

    The function is one of ``tinyllm.functional`` or ``tinyllm.tensor``: gelu, not a helper of it.
    """
    frame = sys._getframe(1)
    while frame.f_code.co_name != "from_op":
        frame = frame.f_back
    frame = frame.f_back
    name = frame.f_code.co_name
    while frame and frame.f_globals["__name__"].startswith(("tinyllm.functional", "tinyllm.tensor")):
        if frame.f_globals["__name__"] != "tinyllm.functional":  # which chooses the device and calls the op
            name = frame.f_code.co_name
        frame = frame.f_back
    while frame and not isinstance(frame.f_locals.get("self"), Module):
        frame = frame.f_back
    return name.strip("_"), frame and frame.f_locals["self"]  # x + y is __add__


def _arrays_in(function) -> Iterator[np.ndarray]:
    """The arrays a closure holds: in its variables, in lists there, and in functions it holds."""
    found, seen = [function], set()
    while found:
        thing = found.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            yield thing
        elif isinstance(thing, (list, tuple)):
            found += thing
        elif hasattr(thing, "__closure__"):
            for cell in thing.__closure__ or ():
                with contextlib.suppress(ValueError):  # a variable that was deleted
                    found.append(cell.cell_contents)


def _owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory a view looks at."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _page_faults() -> float:
    """Of this process so far; nan where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextlib.contextmanager
def _tracing():
    """tracemalloc is on within this block; if it was before, it stays on."""
    before = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        yield
    finally:
        if not before:
            tracemalloc.stop()


class _Timed(np.ndarray):
    """An array that writes down how long every matrix product with it takes; what is made of it does too."""

    # (on all threads at once?, nanoseconds), one list for all arrays
    products: list[tuple[bool, int]] = []  # noqa: RUF012

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        plain = [_plain(x) for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(_plain(x) for x in out)
        start = time.perf_counter_ns()
        result = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc is np.matmul:
            _Timed.products.append((in_task(), time.perf_counter_ns() - start))
        return out[0] if out is not None else _timed(result)

    def __array_function__(self, function, types, args, kwargs):
        return _timed(super().__array_function__(function, types, args, kwargs))


def _plain(x):
    return x.view(np.ndarray) if isinstance(x, _Timed) else x


def _timed(x):
    return x.view(_Timed) if type(x) is np.ndarray else x


@contextlib.contextmanager
def _timed_products(model: Module):
    """Within this block the parameters are ``_Timed`` arrays, in the same memory."""
    parameters = list(model.parameters())
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = _timed(parameter.data)
        yield
    finally:
        for parameter, original in zip(parameters, originals):
            parameter.data = original
            if parameter.grad is not None:
                parameter.grad = _plain(parameter.grad)
        _Timed.products.clear()


# -------------------------------------------------------------------------------- the page

COLUMNS = "ms share forward backward products calls keeps needs faults".split()


def _page(profile: Profile) -> Iterator[str]:
    rest = profile.seconds - profile.products
    yield (
        f"A step takes {_ms(profile.seconds)} ms (mean of {profile.steps}, {profile.threads} "
        f"thread{'s' * (profile.threads > 1)}): matrix products {_ms(profile.products)} ms "
        f"({profile.products / profile.seconds:.0%}), everything else {_ms(rest)} ms"
    )
    yield ""
    shown, hidden = profile.rows, []
    if len(shown) > MOST_ROWS:
        shown, hidden = shown[: MOST_ROWS - 1], shown[MOST_ROWS - 1 :]
    lines = [("place in the model, op", *COLUMNS)]
    lines += [(f"{row.place} {row.op}".strip(), *_cells(row, profile.seconds)) for row in shown]
    if hidden:
        lines.append((f"{len(hidden)} others", *_cells(_total(hidden), profile.seconds)))
    total = replace(_total(profile.rows), needs=profile.peak)
    lines.append(("the whole step", *_cells(total, profile.seconds)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for name, *cells in lines:
        yield "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:]))])
    yield ""
    yield "ms: of a step; of these forward, backward, and (their share measured in a further step) products"
    yield "keeps, needs: MB held from forward to backward; MB allocated at once, beyond what was there before"
    yield "faults: pages of memory that the system had to hand out"


def _cells(row: Row, step: float) -> list[str]:
    times = [_ms(seconds) if seconds else "" for seconds in (row.forward, row.backward, row.products)]
    sizes = [f"{size / 1e6:.1f}" if size else "" for size in (row.keeps, row.needs)]
    faults = "?" if math.isnan(row.faults) else f"{row.faults:,.0f}"
    return [_ms(row.seconds), f"{row.seconds / step:.1%}", *times, str(row.calls), *sizes, faults]


def _total(rows: list[Row]) -> Row:
    """All rows in one; what they need they do not need at the same time, so it is the most of them."""
    added = ("calls", "forward", "backward", "other", "products", "keeps", "faults")
    sums = {name: sum(getattr(row, name) for row in rows) for name in added}
    return Row("", "", **sums, needs=max(row.needs for row in rows))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"

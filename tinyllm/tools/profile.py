"""A profile of a training step: time and memory of every op.

Real steps are run and recorded op by op: the time of the forward and backward passes, the share of matrix
products in it, the memory kept for the backward pass, and the memory allocated meanwhile. A BLAS computes
the products about as fast as the machine can; the rest is overhead of the implementation.

The engine calls a function after every op and after every backward pass (``watching``), and the call stack
shows which module an op belongs to. Profiled steps compute bitwise identical numbers.
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

from tinyllm.backend.recording import owner
from tinyllm.backend.threads import in_task, num_threads
from tinyllm.errors import Error
from tinyllm.nn import Module
from tinyllm.tensor import mode
from tinyllm.training.output import LINE

OPS = "tinyllm.functional", "tinyllm.tensor", "tinyllm.errors"  # modules between an op and its caller

MOST_ROWS = 30  # in the table; the others are summed in one row


@dataclass(eq=False)
class Row:
    """The cost of one op at one place of the model in a step, summed over similar layers (``h.*``)."""

    place: str  # the module's name, or a part of the step such as the optimizer's
    op: str  # the function's name; "" for a part of the step without ops
    calls: int = 0
    forward: float = 0.0  # seconds
    backward: float = 0.0  # seconds, including the accumulation of its gradients
    other: float = 0.0  # seconds of a part of the step outside all ops
    products: float = 0.0  # seconds of these inside matrix products
    keeps: int = 0  # bytes held for its backward pass, and not already held by an earlier op
    needs: int = 0  # peak bytes allocated by one call, forward or backward, including its result
    faults: float = 0.0  # page faults; nan where the system does not count them

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.other


class Profile(NamedTuple):
    """The rows of a step, whose seconds sum to ``seconds``. ``print`` shows them as a table."""

    rows: list[Row]  # sorted by time, the longest first
    seconds: float  # of one step, the mean of the timed ones
    products: float  # seconds of these inside matrix products
    peak: int  # peak bytes allocated, beyond those before the step
    steps: int  # number of timed steps
    threads: int

    def __str__(self) -> str:
        return "\n".join(_table(self))


def profile(
    model: Module, step: Mapping[str, Callable[[], object]], warmup: int = 2, steps: int = 3
) -> Profile:
    """Profile the time and memory of a training step of ``model``.

    ``step`` maps names to the parts of one training step, in order, such as ``{"gradients": …,
    "clip_grad_norm": …, "AdamW": optimizer.step, "zero_grad": optimizer.zero_grad}``. It runs ``warmup``
    times unrecorded, ``steps`` times for the time, once for the memory and once for the share of matrix
    products in every row. These are real steps, which change the weights and the optimizer's state.

    Time between two ops counts for the later one. Time outside all ops has a row with the part's name.
    Products that run on several threads at once count by their share of the threads. Ops of other threads
    are not recorded. Raises Error for a model on a GPU, whose ops run asynchronously, or without a step.
    """
    if warmup < 1 or steps < 1:
        raise Error(f"warmup is {warmup} and steps is {steps}: both must be at least 1")
    if not all(isinstance(parameter.data, np.ndarray) for parameter in model.parameters()):
        raise Error("only a model on the CPU can be profiled: move it with model.to('cpu')")
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
    """Divide the sums by the number of steps, and add memory and products from their own runs."""
    for name in ("forward", "backward", "other", "faults"):
        setattr(row, name, getattr(row, name) / steps)
    row.calls, row.keeps, row.needs = row.calls // steps, traced.keeps, traced.needs
    # As a share of the time in the same step, since the load of the machine may differ between steps.
    row.products = row.seconds * multiplied.products / (multiplied.seconds or 1)


# ------------------------------------------------------------------------------- recording


class _Account:
    """Attributes the time and memory between two events to one row."""

    def __init__(self, model: Module, bytes_too: bool):
        names = {id(module): re.sub(r"\.\d+\b", ".*", name) for name, module in model.named_modules()}
        self.names = names | {id(model): type(model).__name__}
        self.parameters = {id(owner(parameter.data)) for parameter in model.parameters()}
        self.bytes_too = bytes_too
        self.rows: dict[tuple[str, str], Row] = {}
        self.kept, self.seen = Counter(), set(self.parameters)  # in this forward pass: row -> bytes; arrays
        self.elapsed = self.peak = 0

    def row(self, place: str, op: str) -> Row:
        return self.rows.setdefault((place, op), Row(place, op))

    def begin(self) -> None:
        """Start a step."""
        self.faults, self.last = _page_faults(), time.perf_counter_ns()
        if self.bytes_too:
            tracemalloc.reset_peak()
            self.held = self.before = tracemalloc.get_traced_memory()[0]

    def begin_part(self, name: str) -> None:
        self.rest = self.row(name, "")
        self.rest.calls += 1
        self.running = self.rest, "other"  # the row to charge next, unless an op takes over

    def settle(self, row: Row, kind: str) -> None:
        """Charge time, products, page faults and memory since the last event to this row."""
        now, faults = time.perf_counter_ns(), _page_faults()
        seconds = (now - self.last) / 1e9
        setattr(row, kind, getattr(row, kind) + seconds)
        row.faults += faults - self.faults
        self.elapsed, self.last, self.faults = self.elapsed + seconds, now, faults
        for in_pool, nanoseconds in _Timed.products:
            row.products += nanoseconds / 1e9 / (num_threads() if in_pool else 1)
        _Timed.products.clear()
        if self.bytes_too:
            held, peak = tracemalloc.get_traced_memory()
            row.needs = max(row.needs, peak - self.held)
            self.peak, self.held = max(self.peak, peak - self.before), held
            tracemalloc.reset_peak()

    def __call__(self, out, parents) -> None:
        """Called by the engine: an op has returned ``out``, or (None) a backward pass has ended."""
        if out is None:
            self.settle(*self.running)
            self.running = self.rest, "other"
            self.reset_kept()
            return
        op, module = op_and_module()
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
        """Count the arrays in the closure of a gradient that no earlier closure holds."""
        for array in map(owner, _arrays_in(vjp)):
            if id(array) not in self.seen:
                self.seen.add(id(array))
                self.kept[row] += array.nbytes

    def reset_kept(self) -> None:
        """After a backward pass; the next micro-batch keeps its own arrays."""
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
    """Within this block, in this thread, call ``watch(out, parents)`` after every op.

    After every backward pass, ``watch(None, ())`` is called.
    """
    before, mode.watch = mode.watch, watch
    try:
        yield
    finally:
        mode.watch = before


def op_and_module() -> tuple[str, Module | None]:
    """The name of the op for which the engine calls ``watch``, and the module that called the op.

    The op is the function of ``tinyllm.functional`` or ``tinyllm.tensor`` that was called, not its helper.
    """
    frame = sys._getframe(1)
    while frame.f_code.co_name != "from_op":
        frame = frame.f_back
    frame = frame.f_back
    name = frame.f_code.co_name
    while frame and frame.f_globals["__name__"].startswith(OPS):
        if frame.f_globals["__name__"] not in ("tinyllm.functional", "tinyllm.errors"):  # only call it
            name = frame.f_code.co_name
        frame = frame.f_back
    while frame and not isinstance(frame.f_locals.get("self"), Module):
        frame = frame.f_back
    return name.strip("_"), frame and frame.f_locals["self"]  # x + y is __add__


def _arrays_in(function) -> Iterator[np.ndarray]:
    """The arrays in a closure: in its variables, lists and dicts, and in the closures of functions there."""
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
        elif type(thing) is dict:
            found += thing.values()
        elif hasattr(thing, "__closure__"):
            for cell in thing.__closure__ or ():
                with contextlib.suppress(ValueError):  # a deleted variable
                    found.append(cell.cell_contents)


def _page_faults() -> float:
    """The number in this process so far; nan where the system does not count them (Windows)."""
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextlib.contextmanager
def _tracing():
    """Turn tracemalloc on within this block, and leave it on if it was before."""
    before = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        yield
    finally:
        if not before:
            tracemalloc.stop()


class _Timed(np.ndarray):
    """An array that records the time of every product of matrices with it, as do its results."""

    # (in the thread pool?, nanoseconds), one list for all arrays
    products: list[tuple[bool, int]] = []  # noqa: RUF012

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        plain = [_plain(x) for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(_plain(x) for x in out)
        start = time.perf_counter_ns()
        result = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc is np.matmul and min(x.ndim for x in plain) > 1:  # a product with a vector is a sum
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
    """Within this block, make the parameters ``_Timed`` views of their arrays."""
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


# -------------------------------------------------------------------------------- the table

COLUMNS = "ms share fwd bwd gemm calls keeps needs faults".split()


def _table(profile: Profile) -> Iterator[str]:
    rest = profile.seconds - profile.products
    threads = f"{profile.threads} thread{'s' * (profile.threads > 1)}"
    yield f"A training step takes {_ms(profile.seconds)} ms (mean of {profile.steps}, {threads}):"
    yield (
        f"matrix products {_ms(profile.products)} ms ({profile.products / profile.seconds:.0%}), "
        f"everything else {_ms(rest)} ms"
    )
    yield ""
    shown, hidden = profile.rows, []
    if len(shown) > MOST_ROWS:
        shown, hidden = shown[: MOST_ROWS - 1], shown[MOST_ROWS - 1 :]
    rows = [*shown, replace(_total(hidden), place=f"{len(hidden)} others")] if hidden else shown
    rows = [*rows, replace(_total(profile.rows), place="the whole step", needs=profile.peak)]
    lines = [COLUMNS, *(_cells(row, profile.seconds) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    cells = [" ".join(c.rjust(w) for c, w in zip(line, widths)) for line in lines]
    names = ["module and op", *(_name(row, LINE - 1 - len(cells[0])) for row in rows)]
    for name, line in zip(names, cells):
        yield f"{name.ljust(max(map(len, names)))} {line}"
    yield ""
    yield "ms: time in a step, of which forward (fwd), backward (bwd) and matrix products (gemm)"
    yield "keeps: MB held from forward to backward; needs: peak MB that one call allocates"
    yield "faults: page faults, memory pages that the system had to provide"


def _name(row: Row, width: int) -> str:
    op = row.op.removeprefix("scaled_dot_product_")
    left = width - len(op) - 1
    place = row.place if len(row.place) <= left else f"{row.place[: left - 1]}…"
    return f"{place} {op}".strip()


def _cells(row: Row, step: float) -> list[str]:
    times = [_ms(seconds) if seconds else "" for seconds in (row.forward, row.backward, row.products)]
    sizes = [_short(size / 1e6) if size else "" for size in (row.keeps, row.needs)]
    faults = "?" if math.isnan(row.faults) else f"{row.faults:,.0f}"
    return [_ms(row.seconds), f"{row.seconds / step:.1%}", *times, str(row.calls), *sizes, faults]


def _total(rows: list[Row]) -> Row:
    """The sum of the rows, and the maximum of what they need, which is not needed at the same time."""
    added = ("calls", "forward", "backward", "other", "products", "keeps", "faults")
    sums = {name: sum(getattr(row, name) for row in rows) for name in added}
    return Row("", "", **sums, needs=max(row.needs for row in rows))


def _ms(seconds: float) -> str:
    return _short(1000 * seconds)


def _short(number: float) -> str:
    return f"{number:,.{0 if number >= 99.95 else 1}f}"

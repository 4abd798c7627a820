"""What is proven, and how closely? Two tables from a run of the tests: worst errors, and planted faults.

A pytest plugin listens to every comparison of the tests that are marked ``proof(subject, …)``, and collects
what the tests marked ``fault`` record of themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from parity.ops import cases
from tinyllm.errors import Error

NOTE = (
    "Float64. An error is the largest difference of two elements, divided by the reference's largest "
    "element; where that is small, a hundredth of the scale of what went in is added to it."
)


@dataclass
class Worst:
    """The comparisons of one test: how many, their bound, and the largest relative errors."""

    bound: float
    comparisons: int = 0
    value: float | None = None  # of outputs, losses, norms and weights; None: none was compared
    gradient: float | None = None


@dataclass
class Recorder:
    """The plugin, and what it has seen."""

    worst: dict[str, Worst] = field(default_factory=dict)  # subject or test -> its errors
    faults: list[dict[str, str]] = field(default_factory=list)  # column -> cell

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        if item.get_closest_marker("proof"):
            cases.witness = partial(self.note, label(item))
        try:
            return (yield)
        finally:
            cases.witness = None

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.user_properties:
            self.faults.append(dict(report.user_properties))

    def note(self, name: str, what: str, error: float, bound: float, relative: float) -> None:
        seen = self.worst.setdefault(name, Worst(relative))
        seen.comparisons += 1
        error = error / bound * relative if error else 0.0
        if "gradient of" in what:
            seen.gradient = max(seen.gradient or 0.0, error)
        else:
            seen.value = max(seen.value or 0.0, error)

    def markdown(self) -> str:
        """Both tables."""
        head = "what", "comparisons", "bound", "worst value", "worst gradient"
        rows = [
            (f"`{name}`", f"{w.comparisons:,}", f"{w.bound:.0e}", number(w.value), number(w.gradient))
            for name, w in self.worst.items()
        ]
        columns = "fault", "caught by", "located at"
        faults = [tuple(fault[column] for column in columns) for fault in self.faults]
        return f"{table(head, rows)}\n\n{NOTE}\n\n{table(columns, faults)}"


def label(item) -> str:
    """The op or layer that a test proves, if that is one of its parameters; else the test's own name."""
    (subject, *_) = item.get_closest_marker("proof").args
    if hasattr(item, "callspec") and subject in item.callspec.params.values():
        return subject
    return item.name.removeprefix("test_").replace("_are_torchs", "").replace("_", " ")


def number(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}" if error else "0"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def run(tests: Path) -> int:
    """Run the proof and the planted faults in ``tests``, print the tables; 1 if a test failed."""
    recorder = Recorder()
    options = ["-q", "-m", "proof or fault", "-p", "no:cacheprovider"]
    code = pytest.main([str(tests), *options], plugins=[recorder])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise Error(f"--tests {tests} holds no tests of ours: give the tests folder of a checkout")
    print(recorder.markdown())
    return int(code != 0)

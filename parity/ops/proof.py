"""Two tables from one run of the tests: the worst errors against PyTorch, and the planted faults.

A pytest plugin records every comparison of the tests that are marked ``proof(subject, …)``, and the
properties that tests marked ``fault`` record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from parity import tables
from parity.bench.process import machine
from parity.ops import cases
from tinyllm.errors import Error

NOTE = (
    "Everything is computed in float64. An error is the largest absolute difference of two elements, divided "
    "by the largest element of the reference; where that is small, a hundredth of the scale of the inputs is "
    "added to the divisor."
)

WORST = "what", "comparisons", "bound", "worst value", "worst gradient"

FAULTS = "fault", "caught by", "located at"


@dataclass
class Worst:
    """The comparisons of one subject: how many, their bound, and the largest relative errors."""

    bound: float
    comparisons: int = 0
    value: float | None = None  # of outputs, losses, norms, weights; None if none was compared
    gradient: float | None = None


@dataclass(eq=False)  # pytest hashes its plugins
class Recorder:
    """The pytest plugin and its records."""

    worst: dict[str, Worst] = field(default_factory=dict)  # subject or test name -> its errors
    faults: list[dict[str, str]] = field(default_factory=list)  # for every fault: column -> cell
    interrupted: bool = False

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

    def pytest_keyboard_interrupt(self, excinfo):
        self.interrupted = excinfo.type is KeyboardInterrupt  # errors of collection raise a subclass

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
        rows = [
            (f"`{name}`", f"{w.comparisons:,}", f"{w.bound:.0e}", number(w.value), number(w.gradient))
            for name, w in self.worst.items()
        ]
        faults = [tuple(fault[column] for column in FAULTS) for fault in self.faults]
        return "\n\n".join([tables.markdown(WORST, rows), NOTE, tables.markdown(FAULTS, faults)])


def label(item) -> str:
    """The subject of a test, if it is one of the test's parameters; otherwise the name of the test."""
    (subject, *_) = item.get_closest_marker("proof").args
    if hasattr(item, "callspec") and subject in item.callspec.params.values():
        return subject
    return item.name.removeprefix("test_").replace("_are_torchs", "").replace("_", " ")


def number(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}" if error else "0"


def run(tests: Path, write: bool = False) -> int:
    """Run the proof and the planted faults in ``tests`` and print the tables; return 1 if a test failed."""
    recorder = Recorder()
    options = ["-q", "-m", "proof or fault", "-p", "no:cacheprovider", "--import-mode=importlib"]
    code = pytest.main([str(tests), *options], plugins=[recorder])
    if recorder.interrupted:
        raise KeyboardInterrupt
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise Error(f"--tests {tests} contains no tests of the proof: give the tests folder of a checkout")
    facts = machine()
    cpu = f"{facts['cpu']} ({facts['instructions']})"
    versions = f"NumPy {np.__version__}", f"PyTorch {torch.__version__}"
    text = f"{tables.measured('proof', cpu, *versions)}\n\n{recorder.markdown()}"
    print(text)
    if write and code == 0:
        tables.write(tables.PAGE, "proof", text)
    return int(code != 0)

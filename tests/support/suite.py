"""The suite's own tests, run from within a test: what is proven, and which tests see a planted fault."""

import functools
from collections import defaultdict
from pathlib import Path

import pytest

from tinyllm.errors import Error

ROOT = Path(__file__).parents[2]  # pytest's, too: the names of tests begin here

# A test session within a test: no plugin that would write files, or that belongs to the session around it
QUIET = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:xdist"]


def proven(argument: str, subjects):
    """``parametrize`` over the subjects, each test marked as the proof of its own."""
    return pytest.mark.parametrize(
        argument, [pytest.param(subject, marks=pytest.mark.proof(subject)) for subject in subjects]
    )


class _Collected:
    """The subjects of the proof, and the tests of a name: a test's, or a subject among its parameters."""

    def __init__(self):
        self.subjects, self.tests = set(), defaultdict(list)

    def pytest_collection_finish(self, session):
        for item in session.items:
            subjects = [subject for mark in item.iter_markers("proof") for subject in mark.args]
            self.subjects.update(subjects)
            params = item.callspec.params.values() if hasattr(item, "callspec") else ()
            test = item.originalname
            for name in (test, f"{item.path.stem}::{test}", *(s for s in subjects if s in params)):
                self.tests[name].append(item.nodeid)


@functools.cache
def collected() -> _Collected:
    """The whole suite, but for files that cannot be imported: their own tests say so."""
    found = _Collected()
    pytest.main([f"{ROOT}/tests", "--collect-only", "-qq", *QUIET], plugins=[found])
    return found


class _Run:
    """What the tests raised."""

    def __init__(self):
        self.passed, self.errors = set(), {}

    def pytest_exception_interact(self, node, call):
        self.errors[node.nodeid] = call.excinfo.value

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when == "call":
            self.passed.add(report.nodeid)


def failures(tests: dict[str, list[str]]) -> dict[str, BaseException]:
    """Run these tests by name; those names of which one failed, with what it raised.

    Only an assertion that does not hold, or an ``Error``, is a failure. Whatever else goes wrong is a mistake
    of whoever asks, and so is a name all of whose tests are skipped.
    """
    run = _Run()
    nodes = dict.fromkeys(f"{ROOT}/{node}" for some in tests.values() for node in some)
    pytest.main([*nodes, "--show-capture=no", "--tb=line", *QUIET], plugins=[run])
    found = {}
    for name, some in tests.items():
        errors = [run.errors[node] for node in some if node in run.errors]
        for error in errors:
            if not isinstance(error, (AssertionError, Error)):
                raise error
        assert errors or run.passed & {*some}, f"{name}: none of its tests ran"
        if errors:
            found[name] = errors[0]
    return found

"""The suite's own tests, collected and run from within a test."""

import functools
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import Phase, is_hypothesis_test, settings

from tinyllm.errors import Error

ROOT = Path(__file__).parents[2]  # also pytest's root, to which the names of tests are relative

# Options of a nested session: without plugins that write files, belong to the outer session, or (unraisable
# exceptions) end every session with five collections of all garbage
QUIET = ["-q"]
for plugin in ("cacheprovider", "faulthandler", "xdist", "unraisableexception"):
    QUIET += ["-p", f"no:{plugin}"]


def proven(argument: str, subjects):
    """``parametrize`` over the subjects; each test is marked as the proof of its subject."""
    return pytest.mark.parametrize(
        argument, [pytest.param(subject, marks=pytest.mark.proof(subject)) for subject in subjects]
    )


class _Collected:
    """The subjects of the proof, and the tests by name: of the test, or of a subject among its parameters."""

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
    """The whole suite, except for files that cannot be imported here."""
    found = _Collected()
    pytest.main([f"{ROOT}/tests", "--collect-only", "-qq", *QUIET], plugins=[found])
    return found


class _Run:
    """A plugin that records which tests passed, and the exceptions of the others."""

    def __init__(self):
        self.passed, self.errors = set(), {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        """Let Hypothesis end at the first input that fails: it need not be the simplest one."""
        with pytest.MonkeyPatch.context() as patch:
            if is_hypothesis_test(item.obj):
                name = "_hypothesis_internal_use_settings"  # where ``@settings`` leaves them
                options = settings(getattr(item.obj, name), phases=[Phase.explicit, Phase.generate])
                patch.setattr(item.obj, name, options)
            return (yield)

    def pytest_exception_interact(self, node, call):
        self.errors[node.nodeid] = call.excinfo.value

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when == "call":
            self.passed.add(report.nodeid)


def _each(error: BaseException) -> list[BaseException]:
    """The errors in a group, such as the distinct failures that Hypothesis found, or the error itself."""
    return [*error.exceptions] if isinstance(error, BaseExceptionGroup) else [error]


def failures(tests: dict[str, list[str]]) -> dict[str, BaseException]:
    """Run tests (name -> node ids) and return the names with a failing test, each with its first exception.

    Only AssertionError and ``Error`` count as failures; any other exception is raised. A name must have at
    least one test that is not skipped.
    """
    run = _Run()
    nodes = dict.fromkeys(f"{ROOT}/{node}" for some in tests.values() for node in some)
    pytest.main([*nodes, "--show-capture=no", "--tb=line", *QUIET], plugins=[run])
    found = {}
    for name, some in tests.items():
        errors = [error for node in some if node in run.errors for error in _each(run.errors[node])]
        for error in errors:
            if not isinstance(error, (AssertionError, Error)):
                raise error
        assert errors or run.passed & {*some}, f"{name}: none of its tests ran"
        if errors:
            found[name] = errors[0]
    return found

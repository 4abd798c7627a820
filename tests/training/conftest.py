"""Fixtures of the tests of runs."""

import os

import pytest
from support.runs import no_pictures, rhyme, tiny

from tinyllm.training.tasks.pretrain import train


@pytest.fixture(scope="module")
def quick():
    """Runs without pictures and without fsync, which test_checkpoint.py tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        no_pictures(patched)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return rhyme(tmp_path_factory.mktemp("text"), 12)


@pytest.fixture(scope="module")
def whole(quick, text, tmp_path_factory):
    """A run that was never interrupted; tests only read it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(text, out), progress=False)
    return out

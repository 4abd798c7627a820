"""What several test modules of runs share."""

import os

import pytest
from support.runs import no_pictures, rhyme, tiny

from tinyllm.training.tasks.pretrain import train


@pytest.fixture(scope="module")
def quick():
    """Without pictures and a busy disk: test_checkpoint.py sees to that."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        no_pictures(patched)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return rhyme(tmp_path_factory.mktemp("text"), 12)


@pytest.fixture(scope="module")
def whole(quick, text, tmp_path_factory):
    """A run that was never interrupted; nobody writes into it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(text, out), progress=False)
    return out

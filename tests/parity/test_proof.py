"""``python -m parity proof``: what it reads off a run of tests, and its exit codes."""

import subprocess
import sys

import pytest

TESTS = """
import numpy as np, pytest
from parity.ops.cases import assert_close

@pytest.mark.parametrize("op", ["twice"])
def test_value_and_gradients_are_torchs(op):
    for error in (1e-12, 3e-12, 0):
        assert_close(np.array([1 + error, 0.99]), np.array([1.0, 0.99]), "twice: output")
    assert_close(np.array([2e-12, 0.99]), np.array([0, 0.99]), "twice: gradient of input 0")

def test_steps_are_torchs():
    assert_close(np.array([5.0 + OFF]), np.array([5.0]), "loss", 1e-9, 0.0)

def test_something_else():
    assert False
"""
SABOTAGE = """
from parity.ops.cases import assert_close
import numpy as np

def test_a_fault(record_property):
    for column in ("fault", "caught by", "located at"):
        record_property(column, f"the {column}")
    assert_close(np.array([1 + 9e-11]), np.array([1.0]), "sabotaged, and so not part of the errors")
"""


def proof(*arguments, cwd=None):
    command = [sys.executable, "-m", "parity", "proof", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(("off", "code"), [("0", 0), ("1e-6", 1)])
def test_the_tables_and_the_exit_code(tmp_path, off, code):
    (tmp_path / "test_ops.py").write_text(TESTS.replace("OFF", off))
    (tmp_path / "test_sabotage.py").write_text(SABOTAGE)
    done = proof("--tests", tmp_path)
    assert done.returncode == code, done.stderr
    assert "| `twice` | 4 | 1e-10 | 3.0e-12 | 2.0e-12 |" in done.stdout
    loss = {"0": "0", "1e-6": "2.0e-07"}[off]
    assert f"| `steps` | 1 | 1e-09 | {loss} | – |" in done.stdout
    assert "| the fault | the caught by | the located at |" in done.stdout
    assert "9.0e-11" not in done.stdout


def test_a_folder_without_our_tests(tmp_path):
    for arguments, said in [
        ((), "--tests tests is no folder: give the tests folder of a checkout\n"),
        (("--tests", tmp_path), f"--tests {tmp_path} holds no tests of ours: give the tests folder"),
    ]:
        done = proof(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr

"""``python -m parity proof``: what it reads off a run of tests, and its exit codes."""

import inspect
import subprocess
import sys

import pytest
from support.suite import collected

import tinyllm
from tinyllm import Tensor, functional, models, nn

TESTS = """
import numpy as np, pytest
from parity.ops.cases import assert_close

@pytest.mark.parametrize("op", [pytest.param("twice", marks=pytest.mark.proof("twice"))])
def test_value_and_gradients_are_torchs(op):
    for error in (1e-12, 3e-12, 0):
        assert_close(np.array([1 + error, 0.99]), np.array([1.0, 0.99]), "twice: output")
    assert_close(np.array([2e-12, 0.99]), np.array([0, 0.99]), "twice: gradient of input 0")

@pytest.mark.proof("model")
def test_steps_are_torchs():
    assert_close(np.array([5.0 + OFF]), np.array([5.0]), "loss", 1e-9, 0.0)

def test_something_else():
    assert False
"""
FAULT = """
from parity.ops.cases import assert_close
import numpy as np, pytest

@pytest.mark.fault
def test_a_fault(record_property):
    for column in ("fault", "caught by", "located at"):
        record_property(column, f"the {column}")
    assert_close(np.array([1 + 9e-11]), np.array([1.0]), "wrong, and so not part of the errors")
"""


def proof(*arguments, cwd=None):
    command = [sys.executable, "-m", "parity", "proof", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(("off", "code"), [("0", 0), ("1e-6", 1)])
def test_the_tables_and_the_exit_code(tmp_path, off, code):
    (tmp_path / "test_ops.py").write_text(TESTS.replace("OFF", off))
    (tmp_path / "test_faults.py").write_text(FAULT)
    done = proof("--tests", tmp_path)
    assert done.returncode == code, done.stderr
    assert "| `twice` | 4 | 1e-10 | 3.0e-12 | 2.0e-12 |" in done.stdout
    loss = {"0": "0", "1e-6": "2.0e-07"}[off]
    assert f"| `steps` | 1 | 1e-09 | {loss} | – |" in done.stdout
    assert "| the fault | the caught by | the located at |" in done.stdout
    assert "9.0e-11" not in done.stdout


def test_a_folder_without_our_tests(tmp_path):
    for arguments, said in [
        ((), "--tests tests is not a folder"),
        (("--tests", tmp_path), f"--tests {tmp_path} holds no tests of ours"),
    ]:
        done = proof(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


# ---- What is proven ----

NOT_OPS = {"__init__", "__repr__", "__bool__", "__array__"}  # operators that compute nothing
NOT_OPS |= {"from_op", "saved", "backward", "no_grad"}  # the tape
NOT_OPS |= {"replace", "detach", "item", "to"}  # ways out of it, and to another device


def tensor_ops():
    """Every operator and method of Tensor, and every function of tensors at the top of tinyllm."""
    members = {name: value for kind in Tensor.__mro__[:-1] for name, value in vars(kind).items()}
    exported = {name: getattr(tinyllm, name) for name in tinyllm.__all__}
    members |= {
        name: value
        for name, value in exported.items()
        if inspect.isfunction(value) and value.__module__.startswith("tinyllm.tensor")
    }
    return {
        name
        for name, value in members.items()
        if callable(value) and (not name.startswith("_") or name.endswith("__"))
    } - NOT_OPS


def layers_and_models():
    """Every public class of nn and models that computes something."""
    found, kinds = set(), list(nn.Module.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
        if kind.__module__.startswith(("tinyllm.nn.", "tinyllm.models.")):
            found.add(kind.__name__)
    return {name for name in found if not name.startswith("_")} - {"LanguageModel"}


def test_the_proofs_subjects_are_all_public_ops_layers_and_models():
    subjects = collected().subjects
    public = tensor_ops() | set(functional.__all__) | layers_and_models()
    assert {kind.__name__ for kind in models.ARCHITECTURES.values()} <= public
    assert subjects == public

"""``python -m parity proof``: its tables, its exit codes, and the set of subjects that are proven."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
from support.ops import NOT_OPS
from support.suite import collected

import tinyllm
from parity import tables
from parity.__main__ import main
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
    assert_close(np.array([1 + 9e-11]), np.array([1.0]), "the result of a fault is not recorded")
"""


def proof(*arguments, cwd=None):
    command = [sys.executable, "-m", "parity", "proof", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def write_tests(folder, off="0"):
    """A tests folder with a proof (wrong by ``off``), a fault, and a conftest.py of a subfolder only."""
    (folder / "ops").mkdir(parents=True)
    (folder / "ops" / "conftest.py").write_text("import pytest")
    (folder / "ops" / "test_ops.py").write_text(TESTS.replace("OFF", off))
    (folder / "test_faults.py").write_text(FAULT)


@pytest.mark.parametrize("arguments", [(), ("--tests", ".")])
def test_a_folder_without_our_tests_gives_exit_code_2(tmp_path, arguments):
    done = proof(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "--tests" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "code"),
    [("import no_such_module", 1), ("raise KeyboardInterrupt", 130)],
    ids=["error", "Ctrl-C"],
)
def test_a_file_that_cannot_be_imported_is_a_failure_and_ctrl_c_an_interruption(tmp_path, line, code):
    write_tests(tmp_path / "tests")
    (tmp_path / "tests" / "test_broken.py").write_text(line)
    assert proof("--tests", tmp_path / "tests").returncode == code


# ---- Writing the tables ----


@pytest.mark.parametrize(("off", "code"), [("0", 0), ("1e-6", 1)])
def test_tables_are_printed_and_written_only_if_all_tests_pass(tmp_path, off, code):
    write_tests(tmp_path / "tests", off)
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- proof -->\nold\n<!-- /proof -->\nafter\n", encoding="utf-8")
    program = (
        "import pathlib, sys; from parity import __main__, tables; "
        "tables.PAGE = pathlib.Path('README.md').absolute(); "
        "sys.exit(__main__.main(['proof', '--tests', 'tests', '--write']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "| `twice` | 4 | 1e-10 | 3.0e-12 | 2.0e-12 |" in done.stdout
    loss = {"0": "0", "1e-6": "2.0e-07"}[off]
    assert f"| `steps` | 1 | 1e-09 | {loss} | – |" in done.stdout
    assert "| the fault | the caught by | the located at |" in done.stdout
    assert "9.0e-11" not in done.stdout
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- proof -->\n") and text.endswith("\n<!-- /proof -->\nafter\n")
    if code:
        assert tables.read(page, "proof") == "old\n"
    else:
        assert tables.first_cells(text) == [["twice", "steps"], ["the fault"]]
        assert "old" not in text and f"NumPy {np.__version__}" in text and "PyTorch" in text


@pytest.mark.parametrize("text", [None, "", "<!-- proof -->\n", "<!-- /proof -->\n<!-- proof -->\n"])
def test_a_page_without_markers_gives_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, text):
    page = tmp_path / "README.md"
    if text is not None:
        page.write_text(text, encoding="utf-8")
    monkeypatch.setattr(tables, "PAGE", page)
    assert main(["proof", "--tests", str(tmp_path), "--write"]) == 2
    captured = capsys.readouterr()
    assert str(page) in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert page.exists() == (text is not None)


# ---- The subjects of the proof ----


def tensor_ops():
    """Every operator and method of Tensor, and every function on tensors that tinyllm exports."""
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


def public_subjects():
    return tensor_ops() | set(functional.__all__) | layers_and_models()


def test_every_public_op_layer_and_model_is_a_subject_of_the_proof():
    assert {kind.__name__ for kind in models.ARCHITECTURES.values()} <= public_subjects()
    assert collected().subjects == public_subjects()


def test_the_written_table_lists_exactly_the_public_ops_layers_and_models():
    """Rows that are not identifiers are training recipes, named after their tests."""
    written, _ = tables.first_cells(tables.read(tables.PAGE, "proof"))
    assert {name for name in written if name.isidentifier()} == public_subjects(), (
        "run: python -m parity proof --write"
    )
    assert any(not name.isidentifier() for name in written)

"""``python -m parity check``: a reader's own op or module against a reference."""

from pathlib import Path

import pytest

from parity.grade.check import check
from tinyllm.errors import Error

RELU2 = """
import numpy as np
import torch

def implementation(x):
    return np.maximum(x, 0) ** 2

def implementation_gradient(grad, x):
    return grad * {slope} * np.maximum(x, 0)

def reference(x):
    return torch.relu(x) ** 2

def inputs(rng):
    return rng.standard_normal((rng.integers(1, 4), rng.integers(1, 4)))
"""

MODULES = """
import numpy as np
import torch
from tinyllm import nn

class Ours(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 6, rng=np.random.default_rng(0))

    def forward(self, x):
        return self.up(self.norm(x)) * {factor}

class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(4)
        self.{name} = torch.nn.Linear(4, {outputs})

    def forward(self, x):
        return self.{name}(self.norm(x))

implementation, reference = Ours(), Theirs()

def inputs(rng):
    return rng.standard_normal((3, 4))
"""

FUNCTIONS = """
import numpy as np
import torch
import tinyllm.functional as F

def implementation(*given):
    return {implementation}

def reference(*given):
    return {reference}

def inputs(rng):
    return {inputs}
"""


@pytest.fixture
def run(tmp_path, capsys):
    """The exit code and what is printed for a file."""

    def write_and_check(text, **values):
        path = tmp_path / "mine.py"
        path.write_text(text.format(**values) if values else text)
        code = check(path)
        return code, capsys.readouterr().out

    return write_and_check


def rows(printed):
    """The table's rows by name."""
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells}


def test_a_numpy_function_with_its_gradient_agrees(run):
    code, printed = run(RELU2, slope=2)
    assert code == 0
    assert rows(printed)["output"] == rows(printed)["gradient of input 0"] == "agrees"


def test_a_file_may_load_a_model_for_longer_than_an_exercise_runs(run, monkeypatch):
    monkeypatch.setattr("parity.grade.grading.SECONDS", 0.1)
    assert run("import time\ntime.sleep(0.3)\n" + RELU2, slope=2)[0] == 0


def test_a_gradient_wrong_by_a_factor_of_two(run):
    code, printed = run(RELU2, slope=1)
    assert code == 1
    assert rows(printed)["output"] == "agrees"
    line = next(line for line in printed.splitlines() if "gradient of input 0" in line)
    assert "DIFFERS | 5.0e-01 | inputs(rng of seed " in line


@pytest.mark.parametrize("slope, code", [("(2 + 1e-8)", 1), ("(2 + 1e-14)", 0)])
def test_the_bound_lies_between_rounding_and_a_relative_error_of_1e_8(run, slope, code):
    assert run(RELU2, slope=slope)[0] == code


def test_a_function_without_a_gradient_says_so(run):
    text = RELU2.format(slope=2).replace("def implementation_gradient", "def unused")
    code, printed = run(text)
    assert code == 0 and "gradient of input" not in printed
    assert "No gradient is compared: implementation returns an array without one" in printed


def test_another_shape_is_not_broadcast(run):
    code, printed = run(
        FUNCTIONS,
        implementation="given[0].sum(-1)",
        reference="torch.sum(given[0], -1, keepdim=True)",
        inputs="rng.standard_normal((2, 3))",
    )
    assert code == 1
    assert "shape (2,) instead of (2, 1); inputs(rng of seed 0) of (2, 3)" in printed


@pytest.mark.parametrize("implementation, code", [("F.embedding(*given)", 0), ("F.embedding(*given) * 2", 1)])
def test_integer_inputs_have_no_gradient(run, implementation, code):
    found, printed = run(
        FUNCTIONS,
        implementation=implementation,
        reference="torch.nn.functional.embedding(*given)",
        inputs="rng.integers(0, 5, 4), rng.standard_normal((5, 2))",
    )
    assert found == code
    assert rows(printed).keys() >= {"output", "gradient of input 1"}
    assert "gradient of input 0" not in printed


def test_nan_is_a_difference(run):
    code, printed = run(
        FUNCTIONS,
        implementation="np.log(given[0])",
        reference="np.log(np.abs(given[0]))",
        inputs="rng.standard_normal(3)",
    )
    assert code == 1 and rows(printed)["output"] == "DIFFERS"


def test_modules_get_the_same_weights(run):
    code, printed = run(MODULES, factor=1, name="up", outputs=6)
    assert code == 0 and "DIFFERS" not in printed


def test_modules_that_differ_name_the_layer(run):
    code, printed = run(MODULES, factor=1.001, name="up", outputs=6)
    assert code == 1
    assert "First diverging layer: (output)" in printed
    assert "The last to agree is the output of up" in printed


def test_modules_whose_parameters_have_other_names_keep_their_weights(run):
    code, printed = run(MODULES, factor=1, name="linear", outputs=6)
    assert code == 1
    assert "only implementation has up.bias, up.weight; only reference has linear.bias" in printed


def test_modules_of_other_shapes_are_refused(run):
    with pytest.raises(Error, match=r"up.weight has shape \(6, 4\), but \(5, 4\) in the reference"):
        run(MODULES, factor=1, name="up", outputs=5)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"inputs": "1.0"}, r"inputs\(rng\) must return NumPy arrays, not float"),
        ({"inputs": "missing"}, r"inputs\(rng\) fails: NameError in line 13: .*is an import missing"),
        ({"implementation": "given[0], 1"}, "must return one array .* returned a tuple"),
        (
            {"implementation": "given[0] if given[0].sum() < 0.7 else missing"},
            r"implementation for inputs\(rng of seed \d+\) fails: NameError in line 7",
        ),
    ],
)
def test_what_cannot_be_compared_is_explained(run, changed, message):
    given = {
        "implementation": "given[0]",
        "reference": "given[0]",
        "inputs": "rng.random(1)",
    }
    with pytest.raises(Error, match=message):
        run(FUNCTIONS, **given | changed)


def test_a_file_without_a_reference_is_refused(run):
    with pytest.raises(Error, match="does not define reference and inputs"):
        run("def implementation(x):\n    return x\n")


def test_a_module_against_a_function_is_refused(run):
    text = MODULES.format(factor=1, name="up", outputs=6) + "\nreference = np.tanh\n"
    with pytest.raises(Error, match="must be two functions or two modules"):
        run(text)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(Error, match="is not a Python file"):
        check(tmp_path)


def test_the_wrong_number_of_gradients_is_refused(run):
    text = RELU2.format(slope=2).replace("return grad *", "return grad, grad *")
    with pytest.raises(Error, match="implementation_gradient returned 2 arrays, not 1"):
        run(text)


def test_the_example_in_the_readme_agrees(run):
    page = (Path(__file__).parents[2] / "tinyllm/functional/README.md").read_text(encoding="utf-8")
    code, printed = run(page.partition("# my_op.py\n")[2].partition("```")[0])
    assert code == 0 and rows(printed)["gradient of input 0"] == "agrees"

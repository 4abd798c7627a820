"""What ``python -m parity grade`` answers to a learner: one clear passage, whatever is wrong."""

import re
from pathlib import Path

import numpy as np
import pytest

from parity.grade import report
from parity.grade.grading import DONE, OPEN, WRONG
from tinyllm.errors import Error

SOFTMAX = """
import numpy as np

def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)

def softmax_gradient(grad, x):
    raise NotImplementedError
"""

RESULT = "e / e.sum(axis=-1, keepdims=True)"

MISTAKES = {
    "a list": (RESULT, f"({RESULT}).tolist()", "p is a list of 1 instead of an array of shape (1, 2)"),
    "changed in place": ("e = np.exp(x -", "x -= x.max()\n    e = np.exp(x -", "x was changed: compute with"),
    "float32": (RESULT, f"({RESULT}).astype(np.float32)", "p has dtype float32 instead of float64"),
    "another shape": (RESULT, f"({RESULT})[None]", "p has shape (1, 1, 2) instead of (1, 2)"),
    "nan": (RESULT, "e / (e - e)", "not all elements are finite"),
    "nothing": ("return e", "print(x.shape)\n    e = e", "returned nothing (None): end with return p"),
    "another name": ("def softmax(", "def Softmax(", "has no function softmax: its name and parameters must"),
    "another parameter": ("softmax(x):", "softmax(scores):\n    x = scores",
                          "softmax has the parameters (scores), but they must be (x)"),
    "no import": ("import numpy as np", "", "NameError in line 5: name 'np' is not defined: is an import"),
    "exception": ("return e", "assert x.shape[0] == 0, 'rows'\n    return e", "Error in line 6: rows"),
    "exit": ("return e", "exit()\n    return e", "the program is ended in line 6: leave exit() out"),
    "a builtin": ("\ndef softmax_gradient", "\nsoftmax = max\n\ndef softmax_gradient", "softmax: wrong"),
    "wrong": (RESULT, f"1.01 * {RESULT}", "], but should be ["),
}  # fmt: skip


@pytest.fixture
def answer(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_and_grade(text):
        path = Path("03_softmax.py")  # relative, as it is typed
        path.write_text(text)
        code = report.grade_files([path])
        return code, capsys.readouterr().out

    return write_and_grade


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_wrong_is_said_in_words(answer, mistake):
    old, new, words = MISTAKES[mistake]
    assert old in SOFTMAX
    code, printed = answer(SOFTMAX.replace(old, new))
    assert code == 1
    assert "  softmax: wrong\n" in printed and words in printed and "  softmax_gradient: open" in printed
    assert "Traceback" not in printed and "hint" not in printed


def test_a_mistake_is_shown_with_the_smallest_input_and_its_hint(answer):
    _, printed = answer(SOFTMAX.replace("x - x.max(axis=-1, keepdims=True)", "x"))
    assert re.search(r"\n    p is .*nan.*, but should be \[\[.*\]\]: not all elements are finite\n", printed)
    assert re.search(r"\n    smallest input that fails: softmax\(x=np.array\(\[\[.*1000.*\]\]\)\)\n", printed)
    assert "    hint: exp overflows for large scores: subtract the maximum of each row first" in printed


def test_what_a_function_prints_is_shown_once(answer):
    _, printed = answer(SOFTMAX.replace("return e", "print(x.shape)\n    e = e"))
    assert printed.count("it printed: (1, 2)") == 1


def test_lines_that_are_not_shown_are_counted(answer):
    _, printed = answer(SOFTMAX.replace("return e", r"print('a\n' * 12)"))
    assert printed.count("it printed: ") == 10 and "    … and 3 lines more\n" in printed


@pytest.mark.parametrize("array", [np.zeros((0, 2)), np.array([[0.5, -1.0]]), np.array([3, 0])], ids=str)
def test_a_call_that_is_shown_can_be_run(array):
    shown = report.call("f", {"x": array, "each": [array, array]})
    given = eval(shown, {"np": np, "f": dict})
    for copy in (given["x"], *given["each"]):
        assert copy.dtype == array.dtype and np.array_equal(copy, array)


def test_an_endless_loop_is_stopped(answer, monkeypatch):
    monkeypatch.setattr("parity.grade.grading.SECONDS", 0.2)
    code, printed = answer(SOFTMAX.replace("return e", "while True:\n        pass\n    return e"))
    assert code == 1
    assert "after 0.2 seconds: does a loop never end?\n    an input that fails: softmax(" in printed


@pytest.mark.parametrize("kind", ["Exception", "BaseException"])
def test_an_endless_loop_that_catches_exceptions_is_stopped(answer, monkeypatch, kind):
    monkeypatch.setattr("parity.grade.grading.SECONDS", 0.2)
    loop = f"while True:\n        try:\n            np.sqrt(x)\n        except {kind}:\n            pass\n"
    _, printed = answer(SOFTMAX.replace("return e", f"{loop}    return e"))
    assert "after 0.2 seconds: does a loop never end?" in printed


def test_an_endless_loop_for_small_inputs_is_stopped(answer, monkeypatch):
    """It is met while the smallest input is sought: that ends at once."""
    monkeypatch.setattr("parity.grade.grading.SECONDS", 0.2)
    body = "while x.size == 4 and not x[0, 0]:\n        pass\n    return (x.size > 4) + e"
    _, printed = answer(SOFTMAX.replace("return e", body))
    assert printed.count("softmax: wrong") == 1


def test_a_function_that_fails_only_sometimes_is_wrong(answer):
    text = (
        SOFTMAX.replace("return e", "calls.append(1)\n    return (len(calls) == 50) + e") + "\ncalls = []\n"
    )
    assert "  softmax: wrong\n" in answer(text)[1]


@pytest.mark.parametrize(
    "text, message",
    [
        (SOFTMAX.replace("True))", "True)"), r"03_softmax.py, line 5: .*never closed"),
        ("\0", r"03_softmax.py(?!.*None).*null bytes"),
        ("import numpi\n", "cannot be run: ModuleNotFoundError in line 1: No module named 'numpi'"),
        ("import sys\nsys.exit(3)\n", r"cannot be run: the program is ended in line 2"),
    ],
)
def test_a_file_that_cannot_be_run_is_an_error(answer, text, message):
    with pytest.raises(Error, match=message):
        answer(text)


def test_files_that_are_no_exercises_are_refused(tmp_path):
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(Error, match="is not named after an exercise: keep the file's name"):
        report.grade_files([tmp_path / "mine.py"])
    with pytest.raises(Error, match="is not a file"):
        report.grade_files([tmp_path / "03_softmax.py"])
    with pytest.raises(Error, match="has no exercises"):
        report.grade_folder(tmp_path)


def test_a_folder_gives_a_table(tmp_path, capsys):
    (tmp_path / "03_softmax.py").write_text(SOFTMAX)
    (tmp_path / "07_gelu.py").write_text("def gelu(x:\n")
    (tmp_path / "10_heads.py").write_text(
        "def split_heads(x, heads):\n    return x.reshape(len(x), heads, -1).swapaxes(0, 1)\n\n\n"
        "def join_heads(x):\n    return x.swapaxes(0, 1).reshape(x.shape[1], -1)\n"
    )
    assert report.grade_folder(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"03_softmax  {OPEN}   softmax_gradient"
    assert lines[1].startswith(f"07_gelu     {WRONG}  ") and "line 1" in lines[1]
    assert lines[2] == f"10_heads    {DONE}"
    assert lines[-1] == "1 done, 1 wrong, 1 open; details: python -m parity grade FILE"

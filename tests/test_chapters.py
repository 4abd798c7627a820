"""Chapters print what their comments say. CI runs those that take minutes at a small size, uncompared."""

import pytest
from support.chapters import ROOT, cells, run

CHAPTERS = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))

COMPARED = [path for path in CHAPTERS if any(expected for _, _, expected in cells(path))]


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_a_chapter_prints_what_its_comments_say(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for first, printed, expected in run(path):
        assert printed == expected, f"cell at line {first}"


def test_a_wrong_comment_is_found(tmp_path):
    (tmp_path / "chapter.py").write_text("# %%\nprint(1)\n# > 1\n# %%\nprint(2)\n# > 3\n")
    results = list(run(tmp_path / "chapter.py"))
    assert results == [(2, ["1"], ["1"]), (5, ["2"], ["3"])]

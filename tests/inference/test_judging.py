"""Answers and scores that are kept row by row: stopping, continuing, damage, and the judgement of one row."""

import json
from contextlib import closing

import pytest
from support.runs import full_disk

from tinyllm.errors import Error
from tinyllm.files import sealed
from tinyllm.inference.judging import (
    Item,
    JudgedFolder,
    Records,
    answer_items,
    compare,
    judge_items,
    match,
    score,
)

OPTIONS = {"data": "0" * 64, "by": "score"}
ITEMS = [Item(f"question {i}", f"reference {i}") for i in range(4)]
PAIR = ("short", "a longer answer")


class Stop(BaseException):
    """What a kill is to the folder."""


def answer_until(folder, stop):
    def answer(row):
        if row == stop:
            raise Stop
        answered.append(row)
        return {"answer": f"answer to {ITEMS[row].prompt}"}

    answered = []
    try:
        return answer_items(folder, "model", ITEMS, answer, progress=False), answered
    except Stop:
        return None, answered


def test_a_stopped_judgement_continues_with_the_missing_rows(tmp_path):
    out = tmp_path / "judged"
    with closing(JudgedFolder(out, OPTIONS)) as folder:
        assert answer_until(folder, 2) == (None, [0, 1])
    with open(out / "answers.jsonl", "ab") as file:
        file.write(b'{"model": "model", "row": 2, "pro')  # killed while it was written
    with closing(JudgedFolder(out, OPTIONS)) as folder:
        answers, answered = answer_until(folder, None)
        assert answered == [2, 3]
        assert answers == [f"answer to question {i}" for i in range(4)]
        judged = judge_items(folder, "model", 4, lambda row: {"score": row}, progress=False)
        assert [record["score"] for record in judged] == [0, 1, 2, 3]
        folder.write_summary({"mean": 1.5})
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2, 3]
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == {"mean": 1.5}
    with closing(JudgedFolder(out, OPTIONS)) as folder:
        assert answer_until(folder, 0)[1] == []
        assert judge_items(folder, "model", 4, pytest.fail, progress=False) == judged


def test_two_models_have_their_own_rows(tmp_path):
    with closing(JudgedFolder(tmp_path / "judged", OPTIONS)) as folder:
        for name in ("model", "against"):
            answers = [{"answer": f"{name} {row}"} for row in range(4)]
            answer_items(folder, name, ITEMS, answers.__getitem__, progress=False)
        assert folder.answers["against", 1]["answer"] == "against 1"
        assert len(folder.answers.found) == 8


def test_other_options_are_refused_and_named(tmp_path):
    with closing(JudgedFolder(tmp_path / "judged", OPTIONS)):
        pass
    with pytest.raises(Error, match="by 'score', not 'pair'") as refused:
        JudgedFolder(tmp_path / "judged", OPTIONS | {"by": "pair"})
    with closing(JudgedFolder(tmp_path / "judged", OPTIONS)):  # the refusal released the lock
        assert refused.tb is not None  # the refused folder is still alive


def test_a_folder_that_was_locked_and_not_begun_is_used(tmp_path):
    for _ in range(2):
        with closing(JudgedFolder(tmp_path / "judged", OPTIONS)):
            (tmp_path / "judged" / "config.json").unlink()


def test_another_model_is_refused_and_named(tmp_path):
    with closing(JudgedFolder(tmp_path / "judged", OPTIONS)) as folder:
        for name, sha256 in (("model", "1"), ("against", "2"), ("model", "1")):
            folder.check_model(name, sha256)
    with closing(JudgedFolder(tmp_path / "judged", OPTIONS)) as folder:
        folder.check_model("against", "2")
        with pytest.raises(Error, match="SHA-256 of model '1', not '3'"):
            folder.check_model("model", "3")


def test_a_folder_of_something_else_and_a_locked_one_are_refused(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x", encoding="utf-8")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes(sealed({"model": {}}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    for name in ("file", "full", "loop", "run", "model"):
        with pytest.raises(Error, match=f"{name} exists and is not"):
            JudgedFolder(tmp_path / name, OPTIONS)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]  # no lock
    with closing(JudgedFolder(tmp_path / "judged", OPTIONS)), pytest.raises(Error, match="another process"):
        JudgedFolder(tmp_path / "judged", OPTIONS)


def test_a_damaged_config_is_named(tmp_path):
    with closing(JudgedFolder(tmp_path, OPTIONS)):
        pass
    path = tmp_path / "config.json"
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole.replace(b"score", b"match")):
        path.write_bytes(damaged)
        with pytest.raises(Error, match=r"config\.json is damaged"):
            JudgedFolder(tmp_path, OPTIONS)


@pytest.mark.parametrize("line", [b"x", b"[]", b'{"row": 1}', b"\xff"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"model": "m", "row": 0}\n' + line + b'\n{"model": "m", "row": 2}\n')
    with pytest.raises(Error, match=r"line 2 of .*answers\.jsonl"):
        Records(path, "model", "row")


def test_a_full_disk_leaves_whole_lines(tmp_path):
    records = Records(tmp_path / "answers.jsonl", "row")
    records.add({"row": 0})
    before = records.path.read_bytes()
    with full_disk(size=len(before) + 5), pytest.raises(OSError, match=r"answers\.jsonl"):
        records.add({"row": 1})
    assert records.path.read_bytes() == before and (1,) not in records


def test_a_score_and_what_is_none_are_kept_with_the_reply():
    asked = []

    def chat(question):
        asked.append(question)
        return "85" if "good {answer}" in question else "nice"

    assert score(chat, ITEMS[0], "good {answer}") == {"replies": ["85"], "score": 85}
    assert score(chat, ITEMS[0], "bad") == {"replies": ["nice"], "score": None}
    assert all(part in asked[0] for part in ("question 0", "reference 0", "good {answer}"))


def by_place(question):
    return "A"


def by_length(question):
    a, b = question.split("Response A:\n")[1].split("\n\nRespond")[0].split("\n\nResponse B:\n")
    return "A" if len(a) > len(b) else "B"


def test_pairs_are_asked_in_both_orders():
    assert compare(by_length, ITEMS[0], *PAIR) == {"replies": ["B", "A"], "verdicts": ["B", "A"], "win": 0.0}
    assert compare(by_length, ITEMS[0], *PAIR[::-1])["win"] == 1.0
    assert compare(by_place, ITEMS[0], *PAIR)["win"] == 0.5
    assert compare(lambda _: "hm", ITEMS[0], *PAIR) == {
        "replies": ["hm"] * 2,
        "verdicts": [None] * 2,
        "win": None,
    }


def test_match():
    assert match(ITEMS[0], "Reference 0.") == {"exact_match": 1.0, "f1": 1.0}

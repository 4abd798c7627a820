"""Watching runs: what is read of a run that is writing, is resumed, is damaged or is gone."""

import json
import os
import sys
import time

import pytest
from support.page_server import PageServer
from support.runs import no_pictures, rhyme, small

from tinyllm import Error
from tinyllm.files import printable
from tinyllm.serve.watch import MOST_POINTS, WatchedRun, watched
from tinyllm.training.tasks.pretrain import train


def record(step, **more):
    return {"step": step, "tokens": 100 * step, "train_loss": 5.0 - step / 10, "tokens_per_s": 50.0, **more}


def lines(*records):
    return "".join(json.dumps(each) + "\n" for each in records)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(lines(record(1), record(2, val_loss=4.5)))
    return tmp_path / "run"


def write(folder, text, mode="a"):
    with open(folder / "metrics.jsonl", mode) as file:
        file.write(text)


def steps(run):
    return [point[0] for point in run.report()["curves"]["train_loss"]]


def test_what_is_written_is_read_once_and_a_half_line_when_it_is_whole(folder):
    run = WatchedRun(folder, "run")
    found = run.report()
    assert found["curves"]["train_loss"] == [[1, 100, 2.0, 4.9], [2, 200, 4.0, 4.8]]
    assert found["curves"]["val_loss"] == [[2, 200, 4.0, 4.5]]
    assert found["best"] == {"step": 2, "val_loss": 4.5}
    assert found["last"] == {
        "step": 2,
        "tokens": 200,
        "tokens_per_s": 50.0,
        "train_loss": 4.8,
        "val_loss": 4.5,
        "seconds": 4.0,
    }
    first = run.records[0]
    whole = lines(record(3))
    write(folder, whole[:20])
    assert steps(run) == [1, 2] and run.report()["notes"] == []
    write(folder, whole[20:])
    assert steps(run) == [1, 2, 3] and run.records[0] is first


def test_a_resumed_run_is_read_again(folder):
    run = WatchedRun(folder, "run")
    write(folder, lines(record(3), record(4)))
    assert steps(run) == [1, 2, 3, 4]
    new = folder / "new"
    new.write_text(lines(record(1), record(2), *(record(n, lr=0.5) for n in range(3, 9))))
    os.replace(new, folder / "metrics.jsonl")  # longer than before, as after a while
    found = run.report()
    assert steps(run) == list(range(1, 9)) and len(found["curves"]["lr"]) == 6 and found["best"] is None
    write(folder, lines(record(1)), "w")  # shorter, in the same file
    assert steps(run) == [1]


def test_a_damaged_line_is_named_and_read_when_it_is_repaired(folder):
    run = WatchedRun(folder, "run")
    write(folder, "{broken\n" + lines(record(4)))
    for _ in range(2):
        found = run.report()
        assert steps(run) == [1, 2]
        assert found["notes"] == [
            "line 3 of metrics.jsonl is damaged (it is not a JSON object): later steps are not shown"
        ]
    write(folder, lines(record(1), record(2), record(3), record(4)), "w")
    assert run.report()["notes"] == [] and steps(run) == [1, 2, 3, 4]


def test_a_step_that_goes_back_is_damage_also_at_the_start_of_a_later_read(folder):
    run = WatchedRun(folder, "run")
    run.report()
    write(folder, lines(record(2)))
    (note,) = run.report()["notes"]
    assert "step 2 follows step 2" in note


def test_a_run_that_vanishes_keeps_its_curves_and_comes_back(folder):
    run = WatchedRun(folder, "run")
    run.report()
    moved = folder.rename(folder.parent / "elsewhere")
    found = run.report()
    assert "is gone" in found["notes"][0] and steps(run) == [1, 2] and found["age"] is None
    moved.rename(folder)
    assert run.report()["notes"] == []


def test_a_run_without_a_step_yet(folder):
    (folder / "metrics.jsonl").unlink()
    run = WatchedRun(folder, "run")
    found = run.report()
    assert found["notes"] == ["no step is recorded yet"] and found["last"] is None and found["samples"] == []
    write(folder, lines(record(1)))
    assert run.report()["notes"] == []


def test_skipped_steps_and_evaluations_before_the_first_step(folder):
    skipped = {"step": 1, "tokens": 100, "tokens_per_s": 50.0, "skipped": "the loss is not finite"}
    write(folder, lines({"step": 0, "tokens": 0, "val_loss": 6.0}, skipped, record(2)), "w")
    found = WatchedRun(folder, "run").report()
    assert found["notes"] == [] and found["curves"]["train_loss"] == [[2, 200, 4.0, 4.8]]
    assert found["best"] == {"step": 0, "val_loss": 6.0}


def test_long_curves_are_means_of_neighbours(folder):
    count = 4 * MOST_POINTS
    write(folder, lines(*map(record, range(1, count + 1))), "w")
    points = WatchedRun(folder, "run").report()["curves"]["train_loss"]
    assert len(points) == MOST_POINTS
    assert points[0] == pytest.approx([2.5, 250, 5.0, 4.75])
    assert points[-1][0] == count - 1.5


def test_values_that_json_cannot_express_are_left_out(folder):
    """A norm that overflowed is recorded as Infinity: the other curves, and other runs, are still shown."""
    for step, norm in enumerate([1.5, float("inf"), float("nan"), 1e308, 10**400, -2.5], start=3):
        write(folder, lines(record(step, grad_norm=norm)))
    found = WatchedRun(folder, "run").report()
    json.dumps(found, allow_nan=False)
    assert [point[::3] for point in found["curves"]["grad_norm"]] == [[3, 1.5], [8, -2.5]]
    assert len(found["curves"]["train_loss"]) == 8 and found["notes"] == []


def test_samples_are_the_newest_of_the_file(folder):
    run = WatchedRun(folder, "run")
    (folder / "samples.txt").write_text("--- step 0\nfirst\n--- step 5\ntwo\nlines\n")
    assert run.samples() == [{"step": 0, "text": "first"}, {"step": 5, "text": "two\nlines"}]
    (folder / "samples.txt").write_text("".join(f"--- step {n}\n{'x' * 5000}\n" for n in range(200)))
    found = run.samples()
    assert [each["step"] for each in found] == list(range(170, 200)) and found[-1]["text"] == "x" * 5000
    (folder / "samples.txt").write_bytes(b"--- step 1\n\xff\xfe\n")
    assert run.samples() == [{"step": 1, "text": "\ufffd\ufffd"}]


def test_bits_per_byte_where_they_are_recorded(folder):
    assert WatchedRun(folder, "run").report()["bytes_per_token"] is None
    write(folder, lines(record(3, val_loss=2.772588722239781, val_bits_per_byte=2.0)))
    assert WatchedRun(folder, "run").report()["bytes_per_token"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("config", "unit"),
    [
        ('{"task": "dpo"}', "pair"),
        ('{"task": "classify"}', "text"),
        ('{"train": {}}', "token"),
        ("[", "token"),
    ],
)
def test_the_unit_of_a_loss_is_that_of_the_task(folder, config, unit):
    (folder / "config.json").write_text(config)
    assert WatchedRun(folder, "run").report()["unit"] == unit


def test_names_and_folders_that_are_not_runs(folder, tmp_path):
    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")  # begun, without a step
    assert [run.name for run in watched([folder])] == ["run"]
    assert [run.name for run in watched([folder, other])] == [str(folder), str(other)]
    for wrong, said in (
        ([tmp_path / "none"], "no run"),
        ([tmp_path], "not a run folder"),
        ([folder, folder], "more than once"),
        ([folder / "metrics.jsonl"], "no run"),
    ):
        with pytest.raises(Error, match=said):
            watched(wrong)
    many = [tmp_path / str(n) for n in range(9)]
    for each in many:
        each.mkdir()
        (each / "metrics.jsonl").touch()
    with pytest.raises(Error, match="9 runs"):
        watched(many)


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="file systems of Unicode names")
def test_names_that_are_not_utf8_are_escaped(folder):
    """The report is JSON in UTF-8, also of a folder that is gone, or of two with the same name."""
    moved = [folder.rename(folder.parent / os.fsdecode(b"r\xff"))]
    moved.append(moved[0] / moved[0].name)
    moved[1].mkdir()
    (moved[1] / "config.json").write_text("{}")
    (run,) = watched(moved[:1])
    assert ascii(run.name) == ascii(r"r\xff")  # a report of a failure must be UTF-8, too
    assert ascii([each.name for each in watched(moved)]) == ascii([printable(path) for path in moved])
    moved[0].rename(folder)
    (note,) = run.report()["notes"]
    assert ascii(printable(moved[0])) == ascii(note.removesuffix(" is gone"))


def test_a_real_run_is_reported_without_a_model(tmp_path, monkeypatch):
    no_pictures(monkeypatch)
    train(small(rhyme(tmp_path, 30), tmp_path / "real"), progress=False)
    with PageServer(tmp_path, runs=[tmp_path / "real"], model=False) as server:
        status, about = server.get("tinyllm/about")
        assert status == 200 and about == {"model": None, "watch": True}
        assert server.get("health") == (200, {"status": "ok"})
        started = time.perf_counter()
        status, found = server.get("tinyllm/runs")
        assert status == 200 and time.perf_counter() - started < 5
        (run,) = found["runs"]
        assert run["name"] == "real" and run["notes"] == [] and run["last"]["step"] == 12
        assert [point[0] for point in run["curves"]["train_loss"]] == list(range(1, 13))
        assert [each["step"] for each in run["samples"]] == [0, 5, 10, 12]
        assert all(each["text"].startswith("the ") for each in run["samples"])
        assert run["bytes_per_token"] == pytest.approx(1.0)  # a character is a byte
        assert server.get("v1/models")[0] == 404

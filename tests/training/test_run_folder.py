"""The folder of a run: refusals, damage, which checkpoints are kept, concurrent writers, full disks."""

import errno
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.runs import contents, full_disk, left, records, small, stopped_after, tiny

import tinyllm.training.run_folder
import tinyllm.training.run_log
import tinyllm.training.tasks.pretrain
import tinyllm.training.tasks.text
from tinyllm.cli import _parse, main
from tinyllm.errors import Error
from tinyllm.files import lock, read_sealed, sealed
from tinyllm.training.checkpoint import verify
from tinyllm.training.config import TrainConfig
from tinyllm.training.metrics import best_checkpoint, read_run
from tinyllm.training.output import wrap
from tinyllm.training.picture import plot_losses
from tinyllm.training.run_folder import RunFolder, begun_config
from tinyllm.training.tasks.pretrain import train
from tinyllm.weights.runs import checkpoints, last_checkpoint, step_of

pytestmark = pytest.mark.usefixtures("quick")


# Refusals


def test_a_folder_that_is_not_empty_is_refused_and_unchanged(whole, text, tmp_path):
    config = tiny(text, whole)
    before = contents(config.out)
    with pytest.raises(Error, match=r"not an empty folder: choose another --out") as raised:
        train(replace(config, seed=5), progress=False)
    assert str(config.out) in str(raised.value)
    assert contents(config.out) == before

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / ".hidden").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, said in (("notes", "not an empty folder"), ("file", "is not a folder: choose another --out")):
        with pytest.raises(Error, match=said):
            train(small(text, tmp_path / name), progress=False)
    assert contents(tmp_path) == {os.path.join("notes", ".hidden"): b"mine", "file": b"mine"}


def test_an_empty_folder_is_used(text, tmp_path):
    (tmp_path / "run").mkdir()
    train(small(text, tmp_path / "run", steps=1, warmup=0), progress=False)
    assert last_checkpoint(tmp_path / "run").name == "step-000001"


def test_without_out_each_run_has_a_new_folder(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train(small(text, None, steps=1, warmup=0), progress=False)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["rhyme-1", "rhyme-2"]
    for folder in (tmp_path / "runs").iterdir():
        assert last_checkpoint(folder).name == "step-000001"
        recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))["train"]["out"]
        assert (tmp_path / recorded).samefile(folder)


def test_two_runs_that_start_at_once_without_out_have_two_folders(text, tmp_path, monkeypatch):
    """The second is started when the first has chosen its folder and not made it."""
    monkeypatch.chdir(tmp_path)
    config = small(text, None, steps=1, warmup=0)
    start = tinyllm.training.run_folder.RunFolder.start

    def start_second(run, *args):
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        train(config, progress=False)
        start(run, *args)

    monkeypatch.setattr(tinyllm.training.run_folder.RunFolder, "start", start_second)
    train(config, progress=False)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["rhyme-1", "rhyme-2"]
    for folder in (tmp_path / "runs").iterdir():
        assert begun_config(folder).out == folder.relative_to(tmp_path) or begun_config(folder).out == folder
        assert last_checkpoint(folder).name == "step-000001"


def test_the_command_that_resumes_quotes_its_folder():
    config = TrainConfig()
    words = shlex.split(config.resuming(Path("my runs/a-1")))
    assert words == ["tinyllm", "train", "--resume", "my runs/a-1"]


def test_the_command_that_resumes_has_the_options_that_changed(text, tmp_path):
    out, moved = tmp_path / "run", tmp_path / "a text.txt"
    stopped_after(tiny(text, out, eval_every=3), 2)
    shutil.copy(text, moved)
    changes = dict(text=str(moved), micro_batch=1, checkpoint_minutes=0.0, eval_every=None)
    resumed = replace(begun_config(out), **changes)
    _, said = stopped_after(resumed, 4)
    command = re.match(r"stopped after step 4; tinyllm (.*) continues from", said)[1]
    assert _parse(shlex.split(command)) == resumed
    assert "--eval-every None" in command and "--lr" not in command


def test_resume_refuses_folders_that_are_not_runs(tmp_path, whole, capsys):
    for name in (str(tmp_path), str(tmp_path / "nowhere")):
        assert main(["train", "--resume", name]) == 2
        assert "is not a run folder" in capsys.readouterr().err
    assert main(["train", "--resume"]) == 2
    assert "--resume needs a value" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_resume_names_the_run_of_a_checkpoint(tmp_path, whole, capsys):
    checkpoint = last_checkpoint(whole)
    assert main(["train", "--resume", str(checkpoint)]) == 2
    assert f"{checkpoint} is a checkpoint: give its run, {whole}\n" in capsys.readouterr().err
    model = shutil.copytree(checkpoint, tmp_path / "model")
    assert main(["train", "--resume", str(model)]) == 2
    assert f"{model} is a model's folder" in capsys.readouterr().err
    for name in ("model.safetensors.index.json", "adapter_model.safetensors"):
        model = tmp_path / name.split(".")[0]
        model.mkdir(exist_ok=True)
        (model / "model.safetensors").unlink(missing_ok=True)
        (model / name).write_text("{}")
        with pytest.raises(Error, match="is a model's folder"):
            begun_config(model)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"train": {}}', b"\xff", None])
def test_a_damaged_config_is_refused(whole, tmp_path, damage):
    out = shutil.copytree(whole, tmp_path / "run")
    path = out / "config.json"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"seed": 0', b'"seed": 1') if damage is None else damage)
    with pytest.raises(Error, match=r"config\.json is damaged"):
        begun_config(out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": "6"}, "'steps' is '6'"),
        ({"seed": True}, "'seed' is True"),
        ({"text": None}, "'text' is None"),
        ({"special_tokens": [1]}, r"'special_tokens' is \[1\]"),
        ({"lr": "fast"}, "'lr' is 'fast'"),
        ({"tempo": 3}, "'tempo' is unknown"),
        ({"steps": 0}, "--steps is 0"),
        ({"tokens": 5}, "'tokens' is 5"),
    ],
)
def test_an_invalid_config_with_a_valid_hash_is_refused(whole, tmp_path, change, said):
    about = read_sealed(whole / "config.json")
    del about["sha256"]
    (tmp_path / "config.json").write_bytes(sealed(about | {"train": about["train"] | change}))
    with pytest.raises(Error, match=said):
        begun_config(tmp_path)
    for key in ("train", "versions"):
        (tmp_path / "config.json").write_bytes(sealed({key: about[key]}))
        with pytest.raises(Error, match="was not written by this version"):
            begun_config(tmp_path)


def test_another_simd_level_causes_a_warning(text, tmp_path):
    """Other kernels of NumPy round differently."""
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 2)
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    if not found:
        pytest.skip("this processor has no more than NumPy's baseline")
    command = [sys.executable, "-m", "tinyllm", "train", "--resume", str(out)]
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(found)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(r"warning: simd was .*\b" + found[0], " ".join(said.split()))


def test_another_machine_causes_a_warning(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 2)
    real = tinyllm.training.run_folder.machine
    monkeypatch.setattr(
        tinyllm.training.run_folder, "machine", lambda device: real(device) | {"numpy": "9.9", "threads": 64}
    )
    capsys.readouterr()
    stopped_after(begun_config(out), 4)
    said = capsys.readouterr().out
    assert "warning: numpy was " in said
    assert "and is 9.9; threads was " in said
    stopped_after(begun_config(out), 5)
    assert "warning" not in capsys.readouterr().out  # the last checkpoint was written on this machine


def test_a_checkpoint_without_a_dtype_can_be_resumed(text, tmp_path, monkeypatch, capsys):
    """Older versions wrote such checkpoints."""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(
            tinyllm.training.run_folder.RunFolder,
            "_machine",
            lambda run: tinyllm.training.run_folder.machine("cpu"),
        )
        stopped_after(tiny(text, out), 2)
    assert "dtype" not in verify(last_checkpoint(out))["machine"]
    train(begun_config(out), progress=False)
    assert "warning" not in capsys.readouterr().out


# Output


def test_lines_fit_88_columns_and_no_command_is_broken(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tinyllm.training.tasks.pretrain, "SAMPLE_TOKENS", 300)
    train(small(os.path.relpath(text, tmp_path), Path("run")), progress=False)
    said = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in said) <= 88
    first, last = (
        next(i for i, line in enumerate(said) if line.startswith(s)) for s in ("step    12", "bits")
    )
    written = (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8").split("--- step 12\n")[1]
    assert "".join("".join(said[first + 2 : last]).split()) == "".join(written.split())
    assert said[-5:] == [
        "run: run",
        f"loss curves: {Path('run', 'loss.png')}",
        "next:",
        '  tinyllm generate --run run --prompt "the "',
        "  tinyllm train --from run --steps 12",
    ]


def test_wrap_counts_the_columns_of_wide_characters():
    assert wrap("漢" * 50, 12) == ["漢" * 44, " " * 12 + "漢" * 6]
    assert wrap("a " * 44 + "b", 2) == ["a " * 43 + "a", "  b"]
    assert wrap("x" * 200, 0) == ["x" * 200]  # a path, say, is not broken
    assert wrap("", 2) == [""]


def test_the_picture_is_not_plotted_more_often_than_it_takes_to_train(text, tmp_path, monkeypatch):
    clock, plotted = [0.0], []

    def plot(history, path, *_):
        plotted.append(history[-1]["step"])
        clock[0] += 10  # seconds
        path.write_bytes(b"picture")

    def step(record):
        clock[0] += 3

    monkeypatch.setattr(tinyllm.training.run_log, "plot_losses", plot)
    monkeypatch.setattr(tinyllm.training.run_log.time, "monotonic", lambda: clock[0])
    config = small(text, tmp_path / "run", eval_every=1, checkpoint_minutes=0)
    train(config, progress=False, callback=step)
    assert plotted == [0, 4, 8, 12]  # 4 steps take 12 seconds


@pytest.mark.parametrize("option", ["out", "tokens"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_learned(
    text, tmp_path, monkeypatch, option
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(tinyllm.training.tasks.text, "open_corpus", None)  # a call would fail
    changes = {"out": tmp_path / "run", option: tmp_path / "file" / "x" / "y"}
    with pytest.raises(Error, match=rf"--{option} .*file is not a folder: choose another --{option}"):
        train(replace(small(text, None, tokenizer="bpe:300"), **changes), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["out", "text", "special_tokens"])
def test_a_name_that_the_files_of_the_run_cannot_hold_is_refused(text, tmp_path, option):
    name = str(tmp_path / os.fsdecode(b"a\xff"))
    changes = {"out": tmp_path / "run", option: (name,) if option == "special_tokens" else Path(name)}
    with pytest.raises(Error, match=rf"--{option.replace('_', '-')} .*a\\udcff is not UTF-8"):
        train(replace(small(text, None), **changes), progress=False)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_folder_without_permission_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(Error, match="cannot be written to: choose another --out"):
        train(small(text, tmp_path / "run"), progress=False)


# Damaged checkpoints


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(text, tmp_path, whole, capsys):
    out = tmp_path / "run"
    stopped_after(tiny(text, out, checkpoint_every=1, keep=4), 5)
    flip(out / "step-000005" / "optimizer.safetensors")
    (out / "step-000004" / "model.safetensors").unlink()
    train(begun_config(out), progress=False)
    said = capsys.readouterr().out
    assert f"{out / 'step-000005' / 'optimizer.safetensors'} is damaged" in said
    assert f"{out / 'step-000004' / 'model.safetensors'} cannot be read" in said
    assert f"renamed to {out / 'damaged-step-000005'}" in said
    assert "after step 3 of 6" in said
    assert left(out) == left(whole)
    assert (out / "damaged-step-000005" / "model.safetensors").exists()  # for inspection


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(text, tmp_path):
    out = tmp_path / "run"
    stopped_after(tiny(text, out, checkpoint_every=1), 3)
    for folder in checkpoints(out):
        flip(folder / "checkpoint.json")
    before = sorted(out.iterdir())
    with pytest.raises(Error, match="has no undamaged checkpoint") as raised:
        train(begun_config(out), progress=False)
    for folder in checkpoints(out):
        assert f"{folder / 'checkpoint.json'} is damaged" in str(raised.value)
    assert sorted(out.iterdir()) == before


def test_a_checkpoint_of_another_run_is_refused(text, tmp_path):
    for name, seed in (("run", 0), ("other", 1)):
        stopped_after(tiny(text, tmp_path / name, seed=seed), 2 + seed)
    shutil.copytree(tmp_path / "other" / "step-000003", tmp_path / "run" / "step-000003")
    with pytest.raises(Error, match="step-000003 is a checkpoint of another run"):
        train(begun_config(tmp_path / "run"), progress=False)


def test_damaged_metrics_cause_a_warning_and_the_run_continues(text, tmp_path, capsys):
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 4)
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:2], b"\0" * 10 + b"\n", *lines[3:]])
    (out / "metrics.jsonl").write_bytes(damaged)
    train(begun_config(out), progress=False)
    said = capsys.readouterr().out
    assert "metrics.jsonl is damaged: records up to step 4 are missing" in said
    assert (out / "damaged-metrics.jsonl").read_bytes() == damaged
    assert [record["step"] for record in records(out)] == [0, 1, 4, 5, 6]  # 4 was evaluated again
    _, first, fourth, fifth, _ = read_run(out).along("time")
    assert fourth == first < fifth  # the speed of step 4 is lost, and that of step 5 taken for it
    train(begun_config(out), progress=False)
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_and_the_best_are_kept(text, tmp_path, monkeypatch, keep):
    losses = iter(
        [5.0, 4.0, 3.0, 3.5, 3.2, 3.0, 3.9]
    )  # at steps 0 to 6; of two equal ones the first is the best

    def mean_loss(model, windows, *args):
        return next(losses) if len(windows) < 10 else 1.0

    monkeypatch.setattr(tinyllm.training.tasks.pretrain, "mean_loss", mean_loss)
    out = tmp_path / "run"
    train(tiny(text, out, checkpoint_every=1, eval_every=1, keep=keep), progress=False)
    newest = ["step-000005", "step-000006"][-keep:]
    assert [path.name for path in checkpoints(out)] == ["step-000002", *newest]


def test_an_evaluation_that_is_the_best_so_far_saves_a_checkpoint(text, tmp_path, monkeypatch):
    made = []
    save = tinyllm.training.run_folder.save_checkpoint
    monkeypatch.setattr(
        tinyllm.training.run_folder,
        "save_checkpoint",
        lambda folder, *args: (made.append(folder.name), save(folder, *args)),
    )
    values = [5.0, 6.0, 4.0, 4.5]  # at steps 0, 2, 4, 6
    for every in (100, None):
        losses = iter(values)
        monkeypatch.setattr(
            tinyllm.training.tasks.pretrain,
            "mean_loss",
            lambda model, windows, *_, losses=losses: next(losses) if len(windows) < 10 else 1.0,
        )
        train(tiny(text, tmp_path / str(every), checkpoint_every=every), progress=False)
    assert made == ["step-000004", "step-000006", "step-000006"]  # without --checkpoint-every only at the end


def test_checkpoints_by_time(text, tmp_path, monkeypatch):
    minutes = itertools.count()  # every reading of the clock takes one
    monkeypatch.setattr(tinyllm.training.run_folder.time, "monotonic", lambda: 60.0 * next(minutes))
    monkeypatch.setattr(tinyllm.training.run_log.RunLog, "_plot", lambda log: None)  # reads it too
    made = []
    save = tinyllm.training.run_folder.save_checkpoint
    monkeypatch.setattr(
        tinyllm.training.run_folder,
        "save_checkpoint",
        lambda folder, *args: (made.append(folder.name), save(folder, *args)),
    )
    train(tiny(text, tmp_path / "run", checkpoint_minutes=3.0), progress=False)
    assert made == ["step-000003", "step-000006"]
    made.clear()
    train(tiny(text, tmp_path / "off", checkpoint_minutes=0.0), progress=False)
    assert made == ["step-000006"]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(text, tmp_path, monkeypatch, capsys):
    def refuse(folder):
        raise PermissionError(errno.EACCES, "is in use")

    monkeypatch.setattr(tinyllm.training.run_folder, "remove_checkpoint", refuse)
    train(tiny(text, tmp_path / "run", checkpoint_every=2), progress=False)
    assert "cannot be removed" in capsys.readouterr().out
    assert len(checkpoints(tmp_path / "run")) == 3


def test_a_picture_is_replaced_only_by_a_complete_one(text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 2)

    def half(figure, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    pytest.importorskip("matplotlib")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    monkeypatch.setattr(tinyllm.training.run_log, "plot_losses", plot_losses)
    with pytest.raises(OSError, match=r"No space left.*--resume"):
        train(begun_config(out), progress=False)
    assert (out / "loss.png").read_bytes() == b"picture"
    assert not list(out.glob(".*"))
    assert last_checkpoint(out).name == "step-000004"  # of the evaluation, although no checkpoint was due


def test_the_time_left_is_that_of_the_steps_since_the_start(monkeypatch):
    run = RunFolder.__new__(RunFolder)
    run.task = SimpleNamespace(config=SimpleNamespace(steps=10))
    run._started = 2, 100.0
    monkeypatch.setattr(tinyllm.training.run_folder.time, "perf_counter", lambda: 108.0)
    for run.step, seconds in ((2, None), (4, 8 / 2 * 6), (9, 8 / 7), (10, None)):
        assert run._seconds_left() == seconds


def test_weights_of_an_update_without_a_record_are_not_those_of_the_last_one():
    run, updates = RunFolder.__new__(RunFolder), {"wte.weight": 3}
    run.optimizer = SimpleNamespace(state_dict=lambda: {"t": dict(updates)})
    run.log, run._updates = SimpleNamespace(history=[{"step": 3}]), dict(updates)
    assert run.is_between_updates()
    updates["wte.weight"] += 1
    assert not run.is_between_updates()
    run.log.history, run._updates = [], dict(updates)  # nothing was recorded
    assert not run.is_between_updates()


# Two processes, full disks


def test_a_second_writer_is_refused(text, tmp_path, whole):
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 2)
    held = lock(out / "lock", "")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(Error, match="another process is writing the run in"):
        train(begun_config(out), progress=False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    held.release()
    train(begun_config(out), progress=False)
    assert left(out) == left(whole)


def test_two_new_runs_in_one_folder_are_refused(text, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    held = lock(out / "lock", "")
    with pytest.raises(Error, match="another process is writing the run in"):
        train(tiny(text, out), progress=False)
    held.release()
    train(tiny(text, out), progress=False)  # a lock file that is not held is ignored
    with pytest.raises(Error, match="not an empty folder"):
        train(tiny(text, out), progress=False)


def test_a_run_that_another_process_started_meanwhile_is_not_overwritten(text, tmp_path, monkeypatch):
    def later(folder):
        (folder.folder / "config.json").write_text("another run's")
        take_lock(folder)

    take_lock = RunFolder._take_lock
    monkeypatch.setattr(RunFolder, "_take_lock", later)
    with pytest.raises(Error, match="not an empty folder"):
        train(tiny(text, tmp_path / "run"), progress=False)
    assert (tmp_path / "run" / "config.json").read_text() == "another run's"


def test_a_disk_too_full_for_a_checkpoint_stops_the_run_which_can_resume(
    text, tmp_path, monkeypatch, capsys, whole
):
    free = [10**6]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    out = tmp_path / "run"
    with pytest.raises(OSError, match=r"has 1\.0 MB left; a checkpoint needs 0\.0 MB.* choose another --out"):
        train(tiny(text, out), progress=False)
    assert [path.name for path in out.iterdir()] == ["lock"]
    free[0] = 10**9

    def fill(record):
        if record["step"] == 4:
            free[0] = 10**6

    with pytest.raises(
        OSError,
        match=r"free some space or make the folder writable, then continue with tinyllm train --resume",
    ):
        train(tiny(text, out, checkpoint_every=2), progress=False, callback=fill)
    assert [path.name for path in checkpoints(out)] == ["step-000002"]
    capsys.readouterr()
    assert main(["train", "--resume", str(out)]) == 1
    err = capsys.readouterr().err
    assert str(out) in err
    assert err.count("\n") == 1
    free[0] = 10**9
    assert main(["train", "--resume", str(out)]) == 0
    assert left(out) == left(whole)


def test_a_disk_that_fills_cuts_no_record_and_the_run_can_resume(text, tmp_path, whole):
    """The record of step 4, or its sample, has no space; those before are complete."""
    for name, samples in (("metrics.jsonl", 3), ("samples.txt", 2)):
        out = tmp_path / name

        def fill(record, out=out, name=name):
            if record["step"] == 3:
                stack.enter_context(full_disk((out / name).stat().st_size + 10))

        with (
            ExitStack() as stack,
            pytest.raises(OSError, match=rf"{name} cannot be written.* --resume {out}$"),
        ):
            train(tiny(text, out, checkpoint_every=2), progress=False, callback=fill)
        assert [r["step"] for r in records(out)] == list(range(4))
        generated = (out / "samples.txt").read_bytes()
        assert generated.count(b"--- step") == samples
        assert (whole / "samples.txt").read_bytes().startswith(generated)
        train(begun_config(out), progress=False)
        assert left(out) == left(whole)


@pytest.mark.parametrize("kept", [0, 1])
def test_the_best_checkpoint_is_kept_although_the_metrics_are_lost(text, tmp_path, kept):
    """The evaluations after the first ``kept`` records are taken from the checkpoints."""
    out = tmp_path / "run"
    changes = dict(lr=10.0, warmup=5, checkpoint_every=1, eval_every=1, keep=9)  # it diverges
    stopped_after(tiny(text, out, **changes), 4)
    losses = {record["step"]: record["val_loss"] for record in records(out)[1:]}
    assert min(losses, key=losses.get) == 1 and [*map(step_of, checkpoints(out))] == [*losses]
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join(lines[:kept]))
    train(replace(begun_config(out), keep=1), progress=False)
    assert {r["step"]: r["val_loss"] for r in records(out)[kept:] if r["step"] in losses} == losses
    assert [*map(step_of, checkpoints(out))] == [1, 6]
    assert best_checkpoint(out) == checkpoints(out)[0]
    read_run(out)  # the records are whole


def test_a_run_whose_tokenizer_cannot_be_written_leaves_an_empty_folder(text, tmp_path, whole):
    out = tmp_path / "run"
    with full_disk(10), pytest.raises(OSError, match=r"File too large.* choose another --out"):
        train(tiny(text, out), progress=False)
    assert [path.name for path in out.iterdir()] == ["lock"]
    train(tiny(text, out), progress=False)
    assert left(out) == left(whole)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_error_during_a_checkpoint_stops_the_run_which_can_resume(
    text, tmp_path, monkeypatch, code, whole
):
    out = tmp_path / "run"
    rename = os.replace

    def refuse(a, b):
        if str(b).endswith("step-000004"):
            raise OSError(code, os.strerror(code))
        rename(a, b)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        train(tiny(text, out, checkpoint_every=2), progress=False)
    assert str(out / "step-000004") in str(raised.value)
    assert [path.name for path in checkpoints(out)] == ["step-000002"]
    assert not list(out.glob(".*"))
    monkeypatch.undo()
    train(begun_config(out), progress=False)
    assert left(out) == left(whole)

"""A run that was stopped, killed or refused goes on as if nothing had happened, bit for bit."""

import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tinyllm.training.loop
import tinyllm.training.run_folder
from parity.durability.survive import left
from tinyllm import GPT2, Llama, load_model
from tinyllm.cli import main
from tinyllm.errors import Error
from tinyllm.files import lock, read_sealed, sealed
from tinyllm.training.checkpoint import checkpoints, verify
from tinyllm.training.config import TrainConfig, check_continues
from tinyllm.training.loop import train
from tinyllm.training.run_folder import begun_config, last_checkpoint

RHYME = "the cat sat on the mat. "


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without what takes most of the time of so small a run: pictures, the GEMM rate, and a busy disk."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)  # test_checkpoint.py sees to that
        patched.setattr(
            tinyllm.training.run_folder, "plot_losses", lambda history, path, *_: path.write_bytes(b"picture")
        )
        patched.setattr(tinyllm.training.loop, "_best_gemm_rate", lambda dtype: 1e9)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text(RHYME * 12, encoding="utf-8")
    return path


def tiny(text, out, **changes):
    """Six steps of everything that could go wrong when they are interrupted, evaluated at 0, 2, 4 and 6.

    Dropout, micro-batches of a batch, 63 overlapping windows in 3 batches: so the second epoch begins at
    step 3, its order shuffled again, and the last batch of an epoch is a short one.
    """
    config = TrainConfig(
        out=out,
        text=str(text),
        tokenizer="char",
        n_layer=1,
        n_head=2,
        n_embd=8,
        context=8,
        stride=4,
        batch=24,
        micro_batch=8,
        steps=6,
        lr=1e-2,
        warmup=2,
        dropout=0.2,
        eval_every=2,
        eval_windows=20,
        prompt="the ",
    )
    return replace(config, **changes)


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class Alarm:
    """A signal at the n-th call of the model's loss: in the middle of a step, or of an evaluation."""

    def __init__(self, model, number, after):
        self.model, self.number, self.left = model, number, after

    def __enter__(self):
        loss = self.model.loss

        def counted(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(self.number)
            return loss(*args, **kwargs)

        self.patch = mock.patch.object(self.model, "loss", counted)
        self.patch.__enter__()
        return self

    def __exit__(self, *_):
        self.patch.__exit__(None, None, None)


def stopped_after(config, step, number=signal.SIGINT):
    """Train until a signal arrives while the record of this step is logged."""

    def ring(record):
        if record["step"] == step:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt) as raised:
        train(config, progress=False, callback=ring)
    return raised.value.args


# Bit for bit


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that was never interrupted; nobody writes into it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(text, out), progress=False)
    return out


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_stopped_after_every_step(text, tmp_path, arch):
    config = tiny(text, tmp_path / "whole", arch=arch)
    model = train(config, progress=False)
    out = tmp_path / "run"
    received, said = stopped_after(replace(config, out=out), 0, signal.SIGTERM)
    assert received == signal.SIGTERM
    assert said == f"stopped after step 0; tinyllm train --resume {out} goes on from {out / 'step-000000'}"
    for step in range(1, 6):
        stopped_after(begun_config(out), step)
        assert last_checkpoint(out).name == f"step-{step:06}"
        assert verify(last_checkpoint(out))["step"] == step
        assert [record["step"] for record in records(out)] == list(range(step + 1))
    resumed = train(begun_config(out), progress=False)
    assert left(out) == left(tmp_path / "whole")
    for name, array in model.state_dict().items():
        assert array.tobytes() == resumed.state_dict()[name].tobytes()


DRAWN = dict(
    arch=st.sampled_from(["gpt2", "llama"]),
    dtype=st.sampled_from(["float32", "float64"]),
    micro_batch=st.sampled_from([None, 4, 12]),
    dropout=st.sampled_from([0.0, 0.3]),
    stride=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
    eval_every=st.sampled_from([None, 1, 3]),
    checkpoint_every=st.sampled_from([None, 1, 4]),
)


@settings(max_examples=6)
@given(options=st.fixed_dictionaries(DRAWN), alarms=st.lists(st.integers(1, 30), min_size=1, max_size=4))
@example(options=dict(eval_every=1), alarms=[1, 1, 1, 1])  # in the first evaluation, again and again
@example(options=dict(eval_every=1), alarms=[1, 6])  # in it, and in step 1, after it was done again
@example(options=dict(arch="llama", eval_every=2), alarms=[12, 13, 14, 15])
def test_stopped_anywhere(text, tmp_path_factory, options, alarms):
    folder = tmp_path_factory.mktemp("anywhere")
    config = tiny(text, folder / "whole", **options)
    train(config, progress=False)
    out = folder / "run"
    config, model = replace(config, out=out), GPT2 if config.arch == "gpt2" else Llama
    for alarm in alarms:
        try:
            with Alarm(model, signal.SIGTERM, alarm):
                train(config, progress=False)
        except KeyboardInterrupt as stop:
            assert stop.args[0] == signal.SIGTERM
        config = begun_config(out)
    train(config, progress=False)
    assert left(out) == left(folder / "whole")


def test_killed_before_the_first_checkpoint(text, tmp_path, whole):
    out = tmp_path / "run"

    def killed(record):
        if record["step"] == 3:
            raise ZeroDivisionError  # nobody catches it: what is on the disk is what a kill would leave

    with pytest.raises(ZeroDivisionError):
        train(tiny(text, out), progress=False, callback=killed)
    assert checkpoints(out) == []
    assert len(records(out)) == 4
    train(begun_config(out), progress=False)
    assert left(out) == left(whole)


def test_killed_between_a_checkpoint_and_the_next(text, tmp_path, whole):
    """And in the middle of a line, of a sample, of a checkpoint, of a removal and of a picture."""
    out = tmp_path / "run"

    def killed(record):
        if record["step"] == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny(text, out, checkpoint_every=4), progress=False, callback=killed)
    assert last_checkpoint(out).name == "step-000004"
    assert [record["step"] for record in records(out)] == list(range(6))
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 6, "tok')
    with open(out / "samples.txt", "ab") as file:
        file.write(b"--- step 4\nthe\n--- step 6\n\xc3")
    for name in (".saving-step-000006", ".removing-step-000001"):
        (out / name).mkdir()
        (out / name / "model.safetensors").write_bytes(b"half")
    (out / ".saving-loss.png").write_bytes(b"half")
    train(begun_config(out), progress=False)
    assert left(out) == left(whole)
    assert not list(out.glob(".*"))


def test_a_run_of_a_token_file_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyllm.data.token_file.PIECE_CHARACTERS", 100)
    monkeypatch.setattr("tinyllm.data.corpus.PIECE_CHARACTERS", 100)
    (tmp_path / "text.txt").write_text(RHYME * 60, encoding="utf-8")
    config = tiny(tmp_path / "text.txt", tmp_path / "whole", tokenizer="bpe:262", in_memory=0)
    train(config, progress=False)
    stopped_after(replace(config, out=tmp_path / "run"), 4)
    monkeypatch.setattr("tinyllm.training.loop.train_bpe", None)  # nothing is learned again
    train(begun_config(tmp_path / "run"), progress=False)
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def test_a_finished_run_says_so(text, tmp_path, whole, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    before = left(out)
    assert main(["train", "--resume", str(out)]) == 0
    assert capsys.readouterr().out == f"{out} is finished: its 6 steps are done\n"
    assert left(out) == before
    model = train(begun_config(out), progress=False)
    assert model.state_dict().keys() == load_model(last_checkpoint(out)).state_dict().keys()


def test_stopped_in_the_last_evaluation(text, tmp_path, whole):
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 5)
    with Alarm(GPT2, signal.SIGINT, 3 + 2), pytest.raises(KeyboardInterrupt):
        train(begun_config(out), progress=False)
    assert last_checkpoint(out).name == "step-000006"
    assert "val_loss" not in records(out)[-1]
    train(begun_config(out), progress=False)
    assert left(out) == left(whole)


# What may be asked otherwise


def test_options_that_change_no_number(text, tmp_path, whole):
    elsewhere = shutil.copy(text, tmp_path / "moved.txt")
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 3)
    changes = dict(text=str(elsewhere), eval_every=1, eval_windows=3, prompt="a", keep=3)
    changes |= dict(checkpoint_every=1, checkpoint_minutes=0.0, skip_nonfinite=2, tokens=tmp_path)
    train(replace(begun_config(out), **changes), progress=False)
    assert [path.name for path in checkpoints(out)] == ["step-000004", "step-000005", "step-000006"]
    ours, theirs = left(out), left(whole)
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["optimizer.safetensors"] == theirs["optimizer.safetensors"]
    losses = [[record.get("train_loss") for record in found["metrics.jsonl"]] for found in (ours, theirs)]
    assert losses[0] == losses[1]


OTHERWISE = dict(
    in_memory=1,
    tokenizer="bpe:300",
    arch="llama",
    special="text",
    special_tokens=("<|a|>",),
    n_layer=2,
    n_head=1,
    n_embd=16,
    context=4,
    stride=None,
    batch=16,
    steps=7,
    lr=1e-3,
    initial_lr=1e-5,
    min_lr=1e-5,
    warmup=1,
    weight_decay=0.0,
    clip=2.0,
    dropout=0.1,
    tie_head=False,
    qkv_bias=False,
    head_bias=True,
    init="torch",
    profile=True,
    seed=1,
    dtype="float64",
    n_kv_head=1,
)


def test_every_option_is_either_free_or_refused(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    before = left(out)
    config = begun_config(out)
    elsewhere = tinyllm.training.config.ELSEWHERE - {"dtype"}  # of which float64 is refused
    assert OTHERWISE.keys() == config.to_json().keys() - tinyllm.training.config.FREE - elsewhere - {"out"}
    for name, value in OTHERWISE.items():
        both = {"arch": "llama"} if name == "n_kv_head" else {}
        with pytest.raises(Error, match="bit for bit") as raised:
            train(replace(config, **{name: value}, **both), progress=False)
        option = f"--{name.replace('_', '-')}"
        assert f"{option} {getattr(config, name)}" in str(raised.value)
        assert f"{option} {value}" in str(raised.value)
    with pytest.raises(Error, match=re.escape(f"--out {out}, not --out elsewhere")):
        train(replace(config, out="elsewhere"), progress=False)
    with pytest.raises(Error, match="--seed 0, --dtype float32, not --seed 1, --dtype float64"):
        train(replace(config, seed=1, dtype="float64"), progress=False)
    assert left(out) == before


@pytest.mark.parametrize(
    ("begun", "asked", "same"),
    [
        ("float32", "bfloat16", True),
        ("bfloat16", "float32", True),
        ("float16", "tf32", True),
        ("float64", "float32", False),
        ("float16", "float64", False),
        ("float64", "float64", True),
    ],
)
def test_products_may_be_of_another_type_and_parameters_not(begun, asked, same):
    begun, asked = TrainConfig(dtype=begun), TrainConfig(dtype=asked, device="cuda:1", micro_batch=4)
    if same:
        check_continues(begun, asked)
        return
    with pytest.raises(
        Error, match=f"begun with --dtype {begun.dtype}, not --dtype {asked.dtype}: a run goes on"
    ):
        check_continues(begun, asked)


def test_whole_numbers_where_others_may_stand():
    config = TrainConfig(lr=1, gpu_memory=2)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_smaller_micro_batches_from_the_middle_on(text, tmp_path, capsys):
    """The same gradients, whatever is drawn at once: without dropout it is the same run, but for rounding."""
    config = tiny(text, tmp_path / "whole", dropout=0.0, dtype="float64")
    train(config, progress=False)
    out = tmp_path / "run"
    stopped_after(replace(config, out=out), 3)
    capsys.readouterr()
    train(replace(begun_config(out), micro_batch=2, gpu_memory=None), progress=False)
    said = "warning: micro-batch was 8 and is 2: the numbers may differ from now on\n"
    assert said in capsys.readouterr().out
    assert val_losses(out) == pytest.approx(val_losses(tmp_path / "whole"), rel=1e-9)


def test_at_the_command_line(text, tmp_path, whole, capsys):
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 2)
    for args, said in [
        (["--preset", "small"], "leave --preset away"),
        (["--lr", "0.5"], "begun with --lr 0.01, not --lr 0.5"),
        (["--out", "x"], "--out x"),
    ]:
        capsys.readouterr()
        assert main(["train", "--resume", str(out), *args]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert main(["train", f"--resume={out}", "--keep", "1"]) == 0
    assert left(out) == left(whole)
    assert len(checkpoints(out)) == 1


def test_what_is_no_run(tmp_path, whole, capsys):
    for name in (str(tmp_path), str(tmp_path / "nowhere")):
        assert main(["train", "--resume", name]) == 2
        assert "is not a run folder" in capsys.readouterr().err
    assert main(["train", "--resume"]) == 2
    assert "--resume is empty" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"train": {}}', b"\xff", None])
def test_a_damaged_config(whole, tmp_path, damage):
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
def test_a_config_that_is_sealed_and_wrong(whole, tmp_path, change, said):
    about = read_sealed(whole / "config.json")
    del about["sha256"]
    (tmp_path / "config.json").write_bytes(sealed(about | {"train": about["train"] | change}))
    with pytest.raises(Error, match=said):
        begun_config(tmp_path)
    (tmp_path / "config.json").write_bytes(sealed({"train": about["train"]}))
    with pytest.raises(Error, match="not of a run of this version"):
        begun_config(tmp_path)


def test_another_text_or_tokenizer(text, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(RHYME * 12, encoding="utf-8")
    out = tmp_path / "run"
    stopped_after(tiny(path, out), 2)
    tokenizer = (out / "tinyllm_tokenizer.json").read_bytes()
    (out / "tinyllm_tokenizer.json").write_bytes(tokenizer.replace(b"ce", b"ec"))
    with pytest.raises(Error, match="is not the run's own any more"):
        train(begun_config(out), progress=False)
    (out / "tinyllm_tokenizer.json").write_bytes(tokenizer)
    path.write_text(RHYME * 12 + "!", encoding="utf-8")
    with pytest.raises(Error, match=r"text\.txt is not the one that the run was begun with") as raised:
        train(begun_config(out), progress=False)
    assert begun_config(out).text in str(raised.value)
    train(replace(begun_config(out), text=str(text)), progress=False)
    assert last_checkpoint(out).name == "step-000006"


def test_another_machine_is_a_warning(text, tmp_path, monkeypatch, capsys):
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
    assert "warning" not in capsys.readouterr().out  # the last checkpoint is of this machine


def test_a_checkpoint_that_does_not_say_its_dtype(text, tmp_path, monkeypatch, capsys):
    """As those of older versions."""
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


# Damaged checkpoints


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(text, tmp_path, whole, capsys):
    out = tmp_path / "run"
    stopped_after(tiny(text, out, checkpoint_every=1, keep=4), 5)
    flip(out / "step-000005" / "optimizer.safetensors")
    (out / "step-000004" / "model.safetensors").unlink()
    train(begun_config(out), progress=False)
    said = capsys.readouterr().out
    assert f"{out / 'step-000005' / 'optimizer.safetensors'} is damaged" in said
    assert f"{out / 'step-000004' / 'model.safetensors'} cannot be read" in said
    assert f"the checkpoint is now {out / 'damaged-step-000005'}, and the one before is taken" in said
    assert "going on after step 3 of 6" in said
    assert left(out) == left(whole)
    assert (out / "damaged-step-000005" / "model.safetensors").exists()  # whoever wants to look into it can


def test_no_whole_checkpoint_is_left(text, tmp_path):
    out = tmp_path / "run"
    stopped_after(tiny(text, out, checkpoint_every=1), 3)
    for folder in checkpoints(out):
        flip(folder / "checkpoint.json")
    before = sorted(out.iterdir())
    with pytest.raises(Error, match="has no whole checkpoint") as raised:
        train(begun_config(out), progress=False)
    for folder in checkpoints(out):
        assert f"{folder / 'checkpoint.json'} is damaged" in str(raised.value)
    assert sorted(out.iterdir()) == before


def test_a_checkpoint_of_another_run(text, tmp_path):
    for name, seed in (("run", 0), ("other", 1)):
        stopped_after(tiny(text, tmp_path / name, seed=seed), 2 + seed)
    shutil.copytree(tmp_path / "other" / "step-000003", tmp_path / "run" / "step-000003")
    with pytest.raises(Error, match="step-000003 is a checkpoint of another run"):
        train(begun_config(tmp_path / "run"), progress=False)


def test_damaged_metrics_are_said_and_no_reason_to_stop(text, tmp_path, capsys):
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 4)
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join([*lines[:2], b"\0" * 10 + b"\n", *lines[3:]]))
    train(begun_config(out), progress=False)
    assert "metrics.jsonl is damaged: not all records up to step 4 are there" in capsys.readouterr().out
    assert [record["step"] for record in records(out)] == [0, 1, 4, 5, 6]  # 4 was evaluated again


# When checkpoints are made, and which stay


def val_losses(out):
    return {record["step"]: record["val_loss"] for record in records(out) if "val_loss" in record}


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_and_the_best_are_kept(text, tmp_path, monkeypatch, keep):
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.2, 3.0, 3.9])  # at steps 0 to 6; the first of two best stays

    def evaluate(model, windows, *args):
        return next(losses) if len(windows) < 10 else 1.0

    monkeypatch.setattr(tinyllm.training.loop, "evaluate", evaluate)
    out = tmp_path / "run"
    train(tiny(text, out, checkpoint_every=1, eval_every=1, keep=keep), progress=False)
    newest = ["step-000005", "step-000006"][-keep:]
    assert [path.name for path in checkpoints(out)] == ["step-000002", *newest]


def test_an_evaluation_that_is_the_best_so_far_makes_a_checkpoint(text, tmp_path, monkeypatch):
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
            tinyllm.training.loop,
            "evaluate",
            lambda model, windows, *_, losses=losses: next(losses) if len(windows) < 10 else 1.0,
        )
        train(tiny(text, tmp_path / str(every), checkpoint_every=every), progress=False)
    assert made == ["step-000004", "step-000006", "step-000006"]  # without --checkpoint-every only the end


def test_checkpoints_by_the_clock(text, tmp_path, monkeypatch):
    minutes = itertools.count()  # every look at the clock takes one
    monkeypatch.setattr(tinyllm.training.run_folder.time, "monotonic", lambda: 60.0 * next(minutes))
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


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(text, tmp_path, monkeypatch, capsys):
    def refuse(folder):
        raise PermissionError(errno.EACCES, "is being looked at")

    monkeypatch.setattr(tinyllm.training.run_folder, "remove_checkpoint", refuse)
    train(tiny(text, tmp_path / "run", checkpoint_every=2), progress=False)
    assert "cannot be removed" in capsys.readouterr().out
    assert len(checkpoints(tmp_path / "run")) == 3


def test_a_picture_is_replaced_when_the_new_one_is_whole(text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 2)

    def half(history, path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tinyllm.training.run_folder, "plot_losses", half)
    with pytest.raises(OSError, match="No space left"):
        train(begun_config(out), progress=False)
    assert (out / "loss.png").read_bytes() == b"picture"


# Two processes, full disks


def test_the_second_writer_is_refused(text, tmp_path, whole):
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


def test_two_new_runs_in_one_folder(text, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    held = lock(out / "lock", "")
    with pytest.raises(Error, match="another process is writing the run in"):
        train(tiny(text, out), progress=False)
    held.release()
    train(tiny(text, out), progress=False)  # a lock that nobody holds is nothing
    with pytest.raises(Error, match="not an empty folder"):
        train(tiny(text, out), progress=False)


def test_no_room_for_a_checkpoint(text, tmp_path, monkeypatch, capsys, whole):
    free = [10**6]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    out = tmp_path / "run"
    with pytest.raises(OSError, match=r"has 1 MB left and a checkpoint needs 34 MB: make room, or choose"):
        train(tiny(text, out), progress=False)
    assert [path.name for path in out.iterdir()] == ["lock"]
    free[0] = 10**9

    def fill(record):
        if record["step"] == 4:
            free[0] = 10**6

    with pytest.raises(OSError, match=r"34 MB: see to the disk, then tinyllm train --resume .* goes on"):
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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_a_checkpoint(text, tmp_path, monkeypatch, code, whole):
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


# Signals


def test_a_second_signal_does_not_tear_the_checkpoint(text, tmp_path, monkeypatch, whole):
    out = tmp_path / "run"
    save = tinyllm.training.run_folder.save_checkpoint

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        save(*args)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(tinyllm.training.run_folder, "save_checkpoint", interrupted)
    assert stopped_after(tiny(text, out), 3, signal.SIGTERM)[0] == signal.SIGTERM
    verify(out / "step-000003")
    monkeypatch.undo()
    train(begun_config(out), progress=False)
    assert left(out) == left(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_between_micro_batches(text, tmp_path, number, code, whole, capsys):
    """Step 2 is abandoned after the second of its three micro-batches; no evaluation is run for it."""
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 1)
    with Alarm(GPT2, number, 2) as alarm:
        assert main(["train", "--resume", str(out)]) == code
    assert alarm.left == 0  # the third was not begun
    assert capsys.readouterr().err.splitlines()[-1].startswith("tinyllm: stopped after step 1; ")
    assert [record["step"] for record in records(out)] == [0, 1]
    assert list(val_losses(out)) == [0]
    train(begun_config(out), progress=False)
    assert left(out) == left(whole)


# What is not finite


def broken_at(steps):
    """The loss of these steps (counted from 0) is nan in its last micro-batch."""
    at = {(step, 2 if step % 3 < 2 else 1) for step in steps}
    address = {}
    manual_seed = tinyllm.training.loop.manual_seed
    loss = GPT2.loss

    def note(seed, step, number):
        address["now"] = (step, number)
        manual_seed(seed, step, number)

    def broken(model, *args, **kwargs):
        found = loss(model, *args, **kwargs)
        return found * math.nan if model.training and address["now"] in at else found

    patches = pytest.MonkeyPatch()
    patches.setattr(tinyllm.training.loop, "manual_seed", note)
    patches.setattr(GPT2, "loss", broken)
    return patches


def test_not_finite_stops_before_the_update_and_keeps_the_batch(text, tmp_path):
    out = tmp_path / "run"
    patches = broken_at({2})
    try:
        with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan") as raised:
            train(tiny(text, out), progress=False)
    finally:
        patches.undo()
    path = out / "nonfinite-step-3.json"
    assert str(path) in str(raised.value)
    assert str(last_checkpoint(out)) in str(raised.value)
    assert last_checkpoint(out).name == "step-000002"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["step"], found["loss"], found["grad_norm"]) == (3, "nan", "nan")
    config = begun_config(out)
    batches = tinyllm.training.loop.Batches(
        tinyllm.training.loop.load_data(config).train, config.batch, config.seed
    )
    ids, targets = batches.at(2)
    assert found["ids"] == ids.tolist()
    assert found["targets"] == targets.tolist()
    assert len(found["text"]) == len(ids)
    assert all(line in RHYME * 2 for line in found["text"])
    assert 0 < found["lr"] <= config.lr


def test_skipped_steps_leave_the_weights_alone_and_resume_bit_for_bit(text, tmp_path):
    pytest.importorskip("matplotlib")
    config = tiny(text, tmp_path / "whole", skip_nonfinite=2)
    patches = broken_at({2, 3, 5})
    try:
        train(config, progress=False)
        out = tmp_path / "run"
        stopped_after(replace(config, out=out), 3)
        before = (last_checkpoint(out) / "model.safetensors").read_bytes()
        stopped_after(begun_config(out), 4)
        after = (last_checkpoint(out) / "model.safetensors").read_bytes()
        train(begun_config(out), progress=False)
    finally:
        patches.undo()
    assert after == before
    assert left(out) == left(tmp_path / "whole")
    for record in records(out):
        skipped = record["step"] in (3, 4, 6)
        assert ("skipped" in record) == skipped
        assert ("train_loss" in record) == (record["step"] > 0 and not skipped)
        assert not skipped or "the loss is nan" in record["skipped"]
    assert set(verify(last_checkpoint(out))["t"].values()) == {3}
    assert {path.name for path in out.glob("nonfinite-*")} == {f"nonfinite-step-{n}.json" for n in (3, 4, 6)}
    assert main(["plot", str(out), "--out", str(tmp_path / "x.png")]) == 0


def test_one_more_in_a_row_than_is_tolerated(text, tmp_path):
    out = tmp_path / "run"
    patches = broken_at({1, 2, 3})
    try:
        stopped_after(tiny(text, out, skip_nonfinite=2), 2)
        with pytest.raises(FloatingPointError, match="step 4: "):  # the row goes on where the run does
            train(begun_config(out), progress=False)
        assert [record["step"] for record in records(out)] == [0, 1, 2, 3]
        assert last_checkpoint(out).name == "step-000003"
        train(replace(begun_config(out), skip_nonfinite=3), progress=False)
    finally:
        patches.undo()
    assert last_checkpoint(out).name == "step-000006"

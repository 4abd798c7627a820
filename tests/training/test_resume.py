"""A run that was stopped or killed resumes with bitwise identical results."""

import json
import math
import shutil
import signal
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.runs import RHYME, Alarm, Killed, left, records, stopped_after, tiny, val_losses

import tinyllm.training.run_folder
import tinyllm.training.step
from tinyllm import GPT2, Llama, load_model
from tinyllm.cli import main
from tinyllm.data.batches import Batches
from tinyllm.errors import Error
from tinyllm.training.checkpoint import verify
from tinyllm.training.run_folder import begun_config
from tinyllm.training.tasks.pretrain import Pretraining, train
from tinyllm.training.tasks.text import load_data
from tinyllm.weights.runs import checkpoints, last_checkpoint

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(("arch", "optimizer"), [("gpt2", "adamw"), ("gpt2", "muon"), ("llama", "adamw")])
def test_a_run_stopped_after_every_step_resumes(text, tmp_path, arch, optimizer):
    config = tiny(text, tmp_path / "whole", arch=arch, optimizer=optimizer)
    model = train(config, progress=False)
    out = tmp_path / "run"
    received, said = stopped_after(replace(config, out=out), 0, signal.SIGTERM)
    assert received == signal.SIGTERM
    assert said == f"stopped after step 0; tinyllm train --resume {out} continues from {out / 'step-000000'}"
    for step in range(1, 6):
        stopped_after(begun_config(out), step)
        assert last_checkpoint(out).name == f"step-{step:06}"
        assert verify(last_checkpoint(out))["step"] == step
        assert [record["step"] for record in records(out)] == list(range(step + 1))
    resumed = train(begun_config(out), progress=False)
    assert left(out) == left(tmp_path / "whole")
    for name, array in model.state_dict().items():
        assert array.tobytes() == resumed.state_dict()[name].tobytes()


def test_a_run_stopped_while_its_folder_is_made_resumes(text, tmp_path, monkeypatch):
    out, save = tmp_path / "run", Pretraining.save

    def ring_after(task, folder):
        save(task, folder)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Pretraining, "save", ring_after)
    with pytest.raises(KeyboardInterrupt) as raised:
        train(tiny(text, out), progress=False)
    assert raised.value.args[1].startswith(f"stopped after step 0; tinyllm train --resume {out} continues")
    train(begun_config(out), progress=False)
    assert [record["step"] for record in records(out)] == list(range(7))


OPTIONS = dict(
    arch=st.sampled_from(["gpt2", "llama"]),
    optimizer=st.sampled_from(["adamw", "muon"]),
    dtype=st.sampled_from(["float32", "float64"]),
    micro_batch=st.sampled_from([None, 4, 12]),
    dropout=st.sampled_from([0.0, 0.3]),
    token_splits=st.sampled_from([0.0, 0.3]),
    token_noise=st.sampled_from([0.0, 0.3]),
    stride=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
    eval_every=st.sampled_from([None, 1, 3]),
    checkpoint_every=st.sampled_from([None, 1, 4]),
)


@settings(max_examples=6)
@given(options=st.fixed_dictionaries(OPTIONS), alarms=st.lists(st.integers(1, 30), min_size=1, max_size=4))
@example(options=dict(eval_every=1), alarms=[1, 1, 1, 1])  # in the first evaluation, four times
@example(options=dict(eval_every=1), alarms=[1, 6])  # in it, and after it was repeated in step 1
@example(options=dict(arch="llama", eval_every=2), alarms=[12, 13, 14, 15])
def test_a_run_stopped_anywhere_resumes(text, tmp_path_factory, options, alarms):
    folder = tmp_path_factory.mktemp("anywhere")
    if options.get("token_splits"):  # of tokens that were merged
        options["tokenizer"] = "bpe:262"
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


def test_a_run_killed_before_the_first_checkpoint_starts_again(text, tmp_path, whole):
    out = tmp_path / "run"

    def killed(record):
        if record["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        train(tiny(text, out), progress=False, callback=killed)
    assert checkpoints(out) == []
    assert len(records(out)) == 4
    train(begun_config(out), progress=False)
    assert left(out) == left(whole)


def test_a_run_killed_between_two_checkpoints_resumes(text, tmp_path, whole):
    """With a record, a sample, a checkpoint, a removal and a picture half done."""
    out = tmp_path / "run"

    def killed(record):
        if record["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
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


@pytest.mark.parametrize("where", ["a step", "an evaluation", "the last evaluation", "a callback"])
@pytest.mark.parametrize("error", [Error, ZeroDivisionError, SystemExit])
def test_whatever_ends_the_steps_leaves_the_last_complete_one(
    text, tmp_path, whole, monkeypatch, capsys, where, error
):
    out, loss, calls = tmp_path / "run", GPT2.loss, []
    # An evaluation calls it four times and a step three times; the evaluations are at 0, 2, 4 and 6.
    fails_at = {"a step": 4 + 3 + 2, "an evaluation": 4 + 6 + 2}.get(where)

    def failing(model, *args, **kwargs):
        calls.append(model.training)
        last = where == "the last evaluation" and len(calls) > 20 and not model.training
        if len(calls) == fails_at or (last and records(out)[-1]["step"] == 5):
            raise error("broken")
        return loss(model, *args, **kwargs)

    def callback(record):
        if where == "a callback" and record["step"] == 3:
            raise error("broken")

    monkeypatch.setattr(GPT2, "loss", failing)
    with pytest.raises(error, match="broken"):
        train(tiny(text, out), progress=False, callback=callback)
    step = {"a step": 1, "an evaluation": 2, "the last evaluation": 6, "a callback": 3}[where]
    assert last_checkpoint(out).name == f"step-{step:06}"
    assert str(last_checkpoint(out)) in capsys.readouterr().out
    monkeypatch.undo()
    train(begun_config(out), progress=False)
    assert left(out) == left(whole)


def test_a_finished_run_proposes_to_start_from_it(text, tmp_path, whole, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    before = left(out)
    assert main(["train", "--resume", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{out} is finished: its 6 steps are done" in said
    assert f"tinyllm train --from {out}" in said
    assert left(out) == before
    model = train(begun_config(out), progress=False)
    assert model.state_dict().keys() == load_model(last_checkpoint(out)).state_dict().keys()


def test_a_run_stopped_in_the_last_evaluation_repeats_it(text, tmp_path, whole):
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 5)
    with Alarm(GPT2, signal.SIGINT, 3 + 2), pytest.raises(KeyboardInterrupt):
        train(begun_config(out), progress=False)
    assert last_checkpoint(out).name == "step-000006"
    assert "val_loss" not in records(out)[-1]
    train(begun_config(out), progress=False)
    assert left(out) == left(whole)


# Options that may change


def test_some_options_change_no_results(text, tmp_path, whole):
    elsewhere = shutil.copy(text, tmp_path / "moved.txt")
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 3)
    changes = dict(text=str(elsewhere), eval_every=1, prompt="a", keep=3)
    changes |= dict(checkpoint_every=1, checkpoint_minutes=0.0, skip_nonfinite=2, tokens=tmp_path)
    train(replace(begun_config(out), **changes), progress=False)
    assert [path.name for path in checkpoints(out)] == ["step-000004", "step-000005", "step-000006"]
    ours, theirs = left(out), left(whole)
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["optimizer.safetensors"] == theirs["optimizer.safetensors"]
    losses = [[record.get("train_loss") for record in found["metrics.jsonl"]] for found in (ours, theirs)]
    assert losses[0] == losses[1]


def test_resuming_with_smaller_micro_batches_differs_only_by_rounding(text, tmp_path, capsys):
    config = tiny(text, tmp_path / "whole", dropout=0.0, dtype="float64")
    train(config, progress=False)
    out = tmp_path / "run"
    stopped_after(replace(config, out=out), 3)
    capsys.readouterr()
    train(replace(begun_config(out), micro_batch=2, gpu_memory=None), progress=False)
    assert "warning: micro-batch was 8 and is 2" in capsys.readouterr().out
    assert val_losses(out) == pytest.approx(val_losses(tmp_path / "whole"), rel=1e-9)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3"])
def test_resuming_with_another_balancing_loss_is_said(text, tmp_path, capsys, arch):
    """It is one of each micro-batch: not a sum over rows."""
    out = tmp_path / "run"
    stopped_after(tiny(text, out, arch=arch), 3)
    train(replace(begun_config(out), micro_batch=2), progress=False)
    said = " ".join(capsys.readouterr().out.split())
    assert ("each micro-batch has its own load-balancing loss" in said) == (arch == "mixtral")
    assert ("differ by rounding" in said) == (arch == "qwen3")


def test_resume_at_the_command_line(text, tmp_path, whole, capsys):
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 2)
    for args, said in [
        (["--preset", "gpt2-small"], "--preset"),
        (["--lr", "0.5"], "--lr 0.01, not --lr 0.5"),
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


# Signals


def test_a_second_signal_does_not_interrupt_the_checkpoint(text, tmp_path, monkeypatch, whole):
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
def test_a_signal_between_micro_batches_abandons_the_step(text, tmp_path, number, code, whole, capsys):
    """Step 2 is abandoned after the second of its three micro-batches, and there is no evaluation."""
    out = tmp_path / "run"
    stopped_after(tiny(text, out), 1)
    with Alarm(GPT2, number, 2) as alarm:
        assert main(["train", "--resume", str(out)]) == code
    assert alarm.left == 0  # the third was not started
    assert capsys.readouterr().err.splitlines()[-1].startswith("tinyllm: stopped after step 1; ")
    assert [record["step"] for record in records(out)] == [0, 1]
    assert list(val_losses(out)) == [0]
    train(begun_config(out), progress=False)
    assert left(out) == left(whole)


# Numbers that are not finite


def broken_at(steps):
    """Make the loss of these steps (counted from 0) nan in the last micro-batch."""
    at = {(step, 16 if step % 3 < 2 else 8) for step in steps}  # the first row of each
    address = {}
    manual_seed = tinyllm.training.step.manual_seed
    loss = GPT2.loss

    def note(seed, step, first):
        address["now"] = (step, first)
        manual_seed(seed, step, first)

    def broken(model, *args, **kwargs):
        found = loss(model, *args, **kwargs)
        return found * math.nan if model.training and address["now"] in at else found

    patches = pytest.MonkeyPatch()
    patches.setattr(tinyllm.training.step, "manual_seed", note)
    patches.setattr(GPT2, "loss", broken)
    return patches


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_batch(text, tmp_path):
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
    batches = Batches(load_data(config).train, config.batch, config.seed)
    ids, targets = batches.at(2)
    assert found["ids"] == ids.tolist()
    assert found["targets"] == targets.tolist()
    assert len(found["text"]) == len(ids)
    assert all(line in RHYME * 2 for line in found["text"])
    assert 0 < found["lr"] <= config.lr


def test_skipped_steps_leave_the_weights_unchanged_and_resume_bit_exact(text, tmp_path):
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


def test_one_skipped_step_too_many_stops_the_run(text, tmp_path):
    out = tmp_path / "run"
    patches = broken_at({1, 2, 3})
    try:
        stopped_after(tiny(text, out, skip_nonfinite=2), 2)
        with pytest.raises(FloatingPointError, match="step 4: "):  # the count continues in a resumed run
            train(begun_config(out), progress=False)
        assert [record["step"] for record in records(out)] == [0, 1, 2, 3]
        assert last_checkpoint(out).name == "step-000003"
        train(replace(begun_config(out), skip_nonfinite=3), progress=False)
    finally:
        patches.undo()
    assert last_checkpoint(out).name == "step-000006"

"""A complete run: its files, its reproducibility, and how it is stopped."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.runs import CONTEXT, RHYME, no_pictures, records, rhyme, same_arrays, small, values, weights

import tinyllm.training.run_log
import tinyllm.training.step
from tinyllm import GPT2, load_model, load_tokenizer
from tinyllm.data.corpus import load_text
from tinyllm.training.checkpoint import verify
from tinyllm.training.config import TrainConfig
from tinyllm.training.picture import plot_losses
from tinyllm.training.tasks.pretrain import mean_loss, train
from tinyllm.training.tasks.text import load_data
from tinyllm.weights.runs import checkpoints, last_checkpoint

STOPPED = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}  # signal -> exit code

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals, pipes and terminals")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return rhyme(tmp_path_factory.mktemp("text"), 40)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A finished run, its config and its model; tests only read it."""
    config = small(text, tmp_path_factory.mktemp("runs") / "deep" / "run")
    return config, train(config, progress=False)


@pytest.fixture(autouse=True)
def only_run_has_a_picture(run, monkeypatch):
    no_pictures(monkeypatch)


# The files of a run


def test_the_folder_of_a_run(run):
    pytest.importorskip("matplotlib")
    config, _ = run
    assert {path.name for path in config.out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "samples.txt",
        "loss.png",
        "tinyllm_tokenizer.json",
        "step-000012",
        "lock",
    }
    assert {path.name for path in (config.out / "step-000012").iterdir()} == {
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "checkpoint.json",
    }
    assert (config.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_tokenizer(config.out).decode(load_tokenizer(config.out).encode(RHYME)) == RHYME


def test_config_json_has_options_hashes_and_versions(run, text):
    config, _ = run
    about = json.loads((config.out / "config.json").read_text(encoding="utf-8"))
    assert about["train"] == asdict(config) | {"out": str(config.out), "special_tokens": [], "log": []}
    assert TrainConfig.from_json(about["train"]) == config
    loaded = load_text(text)
    assert about["text"] == {"name": str(text), "sha256": loaded.sha256, "bytes": 960}
    assert about["parameters"] == sum(array.size for array in weights(config.out).values())
    assert about["steps_per_epoch"] == math.ceil(len(range(0, 864 - CONTEXT, CONTEXT)) / 4) == 14
    assert about["versions"]["numpy"] == np.__version__
    assert about["versions"]["tinyllm"] == tinyllm.__version__


def test_metrics_have_one_record_per_step(run):
    config, _ = run
    first, *steps = records(config.out)
    assert first.keys() == {"step", "tokens", "train_eval_loss", "val_loss", "val_bits_per_byte"}
    assert (first["step"], first["tokens"]) == (0, 0)
    assert [r["step"] for r in steps] == list(range(1, 13))
    every_step = {"step", "tokens", "train_loss", "lr", "grad_norm", "tokens_per_s"}
    at_evaluations = {"train_eval_loss", "val_loss", "val_bits_per_byte"}
    at_evaluations |= {"mean_tokens_per_s", "peak_memory"}
    for r in steps:
        assert r.keys() == (every_step | at_evaluations if r["step"] in (5, 10, 12) else every_step)
        assert all(math.isfinite(value) for value in r.values())
        assert r["tokens"] == r["step"] * 4 * CONTEXT
        assert r["grad_norm"] > 0
        assert r["tokens_per_s"] > 0
        if "val_loss" in r:
            assert 10**7 < r["peak_memory"] < 10**11


def test_tokens_are_counted_also_in_an_epochs_smaller_last_batch(text, tmp_path):
    config = small(text, tmp_path / "run", batch=50, steps=3, warmup=0)  # 53 windows: 50, 3, 50
    train(config, progress=False)
    assert [r["tokens"] for r in records(config.out)] == [n * CONTEXT for n in (0, 50, 53, 103)]


def test_learning_rates_follow_the_schedule(run):
    config, _ = run
    rates = [r["lr"] for r in records(config.out)[1:]]
    rising = [1e-3, 4e-3, 7e-3]
    falling = [1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * n / 9)) / 2 for n in range(9)]
    assert rates == pytest.approx(rising + falling, rel=1e-12)


def test_samples_begin_with_the_prompt_and_are_longest_at_the_end(run):
    config, _ = run
    samples = (config.out / "samples.txt").read_text(encoding="utf-8")
    parts = re.split(r"^--- step (\d+)\n", samples, flags=re.MULTILINE)[1:]
    assert parts[::2] == ["0", "5", "10", "12"]
    for sample, length in zip(parts[1::2], (10, 10, 10, 50), strict=True):  # a step has 64 tokens
        assert sample.startswith("the ")
        assert len(sample) == len("the ") + length + len("\n")


def test_the_last_checkpoint_has_the_model_of_the_last_losses(run):
    config, model = run
    loaded = load_model(last_checkpoint(config.out))
    assert same_arrays(loaded.state_dict(), model.state_dict())
    data = load_data(config)
    last = records(config.out)[-1]
    most = config.eval_every * config.batch
    assert mean_loss(loaded, data.validation, most, config.batch) == last["val_loss"]
    assert mean_loss(loaded, data.train, most, config.batch) == last["train_eval_loss"]


def test_checkpoints_every_few_steps_have_the_models_of_the_losses(text, tmp_path):
    config = small(text, tmp_path / "run", checkpoint_every=5, keep=3)
    train(config, progress=False)
    assert sorted(p.name for p in config.out.glob("step-*")) == ["step-000005", "step-000010", "step-000012"]
    assert last_checkpoint(config.out).name == "step-000012"
    evaluated = {r["step"]: r["val_loss"] for r in records(config.out) if "val_loss" in r}
    data = load_data(config)
    for step in (5, 10, 12):
        model = load_model(config.out / f"step-{step:06}")
        assert mean_loss(model, data.validation, config.eval_windows, config.batch) == evaluated[step]


def test_a_run_in_float64(text, tmp_path):
    config = small(text, tmp_path / "run", steps=2, warmup=0, dtype="float64")
    model = train(config, progress=False)
    assert {p.data.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    assert {array.dtype for array in weights(config.out).values()} == {np.dtype(np.float64)}


def test_without_matplotlib_a_run_lacks_only_its_picture(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tinyllm.training.run_log, "plot_losses", plot_losses)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    config = small(text, tmp_path / "run", steps=2, warmup=0)
    train(config, progress=False)
    assert not (config.out / "loss.png").exists()
    assert len(records(config.out)) == 3
    said = capsys.readouterr().out
    assert "matplotlib" in said
    assert "pip install 'tinyllm-numpy[plot]'" in said


def test_the_callback_receives_every_record(text, tmp_path):
    config = small(text, tmp_path / "run")
    seen = []
    train(config, progress=False, callback=seen.append)
    samples = [record.pop("sample") for record in seen if "sample" in record]
    written = (config.out / "samples.txt").read_text(encoding="utf-8")
    assert len(samples) == 4
    assert written == "".join(f"--- step {step}\n{s}\n" for step, s in zip((0, 5, 10, 12), samples))
    assert seen == records(config.out)


def test_a_llama_is_trained(text, tmp_path):
    config = small(text, tmp_path / "run", arch="llama", n_head=4, n_kv_head=2, dropout=0.1, steps=60)
    model = train(config, progress=False)
    assert model.config.num_key_value_heads == 2
    assert model.config.intermediate_size == 64
    assert records(config.out)[-1]["val_loss"] < records(config.out)[0]["val_loss"] / 2
    loaded = load_model(last_checkpoint(config.out))
    assert type(loaded) is type(model)
    assert same_arrays(loaded.state_dict(), model.state_dict())


def test_micro_batches_differ_only_by_rounding(text, tmp_path):
    """53 windows in batches of 4: the last batch of an epoch has one row, fewer than a micro-batch of 2."""
    found = {}
    for micro_batch in (None, 1, 2):
        config = small(text, tmp_path / str(micro_batch), micro_batch=micro_batch, dtype="float64", steps=20)
        found[micro_batch] = train(config, progress=False).state_dict()
    for micro_batch in (1, 2):
        for name, array in found[None].items():
            assert np.abs(array - found[micro_batch][name]).max() < 1e-9, name


# Reproducibility


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_config_gives_the_same_numbers_and_weights(text, tmp_path, dropout):
    # A batch of 64 windows, so that several threads are used.
    configs = [small(text, tmp_path / name, dropout=dropout, batch=64, n_embd=64) for name in "ab"]
    for config in configs:
        train(config, progress=False)
    a, b = (config.out for config in configs)
    assert values(a) == values(b)
    assert same_arrays(weights(a), weights(b))
    assert (a / "samples.txt").read_bytes() == (b / "samples.txt").read_bytes()


def test_seed_dropout_and_initial_weights_change_the_numbers(run, text, tmp_path):
    config, _ = run
    for name, change in [
        ("seed", {"seed": 1}),
        ("dropout", {"dropout": 0.3}),
        ("torch", {"init": "torch"}),
        ("zero", {"init": "zero"}),
    ]:
        other = small(text, tmp_path / name, steps=5, **change)
        train(other, progress=False)
        changed_from = 0 if name != "dropout" else 1  # dropout is off at step 0's evaluation
        pairs = list(zip(records(other.out), records(config.out)))
        for ours, theirs in pairs[changed_from:4]:
            for key in {"train_loss", "val_loss"} & ours.keys() & theirs.keys():
                assert ours[key] != theirs[key]
        if name == "dropout":
            assert pairs[0][0] == pairs[0][1]


def test_more_evaluations_and_checkpoints_do_not_change_the_training(run, text, tmp_path):
    config, _ = run
    often = small(text, tmp_path / "often", eval_every=1, checkpoint_every=2)
    train(often, progress=False)
    assert same_arrays(weights(often.out), weights(config.out))
    losses = [[r["train_loss"] for r in records(out)[1:]] for out in (often.out, config.out)]
    assert losses[0] == losses[1]


# Interruption and failure


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_never_reaches_the_weights(text, tmp_path, monkeypatch, broken):
    """The third step fails: the weights before it are saved."""
    found = []

    def of_third_step(parameters, broken, value):
        found.append({name: p.data.copy() for name, p in parameters})
        return value * broken if len(found) == 3 else value

    if broken == "loss":
        loss = GPT2.loss

        def broken_loss(model, *args, **more):
            found = loss(model, *args, **more)
            return of_third_step(model.named_parameters(), math.nan, found) if model.training else found

        monkeypatch.setattr(GPT2, "loss", broken_loss)
    else:
        clip = tinyllm.training.step.clip_grad_norm
        monkeypatch.setattr(
            tinyllm.training.step,
            "clip_grad_norm",
            lambda parameters, most: of_third_step(parameters, math.inf, clip(parameters, most)),
        )
    config = small(text, tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"step 3: .*smaller --lr") as raised:
        train(config, progress=False)
    assert ("nan" if broken == "loss" else "inf") in str(raised.value)
    assert str(last_checkpoint(config.out)) in str(raised.value)
    assert last_checkpoint(config.out).name == "step-000002"
    assert [r["step"] for r in records(config.out)] == [0, 1, 2]
    saved = dict(load_model(last_checkpoint(config.out)).named_parameters())
    assert len(found) == 3
    assert saved.keys() == found[2].keys()
    for name, parameter in saved.items():
        assert np.isfinite(parameter.data).all()
        assert np.array_equal(parameter.data, found[2][name])


@pytest.mark.parametrize("skip", [0, 5])
def test_weights_that_an_update_made_not_finite_are_never_saved(text, tmp_path, skip):
    """The learning rate rises from 0: the second update overflows float32."""
    for every, said in ((1, "step-000001"), (None, "")):
        config = small(text, tmp_path / f"{every}", lr=1e308, initial_lr=0.0, warmup=3, skip_nonfinite=skip)
        config = replace(config, checkpoint_every=every, eval_every=12, weight_decay=0.0)
        with pytest.raises(FloatingPointError, match=r"weights .* are not finite: .* --lr") as raised:
            train(config, progress=False)
        assert said in str(raised.value)
        for folder in checkpoints(config.out):
            assert all(np.isfinite(array).all() for array in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("name", [name for name in STOPPED if hasattr(signal, name)])
@pytest.mark.parametrize("during", ["a step", "an evaluation", "the last evaluation"])
def test_a_signal_abandons_the_step_and_nothing_is_written_twice(text, tmp_path, monkeypatch, name, during):
    """Step 3 is abandoned just before its update; after an evaluation there is no step to abandon."""
    number = getattr(signal, name)
    config = small(text, tmp_path / "run", eval_every=2, steps=6, warmup=0)
    clip, plot = tinyllm.training.step.clip_grad_norm, tinyllm.training.run_log.RunLog._plot
    calls = []

    def clip_and_signal(*args):
        calls.append(1)
        if during == "a step" and len(calls) == 3:
            signal.raise_signal(number)
        return clip(*args)

    def plot_and_signal(log):
        plot(log)
        if log.history[-1]["step"] == {"an evaluation": 4, "the last evaluation": 6}.get(during):
            signal.raise_signal(number)

    monkeypatch.setattr(tinyllm.training.step, "clip_grad_norm", clip_and_signal)
    monkeypatch.setattr(tinyllm.training.run_log.RunLog, "_plot", plot_and_signal)
    handlers = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as raised:
        train(config, progress=False)
    assert signal.getsignal(number) == handlers
    received, said = raised.value.args
    last = {"a step": 2, "an evaluation": 4, "the last evaluation": 6}[during]
    assert received == number
    assert f"step {last}" in said
    assert str(last_checkpoint(config.out)) in said
    assert last_checkpoint(config.out).name == f"step-{last:06}"
    assert [r["step"] for r in records(config.out)] == list(range(last + 1))
    evaluated = re.findall(r"--- step (\d+)", (config.out / "samples.txt").read_text(encoding="utf-8"))
    assert evaluated == [str(step) for step in range(0, last + 1, 2)]
    model, data = load_model(last_checkpoint(config.out)), load_data(config)
    val_loss = mean_loss(model, data.validation, config.eval_windows, config.batch)
    assert val_loss == records(config.out)[-1]["val_loss"]


def test_a_stopped_run_has_the_same_records_until_then(run, text, tmp_path):
    config, _ = run
    stopped = small(text, tmp_path / "run")

    def ring(record):
        if record["step"] == 7:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(stopped, progress=False, callback=ring)
    assert values(stopped.out) == values(config.out)[:8]


def command(text, out, steps, eval_every=1000):
    options = (
        f"--preset gpt2-small --text {text} --out {out} --tokenizer char --n-layer 1 --n-head 2 "
        f"--n-embd 16 --context {CONTEXT} "
        f"--batch 4 --steps {steps} --warmup 0 --eval-every {eval_every} --prompt the"
    )
    return [sys.executable, "-m", "tinyllm", "train", *options.split()]


def wait_for_steps(process, out):
    patience, metrics = time.monotonic() + 60, out / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 5:
        assert process.poll() is None
        assert time.monotonic() < patience
        time.sleep(0.02)


@posix
@pytest.mark.parametrize(("name", "code"), STOPPED.items())
def test_a_signal_from_another_process_stops_the_run(text, tmp_path, name, code):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(text, out, 10**6), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for_steps(process, out)
        process.send_signal(getattr(signal, name))
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code
    checkpoint = last_checkpoint(out)
    assert re.fullmatch(rf"tinyllm: stopped after step (\d+); .*{re.escape(str(checkpoint))}\n", said)
    last = records(out)[-1]
    assert checkpoint.name == f"step-{last['step']:06}"
    assert [r["step"] for r in records(out)] == list(range(last["step"] + 1))
    assert verify(checkpoint)["step"] == last["step"]
    assert "val_loss" not in last  # the sender of the signal may not wait for an evaluation


# Output that cannot be written


@posix
@pytest.mark.parametrize("ignored", [False, True], ids=["SIGHUP", "nohup"])
def test_a_closed_terminal_stops_the_run_unless_its_signal_is_ignored(text, tmp_path, ignored):
    """The terminal is gone: every later print fails, also that of the progress bar."""
    import fcntl
    import termios

    out, steps = tmp_path / "run", 1000 if ignored else 10**6
    terminal, ours = os.openpty()

    def in_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        command(text, out, steps, 500), stdin=ours, stdout=ours, stderr=ours, preexec_fn=in_terminal
    )
    try:
        os.close(ours)
        wait_for_steps(process, out)
        os.close(terminal)
        assert process.wait(timeout=60) == (0 if ignored else 129)
    finally:
        process.kill()
        process.wait()
    last = verify(last_checkpoint(out))["step"]
    assert [r["step"] for r in records(out)] == list(range(last + 1))
    if ignored:
        assert last == steps
        lost = {r.get(f"{name}_error") for r in records(out) for name in ("stdout", "stderr")}
        assert "Input/output error" in lost


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (">/dev/full 2>&1", "No space left on device"),
        (">&-", "Bad file descriptor"),
        (">&- 2>&- <&-", "Bad file descriptor"),
        ("2>/dev/full", None),
        ("2>&-", None),
    ],
)
def test_output_that_cannot_be_written_does_not_end_the_run(text, tmp_path, where, reason):
    out = tmp_path / "run"
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {where}', "sh", *command(text, out, 3)], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert last_checkpoint(out).name == "step-000003"
    assert [r.get("stdout_error") for r in records(out)] == [reason, None, None, None]


def test_a_stream_that_python_closed_does_not_end_the_run(text, tmp_path, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)
    config = small(text, tmp_path / "run", steps=2, warmup=0)
    train(config)
    assert last_checkpoint(config.out).name == "step-000002"
    assert "closed" in records(config.out)[0]["stdout_error"]
    assert (sys.stdout, sys.stderr) == (closed, None)

"""The training loop: what a run writes, that it can be repeated and interrupted, and that torch agrees."""

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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import tinyllm.training.loop
import tinyllm.training.run_folder
from tinyllm import GPT2, GPT2Config, Tensor, load_model, load_tokenizer
from tinyllm.data.batches import Batches, Windows
from tinyllm.data.corpus import load_text
from tinyllm.errors import Error
from tinyllm.optim import LossScale
from tinyllm.training.checkpoint import verify
from tinyllm.training.config import TrainConfig
from tinyllm.training.loop import evaluate, gradients, load_data, train
from tinyllm.training.run_folder import last_checkpoint

RHYME = "the cat sat on the mat. "
CONTEXT = 16


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text(RHYME * 40, encoding="utf-8")
    return path


def small(text, out, **changes):
    """A run of a second: one block, 12 steps, evaluated at 0, 5, 10 and 12."""
    config = TrainConfig(
        out=out,
        text=str(text),
        tokenizer="char",
        n_layer=1,
        n_head=2,
        n_embd=16,
        context=CONTEXT,
        stride=CONTEXT,
        batch=4,
        steps=12,
        lr=1e-2,
        initial_lr=1e-3,
        min_lr=1e-4,
        warmup=3,
        weight_decay=0.1,
        clip=1.0,
        dropout=0.0,
        eval_every=5,
        prompt="the ",
    )
    return replace(config, **changes)


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


OF_THE_MACHINE = {"tokens_per_s", "mean_tokens_per_s", "gemm_share", "peak_memory"}


def values(out):
    """The metrics without those that depend on the machine's mood."""
    return [{key: value for key, value in r.items() if key not in OF_THE_MACHINE} for r in records(out)]


def weights(out):
    return load_file(last_checkpoint(out) / "model.safetensors")


def same_weights(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """One finished run, its config and its model; nobody writes into it."""
    config = small(text, tmp_path_factory.mktemp("runs") / "deep" / "run")
    return config, train(config, progress=False)


# What a run leaves


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


def test_config_says_what_was_run(run, text):
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


def test_metrics_one_record_a_step(run):
    config, _ = run
    first, *steps = records(config.out)
    assert first.keys() == {"step", "tokens", "train_eval_loss", "val_loss", "val_bits_per_byte"}
    assert (first["step"], first["tokens"]) == (0, 0)
    assert [r["step"] for r in steps] == list(range(1, 13))
    every_step = {"step", "tokens", "train_loss", "lr", "grad_norm", "tokens_per_s"}
    at_evaluations = {"train_eval_loss", "val_loss", "val_bits_per_byte"}
    at_evaluations |= {"mean_tokens_per_s", "gemm_share", "peak_memory"}
    for r in steps:
        assert r.keys() == (every_step | at_evaluations if r["step"] in (5, 10, 12) else every_step)
        assert all(math.isfinite(value) for value in r.values())
        assert r["tokens"] == r["step"] * 4 * CONTEXT
        assert r["grad_norm"] > 0
        assert r["tokens_per_s"] > 0
        if "gemm_share" in r:
            assert r["gemm_share"] > 0
            assert 10**7 < r["peak_memory"] < 10**11


def test_tokens_count_what_was_shown_also_in_an_epochs_short_last_batch(text, tmp_path):
    config = small(text, tmp_path / "run", batch=50, steps=3, warmup=0)  # 53 windows: 50, 3, 50
    train(config, progress=False)
    assert [r["tokens"] for r in records(config.out)] == [n * CONTEXT for n in (0, 50, 53, 103)]


def test_learning_rates_are_those_of_the_schedule(run):
    config, _ = run
    rates = [r["lr"] for r in records(config.out)[1:]]
    rising = [1e-3, 4e-3, 7e-3]
    falling = [1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * n / 9)) / 2 for n in range(9)]
    assert rates == pytest.approx(rising + falling, rel=1e-12)


def test_loss_begins_near_guessing_and_falls_on_a_rhyme(text, tmp_path):
    config = small(text, tmp_path / "run", steps=120, eval_every=120)
    train(config, progress=False)
    first, *_, last = records(config.out)
    assert first["val_loss"] == pytest.approx(math.log(len(set(RHYME))), abs=0.05)
    assert first["train_eval_loss"] == pytest.approx(math.log(len(set(RHYME))), abs=0.05)
    assert last["val_loss"] < first["val_loss"] / 3
    # Characters of RHYME are one byte each, and the char tokenizer's tokens are characters.
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2), rel=1e-12)
    assert last["train_loss"] < first["val_loss"] / 3


def test_samples_begin_with_the_prompt(run):
    config, _ = run
    samples = (config.out / "samples.txt").read_text(encoding="utf-8")
    parts = re.split(r"^--- step (\d+)\n", samples, flags=re.MULTILINE)[1:]
    assert parts[::2] == ["0", "5", "10", "12"]
    for sample in parts[1::2]:
        assert sample.startswith("the ")
        assert len(sample) == len("the ") + 50 + len("\n")


def test_checkpoint_is_the_model_and_gives_the_last_losses(run):
    config, model = run
    loaded = load_model(last_checkpoint(config.out))
    assert same_weights(loaded.state_dict(), model.state_dict())
    data = load_data(config)
    last = records(config.out)[-1]
    assert evaluate(loaded, data.validation, config.eval_windows, config.batch) == last["val_loss"]
    assert evaluate(loaded, data.train, config.eval_windows, config.batch) == last["train_eval_loss"]


def test_checkpoints_on_the_way(text, tmp_path):
    config = small(text, tmp_path / "run", checkpoint_every=5, keep=3)
    train(config, progress=False)
    assert sorted(p.name for p in config.out.glob("step-*")) == ["step-000005", "step-000010", "step-000012"]
    assert last_checkpoint(config.out).name == "step-000012"
    evaluated = {r["step"]: r["val_loss"] for r in records(config.out) if "val_loss" in r}
    data = load_data(config)
    for step in (5, 10, 12):
        model = load_model(config.out / f"step-{step:06}")
        assert evaluate(model, data.validation, config.eval_windows, config.batch) == evaluated[step]


def test_no_checkpoint(tmp_path):
    (tmp_path / "step-000003").mkdir()  # without weights it is none
    with pytest.raises(Error, match="holds no checkpoint") as raised:
        last_checkpoint(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_run_in_float64(text, tmp_path):
    config = small(text, tmp_path / "run", steps=2, warmup=0, dtype="float64")
    model = train(config, progress=False)
    assert {p.data.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    assert {array.dtype for array in weights(config.out).values()} == {np.dtype(np.float64)}


def test_without_matplotlib_a_run_lacks_its_plot_only(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    config = small(text, tmp_path / "run", steps=2, warmup=0)
    train(config, progress=False)
    assert not (config.out / "loss.png").exists()
    assert len(records(config.out)) == 3


def test_one_callback_sees_all_that_is_logged(text, tmp_path):
    config = small(text, tmp_path / "run")
    seen = []
    train(config, progress=False, callback=seen.append)
    samples = [record.pop("sample") for record in seen if "sample" in record]
    written = (config.out / "samples.txt").read_text(encoding="utf-8")
    assert len(samples) == 4
    assert written == "".join(f"--- step {step}\n{s}\n" for step, s in zip((0, 5, 10, 12), samples))
    for record in seen:
        record.pop("seconds_left", None)
    assert seen == records(config.out)


def test_training_windows_overlap_unless_told_otherwise(text, tmp_path):
    data = load_data(small(text, tmp_path, stride=None))
    assert (data.train.stride, data.validation.stride) == (CONTEXT // 4, CONTEXT)
    assert load_data(small(text, tmp_path, stride=None, context=2)).train.stride == 1


def test_a_llama_trains_too(text, tmp_path):
    config = small(text, tmp_path / "run", arch="llama", n_head=4, n_kv_head=2, dropout=0.1, steps=60)
    model = train(config, progress=False)
    assert model.config.num_key_value_heads == 2
    assert model.config.intermediate_size == 64
    assert records(config.out)[-1]["val_loss"] < records(config.out)[0]["val_loss"] / 2
    loaded = load_model(last_checkpoint(config.out))
    assert type(loaded) is type(model)
    assert same_weights(loaded.state_dict(), model.state_dict())


# Micro-batches


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
def test_gradients_are_those_of_the_whole_batch_whatever_is_counted(micro_batch):
    """Rows with 0, 1 and many targets that count: a mean of the micro-batches' means would be another."""
    rng = np.random.default_rng(1)
    ids, targets = rng.integers(0, 11, (2, 5, 6))
    targets[0], targets[1, 1:], targets[3, ::2] = -100, -100, -100
    config = GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_head=2, n_layer=2, resid_pdrop=0.0)
    model = GPT2(config, rng=rng).astype(np.float64).eval()
    model.loss(ids, targets).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    whole = model.loss(ids, targets).item()
    model.zero_grad()
    loss = gradients(model, ids, targets, micro_batch, seed=0, step=0)
    assert loss == pytest.approx(whole, rel=1e-13)
    for name, p in model.named_parameters():
        assert np.abs(p.grad - expected[name]).max() <= 1e-13 * np.abs(expected[name]).max(), name


def test_micro_batches_make_the_same_run(text, tmp_path):
    """53 windows in batches of 4: an epoch ends with a batch of one, less than a micro-batch of 2."""
    found = {}
    for micro_batch in (None, 1, 2):
        config = small(text, tmp_path / str(micro_batch), micro_batch=micro_batch, dtype="float64", steps=20)
        found[micro_batch] = train(config, progress=False).state_dict()
    for micro_batch in (1, 2):
        for name, array in found[None].items():
            assert np.abs(array - found[micro_batch][name]).max() < 1e-9, name


def test_every_micro_batch_has_its_own_dropout(text, tmp_path):
    model = GPT2(small(text, tmp_path, dropout=0.5).model_config(9), rng=np.random.default_rng(0)).train()
    row = np.arange(9)[None]
    ids = np.repeat(row, 2, axis=0)
    twice = gradients(model, ids, ids, 1, seed=0, step=0)
    once = gradients(model, row, row, 1, seed=0, step=0)
    assert twice != once  # the mean of two draws, not the same one twice
    assert gradients(model, ids, ids, 1, seed=0, step=0) == twice


def test_nobody_waits_for_a_loss_before_the_last_micro_batch(monkeypatch):
    """A GPU computes while the host prepares the next one; to ask for a number would be to wait for it."""
    config = GPT2Config(vocab_size=9, n_positions=4, n_embd=8, n_head=2, n_layer=1)
    model, happened = GPT2(config, rng=np.random.default_rng(0)), []
    backward, item = Tensor.backward, Tensor.item
    monkeypatch.setattr(Tensor, "backward", lambda *args: (happened.append("backward"), backward(*args))[1])
    monkeypatch.setattr(Tensor, "item", lambda *args: (happened.append("item"), item(*args))[1])
    ids = np.arange(8).reshape(4, 2)
    gradients(model, ids, ids, 1, seed=0, step=0)
    assert happened == 4 * ["backward"] + 4 * ["item"]


# Loss scale


@settings(max_examples=20)
@given(steps=st.lists(st.sampled_from([True, False]), max_size=40), before=st.integers(0, 1999))
@example(steps=[True], before=1999)
@example(steps=[False, True], before=1999)
def test_loss_scale_goes_as_torchs(steps, before):
    torch = pytest.importorskip("torch")
    ours = LossScale()
    ours.load_state_dict({"scale": 1024.0, "good_steps": before})
    scale, good_steps = torch.tensor(1024.0), torch.tensor(before, dtype=torch.int32)
    for finite in steps:
        ours.update(finite)
        torch._amp_update_scale_(scale, good_steps, torch.tensor(float(not finite)), 2.0, 0.5, 2000)
        assert ours.state_dict() == {"scale": scale.item(), "good_steps": good_steps.item()}


@pytest.mark.parametrize("micro_batch", [2, 5])
def test_scaled_gradients_are_the_gradients(micro_batch):
    ids = np.random.default_rng(1).integers(0, 11, (5, 6))
    config = GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_head=2, n_layer=1)
    model = GPT2(config, rng=np.random.default_rng(0))
    plain = gradients(model, ids, ids, micro_batch, seed=3, step=0)
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    assert gradients(model, ids, ids, micro_batch, seed=3, step=0, scale=LossScale()) == plain
    for name, p in model.named_parameters():  # a power of two: not a bit is lost
        assert np.array_equal(p.grad, expected[name]), name


def test_a_loss_scale_in_backward():
    x = Tensor(np.array([3.0], np.float32), requires_grad=True)
    scale = LossScale(8.0)
    loss = (x * x).sum()
    loss.backward(scale.seed(loss))
    assert x.grad == 8 * 6
    unused = Tensor(np.ones(2), requires_grad=True)
    number = Tensor(np.array(2.0, np.float32), requires_grad=True)
    number.grad = np.array(4.0, np.float32)
    scale.unscale([("x", x), ("unused", unused), ("number", number)])
    assert (x.grad, unused.grad, number.grad) == (6, None, 0.5)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_no_loss_scale(value):
    with pytest.raises(Error, match=f"a loss scale must be above 0 and finite, not {value}"):
        LossScale(value)


def test_a_profile_instead_of_a_run(text, tmp_path, capsys):
    train(small(text, tmp_path / "run", profile=True), progress=False)
    page = capsys.readouterr().out
    for word in ("linear", "scaled_dot_product_attention", "AdamW", "clip_grad_norm"):
        assert word in page
    assert not (tmp_path / "run").exists()


# A text on disk


def test_a_large_text_goes_through_a_token_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tinyllm.data.token_file.PIECE_CHARACTERS", 1000
    )  # of a chunk, so that there are many
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(30):
        (corpus / f"{n:02}.txt").write_text(RHYME * 60 + str(n), encoding="utf-8")
    out = tmp_path / "run"
    config = small(corpus, out, tokenizer="bpe:265", in_memory=0, steps=150, eval_every=150)
    train(config, progress=False)
    (folder,) = tmp_path.glob("*.tokens")
    assert folder.name == "corpus.bpe-265.tokens"
    written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    last = records(out)[-1]
    assert last["val_loss"] < 1
    # One token of this rhyme is several bytes, so the two units differ by more than ln 2.
    assert last["val_bits_per_byte"] < last["val_loss"]
    ids = load_tokenizer(out).encode((corpus / "00.txt").read_text(encoding="utf-8"))
    data = load_data(config)
    assert list(data.train.tokens[: len(ids)]) == ids
    assert data.train.tokens[len(ids)] == load_tokenizer(out).special_tokens["<|endoftext|>"]
    train(replace(config, out=tmp_path / "again"), progress=False)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == written  # tokenised once
    assert same_weights(weights(out), weights(tmp_path / "again"))
    (corpus / "07.txt").write_text("something else", encoding="utf-8")
    with pytest.raises(Error, match=r"corpus"):
        train(replace(config, out=tmp_path / "changed", tokens=folder), progress=False)
    assert not (tmp_path / "changed").exists()


def test_a_large_text_is_too_much_for_characters(text, tmp_path):
    with pytest.raises(Error, match="too much for a character tokenizer"):
        load_data(small(text, tmp_path / "run", in_memory=0))


def test_new_special_tokens_get_ids_of_their_own(text, tmp_path):
    config = small(text, tmp_path / "run", special_tokens=("<|user|>", "<|bot|>"), steps=2, warmup=0)
    model = train(config, progress=False)
    tokenizer = load_tokenizer(config.out)
    assert tokenizer.encode("the <|bot|>", special="allow")[-1] == tokenizer.vocab_size - 1
    assert model.config.vocab_size == tokenizer.vocab_size == len(set(RHYME)) + 2


# The same again


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_config_same_numbers_and_weights(text, tmp_path, dropout):
    # A batch of 64 windows, so that the threads have something to share out.
    configs = [small(text, tmp_path / name, dropout=dropout, batch=64, n_embd=64) for name in "ab"]
    for config in configs:
        train(config, progress=False)
    a, b = (config.out for config in configs)
    assert values(a) == values(b)
    assert same_weights(weights(a), weights(b))
    assert (a / "samples.txt").read_bytes() == (b / "samples.txt").read_bytes()


def test_seed_dropout_and_initial_weights_make_a_difference(run, text, tmp_path):
    config, _ = run
    for name, change in [("seed", {"seed": 1}), ("dropout", {"dropout": 0.3}), ("init", {"init": "torch"})]:
        other = small(text, tmp_path / name, steps=4, **change)
        train(other, progress=False)
        changed_from = 0 if name != "dropout" else 1  # dropout is off at step 0's evaluation
        pairs = list(zip(records(other.out), records(config.out)))
        for ours, theirs in pairs[changed_from:4]:
            for key in {"train_loss", "val_loss"} & ours.keys() & theirs.keys():
                assert ours[key] != theirs[key]
        if name == "dropout":
            assert pairs[0][0] == pairs[0][1]


def test_evaluating_and_saving_more_often_does_not_change_the_training(run, text, tmp_path):
    config, _ = run
    often = small(text, tmp_path / "often", eval_every=1, checkpoint_every=2)
    train(often, progress=False)
    assert same_weights(weights(often.out), weights(config.out))
    losses = [[r["train_loss"] for r in records(out)[1:]] for out in (often.out, config.out)]
    assert losses[0] == losses[1]


# Evaluation


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("most", [3, 10**6])
def test_evaluate_is_the_mean_over_its_windows_without_dropout(text, tmp_path, training, most):
    data = load_data(small(text, tmp_path))
    config = small(text, tmp_path, dropout=0.5).model_config(data.tokenizer.vocab_size)
    model = GPT2(config, rng=np.random.default_rng(0)).astype(np.float64).train(training)
    model.wte.weight.data *= 10  # otherwise every window would lose about the same
    found = evaluate(model, data.train, most, batch=5)
    assert all(module.training == training for _, module in model.named_modules())

    model.eval()
    chosen = [0, 26, 52] if most == 3 else range(53)
    assert len(data.train) == 53
    losses = []
    for i in chosen:
        ids, targets = data.train[[i]]
        logits = model(ids).data[0]
        log_sums = np.log(np.exp(logits).sum(axis=-1))
        losses += [log_sums[t] - logits[t, target] for t, target in enumerate(targets[0])]
    assert found == pytest.approx(np.mean(losses), rel=1e-12)
    assert np.std(losses) > 0.1


def test_evaluate_records_no_gradients_and_restores_the_mode_after_an_error(text, tmp_path):
    data = load_data(small(text, tmp_path))
    model = GPT2(small(text, tmp_path).model_config(data.tokenizer.vocab_size), rng=np.random.default_rng(0))
    evaluate(model, data.validation, 2, 2)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(Error, match="token ids run from 0"):
        evaluate(model, Windows(np.full(40, 999), CONTEXT), 2, 2)
    assert model.training


# Refusals


def test_a_folder_that_holds_something_is_refused_and_untouched(run, text, tmp_path):
    config, _ = run
    before = contents(config.out)
    with pytest.raises(Error, match=r"not an empty folder: choose another --out") as raised:
        train(replace(config, seed=5), progress=False)
    assert str(config.out) in str(raised.value)
    assert contents(config.out) == before

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / ".hidden").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with pytest.raises(Error, match="not an empty folder"):
            train(small(text, tmp_path / name), progress=False)
    assert contents(tmp_path) == {os.path.join("notes", ".hidden"): b"mine", "file": b"mine"}


def test_an_empty_folder_is_taken(text, tmp_path):
    (tmp_path / "run").mkdir()
    train(small(text, tmp_path / "run", steps=1, warmup=0), progress=False)
    assert last_checkpoint(tmp_path / "run").name == "step-000001"


def test_without_out_every_run_gets_a_new_folder(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train(small(text, None, steps=1, warmup=0), progress=False)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["rhyme-1", "rhyme-2"]
    for folder in (tmp_path / "runs").iterdir():
        assert last_checkpoint(folder).name == "step-000001"
        recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))["train"]["out"]
        assert (tmp_path / recorded).samefile(folder)


# Stopped and broken off


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_number_that_is_not_finite_never_reaches_the_weights(text, tmp_path, monkeypatch, broken):
    """The third step fails: what is saved are the weights as that step found them."""
    found = []

    def of_third_step(model, replacement, value):
        if model.training:
            found.append({name: p.data.copy() for name, p in model.named_parameters()})
        return replacement(value) if model.training and len(found) == 3 else value

    if broken == "loss":
        loss = GPT2.loss
        monkeypatch.setattr(
            GPT2,
            "loss",
            lambda model, *args, **kw: of_third_step(model, lambda x: x * math.nan, loss(model, *args, **kw)),
        )
    else:
        clip = tinyllm.training.loop.clip_grad_norm
        monkeypatch.setattr(
            tinyllm.training.loop,
            "clip_grad_norm",
            lambda model, most: of_third_step(model, lambda _: math.inf, clip(model, most)),
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


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("during", ["a step", "an evaluation", "the last evaluation"])
def test_a_signal_breaks_off_the_step_and_nothing_is_written_twice(text, tmp_path, monkeypatch, name, during):
    """In step 3 it is abandoned just before the update; after an evaluation there is nothing to abandon."""
    number = getattr(signal, name)
    config = small(text, tmp_path / "run", eval_every=2, steps=6, warmup=0)
    clip, plot = tinyllm.training.loop.clip_grad_norm, tinyllm.training.run_folder.plot_losses
    calls = []

    def clip_and_signal(*args):
        calls.append(1)
        if during == "a step" and len(calls) == 3:
            signal.raise_signal(number)
        return clip(*args)

    def plot_and_signal(history, *args):
        plot(history, *args)
        if history[-1]["step"] == {"an evaluation": 4, "the last evaluation": 6}.get(during):
            signal.raise_signal(number)

    monkeypatch.setattr(tinyllm.training.loop, "clip_grad_norm", clip_and_signal)
    monkeypatch.setattr(tinyllm.training.run_folder, "plot_losses", plot_and_signal)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt) as raised:
        train(config, progress=False)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
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
    val_loss = evaluate(model, data.validation, config.eval_windows, config.batch)
    assert val_loss == records(config.out)[-1]["val_loss"]


def test_a_run_goes_the_same_way_until_it_is_stopped(run, text, tmp_path):
    config, _ = run
    stopped = small(text, tmp_path / "run")

    def ring(record):
        if record["step"] == 7:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(stopped, progress=False, callback=ring)
    assert values(stopped.out) == values(config.out)[:8]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to one process")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_from_outside(text, tmp_path, name, code):
    out = tmp_path / "run"
    options = (
        f"--text {text} --out {out} --tokenizer char --n-layer 1 --n-head 2 --n-embd 16 --context {CONTEXT} "
        "--batch 4 --steps 1000000 --warmup 0 --eval-every 1000 --prompt the"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyllm", "train", *options.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        patience = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or len(records_so_far(out)) < 5:
            assert process.poll() is None
            assert time.monotonic() < patience
            time.sleep(0.02)
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
    assert "val_loss" not in last  # whoever sent the signal may not wait for an evaluation


def records_so_far(out):
    return (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


# The whole of it, in torch


@pytest.mark.parametrize("tie_head", [True, False])
def test_the_training_run_in_torch(text, tmp_path, tie_head):
    """20 steps of train() beside transformers' GPT-2 with torch's loss, AdamW, clipping and schedules.

    In float64, from the same weights, on the same batches. GPT2LMHeadModel computes its own loss in
    float32, so torch's cross-entropy takes its logits.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = small(
        text,
        tmp_path / "run",
        n_layer=2,
        steps=20,
        eval_every=20,
        dtype="float64",
        clip=1.4,
        tie_head=tie_head,
    )
    data = load_data(config)
    start = GPT2(config.model_config(data.tokenizer.vocab_size), rng=np.random.default_rng(config.seed))
    start.astype(np.float64).save_pretrained(tmp_path / "start")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "start", dtype=torch.float64, attn_implementation="eager"
    ).train()
    assert all(p.dtype == torch.float64 for p in theirs.parameters())

    ours = train(config, progress=False)

    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=config.lr
    )
    rise = torch.optim.lr_scheduler.LinearLR(
        optimizer, config.initial_lr / config.lr, total_iters=config.warmup
    )
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps - config.warmup, config.min_lr)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [config.warmup])
    batches = Batches(data.train, config.batch, config.seed)
    clipped = 0
    for step, record in enumerate(records(config.out)[1:]):
        ids, targets = (torch.from_numpy(array) for array in batches.at(step))
        loss = torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.clip)
        clipped += norm.item() > config.clip
        assert record["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()
        assert abs(record["train_loss"] - loss.item()) < 1e-9
        assert abs(record["grad_norm"] - norm.item()) < 1e-9
    assert 0 < clipped < 20  # both sides of the clipping were walked

    expected = {name.removeprefix("transformer."): p for name, p in theirs.named_parameters()}
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    began = start.state_dict()
    for name, parameter in expected.items():
        parameter = parameter.detach().numpy()
        assert np.abs(found[name] - parameter).max() < 1e-9, name
        assert np.abs(found[name] - began[name]).max() > 1e-4, name  # it was trained

"""Training runs that take a second, ways to stop them, and their files."""

import json
import signal
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file

import tinyllm.training.run_log
from tinyllm.training.checkpoint import verify
from tinyllm.training.config import TrainConfig
from tinyllm.training.tasks.pretrain import train
from tinyllm.weights.runs import last_checkpoint

RHYME = "the cat sat on the mat. "

OF_THE_MACHINE = {"tokens_per_s", "mean_tokens_per_s", "peak_memory"}  # of a record

CONTEXT = 16  # of ``small``


def rhyme(folder, times):
    """A text file."""
    path = folder / "rhyme.txt"
    path.write_text(RHYME * times, encoding="utf-8")
    return path


def small(text, out, **changes):
    """A run of one block and 12 steps, evaluated at 0, 5, 10 and 12."""
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
        processes=1,
    )
    return replace(config, **changes)


def tiny(text, out, **changes):
    """Six steps with all state that an interruption could lose, evaluated at 0, 2, 4 and 6.

    It has dropout and micro-batches. Its 63 overlapping windows are 3 batches, the last of which is smaller:
    the second epoch, in a new order, starts at step 3.
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
        processes=1,
    )
    return replace(config, **changes)


def no_pictures(patched):
    """Plotting would take most of the time of so small a run."""
    name = "plot_losses"
    patched.setattr(tinyllm.training.run_log, name, lambda history, path, *_: path.write_bytes(b"picture"))


# The files of a run


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def values(out):
    """The metrics without those that depend on the speed of the machine."""
    return [{key: value for key, value in r.items() if key not in OF_THE_MACHINE} for r in records(out)]


def left(out):
    """Everything of a finished run that neither the machine's speed nor an interruption may change."""
    last = last_checkpoint(out)
    files = [last / "model.safetensors", last / "optimizer.safetensors", out / "samples.txt"]
    files += last.glob("config.json")  # of a language model
    return {
        "last": last.name,
        "metrics.jsonl": values(out),
        "t": verify(last)["t"],
        **{path.name: path.read_bytes() for path in files},
    }


def val_losses(out):
    return {record["step"]: record["val_loss"] for record in records(out) if "val_loss" in record}


def weights(out, file="model.safetensors"):
    return load_file(last_checkpoint(out) / file)


def same_arrays(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Runs that are stopped


class Killed(BaseException):
    """Ends a run without a checkpoint, so that the disk is as after a kill: no code of a run catches it."""


@contextmanager
def full_disk(size=0):
    """Files cannot grow beyond ``size`` bytes; as on a full disk, the bytes before are written."""
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Alarm:
    """Raise a signal at the n-th call of the model's loss, within a step or an evaluation."""

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


def stopped_after(config, step, number=signal.SIGINT, train=train):
    """Train until a signal is raised while the record of this step is logged; returns its arguments."""

    def ring(record):
        if record["step"] == step:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt) as raised:
        train(config, progress=False, callback=ring)
    return raised.value.args

"""A tiny run that has everything which an interruption could lose, and what it leaves.

Dropout and micro-batches, overlapping windows in an order shuffled anew in every epoch, a checkpoint after
every step. However it is interrupted, damaged and resumed, what it leaves at its end (weights, the
optimizer's averages, losses and samples) must be bit for bit what the same run leaves without all that.

Every proof of this folder yields a name and its ``Figures``, as ``parity.fuzz.harness.fuzz_all`` does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import tinyllm.training.run_folder
from tinyllm.errors import Error
from tinyllm.training.checkpoint import OPTIMIZER, verify
from tinyllm.training.config import TrainConfig
from tinyllm.training.run_folder import METRICS, SAMPLES
from tinyllm.training.tasks.pretrain import train
from tinyllm.weights.runs import checkpoints, last_checkpoint
from tinyllm.weights.safetensors import CONFIG, SINGLE_FILE

OPTIONS = dict(
    tokenizer="char",
    n_layer=1,
    n_head=2,
    n_embd=8,
    context=8,
    stride=4,
    batch=24,  # of 63 windows: the third batch of an epoch is a short one
    micro_batch=8,
    steps=12,
    lr=1e-2,
    warmup=2,
    dropout=0.2,
    eval_every=3,
    eval_windows=20,
    prompt="the ",
    checkpoint_every=1,
)

OF_THE_MACHINE = {"tokens_per_s", "mean_tokens_per_s", "peak_memory"}  # of a record


@dataclass
class Figures:
    """How much was tried, how often it ended in which way, and a sentence on each failure."""

    tries: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def count(figures: Figures, good: str, what: str, problem: str) -> None:
    """Add one try, which had this problem, or "" for none: then it ended ``good``."""
    figures.tries += 1
    if problem:
        figures.failures.append(f"{what}: {problem}")
    else:
        figures.counts[good] += 1


def progress_bar(name: str, tries: int):
    """A progress bar on stderr, if that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=tries, desc=name, leave=False, disable=None)


# ---------------------------------------------------------------------------- what a run leaves


def left(run: Path) -> dict:
    """What a finished run leaves, by name, but for what is the machine's mood or the interruptions' doing."""
    last = last_checkpoint(run)
    records = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    files = [last / SINGLE_FILE, last / OPTIMIZER, last / CONFIG, run / SAMPLES]
    return {
        "last": last.name,
        METRICS: [{key: r[key] for key in r if key not in OF_THE_MACHINE} for r in records],
        "t": verify(last)["t"],
        **{path.name: path.read_bytes() for path in files},
    }


def difference(run: Path, whole: dict) -> str:
    """What a run left that is not what the uninterrupted one did; "" if everything is."""
    try:
        found = left(run)
    except Error as error:
        return str(error)
    differ = [name for name in whole if found[name] != whole[name]]
    return f"its {', '.join(differ)} differ" if differ else ""


def damage(run: Path) -> str:
    """What ``verify`` says of the first of a run's checkpoints that is not whole; "" if all are."""
    try:
        for folder in checkpoints(run):
            verify(folder)
    except Error as error:
        return str(error)
    return ""


# ---------------------------------------------------------------------------- runs in this process


def write_text(place: Path) -> Path:
    """The text that every run trains on."""
    text = place / "rhyme.txt"
    text.write_text("the cat sat on the mat. " * 12, encoding="utf-8")
    return text


@contextmanager
def quick() -> Iterator[None]:
    """Without what takes most of the time of so small a run: its pictures."""
    with mock.patch.object(tinyllm.training.run_folder, "plot_losses", lambda *_: None):
        yield


def trained(config: TrainConfig, **options) -> str:
    """Train, quickly and without waiting for the disk; what the run said."""
    no_waiting = mock.patch.object(os, "fsync", lambda descriptor: None)
    with quick(), no_waiting, contextlib.redirect_stdout(io.StringIO()) as said:
        train(config, progress=False, **options)
    return said.getvalue()


NEWEST = OPTIONS["steps"] - 2  # the last checkpoint of the interrupted run; the one before stays, too


def whole_and_interrupted(place: Path) -> tuple[dict, Path]:
    """What an uninterrupted run leaves, and the folder of one that was interrupted after ``NEWEST``."""
    config = TrainConfig(text=str(write_text(place)), out=place / "whole", **OPTIONS)
    trained(config)

    def stop(record: dict) -> None:
        if record["step"] == NEWEST + 1:
            raise _Interrupted

    with contextlib.suppress(_Interrupted):
        trained(replace(config, out=place / "interrupted"), callback=stop)
    return left(place / "whole"), place / "interrupted"


class _Interrupted(Exception):
    """A run does not catch it: what is on the disk then is what a kill would leave."""

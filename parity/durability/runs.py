"""A tiny run with all the state that an interruption could lose, and what it leaves.

The run has dropout, micro-batches, overlapping windows that are shuffled in every epoch, and a checkpoint
after every step. However it is interrupted, damaged and resumed, it must leave weights, optimizer moments,
losses and samples that are bitwise identical to those of the uninterrupted run.

Every test of this folder yields names with their ``Figures``, as ``parity.fuzz.harness.fuzz_all`` does.
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

import tinyllm.training.run_log
from tinyllm.errors import Error
from tinyllm.training.checkpoint import OPTIMIZER, verify
from tinyllm.training.config import TrainConfig
from tinyllm.training.metrics import METRICS
from tinyllm.training.run_log import SAMPLES
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
    batch=24,  # of 63 windows: the third batch of an epoch is smaller
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

OF_THE_MACHINE = {"tokens_per_s", "mean_tokens_per_s", "peak_memory"}  # fields of a record


@dataclass
class Figures:
    """The number of tries, how often they ended in which way, and a sentence on each failure."""

    tries: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def count(figures: Figures, good: str, what: str, problem: str) -> None:
    """Count one try: a failure if there was a ``problem``, otherwise it ended ``good``."""
    figures.tries += 1
    if problem:
        figures.failures.append(f"{what}: {problem}")
    else:
        figures.counts[good] += 1


def progress_bar(name: str, tries: int):
    """A progress bar on stderr if that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=tries, desc=name, leave=False, disable=None)


# ---------------------------------------------------------------------------- what a run leaves


def left(run: Path) -> dict:
    """What a finished run leaves, by name, without timings and the log of interruptions."""
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
    """Which parts of a run differ from those of the uninterrupted one, or ""."""
    try:
        found = left(run)
    except Error as error:
        return str(error)
    differ = [name for name in whole if found[name] != whole[name]]
    return f"its {', '.join(differ)} differ" if differ else ""


def damage(run: Path) -> str:
    """The message of ``verify`` on the first damaged checkpoint of a run, or ""."""
    try:
        for folder in checkpoints(run):
            verify(folder)
    except Error as error:
        return str(error)
    return ""


# ---------------------------------------------------------------------------- runs in this process


def write_text(place: Path) -> Path:
    """Write the text that every run trains on."""
    text = place / "rhyme.txt"
    text.write_text("the cat sat on the mat. " * 12, encoding="utf-8")
    return text


@contextmanager
def quick() -> Iterator[None]:
    """Skip the loss plots, which take most of the time of so small a run."""
    with mock.patch.object(tinyllm.training.run_log, "plot_losses", lambda *_: None):
        yield


def trained(config: TrainConfig, **options) -> str:
    """Train without plots and without waiting for the disk; return the output."""
    no_waiting = mock.patch.object(os, "fsync", lambda descriptor: None)
    with quick(), no_waiting, contextlib.redirect_stdout(io.StringIO()) as output:
        train(config, progress=False, **options)
    return output.getvalue()


NEWEST = OPTIONS["steps"] - 2  # the last checkpoint of the interrupted run; it keeps the previous one, too


def whole_and_interrupted(place: Path) -> tuple[dict, Path]:
    """(what an uninterrupted run leaves, the folder of a run that was interrupted after ``NEWEST``)."""
    config = TrainConfig(text=str(write_text(place)), out=place / "whole", **OPTIONS)
    trained(config)

    def stop(record: dict) -> None:
        if record["step"] == NEWEST + 1:
            raise _Interrupted

    with contextlib.suppress(_Interrupted):
        trained(replace(config, out=place / "interrupted"), callback=stop)
    return left(place / "whole"), place / "interrupted"


class _Interrupted(BaseException):
    """Not caught by a run, so that the disk is left as by a kill."""

"""What does a run lose when it is killed, when the disk refuses, when a bit on the disk flips?

Nothing: that is proven on a tiny run which has everything that could go wrong when it is interrupted, dropout
and micro-batches, overlapping windows in an order shuffled anew in every epoch, a checkpoint after every
step. It is killed, or refused, or damaged; then it goes on; and what it leaves at its end, weights, the
optimizer's averages, losses and samples, must be bit for bit what the same run leaves without all that.

Every proof yields a name and its ``Figures``, as ``fuzz.fuzz_all`` does for files that others wrote.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np

import tinyllm.training.loop
from parity.compare.faults import KILL, KILLED, die, raising, writing
from tinyllm import cli
from tinyllm.errors import Error
from tinyllm.files import SAVING
from tinyllm.training import checkpoint
from tinyllm.training.checkpoint import ABOUT, OPTIMIZER, checkpoint_folder, checkpoints, verify
from tinyllm.training.config import TrainConfig
from tinyllm.training.loop import train
from tinyllm.training.run_folder import METRICS, RUN_CONFIG, SAMPLES, begun_config, last_checkpoint
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

OF_THE_MACHINE = {"tokens_per_s", "mean_tokens_per_s", "gemm_share", "peak_memory"}  # of a record


@dataclass
class Figures:
    """How much was tried, how often it ended in which way, and a sentence on each failure."""

    tries: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


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


# ---------------------------------------------------------------------------- kill -9

READY = "ready"

PATIENCE = 120.0  # seconds, for a run of one


@dataclass(frozen=True)
class Uninterrupted:
    """What a run leaves, its seconds after the imports, and the calls of ``writing`` that it makes."""

    left: dict
    seconds: float
    calls: int


def kill(tries: int, seed: int = 0, keep: str | Path | None = None) -> Iterator[tuple[str, Figures]]:
    """Kill a run this often and let it go on each time, over as many runs as that takes.

    Every second time the process kills itself, before a random one of its calls that write, flush or rename;
    else it is killed from outside at a random moment. After each kill every checkpoint must be whole, and
    what a finished run left must be the uninterrupted one's. The first failure ends the proof; the run that
    failed is copied into ``keep``. The moments follow from the seed, what a process does by then does not.
    """
    figures = Figures(counts=Counter({"survived": 0, INSIDE: 0, "runs": 1}))
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="survive-") as place, _bar(KILLS, tries) as bar:
        whole = _never_killed(Path(place) / "whole")
        run, kills = Path(place) / "run-1", 0
        while kills or figures.tries < tries:
            before = _unfinished(run)
            code, said, _ = _live(_go_on(run), *_death(figures.tries, tries, whole, rng))
            if code == KILLED:
                figures.tries, kills = figures.tries + 1, kills + 1
                figures.counts[INSIDE] += bool(_unfinished(run) - before)
                problem = damage(run)
                bar.update()
            elif code == 0:
                problem = difference(run, whole.left)
            else:
                problem = f"it ended with code {code}: {said}"
            if problem:
                figures.failures.append(f"{run.name}, seed {seed}, killed {kills} times: {problem}")
                _keep(run, keep)
                break
            if code == 0:
                figures.counts["survived"] += kills
                figures.counts["runs"] += figures.tries < tries
                run, kills = Path(place) / f"run-{figures.counts['runs']}", 0
    yield KILLS, figures


KILLS, INSIDE = "kill -9", "of them inside a checkpoint's writing"

NEVER = -1


def _death(
    number: int, tries: int, whole: Uninterrupted, rng: np.random.Generator
) -> tuple[int, float | None]:
    """Before which of its calls a process kills itself, and after how many seconds it is killed."""
    if number >= tries:
        return NEVER, None
    if number % 2:
        return int(rng.integers(whole.calls)), None
    return NEVER, rng.uniform(0, whole.seconds)


def _never_killed(run: Path) -> Uninterrupted:
    code, said, seconds = _live(_go_on(run), NEVER, None)
    if code != 0:
        raise RuntimeError(f"the uninterrupted run ended with code {code}: {said}")
    return Uninterrupted(left(run), seconds, int(said.splitlines()[-1]))


def _keep(run: Path, keep: str | Path | None) -> None:
    if keep is not None and run.exists():
        kept = Path(keep) / f"killed-{run.name}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(run, kept)


def _go_on(run: Path) -> list[str]:
    """The arguments that let a run go on, or begin it as long as its folder has no config.json."""
    if (run / RUN_CONFIG).exists():
        return ["train", "--resume", str(run)]
    shutil.rmtree(run, ignore_errors=True)
    options = OPTIONS | dict(text=_text(run.parent), out=run)
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


def _text(place: Path) -> Path:
    text = place / "rhyme.txt"
    text.write_text("the cat sat on the mat. " * 12, encoding="utf-8")
    return text


def _unfinished(run: Path) -> set[tuple[str, int]]:
    """The checkpoints that were being written when their process died: names and times."""
    return {(path.name, path.stat().st_mtime_ns) for path in run.glob(f"{SAVING}step-*")}


def _live(arguments: list[str], dies_at: int, moment: float | None) -> tuple[int, str, float]:
    """Run tinyllm in a process of its own; its exit code, what it said, and its seconds after the imports.

    It kills itself before call ``dies_at`` of ``writing``, or is killed ``moment`` seconds after the imports.
    """
    command = [sys.executable, "-m", "parity.durability.survive", str(dies_at), *arguments]
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    with subprocess.Popen(command, **output) as process:
        said = process.stdout.readline().removeprefix(READY)
        started = time.perf_counter()
        try:
            process.wait(PATIENCE if moment is None else moment)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, KILL)
            if moment is None:
                raise RuntimeError(f"a run of seconds is not done after {PATIENCE:g} s") from None
        seconds = time.perf_counter() - started
        said += process.stdout.read()
    return process.returncode, said, seconds


def _child(dies_at: int, arguments: list[str]) -> int:
    """Like tinyllm's command line; says when its imports are done, and at the end how often it wrote."""
    print(READY, flush=True)
    with _quick(), writing(dies_at, die) as calls:
        code = cli.main(arguments)
    print(len(calls))
    return code


# ---------------------------------------------------------------------------- runs in this process


@contextmanager
def _quick() -> Iterator[None]:
    """Without what takes most of the time of so small a run: pictures, and the GEMM rate."""
    with (
        mock.patch.object(tinyllm.training.run_folder, "plot_losses", lambda *_: None),
        mock.patch.object(tinyllm.training.loop, "_best_gemm_rate", lambda dtype: 1e9),
    ):
        yield


def _trained(config: TrainConfig, **options) -> str:
    """Train, quickly and without waiting for the disk; what the run said."""
    no_waiting = mock.patch.object(os, "fsync", lambda descriptor: None)
    with _quick(), no_waiting, contextlib.redirect_stdout(io.StringIO()) as said:
        train(config, progress=False, **options)
    return said.getvalue()


NEWEST = OPTIONS["steps"] - 2  # the last checkpoint of the run that is broken off; the one before stays, too


def _whole_and_broken_off(place: Path) -> tuple[dict, Path]:
    """What an uninterrupted run leaves, and the folder of one that came no further than ``NEWEST``."""
    config = TrainConfig(text=str(_text(place)), out=place / "whole", **OPTIONS)
    _trained(config)

    def stop(record: dict) -> None:
        if record["step"] == NEWEST + 1:
            raise _BrokenOff

    with contextlib.suppress(_BrokenOff):
        _trained(replace(config, out=place / "broken-off"), callback=stop)
    return left(place / "whole"), place / "broken-off"


class _BrokenOff(Exception):
    """A run does not catch it: what is on the disk then is what a kill would leave."""


# ---------------------------------------------------------------------------- a disk that fails


def failing_disk(every: int = 1) -> Iterator[tuple[str, Figures]]:
    """Let every ``every``-th call that writes, flushes or renames for a checkpoint fail, one in each try.

    ENOSPC is a full disk, EIO a broken one. The run must stop, the checkpoints that were there must be whole,
    and the run that goes on from them must end as the uninterrupted one.
    """
    with tempfile.TemporaryDirectory(prefix="survive-") as folder:
        place = Path(folder)
        whole, begun = _whole_and_broken_off(place)
        with _disk(None, None) as saves:
            _trained(begun_config(shutil.copytree(begun, place / "counted")))
        calls = list(enumerate(saves[0]))[::every]
        for code in (errno.ENOSPC, errno.EIO):
            figures, name = Figures(), f"{errno.errorcode[code]} in a checkpoint's writing"
            with _bar(name, len(calls)) as bar:
                for number, call in calls:
                    run = shutil.copytree(begun, place / "run")
                    problem = _after_failing(run, whole, number, call, code)
                    shutil.rmtree(run)
                    _count(figures, "survived", f"call {number} ({call})", problem)
                    bar.update()
            yield name, figures


@contextmanager
def _disk(fail_at: int | None, fail: Callable[[], None] | None) -> Iterator[list[list[str]]]:
    """Yields the calls for each checkpoint; one for the first fails. What else a run writes is left alone."""
    saves = []

    def save(*args) -> None:
        with writing(None if saves else fail_at, fail) as calls:
            saves.append(calls)
            checkpoint.save_checkpoint(*args)

    with mock.patch.object(tinyllm.training.run_folder, "save_checkpoint", save):
        yield saves


def _after_failing(run: Path, whole: dict, number: int, call: str, code: int) -> str:
    """Let a call fail, and the run go on; what is wrong then, "" if nothing is."""
    failed = False
    try:
        with _disk(number, raising(OSError(code, os.strerror(code)))):
            _trained(begun_config(run))
    except OSError as error:
        failed = os.strerror(code) in str(error)
    if not failed and call != "mkdir":  # a folder that is there already need not be made
        return "nobody noticed"
    if failed and not checkpoint_folder(run, NEWEST).exists():
        return "the checkpoint before is gone"
    if problem := damage(run):
        return problem
    try:
        _trained(begun_config(run))
    except (Error, OSError) as error:
        return str(error)
    return difference(run, whole)


# ---------------------------------------------------------------------------- flipped bits


def bit_flips(positions: int = 2000, seed: int = 0) -> Iterator[tuple[str, Figures]]:
    """Flip one random bit of a run's newest checkpoint, so many times, shared out over its parts.

    ``verify`` must name the file, the resumed run must say the same and take the checkpoint before, and it
    must end as the uninterrupted one.
    """
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="survive-") as folder:
        place = Path(folder)
        whole, begun = _whole_and_broken_off(place)
        parts = _parts(checkpoint_folder(begun, NEWEST))
        for number, (name, (file, where)) in enumerate(parts.items()):
            share = positions * (number + 1) // len(parts) - positions * number // len(parts)
            figures = Figures()
            with _bar(name, share) as bar:
                for _ in range(share):
                    byte, bit = int(rng.choice(where)), int(rng.integers(8))
                    run = shutil.copytree(begun, place / "run")
                    problem = _after_flip(run, whole, file, byte, bit)
                    shutil.rmtree(run)
                    _count(figures, "detected", f"bit {bit} of byte {byte} of {file}", problem)
                    bar.update()
            yield f"a bit of {name}", figures


def _parts(folder: Path) -> dict[str, tuple[str, range]]:
    """Of a checkpoint: what a part is, its file, and its bytes there."""
    parts = {}
    for file in (SINGLE_FILE, OPTIMIZER):
        size = (folder / file).stat().st_size
        with open(folder / file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
        parts[f"{file}: length of the header"] = file, range(8)
        parts[f"{file}: header"] = file, range(8, 8 + length)
        parts[f"{file}: numbers"] = file, range(8 + length, size)
    return parts | {file: (file, range((folder / file).stat().st_size)) for file in (CONFIG, ABOUT)}


def _after_flip(run: Path, whole: dict, file: str, byte: int, bit: int) -> str:
    """Flip a bit and let the run go on; what is wrong then, "" if nothing is."""
    damaged = checkpoint_folder(run, NEWEST)
    data = bytearray((damaged / file).read_bytes())
    data[byte] ^= 1 << bit
    (damaged / file).write_bytes(data)
    try:
        verify(damaged)
    except Error as error:
        found = str(error)
    else:
        return "verify finds nothing"
    if not found.startswith(f"{damaged / file} is damaged"):
        return f"verify says something else: {found}"
    try:
        said = _trained(begun_config(run))
    except (Error, OSError) as error:
        return str(error)
    if found not in said or f"going on after step {NEWEST - 1} " not in said:
        return f"the resumed run says something else: {said}"
    return difference(run, whole)


def _count(figures: Figures, good: str, what: str, problem: str) -> None:
    figures.tries += 1
    if problem:
        figures.failures.append(f"{what}: {problem}")
    else:
        figures.counts[good] += 1


def _bar(name: str, tries: int):
    """A progress bar on stderr, if that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=tries, desc=name, leave=False, disable=None)


if __name__ == "__main__":
    sys.exit(_child(int(sys.argv[1]), sys.argv[2:]))

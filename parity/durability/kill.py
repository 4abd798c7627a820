"""``kill -9`` at any moment of a run: nothing that was saved is lost, and the resumed run ends the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parity.durability.faults import KILL, KILLED, die, writing
from parity.durability.runs import OPTIONS, Figures, damage, difference, left, progress_bar, quick, write_text
from tinyllm import cli
from tinyllm.files import SAVING
from tinyllm.training.run_folder import RUN_CONFIG

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
    with tempfile.TemporaryDirectory(prefix="kill-") as place, progress_bar(KILLS, tries) as bar:
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
    options = OPTIONS | dict(text=write_text(run.parent), out=run)
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


def _unfinished(run: Path) -> set[tuple[str, int]]:
    """The checkpoints that were being written when their process died: names and times."""
    return {(path.name, path.stat().st_mtime_ns) for path in run.glob(f"{SAVING}step-*")}


def _live(arguments: list[str], dies_at: int, moment: float | None) -> tuple[int, str, float]:
    """Run tinyllm in a process of its own; its exit code, what it said, and its seconds after the imports.

    It kills itself before call ``dies_at`` of ``writing``, or is killed ``moment`` seconds after the imports.
    """
    command = [sys.executable, "-m", "parity.durability.kill", str(dies_at), *arguments]
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
    with quick(), writing(dies_at, die) as calls:
        code = cli.main(arguments)
    print(len(calls))
    return code


if __name__ == "__main__":
    sys.exit(_child(int(sys.argv[1]), sys.argv[2:]))

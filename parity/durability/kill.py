"""``kill -9`` at random moments of a run: its checkpoints stay intact, and the resumed run ends the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parity.bench.process import python_path
from parity.durability.faults import KILL, KILLED, die, writing
from parity.durability.runs import OPTIONS, Figures, damage, difference, left, progress_bar, quick, write_text
from tinyllm import cli
from tinyllm.files import SAVING
from tinyllm.training.begun import RUN_CONFIG

READY = "ready"

TIMEOUT = 120.0  # seconds, for a run that takes about one


@dataclass(frozen=True)
class Uninterrupted:
    """What a run leaves, its duration after the imports, and its number of calls counted by ``writing``."""

    left: dict
    seconds: float
    calls: int


def kill(tries: int, seed: int = 0, keep: str | Path | None = None) -> Iterator[tuple[str, Figures]]:
    """Kill a run ``tries`` times, resuming it each time; start a new run whenever one finishes.

    Every other time the process kills itself before a random call that writes, flushes or renames; otherwise
    it is killed from outside at a random moment. After each kill every checkpoint must be intact, and a
    finished run must leave what the uninterrupted one left. The first failure stops the test, and the run
    that failed is copied into ``keep``. The seed determines the moments, but not how far a process has got by
    then.
    """
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        place = Path(folder)
        whole = _never_killed(place / "whole")

        def attempt(run: Path, number: int) -> tuple[bool, int, str]:
            code, output, _ = _run(command(run), *_death(number, tries, whole, rng))
            return code == KILLED, code, output

        figures = killed_and_resumed(KILLS, place, tries, seed, whole.left, attempt)
        if figures.failures:
            _keep(place / f"run-{figures.counts['runs']}", keep)
    yield KILLS, figures


KILLS, INSIDE = "kill -9", "of them while saving a checkpoint"

NEVER = -1


# attempt(run, number) starts or resumes a run -> (whether it was killed, its exit code, its output)
Attempt = Callable[[Path, int], tuple[bool, int, str]]


def killed_and_resumed(
    name: str, place: Path, tries: int, seed: int, whole: dict, attempt: Attempt
) -> Figures:
    """Let ``tries`` attempts be killed, resume each run to its end, and compare it with ``whole``."""
    figures = Figures(counts=Counter({"recovered": 0, INSIDE: 0, "runs": 1}))
    run, kills = place / "run-1", 0
    with progress_bar(name, tries) as bar:
        while kills or figures.tries < tries:
            before = unfinished(run)
            killed, code, output = attempt(run, figures.tries)
            if killed:
                figures.tries, kills = figures.tries + 1, kills + 1
                figures.counts[INSIDE] += bool(unfinished(run) - before)
                problem = damage(run)
                bar.update()
            elif code == 0:
                problem = difference(run, whole)
            else:
                problem = f"it exited with code {code}: {output}"
            if problem:
                figures.failures.append(f"{run.name}, seed {seed}, killed {kills} times: {problem}")
                break
            if code == 0:
                figures.counts["recovered"] += kills
                figures.counts["runs"] += figures.tries < tries
                run, kills = place / f"run-{figures.counts['runs']}", 0
    return figures


def _death(
    number: int, tries: int, whole: Uninterrupted, rng: np.random.Generator
) -> tuple[int, float | None]:
    """(the call before which a process kills itself, the seconds after which it is killed from outside)."""
    if number >= tries:
        return NEVER, None
    if number % 2:
        return int(rng.integers(whole.calls)), None
    return NEVER, rng.uniform(0, whole.seconds)


def _never_killed(run: Path) -> Uninterrupted:
    code, output, seconds = _run(command(run), NEVER, None)
    if code != 0:
        raise RuntimeError(f"the uninterrupted run exited with code {code}: {output}")
    return Uninterrupted(left(run), seconds, int(output.splitlines()[-1]))


def _keep(run: Path, keep: str | Path | None) -> None:
    if keep is not None and run.exists():
        kept = Path(keep) / f"killed-{run.name}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(run, kept)


def command(run: Path, *more: str, **changes) -> list[str]:
    """The arguments that resume a run, or that start it if its folder has no config.json yet."""
    if (run / RUN_CONFIG).exists():
        return ["train", f"--resume={run}", *more]
    shutil.rmtree(run, ignore_errors=True)
    options = OPTIONS | changes | dict(text=write_text(run.parent), out=run)
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()), *more]


def unfinished(run: Path) -> set[tuple[str, int]]:
    """The partly written checkpoints that dead processes left: names and times."""
    return {(path.name, path.stat().st_mtime_ns) for path in run.glob(f"{SAVING}step-*")}


def _run(arguments: list[str], dies_at: int, moment: float | None) -> tuple[int, str, float]:
    """Run tinyllm in a process; return its exit code, its output, and its seconds after the imports.

    It kills itself before call ``dies_at`` of ``writing``, or is killed ``moment`` seconds after the imports.
    """
    command = [sys.executable, "-P", "-m", "parity.durability.kill", str(dies_at), *arguments]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    with subprocess.Popen(command, env=os.environ | python_path(), **streams) as process:
        output = process.stdout.readline().removeprefix(READY)
        started = time.perf_counter()
        try:
            process.wait(TIMEOUT if moment is None else moment)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, KILL)
            if moment is None:
                raise RuntimeError(f"the run did not finish within {TIMEOUT:g} s") from None
        seconds = time.perf_counter() - started
        output += process.stdout.read()
    return process.returncode, output, seconds


def _child(dies_at: int, arguments: list[str]) -> int:
    """tinyllm's command line; prints READY after the imports, and at the end the number of counted calls."""
    print(READY, flush=True)
    with quick(), writing(dies_at, die) as calls:
        code = cli.main(arguments)
    print(len(calls))
    return code


if __name__ == "__main__":
    sys.exit(_child(int(sys.argv[1]), sys.argv[2:]))

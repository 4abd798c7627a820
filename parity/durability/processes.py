"""``kill -9`` of one of several processes at random moments: all end, and the resumed run ends the same.

As a program (``python -m parity.durability.processes``) this is one of those processes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parity.bench.process import python_path
from parity.durability.faults import KILL, die, writing
from parity.durability.kill import NEVER, command, killed_and_resumed
from parity.durability.runs import Figures, left, quick
from tinyllm import cli
from tinyllm.backend.distributed import launched
from tinyllm.errors import Error

READY = re.compile(r"ready: rank (\d+), PID (\d+)\n")

TIMEOUT, SECONDS_TO_END = 180.0, 20.0  # of a whole run, and of the others after one was killed


@dataclass(frozen=True)
class Death:
    """The end of one process: before a counted call of ``writing``, or after some seconds."""

    rank: int
    call: int = NEVER
    seconds: float | None = None


def kill_processes(
    tries: int, processes: int = 2, seed: int = 0, options: tuple[str, ...] = ()
) -> Iterator[tuple[str, Figures]]:
    """Kill one process of a run ``tries`` times, resuming it each time; start a new one when one finishes.

    Each rank is killed in turn: the first one, every other time, before a random call that writes, flushes
    or renames; else at a random moment. mpiexec must then end the others within seconds, every checkpoint
    must be intact, and a finished run must leave what the uninterrupted one left, bit for bit.
    """
    rng, name = np.random.default_rng(seed), f"kill -9 of one of {processes} processes"
    options = ("--distributed=mpi", *options)
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        place = Path(folder)
        whole, seconds, calls = _never_killed(place / "whole", processes, options)

        def attempt(run: Path, number: int) -> tuple[bool, int, str]:
            rank = number % processes
            death = Death(rank, seconds=rng.uniform(0, seconds))
            if number >= tries:
                death = None
            elif rank == 0 and number // processes % 2:
                death = Death(0, call=int(rng.integers(calls)))
            code, output, _ = _run(command(run, *options, micro_batch=2), processes, death)
            return death is not None and code in (KILL, 128 + KILL), code, output

        figures = killed_and_resumed(name, place, tries, seed, whole, attempt)
    yield name, figures


def launcher() -> str:
    """The path of mpiexec; ``Error`` if it or mpi4py is missing."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None or importlib.util.find_spec("mpi4py") is None:
        raise Error("several processes need mpi4py and mpiexec: pip install mpi4py mpich")
    return found


def _never_killed(run: Path, processes: int, options: tuple[str, ...]) -> tuple[dict, float, int]:
    """What the run leaves, its seconds after the imports, and its first process's number of counted calls."""
    code, output, seconds = _run(command(run, *options, micro_batch=2), processes, None)
    if code != 0:
        raise RuntimeError(f"the uninterrupted run exited with code {code}: {output}")
    return left(run), seconds, int(re.search(r"calls of rank 0: (\d+)", output)[1])


def _run(arguments: list[str], processes: int, death: Death | None) -> tuple[int, str, float]:
    """Run tinyllm in processes; return mpiexec's exit code, the output, and the seconds after the imports."""
    death = death or Death(0)
    child = [sys.executable, "-P", "-m", "parity.durability.processes", str(death.rank), str(death.call)]
    command = [launcher(), "-n", str(processes), *child, *arguments]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    environment = os.environ | python_path() | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, **streams) as process:
        pids, output = {}, ""
        while len(pids) < processes and (line := process.stdout.readline()):
            if found := READY.fullmatch(line):
                pids[int(found[1])] = int(found[2])
            else:
                output += line
        started = time.perf_counter()
        if death.seconds is not None and death.rank in pids:
            time.sleep(death.seconds)
            with contextlib.suppress(ProcessLookupError):  # it has finished
                os.kill(pids[death.rank], KILL)
        limit = TIMEOUT if death.seconds is None else SECONDS_TO_END
        try:
            output += process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            process.terminate()
            raise RuntimeError(f"the run did not end within {limit:g} s") from None
    return process.returncode, output, time.perf_counter() - started


def _child(rank: int, dies_at: int, arguments: list[str]) -> int:
    here = launched()[1]
    print(f"ready: rank {here}, PID {os.getpid()}", flush=True)
    with quick(), writing(dies_at if here == rank else NEVER, die) as calls:
        code = cli.main(arguments)
    if here == 0:
        print(f"calls of rank 0: {len(calls)}")
    return code


if __name__ == "__main__":
    sys.exit(_child(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))

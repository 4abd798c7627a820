"""Fault injection and crash recovery: one table of what was done to runs and to files, and how it ended.

Runs are killed (``kill.py``), refused by the disk, and damaged on it (``disk.py``); every file that we read
is broken in the ways of ``parity.fuzz``. And what safety costs: a checkpoint of GPT-2 124M, saved, verified,
loaded.
"""

from __future__ import annotations

import itertools
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from parity.durability import disk, kill
from parity.fuzz import harness
from parity.fuzz.targets import TARGETS
from tinyllm.models import GPT2, GPT2Config
from tinyllm.nn import Module
from tinyllm.optim import AdamW
from tinyllm.training.checkpoint import load_checkpoint, machine, save_checkpoint, verify
from tinyllm.weights.runs import checkpoint_folder

HEAD = "proof", "tries", "outcome", "failures"

SHOWN = 3_000  # characters of a failure on the screen; the JSON file has them all


@dataclass(frozen=True)
class Row:
    """A line of the table: ``outcome`` says how often a try ended in which way."""

    proof: str
    tries: int
    outcome: dict[str, int]
    failures: list[str]

    def __str__(self) -> str:
        outcome = ", ".join(f"{count:,} {word}" for word, count in self.outcome.items())
        return line((self.proof, f"{self.tries:,}", outcome, f"{len(self.failures):,}"))


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def proofs(kills: int, flips: int, cases: int, seed: int = 0, keep: Path | None = None) -> Iterator[Row]:
    """Every proof's row as soon as it is done. A killed run or a broken file that failed goes to ``keep``."""
    of_runs = itertools.chain(kill.kill(kills, seed, keep), disk.failing_disk(), disk.bit_flips(flips, seed))
    for name, found in of_runs:
        yield Row(name, found.tries, dict(found.counts), found.failures)
    for name, found in harness.fuzz_all(TARGETS, cases, seed, keep):
        outcome = {"refused": found.refused, "loaded": found.loaded}
        yield Row(f"fuzzed: {name}", found.tries, outcome, [str(failure) for failure in found.failures])


def report(rows: Iterable[Row], seed: int, costs: bool) -> dict:
    """Print the table, line by line as the rows come, and what failed; with ``costs``, of a checkpoint, too.

    Returns all of it, as JSON can hold it.
    """
    print(line(HEAD), line(["---"] * len(HEAD)), sep="\n", flush=True)
    result = {"seed": seed, "python": platform.python_version(), "machine": machine("cpu"), "proofs": []}
    for row in rows:
        print(row, flush=True)
        result["proofs"].append(asdict(row))
    for row in result["proofs"]:
        for failure in row["failures"]:
            rest = f" … ({len(failure):,} characters)" if len(failure) > SHOWN else ""
            print(f"\n{row['proof']}: {failure[:SHOWN]}{rest}")
    if costs:
        result["checkpoint_124m"] = costs_of_a_checkpoint(GPT2Config())
        print(f"\n{describe(result['checkpoint_124m'])}")
    return result


def failed(result: dict) -> bool:
    return any(row["failures"] for row in result["proofs"])


# ---------------------------------------------------------------------------- what a checkpoint costs


def costs_of_a_checkpoint(config: GPT2Config) -> dict[str, float]:
    """Save, verify and load a checkpoint of random numbers: seconds of each, and bytes on the disk.

    It is read right after it was written, so the system still has it in memory.
    """
    model, optimizer = _as_after_a_step(config, seed=0)
    other, its_optimizer = _as_after_a_step(config, seed=1)
    about = dict(step=1, tokens=0, val_loss=None, samples_bytes=0, run="", machine=machine("cpu"))
    with tempfile.TemporaryDirectory(prefix="reliability-") as run:
        folder = checkpoint_folder(Path(run), about["step"])
        times = [time.perf_counter()]
        save_checkpoint(folder, model, optimizer, about)
        times.append(time.perf_counter())
        about = verify(folder)
        times.append(time.perf_counter())
        load_checkpoint(folder, about, other, its_optimizer)
        times.append(time.perf_counter())
        size = sum(path.stat().st_size for path in folder.iterdir())
    for name, parameter in model.named_parameters():
        here = [parameter.data, *optimizer.state[name][1:]]
        there = [dict(other.named_parameters())[name].data, *its_optimizer.state[name][1:]]
        assert all(map(np.array_equal, here, there)), f"{name} did not come back bit for bit"
    save, check, load = np.diff(times).tolist()
    parameters = model.num_parameters()
    return dict(parameters=parameters, bytes=size, save_s=save, verify_s=check, load_s=load)


def _as_after_a_step(config: GPT2Config, seed: int) -> tuple[Module, AdamW]:
    """A model, and an optimizer with averages for every parameter: random, for only their size counts."""
    rng = np.random.default_rng(seed)
    model = GPT2(config, rng=rng)
    optimizer = AdamW(model, lr=1e-3)
    for name, parameter in model.named_parameters():
        m, v = (rng.random(parameter.shape, dtype=np.float32) for _ in "mv")
        optimizer.state[name] = [1, m, v]
    return model, optimizer


def describe(costs: dict[str, float]) -> str:
    """The costs as a table of two lines."""
    megabytes = costs["bytes"] / 1e6
    cells = {
        "checkpoint": f"GPT-2, {costs['parameters']:,} parameters, float32, with AdamW's averages",
        "size": f"{megabytes:,.1f} MB",
        "save": f"{costs['save_s']:.2f} s ({megabytes / costs['save_s']:,.0f} MB/s)",
        "verify": f"{costs['verify_s']:.2f} s",
        "load": f"{costs['load_s']:.2f} s",
        "resume (both)": f"{costs['verify_s'] + costs['load_s']:.2f} s",
    }
    return "\n".join((line(cells), line(["---"] * len(cells)), line(cells.values())))

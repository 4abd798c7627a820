"""The table of ``python -m parity reliability``: injected faults, and the outcome of each.

Runs are killed (``kill.py``), their disk fails, and bits of their checkpoints flip (``disk.py``). Files of
every format that tinyllm reads are broken (``parity.fuzz``). The cost of safety is measured as well: saving,
verifying and loading a checkpoint of GPT-2 124M.
"""

from __future__ import annotations

import itertools
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from parity import tables
from parity.bench import process
from parity.durability import disk, kill
from parity.durability.processes import kill_processes
from parity.fuzz import harness
from parity.fuzz.targets import TARGETS
from tinyllm.models import GPT2, GPT2Config
from tinyllm.nn import Module
from tinyllm.optim import AdamW
from tinyllm.training.checkpoint import load_checkpoint, machine, save_checkpoint, verify
from tinyllm.weights.runs import checkpoint_folder

HEAD = "fault", "tries", "outcome", "failures"

# Rows of the published table -> how the names of their faults begin
KINDS = {
    "kill -9 at a random moment": "kill -9",
    "ENOSPC or EIO while saving a checkpoint": ("ENOSPC", "EIO"),
    "a flipped bit of a checkpoint": "a bit of",
    "a broken file": "fuzzed:",
}

SHOWN = 3_000  # characters printed of a failure; the JSON file has all of them


@dataclass(frozen=True)
class Row:
    """A row of the table; ``outcome`` counts the tries by how they ended."""

    proof: str
    tries: int
    outcome: dict[str, int]
    failures: list[str]

    def __str__(self) -> str:
        outcome = ", ".join(f"{count:,} {word}" for word, count in self.outcome.items())
        return tables.line((self.proof, f"{self.tries:,}", outcome, f"{len(self.failures):,}"))


def proofs(
    kills: int,
    flips: int,
    cases: int,
    seed: int = 0,
    keep: Path | None = None,
    processes: int | None = None,
) -> Iterator[Row]:
    """Yield the row of every fault as soon as it is complete; copy failed runs and files to ``keep``."""
    of_several = kill_processes(kills, processes, seed) if processes else ()
    of_one = kill.kill(kills, seed, keep), disk.failing_disk(), disk.bit_flips(flips, seed)
    of_runs = itertools.chain(of_several, *of_one)
    for name, found in of_runs:
        yield Row(name, found.tries, dict(found.counts), found.failures)
    for name, found in harness.fuzz_all(TARGETS, cases, seed, keep):
        outcome = {"refused": found.refused, "loaded": found.loaded}
        yield Row(f"fuzzed: {name}", found.tries, outcome, [str(failure) for failure in found.failures])


def report(rows: Iterable[Row], seed: int, costs: bool) -> dict:
    """Print each row as soon as it is complete, then the failures and, with ``costs``, those of a checkpoint.

    Returns the result for JSON.
    """
    print(tables.markdown(HEAD, ()), flush=True)
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
    """Whether any try failed."""
    return any(row["failures"] for row in result["proofs"])


def markdown(result: dict) -> str:
    """The tables for the page: one row for each of ``KINDS``, and the costs of a checkpoint."""
    facts, rows = process.machine(), []
    for kind, names in KINDS.items():
        same = [row for row in result["proofs"] if row["proof"].startswith(names)]
        outcome = sum((Counter(row["outcome"]) for row in same), Counter())
        rows.append(Row(kind, sum(row["tries"] for row in same), outcome, []))
    about = f"{facts['cpu']} ({facts['instructions']})", f"{facts['cores']} cores"
    table = "\n".join([tables.markdown(HEAD, ()), *map(str, rows)])
    parts = tables.measured("reliability --large", *about), table, describe(result["checkpoint_124m"])
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------- costs of a checkpoint


def costs_of_a_checkpoint(config: GPT2Config) -> dict[str, float]:
    """Save, verify and load a checkpoint of random numbers; return the seconds of each and its bytes.

    It is read right after it was written, so it comes from the system's cache.
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
        assert all(map(np.array_equal, here, there)), f"{name} is not bitwise identical after loading"
    save, check, load = np.diff(times).tolist()
    parameters = model.num_parameters()
    return dict(parameters=parameters, bytes=size, save_s=save, verify_s=check, load_s=load)


def _as_after_a_step(config: GPT2Config, seed: int) -> tuple[Module, AdamW]:
    """A model and an optimizer with moments for every parameter; random, because only their size matters."""
    rng = np.random.default_rng(seed)
    model = GPT2(config, rng=rng)
    optimizer = AdamW(model, lr=1e-3)
    for name, parameter in model.named_parameters():
        m, v = (rng.random(parameter.shape, dtype=np.float32) for _ in "mv")
        optimizer.state[name] = [1, m, v]
    return model, optimizer


def describe(costs: dict[str, float]) -> str:
    """The costs as a Markdown table."""
    megabytes = costs["bytes"] / 1e6
    cells = {
        "checkpoint": f"GPT-2, {costs['parameters']:,} parameters, float32, with AdamW's moments",
        "size": f"{megabytes:,.1f} MB",
        "save": f"{costs['save_s']:.2f} s ({megabytes / costs['save_s']:,.0f} MB/s)",
        "verify": f"{costs['verify_s']:.2f} s",
        "load": f"{costs['load_s']:.2f} s",
        "resume (both)": f"{costs['verify_s'] + costs['load_s']:.2f} s",
    }
    return tables.markdown(cells, [cells.values()])

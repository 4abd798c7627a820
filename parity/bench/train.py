"""How fast is tinyllm beside PyTorch, and in how much memory?

``python -m parity bench train`` lets several *variants* (ways to do the work: ``train_variants.py``) train
the same model on the same tokens and prints what it measured. Each measurement has a process of its own,
in turn (A B A B …): a process's peak memory never falls, and two libraries' thread pools share the cores.

At its top this module imports the standard library only, so that a variant's process holds that variant's
libraries and nothing else.
"""

import json
import math
import signal
import sys
import time
from dataclasses import asdict
from statistics import median

from parity.bench.process import (
    describe,
    in_own_process,
    libraries,
    machine,
    peak_memory,
    result_of,
    spread,
    with_threads,
)
from parity.bench.reach import COSTS, ratio_by_round, reach_rows, reach_table
from parity.bench.train_variants import VARIANTS, WORKS, Work

# ---- One measurement: what runs in a variant's own process ----


def run_variant(variant: str, work: Work, warmup: int, steps: int, threads: int) -> dict:
    """Train ``warmup`` untimed and ``steps`` timed steps, and return what they cost.

    Returns ``seconds`` and minor ``page_faults`` of each timed step, ``losses`` of every step (warm-up
    included), ``peak_bytes`` of the whole process, ``built_bytes``, the part of it that libraries and model
    had taken before the first step, and the ``libraries`` loaded, with version and BLAS.
    """
    import resource

    import numpy as np

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, work.vocab_size, (warmup + steps, 2, work.batch, work.context))
    step = VARIANTS[variant](work, threads)
    built_bytes = peak_memory()
    seconds, page_faults, losses = [], [], []
    for ids, targets in tokens:  # both (B, T)
        faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        losses.append(step(ids, targets))
        seconds.append(time.perf_counter() - start)
        page_faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before)
    if not all(math.isfinite(loss) for loss in losses if loss is not None):
        sys.exit(f"{variant}: the losses {losses} are not all finite, so its times mean nothing.")
    costs = {"seconds": seconds[warmup:], "page_faults": page_faults[warmup:], "losses": losses}
    return costs | {"peak_bytes": peak_memory(), "built_bytes": built_bytes, "libraries": libraries()}


# ---- All measurements, in turn ----


def train(variants: dict[str, list[str]], rounds: int, warmup: int, steps: int, threads: int) -> dict:
    """Measure the variants of each work (name in ``WORKS`` -> variants); all there is to report, for JSON."""
    counts, works, before = {"warmup": warmup, "steps": steps, "threads": threads}, {}, machine()
    for name, chosen in variants.items():
        print(f"{name}:", file=sys.stderr)
        runs = measure(WORKS[name], chosen, rounds, **counts)
        summary, ratios = summarise(runs, WORKS[name]), compare(runs)
        works[name] = {"sizes": asdict(WORKS[name]), "variants": summary, "ratios": ratios, "runs": runs}
    return {
        "request": {"rounds": rounds, **counts},
        "machine": before,
        "works": works,
        "reach": reach_rows({name: work["runs"] for name, work in works.items()}),
    }


def measure(work: Work, variants: list[str], rounds: int, warmup: int, steps: int, threads: int) -> dict:
    """Let the variants take turns; returns variant -> [result of ``run_variant``, one per round].

    A variant that fails ends the program with exit code 1: its own message stands on stderr.
    """
    environment = with_threads(threads)
    runs = {variant: [] for variant in variants}
    for number in range(1, rounds + 1):
        for variant in variants:
            print(f"round {number}/{rounds}: {variant} …", end=" ", file=sys.stderr, flush=True)
            child = in_own_process(
                "parity.bench.train", [variant, asdict(work), warmup, steps, threads], environment
            )
            runs[variant].append(result_of(child, variant, number))
            print(f"{median(runs[variant][-1]['seconds']):.4g} s per step", file=sys.stderr)
    return runs


# ---- The report ----


def summarise(runs: dict[str, list[dict]], work: Work) -> dict[str, dict]:
    """Per variant: seconds and page faults over all timed steps, tokens per second, peak memory."""
    summary = {}
    for variant, rounds in runs.items():
        seconds = spread([value for run in rounds for value in run["seconds"]])
        summary[variant] = {
            "seconds": seconds,
            "tokens_per_s": work.batch * work.context / seconds["median"],
            "peak_bytes": spread([run["peak_bytes"] for run in rounds]),
            "page_faults": spread([value for run in rounds for value in run["page_faults"]]),
        }
    return summary


def compare(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """The first variant's cost divided by each other's in the same round, and the spread of those ratios."""
    first, *others = runs
    ratios = {other: {} for other in others}
    for other in others:
        memory = [] if other == "gemms" else ["peak memory"]  # it holds no gradients and trains nothing
        for name in ["time (medians)", "time (minima)", *memory]:
            values = ratio_by_round(runs, COSTS[name], first, [other])
            ratios[other][name] = spread(values) | {"rounds": values}
    return ratios


def report(result: dict) -> str:
    """What ``python -m parity bench train`` prints: the tables of every work, then the table of reach."""
    lines = [describe(result[name]) for name in ("request", "machine")]
    for name, work in result["works"].items():
        lines += ["", f"{name}: {describe(work['sizes'])}", *work_tables(work)]
    if result["reach"]:
        lines += ["", *reach_table(result["reach"])]
    return "\n".join(line.rstrip() for line in lines)


def work_tables(work: dict) -> list[str]:
    """What each variant cost, and the first one's cost divided by each other's."""
    runs = work["runs"]
    lines = [f"{variant}: {describe(rounds[0]['libraries'])}" for variant, rounds in runs.items()]
    row = "{:<26}{:>9}{:>9}{:>9}{:>10}{:>9}{:>13}  {}".format
    lines += ["", row("variant", "s/step", "min", "max", "tokens/s", "peak GB", "faults/step", "loss")]
    for variant, cost in work["variants"].items():
        seconds = [f"{value:.4f}" for value in cost["seconds"].values()]
        memory, faults = cost["peak_bytes"]["median"] / 1e9, cost["page_faults"]["median"]
        numbers = [*seconds, f"{cost['tokens_per_s']:.0f}", f"{memory:.3f}", f"{faults:.0f}"]
        losses = runs[variant][0]["losses"]
        trained = "none" if losses[0] is None else f"{losses[0]:.4f} to {losses[-1]:.4f}"
        lines.append(row(variant, *numbers, trained))
    for other, ratios in work["ratios"].items():
        lines += ["", row(f"{next(iter(runs))} / {other}", "median", "min", "max", "by round:", "", "", "")]
        for name, ratio in ratios.items():
            numbers = [ratio["median"], ratio["min"], ratio["max"], *ratio["rounds"]]
            lines.append(f"{name:<26}" + "".join(f"{value:>9.3f}" for value in numbers))
    return lines


if __name__ == "__main__":  # a variant's own process, started by measure
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C measure's process speaks, this one just ends
    variant, work, *counts = json.loads(sys.argv[1])
    print(json.dumps(run_variant(variant, Work(**work), *counts)))

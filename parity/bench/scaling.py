"""How do time and memory of a training step grow with the model, the batch and the threads?

``python -m parity bench scaling`` changes one size of a small model at a time and measures tinyllm and
PyTorch eager as ``bench train`` does: a table, a log-log plot of both, and the exponent of each growth, a in
cost ~ sizeᵃ between the two largest sizes. What a process holds before its first step (libraries, and the
model's parameters) would hide the growth in so small a model, so memory is given without it, too.
"""

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

from parity.bench.process import describe, machine, spread
from parity.bench.train import measure
from parity.bench.train_variants import Work

VARIANTS = ["tinyllm", "torch-eager"]

# A point of every axis but for one size. Small, so that a whole axis takes a minute or two.
BASE = Work(n_layer=4, n_embd=128, n_head=4, n_positions=4096, vocab_size=1024, batch=1, context=256)

BASE_THREADS = 2

# axis -> (label, its sizes, what else differs from BASE along it)
AXES = {
    "batch": ("batch (sequences)", [1, 2, 4, 8, 16], {}),
    "context": ("context (tokens)", [256, 512, 1024, 2048, 4096], {}),
    "n_embd": ("width (channels)", [64, 128, 256, 512], {"batch": 4}),
    "n_layer": ("depth (layers)", [2, 4, 8, 16], {"batch": 4}),
    "threads": ("threads", [1, 2], {"n_embd": 256, "batch": 4}),
}


def training_bytes(run: dict) -> int:
    """The peak memory of a run beyond what its process held when the first step began."""
    return run["peak_bytes"] - run["built_bytes"]


# cost -> (label, of the result of one run_variant). The fastest step, because these are short: whatever else
# the machine does only ever adds to them, and to PyTorch's threads, which wait for each other, most of all.
COSTS = {
    "seconds": ("seconds of the fastest step", lambda run: min(run["seconds"])),
    "training_bytes": ("training: peak bytes beyond libraries and parameters", training_bytes),
    "peak_bytes": ("process: peak bytes in all", lambda run: run["peak_bytes"]),
}


def scaling(axes: dict, base: Work, rounds: int, warmup: int, steps: int) -> dict:
    """Measure every point of the ``axes`` (as ``AXES``); returns all there is to report, ready for JSON."""
    counts, before = {"rounds": rounds, "warmup": warmup, "steps": steps}, machine()
    measured, tables = {}, {}
    for axis, (_, sizes, others) in axes.items():
        tables[axis] = []
        for size in sizes:
            point = work, threads = point_of(base, axis, size, others)
            if point not in measured:  # axes cross: their common point is measured once
                print(f"{axis} {size}:", file=sys.stderr)
                measured[point] = measure(work, VARIANTS, threads=threads, **counts)
            runs = measured[point]
            costs = {variant: costs_of(runs[variant]) for variant in VARIANTS}
            tables[axis].append({"size": size, "work": asdict(work), "threads": threads, "costs": costs})
    libraries = {variant: results[0]["libraries"] for variant, results in runs.items()}
    return {"request": counts, "machine": before, "libraries": libraries, "axes": tables}


def point_of(base: Work, axis: str, size: int, others: dict) -> tuple[Work, int]:
    """The work and the number of threads at one size of one axis."""
    if axis == "threads":
        return replace(base, **others), size
    return replace(base, **others | {axis: size}), BASE_THREADS


def costs_of(results: list[dict]) -> dict[str, dict]:
    """Median and spread over the rounds of every cost."""
    return {name: spread([cost(run) for run in results]) for name, (_, cost) in COSTS.items()}


def exponent(points: list[dict], variant: str, cost: str) -> float:
    """a in cost ~ sizeᵃ, between the two largest sizes; nan where there is no growth to speak of."""
    (size, value), (larger, larger_value) = (
        (point["size"], point["costs"][variant][cost]["median"]) for point in points[-2:]
    )
    if value <= 0 or larger_value <= 0:
        return math.nan
    return math.log(larger_value / value) / math.log(larger / size)


def report(result: dict, labels: dict[str, str]) -> str:
    """The tables that ``python -m parity bench scaling`` prints; ``labels``: axis -> what it is called."""
    lines = [describe(result[name]) for name in ("request", "machine")]
    lines += [f"{variant}: {describe(versions)}" for variant, versions in result["libraries"].items()]
    lines += ["", *(label for label, _ in COSTS.values())]
    row = "{:<22}{:>14}{:>14}{:>8}{:>14}{:>14}{:>8}{:>14}{:>14}".format
    for axis, points in result["axes"].items():
        fixed = {name: size for name, size in points[0]["work"].items() if name != axis}
        fixed |= {} if axis == "threads" else {"threads": points[0]["threads"]}
        lines += ["", f"{labels[axis]}, at {describe(fixed)}"]
        lines += [row("", "seconds/step", "", "", "training MB", "", "", "process MB", "")]
        lines += [row("", *VARIANTS, "ratio", *VARIANTS, "ratio", *VARIANTS)]
        for point in points:
            seconds, training, process = (
                [point["costs"][variant][cost]["median"] for variant in VARIANTS] for cost in COSTS
            )
            cells = [f"{value:.4f}" for value in seconds] + [quotient(*seconds)]
            cells += [f"{value / 1e6:.1f}" for value in training] + [quotient(*training)]
            lines.append(row(f"{axis} {point['size']}", *cells, *(f"{value / 1e6:.1f}" for value in process)))
        grown = [[f"{exponent(points, v, cost):.2f}" for v in VARIANTS] for cost in COSTS]
        lines.append(row("exponent at the end", *grown[0], "", *grown[1], "", *grown[2]))
    return "\n".join(line.rstrip() for line in lines)


def quotient(ours: float, theirs: float) -> str:
    """Ours divided by theirs; at the smallest sizes a cost may be too small to show at all."""
    return f"{ours / theirs:.2f}" if theirs > 0 else "–"


def plot(result: dict, labels: dict[str, str], path: Path) -> None:
    """Draw time and memory (rows) against every axis (columns), log-log, both variants in each panel."""
    from matplotlib.figure import Figure

    axes, shown = result["axes"], ("seconds", "training_bytes")
    figure = Figure(figsize=(max(6.4, 3.2 * len(axes)), 7), layout="constrained")
    panels = figure.subplots(len(shown), len(axes), squeeze=False, sharey="row")
    for cost, row in zip(shown, panels):
        for (axis, points), panel in zip(axes.items(), row):
            sizes = [point["size"] for point in points]
            for variant, color in zip(VARIANTS, ("C0", "C1")):
                costs = [point["costs"][variant][cost]["median"] for point in points]
                label = f"{variant}, exponent {exponent(points, variant, cost):.2f}"
                panel.plot(sizes, costs, marker="o", markersize=4, color=color, label=label)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.set(xlabel=labels[axis])
            panel.grid(alpha=0.3, which="both")
            panel.legend(fontsize="x-small")
        row[0].set_ylabel(COSTS[cost][0], fontsize="small")
    figure.suptitle(f"A training step, float32, on {result['machine']['cpu']}", fontsize="medium")
    figure.savefig(path, dpi=120)

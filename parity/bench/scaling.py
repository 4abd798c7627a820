"""Growth of a training step's time and memory with batch, context, width, depth and threads.

``python -m parity bench scaling`` varies one size of a small model at a time and measures tinyllm and PyTorch
eager as ``bench train`` does. It prints tables, the exponent a of each growth (cost ~ sizeᵃ between the two
largest sizes), and a log-log plot. In so small a model the libraries and parameters, which a process holds
before its first step, would hide the growth of memory, so memory is also given without them.
"""

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

from parity import tables
from parity.bench.isa import Isa, processor
from parity.bench.process import describe, machine, spread
from parity.bench.train import measure
from parity.bench.train_variants import Work
from tinyllm.tools.plot import COLORS, GREY, new_figure, save, title

VARIANTS = ["tinyllm", "torch-eager"]

# Every point differs from this work in one size. It is small, so that an axis takes a minute or two.
BASE = Work(n_layer=4, n_embd=128, n_head=4, n_positions=4096, vocab_size=1024, batch=1, context=256)

BASE_THREADS = 2

# axis -> (label, its sizes, other changes of BASE along it)
AXES = {
    "batch": ("batch (sequences)", [1, 2, 4, 8, 16], {}),
    "context": ("context (tokens)", [256, 512, 1024, 2048, 4096], {}),
    "n_embd": ("width (channels)", [64, 128, 256, 512], {"batch": 4}),
    "n_layer": ("depth (layers)", [2, 4, 8, 16], {"batch": 4}),
    "threads": ("threads", [1, 2], {"n_embd": 256, "batch": 4}),
}


def training_bytes(run: dict) -> int:
    """The peak memory of a run beyond that of its process before the first step."""
    return run["peak_bytes"] - run["built_bytes"]


# cost -> (label, function of the result of one run_variant). The steps are short, so the fastest one is used:
# other load on the machine only adds to a step, most of all to PyTorch's, whose threads wait for each other.
COSTS = {
    "seconds": ("seconds of the fastest step", lambda run: min(run["seconds"])),
    "training_bytes": ("training: peak bytes beyond libraries and parameters", training_bytes),
    "peak_bytes": ("process: peak bytes in all", lambda run: run["peak_bytes"]),
}


def scaling(axes: dict, base: Work, rounds: int, warmup: int, steps: int, isa: Isa = "native") -> dict:
    """Measure every point of the ``axes`` (as ``AXES``); return the result for JSON."""
    counts, before = {"rounds": rounds, "warmup": warmup, "steps": steps, "isa": isa}, machine()
    measured, tables = {}, {}
    for axis, (_, sizes, others) in axes.items():
        tables[axis] = []
        for size in sizes:
            point = work, threads = point_of(base, axis, size, others)
            if point not in measured:  # a point that axes share is measured once
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
    """Median, minimum and maximum of every cost over the rounds."""
    return {name: spread([cost(run) for run in results]) for name, (_, cost) in COSTS.items()}


def exponent(points: list[dict], variant: str, cost: str) -> float:
    """a in cost ~ sizeᵃ between the two largest sizes; nan if a cost is not positive."""
    (size, value), (larger, larger_value) = (
        (point["size"], point["costs"][variant][cost]["median"]) for point in points[-2:]
    )
    if value <= 0 or larger_value <= 0:
        return math.nan
    return math.log(larger_value / value) / math.log(larger / size)


def report(result: dict, labels: dict[str, str]) -> str:
    """The tables that ``python -m parity bench scaling`` prints; ``labels`` maps an axis to its title."""
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
        grown = [exponents(points, cost) for cost in COSTS]
        lines.append(row("exponent at the end", *grown[0], "", *grown[1], "", *grown[2]))
    return "\n".join(line.rstrip() for line in lines)


def quotient(ours: float, theirs: float) -> str:
    """Our cost divided by theirs, which at the smallest sizes may be 0."""
    return f"{ours / theirs:.2f}" if theirs > 0 else "–"


def exponents(points: list[dict], cost: str) -> list[str]:
    """The exponent of each variant, for a table."""
    return [f"{exponent(points, variant, cost):.2f}" for variant in VARIANTS]


def markdown(result: dict, labels: dict[str, str]) -> str:
    """The table for the page: the exponents of time and training memory along every axis."""
    request, facts = result["request"], result["machine"]
    head = "axis", "sizes", *(f"{cost}: {variant}" for cost in ("time", "memory") for variant in VARIANTS)
    rows = []
    for axis, points in result["axes"].items():
        sizes = f"{points[0]['size']} to {points[-1]['size']}"
        rows.append(
            (labels[axis], sizes, *exponents(points, "seconds"), *exponents(points, "training_bytes"))
        )
    about = (
        processor(request["isa"], facts),
        *(f"{name} {text}" for name, text in result["libraries"]["torch-eager"].items()),
        f"{request['rounds']} rounds of {request['steps']} steps",
    )
    return f"{tables.measured('bench scaling', *about)}\n\n{tables.markdown(head, rows)}"


def plot(result: dict, labels: dict[str, str], path: Path) -> None:
    """Plot time and memory (rows): growth with each size, and as a ratio to PyTorch's (columns).

    Sizes and growth are relative to the smallest size, so that all axes share a panel.
    """
    figure, panels = new_figure(10, 8, rows=2, columns=2)
    names, most = {"seconds": "Time of a step", "training_bytes": "Memory of training"}, 1
    for (cost, name), (growth, ratio) in zip(names.items(), panels):
        for color, (axis, points) in zip(COLORS, result["axes"].items()):
            sizes = [point["size"] / points[0]["size"] for point in points]
            ours, theirs = ([point["costs"][v][cost]["median"] for point in points] for v in VARIANTS)
            label = f"{labels[axis]}, {points[0]['size']:,} to {points[-1]['size']:,}"
            style = dict(color=color, marker="o", markersize=4, label=label if cost == "seconds" else None)
            growth.plot(sizes, [value / (ours[0] or math.nan) for value in ours], **style)
            style["label"] = None
            ratio.plot(sizes, [ours / (theirs or math.nan) for ours, theirs in zip(ours, theirs)], **style)
            most = max(most, *sizes)
        title(growth, f"{name} of tinyllm, relative to the smallest size")
        title(ratio, f"{name}, tinyllm / PyTorch eager")
        growth.set_yscale("log", base=2)
        growth.yaxis.set_major_formatter("{x:g}x")
        for panel in (growth, ratio):
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}x")
            panel.set_xlabel("size, relative to the smallest")
    guide = dict(color=GREY, linestyle=":", linewidth=1.2, zorder=1)
    text = dict(color=GREY, fontsize="small", textcoords="offset points")
    for growth, ratio in panels:
        growth.margins(x=0.14)  # for the word at the end of a guide, where no curve is
        for power, word in (1, "linear"), (2, "quadratic"):
            end = most ** (1 / power), most  # where the guide leaves the panel
            growth.plot([1, end[0]], [1, most], **guide)
            growth.annotate(word, end, (6, -4), **text)
        ratio.axhline(1, **guide)
        ratio.set_ylim(0, max(1.2, ratio.get_ylim()[1]))
        ratio.annotate("PyTorch eager", (most, 1), (0, 5), ha="right", **text)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize="small")
    save(figure, path)

"""Time and memory of training steps: tinyllm against PyTorch.

``python -m parity bench train`` trains the same model on the same tokens with several *variants*
(``train_variants.py``). Each measurement runs in a process of its own, because a process's peak memory never
falls and two libraries' thread pools would share the cores. The variants take turns (A B A B …).

At its top this module imports the standard library only, so that a variant's process loads that variant's
libraries and no others.
"""

import json
import math
import signal
import sys
import time
from dataclasses import asdict
from statistics import median

from parity import tables
from parity.bench.isa import Isa, check_obeyed, held_to, in_use, processor
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
from parity.bench.targets import COSTS, ratio_by_round, ratio_table, rows_of, target_table, train_targets
from parity.bench.train_variants import VARIANTS, WORKS, Work

# ---- One measurement: runs in the variant's own process ----


def run_variant(variant: str, work: Work, warmup: int, steps: int, threads: int) -> dict:
    """Train ``warmup`` untimed and ``steps`` timed steps, ``work.repeat`` times as many; return their costs.

    Returns ``seconds`` and minor ``page_faults`` of each timed step; ``losses`` of every step, warm-up
    included; ``peak_bytes`` of the process, and ``built_bytes``, its peak before the first step (libraries
    and model); and the ``libraries`` it loaded.
    """
    import resource

    if variant in ("tinyllm", "gemms"):
        import tinyllm  # noqa: F401 - before NumPy, as in ``tinyllm train``: see tinyllm/backend/__init__.py

    import numpy as np

    warmup, steps = warmup * work.repeat, steps * work.repeat
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
        sys.exit(f"{variant}: the losses {losses} are not all finite, so its times are not valid.")
    costs = {"seconds": seconds[warmup:], "page_faults": page_faults[warmup:], "losses": losses}
    return costs | {"peak_bytes": peak_memory(), "built_bytes": built_bytes, "libraries": libraries()}


# ---- All measurements ----


def train(
    variants: dict[str, list[str]], rounds: int, warmup: int, steps: int, threads: int, isa: Isa = "native"
) -> dict:
    """Measure the variants of each work (name in ``WORKS`` -> variants); return the result for JSON."""
    counts = {"warmup": warmup, "steps": steps, "threads": threads, "isa": isa}
    works, before = {}, machine()
    for name, chosen in variants.items():
        print(f"{name}:", file=sys.stderr)
        runs = measure(WORKS[name], chosen, rounds, **counts)
        summary, ratios = summarise(runs, WORKS[name]), compare(runs)
        works[name] = {"sizes": asdict(WORKS[name]), "variants": summary, "ratios": ratios, "runs": runs}
    targets = train_targets(in_use(isa, before))
    return {
        "request": {"rounds": rounds, **counts},
        "machine": before,
        "works": works,
        "targets": rows_of(targets, COSTS, {name: work["runs"] for name, work in works.items()}),
    }


def measure(
    work: Work, variants: list[str], rounds: int, warmup: int, steps: int, threads: int, isa: Isa = "native"
) -> dict:
    """Measure the variants in turn; return variant -> [result of ``run_variant``, one per round].

    If a variant fails or does not obey ``isa``, its message is on stderr and the program exits with code 1.
    """
    environment = held_to(isa, with_threads(threads))
    runs = {variant: [] for variant in variants}
    for number in range(1, rounds + 1):
        for variant in variants:
            print(f"round {number}/{rounds}: {variant} …", end=" ", file=sys.stderr, flush=True)
            request = [variant, asdict(work), warmup, steps, threads, isa]
            child = in_own_process("parity.bench.train", request, environment)
            runs[variant].append(result_of(child, variant, number))
            print(f"{median(runs[variant][-1]['seconds']):.4g} s per step", file=sys.stderr)
    return runs


# ---- The report ----


def summarise(runs: dict[str, list[dict]], work: Work) -> dict[str, dict]:
    """For each variant: seconds and page faults over all timed steps, tokens per second, peak memory."""
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
    """The first variant's costs divided by each other's in the same round, with the spread of the ratios."""
    first, *others = runs
    ratios = {other: {} for other in others}
    for other in others:
        memory = [] if other == "gemms" else ["peak memory"]  # gemms holds no gradients
        for name in ["time (medians)", "time (minima)", *memory]:
            values = ratio_by_round(runs, COSTS[name], first, [other])
            ratios[other][name] = spread(values) | {"rounds": values}
    return ratios


def report(result: dict) -> str:
    """The text that ``python -m parity bench train`` prints: tables of every work, then the targets."""
    lines = [describe(result[name]) for name in ("request", "machine")]
    for name, work in result["works"].items():
        lines += ["", f"{name}: {describe(work['sizes'])}", *work_tables(work)]
    if result["targets"]:
        lines += ["", *target_table(result["targets"])]
    return "\n".join(line.rstrip() for line in lines)


def work_tables(work: dict) -> list[str]:
    """The costs of each variant, and the first variant's costs divided by each other's."""
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


def markdown(result: dict) -> str:
    """The tables for the page: the costs of every variant but ``gemms``, and tinyllm's ratios."""
    works, request, facts = result["works"], result["request"], result["machine"]
    shown = [name for name in VARIANTS if name != "gemms" and any(name in w["runs"] for w in works.values())]
    rows = []
    for name, work in works.items():
        tokens = f"{work['sizes']['batch']} × {work['sizes']['context']} tokens"
        for label, cost, form in (
            ("s/step", "seconds", lambda median: f"{median:.3g}"),
            ("peak GB", "peak_bytes", lambda median: f"{median / 1e9:.2f}"),
        ):
            costs = [work["variants"].get(variant) for variant in shown]
            cells = ["" if each is None else form(each[cost]["median"]) for each in costs]
            rows.append((f"`{name}`", tokens, label, *cells))
    loaded = {name: text for w in works.values() for v in shown if v in w["runs"]
              for name, text in w["runs"][v][0]["libraries"].items()}  # fmt: skip
    faults = []
    for variant in ("tinyllm", "torch-eager"):
        counts = [w["variants"][variant]["page_faults"]["median"] for w in works.values()]
        faults.append(f"{variant} {min(counts):,.0f} to {max(counts):,.0f}")
    about = (
        processor(request["isa"], facts),
        f"{request['threads']} threads",
        *(f"{name} {text}" for name, text in loaded.items()),
        f"medians of {request['rounds']} rounds of {request['steps']} steps",
    )
    return "\n\n".join(
        [
            tables.measured("bench train", *about),
            tables.markdown(("work", "batch", "", *shown), rows),
            ratio_table(result["targets"]),
            f"Page faults per step: {', '.join(faults)}.",
        ]
    )


if __name__ == "__main__":  # a variant's own process, started by ``measure``
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C this process just ends; the parent reports
    variant, work, *counts, isa = json.loads(sys.argv[1])
    result = run_variant(variant, Work(**work), *counts)
    check_obeyed(isa)
    print(json.dumps(result))

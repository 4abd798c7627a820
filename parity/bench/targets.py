"""Performance targets, and whether a measurement met them.

A ``Target`` limits one cost of tinyllm, either by itself or divided by the same cost of its peers in the same
round. Its verdict follows from the measurement alone.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median

from parity import tables

# The name of a cost -> that cost in one result of ``parity.bench.train.run_variant``
COSTS = {
    "time (medians)": lambda run: median(run["seconds"]),
    "time (minima)": lambda run: min(run["seconds"]),
    "peak memory": lambda run: run["peak_bytes"],
    "page faults": lambda run: median(run["page_faults"]),
}


@dataclass(frozen=True)
class Target:
    """tinyllm's ``cost`` on ``work``, divided by that of the cheapest in ``against``, is ``at_most`` this.

    If ``against`` is empty the limit applies to the cost itself. ``stretch`` is a stricter second target.
    """

    work: str
    cost: str  # a key of COSTS, or of the costs that are used with these targets
    against: tuple[str, ...]  # variants
    at_most: float
    stretch: float | None = None


TIME, MEMORY, FAULTS = "time (medians)", "peak memory", "page faults"
EAGER, BEST, GEMMS = ("torch-eager",), ("torch-compile", "torch-linear-ce"), ("gemms",)

LARGE = ("gpt2-124m", "gpt2-124m-1x1024", "llama-124m")
FIRST_RUN = ("first-run", "first-run-dropout")
SMALLER = ("4x128-256", "4x128-1024", "4x128-4096")
TARGET_WORKS = (*LARGE, "small", *FIRST_RUN, *SMALLER, "2x64-512")

# What ``bench train`` is to reach: (works, cost, against, (at most, stretch) with AVX2, and with AVX-512)
_REACH = (
    (LARGE, TIME, EAGER, (0.90, 0.82), (0.45, 0.40)),
    (LARGE, TIME, BEST, (1.00, 0.92), (0.60, 0.50)),
    (LARGE, TIME, GEMMS, (1.20, 1.12), (1.25, 1.15)),
    (("small",), TIME, EAGER, (0.95, 0.85), (0.55, 0.50)),
    (FIRST_RUN, TIME, EAGER, (0.90, 0.80), (0.70, None)),
    (FIRST_RUN, TIME, ("torch-compile",), (1.05, 0.95), (0.90, None)),
    (SMALLER, TIME, EAGER, (1.00, 0.85), (0.90, None)),
    (("2x64-512",), TIME, EAGER, (1.30, 1.00), (1.20, None)),
    (TARGET_WORKS, MEMORY, EAGER, (0.50, None), (0.55, None)),
    (("gpt2-124m",), MEMORY, BEST, (0.90, None), (0.90, None)),
    ((*LARGE, "small"), FAULTS, (), (5000, None), (5000, None)),
)


def train_targets(instructions: str) -> list[Target]:
    """The targets of ``bench train`` for an instruction set (``isa.in_use``): AVX-512, or as with AVX2."""
    return [
        Target(work, cost, against, *(avx512 if instructions == "AVX-512" else avx2))
        for work in TARGET_WORKS
        for works, cost, against, avx2, avx512 in _REACH
        if work in works
    ]


MET, STRETCH, NOT_MET, NOT_MEASURED = "met", "met, stretch too", "not met", "not measured"


def needed_variants(work: str) -> list[str]:
    """tinyllm, PyTorch eager, and every variant that a target on this work compares tinyllm with."""
    targets = (target for target in train_targets("AVX2") if target.work == work)
    against = [variant for target in targets for variant in target.against]
    return list(dict.fromkeys(["tinyllm", "torch-eager", *against]))


def ratio_by_round(runs: dict[str, list[dict]], cost, first: str, others: list[str]) -> list[float]:
    """For every round, ``first``'s cost divided by the lowest cost of the ``others`` in the same round.

    Costs are paired by round because a machine that slows down for a while slows down every variant.
    """
    rounds = zip(runs[first], *(runs[other] for other in others), strict=True)
    return [cost(run) / min(cost(peer) for peer in peers) for run, *peers in rounds]


def rows_of(targets: Iterable[Target], costs: dict, runs: dict[str, dict[str, list[dict]]]) -> list[dict]:
    """Every target on a work that was measured (work -> variant -> results, one per round).

    A row is the target, the ``rounds``, their median ``measured`` (None if a variant is missing) and the
    ``verdict``.
    """
    rows = []
    for target in targets:
        if target.work not in runs:
            continue
        results, cost = runs[target.work], costs[target.cost]
        if not {"tinyllm", *target.against} <= results.keys():
            rounds = []
        elif target.against:
            rounds = ratio_by_round(results, cost, "tinyllm", target.against)
        else:
            rounds = [cost(run) for run in results["tinyllm"]]
        rows.append(row_of(target, rounds))
    return rows


def row_of(target: Target, rounds: list[float]) -> dict:
    """One row of ``rows_of``."""
    measured = median(rounds) if rounds else None
    return asdict(target) | {"measured": measured, "rounds": rounds, "verdict": verdict(target, measured)}


def verdict(target: Target, measured: float | None) -> str:
    """Whether the measured value is within the target; None means that a variant was not measured."""
    if measured is None:
        return NOT_MEASURED
    if measured > target.at_most:
        return NOT_MET
    return STRETCH if target.stretch is not None and measured <= target.stretch else MET


def any_not_met(result: dict) -> bool:
    """Whether a benchmark's result misses one of its targets."""
    return any(row["verdict"] == NOT_MET for row in result["targets"])


def target_table(rows: list[dict]) -> list[str]:
    """The rows as aligned lines of text."""
    wide = max([18, *(len(row["work"]) + 2 for row in rows)])
    form = (f"{{:<{wide}}}" + "{:<16}{:<34}{:>15}{:>10}  {:<19}{}").format
    lines = [form("work", "tinyllm's", "divided by", "target", "measured", "by round", "")]
    for row in rows:
        stretch = "" if row["stretch"] is None else f" ({row['stretch']:g})"
        target, measured = f"{row['at_most']:g}{stretch}", _number(row, row["measured"])
        lines.append(
            form(row["work"], row["cost"], _peers(row), target, measured, _range(row), row["verdict"])
        )
    return lines


def ratio_table(rows: list[dict]) -> str:
    """The measured ratios as a Markdown table, and below it one sentence on the targets that are not met."""
    head = "work", "tinyllm's", "divided by", "ratio (by round)"
    ratios = [row for row in rows if row["against"] and row["rounds"]]
    cells = [
        (row["work"], row["cost"], _peers(row), f"{_number(row, row['measured'])} ({_range(row)})")
        for row in ratios
    ]
    return f"{tables.markdown(head, cells)}\n\n{not_met(rows)}"


def not_met(rows: list[dict]) -> str:
    """A sentence on the targets that are not met or not measured."""
    below = [
        f"{row['cost']} on {row['work']} ({_number(row, row['measured'])}, target {row['at_most']:g})"
        for row in rows
        if row["verdict"] == NOT_MET
    ]
    missing = [f"{row['cost']} on {row['work']}" for row in rows if row["verdict"] == NOT_MEASURED]
    text = f"Not met: {'; '.join(below)}." if below else "Every measured target is met."
    return f"{text} Not measured: {'; '.join(missing)}." if missing else text


def _peers(row: dict) -> str:
    return (" or ".join(row["against"]) + (", the cheaper" if len(row["against"]) > 1 else "")) or "–"


def _number(row: dict, value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if row["against"] else f"{value:,.0f}"


def _range(row: dict) -> str:
    if not row["rounds"]:
        return "–"
    return f"{_number(row, min(row['rounds']))} to {_number(row, max(row['rounds']))}"

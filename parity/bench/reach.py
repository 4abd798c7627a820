"""How far does tinyllm want to get, and did it?

Every line of the table of reach is a ``Bound``: a cost of tinyllm's training step, on its own or divided by
that of others in the same round. Its verdict follows from what was measured, and from nothing else.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median

# A cost -> that cost in one result of ``parity.bench.train.run_variant``
COSTS = {
    "time (medians)": lambda run: median(run["seconds"]),
    "time (minima)": lambda run: min(run["seconds"]),
    "peak memory": lambda run: run["peak_bytes"],
    "page faults": lambda run: median(run["page_faults"]),
}


@dataclass(frozen=True)
class Bound:
    """``cost`` of tinyllm on ``work``, divided by the cheapest of ``against``, is to be ``at_most`` this.

    With nobody to compare with (``against`` empty) it is the cost itself. ``stretch`` would be better still.
    """

    work: str
    cost: str  # one of COSTS, or of the costs that go with the bounds
    against: tuple[str, ...]  # variants
    at_most: float
    stretch: float | None = None


TORCHS_BEST = ("torch-compile", "torch-linear-ce")

REACH = (
    Bound("gpt2-124m", "time (medians)", ("torch-eager",), 0.80, stretch=0.70),
    Bound("gpt2-124m", "peak memory", ("torch-eager",), 0.58, stretch=0.50),
    Bound("gpt2-124m", "time (medians)", TORCHS_BEST, 1.00, stretch=0.90),
    Bound("gpt2-124m", "peak memory", TORCHS_BEST, 0.90),
    Bound("gpt2-124m", "time (medians)", ("gemms",), 1.22, stretch=1.12),
    Bound("gpt2-124m-1x1024", "time (medians)", ("torch-eager",), 0.80),
    Bound("gpt2-124m-1x1024", "peak memory", ("torch-eager",), 0.58),
    Bound("llama-124m", "time (medians)", ("torch-eager",), 0.80),
    Bound("llama-124m", "peak memory", ("torch-eager",), 0.58),
    Bound("small", "time (medians)", ("torch-eager",), 1.00, stretch=0.85),
    Bound("small", "peak memory", ("torch-eager",), 0.40),
    Bound("gpt2-124m", "page faults", (), 5000),
    Bound("gpt2-124m-1x1024", "page faults", (), 5000),
    Bound("llama-124m", "page faults", (), 5000),
    Bound("small", "page faults", (), 5000),
)

REACH_WORKS = tuple(dict.fromkeys(bound.work for bound in REACH))

MET, STRETCH, MISSED, NOT_MEASURED = "met", "met, stretch too", "missed", "not measured"


def needed_variants(work: str) -> list[str]:
    """tinyllm, and those its bounds on this work compare it with; PyTorch eager always."""
    against = [variant for bound in REACH if bound.work == work for variant in bound.against]
    return list(dict.fromkeys(["tinyllm", "torch-eager", *against]))


def ratio_by_round(runs: dict[str, list[dict]], cost, first: str, others: list[str]) -> list[float]:
    """``first``'s cost divided by the cheapest of the ``others``' in the same round, for every round.

    In the same round, because a machine that is slower for a while is slower for all of them.
    """
    rounds = zip(runs[first], *(runs[other] for other in others), strict=True)
    return [cost(run) / min(cost(peer) for peer in peers) for run, *peers in rounds]


def reach_rows(runs: dict[str, dict[str, list[dict]]]) -> list[dict]:
    """Every bound of ``REACH`` on the works that were measured, as ``rows_of``."""
    return rows_of(REACH, COSTS, runs)


def rows_of(bounds: Iterable[Bound], costs: dict, runs: dict[str, dict[str, list[dict]]]) -> list[dict]:
    """Every bound on the works that were measured (work -> variant -> results, one per round).

    A row is the bound, what was ``reached`` in the median over rounds, the ``rounds``, and the ``verdict``.
    """
    rows = []
    for bound in bounds:
        if bound.work not in runs:
            continue
        measured, cost = runs[bound.work], costs[bound.cost]
        if not {"tinyllm", *bound.against} <= measured.keys():
            rounds = []
        elif bound.against:
            rounds = ratio_by_round(measured, cost, "tinyllm", bound.against)
        else:
            rounds = [cost(run) for run in measured["tinyllm"]]
        reached = median(rounds) if rounds else None
        rows.append(
            asdict(bound) | {"reached": reached, "rounds": rounds, "verdict": verdict(bound, reached)}
        )
    return rows


def verdict(bound: Bound, reached: float | None) -> str:
    """Whether what was reached is within the bound; None: one of the variants it takes was not measured."""
    if reached is None:
        return NOT_MEASURED
    if reached > bound.at_most:
        return MISSED
    return STRETCH if bound.stretch is not None and reached <= bound.stretch else MET


def missed(result: dict) -> bool:
    """Whether a measurement, as a command reports it, missed one of its bounds."""
    return any(row["verdict"] == MISSED for row in result["reach"])


def reach_table(rows: list[dict]) -> list[str]:
    """The rows as lines: what, against whom, at most how much, what was reached (and in which rounds)."""
    wide = max([18, *(len(row["work"]) + 2 for row in rows)])
    line = (f"{{:<{wide}}}" + "{:<16}{:<34}{:>15}{:>9}  {:<19}{}").format
    lines = [line("work", "tinyllm's", "divided by", "at most", "reached", "by round", "")]
    for row in rows:
        number = "{:.0f}".format if not row["against"] else "{:.3f}".format
        stretch = "" if row["stretch"] is None else f" ({row['stretch']:g})"
        reached = "–" if row["reached"] is None else number(row["reached"])
        spread = f"{number(min(row['rounds']))} to {number(max(row['rounds']))}" if row["rounds"] else "–"
        against = " or ".join(row["against"]) + (", the cheaper" if len(row["against"]) > 1 else "")
        bound = f"{row['at_most']:g}{stretch}"
        lines.append(line(row["work"], row["cost"], against or "–", bound, reached, spread, row["verdict"]))
    return lines

"""Time of decoding: tinyllm against transformers, and each of its means of being fast against going without.

``python -m parity bench decode`` measures SmolLM2-135M or another model in float32. ``decode_sides.py`` has
the measurements; each side runs in a process of its own, and the sides take turns in every round. Ratios are
formed within a round. The report has every ratio with its target for the instruction set in use.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from parity import tables
from parity.bench.decode_sides import SIZES, Side, Sizes
from parity.bench.isa import Isa, held_to, in_use, processor
from parity.bench.process import describe, in_own_process, machine, result_of, with_threads
from parity.bench.targets import Target, not_met, row_of, target_table

# The sizes of SmolLM2-135M (134,515,008 parameters); random weights take the same time as trained ones.
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_theta": 100000.0},
    tie_word_embeddings=True,
)

WORKS = ("step", "token", "prefill", "second-turn", "speculation", "rows", "cold-start", "llama.cpp")

BY_TRANSFORMERS = {"token", "prefill", "cold-start"}  # the works that it does, too


@dataclass(frozen=True)
class Comparison:
    """tinyllm's cost ``ours``, in seconds, divided by the cost ``theirs`` of ``side``."""

    work: str  # one of WORKS
    name: str
    against: str
    ours: str
    theirs: str
    unit: str  # of the table: tokens/s, ms or s
    avx2: tuple[float, float | None]  # the ratio is at most the first; the second is a stretch target
    avx512: tuple[float, float | None]
    side: str = "tinyllm"

    def target(self, instructions: str) -> Target:
        """The target for an instruction set (``isa.in_use``). Without AVX-512 it is that of AVX2."""
        at_most, stretch = self.avx512 if instructions == "AVX-512" else self.avx2
        return Target(self.name, "time", (self.against,), at_most, stretch)

    def ratio(self, runs: dict[str, dict]) -> float | None:
        """The ratio in one round (side -> its result); None if one of the two was not measured."""
        ours, theirs = (runs.get(side, {"seconds": {}})["seconds"] for side in ("tinyllm", self.side))
        if self.ours not in ours or self.theirs not in theirs:
            return None
        return median(ours[self.ours]) / median(theirs[self.theirs])


def comparisons(sizes: Sizes) -> list[Comparison]:
    """Every row of the report. Targets are ratios of time: 1.3 times the tokens/s is 0.769 of the time."""
    repeats, elsewhere, many = (0.769, 0.625), (1.03, None), f"{sizes.rows} rows"
    return [
        Comparison("step", "a step", "its products", "step", "products", "ms", *2 * [(1.20, 1.10)]),
        _with_transformers("token", "a token", "token", "tokens/s", (0.55, 0.45), (0.42, 0.38)),
        *(
            _with_transformers(
                "prefill", f"prefill of {n} tokens", f"prefill {n}", "s", (1.00, 0.85), (0.70, 0.60)
            )
            for n in sizes.prefills
        ),
        Comparison(
            "second-turn", "second turn of a chat, first token", "nothing kept",
            "second turn kept", "second turn anew", "s", *2 * [(0.35, None)],
        ),
        _speculation("edit of code", repeats),
        _speculation("summary", elsewhere),
        _speculation("poem", elsewhere),
        Comparison("rows", f"{many} at once", "one row", many, "1 rows", "tokens/s", *2 * [(0.333, None)]),
        _with_transformers("cold-start", "cold start to first token", "cold start", "s", *2 * [(1.00, None)]),
    ]  # fmt: skip


def _with_transformers(work: str, name: str, cost: str, unit: str, *targets) -> Comparison:
    return Comparison(work, name, "transformers", cost, cost, unit, *targets, side="transformers")


def _speculation(text: str, target) -> Comparison:
    costs = f"{text} speculative", f"{text} plain"
    return Comparison("speculation", f"{text}, speculative", "plain", *costs, "tokens/s", target, target)


# ---- All measurements ----


def write_smollm2(folder: Path) -> None:
    """Write a model of SmolLM2's sizes with random weights, for both sides to load."""
    import numpy as np

    from tinyllm import Llama, LlamaConfig

    Llama(LlamaConfig(**SMOLLM2), rng=np.random.default_rng(0)).save_pretrained(folder)


def decode(
    sources: dict[str, str],
    name: str,
    rounds: int,
    threads: int,
    isa: Isa = "native",
    works: tuple[str, ...] = WORKS,
    texts: dict[str, dict] | None = None,
    omitted: tuple[str, ...] = (),
    sizes: Sizes = SIZES,
) -> dict:
    """Measure every side (``sources``: side -> its model); return the result for JSON.

    ``texts`` are those of ``decode_texts.prompts``, none if the model has no tokenizer; ``omitted`` has a
    sentence on everything that cannot be measured, for the report.
    """
    before = machine()
    request = {"model": name, "rounds": rounds, "threads": threads, "isa": isa, "works": works}
    runs = measure(sources, rounds, threads, isa, works, texts or {}, sizes)
    return {
        "request": request,
        "sizes": asdict(sizes),
        "machine": before,
        "omitted": omitted,
        "runs": runs,
        "targets": target_rows(runs, works, sizes, in_use(isa, before)),
    }


def measure(
    sources: dict[str, str],
    rounds: int,
    threads: int,
    isa: Isa,
    works: tuple[str, ...],
    texts: dict[str, dict],
    sizes: Sizes,
) -> dict[str, list[dict]]:
    """Measure the sides in turn; return side -> [result of ``run_side``, one per round].

    If a side fails or does not obey ``isa``, its message is on stderr and the program exits with code 1.
    """
    environment = held_to(isa, with_threads(threads))
    runs = {side: [] for side in sources}
    for number in range(1, rounds + 1):
        for name, source in sources.items():
            print(f"round {number}/{rounds}: {name} …", end=" ", file=sys.stderr, flush=True)
            side_works = ("token", "prefill") if name.startswith("llama.cpp") else works
            side = Side(name, source, side_works, texts, sizes, threads, started=time.time())
            child = in_own_process("parity.bench.decode_sides", [asdict(side), isa], environment)
            runs[name].append(result_of(child, name, number))
            print(f"{time.time() - side.started:.0f} s", file=sys.stderr)
    return runs


# ---- The report ----


def target_rows(
    runs: dict[str, list[dict]], works: tuple[str, ...], sizes: Sizes, instructions: str
) -> list[dict]:
    """Every comparison of the ``works`` with its ratios, as ``parity.bench.targets.row_of``."""
    rounds = [dict(zip(runs, results)) for results in zip(*runs.values(), strict=True)]
    rows = []
    for comparison in comparisons(sizes):
        if comparison.work in works:
            ratios = [comparison.ratio(results) for results in rounds]
            rows.append(row_of(comparison.target(instructions), [] if None in ratios else ratios))
    return rows


def report(result: dict) -> str:
    """The text that ``python -m parity bench decode`` prints: costs, then ratios and targets, by round."""
    request, runs = result["request"], result["runs"]
    lines = [describe(result[name]) for name in ("request", "sizes", "machine")]
    lines += [processor(request["isa"], result["machine"])]
    lines += [f"{side}: {describe(rounds[0]['libraries'])}" for side, rounds in runs.items()]
    form = "{:<36}{:<10}{:>10}   {:<14}{:>10}".format
    lines += ["", form("medians", "", "tinyllm", "against", "")]
    lines += [form(*row) for row in cost_rows(result)]
    lines += ["", *target_table(result["targets"]), "", *sentences(result)]
    if others := llamacpp_rows(result):
        form = ("{:<36}" + "{:>16}" * (len(others[0]) - 1)).format
        lines += ["", *(form(*row) for row in others)]
    return "\n".join(line.rstrip() for line in lines)


def markdown(result: dict) -> str:
    """The tables for the page: costs, ratios by round and targets; then llama.cpp."""
    request, facts, loaded = result["request"], result["machine"], {}
    for rounds in result["runs"].values():
        loaded |= rounds[0]["libraries"]
    about = (
        request["model"],
        processor(request["isa"], facts),
        f"{request['threads']} threads",
        *(f"{name} {text}" for name, text in loaded.items()),
        f"medians of {request['rounds']} rounds",
    )
    rows = []
    for row, costs in zip(result["targets"], cost_rows(result), strict=True):
        rounds = ", ".join(f"{ratio:.2f}" for ratio in row["rounds"]) or "not measured"
        stretch = f" ({row['stretch']:g})" if row["stretch"] else ""
        ratio = f"{row['measured']:.3f}" if row["rounds"] else ""
        rows.append((*costs, ratio, rounds, f"{row['at_most']:g}{stretch}"))
    head = "", "", "tinyllm", "compared with", "", "ratio of times", "by round", "at most (stretch)"
    parts = [
        tables.measured("bench decode", *about),
        tables.markdown(head, rows),
        not_met(result["targets"]),
        "\n".join(sentences(result)),
    ]
    if others := llamacpp_rows(result):
        parts.append(tables.markdown(others[0], others[1:]))
    return "\n\n".join(filter(None, parts))


def cost_rows(result: dict) -> list[tuple[str, ...]]:
    """(name, unit, tinyllm's median, what it is compared with, that median) of every comparison."""
    runs, rows = result["runs"], []
    for comparison in comparisons(Sizes(**result["sizes"])):
        if comparison.work in result["request"]["works"]:
            ours = shown(runs, "tinyllm", comparison.ours, comparison.unit)
            theirs = shown(runs, comparison.side, comparison.theirs, comparison.unit)
            rows.append((comparison.name, comparison.unit, ours, comparison.against, theirs))
    return rows


def shown(runs: dict[str, list[dict]], side: str, cost: str, unit: str) -> str:
    """The median of one cost over the rounds in this unit; a dash if it was not measured."""
    measured = [run["seconds"][cost] for run in runs.get(side, []) if cost in run["seconds"]]
    if not measured:
        return "–"
    seconds = median(map(median, measured))
    return {"tokens/s": f"{1 / seconds:.1f}", "ms": f"{1000 * seconds:.1f}", "s": f"{seconds:.3f}"}[unit]


def llamacpp_rows(result: dict) -> list[tuple[str, ...]]:
    """A table of tinyllm in float32 beside llama.cpp, its head first; empty if llama.cpp was not measured."""
    runs = result["runs"]
    sides = [side for side in runs if side.startswith("llama.cpp")]
    if not sides:
        return []
    costs = [("a token", "token", "tokens/s")]
    costs += [(f"prefill of {n} tokens", f"prefill {n}", "s") for n in result["sizes"]["prefills"]]
    return [
        ("", "", "tinyllm F32", *sides),
        *((name, unit, *(shown(runs, side, cost, unit) for side in ("tinyllm", *sides)))
          for name, cost, unit in costs),
    ]  # fmt: skip


def sentences(result: dict) -> list[str]:
    """Which of the generated tokens agree, and what was not measured."""
    ours = result["runs"]["tinyllm"][0]["tokens"]
    theirs = result["runs"].get("transformers", [{"tokens": {}}])[0]["tokens"]
    lines = []
    if "token" in theirs:
        pair = ours["token"], theirs["token"]
        lines.append(f"The {_alike(*pair)} of tinyllm and transformers are the same.")
    for name in ours:
        for faster, plain in (" speculative", " plain"), (" kept", " anew"):
            if name.endswith(faster):
                other = ours[name.removesuffix(faster) + plain]
                lines.append(f"{name.capitalize()}: the {_alike(ours[name], other)} are those of{plain}.")
    return [*lines, *result["omitted"]]


def _alike(ours: list[int], theirs: list[int]) -> str:
    return f"first {same_tokens(ours, theirs)} of {max(len(ours), len(theirs))} tokens"


def same_tokens(ours: list[int], theirs: list[int]) -> int:
    """The number of tokens before the first that differs."""
    alike = [a == b for a, b in zip(ours, theirs)]
    return alike.index(False) if False in alike else len(alike)

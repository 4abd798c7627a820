"""The figures of a GPU: what it is, a table for each work in each precision, and the table of reach."""

import subprocess
import sys
from dataclasses import asdict
from statistics import median

from parity.bench.cuda.answers import answers_of, bound_of, reference_of
from parity.bench.cuda.works import Work
from parity.bench.process import spread
from parity.bench.reach import Bound, ratio_by_round, rows_of

# A cost -> that cost in one result of ``run_variant``
COSTS = {"time": lambda run: run["seconds"], "peak memory": lambda run: run["peak_bytes"]}


def reach(case: str) -> list[Bound]:
    """What is to be reached in one work and precision: PyTorch eager's speed, and at most its memory."""
    return [Bound(case, cost, ("torch-eager",), 1.0) for cost in COSTS]


def failure(results: list[dict]) -> str | None:
    """Why a variant's last measurement failed, if it did."""
    return results[-1].get("failed") if results else None


def gpu_facts() -> dict[str, str]:
    """The GPU by name, its driver, and the versions of CUDA and the libraries."""
    import cupy
    import numpy as np

    runtime = cupy.cuda.runtime
    facts = {
        "GPU": runtime.getDeviceProperties(0)["name"].decode("utf-8"),
        "driver": f"{driver_version()} for CUDA up to {cuda_version(runtime.driverGetVersion())}",
        "numpy": np.__version__,
        "cupy": f"{cupy.__version__} with CUDA {cuda_version(runtime.runtimeGetVersion())}",
    }
    if torch := sys.modules.get("torch"):  # whoever asked for its variants has looked for its GPU
        facts["torch"] = f"{torch.__version__} with CUDA {torch.version.cuda}"
    return facts


def cuda_version(number: int) -> str:
    """12080 is 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version() -> str:
    """As nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown (nvidia-smi does not say)"
    return done.stdout.split()[0]


def summarise(work: Work, precision: str, runs: dict[str, list[dict]]) -> dict:
    """What there is to say of a work in a precision: each variant's figures, and tinyllm's by the others'."""
    flops, figures, ratios = work.flops_per_token(), {}, {}
    complete = {variant: results for variant, results in runs.items() if not failure(results)}
    for variant, results in complete.items():
        rates = spread([work.tokens / run["seconds"] for run in results])
        utilisation = median(flops * work.tokens / run["seconds"] / run["product_rate"] for run in results)
        figures[variant] = {
            "tokens_per_s": rates,
            "utilisation": utilisation,
            "product_rate": median(run["product_rate"] for run in results),
            "peak_bytes": median(run["peak_bytes"] for run in results),
            "whole_bytes": results[0]["whole_bytes"] and max(run["whole_bytes"] for run in results),
            "difference": max(run["difference"] for run in results),
            "losses": results[0]["losses"],
        }
    for other in complete.keys() - {"tinyllm"} if "tinyllm" in complete else ():
        rounds = {name: ratio_by_round(complete, cost, "tinyllm", [other]) for name, cost in COSTS.items()}
        ratios[other] = {name: spread(values) | {"rounds": values} for name, values in rounds.items()}
    return {
        "work": asdict(work),
        "precision": precision,
        "flops_per_token": flops,
        "bound": bound_of(work, precision),
        "variants": figures,
        "failed": {variant: failure(results) for variant, results in runs.items() if failure(results)},
        "ratios": dict(sorted(ratios.items(), reverse=True)),  # eager, then compile
        "runs": runs,
    }


def case_table(case: dict) -> list[str]:
    """Every variant's figures, and what tinyllm costs beside each other."""
    row = "{:<26}{:>11}{:>11}{:>11}{:>9}{:>15}{:>9}{:>9}{:>12}".format
    columns = ("tokens/s", "min", "max", "MFU", "GEMM TFLOP/s", "peak GB", "all GB", "difference")
    lines = [row("variant", *columns)]
    for variant, figures in case["variants"].items():
        rates = [f"{value:,.0f}" for value in figures["tokens_per_s"].values()]
        whole = "–" if figures["whole_bytes"] is None else f"{figures['whole_bytes'] / 1e9:.2f}"
        memory = f"{figures['peak_bytes'] / 1e9:.2f}", whole
        share, gemm = f"{figures['utilisation']:.1%}", f"{figures['product_rate'] / 1e12:.3g}"
        lines.append(row(variant, *rates, share, gemm, *memory, f"{figures['difference']:.1g}"))
    lines += [f"{variant:<26}failed: {reason}" for variant, reason in case["failed"].items()]
    if case["variants"]:
        answers, reference = answers_of(case["work"]["task"]), reference_of(list(case["variants"]))
        lines.append(f"difference: of the {answers} from {reference}'s, relative; at most {case['bound']:g}")
    for variant, figures in case["variants"].items():
        if figures["losses"]:
            lines.append(f"{variant:<26}losses " + ", ".join(f"{loss:.5f}" for loss in figures["losses"]))
    for other, ratios in case["ratios"].items():
        lines.append(f"{f'tinyllm / {other}':<26}{'median':>11}{'min':>11}{'max':>11}   by round")
        for name, ratio in ratios.items():
            numbers = [ratio["median"], ratio["min"], ratio["max"]]
            rounds = "".join(f"{value:>8.3f}" for value in ratio["rounds"])
            lines.append(f"{name:<26}" + "".join(f"{value:>11.3f}" for value in numbers) + f"   {rounds}")
    return [line.rstrip() for line in lines]


def reach_rows(cases: dict[str, dict]) -> list[dict]:
    """The rows of the table of reach, as ``parity.bench.reach.rows_of``."""
    bounds = [bound for name in cases for bound in reach(name)]
    complete = {
        name: {variant: case["runs"][variant] for variant in case["variants"]} for name, case in cases.items()
    }
    return rows_of(bounds, COSTS, complete)

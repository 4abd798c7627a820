"""The report of a GPU: its facts, a table for each work in each precision, and the targets."""

import subprocess
import sys
from dataclasses import asdict
from statistics import median

from parity.bench.cuda.answers import answers_of, bound_of, reference_of
from parity.bench.cuda.works import Work
from parity.bench.process import spread
from parity.bench.targets import Target, ratio_by_round, rows_of

# The name of a cost -> that cost in one result of ``run_variant``
COSTS = {"time": lambda run: run["seconds"], "peak memory": lambda run: run["peak_bytes"]}


def failure(results: list[dict]) -> str | None:
    """The reason why a variant's last measurement failed, or None."""
    return results[-1].get("failed") if results else None


def gpu_facts() -> dict[str, str]:
    """The GPU's name and driver, and the versions of CUDA and the libraries."""
    import cupy
    import numpy as np

    runtime = cupy.cuda.runtime
    facts = {
        "GPU": runtime.getDeviceProperties(0)["name"].decode("utf-8"),
        "driver": f"{driver_version()} for CUDA up to {cuda_version(runtime.driverGetVersion())}",
        "numpy": np.__version__,
        "cupy": f"{cupy.__version__} with CUDA {cuda_version(runtime.runtimeGetVersion())}",
    }
    if torch := sys.modules.get("torch"):  # loaded by the check of the arguments if it is a variant
        facts["torch"] = f"{torch.__version__} with CUDA {torch.version.cuda}"
    return facts


def cuda_version(number: int) -> str:
    """12080 is 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version() -> str:
    """The driver's version according to nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown (nvidia-smi failed)"
    return done.stdout.split()[0]


def summarise(work: Work, precision: str, runs: dict[str, list[dict]]) -> dict:
    """The result of a work in a precision: each variant's figures, and tinyllm's costs over the others'."""
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
    """Every variant's figures, and tinyllm's costs divided by each other variant's."""
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
        lines.append(f"difference: relative, of the {answers} from {reference}'s; bound {case['bound']:g}")
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


def target_rows(cases: dict[str, dict]) -> list[dict]:
    """The targets of all cases with their measured ratios, as ``parity.bench.targets.rows_of``.

    They are at most the time and the memory of PyTorch eager.
    """
    targets = [Target(name, cost, ("torch-eager",), 1.0) for name in cases for cost in COSTS]
    complete = {
        name: {variant: case["runs"][variant] for variant in case["variants"]} for name, case in cases.items()
    }
    return rows_of(targets, COSTS, complete)

"""Time and memory on a GPU: tinyllm against PyTorch.

``python -m parity bench --device cuda`` measures three works (``works.py``) in float32, TF32 and bfloat16:
GPT-2 124M in training, and a Llama of 1B parameters in prefill and decoding. Each measurement runs in a
process of its own, because memory pools do not shrink and two libraries would share the GPU. The device is
idle when the clock starts and when it stops.

Before it is timed, every variant computes losses or logits, which must agree (``answers.py``): only equal
computations are compared.

At its top this module imports the standard library only, so that a variant's process loads that variant's
libraries and no others.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from parity.bench.cuda.answers import check_difference, differences
from parity.bench.cuda.devices import device_of
from parity.bench.cuda.report import case_table, failure, gpu_facts, summarise, target_rows
from parity.bench.cuda.variants import prepare, product
from parity.bench.cuda.works import SMALL_WORKS, WORKS, Work, write_weights
from parity.bench.process import describe, in_own_process, machine, result_of
from parity.bench.targets import target_table

PRODUCT_SIZE = 8192  # rows and columns of the product whose FLOP/s are taken as the GPU's peak

SMALL_PRODUCT_SIZE = 64

PRODUCTS = 10  # how many products are timed

# These environment variables would override the libraries' own settings of the precision of products.
OVERRIDES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUPY_TF32")


@dataclass(frozen=True)
class Request:
    """What to measure, and how often."""

    device: str  # cuda or cpu
    works: tuple[str, ...]  # of WORKS
    precisions: tuple[str, ...]
    variants: tuple[str, ...]
    small: bool  # use SMALL_WORKS, whose figures are not a measure of speed
    rounds: int  # measurements of every variant
    warmup: int  # untimed repetitions at the start of each measurement
    steps: int  # timed repetitions
    compiler: str  # the backend of torch.compile

    @property
    def product_size(self) -> int:
        """Rows and columns of the matrices whose product is timed."""
        return SMALL_PRODUCT_SIZE if self.small else PRODUCT_SIZE


@dataclass(frozen=True)
class Job:
    """The arguments of one measurement's process."""

    variant: str
    work: Work
    precision: str
    weights: str  # the folder of the model
    answers: str  # the file for the numbers that are compared
    request: Request


# ---- One measurement: runs in the variant's own process ----


def run_variant(job: Job) -> dict:
    """Write the answers that are compared, warm up, and time the work.

    Returns the mean ``seconds`` of a repetition; ``peak_bytes`` and ``whole_bytes`` of memory;
    ``product_rate``, the FLOP/s of a large matrix product in the same library; the compared ``losses`` if the
    work is training, else None; and the name of the ``device`` that holds the weights.
    """
    import numpy as np

    request, of = job.request, (job.variant, job.precision, job.request.device)
    prepared = prepare(*of, job.work, job.weights, request.compiler)
    device = device_of(job.variant, request.device)
    device.settle()
    answers = prepared.answers()
    np.save(job.answers, answers)
    for _ in range(request.warmup):
        prepared.once()
    seconds = timed(prepared.once, request.steps, device)
    memory = device.memory()
    multiply = product(*of, request.product_size)
    multiply()
    product_rate = 2 * request.product_size**3 / timed(multiply, PRODUCTS, device)
    losses = answers.tolist() if job.work.task == "train" else None
    costs = {"seconds": seconds, **memory, "product_rate": product_rate}
    return costs | {"losses": losses, "device": prepared.device}


def timed(function: Callable[[], object], count: int, device) -> float:
    """Mean seconds of ``count`` calls; the device is synchronized before and after."""
    device.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        function()
    device.synchronize()
    return (time.perf_counter() - start) / count


def run_or_report_failure(job: Job) -> dict:
    """``run_variant``; if ``torch.compile`` fails, the result is ``failed`` with the reason."""
    try:
        return run_variant(job)
    except Exception as error:
        if job.variant != "torch-compile":
            raise
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


# ---- All measurements ----


def bench(request: Request, command: str) -> dict:
    """Measure every work in every precision, printing each table as soon as it is complete.

    Returns the result for JSON. Small works have no targets.
    """
    facts = gpu_facts() if request.device == "cuda" else machine()
    print("\n".join(head(command, request, facts)), flush=True)
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in request.works:
            work = (SMALL_WORKS if request.small else WORKS)[name]
            weights = Path(folder) / f"{work.arch}-{work.size}"
            if not weights.exists():
                print(f"random weights of {work.arch} {work.size} …", file=sys.stderr)
                write_weights(work, weights)
            for precision in request.precisions:
                print(f"{name} {precision}:", file=sys.stderr)
                case = summarise(work, precision, measure(work, precision, weights, request))
                print("\n".join(["", f"{work}, {precision}", *case_table(case)]), flush=True)
                cases[f"{name} {precision}"] = case
    rows = [] if request.small else target_rows(cases)
    if rows:
        print("\n".join(line.rstrip() for line in ["", *target_table(rows)]))
    facts_and_cases = {"machine": facts, "cases": cases, "targets": rows}
    return {"command": command, "request": asdict(request), **facts_and_cases}


def head(command: str, request: Request, facts: dict) -> list[str]:
    """The lines above all tables: the command, the machine, and the definitions of the columns."""
    size = request.product_size
    lines = [
        command,
        describe(facts),
        f"MFU: the model's FLOP/s over those of a {size} x {size} GEMM in the same library and precision",
        "peak GB: peak size of the library's memory pool (on a CPU, of the process)",
        "all GB: memory in use on the GPU, including the CUDA context and other processes",
    ]
    if request.device == "cpu":
        lines.append("NO GPU WAS MEASURED: these figures are from the CPU.")
    if request.small:
        lines.append("Small models: this only checks that every variant runs; it does not measure speed.")
    return lines


def measure(work: Work, precision: str, weights: Path, request: Request) -> dict[str, list[dict]]:
    """Measure the variants in turn; return variant -> [result of ``run_variant``, one per round].

    Each result also has the ``difference`` of its answers from the reference's. If it exceeds the bound, or
    if a variant fails, the program exits with code 1. If ``torch-compile`` fails, the reason becomes its
    result and its remaining rounds are skipped.
    """
    runs = {variant: [] for variant in request.variants}
    for number in range(1, request.rounds + 1):
        answers = {}
        for variant in request.variants:
            if failure(runs[variant]):
                continue
            print(f"round {number}/{request.rounds}: {variant} …", end=" ", file=sys.stderr, flush=True)
            path = weights / f"{variant}.npy"
            result = measure_once(Job(variant, work, precision, str(weights), str(path), request), number)
            runs[variant].append(result)
            if reason := failure(runs[variant]):
                print(f"failed: {reason}", file=sys.stderr)
                continue
            check_device(variant, request.device, result["device"])
            answers[variant] = path
            print(f"{work.tokens / result['seconds']:,.0f} tokens/s", file=sys.stderr)
        for variant, difference in differences(work.task, answers).items():
            check_difference(variant, difference, work, precision)
            runs[variant][-1]["difference"] = difference
    return runs


def measure_once(job: Job, number: int) -> dict:
    """``run_variant`` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
    child = in_own_process("parity.bench.cuda.measure", [asdict(job)], environment)
    if child.returncode != 0 and job.variant == "torch-compile":
        return {"failed": f"its process exited with code {child.returncode}"}
    return result_of(child, job.variant, number)


def check_device(variant: str, requested: str, actual: str) -> None:
    """Exit with code 1 if the weights were not on the requested kind of device."""
    if (requested == "cpu") != (actual == "cpu"):
        sys.exit(f"{variant} ran on {actual} instead of {requested}: no report")


def job_of(arguments: dict) -> Job:
    """The inverse of ``asdict(job)``."""
    return Job(**arguments | {"work": Work(**arguments["work"]), "request": Request(**arguments["request"])})


if __name__ == "__main__":  # a variant's own process, started by ``measure``
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C this process just ends; the parent reports
    (arguments,) = json.loads(sys.argv[1])
    print(json.dumps(run_or_report_failure(job_of(arguments))))

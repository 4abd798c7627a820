"""How fast is tinyllm on a GPU beside PyTorch, and in how much of its memory?

``python -m parity bench --device cuda`` measures three works (``works.py``) in float32, TF32 and bfloat16:
GPT-2 124M training, and a Llama of 1B parameters in prefill and decoding. Each measurement has a process of
its own, in turn: memory pools do not shrink, and two libraries on one GPU would share it. What is timed lies
between two moments at which the device has nothing left to do.

Before it is timed, every variant computes numbers in which all must agree (``answers.py``): nothing is
compared with what does not compute the same.

At its top this module imports the standard library only, so that a variant's process holds that variant's
libraries and nothing else.
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
from parity.bench.cuda.report import case_table, failure, gpu_facts, reach_rows, summarise
from parity.bench.cuda.variants import prepare, product
from parity.bench.cuda.works import SMALL_WORKS, WORKS, Work, write_weights
from parity.bench.process import describe, in_own_process, machine, result_of
from parity.bench.reach import reach_table

PRODUCT_SIZE = 8192  # rows and columns of the product whose rate is the most that is possible

SMALL_PRODUCT_SIZE = 64

PRODUCTS = 10  # how many are timed

# These would change the precision of products behind the back of the libraries' own switches.
OVERRIDES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUPY_TF32")


@dataclass(frozen=True)
class Request:
    """What is to be measured, and how often."""

    device: str  # cuda or cpu
    works: tuple[str, ...]  # of WORKS
    precisions: tuple[str, ...]
    variants: tuple[str, ...]
    small: bool  # the works of SMALL_WORKS instead, whose figures say nothing about speed
    rounds: int  # how many times every variant is measured
    warmup: int  # untimed repetitions at the start of each measurement
    steps: int  # timed ones
    compiler: str  # the backend of torch.compile

    @property
    def product_size(self) -> int:
        """Rows and columns of the matrices whose product is timed."""
        return SMALL_PRODUCT_SIZE if self.small else PRODUCT_SIZE


@dataclass(frozen=True)
class Job:
    """One measurement, for the process that makes it."""

    variant: str
    work: Work
    precision: str
    weights: str  # the folder of the model
    answers: str  # the file for what is compared
    request: Request


# ---- One measurement: what runs in a variant's own process ----


def run_variant(job: Job) -> dict:
    """Write the answers that are compared, warm up, then do the work as often as it is to be timed.

    Returns ``seconds`` of each time, in the mean; ``peak_bytes`` and ``whole_bytes`` of memory; the FLOP/s
    of the same library's product of large matrices, ``product_rate``; the ``losses`` that are compared, if
    it trains; and the name of the ``device`` on which the weights were.
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
    """Seconds of each of ``count`` calls, from a device at rest to a device at rest, in the mean."""
    device.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        function()
    device.synchronize()
    return (time.perf_counter() - start) / count


def run_or_say_why_not(job: Job) -> dict:
    """``run_variant``, but where ``torch.compile`` fails that is the result: ``failed`` and the reason."""
    try:
        return run_variant(job)
    except Exception as error:
        if job.variant != "torch-compile":
            raise
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


# ---- All measurements, in turn ----


def bench(request: Request, command: str) -> dict:
    """Measure and print every work in every precision, each table as soon as it is there.

    Returns all there is to report, ready for JSON. Small works have no table of reach.
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
    rows = [] if request.small else reach_rows(cases)
    if rows:
        print("\n".join(line.rstrip() for line in ["", *reach_table(rows)]))
    facts_and_cases = {"machine": facts, "cases": cases, "reach": rows}
    return {"command": command, "request": asdict(request), **facts_and_cases}


def head(command: str, request: Request, facts: dict) -> list[str]:
    """The lines over all tables: the command, the machine, and what the figures are worth."""
    size = request.product_size
    lines = [
        command,
        describe(facts),
        f"MFU: the model's FLOP/s by those of a {size} x {size} GEMM, same library, GPU and precision",
        "peak GB: the most that the library's memory pool held, or the process, on a CPU",
        "all GB: what was in use on the GPU, with the CUDA context and whatever else ran there",
    ]
    if request.device == "cpu":
        lines.append("NO GPU WAS MEASURED: these are the CPU's figures.")
    if request.small:
        lines.append("Small models: this shows that every variant runs, and says nothing about speed.")
    return lines


def measure(work: Work, precision: str, weights: Path, request: Request) -> dict[str, list[dict]]:
    """Let the variants take turns; returns variant -> [result of ``run_variant``, one per round].

    A result has also the ``difference`` of its answers from the reference's. One beyond the bound ends
    the program with exit code 1, and so does a variant that fails; for ``torch-compile`` the reason is the
    result then, and there are no more rounds of it.
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
        return {"failed": f"its process ended with code {child.returncode}"}
    return result_of(child, job.variant, number)


def check_device(variant: str, asked: str, found: str) -> None:
    """End the program with exit code 1 if the weights were not on the kind of device that was asked for."""
    if (asked == "cpu") != (found == "cpu"):
        sys.exit(f"{variant} was to run on {asked} and ran on {found}: its figures are of something else")


def job_of(asked: dict) -> Job:
    """From ``asdict`` of a job."""
    return Job(**asked | {"work": Work(**asked["work"]), "request": Request(**asked["request"])})


if __name__ == "__main__":  # a variant's own process, started by measure
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C measure's process speaks, this one just ends
    (asked,) = json.loads(sys.argv[1])
    print(json.dumps(run_or_say_why_not(job_of(asked))))

"""How fast is tinyllm on a GPU beside PyTorch, and in how much of its memory?

``python -m parity bench --device cuda`` measures three works (``bench_cuda_variants.py``) in float32, TF32
and bfloat16: GPT-2 124M training, and a Llama of 1B parameters reading and writing. Each measurement has a
process of its own, in turn: memory pools do not shrink, and two libraries on one GPU would share it. What
is timed lies between two moments at which the device has nothing left to do.

Before it is timed, every variant computes numbers in which all must agree: nothing is compared with what
does not compute the same.

At its top this module imports the standard library only, so that a variant's process holds that variant's
libraries and nothing else.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from parity.bench.cuda_variants import SMALL_WORKS, WORKS, Work, prepare, product, write_weights
from parity.bench.reach import Bound, ratio_by_round, reach_table, rows_of
from parity.bench.train import describe, in_own_process, machine, result_of, spread

PRODUCT_SIZE = 8192  # rows and columns of the product whose rate is the most that is possible

SMALL_PRODUCT_SIZE = 64

PRODUCTS = 10  # how many are timed

# How far two variants' answers may be apart: losses each by its own size, logits by the largest of them.
# Products round to 24, 11 and 8 bits. PyTorch in bfloat16 is off PyTorch in float32, on a CPU, by 4e-4 in
# the third loss of GPT-2 124M (2 x 128 tokens), and by 0.012 in the logits of 16 layers of 256 channels.
BOUNDS = {
    "losses": {"float32": 5e-5, "tf32": 1e-3, "bfloat16": 5e-3},
    "logits": {"float32": 5e-5, "tf32": 1e-2, "bfloat16": 5e-2},
}

# A cost -> that cost in one result of ``run_variant``
COSTS = {"time": lambda run: run["seconds"], "peak memory": lambda run: run["peak_bytes"]}

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


def reach(case: str) -> list[Bound]:
    """What is to be reached in one work and precision: PyTorch eager's speed, and at most its memory."""
    return [Bound(case, cost, ("torch-eager",), 1.0) for cost in COSTS]


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


# ---- What a device can say of itself, by library ----


class OnTheCpu:
    """Nothing to wait for; its memory is the process's."""

    def synchronize(self) -> None:
        """Nothing is left to do when a call returns."""

    def settle(self) -> None:
        """Memory cannot be given back so that its peak would fall."""

    def memory(self) -> dict:
        """``peak_bytes`` of this process; there is no ``whole_bytes``."""
        from parity.bench.train import peak_memory

        return {"peak_bytes": peak_memory(), "whole_bytes": None}


class CuPysGpu:
    """The current GPU as CuPy sees it."""

    def synchronize(self) -> None:
        """Wait until everything asked for is done."""
        import cupy

        cupy.cuda.Device().synchronize()

    def settle(self) -> None:
        """Give back what loading the model left free, so that the peak is the work's."""
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()

    def memory(self) -> dict:
        """``peak_bytes``: what the pool holds, and it gives nothing back; ``whole_bytes``: the whole GPU's.

        The latter counts what no pool knows of: the context, the kernels, cuBLAS's workspace, and
        whatever other processes have. How much of the pool was in use at most, CuPy does not record.
        """
        import cupy

        free, total = cupy.cuda.runtime.memGetInfo()
        pool = cupy.get_default_memory_pool()
        return {"peak_bytes": pool.total_bytes(), "whole_bytes": total - free}


class TorchsGpu:
    """The current GPU as PyTorch sees it."""

    def synchronize(self) -> None:
        """Wait until everything asked for is done."""
        import torch

        torch.cuda.synchronize()

    def settle(self) -> None:
        """Give back what loading the model left free, and let the peak begin here."""
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict:
        """``peak_bytes`` and ``whole_bytes`` as ``CuPysGpu.memory``: the most that its allocator held."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return {"peak_bytes": torch.cuda.max_memory_reserved(), "whole_bytes": total - free}


def device_of(variant: str, device: str) -> OnTheCpu | CuPysGpu | TorchsGpu:
    """The device, to be waited for and asked."""
    if device == "cpu":
        return OnTheCpu()
    return CuPysGpu() if variant == "tinyllm" else TorchsGpu()


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
    child = in_own_process("parity.bench.cuda", [asdict(job)], environment)
    if child.returncode != 0 and job.variant == "torch-compile":
        return {"failed": f"its process ended with code {child.returncode}"}
    return result_of(child, job.variant, number)


def failure(results: list[dict]) -> str | None:
    """Why a variant's last measurement failed, if it did."""
    return results[-1].get("failed") if results else None


def check_device(variant: str, asked: str, found: str) -> None:
    """End the program with exit code 1 if the weights were not on the kind of device that was asked for."""
    if (asked == "cpu") != (found == "cpu"):
        sys.exit(f"{variant} was to run on {asked} and ran on {found}: its figures are of something else")


def differences(task: str, answers: dict[str, Path]) -> dict[str, float]:
    """How far each variant's answers (in files) are from the reference's; nan if one is not a number."""
    import numpy as np

    if not answers:
        return {}
    reference = np.load(answers[reference_of(list(answers))])
    scale = np.abs(reference) if task == "train" else np.abs(reference).max()
    found = {}
    for variant, path in answers.items():
        array = np.load(path)
        if array.shape != reference.shape:
            sys.exit(
                f"{variant}'s answers have shape {array.shape}, not {reference.shape}: nothing to compare"
            )
        with np.errstate(invalid="ignore"):  # what is not finite makes nan, and that is beyond every bound
            found[variant] = float(np.max(np.abs(array - reference) / scale))
    return found


def reference_of(variants: list[str]) -> str:
    """With whose answers the others' are compared."""
    return "torch-eager" if "torch-eager" in variants else variants[0]


def bound_of(work: Work, precision: str) -> float:
    """How large a difference may be."""
    return BOUNDS[answers_of(work.task)][precision]


def answers_of(task: str) -> str:
    """What variants are compared in."""
    return "losses" if task == "train" else "logits"


def check_difference(variant: str, difference: float, work: Work, precision: str) -> None:
    """End the program with exit code 1 if the answers differ by more than the bound, or are not numbers."""
    if not difference <= bound_of(work, precision):  # nan is not
        sys.exit(
            f"{work}, {precision}: {variant}'s answers differ by {difference:.2g}, and the bound is "
            f"{bound_of(work, precision):g}: what does not compute the same is not compared"
        )


# ---- The report ----


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
    """The rows of the table of reach, as ``bench_reach.rows_of``."""
    bounds = [bound for name in cases for bound in reach(name)]
    complete = {
        name: {variant: case["runs"][variant] for variant in case["variants"]} for name, case in cases.items()
    }
    return rows_of(bounds, COSTS, complete)


def job_of(asked: dict) -> Job:
    """From ``asdict`` of a job."""
    return Job(**asked | {"work": Work(**asked["work"]), "request": Request(**asked["request"])})


if __name__ == "__main__":  # a variant's own process, started by measure
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C measure's process speaks, this one just ends
    (asked,) = json.loads(sys.argv[1])
    print(json.dumps(run_or_say_why_not(job_of(asked))))

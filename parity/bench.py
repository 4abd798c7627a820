"""How fast is tinyllm beside PyTorch, and in how much memory?

``python -m parity bench train`` lets every *variant* (one way to do the work: tinyllm, PyTorch eager) train
the same model on the same tokens and prints what it measured. Each measurement has a process of its own,
in turn (A B A B …): a process's peak memory never falls, and two libraries' thread pools share the cores.

A variant is one function in ``VARIANTS``: it builds model and optimiser and returns ``step(ids, targets)``,
one whole training step that returns its loss. At its top this module imports the standard library only, so
that a variant's process holds that variant's libraries and nothing else.
"""

import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Work:
    """A GPT-2 and the batch it trains on: a step is ``batch`` × ``context`` tokens."""

    n_layer: int
    n_embd: int
    n_head: int
    n_positions: int
    vocab_size: int
    batch: int
    context: int

    def gpt2_config(self) -> dict:
        """The arguments of ``GPT2Config``: tinyllm and transformers give them the same names."""
        sizes = {name: size for name, size in asdict(self).items() if name not in ("batch", "context")}
        return sizes | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


WORKS = {
    "gpt2-124m": Work(12, 768, 12, n_positions=1024, vocab_size=50257, batch=4, context=256),
    "gpt2-124m-1x1024": Work(12, 768, 12, n_positions=1024, vocab_size=50257, batch=1, context=1024),
    "small": Work(6, 384, 6, n_positions=256, vocab_size=2048, batch=16, context=256),
    "tiny": Work(2, 32, 2, n_positions=16, vocab_size=64, batch=2, context=16),
}

# The recipe of every variant: float32, no dropout, AdamW with decay on matrices only, clipping.
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-4, (0.9, 0.999), 1e-8, 0.1, 1.0

Step = Callable[..., float]  # step(ids (B, T), targets (B, T)) -> loss; both int64 arrays of NumPy


# ---- The variants ----


def tinyllm_step(work: Work, threads: int) -> Step:
    """tinyllm's GPT-2. Its number of threads comes from the environment, which ``measure`` sets."""
    import numpy as np

    from tinyllm import GPT2, GPT2Config, optim
    from tinyllm.device import keep_memory

    keep_memory()  # as ``tinyllm train`` does
    model = GPT2(GPT2Config(**work.gpt2_config()), rng=np.random.default_rng(0))
    model.train()
    optimizer = optim.AdamW(model, LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)

    def step(ids, targets):
        loss = model.loss(ids, targets)
        loss.backward()
        optim.clip_grad_norm(model, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def torch_eager_step(work: Work, threads: int) -> Step:
    """Hugging Face's GPT-2 in PyTorch eager at its best: SDPA attention, fused AdamW, no key-value cache."""
    import torch.nn.functional as F

    model = hugging_face_gpt2(work, threads)

    def compute_loss(ids, targets):
        logits = model(ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return torch_train_step(model, compute_loss)


def hugging_face_gpt2(work: Work, threads: int):
    """``transformers.GPT2LMHeadModel`` with its own random initialisation, in training mode."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = GPT2Config(**work.gpt2_config(), bos_token_id=0, eos_token_id=0, attn_implementation="sdpa")
    return GPT2LMHeadModel(config).train()


def torch_train_step(model, compute_loss) -> Step:
    """What every PyTorch variant does around its loss: backward, clipping, AdamW."""
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)

    def step(ids, targets):
        loss = compute_loss(torch.from_numpy(ids), torch.from_numpy(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


VARIANTS = {"tinyllm": tinyllm_step, "torch-eager": torch_eager_step}


# ---- One measurement: what runs in a variant's own process ----


def run_variant(variant: str, work: Work, warmup: int, steps: int, threads: int) -> dict:
    """Train ``warmup`` untimed and ``steps`` timed steps, and return what they cost.

    Returns ``seconds`` and minor ``page_faults`` of each timed step, ``losses`` of every step (warm-up
    included), ``peak_bytes`` of the whole process, and the ``libraries`` loaded, with version and BLAS.
    """
    import resource

    import numpy as np

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, work.vocab_size, (warmup + steps, 2, work.batch, work.context))
    step = VARIANTS[variant](work, threads)
    seconds, page_faults, losses = [], [], []
    for ids, targets in tokens:  # both (B, T)
        faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        losses.append(step(ids, targets))
        seconds.append(time.perf_counter() - start)
        page_faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before)
    if not all(math.isfinite(loss) for loss in losses):
        sys.exit(f"{variant}: the losses {losses} are not all finite, so its times mean nothing.")
    costs = {"seconds": seconds[warmup:], "page_faults": page_faults[warmup:], "losses": losses}
    return costs | {"peak_bytes": peak_memory(), "libraries": libraries()}


def peak_memory() -> int:
    """The peak resident memory of this process, in bytes."""
    import resource

    if sys.platform == "linux":  # ru_maxrss survives exec: a child would start with its parent's peak
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def libraries() -> dict[str, str]:
    """The array libraries this process loaded: their version, their BLAS, the kernels it chose."""
    import numpy as np
    from threadpoolctl import threadpool_info

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    kernels = {pool["architecture"] for pool in threadpool_info() if "architecture" in pool}
    found = {"numpy": " ".join([np.__version__, "with", blas["name"], blas["version"], *sorted(kernels)])}
    if torch := sys.modules.get("torch"):
        blas = re.search(r"\bBLAS_INFO=(\w+)", torch.__config__.show())
        kernels = torch.backends.cpu.get_cpu_capability()
        found["torch"] = f"{torch.__version__} with {blas[1] if blas else 'unknown BLAS'} {kernels}"
    if transformers := sys.modules.get("transformers"):
        found["transformers"] = transformers.__version__
    return found


# ---- All measurements, in turn ----


def train(work_name: str, rounds: int, warmup: int, steps: int, threads: int) -> dict:
    """Measure every variant on ``WORKS[work_name]``; returns all there is to report, ready for JSON."""
    work, counts = WORKS[work_name], {"warmup": warmup, "steps": steps, "threads": threads}
    runs = measure(work, list(VARIANTS), rounds, **counts)
    return {
        "request": {"work": work_name, "rounds": rounds, **counts},
        "sizes": asdict(work),
        "machine": machine(),
        "variants": summarise(runs, work),
        "ratios": compare(runs),
        "runs": runs,
    }


def measure(work: Work, variants: list[str], rounds: int, warmup: int, steps: int, threads: int) -> dict:
    """Let the variants take turns; returns variant -> [result of ``run_variant``, one per round].

    A variant that fails ends the program with exit code 1: its own message stands on stderr.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads))
    runs = {variant: [] for variant in variants}
    for number in range(1, rounds + 1):
        for variant in variants:
            print(f"round {number}/{rounds}: {variant} …", end=" ", file=sys.stderr, flush=True)
            request = json.dumps([variant, asdict(work), warmup, steps, threads])
            command = [sys.executable, "-m", "parity.bench", request]
            child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if child.returncode != 0:
                sys.exit(f"\n{variant} failed in round {number} (code {child.returncode}): no report.")
            runs[variant].append(json.loads(child.stdout.splitlines()[-1]))
            print(f"{median(runs[variant][-1]['seconds']):.4g} s per step", file=sys.stderr)
    return runs


def machine() -> dict:
    """The processor by name, its cores, the operating system, the Python."""
    cpu = platform.processor()
    if sys.platform == "linux":
        named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = named[1] if named else platform.machine()
    elif sys.platform == "darwin":
        cpu = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    system, python = platform.platform(), platform.python_version()
    return {"cpu": cpu, "cores": os.cpu_count(), "system": system, "python": python}


# ---- The report ----


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def summarise(runs: dict[str, list[dict]], work: Work) -> dict[str, dict]:
    """Per variant: seconds and page faults over all timed steps, tokens per second, peak memory."""
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
    """The first variant's cost divided by each other's in the same round, and the spread of those ratios."""
    costs = {
        "time (medians)": lambda run: median(run["seconds"]),
        "time (minima)": lambda run: min(run["seconds"]),
        "peak memory": lambda run: run["peak_bytes"],
    }
    first, *others = runs
    ratios = {other: {} for other in others}
    for other in others:
        for name, cost in costs.items():
            values = [cost(run) / cost(peer) for run, peer in zip(runs[first], runs[other], strict=True)]
            ratios[other][name] = spread(values) | {"rounds": values}
    return ratios


def report(result: dict) -> str:
    """The tables that ``python -m parity bench train`` prints."""
    runs, describe = result["runs"], lambda facts: ", ".join(f"{name} {fact}" for name, fact in facts.items())
    lines = [describe(result[name]) for name in ("request", "sizes", "machine")]
    lines += [f"{variant}: {describe(rounds[0]['libraries'])}" for variant, rounds in runs.items()]
    row = "{:<24}{:>9}{:>9}{:>9}{:>10}{:>9}{:>13}  {}".format
    lines += ["", row("variant", "s/step", "min", "max", "tokens/s", "peak GB", "faults/step", "loss")]
    for variant, cost in result["variants"].items():
        seconds = [f"{value:.4f}" for value in cost["seconds"].values()]
        memory, faults = cost["peak_bytes"]["median"] / 1e9, cost["page_faults"]["median"]
        losses = runs[variant][0]["losses"]
        numbers = [*seconds, f"{cost['tokens_per_s']:.0f}", f"{memory:.3f}", f"{faults:.0f}"]
        lines.append(row(variant, *numbers, f"{losses[0]:.4f} to {losses[-1]:.4f}"))
    for other, ratios in result["ratios"].items():
        lines += ["", row(f"{next(iter(runs))} / {other}", "median", "min", "max", "by round:", "", "", "")]
        for name, ratio in ratios.items():
            numbers = [ratio["median"], ratio["min"], ratio["max"], *ratio["rounds"]]
            lines.append(f"{name:<24}" + "".join(f"{value:>9.3f}" for value in numbers))
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":  # a variant's own process, started by measure
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C measure's process speaks, this one just ends
    variant, work, *counts = json.loads(sys.argv[1])
    print(json.dumps(run_variant(variant, Work(**work), *counts)))

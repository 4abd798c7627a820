"""How fast does a model write with tinyllm, beside transformers and beside what the memory would allow?

``python -m parity bench decode`` measures four things, float32, one row, greedy, in a process for each side,
in turn: the time of a token after a short prompt; how much of it the matrix-vector products take, which read
every weight once and cannot be avoided; the time to read a long prompt; and the time from starting Python to
the first token.

At its top this module imports the standard library only: each side's process is to hold that side only, and
its imports are part of the cold start.
"""

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from parity.bench.process import describe, in_own_process, libraries, machine, result_of, with_threads
from parity.bench.reach import Bound, reach_table, verdict

SIDES = ("tinyllm", "transformers")

# The shape of SmolLM2-135M (134,515,008 parameters); random weights take the same time as trained ones.
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


@dataclass(frozen=True)
class Sizes:
    """How many tokens are read and written, and how often what is short is repeated."""

    prompt: int = 64
    new: int = 128
    long_prompt: int = 512
    repeats: int = 5  # of reading the long prompt
    steps: int = 32  # tokens beside which the products are timed


# What is to be reached, and the cost of a round: one result of ``run_side`` for each side
REACH: tuple[tuple[Bound, Callable[[dict, dict], float]], ...] = (
    (
        Bound("decode", "time per token", ("transformers",), 0.50),
        lambda ours, theirs: ours["token_s"] / theirs["token_s"],
    ),
    (
        Bound("decode", "time per step", ("its products",), 1.25),  # 0.80 of the tokens they would allow
        lambda ours, theirs: median(ours["step_s"]) / products_seconds(ours),
    ),
    (
        Bound("prefill", "time to read", ("transformers",), 1.00),
        lambda ours, theirs: median(ours["prefill_s"]) / median(theirs["prefill_s"]),
    ),
    (
        Bound("cold start", "first token", ("transformers",), 1.00),
        lambda ours, theirs: ours["first_token_s"] / theirs["first_token_s"],
    ),
)


def products_seconds(run: dict) -> float:
    """A step's matrix-vector products alone: the faster of one BLAS thread and all of them."""
    return min(median(run["products_1_s"]), median(run["products_s"]))


# ---- One measurement: what runs in a side's own process ----


def run_side(side: str, folder: str, sizes: Sizes, threads: int, started: float) -> dict:
    """What one side costs; ``started`` is the time.time() at which its process was.

    Returns seconds: ``first_token_s`` since the start, ``token_s`` of each new token (reading the short
    prompt included), ``prefill_s`` of the long prompt, repeated; of tinyllm also ``step_s`` and, taking
    turns with it, ``products_s`` and ``products_1_s`` (on one thread). And the ``tokens`` it wrote.
    """
    return {"tinyllm": run_tinyllm, "transformers": run_transformers}[side](folder, sizes, threads, started)


def run_tinyllm(folder: str, sizes: Sizes, threads: int, started: float) -> dict:
    """Its number of threads comes from the environment, which ``measure`` sets."""
    from tinyllm import generate, load_model, no_grad
    from tinyllm.backend.memory import keep_memory

    keep_memory()  # as ``tinyllm generate`` does
    model = load_model(folder)
    prompt, long_prompt = ([ids_of(count)] for count in (sizes.prompt, sizes.long_prompt))
    next(generate(model, prompt, sizes.new, temperature=0))
    first_token_s = time.time() - started

    def prefill():
        with no_grad():
            model(long_prompt, last_only=True, cache=model.new_cache(1, sizes.long_prompt))

    start = time.perf_counter()
    tokens = [int(token[0]) for token in generate(model, prompt, sizes.new, temperature=0)]
    token_s = (time.perf_counter() - start) / sizes.new
    return {
        "first_token_s": first_token_s,
        "token_s": token_s,
        "prefill_s": timed(prefill, sizes.repeats),
        **steps_and_products(model, prompt, sizes.steps),
        "tokens": tokens,
        "libraries": libraries(),
    }


def steps_and_products(model, prompt, count: int) -> dict[str, list[float]]:
    """``count`` steps, and after each the same products by themselves, so that both meet the same machine."""
    import numpy as np

    from tinyllm import generate, nn
    from tinyllm.backend.threads import one_blas_thread

    weights = [module.weight.data for _, module in model.named_modules() if isinstance(module, nn.Linear)]
    inputs = {w.shape[1]: np.ones((1, w.shape[1]), w.dtype) for w in weights}
    steps = generate(model, prompt, count + 1, temperature=0)
    next(steps)  # reads the prompt

    def products():
        for w in weights:
            np.matmul(inputs[w.shape[1]], w.T)

    seconds = {"step_s": [], "products_s": [], "products_1_s": []}
    for _ in range(count):
        seconds["step_s"] += timed(lambda: next(steps), 1, warmup=0)
        seconds["products_s"] += timed(products, 1, warmup=0)
        with one_blas_thread():  # last: BLAS's other threads, awake for a while, would slow down the step
            seconds["products_1_s"] += timed(products, 1, warmup=0)
    return seconds


def run_transformers(folder: str, sizes: Sizes, threads: int, started: float) -> dict:
    """``generate`` as it comes, with torch's fused attention."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # it is to write all the tokens it is asked for
    prompt, long_prompt = (torch.tensor([ids_of(count)]) for count in (sizes.prompt, sizes.long_prompt))

    def write(count):
        mask = torch.ones_like(prompt)
        return model.generate(
            prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )

    def prefill():
        with torch.no_grad():
            model(long_prompt, use_cache=True, logits_to_keep=1)

    write(1)
    first_token_s = time.time() - started
    start = time.perf_counter()
    tokens = write(sizes.new)[0, sizes.prompt :].tolist()
    token_s = (time.perf_counter() - start) / sizes.new
    return {
        "first_token_s": first_token_s,
        "token_s": token_s,
        "prefill_s": timed(prefill, sizes.repeats),
        "tokens": tokens,
        "libraries": libraries(),
    }


def ids_of(count: int) -> list[int]:
    """A prompt of ``count`` token ids, the same on both sides; small, for any vocabulary."""
    return [3 + 7 * i % 50 for i in range(count)]


def timed(function: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each of ``repeats`` calls, after ``warmup`` more."""
    seconds = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


# ---- All measurements, in turn ----


def write_smollm2(folder: Path) -> None:
    """A folder with a model of SmolLM2's shape and random weights, for both sides to load."""
    import numpy as np

    from tinyllm import Llama, LlamaConfig

    Llama(LlamaConfig(**SMOLLM2), rng=np.random.default_rng(0)).save_pretrained(folder)


def decode(folder: Path, name: str, rounds: int, threads: int, sizes: Sizes = Sizes()) -> dict:
    """Measure both sides on the model in ``folder``; all there is to report, ready for JSON."""
    before = machine()
    runs = measure(folder, rounds, threads, sizes)
    return {
        "request": {"model": name, "rounds": rounds, "threads": threads, **asdict(sizes)},
        "machine": before,
        "runs": runs,
        "reach": reach_rows(runs),
    }


def measure(folder: Path, rounds: int, threads: int, sizes: Sizes) -> dict[str, list[dict]]:
    """Let the sides take turns; returns side -> [result of ``run_side``, one per round].

    A side that fails ends the program with exit code 1: its own message stands on stderr.
    """
    environment = with_threads(threads)
    runs = {side: [] for side in SIDES}
    for number in range(1, rounds + 1):
        for side in SIDES:
            print(f"round {number}/{rounds}: {side} …", end=" ", file=sys.stderr, flush=True)
            request = [side, str(folder), asdict(sizes), threads, time.time()]
            child = in_own_process("parity.bench.decode", request, environment)
            runs[side].append(result_of(child, side, number))
            print(f"{1 / runs[side][-1]['token_s']:.1f} tokens/s", file=sys.stderr)
    return runs


# ---- The report ----


def reach_rows(runs: dict[str, list[dict]]) -> list[dict]:
    """Every bound with what was ``reached`` in the median, in each of the ``rounds``, and the ``verdict``."""
    rows = []
    for bound, cost in REACH:
        rounds = [cost(ours, theirs) for ours, theirs in zip(runs["tinyllm"], runs["transformers"])]
        reached = median(rounds)
        rows.append(
            asdict(bound) | {"reached": reached, "rounds": rounds, "verdict": verdict(bound, reached)}
        )
    return rows


def report(result: dict) -> str:
    """The tables: what each side took, and what was to be reached."""
    request, runs = result["request"], result["runs"]
    lines = [describe(request), describe(result["machine"])]
    lines += [f"{side}: {describe(rounds[0]['libraries'])}" for side, rounds in runs.items()]
    row = "{:<16}{:>12}{:>12}{:>16}{:>16}".format
    read = f"{request['long_prompt']} read, s"
    lines += ["", row("", "tokens/s", "ms/token", read, "first token, s")]
    for side, rounds in runs.items():
        token_s = median(run["token_s"] for run in rounds)
        prefill_s = median(median(run["prefill_s"]) for run in rounds)
        first_s = median(run["first_token_s"] for run in rounds)
        numbers = f"{1 / token_s:.1f}", f"{1000 * token_s:.2f}", f"{prefill_s:.3f}", f"{first_s:.2f}"
        lines.append(row(side, *numbers))
    step_s = median(median(run["step_s"]) for run in runs["tinyllm"])
    products_s = median(products_seconds(run) for run in runs["tinyllm"])
    for label, seconds in (("one step", step_s), ("its products", products_s)):
        lines.append(row(label, f"{1 / seconds:.1f}", f"{1000 * seconds:.2f}", "", ""))
    same = same_tokens(runs)
    lines += ["", f"The first {same} of {request['new']} greedy tokens are the same on both sides."]
    lines += ["", *reach_table(result["reach"])]
    return "\n".join(line.rstrip() for line in lines)


def same_tokens(runs: dict[str, list[dict]]) -> int:
    """How many tokens both sides wrote alike before the first that differs, in the first round."""
    ours, theirs = (runs[side][0]["tokens"] for side in SIDES)
    alike = [a == b for a, b in zip(ours, theirs, strict=True)]
    return alike.index(False) if False in alike else len(alike)


if __name__ == "__main__":  # a side's own process, started by measure
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C measure's process speaks, this one just ends
    side, folder, sizes, threads, started = json.loads(sys.argv[1])
    print(json.dumps(run_side(side, folder, Sizes(**sizes), threads, started)))

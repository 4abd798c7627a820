"""Time of decoding: tinyllm against transformers, and against the matrix-vector products alone.

``python -m parity bench decode`` measures one sequence in float32, decoded greedily. It reports the time per
token after a short prompt; the time of a step's matrix-vector products by themselves, which read every weight
once and cannot be avoided; the prefill of a long prompt; and the time from starting Python to the first
token. Each measurement runs in a process of its own, and the two sides take turns.

At its top this module imports the standard library only, so that a side's process loads that side's libraries
and no others. Its imports are part of the cold start.
"""

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from parity import tables
from parity.bench.process import describe, in_own_process, libraries, machine, result_of, with_threads
from parity.bench.targets import Target, ratio_table, row_of, target_table

SIDES = ("tinyllm", "transformers")

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


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens and repetitions."""

    prompt: int = 64
    new: int = 128  # tokens decoded after the prompt
    long_prompt: int = 512
    repeats: int = 5  # of the prefill of the long prompt
    steps: int = 32  # decoding steps, each timed together with its products


# Every target with the function that gives its ratio for one round: (result of each side) -> ratio
TARGETS: tuple[tuple[Target, Callable[[dict, dict], float]], ...] = (
    (
        Target("decode", "time per token", ("transformers",), 0.50),
        lambda ours, theirs: ours["token_s"] / theirs["token_s"],
    ),
    (
        Target("decode", "time per step", ("its products",), 1.25),  # 80% of the products' tokens/s
        lambda ours, theirs: median(ours["step_s"]) / products_seconds(ours),
    ),
    (
        Target("prefill", "time", ("transformers",), 1.00),
        lambda ours, theirs: median(ours["prefill_s"]) / median(theirs["prefill_s"]),
    ),
    (
        Target("cold start", "time to first", ("transformers",), 1.00),
        lambda ours, theirs: ours["first_token_s"] / theirs["first_token_s"],
    ),
)


def products_seconds(run: dict) -> float:
    """Seconds of a step's matrix-vector products: the faster of one BLAS thread and all threads."""
    return min(median(run["products_1_s"]), median(run["products_s"]))


# ---- One measurement: runs in the side's own process ----


def run_side(side: str, folder: str, sizes: Sizes, threads: int, started: float) -> dict:
    """Measure one side; ``started`` is the time.time() at which its process was started.

    Returns seconds: ``first_token_s`` since the start; ``token_s`` per new token, including the prefill of
    the short prompt; every ``prefill_s`` of the long prompt; for tinyllm also ``step_s`` and, in turn with
    it, ``products_s`` and ``products_1_s`` (on one thread). Also returns the generated ``tokens``.
    """
    return {"tinyllm": run_tinyllm, "transformers": run_transformers}[side](folder, sizes, threads, started)


def run_tinyllm(folder: str, sizes: Sizes, threads: int, started: float) -> dict:
    """``run_side`` for tinyllm. ``measure`` sets the number of threads in the environment."""
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
    """``count`` decoding steps, each followed by its products alone under the same load."""
    import numpy as np

    from tinyllm import generate, nn
    from tinyllm.backend.threads import one_blas_thread

    weights = [module.weight.data for _, module in model.named_modules() if isinstance(module, nn.Linear)]
    inputs = {w.shape[1]: np.ones((1, w.shape[1]), w.dtype) for w in weights}
    steps = generate(model, prompt, count + 1, temperature=0)
    next(steps)  # the prefill

    def products():
        for w in weights:
            np.matmul(inputs[w.shape[1]], w.T)

    seconds = {"step_s": [], "products_s": [], "products_1_s": []}
    for _ in range(count):
        seconds["step_s"] += timed(lambda: next(steps), 1, warmup=0)
        seconds["products_s"] += timed(products, 1, warmup=0)
        with one_blas_thread():  # last: BLAS's idle threads spin for a while and would slow down the step
            seconds["products_1_s"] += timed(products, 1, warmup=0)
    return seconds


def run_transformers(folder: str, sizes: Sizes, threads: int, started: float) -> dict:
    """``run_side`` for transformers: its ``generate`` with default options."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # generate exactly ``new`` tokens
    prompt, long_prompt = (torch.tensor([ids_of(count)]) for count in (sizes.prompt, sizes.long_prompt))

    def decode(count):
        mask = torch.ones_like(prompt)
        return model.generate(
            prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )

    def prefill():
        with torch.no_grad():
            model(long_prompt, use_cache=True, logits_to_keep=1)

    decode(1)
    first_token_s = time.time() - started
    start = time.perf_counter()
    tokens = decode(sizes.new)[0, sizes.prompt :].tolist()
    token_s = (time.perf_counter() - start) / sizes.new
    return {
        "first_token_s": first_token_s,
        "token_s": token_s,
        "prefill_s": timed(prefill, sizes.repeats),
        "tokens": tokens,
        "libraries": libraries(),
    }


def ids_of(count: int) -> list[int]:
    """A prompt of ``count`` token ids below 53, so that any vocabulary contains them."""
    return [3 + 7 * i % 50 for i in range(count)]


def timed(function: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each of ``repeats`` calls, after ``warmup`` untimed ones."""
    seconds = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


# ---- All measurements ----


def write_smollm2(folder: Path) -> None:
    """Write a model of SmolLM2's sizes with random weights, for both sides to load."""
    import numpy as np

    from tinyllm import Llama, LlamaConfig

    Llama(LlamaConfig(**SMOLLM2), rng=np.random.default_rng(0)).save_pretrained(folder)


def decode(folder: Path, name: str, rounds: int, threads: int, sizes: Sizes = Sizes()) -> dict:
    """Measure both sides on the model in ``folder``; return the result for JSON."""
    before = machine()
    runs = measure(folder, rounds, threads, sizes)
    return {
        "request": {"model": name, "rounds": rounds, "threads": threads, **asdict(sizes)},
        "machine": before,
        "runs": runs,
        "targets": target_rows(runs),
    }


def measure(folder: Path, rounds: int, threads: int, sizes: Sizes) -> dict[str, list[dict]]:
    """Measure the sides in turn; return side -> [result of ``run_side``, one per round].

    If a side fails, its message is on stderr and the program exits with code 1.
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


def target_rows(runs: dict[str, list[dict]]) -> list[dict]:
    """Every target with its measured ratios, as ``parity.bench.targets.row_of``."""
    both = list(zip(runs["tinyllm"], runs["transformers"]))
    return [row_of(target, [ratio(*results) for results in both]) for target, ratio in TARGETS]


def seconds_of(runs: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds: side -> seconds per token, of the prefill, and to the first token."""
    return {
        side: {
            "token": median(run["token_s"] for run in rounds),
            "prefill": median(median(run["prefill_s"]) for run in rounds),
            "first token": median(run["first_token_s"] for run in rounds),
        }
        for side, rounds in runs.items()
    }


def step_seconds(runs: dict[str, list[dict]]) -> tuple[float, float]:
    """Medians over the rounds: seconds of one of tinyllm's steps, and of its products alone."""
    ours = runs["tinyllm"]
    return median(median(run["step_s"]) for run in ours), median(products_seconds(run) for run in ours)


def report(result: dict) -> str:
    """The text that ``python -m parity bench decode`` prints: times of each side, then the targets."""
    request, runs = result["request"], result["runs"]
    lines = [describe(request), describe(result["machine"])]
    lines += [f"{side}: {describe(rounds[0]['libraries'])}" for side, rounds in runs.items()]
    row = "{:<16}{:>12}{:>12}{:>20}{:>16}".format
    prefill = f"prefill of {request['long_prompt']}, s"
    lines += ["", row("", "tokens/s", "ms/token", prefill, "first token, s")]
    for side, seconds in seconds_of(runs).items():
        rate, ms = f"{1 / seconds['token']:.1f}", f"{1000 * seconds['token']:.2f}"
        lines.append(row(side, rate, ms, f"{seconds['prefill']:.3f}", f"{seconds['first token']:.2f}"))
    for label, seconds in zip(("one step", "its products"), step_seconds(runs)):
        lines.append(row(label, f"{1 / seconds:.1f}", f"{1000 * seconds:.2f}", "", ""))
    lines += ["", agreement(result), "", *target_table(result["targets"])]
    return "\n".join(line.rstrip() for line in lines)


def agreement(result: dict) -> str:
    """A sentence on how many tokens agree."""
    same, new = same_tokens(result["runs"]), result["request"]["new"]
    return f"The first {same} of {new} greedy tokens are the same on both sides."


def markdown(result: dict) -> str:
    """The tables for the page: the costs of both sides and tinyllm's ratios."""
    request, runs, facts = result["request"], result["runs"], result["machine"]
    ours, theirs = (seconds_of(runs)[side] for side in SIDES)
    step, products = step_seconds(runs)
    long_prompt = f"prefill of {request['long_prompt']} tokens"
    about = (
        request["model"],
        f"{facts['cpu']} ({facts['instructions']})",
        f"{request['threads']} threads",
        *(f"{name} {text}" for name, text in runs["transformers"][0]["libraries"].items()),
        f"medians of {request['rounds']} rounds of {request['prompt']} + {request['new']} tokens",
    )
    rows = [
        ("decode", "tokens/s", f"{1 / ours['token']:.1f}", f"{1 / theirs['token']:.1f}"),
        (long_prompt, "s", f"{ours['prefill']:.3f}", f"{theirs['prefill']:.3f}"),
        ("cold start to first token", "s", f"{ours['first token']:.2f}", f"{theirs['first token']:.2f}"),
        ("decoding step", "ms", f"{1000 * step:.1f}", ""),
        ("its matrix-vector products alone", "ms", f"{1000 * products:.1f}", ""),
    ]
    return "\n\n".join(
        [
            tables.measured("bench decode", *about),
            tables.markdown(("", "", *SIDES), rows),
            ratio_table(result["targets"]),
            agreement(result),
        ]
    )


def same_tokens(runs: dict[str, list[dict]]) -> int:
    """The number of tokens before the first that differs between the two sides, in the first round."""
    ours, theirs = (runs[side][0]["tokens"] for side in SIDES)
    alike = [a == b for a, b in zip(ours, theirs, strict=True)]
    return alike.index(False) if False in alike else len(alike)


if __name__ == "__main__":  # a side's own process, started by ``measure``
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C this process just ends; the parent reports
    side, folder, sizes, threads, started = json.loads(sys.argv[1])
    print(json.dumps(run_side(side, folder, Sizes(**sizes), threads, started)))

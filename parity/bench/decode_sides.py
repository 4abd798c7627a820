"""The measurements of ``bench decode``: what tinyllm, transformers and llama.cpp do in their own processes.

A side returns ``seconds``, cost -> list of measurements, and ``tokens``, name -> generated ids. Costs of one
side that are divided by each other are measured in turn in its process.

At its top this module imports the standard library only, so that a side's process loads that side's libraries
and no others. Its imports are part of the cold start.
"""

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from parity.bench.isa import check_obeyed
from parity.bench.process import libraries


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens and repetitions."""

    prompt: int = 64
    new: int = 128  # tokens decoded after a prompt
    prefills: tuple[int, ...] = (128, 512, 2048)  # lengths of long prompts
    repeats: int = 3  # of prefills and second turns
    steps: int = 32  # timed decoding steps
    history: int = 480  # prompt of a chat's first turn, which is answered with ``steps`` tokens
    question: int = 32  # prompt of its second turn
    rows: int = 8  # decoded at once


SIZES = Sizes()


@dataclass(frozen=True)
class Side:
    """What one process measures; the fields are in its request."""

    name: str
    source: str  # the model's folder, for llama.cpp its file
    works: tuple[str, ...]
    texts: dict[str, dict]  # as parity.bench.decode_texts.prompts
    sizes: Sizes
    threads: int
    started: float  # the time.time() at which the process was started


def run_side(side: Side) -> dict:
    """Measure one side: its ``seconds``, ``tokens`` and ``libraries``."""
    run = {"tinyllm": run_tinyllm, "transformers": run_transformers}.get(side.name, run_llamacpp)(side)
    return run | {"libraries": libraries()}


def ids_of(count: int, first: int = 0) -> list[int]:
    """A prompt of ``count`` token ids below 53, so that any vocabulary contains them."""
    return [3 + (first + 7 * i) % 50 for i in range(count)]


def timed(function: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each of ``repeats`` calls, after ``warmup`` untimed ones."""
    seconds = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def time_per_token(decode: Callable[[int], list[int]], count: int) -> tuple[list[float], list[int]]:
    """Seconds per token of decoding ``count`` tokens, prefill included, and the tokens."""
    start = time.perf_counter()
    tokens = decode(count)
    return [(time.perf_counter() - start) / count], tokens


# ---- tinyllm ----


def run_tinyllm(side: Side) -> dict:
    """``run_side`` for tinyllm. ``measure`` sets the number of threads in the environment."""
    from tinyllm import generate, load_model
    from tinyllm.backend.memory import keep_memory

    keep_memory()  # as ``tinyllm generate`` does
    model = load_model(side.source)
    next(generate(model, [ids_of(side.sizes.prompt)], 1, temperature=0))
    run = {"seconds": {"cold start": [time.time() - side.started]}, "tokens": {}}
    for work in side.works:
        if work in TINYLLM:
            costs = TINYLLM[work](model, side)
            for kind in run:
                run[kind] |= costs.get(kind, {})
    return run


def token(model, side: Side) -> dict:
    """A token of greedy decoding after a short prompt."""
    from tinyllm import generate

    def decode(count):
        steps = generate(model, [ids_of(side.sizes.prompt)], count, temperature=0)
        return [int(tokens[0]) for tokens in steps]

    seconds, tokens = time_per_token(decode, side.sizes.new)
    return {"seconds": {"token": seconds}, "tokens": {"token": tokens}}


def step(model, side: Side) -> dict:
    """A decoding step, and its matrix-vector products: the faster of all BLAS threads and one."""
    seconds = steps_and_products(model, [ids_of(side.sizes.prompt)], side.sizes.steps)
    products = min(seconds["products on all threads"], seconds["products on one thread"], key=median)
    return {"seconds": seconds | {"products": products}}


def steps_and_products(model, prompt, count: int) -> dict[str, list[float]]:
    """``count`` decoding steps, each followed by its products alone under the same load.

    The products read every weight once and cannot be avoided.
    """
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

    seconds = {"step": [], "products on all threads": [], "products on one thread": []}
    for _ in range(count):
        seconds["step"] += timed(lambda: next(steps), 1, warmup=0)
        seconds["products on all threads"] += timed(products, 1, warmup=0)
        with one_blas_thread():  # last: BLAS's idle threads spin for a while and would slow down the step
            seconds["products on one thread"] += timed(products, 1, warmup=0)
    return seconds


def prefill(model, side: Side) -> dict:
    """The prefill of each long prompt."""
    from tinyllm import no_grad

    seconds = {}
    for length in side.sizes.prefills:

        def run(length=length):
            with no_grad():
                model([ids_of(length)], last_only=True, cache=model.new_cache(1, length))

        seconds[f"prefill {length}"] = timed(run, side.sizes.repeats)
    return {"seconds": seconds}


def second_turn(model, side: Side) -> dict:
    """The first token of a chat's second answer, with the first turn in the cache and with an empty one."""
    from tinyllm import generate

    sizes, history = side.sizes, ids_of(side.sizes.history)
    cache = model.new_cache(1, sizes.history + sizes.steps + sizes.question + 1)
    answer = [int(ids[0]) for ids in generate(model, [history], sizes.steps, temperature=0, cache=cache)]
    seconds, tokens = {"kept": [], "anew": []}, {"kept": [], "anew": []}
    for repeat in range(1 + sizes.repeats):  # the first is not timed
        # Another question each time: only the first turn is kept.
        ids = [history + answer + ids_of(sizes.question, first=repeat)]
        for way, options in ("kept", {"cache": cache}), ("anew", {}):
            start = time.perf_counter()
            first = next(generate(model, ids, 1, temperature=0, **options))
            seconds[way].append(time.perf_counter() - start)
            tokens[way].append(int(first[0]))
    return {
        "seconds": {f"second turn {way}": times[1:] for way, times in seconds.items()},
        "tokens": {f"second turn {way}": ids for way, ids in tokens.items()},
    }


def speculation(model, side: Side) -> dict:
    """A token of each text after its first, with and without candidates from the prompt."""
    from tinyllm import generate

    seconds, tokens = {}, {}
    for text, arguments in side.texts.items():
        for way, options in ("plain", {}), ("speculative", {"speculate": "prompt"}):
            steps = generate(model, max_new_tokens=side.sizes.new, **arguments, **options)
            ids = [int(next(steps)[0])]  # the prefill
            start = time.perf_counter()
            ids += [int(new[0]) for new in steps]
            seconds[f"{text} {way}"] = [(time.perf_counter() - start) / max(1, len(ids) - 1)]
            tokens[f"{text} {way}"] = ids
    return {"seconds": seconds, "tokens": tokens}


def rows(model, side: Side) -> dict:
    """A token of one row, and of several rows that are decoded at once."""
    from tinyllm import generate

    sizes, steps = side.sizes, {}
    for count in (1, sizes.rows):
        prompts = [ids_of(sizes.prompt, first=row) for row in range(count)]
        steps[count] = generate(model, prompts, sizes.steps + 1, temperature=0)
        next(steps[count])  # the prefill
    seconds = {count: [] for count in steps}
    for _ in range(sizes.steps):
        for count, generator in steps.items():
            seconds[count] += timed(lambda generator=generator: next(generator), 1, warmup=0)
    return {"seconds": {f"{n} rows": [step / n for step in times] for n, times in seconds.items()}}


TINYLLM = {
    "step": step,
    "token": token,
    "prefill": prefill,
    "second-turn": second_turn,
    "speculation": speculation,
    "rows": rows,
}


# ---- The others ----


def run_transformers(side: Side) -> dict:
    """``run_side`` for transformers: its ``generate`` with default options."""
    import torch
    import transformers

    torch.set_num_threads(side.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(side.source, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # generate exactly as many tokens as requested
    prompt = torch.tensor([ids_of(side.sizes.prompt)])

    def decode(count):
        mask = torch.ones_like(prompt)
        ids = model.generate(
            prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return ids[0, side.sizes.prompt :].tolist()

    def prefill(length):
        with torch.no_grad():
            model(torch.tensor([ids_of(length)]), use_cache=True, logits_to_keep=1)

    decode(1)
    return costs_of_peer(side, decode, prefill)


def run_llamacpp(side: Side) -> dict:
    """``run_side`` for llama.cpp, through the server that ``xllamacpp`` has in the process."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = side.source
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = side.threads
    parameters.n_parallel = 1
    parameters.n_ctx = max(side.sizes.prompt + side.sizes.new, *side.sizes.prefills) + 1
    parameters.verbosity = 0
    parameters.warmup = False  # its own; ours is the cold start
    server = xllamacpp.Server(parameters)

    def complete(length, count):
        request = {"prompt": ids_of(length), "n_predict": count, "temperature": 0}
        server.handle_completions(request | {"ignore_eos": True, "cache_prompt": False})
        return []  # it returns a text

    def decode(count):
        return complete(side.sizes.prompt, count)

    decode(1)
    return costs_of_peer(side, decode, lambda length: complete(length, 1))


def costs_of_peer(side: Side, decode: Callable[[int], list[int]], prefill: Callable[[int], object]) -> dict:
    """The works that every side does, after its first token."""
    seconds, tokens = {"cold start": [time.time() - side.started]}, {}
    if "token" in side.works:
        seconds["token"], tokens["token"] = time_per_token(decode, side.sizes.new)
    if "prefill" in side.works:
        for length in side.sizes.prefills:
            seconds[f"prefill {length}"] = timed(lambda length=length: prefill(length), side.sizes.repeats)
    return {"seconds": seconds, "tokens": tokens}


if __name__ == "__main__":  # a side's own process, started by ``parity.bench.decode.measure``
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C this process just ends; the parent reports
    fields, isa = json.loads(sys.argv[1])
    result = run_side(Side(**fields | {"sizes": Sizes(**fields["sizes"])}))
    check_obeyed(isa)
    print(json.dumps(result))

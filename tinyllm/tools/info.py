"""What a model costs: parameters, memory, arithmetic, and what this machine could deliver at best.

A model may be far larger than the machine (build it with ``rng=None``). Its memory is that of a real training
step, forward and backward, on arrays that have no elements and count the bytes they would take (``meta.py``):
what the tape holds, whatever the layers are. Only the two rates at the end take real work.
"""

from __future__ import annotations

import copy
import re
import time
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from tinyllm.backend.threads import BLOCK, first_task_only, matmul, num_threads
from tinyllm.checks import is_integer
from tinyllm.errors import Error
from tinyllm.functional.attention import QUERY_BLOCK
from tinyllm.nn import Linear, Module, evaluating
from tinyllm.tensor import Tensor, no_grad
from tinyllm.tools.meta import MetaArray, Tally
from tinyllm.tools.profile import watching, who_called

DTYPES = ("float32", "float64")  # what models compute in on a CPU


def _dtype(dtype) -> np.dtype:
    name = getattr(dtype, "__name__", str(dtype))  # np.float32, "float32" and np.dtype("float32") alike
    if name not in DTYPES:
        raise Error(f"dtype {name!r} is not one that models compute in: choose {' or '.join(DTYPES)}")
    return np.dtype(name)


def _check_context(model: Module, context: int) -> None:
    if not is_integer(context) or not 1 <= context <= model.context:
        raise Error(f"context is {context!r}: this model takes 1 to {model.context} tokens")


# ------------------------------------------------------------------------------- parameters


class Row(NamedTuple):
    """The parameters of all modules of that name, such as ``h.*.ln_1``; ``shape`` is that of one."""

    name: str
    shape: str
    copies: int
    number: int  # of all copies together


def parameter_table(model: Module) -> list[Row]:
    """What a model's parameters are, module by module; the numbers sum to ``model.num_parameters()``.

    Alike modules of several blocks are one row. A tied parameter belongs to the module where it stands first.
    """
    shapes, sizes, numbers = defaultdict(dict), defaultdict(Counter), Counter()
    for name, parameter in model.named_parameters():
        module, _, own = re.sub(r"\.\d+\b", ".*", name).rpartition(".")
        shapes[module][own] = " x ".join(map(str, parameter.shape))
        sizes[module][own] += 1
        numbers[module] += parameter.size
    return [
        Row(module, " + ".join(own.values()), max(sizes[module].values()), numbers[module])
        for module, own in shapes.items()
    ]


# ----------------------------------------------------------------------------------- memory

LONG = 4096  # tokens: beyond, every figure grows in proportion, and is not measured


class Memory(NamedTuple):
    """Bytes."""

    weights: int
    gradients: int  # of all parameters that require one, as the backward pass leaves them
    optimizer: int  # AdamW's m and v
    activations: int  # alive after the forward pass: what the tape holds, and the gradients the loss has made
    forward: int  # the peaks of a training step's phases, with all of the above that is there then
    backward: int
    update: int
    inference: int  # peak of a forward pass for the next token, weights included
    cache: int  # keys and values of all positions

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward, self.update)


def memory(model: Module, batch: int, context: int, dtype="float32", optimizer: bool = True) -> Memory:
    """The memory of a training step on ``batch`` x ``context`` tokens, and of inference, in bytes.

    Counted are the arrays of a step of this very model, forward, loss and backward, without their elements,
    from the second step on (AdamW's m and v are there, unless ``optimizer`` is false), with one thread's
    scratch. Python, its libraries and BLAS come on top. Of a context above 4,096 two shorter ones are
    counted, and the rest is a straight line. ``dtype`` is float32 or float64. Raises Error for a
    context that the model does not take, a batch below 1 or another dtype.
    """
    dtype = _dtype(dtype)
    _check_context(model, context)
    if not is_integer(batch) or batch < 1:
        raise Error(f"batch is {batch!r}: it must be a whole number of at least 1")
    weights = dtype.itemsize * model.num_parameters()
    gradients = dtype.itemsize * sum(p.size for p in model.parameters() if p.requires_grad)
    moments = 2 * gradients if optimizer else 0
    scratch = dtype.itemsize * min(BLOCK, max(p.size for p in model.parameters()))  # of AdamW
    found = _count(model, batch, min(context, LONG), dtype)
    if context > LONG:
        half = _count(model, batch, LONG // 2, dtype)
        found = found + (found - half) * (context - LONG) // (LONG // 2)
    activations, forward, backward, inference, cache = map(int, found)
    return Memory(
        weights,
        gradients,
        moments,
        activations,
        forward=forward + moments,
        backward=backward + moments,
        update=weights + gradients + moments + scratch,
        inference=inference,
        cache=cache,
    )


def _count(model: Module, batch: int, context: int, dtype: np.dtype) -> np.ndarray:
    """Activations, the peaks of forward, backward and inference, and a cache, all without elements."""
    model = _without_elements(model, dtype)
    ids, weights = np.zeros((batch, context), np.int64), Tally.restart()
    with first_task_only():
        loss = model.loss(ids, ids)
        activations, forward = Tally.held - weights, Tally.peak
        Tally.restart()
        if loss.requires_grad:
            loss.backward()
        backward = Tally.peak
        model.zero_grad()
        del loss
        with evaluating(model), no_grad():
            Tally.restart()
            model(ids, last_only=True)
            inference = Tally.peak
    held = Tally.restart()
    cache = model.new_cache(batch, context)
    found = [activations, forward, backward, inference, Tally.held - held]
    del cache  # not before it was counted
    return np.array(found, object)


def _without_elements(model: Module, dtype: np.dtype) -> Module:
    """A copy in training mode, whose parameters are meta arrays of ``dtype``."""
    parameters = {
        id(p): Tensor(MetaArray(p.shape, dtype), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, parameters).train()


# ------------------------------------------------------------------------------- arithmetic


class Flops(NamedTuple):
    """Floating-point operations per token in matrix products: 2 m n k for (m, k) @ (k, n)."""

    linears: float  # forward, all layers but the last
    head: float  # forward, the output layer
    attention: float  # forward, Q Kᵀ and P V of the blocks that are computed
    attention_textbook: float  # the same two products of every query with every key

    @property
    def forward(self) -> float:
        return self.linears + self.head + self.attention

    @property
    def backward(self) -> float:
        """dX and dW for every Y = X Wᵀ; for attention S again, and from it dV, dP, dQ and dK."""
        return 2 * (self.linears + self.head) + 5 / 2 * self.attention

    @property
    def training(self) -> float:
        return self.forward + self.backward

    @property
    def textbook(self) -> float:
        """Of training as papers count it: no scores skipped and none computed twice.

        Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B: 6 per weight and 12 L H Q T.
        """
        return 3 * (self.linears + self.head + self.attention_textbook)


def _matrix_elements(model: Module) -> int:
    """How many weights every position is multiplied with: those of all linear layers, the output's too."""
    return sum(module.weight.size for _, module in model.named_modules() if isinstance(module, Linear))


def flops_per_token(model: Module, context: int) -> Flops:
    """The matrix products of this implementation, per token of a sequence of ``context`` tokens.

    Counted are those of linear layers, by the elements of their weights, and of every attention in a forward
    pass. Elementwise work is left out. Causal attention skips the keys behind each block of queries, about
    half of the scores in a long sequence, and computes scores again in the backward pass. ``head`` is the
    output layer at every position, as in training; in decoding it runs at the last one only.
    Raises Error for a context that the model does not take.
    """
    _check_context(model, context)
    head = _matrix_elements(model.lm_head)
    attention, textbook = 0, 0
    for query, key, value in _attentions(model):
        heads, per_score = query[1], 2 * (query[3] + value[3])  # a product with K and one with V
        step, scores = max(1, QUERY_BLOCK * key[1] // heads), 0
        for start in range(0, context, step):
            stop = min(start + step, context)
            scores += (stop - start) * stop
        attention += heads * per_score * scores / context
        textbook += heads * per_score * context
    return Flops(2 * (_matrix_elements(model) - head), 2 * head, attention, textbook)


def _attentions(model: Module) -> list[tuple]:
    """The shapes of query, key and value of every attention in a forward pass on one token."""
    found = []

    def watch(out, parents):
        if who_called()[0] == "scaled_dot_product_attention":
            found.append(tuple(parent.shape for parent in parents))

    with watching(watch), first_task_only():
        _without_elements(model, np.dtype(np.float32))(np.zeros((1, 1), np.int64))
    return found


# ----------------------------------------------------------------------- what this machine does

GEMM_SIZE = 1536  # rows and columns: larger ones were not faster

MATRIX = (8192, 4096)  # in float32, 134 MB: no cache holds it


def gemm_rate(dtype=np.float32, seconds: float = 0.5) -> float:
    """FLOP/s of a large square matrix product on all our threads: the best of those made in ``seconds``."""
    dtype = _dtype(dtype)
    a = np.random.default_rng(0).standard_normal((GEMM_SIZE, GEMM_SIZE), np.float32).astype(dtype)
    out = np.empty_like(a)
    return 2 * GEMM_SIZE**3 / _best_time(lambda: matmul(a, a, out=out), seconds)


def memory_rate(dtype=np.float32, seconds: float = 0.5) -> float:
    """Bytes/s at which a large matrix is read for its product with a vector: the best of ``seconds``."""
    w = np.ones(MATRIX, _dtype(dtype))
    x = np.ones((MATRIX[1], 1), w.dtype)
    return w.nbytes / _best_time(lambda: matmul(w, x), seconds)


def _best_time(work, seconds: float) -> float:
    """The shortest time of ``work()``, run once to warm up and then for ``seconds``, three times at least."""
    work()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


# --------------------------------------------------------------------------------- the page


def describe(model: Module, batch: int, context: int, dtype="float32") -> str:
    """A page for the terminal: parameters, memory, arithmetic, and this machine's rates, measured now.

    The measurements take about a second. Raises Error as ``memory`` does.
    """
    dtype = _dtype(dtype)
    costs, flops = memory(model, batch, context, dtype), flops_per_token(model, context)
    threads = num_threads()
    lines = [
        f"{type(model).__name__}: {model.num_parameters():,} parameters",
        "",
        *_parameter_lines(parameter_table(model)),
        "",
        f"Memory of a training step of {batch} x {context} tokens in {dtype} (k, M, G: 10^3, 10^6, 10^9)",
        *_memory_lines(costs),
        "",
        f"Arithmetic per token in sequences of {context}: 2 m n k for every product (m, k) @ (k, n)",
        *_arithmetic_lines(flops),
        "",
        f"This machine, measured now ({threads} thread{'s' * (threads > 1)}), and what it could do at best",
        *_machine_lines(model, flops, dtype),
    ]
    return "\n".join(lines)


def _parameter_lines(rows: list[Row]) -> list[str]:
    cells, total = [("layer", "shape", "parameters", "share")], sum(row.number for row in rows)
    for row in rows:
        shape = f"{row.copies} of {row.shape}" if row.copies > 1 else row.shape
        cells.append((row.name, shape, f"{row.number:,}", f"{row.number / total:.1%}"))
    wide = [max(len(line[column]) for line in cells) for column in range(4)]
    return [
        f"  {name:{wide[0]}}  {shape:{wide[1]}}  {number:>{wide[2]}}  {share:>6}"
        for name, shape, number, share in cells
    ]


def _memory_lines(costs: Memory) -> list[str]:
    phases = {phase: getattr(costs, phase) for phase in ("forward", "backward", "update")}
    said = ", ".join(f"{phase} {_amount(size, 'B')}" for phase, size in phases.items())
    return [
        _line("weights", costs.weights, "B", "the parameters"),
        _line("gradients", costs.gradients, "B", "one for each; complete when the backward pass ends"),
        _line("AdamW", costs.optimizer, "B", "two running averages for each, m and v"),
        _line("activations", costs.activations, "B", "what the forward pass keeps for the backward pass"),
        _line("peak", costs.peak, "B", f"the most at one time; {said}"),
        "Memory of inference on the same tokens",
        _line("peak", costs.inference, "B", "a forward pass for the next token, without a cache"),
        _line("KV cache", costs.cache, "B", "keys and values of every position, if they are kept"),
    ]


def _arithmetic_lines(flops: Flops) -> list[str]:
    textbook = _amount(flops.textbook, "FLOP")
    return [
        _line("linears", flops.linears, "FLOP", "forward: every weight is multiplied and added once"),
        _line("head", flops.head, "FLOP", "forward: a score for every entry of the vocabulary"),
        _line("attention", flops.attention, "FLOP", "forward: keys in the future are skipped, by blocks"),
        _line(
            "backward", flops.backward, "FLOP", "2 products for 1 of linears and head, 5 for 2 of attention"
        ),
        _line(
            "training", flops.training, "FLOP", f"all of it; {textbook} with no key skipped, no score redone"
        ),
    ]


def _machine_lines(model: Module, flops: Flops, dtype: np.dtype) -> list[str]:
    gemm, reading = gemm_rate(dtype), memory_rate(dtype)
    read = dtype.itemsize * _matrix_elements(model)
    each = _amount(read, "B")
    return [
        _line("products", gemm, "FLOP/s", f"{GEMM_SIZE} x {GEMM_SIZE} matrices, the best of several times"),
        _line("memory", reading, "B/s", "reading a large matrix for its product with a vector"),
        _tokens_line("training", gemm / flops.training, "if products took all the time"),
        _tokens_line("reading", gemm / (flops.forward - flops.head), "of a prompt of that length, likewise"),
        _tokens_line(
            "decoding", reading / read, f"one by one, with a cache: reading {each} of matrices for each"
        ),
    ]


def _tokens_line(label: str, rate: float, meaning: str) -> str:
    return f"  {label:11} {rate:8,.{0 if rate >= 100 else 1}f} tokens/s  {meaning}"


def _line(label: str, number: float, unit: str, meaning: str) -> str:
    return f"  {label:11} {_amount(number, unit):>17}  {meaning}"


def _amount(number: float, unit: str) -> str:
    """Three digits and the decimal prefix: 498 MB, 1.24 GFLOP."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5 or prefix == "T":
            break
        number /= 1000
    digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:,.{digits}f} {prefix}{unit}"

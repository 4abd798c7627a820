"""The cost of a model: parameters, memory, arithmetic, and an estimate of this machine's speed.

A model may be far larger than the machine (build it with ``rng=None``): it runs on arrays without elements
(``meta.py``). Only the rates at the end are measured with real arrays. ``memory.py`` counts the memory.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from tinyllm.backend.threads import first_task_only, matmul, num_threads
from tinyllm.functional.attention import QUERY_BLOCK, keys_of
from tinyllm.nn import Module, evaluating
from tinyllm.optim import AdamW, Muon
from tinyllm.tools.memory import LONG, Memory, check_context, dtype_of, memory
from tinyllm.tools.meta import meta_copy
from tinyllm.tools.profile import op_and_module, watching

# ------------------------------------------------------------------------------- parameters


class Row(NamedTuple):
    """The parameters of all modules with one name, such as ``h.*.ln_1``; ``shape`` is that of one module."""

    name: str
    shape: str
    copies: int
    number: int  # of elements in all copies


def parameter_table(model: Module) -> list[Row]:
    """A model's parameters by module; the numbers sum to ``model.num_parameters()``.

    The same module of several blocks is one row. A tied parameter counts for the first module that has it.
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


# ------------------------------------------------------------------------------- arithmetic


class Flops(NamedTuple):
    """Floating-point operations per token in matrix products: 2 m n k for (m, k) @ (k, n)."""

    linears: float  # forward, all linear layers but the head
    head: float  # forward, the output layer
    attention: float  # forward, Q Kᵀ and P V, without the blocks of keys that are skipped
    attention_textbook: float  # the same two products for every query and every key

    @property
    def forward(self) -> float:
        return self.linears + self.head + self.attention

    @property
    def backward(self) -> float:
        """dX and dW for every Y = X Wᵀ; in attention S (recomputed), dV, dP, dQ and dK."""
        return 2 * (self.linears + self.head) + 5 / 2 * self.attention

    @property
    def training(self) -> float:
        return self.forward + self.backward

    @property
    def textbook(self) -> float:
        """Training FLOPs as papers count them: no scores skipped, none recomputed.

        Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B: 6 per weight and 12 L H Q T.
        """
        return 3 * (self.linears + self.head + self.attention_textbook)


class _Products(NamedTuple):
    """What a forward pass computes: products of linear layers, of the head among them, and attentions."""

    linears: list[tuple[int, int, int]]  # (m, k, n) of (m, k) @ (k, n)
    head: list[tuple[int, int, int]]
    attentions: list[tuple]  # the shapes of query, key and value, and the window
    used: int  # elements of all parameters that took part

    def weights(self) -> int:
        """The elements of all matrices of the linear layers and the head."""
        return sum(k * n for _, k, n in self.linears + self.head)


def _products(model: Module, positions: int = 1) -> _Products:
    """Of a forward pass on this many independent positions; those of a mixture use all experts alike."""
    linears, in_head, attentions, used, model = [], [], [], set(), meta_copy(model, np.dtype(np.float32))
    blocks, head = zip(getattr(model, model.blocks), model.windows()), set(map(id, model.lm_head.modules()))
    windows = {id(module): window for block, window in blocks for module in block.modules()}

    def watch(out, parents):
        op, module = op_and_module()
        used.update(map(id, parents))
        if op == "scaled_dot_product_attention":
            shapes = (parent.shape for parent in parents[:3])  # the fourth is the bias
            attentions.append((*shapes, windows.get(id(module))))
        elif op == "linear":
            x, weight = parents[:2]
            shapes = in_head if id(module) in head else linears
            shapes.append((x.size // x.shape[-1], *weight.shape[::-1]))

    with watching(watch), first_task_only(), evaluating(model):  # dropout has no products, but takes time
        model(np.zeros((positions, 1), np.int64))
    return _Products(linears, in_head, attentions, sum(p.size for p in model.parameters() if id(p) in used))


def flops_per_token(model: Module, context: int) -> Flops:
    """The matrix products of this implementation, per token of a sequence of ``context`` tokens.

    Includes linear layers (of a mixture's experts those that a token uses) and attention, but no elementwise
    operations. Causal attention skips the keys after each block of queries, about half of the scores in a
    long sequence, and those before its window, and recomputes the scores in the backward pass (unless
    there are few: ``backend.memory.is_kept``). ``head`` is the output layer at every position, as in
    training; decoding needs it at the last position only. Raises Error for a context outside the model's.
    """
    check_context(model, context)
    return _flops(_products(model), context)


def _flops(products: _Products, context: int) -> Flops:
    attention = textbook = 0
    for query, key, value, window in products.attentions:
        heads, per_score = query[1], 2 * (query[3] + value[3])  # Q Kᵀ, and P V
        step, scores = max(1, QUERY_BLOCK * key[1] // heads), 0
        for start in range(0, context, step):
            rows = slice(start, min(start + step, context))
            keys = keys_of(rows, context, context, True, window)
            scores += (rows.stop - rows.start) * (keys.stop - keys.start)
        attention += heads * per_score * scores / context
        textbook += heads * per_score * context
    linears, head = (sum(2 * m * k * n for m, k, n in each) for each in products[:2])
    return Flops(linears, head, attention, textbook)


# -------------------------------------------------------------------------- speed of this machine

LARGE = 1024  # rows or columns; larger matrices are measured in part, at about the same rate

MATRIX = (8192, 4096)  # in float32, 134 MB: larger than any cache


def product_shapes(model: Module, tokens: int) -> Counter:
    """(m, k, n) of every product (m, k) @ (k, n) of a training step in linear layers -> how often.

    For Y = X Wᵀ with ``tokens`` rows these are Y itself, dX = dY W and dW = dYᵀ X. Sizes above LARGE are
    replaced by LARGE: the rate is about the same.
    """
    shapes, products = Counter(), _products(model, min(tokens, 4 * LONG))
    for m, k, n in products.linears + products.head:
        for shape in ((m, k, n), (m, n, k), (n, m, k)):
            shapes[tuple(min(size, LARGE) for size in shape)] += 1
    return shapes


def gemm_rate(shapes: Counter, dtype=np.float32, seconds: float = 0.03) -> float:
    """FLOP/s of matrix products of these ``shapes``, in total, from the best time of each in ``seconds``."""
    dtype, flops, duration = dtype_of(dtype), 0, 0.0
    for (m, k, n), count in shapes.items():
        a, b, out = np.ones((m, k), dtype), np.ones((k, n), dtype), np.empty((m, n), dtype)
        flops += count * 2 * m * k * n
        duration += count * _best_time(lambda: matmul(a, b, out=out), seconds)  # noqa: B023
    return flops / duration


def memory_rate(dtype=np.float32, seconds: float = 0.5) -> float:
    """Bytes/s at which a large matrix is read in a product with a vector: the best in ``seconds``."""
    w = np.ones(MATRIX, dtype_of(dtype))
    x = np.ones((MATRIX[1], 1), w.dtype)
    return w.nbytes / _best_time(lambda: matmul(w, x), seconds)


def _best_time(work, seconds: float) -> float:
    """The shortest time of ``work()``, after one warm-up, in ``seconds`` and at least three runs."""
    work()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


# ----------------------------------------------------------------------------------- the report


def describe(model: Module, batch: int, context: int, dtype="float32", optimizer=AdamW) -> str:
    """A report for the terminal: parameters, memory, arithmetic, and estimates of this machine's speed.

    The measurements take a second or two. Raises Error as ``memory`` does.
    """
    dtype = dtype_of(dtype)
    costs, products = memory(model, batch, context, dtype, optimizer), _products(model)
    number, flops = model.num_parameters(), _flops(products, context)
    active = f", of which a token uses {products.used:,}" if products.used < number else ""
    lines = [
        f"{type(model).__name__}: {number:,} parameters{active}",
        "",
        *_parameter_lines(parameter_table(model)),
        "",
        f"Memory of a training step, {batch} x {context} tokens, {dtype} (k, M, G: 10^3, 10^6, 10^9)",
        *_memory_lines(costs, optimizer),
        "",
        f"Arithmetic per token, sequences of {context} tokens: 2 m k n for a product (m, k) @ (k, n)",
        *_arithmetic_lines(flops),
        "",
        *_machine_lines(product_shapes(model, batch * context), products.weights(), flops, dtype),
    ]
    return "\n".join(lines)


def _parameter_lines(rows: list[Row]) -> list[str]:
    cells, total = [("layer", "shape", "parameters", "share")], sum(row.number for row in rows)
    for row in rows:
        shape = f"{row.copies} of {row.shape}" if row.copies > 1 else row.shape
        cells.append((row.name, shape, f"{row.number:,}", f"{row.number / total:.1%}"))
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return [
        f"  {name:{widths[0]}}  {shape:{widths[1]}} {number:>{widths[2]}}  {share:>6}"
        for name, shape, number, share in cells
    ]


AVERAGES = {
    AdamW: "two running averages per parameter, m and v",
    Muon: "one running average per hidden matrix, two per other parameter",
}


def _memory_lines(costs: Memory, optimizer: type[AdamW]) -> list[str]:
    phases = (f"{name} {_amount(getattr(costs, name), 'B')}" for name in ("forward", "backward", "update"))
    return [
        _line("weights", costs.weights, "B", "all parameters"),
        _line("gradients", costs.gradients, "B", "one per parameter, after the backward pass"),
        _line(optimizer.__name__, costs.optimizer, "B", AVERAGES[optimizer]),
        _line("activations", costs.activations, "B", "kept by the forward pass for the backward pass"),
        _line("peak", costs.peak, "B", ", ".join(phases)),
        "Memory of inference on the same tokens",
        _line("peak", costs.inference, "B", "one forward pass without a cache"),
        _line("KV cache", costs.cache, "B", "keys and values of all positions"),
    ]


def _arithmetic_lines(flops: Flops) -> list[str]:
    textbook = _amount(flops.textbook, "FLOP")
    return [
        _line("linears", flops.linears, "FLOP", "forward: one multiply-add per weight"),
        _line("head", flops.head, "FLOP", "forward: the logits, one per id of the vocabulary"),
        _line("attention", flops.attention, "FLOP", "forward: blocks of future keys are skipped"),
        _line("backward", flops.backward, "FLOP", "2 x linears and head, at most 5/2 x attention"),
        _line("training", flops.training, "FLOP", f"the total; {textbook} without skipping or recomputing"),
    ]


def _machine_lines(shapes: Counter, weights: int, flops: Flops, dtype: np.dtype) -> list[str]:
    gemm, bandwidth = gemm_rate(shapes, dtype), memory_rate(dtype)
    matrices, threads = dtype.itemsize * weights, num_threads()
    read = _amount(matrices, "B")
    return [
        f"This machine, measured now with {threads} thread{'s' * (threads > 1)}",
        _line("products", gemm, "FLOP/s", "matrix products of this model's shapes"),
        _line("memory", bandwidth, "B/s", "a large matrix, read once in a product with a vector"),
        "Estimates from these two rates",
        _tokens_line("training", gemm / flops.training, "if matrix products took all the time"),
        _tokens_line("prefill", gemm / (flops.forward - flops.head), "of a prompt, likewise"),
        _tokens_line("decoding", bandwidth / matrices, f"if reading {read} of weights took all the time"),
    ]


def _tokens_line(label: str, rate: float, meaning: str) -> str:
    return f"  {label:11} {rate:8,.{0 if rate >= 100 else 1}f} tokens/s  {meaning}"


def _line(label: str, number: float, unit: str, meaning: str) -> str:
    return f"  {label:11} {_amount(number, unit):>17}  {meaning}"


def _amount(number: float, unit: str) -> str:
    """Three significant digits with a decimal prefix: 498 MB, 1.24 GFLOP."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5 or prefix == "T":
            break
        number /= 1000
    digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:,.{digits}f} {prefix}{unit}"

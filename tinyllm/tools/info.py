"""What does a model cost: parameters, memory, arithmetic, and what could this machine deliver at best?

Nothing is allocated and nothing is computed: every figure follows from the config, so a model may be far
larger than the machine (build it with ``rng=None``). Only the two rates at the end are measured.

A training step's memory is followed op by op, as a diary: forward, where what the gradients will need
piles up, and back, where it goes again while the gradients of the parameters appear.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from tinyllm.backend.threads import BLOCK, matmul, num_threads
from tinyllm.checks import is_integer
from tinyllm.errors import Error
from tinyllm.functional.attention import QUERY_BLOCK, SCORES
from tinyllm.functional.losses import CHUNK, COLUMNS
from tinyllm.models import GPT2, GPT2Config, Llama, LlamaConfig
from tinyllm.nn import Linear, Module
from tinyllm.tensor import Tensor

Model = GPT2 | Llama | GPT2Config | LlamaConfig  # a config stands for a model without its weights

DTYPES = ("float32", "float64")  # what models compute in


def _model_of(model: Model) -> Module:
    """The model itself, or one of that config, of stand-ins that take no memory."""
    if isinstance(model, GPT2Config):
        return GPT2(model, rng=None)
    if isinstance(model, LlamaConfig):
        return Llama(model, rng=None)
    if not isinstance(model, (GPT2, Llama)):
        raise Error(
            f"the costs of {type(model).__name__} are not known here: give a GPT2 or a Llama, or a config"
        )
    return model


def _check_context(model: Module, context: int) -> None:
    if not is_integer(context) or not 1 <= context <= model.context:
        raise Error(f"context is {context!r}: this model takes 1 to {model.context} tokens")


def _dtype(dtype) -> np.dtype:
    name = getattr(dtype, "__name__", str(dtype))  # np.float32, "float32" and np.dtype("float32") alike
    if name not in DTYPES:
        raise Error(f"dtype {name!r} is none that models compute in: choose {' or '.join(DTYPES)}")
    return np.dtype(name)


# ------------------------------------------------------------------------------- parameters


class Row(NamedTuple):
    """A layer's parameters; ``number`` and ``share`` are those of all ``copies`` of it together."""

    name: str
    shape: str
    number: int
    share: float  # of the whole model
    copies: int = 1
    is_part: bool = False  # of the block above, whose number holds this one


def parameter_table(model: Model) -> list[Row]:
    """What a model's parameters are, layer by layer; the rows that are no parts sum to num_parameters().

    The blocks are alike: one row stands for all, and below it one for each part of a block. A tied
    output layer has the number 0: its matrix was counted where it stands first.
    """
    model = _model_of(model)
    total, counted, rows = model.num_parameters(), set(), []
    for name, value in vars(model).items():
        if isinstance(value, list):
            number = sum(block.num_parameters() for block in value)
            rows.append(Row(name, "", number, number / total, len(value)))
            for part, module in value[0].named_modules():
                rows += _rows_of(module, part, total, counted, copies=len(value), is_part=True)
        elif isinstance(value, Module):
            rows += _rows_of(value, name, total, counted)
    return rows


def _rows_of(module, name, total, counted, copies=1, is_part=False) -> list[Row]:
    """The one row of a module that has parameters of its own, or none; ``counted``: ids of earlier ones."""
    shapes, number = [], 0
    for parameter in vars(module).values():
        if isinstance(parameter, Tensor):
            tied = id(parameter) in counted
            shapes.append("tied" if tied else " x ".join(map(str, parameter.shape)))
            number += 0 if tied else copies * parameter.size
            counted.add(id(parameter))
    return [Row(name, " + ".join(shapes), number, number / total, copies, is_part)] if shapes else []


# ------------------------------------------------------------------- what an architecture does


class Op(NamedTuple):
    """One op as memory sees it, in elements. Its output counts where it is kept, else in ``forward``."""

    name: str
    keeps: int = 0  # what its closure holds until it has run backward
    weights: int = 0  # its parameters: when it has run backward, as many gradients are there
    gradients: int = 0  # the gradients of its inputs that it makes
    forward: int = 0  # there only while it runs forward, beside what is kept
    backward: int = 0  # there only while it runs backward, beside the gradients
    inference: int = 0  # there while it runs without gradients, beside the stream and the norm's output


class Part(NamedTuple):
    """Ops in the order of the forward pass."""

    name: str
    ops: list[Op]
    streams: int = 2  # arrays like the residual stream meanwhile: the norm's output, the block's input, …
    kept_streams: int = 0  # how many of them some op keeps anyway
    residual: bool = True  # its result is added to the stream, whose gradient passes beside it


class Plan(NamedTuple):
    """What the costs of a model depend on, beside its parameters."""

    layers: int
    channels: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    head_weights: int  # parameters whose gradients the loss makes: the output layer's, tied or not
    parts: list[Part]


def _plan(model: Module, batch: int, context: int, dtype: np.dtype) -> Plan:
    plan = _gpt2_plan if isinstance(model, GPT2) else _llama_plan
    return plan(model.config, batch, context, dtype)


def _gpt2_plan(config: GPT2Config, batch: int, context: int, dtype: np.dtype) -> Plan:
    """GPT-2. N = batch x context positions, C channels; a = N C is one residual stream.

    A block keeps 10 a for the backward pass: the two norms 2 a, q, k and v 3 a, attention's output a, and,
    4 C channels wide, what goes into GELU, 4 a. What norms and GELU put out is made again.
    """
    N, C, H = batch * context, config.n_embd, config.n_head
    inner = 4 * C if config.n_inner is None else config.n_inner
    a, i = N * C, N * inner
    norm = Op("norm", a + N, 2 * C, gradients=a, backward=a, inference=a)
    embedding = [
        # Added into place through a table of 64-bit positions.
        Op("embedding", weights=config.n_positions * C, backward=8 * a // dtype.itemsize),
        *_dropout(config.embd_pdrop, a),
    ]
    if not config.tie_word_embeddings:
        embedding[0] = embedding[0]._replace(weights=(config.n_positions + config.vocab_size) * C)
    attention = [
        norm._replace(name="ln_1"),
        Op(
            "c_attn",
            0,
            3 * C * (C + config.qkv_bias),
            gradients=a,
            forward=3 * a,
            backward=a,
            inference=3 * a,
        ),
        Op("split", gradients=3 * a),  # the gradients of q, k and v are put into one array
        _attention(batch, context, H, H, C // H, config.attn_pdrop),
        # Without gradients q, k and v are still there, because their names are in use.
        Op("attn.c_proj", 0, C * (C + 1), gradients=a, forward=a, inference=5 * a),
        *_dropout(config.resid_pdrop, a),
    ]
    block = num_threads() * min(BLOCK, i)  # of GELU's intermediates, in every thread
    mlp = [
        norm._replace(name="ln_2"),
        Op("c_fc", 0, inner * (C + 1), gradients=a, forward=i, backward=a, inference=i),
        Op("gelu", i, gradients=i, forward=i + 3 * block, backward=5 * block, inference=2 * i + 3 * block),
        Op("mlp.c_proj", 0, C * (inner + 1), gradients=i, forward=a + i, backward=i, inference=a + i),
        *_dropout(config.resid_pdrop, a),
    ]
    parts = [Part("embedding", embedding, streams=1, residual=False)]
    for number in range(config.n_layer):
        parts += [Part(f"block {number}", attention), Part(f"block {number}", mlp, streams=3)]
    parts.append(Part("the end", [norm._replace(name="ln_f")], residual=False))
    head_weights = config.vocab_size * (C + config.lm_head_bias)
    return Plan(config.n_layer, C, H, H, C // H, config.vocab_size, head_weights, parts)


def _llama_plan(config: LlamaConfig, batch: int, context: int, dtype: np.dtype) -> Plan:
    """Llama. a = N C, and q, k and f are the numbers of all queries, of all keys, and of an MLP's inside.

    A block keeps 2 a + 2 q + 2 k + 2 f: what goes into the norms 2 a, q, k and v, attention's output, the
    gate, and what it lets pass or not. What norms and gate put out is made again.
    """
    N, C, F = batch * context, config.hidden_size, config.intermediate_size
    H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    a, q, k, f = N * C, N * H * D, N * G * D, N * F
    # Backward, the gradients that were added up to the one that arrives are still there.
    norm = Op("norm", a + N, C, gradients=a, backward=2 * a)
    embedding_weights = 0 if config.tie_word_embeddings else config.vocab_size * C
    embedding = [
        Op("embed_tokens", weights=embedding_weights, backward=8 * a // dtype.itemsize),
        Op("rotation", keeps=context * D),  # cos and sin of every position, for all layers
    ]
    bias = config.attention_bias
    attention = [
        norm._replace(name="input_layernorm"),
        # All three give a gradient of their one input: two, and their sum, are there at a time.
        Op(
            "q_proj, k_proj, v_proj",
            weights=(C + bias) * (H + 2 * G) * D,
            gradients=a,
            forward=q + 2 * k,
            backward=2 * a,
            inference=q + 2 * k,
        ),
        Op("rope", gradients=q + 2 * k, forward=2 * q + 3 * k, inference=2 * q + 3 * k),
        _attention(batch, context, H, G, D, config.attention_dropout),
        Op("o_proj", 0, (H * D + bias) * C, gradients=q, forward=a, inference=a + 2 * q + 2 * k),
    ]
    blocks = num_threads() * min(BLOCK, f)  # SwiGLU's intermediates, a block in every thread
    mlp = [
        norm._replace(name="post_attention_layernorm"),
        Op(
            "gate_proj, up_proj",
            weights=2 * (C + config.mlp_bias) * F,
            gradients=a,
            forward=2 * f,
            backward=max(a, 2 * a - f),
            inference=2 * f,
        ),
        Op(
            "swiglu",
            keeps=2 * f,
            gradients=2 * f,
            forward=f + 2 * blocks,
            backward=3 * blocks,
            inference=3 * f + 2 * blocks,
        ),
        Op(
            "down_proj", 0, (F + config.mlp_bias) * C, gradients=f, forward=a + f, backward=f, inference=a + f
        ),
    ]
    parts = [Part("embedding", embedding, streams=1, residual=False)]
    for number in range(config.num_hidden_layers):
        name = f"block {number}"
        parts += [Part(name, attention, kept_streams=1), Part(name, mlp, streams=3, kept_streams=2)]
    parts.append(Part("the end", [norm._replace(name="norm", backward=0)], kept_streams=1, residual=False))
    vocabulary = config.vocab_size
    return Plan(config.num_hidden_layers, C, H, G, D, vocabulary, vocabulary * C, parts)


def _dropout(p: float, a: int) -> list[Op]:
    """Nothing is kept, the mask is drawn again; input, mask and output are there at the same time."""
    return [Op("dropout", gradients=a, forward=3 * a, backward=a)] if p else []


def _attention(batch: int, context: int, heads: int, kv_heads: int, head_size: int, dropout: float) -> Op:
    """It keeps q, k, v, its output and the log of each row's sum; of the scores it has few blocks at a time.

    These are the weights and their gradient, with dropout two masks, and one array of the block before.
    """
    N, step = batch * context, _query_block(heads, kv_heads)
    q, k = N * heads * head_size, N * kv_heads * head_size
    block = heads // kv_heads * min(context, step) * context
    together = min(kv_heads, max(1, SCORES // block))  # heads whose scores fit the cache
    scores = min(num_threads(), kv_heads) * together * block
    masks, before = 2 if dropout else 0, int(context > step)
    return Op(
        "attention",
        keeps=2 * q + 2 * k + N * heads,
        gradients=q + 2 * k,
        forward=(1 + max(masks, before)) * scores,
        backward=(2 + masks + before) * scores,
        inference=2 * q + 2 * k + N * heads + (1 + before) * scores,
    )


def _query_block(heads: int, kv_heads: int) -> int:
    """The queries attention takes at once: fewer where several heads share a key, and with it a product."""
    return max(1, QUERY_BLOCK // (heads // kv_heads))


# ----------------------------------------------------------------------------------- memory


class Memory(NamedTuple):
    """Bytes."""

    weights: int
    gradients: int  # of all parameters, as the backward pass leaves them
    optimizer: int  # AdamW's m and v
    activations: int  # what the forward pass keeps for the backward pass
    logits: int  # of one chunk
    peak: int  # of a training step
    peak_moment: str  # where in the step that is
    peak_parts: dict[str, int]  # and what is there then; the sum is ``peak``
    phases: dict[str, int]  # the peaks of its phases: forward (with the loss), backward, update
    inference: int  # peak of a forward pass for the next token, weights included
    cache: int  # keys and values of all positions: 2 x layers x key-value heads x head size x N


class _Diary:
    """What a step holds, by kind, in elements; when it held most, and the most in each phase."""

    def __init__(self, **held: int):
        self.held, self.peak, self.moment, self.parts, self.phases = held, 0, "", {}, {}

    def write(self, phase: str, where: str, temporary: int) -> None:
        total = sum(self.held.values()) + temporary
        self.phases[phase] = max(total, self.phases.get(phase, 0))
        if total > self.peak:
            self.peak, self.moment = total, f"{phase}, {where}"
            self.parts = self.held | {"temporary": temporary}


def memory(model: Model, batch: int, context: int, dtype="float32", optimizer: bool = True) -> Memory:
    """The memory of a training step on ``batch`` x ``context`` tokens, and of inference, in bytes.

    Training is forward, loss, backward and AdamW (without its m and v if ``optimizer`` is false), as the
    engine does them on a CPU, from the second step on. Arrays are counted; Python, its libraries and
    BLAS come on top. ``dtype`` is float32 or float64. Raises Error for a context that the model does not
    take, a batch below 1 or another dtype.
    """
    model, dtype = _model_of(model), _dtype(dtype)
    _check_context(model, context)
    if not is_integer(batch) or batch < 1:
        raise Error(f"batch is {batch!r}: it must be a whole number of at least 1")
    plan = _plan(model, batch, context, dtype)
    weights, size = model.num_parameters(), dtype.itemsize
    N, V, a = batch * context, plan.vocabulary, batch * context * plan.channels
    diary = _Diary(weights=weights, AdamW=2 * weights if optimizer else 0, gradients=0, activations=0)

    for part in plan.parts:
        for op in part.ops:
            diary.held["activations"] += op.keeps
            diary.write(
                "forward", f"{part.name}, {op.name}", (part.streams - part.kept_streams) * a + op.forward
            )
    activations = diary.held["activations"]

    # The loss makes its gradients at once: dx beside x, and dW, to which it adds block by block.
    logits = min(N, CHUNK) * V
    diary.held["gradients"] += plan.head_weights
    diary.write("forward", "loss", 2 * a + logits + min(num_threads() * COLUMNS, V) * plan.channels)

    for part in reversed(plan.parts):
        arriving, beside = (0, a) if part.residual else (a, 0)
        for op in reversed(part.ops):
            diary.held["gradients"] += op.weights
            temporary = beside + arriving + op.gradients + op.backward
            diary.write("backward", f"{part.name}, {op.name}", temporary)
            diary.held["activations"] -= op.keeps
            arriving = op.gradients
    largest = max(parameter.size for parameter in model.parameters())
    diary.write("update", "AdamW", min(largest, num_threads() * BLOCK))

    tables = sum(op.keeps for op in plan.parts[0].ops)  # what the embedding makes for all layers
    inference = max(part.streams * a + op.inference for part in plan.parts for op in part.ops)
    return Memory(
        weights=size * weights,
        gradients=size * diary.held["gradients"],
        optimizer=size * diary.held["AdamW"],
        activations=size * activations,
        logits=size * logits,
        peak=size * diary.peak,
        peak_moment=diary.moment,
        peak_parts={kind: size * number for kind, number in diary.parts.items()},
        phases={phase: size * number for phase, number in diary.phases.items()},
        inference=size * (weights + tables + max(inference, a + batch * V)),
        cache=size * 2 * plan.layers * plan.kv_heads * plan.head_size * N,
    )


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


def flops_per_token(model: Model, context: int) -> Flops:
    """The matrix products of this implementation, per token of a sequence of ``context`` tokens.

    Elementwise work is left out. Causal attention skips the keys behind each block of queries, about
    half of the scores in a long sequence, and computes scores again in the backward pass. ``head`` is
    the output layer at every position, as in training; to write text it runs at the last one only.
    Raises Error for a context that the model does not take.
    """
    model = _model_of(model)
    _check_context(model, context)
    plan = _plan(model, 1, context, np.dtype(np.float32))
    matrices = _matrix_elements(model)
    head = plan.vocabulary * plan.channels
    step, scores = _query_block(plan.heads, plan.kv_heads), 0  # scores of one head
    for start in range(0, context, step):
        stop = min(start + step, context)
        scores += (stop - start) * stop
    per_score = 2 * 2 * plan.layers * plan.heads * plan.head_size  # two products
    return Flops(2 * (matrices - head), 2 * head, per_score * scores / context, per_score * context)


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


def describe(model: Model, batch: int, context: int, dtype="float32") -> str:
    """A page for the terminal: parameters, memory, arithmetic, and this machine's rates, measured now.

    The measurements take about a second. Raises Error as ``memory`` does.
    """
    model, dtype = _model_of(model), _dtype(dtype)
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
    cells = [("layer", "shape", "parameters", "share")]
    for row in rows:
        shape = row.shape if row.shape else f"{row.copies} block{'s' * (row.copies > 1)} of"
        cells.append(("  " * row.is_part + row.name, shape, f"{row.number:,}", f"{row.share:.1%}"))
    wide = [max(len(line[column]) for line in cells) for column in range(4)]
    return [
        f"  {name:{wide[0]}}  {shape:{wide[1]}}  {number:>{wide[2]}}  {share:>6}"
        for name, shape, number, share in cells
    ]


def _memory_lines(costs: Memory) -> list[str]:
    there = " + ".join(f"{_amount(size, 'B')} {kind}" for kind, size in costs.peak_parts.items() if size)
    return [
        _line("weights", costs.weights, "B", "the parameters"),
        _line("gradients", costs.gradients, "B", "one for each; complete when the backward pass ends"),
        _line("AdamW", costs.optimizer, "B", "two running averages for each, m and v"),
        _line("activations", costs.activations, "B", "what the forward pass keeps for the backward pass"),
        _line("logits", costs.logits, "B", f"of {CHUNK} positions at a time"),
        _line("peak", costs.peak, "B", f"the most at one time; here in: {costs.peak_moment}"),
        f"{'':18}= {there}",
        "Memory of inference on the same tokens",
        _line(
            "peak", costs.inference, "B", "weights, and one forward pass for the next token, without a cache"
        ),
        _line(
            "KV cache", costs.cache, "B", "keys and values of every position, if they are kept for writing on"
        ),
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
            "writing", reading / read, f"one by one, with a cache: reading {each} of matrices for each"
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

"""Exercises on linear layers, embeddings, activations and LoRA."""

import math

import numpy as np
import torch
import torch.nn.functional as TF
from hypothesis import strategies as st

from parity.grade.exercise import Mistake, Part, arrays, exercise, gradients, sizes, value

# -------------------------------------------------------------------------------------- linear


@st.composite
def linear_inputs(draw, backward: bool):
    rows, c_in, c_out = draw(sizes()), draw(sizes()), draw(sizes())
    grad = {"grad": draw(arrays(rows, c_out))} if backward else {}
    x, weight, bias = draw(arrays(rows, c_in)), draw(arrays(c_out, c_in)), draw(arrays(c_out))
    return grad | {"x": x, "weight": weight, "bias": bias}


exercise(
    "linear",
    Part(
        "linear",
        ("y",),
        linear_inputs(backward=False),
        lambda x, weight, bias: value(TF.linear, x, weight, bias),
        (
            Mistake(
                "weight not transposed",
                "weight is (out, in), one row per output: multiply by its transpose, x @ weight.T.",
                lambda x, weight, bias: x @ weight + bias,
            ),
            Mistake(
                "no bias",
                "The bias does not affect your result: add it.",
                lambda x, weight, bias: x @ weight.T,
            ),
            Mistake(
                "bias subtracted",
                "The bias is added, not subtracted.",
                lambda x, weight, bias: x @ weight.T - bias,
            ),
        ),
    ),
    Part(
        "linear_gradient",
        ("dx", "dweight", "dbias"),
        linear_inputs(backward=True),
        lambda grad, x, weight, bias: gradients(TF.linear, grad, x, weight, bias),
        (
            Mistake(
                "dweight transposed",
                "dweight has the shape of weight, (out, in): grad.T @ x, not x.T @ grad.",
                lambda grad, x, weight, bias: (grad @ weight, x.T @ grad, grad.sum(0)),
            ),
            Mistake(
                "weight transposed in dx",
                "dx = grad @ weight: its transpose belongs to the forward pass.",
                lambda grad, x, weight, bias: (grad @ weight.T, grad.T @ x, grad.sum(0)),
            ),
            Mistake(
                "dbias is the mean",
                "Every row uses the bias: its gradient is the sum over the rows, not the mean.",
                lambda grad, x, weight, bias: (grad @ weight, grad.T @ x, grad.mean(0)),
            ),
            Mistake(
                "dbias over the wrong axis",
                "dbias has one element per output channel: sum over the rows, axis 0.",
                lambda grad, x, weight, bias: (grad @ weight, grad.T @ x, grad.sum(1)),
            ),
            Mistake(
                "dweight divided by the rows",
                "dweight is a sum over the rows: do not divide by their number.",
                lambda grad, x, weight, bias: (grad @ weight, grad.T @ x / len(x), grad.sum(0)),
            ),
        ),
    ),
)

# ----------------------------------------------------------------------------------- embedding


@st.composite
def embedding_inputs(draw, backward: bool):
    vocabulary, channels, count = draw(sizes()), draw(sizes()), draw(sizes())
    ids = np.array(draw(st.lists(st.integers(0, vocabulary - 1), min_size=count, max_size=count)))
    grad = {"grad": draw(arrays(count, channels))} if backward else {}
    return grad | {"ids": ids, "weight": draw(arrays(vocabulary, channels))}


def torch_embedding(ids):
    return lambda weight: TF.embedding(torch.tensor(ids), weight)


def scattered(grad, ids, weight):
    """Each row of the gradient overwrites the earlier ones of the same id."""
    dw = np.zeros_like(weight)
    dw[ids] = grad
    return dw


def averaged(grad, ids, weight):
    dw, count = np.zeros_like(weight), np.zeros(len(weight))
    np.add.at(dw, ids, grad)
    np.add.at(count, ids, 1)
    return dw / np.maximum(count, 1)[:, None]


exercise(
    "embedding",
    Part(
        "embedding",
        ("y",),
        embedding_inputs(backward=False),
        lambda ids, weight: value(torch_embedding(ids), weight),
        (
            Mistake(
                "a column",
                "weight is (vocabulary, channels): an id selects a row, not a column.",
                lambda ids, weight: weight.T[ids],
            ),
            Mistake(
                "columns side by side",
                "weight is (vocabulary, channels): an id selects a row, not a column.",
                lambda ids, weight: weight[:, ids],
            ),
            Mistake(
                "ids counted from 1",
                "Ids count from 0: id 0 is the first row.",
                lambda ids, weight: weight[ids - 1],
            ),
        ),
    ),
    Part(
        "embedding_gradient",
        ("dweight",),
        embedding_inputs(backward=True),
        lambda grad, ids, weight: gradients(torch_embedding(ids), grad, weight)[0],
        (
            Mistake(
                "repeated ids overwrite",
                "If an id occurs twice, its gradients add up: dweight[ids] += grad keeps only the last "
                "(use np.add.at, or a loop).",
                scattered,
            ),
            Mistake(
                "repeated ids averaged",
                "If an id occurs twice, its gradients add up: do not average them.",
                averaged,
            ),
        ),
    ),
)

# ------------------------------------------------------------------------------------ gelu

ROOT = math.sqrt(2 / math.pi)


@st.composite
def elementwise_inputs(draw, *names: str):
    shape = draw(sizes()), draw(sizes())
    return {name: draw(arrays(*shape)) for name in names}


def torch_gelu(x):
    return TF.gelu(x, approximate="tanh")


def gelu(x, root=ROOT, cubic=0.044715, half=0.5):
    return half * x * (1 + np.tanh(root * (x + cubic * x**3)))


def gelu_gradient(grad, x, inner=True, cubed=3.0, product=True):
    t = np.tanh(ROOT * (x + 0.044715 * x**3))
    slope = ROOT * (1 + cubed * 0.044715 * x**2) if inner else 1.0
    return grad * (0.5 * (1 + t) * product + 0.5 * x * (1 - t**2) * slope)


exercise(
    "gelu",
    Part(
        "gelu",
        ("y",),
        elementwise_inputs("x"),
        lambda x: value(torch_gelu, x),
        (
            Mistake(
                "the exact GELU",
                "That is the exact GELU, with the error function; GPT-2 uses the approximation with tanh.",
                lambda x: value(TF.gelu, x),
            ),
            Mistake(
                "the root",
                "The argument of tanh is multiplied by sqrt(2 / pi).",
                lambda x: gelu(x, root=1.0),
            ),
            Mistake(
                "2 / pi without the root",
                "The factor is sqrt(2 / pi), not 2 / pi.",
                lambda x: gelu(x, root=2 / math.pi),
            ),
            Mistake("no cubic term", "Add 0.044715 x³ to x inside tanh.", lambda x: gelu(x, cubic=0.0)),
            Mistake("no half", "Multiply by 1/2: GELU(x) approaches x, not 2x.", lambda x: gelu(x, half=1.0)),
        ),
    ),
    Part(
        "gelu_gradient",
        ("dx",),
        elementwise_inputs("grad", "x"),
        lambda grad, x: gradients(torch_gelu, grad, x)[0],
        (
            Mistake(
                "the inner derivative missing",
                "The chain rule: multiply by the slope of the argument, sqrt(2/pi) (1 + 3 · 0.044715 x²).",
                lambda grad, x: gelu_gradient(grad, x, inner=False),
            ),
            Mistake(
                "the 3 missing",
                "The derivative of x³ is 3x²: the factor 3 is missing.",
                lambda grad, x: gelu_gradient(grad, x, cubed=1.0),
            ),
            Mistake(
                "the product rule",
                "x is in both factors: the product rule also gives 1/2 (1 + tanh u).",
                lambda grad, x: gelu_gradient(grad, x, product=False),
            ),
            Mistake(
                "grad missing",
                "Multiply the slope by the incoming gradient.",
                lambda grad, x: gelu_gradient(1.0, x),
            ),
        ),
    ),
)

# ---------------------------------------------------------------------------------- swiglu


def torch_swiglu(gate, up):
    return TF.silu(gate) * up


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


exercise(
    "swiglu",
    Part(
        "swiglu",
        ("y",),
        elementwise_inputs("gate", "up"),
        lambda gate, up: value(torch_swiglu, gate, up),
        (
            Mistake(
                "gate and up exchanged",
                "SiLU is applied to gate, not to up.",
                lambda gate, up: gate * up * sigmoid(up),
            ),
            Mistake(
                "the sigmoid alone",
                "That is GLU, gated by the sigmoid: SiLU(a) is a σ(a).",
                lambda gate, up: sigmoid(gate) * up,
            ),
            Mistake("no up", "Multiply SiLU(gate) by up.", lambda gate, up: gate * sigmoid(gate)),
        ),
    ),
    Part(
        "swiglu_gradient",
        ("dgate", "dup"),
        elementwise_inputs("grad", "gate", "up"),
        lambda grad, gate, up: gradients(torch_swiglu, grad, gate, up),
        (
            Mistake(
                "the slope of the sigmoid alone",
                "SiLU(a) = a σ(a) is a product: its slope is σ(a) + a σ(a) (1 - σ(a)).",
                lambda grad, gate, up: (
                    grad * up * sigmoid(gate) * (1 - sigmoid(gate)), grad * gate * sigmoid(gate)
                ),
            ),
            Mistake(
                "sigmoid taken for a constant",
                "σ(a) depends on a, too: the term a σ(a) (1 - σ(a)) is missing in dgate.",
                lambda grad, gate, up: (grad * up * sigmoid(gate), grad * gate * sigmoid(gate)),
            ),
            Mistake(
                "dgate and dup exchanged",
                "Return dgate first, then dup.",
                lambda grad, gate, up: gradients(torch_swiglu, grad, gate, up)[::-1],
            ),
            Mistake(
                "up missing in dgate",
                "y is SiLU(gate) times up: dgate has the factor up.",
                lambda grad, gate, up: (
                    grad * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))), grad * gate * sigmoid(gate)
                ),
            ),
        ),
    ),
)  # fmt: skip

# ------------------------------------------------------------------------------------ lora


@st.composite
def lora_inputs(draw, backward: bool):
    rows, c_in, c_out, rank = draw(sizes()), draw(sizes()), draw(sizes()), draw(sizes())
    grad = {"grad": draw(arrays(rows, c_out))} if backward else {}
    given = {"x": draw(arrays(rows, c_in)), "weight": draw(arrays(c_out, c_in))}
    given |= {"A": draw(arrays(rank, c_in)), "B": draw(arrays(c_out, rank))}
    return grad | given | {"alpha": draw(st.sampled_from([1.0, 16.0]))}


def torch_lora(x, weight, A, B, alpha):
    return TF.linear(x, weight) + alpha / A.shape[0] * TF.linear(TF.linear(x, A), B)


def lora(x, weight, A, B, scale):
    return x @ weight.T + scale * (x @ A.T) @ B.T


def lora_gradient(grad, x, weight, A, B, scale, base=True):
    dx = scale * grad @ B @ A + (grad @ weight if base else 0.0)
    return dx, scale * (grad @ B).T @ x, scale * grad.T @ (x @ A.T)


exercise(
    "lora",
    Part(
        "lora",
        ("y",),
        lora_inputs(backward=False),
        lambda x, weight, A, B, alpha: value(lambda *t: torch_lora(*t, alpha), x, weight, A, B),
        (
            Mistake(
                "alpha instead of alpha / r",
                "The update is multiplied by alpha / r, where r is the number of rows of A.",
                lambda alpha, **given: lora(**given, scale=alpha),
            ),
            Mistake(
                "no scale",
                "alpha does not affect your result: multiply the update by alpha / r.",
                lambda alpha, **given: lora(**given, scale=1.0),
            ),
            Mistake(
                "the update alone",
                "Add the frozen layer's own output, x @ weight.T.",
                lambda x, weight, A, B, alpha: lora(x, weight * 0, A, B, alpha / len(A)),
            ),
            Mistake(
                "the whole output scaled",
                "Only the update is multiplied by alpha / r, not the frozen layer's output.",
                lambda x, weight, A, B, alpha: alpha / len(A) * lora(x, weight, A, B, 1.0),
            ),
            Mistake(
                "alpha / sqrt(r)",
                "That is the scale of rsLoRA; LoRA's is alpha / r.",
                lambda alpha, **given: lora(**given, scale=alpha / math.sqrt(len(given["A"]))),
            ),
        ),
    ),
    Part(
        "lora_gradient",
        ("dx", "dA", "dB"),
        lora_inputs(backward=True),
        lambda grad, x, weight, A, B, alpha: gradients(
            lambda x, A, B: torch_lora(x, torch.tensor(weight), A, B, alpha), grad, x, A, B
        ),
        (
            Mistake(
                "the frozen layer missing in dx",
                "The frozen weight has no gradient, but x passes through it: dx has the term grad @ weight.",
                lambda alpha, **given: lora_gradient(**given, scale=alpha / len(given["A"]), base=False),
            ),
            Mistake(
                "no scale",
                "The update is multiplied by alpha / r, and so are its gradients.",
                lambda alpha, **given: lora_gradient(**given, scale=1.0),
            ),
            Mistake(
                "alpha instead of alpha / r",
                "The update is multiplied by alpha / r, where r is the number of rows of A.",
                lambda alpha, **given: lora_gradient(**given, scale=alpha),
            ),
            Mistake(
                "dA and dB exchanged",
                "Return dx, dA, dB, in this order, of the shapes of x, A and B.",
                lambda alpha, **given: (lambda dx, dA, dB: (dx, dB, dA))(
                    *lora_gradient(**given, scale=alpha / len(given["A"]))
                ),
            ),
        ),
    ),
)

"""What makes a network more than one matrix, and scores into probabilities?"""

import math

import numpy as np

from tinyllm.backend.random import dropout_mask, next_address
from tinyllm.backend.threads import each_block
from tinyllm.errors import Error
from tinyllm.tensor import Tensor
from tinyllm.tensor_ops import as_rows

# GPT-2's GELU: 2u = LINEAR x + CUBIC x³
LINEAR = 2 * math.sqrt(2 / math.pi)

CUBIC = 0.044715 * LINEAR


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """GELU(x) = x Φ(x), Φ the standard normal's distribution function. Hendrycks, Gimpel: arXiv 1606.08415.

    ``approximate="tanh"`` is GPT-2's: Φ(x) ≈ ½ (1 + tanh u) with u = sqrt(2/π) (x + 0.044715 x³).
    ``"none"`` is exact, through erf: Φ(x) = ½ (1 + erf(x/√2)); it needs scipy.
    """
    check_gelu(approximate)
    if approximate == "tanh":
        return _elementwise(input, _gelu_tanh, _gelu_tanh_slope)
    return _elementwise(input, _gelu_erf, _gelu_erf_slope)


def check_gelu(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise Error(f"gelu: approximate must be 'none' or 'tanh', not {approximate!r}")


def _elementwise(input: Tensor, value, slope) -> Tensor:
    """y = f(x), block by block, with ``value(x)`` = f(x) and ``slope(x)`` = f'(x).

    Only x is kept. The backward pass computes the slope from it, and y again if somebody needs it there:
    that takes less time than two more arrays take memory.
    """
    x, shape = input.data.reshape(-1), input.shape

    def result():
        y = np.empty_like(x)

        def forward(block):
            y[block] = value(x[block])

        each_block(forward, x.size, 1, like=x)
        return y.reshape(shape)

    def vjp(grad):
        g, dx = grad.reshape(-1), np.empty_like(x)

        def backward(block):
            np.multiply(g[block], slope(x[block]), out=dx[block])

        each_block(backward, x.size, 1, like=x)
        return (dx.reshape(shape),)

    return Tensor.from_op(result(), (input,), vjp, recompute=result)


def _gelu_tanh(x):
    """½ (1 + tanh u) = σ(2u), so y = x σ(2u)."""
    return x * _sigmoid(x * (LINEAR + CUBIC * x * x))


def _gelu_tanh_slope(x):
    """dy/dx = s + x s (1 - s) 2u' with s = σ(2u)."""
    square = x * x
    s = _sigmoid(x * (LINEAR + CUBIC * square))
    return s + x * s * (1 - s) * (LINEAR + 3 * CUBIC * square)


def _normal_cdf(x):
    from scipy.special import erf  # here, not above: GPT-2 does not need it, and scipy is large

    return 0.5 * (1 + erf(x * math.sqrt(0.5)))


def _gelu_erf(x):
    return x * _normal_cdf(x)


def _gelu_erf_slope(x):
    """dy/dx = Φ(x) + x φ(x) with the normal density φ(x) = exp(-x²/2) / sqrt(2π)."""
    return _normal_cdf(x) + x * np.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def silu(input: Tensor) -> Tensor:
    """SiLU(x) = x σ(x) with σ(x) = 1 / (1 + exp(-x)); also called swish.

    dx = g (σ(x) + x σ(x) (1 - σ(x))). Hendrycks, Gimpel: arXiv 1606.08415, section 2.
    """
    return _elementwise(input, _silu, _silu_slope)


def _silu(x):
    return x * _sigmoid(x)


def _silu_slope(x):
    s = _sigmoid(x)
    return s + x * s * (1 - s)


def _sigmoid(x):
    with np.errstate(over="ignore"):  # exp(large) = inf gives 0, as it should
        return 1 / (1 + np.exp(-x))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(a) u for a = ``gate`` and u = ``up``, both (..., F): a decides how much of u passes.

    With g = dL/dy: da = g u silu'(a), du = g silu(a). Only a and u are kept, which exist anyway; the
    backward pass computes σ(a) again, and y: that takes less time than three more arrays take memory.

    Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, section 2.
    """
    check_swiglu(gate, up)
    a, u = as_rows(gate.data), as_rows(up.data)  # (N, F)
    shape = gate.shape

    def result():
        y = np.empty_like(a)

        def forward(rows):
            np.multiply(_silu(a[rows]), u[rows], out=y[rows])

        each_block(forward, *a.shape, like=a)
        return y.reshape(shape)

    def vjp(grad):
        g = as_rows(grad)  # (N, F)
        da, du = np.empty_like(a), np.empty_like(u)

        def backward(rows):
            s = _sigmoid(a[rows])
            silu_a = a[rows] * s
            np.multiply(g[rows], silu_a, out=du[rows])
            slope = s + silu_a * (1 - s)
            slope *= u[rows]
            np.multiply(g[rows], slope, out=da[rows])

        each_block(backward, *g.shape, like=g)
        return da.reshape(shape), du.reshape(shape)

    return Tensor.from_op(result(), (gate, up), vjp, recompute=result)


def check_swiglu(gate: Tensor, up: Tensor) -> None:
    if gate.ndim == 0 or gate.shape != up.shape:
        raise Error(f"swiglu takes gate and up of one shape (..., F), not {gate.shape} and {up.shape}")


def softmax(input: Tensor, dim: int = -1) -> Tensor:
    """p_i = exp(x_i - max x) / Σ_j exp(x_j - max x) along ``dim``; dx = p (g - Σ_j g_j p_j).

    Subtracting the maximum changes nothing but keeps exp from overflowing.
    """
    p = np.exp(input.data - input.data.max(axis=dim, keepdims=True))
    p /= p.sum(axis=dim, keepdims=True)
    return Tensor.from_op(p, (input,), lambda grad: (p * (grad - (grad * p).sum(axis=dim, keepdims=True)),))


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by 1/(1 - p); the mean stays.

    Not in training, or with p = 0, the input itself. The mask follows from ``tinyllm.manual_seed(seed,
    step, first_row)`` and is drawn again in the backward pass instead of being kept. Axis 0 of x is the row
    of the batch, and each row has bits of its own, so that a batch may be divided without changing what is
    dropped. ``p`` counts in steps of 1/65536. Srivastava et al., "Dropout", JMLR 15 (2014).
    """
    if not 0 <= p < 1:
        raise Error(f"dropout probability must be at least 0 and below 1, not {p}")
    if not training or p == 0:
        return input
    address, shape, x = next_address(), input.shape, input.data
    out = x * dropout_mask(address, shape, p, like=x)
    return Tensor.from_op(out, (input,), lambda grad: (grad * dropout_mask(address, shape, p, like=grad),))

"""What makes a network more than one matrix, and scores into probabilities?"""

import math

import numpy as np

from tinyllm.device import dropout_mask, each_block, next_address
from tinyllm.errors import Error
from tinyllm.tensor import Tensor, as_rows

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """GELU(x) = x Φ(x), Φ the standard normal's distribution function. Hendrycks, Gimpel: arXiv 1606.08415.

    ``approximate="tanh"`` is GPT-2's: Φ(x) ≈ ½ (1 + tanh u) with u = sqrt(2/π) (x + 0.044715 x³).
    ``"none"`` is exact, through erf: Φ(x) = ½ (1 + erf(x/√2)); it needs scipy.
    """
    if approximate == "tanh":
        return _elementwise(input, _gelu_tanh)
    if approximate == "none":
        return _elementwise(input, _gelu_erf)
    raise Error(f"gelu: approximate must be 'none' or 'tanh', not {approximate!r}")


def _elementwise(input: Tensor, function) -> Tensor:
    """y = f(x) with ``function(x) -> (f(x), f'(x))``, in blocks: x is in the cache for both.

    The derivative is formed in the forward pass and kept in x's place: the same memory, and the
    backward pass is one multiplication.
    """
    x = input.data.reshape(-1)
    y, slope = np.empty_like(x), np.empty_like(x) if input.wants_grad else None

    def forward(block):
        y[block], slope_here = function(x[block])
        if slope is not None:
            slope[block] = slope_here

    each_block(forward, x.size, 1, like=x)
    shape = input.shape
    return Tensor.from_op(y.reshape(shape), (input,), lambda grad: (grad * slope.reshape(shape),))


def _gelu_tanh(x):
    """½ (1 + tanh u) = σ(2u), so y = x s with s = σ(2u), and dy/dx = s + x s (1 - s) 2u'."""
    square = x * x
    two_u = (2 * SQRT_2_OVER_PI) * x * (1 + 0.044715 * square)
    with np.errstate(over="ignore"):  # exp(large) = inf gives s = 0, as it should
        s = 1 / (1 + np.exp(-two_u))
    y = x * s
    two_du = (2 * SQRT_2_OVER_PI) * (1 + 3 * 0.044715 * square)
    return y, s + y * (1 - s) * two_du


def _gelu_erf(x):
    """y = x Φ(x), and dy/dx = Φ(x) + x φ(x) with the normal density φ(x) = exp(-x²/2) / sqrt(2π)."""
    from scipy.special import erf  # here, not above: GPT-2 does not need it, and scipy is large

    cdf = 0.5 * (1 + erf(x * math.sqrt(0.5)))
    return x * cdf, cdf + x * np.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def silu(input: Tensor) -> Tensor:
    """SiLU(x) = x σ(x) with σ(x) = 1 / (1 + exp(-x)); also called swish.

    dx = g (σ(x) + x σ(x) (1 - σ(x))). Hendrycks, Gimpel: arXiv 1606.08415, section 2.
    """
    return _elementwise(input, _silu)


def _silu(x):
    """y = x s with s = σ(x), and dy/dx = s + y (1 - s)."""
    s = _sigmoid(x)
    y = x * s
    return y, s + y * (1 - s)


def _sigmoid(x):
    with np.errstate(over="ignore"):  # exp(large) = inf gives 0, as it should
        return 1 / (1 + np.exp(-x))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(a) u for a = ``gate`` and u = ``up``, both (..., F): a decides how much of u passes.

    With g = dL/dy: da = g u silu'(a), du = g silu(a). Only a and u are kept, which exist anyway; the
    backward pass computes σ(a) again, which takes less time than two more arrays take memory.

    Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, section 2.
    """
    if gate.ndim == 0 or gate.shape != up.shape:
        raise Error(f"swiglu takes gate and up of one shape (..., F), not {gate.shape} and {up.shape}")
    a, u = as_rows(gate.data), as_rows(up.data)  # (N, F)
    y = np.empty_like(a)

    def forward(rows):
        s = _sigmoid(a[rows])
        s *= a[rows]
        np.multiply(s, u[rows], out=y[rows])

    each_block(forward, *a.shape, like=a)
    shape = gate.shape

    def vjp(grad):
        g = as_rows(grad)  # (N, F)
        da, du = np.empty_like(a), np.empty_like(u)

        def backward(rows):
            silu_a, slope = _silu(a[rows])
            np.multiply(g[rows], silu_a, out=du[rows])
            slope *= u[rows]
            np.multiply(g[rows], slope, out=da[rows])

        each_block(backward, *g.shape, like=g)
        return da.reshape(shape), du.reshape(shape)

    return Tensor.from_op(y.reshape(shape), (gate, up), vjp)


def softmax(input: Tensor, dim: int = -1) -> Tensor:
    """p_i = exp(x_i - max x) / Σ_j exp(x_j - max x) along ``dim``; dx = p (g - Σ_j g_j p_j).

    Subtracting the maximum changes nothing but keeps exp from overflowing.
    """
    p = np.exp(input.data - input.data.max(axis=dim, keepdims=True))
    p /= p.sum(axis=dim, keepdims=True)
    return Tensor.from_op(p, (input,), lambda grad: (p * (grad - (grad * p).sum(axis=dim, keepdims=True)),))


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by 1/(1 - p); the mean stays.

    Not in training, or with p = 0, the input itself. The mask follows from
    ``tinyllm.manual_seed(seed, step, micro_batch)`` and is drawn again in the backward pass instead of
    being kept; ``p`` counts in steps of 1/65536. Srivastava et al., "Dropout", JMLR 15 (2014).
    """
    if not 0 <= p < 1:
        raise Error(f"dropout probability must be at least 0 and below 1, not {p}")
    if not training or p == 0:
        return input
    address, shape, x = next_address(), input.shape, input.data
    out = x * dropout_mask(address, 0, shape, p, like=x)
    return Tensor.from_op(out, (input,), lambda grad: (grad * dropout_mask(address, 0, shape, p, like=grad),))

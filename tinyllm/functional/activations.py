"""What makes a network more than one matrix, and turns scores into probabilities?"""

import math

import numpy as np

from tinyllm.backend.memory import is_kept
from tinyllm.backend.random import dropout_mask, next_address
from tinyllm.backend.threads import each_block
from tinyllm.errors import Error
from tinyllm.tensor import Tensor
from tinyllm.tensor_ops import as_rows

# GPT-2's GELU: 2u = LINEAR x + CUBIC x³
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """y = x Φ(x), where Φ is the distribution function of the standard normal.

    ``approximate="none"`` is exact: Φ(x) = ½ (1 + erf(x/√2)) is the integral of the density
    φ(x) = exp(-x²/2) / sqrt(2π), so Φ' = φ, and the product rule gives dy/dx = Φ(x) + x φ(x).

    ``"tanh"`` is GPT-2's: Φ(x) ≈ ½ (1 + tanh u) with u = sqrt(2/π) (x + 0.044715 x³). As
    ½ (1 + tanh u) = exp(u) / (exp(u) + exp(-u)) = 1 / (1 + exp(-2u)) = σ(2u), this is y = x s with s = σ(2u).
    By σ' = σ (1 - σ), derived at ``silu``, and the chain rule,

        dy/dx = s + x s (1 - s) 2u',   2u' = 2 sqrt(2/π) (1 + 3 · 0.044715 x²).

    Either way dx = g dy/dx, element by element. Hendrycks and Gimpel, arXiv 1606.08415, section 2.
    """
    check_gelu(approximate)
    if approximate == "tanh":
        return _elementwise(input, _gelu_tanh, _gelu_tanh_and_slope)
    return _elementwise(input, _gelu_erf, _gelu_erf_and_slope)


def check_gelu(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise Error(f"gelu: approximate must be 'none' or 'tanh', not {approximate!r}")


def _elementwise(input: Tensor, value, value_and_slope) -> Tensor:
    """y = f(x), block by block: ``value(x, y)`` writes f(x), ``value_and_slope(x, y, slope)`` also f'(x).

    Either the slope is computed with y and kept instead of x, or only x is kept, and the backward pass
    computes the slope from it, and y if a consumer needs it: see ``is_kept``.
    """
    x, shape = input.data.reshape(-1), input.shape
    if input.needs_grad and is_kept(shape, x):
        return _with_slope(input, value_and_slope)

    def result():
        y = np.empty_like(x)
        each_block(lambda block: value(x[block], y[block]), x.size, 1, like=x)
        return y.reshape(shape)

    def vjp(grad):
        g, dx = grad.reshape(-1), np.empty_like(x)

        def backward(block):
            value_and_slope(x[block], np.empty_like(x[block]), dx[block])
            dx[block] *= g[block]

        each_block(backward, x.size, 1, like=x)
        return (dx.reshape(shape),)

    return Tensor.from_op(result(), (input,), vjp, recompute=result)


def _with_slope(input: Tensor, value_and_slope) -> Tensor:
    """y = f(x), whose slope f'(x) is kept."""
    x, shape = input.data.reshape(-1), input.shape
    y, slope = np.empty_like(x), np.empty_like(x)
    each_block(lambda block: value_and_slope(x[block], y[block], slope[block]), x.size, 1, like=x)

    def vjp(grad):
        g, dx = grad.reshape(-1), np.empty_like(slope)
        each_block(lambda block: np.multiply(g[block], slope[block], out=dx[block]), g.size, 1, like=g)
        return (dx.reshape(shape),)

    return Tensor.from_op(y.reshape(shape), (input,), vjp)


# Values and slopes are computed in the arrays of the results: each further array is one more that must stay
# in the cache.


def _gelu_tanh(x, y):
    """x / (1 + exp(-2u))."""
    np.multiply(x, x, out=y)
    y *= -CUBIC
    y -= LINEAR
    y *= x
    _one_plus_exp(y)
    np.divide(x, y, out=y)


def _gelu_tanh_and_slope(x, y, slope):
    np.multiply(x, x, out=slope)
    slope *= -CUBIC
    s = slope - LINEAR
    s *= x
    _one_plus_exp(s)
    np.divide(x, s, out=y)  # as above: y is the same with and without a gradient
    np.divide(1, s, out=s)
    slope *= -3
    slope += LINEAR  # 2u'
    slope *= y
    slope *= 1 - s
    slope += s


def _normal_cdf(x):
    from scipy.special import erf  # imported on first use: it is slow, and GPT-2 does not need erf

    return 0.5 * (1 + erf(x * math.sqrt(0.5)))


def _gelu_erf(x, y):
    np.multiply(x, _normal_cdf(x), out=y)


def _gelu_erf_and_slope(x, y, slope):
    cdf = _normal_cdf(x)
    np.multiply(x, cdf, out=y)
    np.add(cdf, x * np.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi)), out=slope)


def relu(input: Tensor) -> Tensor:
    """y = max(x, 0). dy/dx is 1 for x > 0 and 0 for x < 0; at 0, where it does not exist, 0 is used."""
    return _elementwise(input, _relu, _relu_and_slope)


def _relu(x, y):
    np.maximum(x, 0, out=y)


def _relu_and_slope(x, y, slope):
    np.maximum(x, 0, out=y)
    np.greater(x, 0, out=slope)


def silu(input: Tensor) -> Tensor:
    """y = x s with s = σ(x) = 1 / (1 + exp(-x)); also called swish.

    σ'(x) = exp(-x) / (1 + exp(-x))² = s (1 - s), because 1 - s = exp(-x) / (1 + exp(-x)). The product rule
    gives silu'(x) = s + x s (1 - s), and dx = g silu'(x). Hendrycks and Gimpel, arXiv 1606.08415, section 2.
    """
    return _elementwise(input, _silu, _silu_and_slope)


def _silu(x, y):
    """x / (1 + exp(-x))."""
    np.negative(x, out=y)
    _one_plus_exp(y)
    np.divide(x, y, out=y)


def _silu_and_slope(x, y, slope):
    s = -x
    _one_plus_exp(s)
    np.divide(x, s, out=y)
    np.divide(1, s, out=s)
    np.subtract(1, s, out=slope)
    slope *= y
    slope += s


def _one_plus_exp(y):
    """y becomes 1 + exp(y), which may be inf: divided by it, a number is 0, the right limit."""
    with np.errstate(over="ignore"):
        np.exp(y, out=y)
    y += 1


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(a) u for a = ``gate`` and u = ``up``, both (..., F).

    y_i depends on a_i and u_i alone: ∂y/∂a = silu'(a) u and ∂y/∂u = silu(a), element by element. With
    g = dL/dy, s = σ(a) and silu'(a) = s + a s (1 - s) = s + silu(a) (1 - s), as derived at ``silu``:

        da = g u (s + silu(a) (1 - s)),   du = g silu(a).

    Only a and u are kept, which exist anyway. Recomputing s, and y if a consumer needs it, costs little time
    and saves three arrays as large as a.

    Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, section 2.
    """
    check_gated("swiglu", gate, up)
    return _gated(gate, up, _silu, _silu_and_slope)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = gelu(a) u for a = ``gate`` and u = ``up``, both (..., F), with the "tanh" form of ``gelu``.

    As for ``swiglu``, with g = dL/dy and the slope gelu'(a) that is derived at ``gelu``:

        da = g u gelu'(a),   du = g gelu(a).

    Shazeer, arXiv 2002.05202, section 2.
    """
    check_gated("geglu", gate, up)
    return _gated(gate, up, _gelu_tanh, _gelu_tanh_and_slope)


def _gated(gate: Tensor, up: Tensor, value, value_and_slope) -> Tensor:
    """y = f(a) u, block by block, with ``value`` and ``value_and_slope`` as in ``_elementwise``."""
    a, u = as_rows(gate.data), as_rows(up.data)  # (N, F)
    shape = gate.shape

    def result():
        y = np.empty_like(a)

        def forward(rows):
            value(a[rows], y[rows])
            y[rows] *= u[rows]

        each_block(forward, *a.shape, like=a)
        return y.reshape(shape)

    def vjp(grad):
        g = as_rows(grad)  # (N, F)
        da, du = np.empty_like(a), np.empty_like(u)

        def backward(rows):
            value_and_slope(a[rows], du[rows], da[rows])
            du[rows] *= g[rows]
            da[rows] *= u[rows]
            da[rows] *= g[rows]

        each_block(backward, *g.shape, like=g)
        return da.reshape(shape), du.reshape(shape)

    return Tensor.from_op(result(), (gate, up), vjp, recompute=result)


def check_gated(op: str, gate: Tensor, up: Tensor) -> None:
    if gate.ndim == 0 or gate.shape != up.shape:
        raise Error(f"{op} needs gate and up of the same shape (..., F), not {gate.shape} and {up.shape}")


def softcap(input: Tensor, cap: float) -> Tensor:
    """y = c tanh(x / c) with c = ``cap``: close to x for |x| well below c, and never beyond ±c.

    As tanh' = 1 - tanh², dy/dx = 1 - tanh²(x / c) = 1 - (y / c)², and dx = g (1 - (y / c)²). Gemma 2 caps
    attention scores at 50 and logits at 30, so that no single one can grow without bound: Gemma team,
    "Gemma 2" (arXiv 2408.00118), section 2. Raises ``Error`` unless c is positive.
    """
    c = check_softcap(cap)

    def value(x, y):
        np.tanh(x / c, out=y)
        y *= c

    def value_and_slope(x, y, slope):
        t = np.tanh(x / c)
        np.multiply(t, c, out=y)
        np.subtract(1, t * t, out=slope)

    return _elementwise(input, value, value_and_slope)


def check_softcap(cap: float) -> float:
    is_number = isinstance(cap, int | float | np.integer | np.floating) and not isinstance(cap, bool)
    if not (is_number and 0 < cap < math.inf):
        raise Error(f"softcap is {cap!r}: choose a positive finite number")
    return float(cap)  # a NumPy float64 would turn float32 scores into float64


def softmax(input: Tensor, dim: int = -1) -> Tensor:
    """p_i = exp(x_i) / Σ_j exp(x_j) along ``dim``.

    Subtracting max x from every x_i cancels in the fraction and keeps exp from overflowing. With
    e_i = exp(x_i), Z = Σ_j e_j, and δ_ik = 1 if i = k, else 0, the quotient rule gives

        ∂p_i/∂x_k = δ_ik e_i/Z - e_i e_k/Z² = p_i (δ_ik - p_k),

    and the chain rule with g = dL/dp

        dx_k = Σ_i g_i p_i (δ_ik - p_k) = p_k (g_k - Σ_i g_i p_i).
    """
    x = input.data
    p = np.exp(x - (x.max(axis=dim, keepdims=True) if x.size else 0))
    p /= p.sum(axis=dim, keepdims=True)
    return Tensor.from_op(p, (input,), lambda grad: (p * (grad - (grad * p).sum(axis=dim, keepdims=True)),))


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """y = x m, where each m_i is 0 with probability ``p``, else 1/(1 - p).

    The mean of m_i is p · 0 + (1 - p)/(1 - p) = 1, so y has the mean x. ∂y_i/∂x_k = δ_ik m_i, and dx = g m
    with the same mask m; for p = 1 both are 0. Without ``training``, or with p = 0, the result is the input.

    The mask is a function of ``tinyllm.manual_seed(seed, step, first_row)``: the backward pass generates it
    again instead of keeping it, and an op that needs y there computes y again. Axis 0 of x is the row of the
    batch, and each row has random bits of its own, so that splitting a batch does not change which elements
    are dropped. The p that is used is rounded to a multiple of 2^-16, near 0 and 1 of 2^-32, where elements
    are dropped and where they are scaled. Srivastava et al., "Dropout", JMLR 15 (2014).
    """
    check_probability(p)
    if not training or p == 0:
        return input
    address, shape, saved = next_address(), input.shape, input.saved()

    def masked(x):
        return x * dropout_mask(address, shape, p, like=x)

    def result():
        return masked(saved())

    return Tensor.from_op(masked(input.data), (input,), lambda grad: (masked(grad),), recompute=result)


def check_probability(p: float) -> None:
    if not (isinstance(p, int | float | np.number) and 0 <= p <= 1):
        raise Error(f"dropout probability must be between 0 and 1, not {p!r}")

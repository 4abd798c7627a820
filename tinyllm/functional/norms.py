"""Why does a deep network stay trainable? Every layer gets inputs of the same mean and size."""

import math

import numpy as np

from tinyllm.backend.threads import each_block, in_order, sum_last_axis
from tinyllm.errors import Error
from tinyllm.tensor import Tensor


def layer_norm(
    input: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = x̂ w + b with x̂ = (x - μ) / s over the last axis of x (..., C).

    ``normalized_shape`` is C, or the shape of several last axes, which are normalised as one of C elements.
    μ = mean(x) and s = sqrt(var(x) + eps), with the biased variance var(x) = mean((x - μ)²). Per row, with
    δ_ik = 1 if i = k, else 0,

        ∂μ/∂x_k = 1/C,   ∂var/∂x_k = (2/C) Σ_i (x_i - μ)(δ_ik - 1/C) = (2/C)(x_k - μ),

    because the deviations x_i - μ sum to 0; hence ∂s/∂x_k = (x_k - μ)/(C s) = x̂_k/C. The quotient rule gives

        ∂x̂_i/∂x_k = (δ_ik - 1/C)/s - (x_i - μ)/s² · x̂_k/C = (δ_ik - 1/C - x̂_i x̂_k/C) / s.

    With g = dL/dy, d = dL/dx̂ = g w, and dx_k = Σ_i d_i ∂x̂_i/∂x_k:

        dx = (d - mean(d) - x̂ mean(d x̂)) / s,   dw = Σ_rows g x̂,   db = Σ_rows g.

    Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450, section 3.
    """
    own = check_norm("layer_norm", normalized_shape, input, weight, bias)
    x = input.data.reshape(-1, math.prod(own))  # (N, C)
    w, b = (None if t is None else t.data.reshape(-1) for t in (weight, bias))
    needs_dw, needs_db = (t is not None and t.requires_grad for t in (weight, bias))
    x_hat, y, shape = np.empty_like(x), np.empty_like(x), input.shape
    inv_std = np.empty((len(x), 1), x.dtype, like=x)

    def scaled(y, rows):
        np.multiply(x_hat[rows], 1 if w is None else w, out=y[rows])
        if b is not None:
            y[rows] += b

    def forward(rows):
        centred = np.subtract(x[rows], sum_last_axis(x[rows]) / x.shape[1], out=x_hat[rows])
        np.divide(1, np.sqrt(_row_dot(centred, centred) / x.shape[1] + eps), out=inv_std[rows])
        centred *= inv_std[rows]
        scaled(y, rows)

    each_block(forward, *x.shape, like=x)

    def result():
        y = np.empty_like(x_hat)
        each_block(lambda rows: scaled(y, rows), *y.shape, like=y)
        return y.reshape(shape)

    def vjp(grad):
        g, dx = grad.reshape(x_hat.shape), np.empty_like(x_hat)
        dw_parts, db_parts = {}, {}  # first row of a block -> its share of the sum over rows

        def backward(rows):
            d, xh = np.multiply(g[rows], 1 if w is None else w, out=dx[rows]), x_hat[rows]
            mean_dx = _row_dot(d, xh) / d.shape[1]
            d -= sum_last_axis(d) / d.shape[1]
            d -= xh * mean_dx
            d *= inv_std[rows]
            if needs_dw:
                dw_parts[rows.start] = np.einsum("nc,nc->c", g[rows], xh)
            if needs_db:
                db_parts[rows.start] = g[rows].sum(axis=0)

        each_block(backward, *g.shape, like=g)
        dw = in_order(dw_parts).reshape(own) if needs_dw else None
        db = in_order(db_parts).reshape(own) if needs_db else None
        return dx.reshape(shape), dw, db

    return Tensor.from_op(y.reshape(shape), (input, weight, bias), vjp, recompute=result)


def rms_norm(
    input: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    """y = x̂ w with x̂ = x / r, r = sqrt(mean(x²) + eps), over the last axis of x (..., C).

    LayerNorm without the mean and the bias. ``eps=None`` means the dtype's machine epsilon, as in torch.
    ``offset`` is added to the weight: with 1, as in Gemma, w is ``weight`` + 1, and a weight of 0 leaves x̂
    as it is. Per row ∂r/∂x_k = x_k/(C r) = x̂_k/C, and the quotient rule gives, with δ_ik as in
    ``layer_norm``,

        ∂x̂_i/∂x_k = δ_ik/r - x_i/r² · x̂_k/C = (δ_ik - x̂_i x̂_k/C) / r.

    With g = dL/dy, d = dL/dx̂ = g w, and dx_k = Σ_i d_i ∂x̂_i/∂x_k:

        dx = (d - x̂ mean(d x̂)) / r,   dw = Σ_rows g x̂.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, section 3.
    """
    own = check_norm("rms_norm", normalized_shape, input, weight)
    eps = float(np.finfo(input.dtype).eps) if eps is None else eps
    x = input.data.reshape(-1, math.prod(own))  # (N, C)
    w = None if weight is None else weight.data.reshape(-1)
    w = w + offset if offset and w is not None else w
    needs_dw = weight is not None and weight.requires_grad
    inv_rms, shape = np.empty((len(x), 1), x.dtype, like=x), input.shape

    def scaled(y, rows):
        np.multiply(x[rows], inv_rms[rows], out=y[rows])
        if w is not None:
            y[rows] *= w

    def result():
        y = np.empty_like(x)
        each_block(lambda rows: scaled(y, rows), *x.shape, like=x)
        return y.reshape(shape)

    y = np.empty_like(x)

    def forward(rows):
        np.divide(1, np.sqrt(_row_dot(x[rows], x[rows]) / x.shape[1] + eps), out=inv_rms[rows])
        scaled(y, rows)

    each_block(forward, *x.shape, like=x)

    def vjp(grad):  # x̂ is recomputed from x, which costs one pass and saves an array as large as x
        g, dx = grad.reshape(x.shape), np.empty_like(x)
        dw_parts = {}  # first row of a block -> its Σ_rows g x̂

        def backward(rows):
            x_hat, d = x[rows] * inv_rms[rows], np.multiply(g[rows], 1 if w is None else w, out=dx[rows])
            if needs_dw:
                dw_parts[rows.start] = np.einsum("nc,nc->c", g[rows], x_hat)
            x_hat *= _row_dot(d, x_hat) / x.shape[1]
            d -= x_hat
            d *= inv_rms[rows]

        each_block(backward, *g.shape, like=g)
        return dx.reshape(shape), in_order(dw_parts).reshape(own) if needs_dw else None

    return Tensor.from_op(y.reshape(shape), (input, weight), vjp, recompute=result)


def _row_dot(a, b):
    """Σ_c a_nc b_nc as a column (N, 1), without the array of products."""
    return np.einsum("nc,nc->n", a, b)[:, None]


def check_norm(op, normalized_shape, input, *parameters) -> tuple:
    """Raise Error unless the shapes fit together; return ``normalized_shape`` as a tuple."""
    is_number = isinstance(normalized_shape, int | np.integer)
    shape = (normalized_shape,) if is_number else tuple(normalized_shape)
    given = [parameter.shape for parameter in parameters if parameter is not None]
    if not math.prod(shape) or shape != input.shape[-len(shape) :] or any(other != shape for other in given):
        raise Error(
            f"{op} over the last axes {shape} needs an input that ends with them, not {input.shape}, "
            f"and a weight and bias of that shape, not {given}"
        )
    return shape

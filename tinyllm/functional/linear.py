"""How does a matrix act on every position, and how does a token id become a vector?"""

import numpy as np

from tinyllm.backend.threads import matmul, sum_rows
from tinyllm.checks import check_ids
from tinyllm.errors import Error
from tinyllm.tensor import Tensor
from tinyllm.tensor_ops import At, array_of, as_rows, to_memory_of


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b for x (..., C_in), W (C_out, C_in), b (C_out,) -> (..., C_out).

    Stack all positions into N rows: y_no = Σ_i x_ni W_oi + b_o. With δ_nm = 1 if n = m, else 0,

        ∂y_no/∂x_mi = δ_nm W_oi,   ∂y_no/∂W_pi = δ_op x_ni,   ∂y_no/∂b_p = δ_op,

    and the chain rule with g = dL/dy sums over n and o:

        dx_ni = Σ_o g_no W_oi,   dW_oi = Σ_n g_no x_ni,   db_o = Σ_n g_no,

    which is dx = g W, dW = gᵀ x, db = Σ_rows g.
    """
    check_linear(input, weight, bias)
    x, w = as_rows(input.data), weight.data  # (N, C_in): one large product, not one per batch element
    lead = input.shape[:-1]
    y = matmul(x, w.T, bias=None if bias is None else bias.data)
    needs = [input.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad]
    saved = input.saved() if needs[1] else None  # for dW: a frozen layer does not keep x

    def vjp(grad):
        grad = as_rows(grad)  # (N, C_out)
        # dW first: if x was recomputed for it, x is freed before dx is allocated.
        dw = matmul(grad.T, as_rows(saved())) if needs[1] else None
        dx = matmul(grad, w).reshape(*lead, w.shape[1]) if needs[0] else None
        db = sum_rows(grad) if needs[2] else None
        return dx, dw, db

    return Tensor.from_op(y.reshape(*lead, w.shape[0]), (input, weight, bias), vjp)


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    fits = input.ndim > 0 and weight.ndim == 2 and input.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        added = "" if bias is None else f" and a bias of shape {bias.shape} (out,)"
        raise Error(
            f"linear: input {input.shape} does not fit a weight of shape {weight.shape} (out, in){added}"
        )


def embedding(input, weight: Tensor) -> Tensor:
    """y_n = W[input_n], a row of W (V, C) for every integer id: (...) -> (..., C).

    ∂y_nc/∂W_vc is 1 where v = input_n, else 0: dW_v is the sum of g_n over the n with input_n = v.
    Ids outside 0..V-1 raise Error (NumPy would wrap -1 around to the last row).
    """
    ids = array_of(input)
    if isinstance(ids, np.ndarray) or type(ids) is not type(weight.data):  # a list, a number …
        ids = to_memory_of(check_ids(ids, weight.shape[0]), weight.data)
    return Tensor.from_op(weight.data[ids], (weight,), lambda grad: (At(ids, grad),))

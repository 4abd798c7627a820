"""How does a matrix act on every position, and how does a token id become a vector?"""

import numpy as np

from tinyllm.backend.cuda.launch import on_gpu
from tinyllm.backend.device import beside
from tinyllm.backend.dtypes import wide
from tinyllm.backend.threads import matmul
from tinyllm.checks import check_ids
from tinyllm.errors import Error
from tinyllm.functional import cuda as gpu
from tinyllm.tensor import At, Tensor, as_rows


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, dtype=None) -> Tensor:
    """y = x Wᵀ + b for x (..., C_in), W (C_out, C_in), b (C_out,) -> (..., C_out).

    With g = dL/dy and all positions stacked into rows: dx = g W, dW = gᵀ x, db = Σ_rows g. On a GPU the
    product is computed in the input's type, and y written in ``dtype`` (the input's unless given).
    """
    if input.ndim == 0 or weight.ndim != 2 or input.shape[-1] != weight.shape[1]:
        raise Error(
            f"linear: input of shape {input.shape} does not fit a weight of shape {weight.shape} (out, in)"
        )
    if on_gpu(input, weight, bias):
        return gpu.linear(input, weight, bias, dtype)
    if dtype is not None and dtype != input.dtype:
        raise Error(f"linear of {input.dtype} is written as {np.dtype(dtype)} on a GPU only: leave dtype out")
    x, w = as_rows(input.data), weight.data  # (N, C_in): one large product, not one per batch element
    lead = input.shape[:-1]
    y = matmul(x, w.T, bias=None if bias is None else bias.data)
    remembered = input.remembered()  # for dW
    needs = [input.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad]

    def vjp(grad):
        grad = as_rows(grad)  # (N, C_out)
        # dW first: what was made again for it is forgotten before there is a dx.
        dw = matmul(grad.T, as_rows(remembered())) if needs[1] else None
        dx = matmul(grad, w).reshape(*lead, w.shape[1]) if needs[0] else None
        db = grad.sum(axis=0) if needs[2] else None
        return dx, dw, db

    return Tensor.from_op(y.reshape(*lead, w.shape[0]), (input, weight, bias), vjp)


def embedding(input, weight: Tensor) -> Tensor:
    """Row ``input[i]`` of W (V, C) for every integer id: (...) -> (..., C).

    dW is zero except in the rows that were looked up; a row looked up twice gets both gradients.
    Ids outside 0..V-1 raise Error (NumPy would take -1 for the last row), if they come from the host: to look
    at those on a GPU would mean to wait for it. Rows of a table in a short type come out in float32.
    """
    on_gpu(weight)  # refuses a short type on a CPU
    ids = input if not isinstance(input, (list, tuple)) else np.asarray(input)
    if isinstance(ids, np.ndarray):
        ids = beside(check_ids(ids, weight.shape[0]), weight.data)
    dtype = weight.dtype
    rows = weight.data[ids].astype(wide(dtype), copy=False)
    return Tensor.from_op(rows, (weight,), lambda grad: (At(ids, grad.astype(dtype, copy=False)),))

"""The fused ops on a GPU.

The formulas are derived in the other files of this folder; here each pass over memory is one kernel
(``kernels.cu``) and each product a call of cuBLAS. ``functional/__init__.py`` calls the op of the same name
here, or in ``cuda_losses.py``, if the arrays are CuPy's.

Mixed precision: the residual stream is float32 or float64. A norm reads it and returns the dtype of the
products that follow (``autocast``'s, or the dtype in which the weights are stored). A product converts its
weight to that dtype, returns it and accumulates in float32; added to the stream, its result is promoted to
float32. Softmax, losses and all sums are computed in float32, whatever the dtype of their input.
Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.
"""

import math

import numpy as np

from tinyllm.backend.cuda.launch import (
    contiguous,
    dropout_kept,
    elementwise,
    gemm,
    launch,
    sums_over_rows,
    threads_for,
)
from tinyllm.backend.dtypes import accumulation_dtype, compute_dtype, tf32_allowed
from tinyllm.backend.random import next_address, rounded
from tinyllm.functional import activations
from tinyllm.functional.attention import (
    check_attention,
    check_window,
    keys_of,
    learned_bias,
    of_one_head,
    part_number,
)
from tinyllm.functional.linear import check_linear
from tinyllm.functional.linear import embedding as rows_of
from tinyllm.functional.norms import check_norm
from tinyllm.functional.rope import check_rope
from tinyllm.tensor import Tensor
from tinyllm.tensor_ops import as_rows

QUERY_BLOCK = 128  # rows of scores per dropout mask, as in attention.py
SCORES = 2**26  # elements of one block of queries


def for_products(array):
    """An operand of a product, in the dtype that ``autocast`` sets."""
    dtype = compute_dtype()
    return array if dtype is None else array.astype(dtype, copy=False)


def _required(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    check_linear(input, weight, bias)
    x, lead = for_products(as_rows(input.data)), input.shape[:-1]  # (N, C_in)
    w, tf32 = weight.data.astype(x.dtype, copy=False), tf32_allowed()
    y = gemm(x, w.T, dtype=x.dtype if bias is None else accumulation_dtype(x.dtype), tf32=tf32)
    if bias is not None:  # added before the sum is rounded
        sums, b, y = y, contiguous(bias.data), y if y.dtype == x.dtype else np.empty_like(y, x.dtype)
        elementwise(y, "add_row", (sums.dtype, b.dtype, y.dtype), y.size, sums, b, y, y.size, y.shape[1])
    input_dtype, weight_dtype = input.dtype, weight.dtype
    bias_dtype = None if bias is None else bias.dtype
    needs = [_required(tensor) for tensor in (input, weight, bias)]
    saved = input.saved() if needs[1] else None

    def vjp(grad):
        g = contiguous(as_rows(grad)).astype(w.dtype, copy=False)  # (N, C_out)
        dx = dw = db = None
        if needs[1]:  # first: if x was recomputed for dW, x is freed before dx is allocated
            x = as_rows(saved()).astype(w.dtype, copy=False)
            dw = gemm(g.T, x, dtype=accumulation_dtype(w.dtype), tf32=tf32).astype(weight_dtype, copy=False)
        if needs[0]:
            dx = gemm(g, w, tf32=tf32).astype(input_dtype, copy=False).reshape(*lead, w.shape[1])
        if needs[2]:
            _, db = sums_over_rows(g, bias_dtype)
        return dx, dw, db

    return Tensor.from_op(y.reshape(*lead, w.shape[0]), (input, weight, bias), vjp)


def embedding(input, weight: Tensor) -> Tensor:
    """Rows of a half-precision table are converted to float32: they start the residual stream."""
    rows = rows_of(input, weight)
    return rows.astype(accumulation_dtype(weight.dtype))


def layer_norm(
    input: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    own = check_norm("layer_norm", normalized_shape, input, weight, bias)
    return _norm(input, own, weight, bias, eps, centred=True)


def rms_norm(
    input: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    own = check_norm("rms_norm", normalized_shape, input, weight)
    eps = float(np.finfo(accumulation_dtype(input.dtype)).eps) if eps is None else eps
    return _norm(input, own, weight, None, eps, centred=False, offset=float(offset))


def _norm(
    input: Tensor, own: tuple, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool,
    offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """Of the residual stream, the result has the dtype of the products that follow: ``autocast``'s.

    Of a product's result, which is in that dtype already, it has the weight's: in a Gemma it is added to the
    residual stream, and to round it once more would make the gradients 1.7 times as inaccurate as torch's.
    """
    x, shape = contiguous(input.data.reshape(-1, math.prod(own))), input.shape  # (N, C)
    w, b = (None if tensor is None else contiguous(tensor.data.reshape(-1)) for tensor in (weight, bias))
    N, C = x.shape
    stored = x.dtype if w is None else w.dtype
    halved = compute_dtype() if x.dtype == stored else None
    types = (centred, x.dtype, stored, halved or stored)
    inv = np.empty(N, accumulation_dtype(x.dtype), like=x)
    mean = np.empty_like(inv) if centred else None
    needs = [_required(weight), _required(bias)]

    def result():
        y = np.empty((N, C), types[3], like=x)
        launch(x, "norm", types, N, threads_for(C), x, w, b, y, mean, inv, C, eps, offset)
        return y.reshape(shape)

    def vjp(grad):
        g, dx = contiguous(grad.reshape(x.shape)), np.empty_like(x)
        launch(x, "norm_back", types, N, threads_for(C), x, w, mean, inv, g, dx, C, offset)
        dw = db = None
        if any(needs):
            dw, db = sums_over_rows(g, stored, x, mean, inv, centred)
        dw, db = (d.reshape(own) if need else None for d, need in zip((dw, db), needs))
        return dx.reshape(shape), dw, db

    return Tensor.from_op(result(), (input, weight, bias), vjp, recompute=result)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    activations.check_gelu(approximate)
    x, types = contiguous(input.data), (approximate == "tanh", input.dtype)

    def result():
        y = np.empty_like(x)
        elementwise(x, "gelu", types, x.size, x, y, x.size)
        return y

    def vjp(grad):
        dx = np.empty_like(x)
        elementwise(x, "gelu_back", types, x.size, x, contiguous(grad), dx, x.size)
        return (dx,)

    return Tensor.from_op(result(), (input,), vjp, recompute=result)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    activations.check_gated("swiglu", gate, up)
    return _gated(gate, up, with_gelu=False)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    activations.check_gated("geglu", gate, up)
    return _gated(gate, up, with_gelu=True)


def _gated(gate: Tensor, up: Tensor, with_gelu: bool) -> Tensor:
    a, u = contiguous(gate.data), contiguous(up.data)
    types = (with_gelu, a.dtype)

    def result():
        y = np.empty_like(a)
        elementwise(a, "gated", types, a.size, a, u, y, a.size)
        return y

    def vjp(grad):
        da, du = np.empty_like(a), np.empty_like(u)
        elementwise(a, "gated_back", types, a.size, a, u, contiguous(grad), da, du, a.size)
        return da, du

    return Tensor.from_op(result(), (gate, up), vjp, recompute=result)


def rope(input: Tensor, cos, sin) -> Tensor:
    check_rope(input, cos, sin, accumulation_dtype(input.dtype))
    rotated = _rotate(input.data, cos, sin, 1.0)
    return Tensor.from_op(rotated, (input,), lambda grad: (_rotate(grad, cos, sin, -1.0),))


def _rotate(x, cos, sin, sign: float):
    """rope of x (B, H, T, D), or its gradient with ``sign`` -1; the result is contiguous."""
    B, H, T, D = x.shape
    if x.strides[3] != x.itemsize:
        x = np.ascontiguousarray(x, like=x)
    y = np.empty(x.shape, x.dtype, like=x)
    strides = [stride // x.itemsize for stride in x.strides[:3]]
    cos_stride = T * D // 2 if cos.ndim == 4 else 0  # each row has positions of its own
    cos, sin = contiguous(cos), contiguous(sin)
    pairs = B * H * T * D // 2
    elementwise(x, "rope", (x.dtype,), pairs, x, *strides, cos, sin, cos_stride, y, pairs, H, T, D // 2, sign)
    return y


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask=None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """A block of queries at a time, over the whole batch and all heads: never all (T, S) scores at once.

    The queries of a group of heads are stacked in one product, as in ``attention.py``.
    """
    if query.ndim == 3:
        options = attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap
        return of_one_head(scaled_dot_product_attention, query, key, value, *options)
    inputs, bias = (query, key, value), learned_bias(attn_mask)
    needs_bias = bias is not None
    attn_mask = check_attention(*(x.data for x in inputs), attn_mask, dropout_p, enable_gqa)
    q, k, v = (for_products(x.data) for x in inputs)
    check_window(window, is_causal, softcap)
    address, tf32 = next_address() if dropout_p else None, tf32_allowed()
    (B, H, T, D), (G, S), E = q.shape, k.shape[1:3], v.shape[3]
    R, sums_in = H // G if G else 1, accumulation_dtype(q.dtype)
    scale = 1 / math.sqrt(max(D, 1)) if scale is None else scale
    step = max(1, QUERY_BLOCK // R)  # of the dropout masks
    bits, threshold, keep_scale = rounded(dropout_p)
    if address is None:
        most = SCORES // max(1, B * H * S)
        step = max(step, most if window is None else min(most, window))
    k, v = k.reshape(B * G, S, D), v.reshape(B * G, S, E)
    q = q.reshape(B, G, R, T, D)
    mask = _Mask(attn_mask, (B, H, T, S), sums_in)
    new = np.zeros if is_causal and S < T else np.empty  # the first T - S queries have no visible key
    out = new((B, G, R, T, E), q.dtype, like=q)
    sums = new((B, H, T, 2), sums_in, like=q)  # the peak and the sum of every query

    def stacked(x, rows):  # (B, G, R, T, D) -> (B G, R rows, D)
        return np.ascontiguousarray(x[..., rows, :], like=x).reshape(B * G, -1, x.shape[-1])

    def blocks():
        for number, start in enumerate(range(0, T, step)):
            rows = slice(start, min(start + step, T))
            keys = keys_of(rows, T, S, is_causal, window)
            if keys.stop:
                yield number, rows, keys

    def scores_of(number, rows, keys):
        """Common to forward and backward: Q, Q Kᵀ · scale, and the last arguments of both kernels."""
        q_block = stacked(q, rows)
        scores = gemm(
            q_block, k[:, keys].swapaxes(1, 2), dtype=sums_in, alpha=scale, tf32=tf32
        )  # (B G, R rows, keys)
        kept, count, seen = None, rows.stop - rows.start, keys.stop - keys.start
        if address is not None:
            numbers = [part_number(address, H, head, -(-T // step), number) for head in range(B * H)]
            kept = dropout_kept(address, numbers, count * seen, bits, threshold, like=q)
        place = (H, T, S, rows.start, count, keys.start, seen, int(is_causal), window or 0, softcap or 0.0)
        return q_block, scores, (kept, keep_scale, *mask.arguments, *place)

    for number, rows, keys in blocks():
        _, scores, rest = scores_of(number, rows, keys)
        p = np.empty(scores.shape, q.dtype, like=q)
        count = B * H * (rows.stop - rows.start)
        launch(q, "attention", (q.dtype,), count, threads_for(scores.shape[2]), scores, p, sums, *rest)
        out[..., rows, :] = gemm(p, v[:, keys], tf32=tf32).reshape(B, G, R, -1, E)

    def vjp(grad):
        grad = contiguous(grad).reshape(out.shape)
        delta = np.empty((B, H, T), sums_in, like=q)
        launch(q, "row_dot", (q.dtype,), delta.size, threads_for(E), grad, out, delta, E)
        dq = new(q.shape, q.dtype, like=q)
        dk, dv = (np.zeros(x.shape, sums_in, like=q) for x in (k, v))
        dbias = np.zeros((B, G, R, T, S), bias.dtype, like=q) if needs_bias else None
        for number, rows, keys in blocks():
            q_block, scores, rest = scores_of(number, rows, keys)
            g = stacked(grad, rows)
            dp = gemm(g, v[:, keys].swapaxes(1, 2), dtype=sums_in, tf32=tf32)
            p, dz = (np.empty(scores.shape, q.dtype, like=q) for _ in range(2))
            ds = np.empty_like(dz) if needs_bias else None
            arrays = scores, dp, p, ds, dz, sums, delta
            count = B * H * (rows.stop - rows.start)
            launch(q, "attention_back", (q.dtype,), count, threads_for(scores.shape[2]), *arrays, *rest)
            if dbias is not None:
                dbias[..., rows, keys] = ds.reshape(B, G, R, -1, scores.shape[2])
            gemm(p.swapaxes(1, 2), g, out=dv[:, keys], beta=1, tf32=tf32)
            gemm(dz.swapaxes(1, 2), q_block, out=dk[:, keys], alpha=scale, beta=1, tf32=tf32)
            dq[..., rows, :] = gemm(dz, k[:, keys], alpha=scale, tf32=tf32).reshape(B, G, R, -1, D)
        grads = dq.reshape(B, H, T, D), dk.reshape(B, G, S, D), dv.reshape(B, G, S, E)
        grads = (d.astype(x.dtype, copy=False) for d, x in zip(grads, inputs))
        return *grads, None if dbias is None else dbias.reshape(B, H, T, S)

    return Tensor.from_op(out.reshape(B, H, T, E), (*inputs, bias), vjp)


class _Mask:
    """attn_mask as arguments of the kernels: a boolean array or one of numbers, and strides (B, H, T, S)."""

    def __init__(self, mask, shape, dtype):
        allowed = added = None
        strides = (0, 0, 0, 0)
        if mask is not None and mask.dtype == bool:
            mask = allowed = np.broadcast_to(mask, shape)
        elif mask is not None:
            mask = added = np.broadcast_to(mask.astype(dtype, copy=False), shape)
        if mask is not None:
            strides = (stride // mask.itemsize for stride in mask.strides)
        self.arguments = (allowed, added, *strides)

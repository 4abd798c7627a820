"""How do the fused ops run on a GPU?

The same formulas as in the files beside this one, where they are derived; here each pass over memory is one
kernel (``kernels.cu``) and each product cuBLAS's. Every op there that has a better way here has one branch at
its top that leads here.

The types flow with the data. The residual stream is float32, or float64. A norm reads it and writes
``dtype``, the type that products are to be in; a product reads that type and writes it, with the weight
converted to it, and adds up in float32; whoever adds to the stream converts back. Softmax, the loss and every
sum are computed in float32 whatever they read.
Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.
"""

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
from tinyllm.backend.dtypes import wide
from tinyllm.tensor import Tensor, as_rows

QUERY_BLOCK = 128  # rows of scores to a mask of dropout, as in attention.py

SCORES = 2**26  # of one block of queries

LOGITS = 2**27  # of one chunk of rows

ALIGNED = 64  # elements: tensor cores want rows of logits to begin at round addresses


def _data(tensor):
    """Its array, without gaps, as a kernel reads it; None for an input that was not given."""
    return None if tensor is None else contiguous(tensor.data)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, dtype=None) -> Tensor:
    """y = x Wᵀ + b, in ``dtype`` (the input's unless given); W is converted to the input's type."""
    x, lead = as_rows(input.data), input.shape[:-1]  # (N, C_in)
    w, b = weight.data.astype(x.dtype, copy=False), _data(bias)
    y = gemm(x, w.T, dtype=dtype)
    if b is not None:
        elementwise(y, "add_row", (y.dtype, b.dtype), y.size, y, b, y.size, y.shape[1])
    remembered, weight_dtype = input.remembered(), weight.dtype
    needs = [input.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad]

    def vjp(grad):
        g = contiguous(as_rows(grad)).astype(w.dtype, copy=False)  # (N, C_out)
        dx = dw = db = None
        if needs[1]:  # first: what was made again for it is forgotten before there is a dx
            dw = gemm(g.T, as_rows(remembered()), dtype=wide(w.dtype)).astype(weight_dtype, copy=False)
        if needs[0]:
            dx = gemm(g, w).reshape(*lead, w.shape[1])
        if needs[2]:
            _, db = sums_over_rows(g, b.dtype)
        return dx, dw, db

    return Tensor.from_op(y.reshape(*lead, w.shape[0]), (input, weight, bias), vjp)


def norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool, dtype=None
) -> Tensor:
    """layer_norm (``centred``) or rms_norm, written in ``dtype``: the input's unless given."""
    x, shape = contiguous(as_rows(input.data)), input.shape  # (N, C)
    (N, C), w, b = x.shape, _data(weight), _data(bias)
    dtype = np.dtype(dtype or x.dtype)
    types = (centred, x.dtype, x.dtype if w is None else w.dtype, dtype)
    inv = np.empty(N, wide(x.dtype), like=x)
    mean = np.empty_like(inv) if centred else None

    def result():
        y = np.empty((N, C), dtype, like=x)
        launch(x, "norm", types, N, threads_for(C), x, w, b, y, mean, inv, C, eps)
        return y.reshape(shape)

    def vjp(grad):
        g, dx = contiguous(as_rows(grad)), np.empty_like(x)
        launch(x, "norm_back", types, N, threads_for(C), x, w, mean, inv, g, dx, C)
        dw = db = None
        if w is not None:
            dw, db = sums_over_rows(g, w.dtype, x, mean, inv, centred)
        return dx.reshape(shape), dw, None if b is None else db

    return Tensor.from_op(result(), (input, weight, bias), vjp).with_again(result)


def gelu(input: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """GELU(x + b): the bias of the product before it is added where it is read."""
    x, shape, b = contiguous(input.data), input.shape, _data(bias)
    types, C = (tanh, x.dtype, x.dtype if b is None else b.dtype), shape[-1] if shape else 1

    def result():
        y = np.empty_like(x)
        elementwise(x, "gelu", types, x.size, x, b, y, x.size, C)
        return y

    def vjp(grad):
        dx = np.empty_like(x)
        elementwise(x, "gelu_back", types, x.size, x, b, contiguous(grad), dx, x.size, C)
        return dx, None if b is None else sums_over_rows(as_rows(dx), b.dtype)[1]

    return Tensor.from_op(result(), (input, bias), vjp).with_again(result)


def swiglu(gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor:
    """silu(a + b) (u + c): the biases of the products before it are added where they are read."""
    a, u, b, c = contiguous(gate.data), contiguous(up.data), _data(gate_bias), _data(up_bias)
    types, size = (a.dtype, a.dtype if b is None else b.dtype), (a.size, a.shape[-1])

    def result():
        y = np.empty_like(a)
        elementwise(a, "swiglu", types, a.size, a, b, u, c, y, *size)
        return y

    def vjp(grad):
        da, du = np.empty_like(a), np.empty_like(u)
        elementwise(a, "swiglu_back", types, a.size, a, b, u, c, contiguous(grad), da, du, *size)
        db, dc = (
            None if bias is None else sums_over_rows(as_rows(d), bias.dtype)[1]
            for d, bias in ((da, b), (du, c))
        )
        return da, du, db, dc

    return Tensor.from_op(result(), (gate, up, gate_bias, up_bias), vjp).with_again(result)


def turn(x, cos, sin, sign: float):
    """rope of x (B, H, T, D), or with ``sign`` -1 its gradient; the result lies as (B, H, T, D) in memory."""
    B, H, T, D = x.shape
    if x.strides[3] != x.itemsize:
        x = np.ascontiguousarray(x, like=x)
    y = np.empty(x.shape, x.dtype, like=x)
    strides = [stride // x.itemsize for stride in x.strides[:3]]
    cos_stride = T * D // 2 if cos.ndim == 4 else 0  # rows that have positions of their own
    cos, sin = contiguous(cos), contiguous(sin)
    pairs = B * H * T * D // 2
    elementwise(x, "rope", (x.dtype,), pairs, x, *strides, cos, sin, cos_stride, y, pairs, H, T, D // 2, sign)
    return y


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask,
    address,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """A block of queries at a time, of all rows and heads: (T, S) scores are never there at once.

    Queries of one group of heads lie below each other in one product, as in ``attention.py``.
    """
    q, k, v = query.data, key.data, value.data
    (B, H, T, D), (G, S), E = q.shape, k.shape[1:3], v.shape[3]
    R, sums_in = H // G if G else 1, wide(q.dtype)
    step = max(1, QUERY_BLOCK // R)  # of the masks that dropout draws
    if address is None:
        step = max(step, SCORES // max(1, B * H * S))
    k, v = k.reshape(B * G, S, D), v.reshape(B * G, S, E)
    q = q.reshape(B, G, R, T, D)
    mask = _Mask(attn_mask, (B, H, T, S), sums_in)
    new = np.zeros if is_causal and S < T else np.empty  # the first T - S queries see nothing
    out = new((B, G, R, T, E), q.dtype, like=q)
    log_sum = new((B, H, T), sums_in, like=q)

    def stacked(x, rows):  # (B, G, R, T, D) -> (B G, R rows, D)
        return np.ascontiguousarray(x[..., rows, :], like=x).reshape(B * G, -1, x.shape[-1])

    def blocks():
        for number, start in enumerate(range(0, T, step)):
            rows = slice(start, min(start + step, T))
            seen = max(0, rows.stop + S - T) if is_causal else S
            if seen:
                yield number, rows, seen

    def scores_of(number, rows, seen):
        """What both directions begin with: Q, Q Kᵀ · scale, and the last arguments of both kernels."""
        q_block = stacked(q, rows)
        scores = gemm(q_block, k[:, :seen].swapaxes(1, 2), dtype=sums_in, alpha=scale)  # (B G, R rows, seen)
        kept, count = None, rows.stop - rows.start
        if address is not None:
            numbers = [head * -(-T // step) + number for head in range(B * H)]
            kept = dropout_kept(address, numbers, count * seen, dropout_p, like=q)
        place = (H, T, S, rows.start, count, seen, int(is_causal))
        return q_block, scores, (kept, 1 / (1 - dropout_p), *mask.arguments, *place)

    for number, rows, seen in blocks():
        _, scores, rest = scores_of(number, rows, seen)
        p = np.empty(scores.shape, q.dtype, like=q)
        count = B * H * (rows.stop - rows.start)
        launch(q, "attention", (q.dtype,), count, threads_for(seen), scores, p, log_sum, *rest)
        out[..., rows, :] = gemm(p, v[:, :seen]).reshape(B, G, R, -1, E)

    def vjp(grad):
        grad = contiguous(grad).reshape(out.shape)
        delta = np.empty(log_sum.shape, sums_in, like=q)
        launch(q, "row_dot", (q.dtype,), delta.size, threads_for(E), grad, out, delta, E)
        dq = new(q.shape, q.dtype, like=q)
        dk, dv = (np.zeros(x.shape, sums_in, like=q) for x in (k, v))
        for number, rows, seen in blocks():
            q_block, scores, rest = scores_of(number, rows, seen)
            g = stacked(grad, rows)
            dp = gemm(g, v[:, :seen].swapaxes(1, 2), dtype=sums_in)
            p, ds = (np.empty(scores.shape, q.dtype, like=q) for _ in range(2))
            arrays = scores, dp, p, ds, log_sum, delta
            count = B * H * (rows.stop - rows.start)
            launch(q, "attention_back", (q.dtype,), count, threads_for(seen), *arrays, *rest)
            gemm(p.swapaxes(1, 2), g, out=dv[:, :seen], beta=1)
            gemm(ds.swapaxes(1, 2), q_block, out=dk[:, :seen], alpha=scale, beta=1)
            dq[..., rows, :] = gemm(ds, k[:, :seen], alpha=scale).reshape(B, G, R, -1, D)
        dk, dv = (d.astype(q.dtype, copy=False).reshape(B, G, S, -1) for d in (dk, dv))
        return dq.reshape(B, H, T, D), dk, dv

    return Tensor.from_op(out.reshape(B, H, T, E), (query, key, value), vjp)


class _Mask:
    """attn_mask as the kernels take it: a boolean array or one of numbers, and its strides (B, H, T, S)."""

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


def cross_entropy(logits, targets, ignore_index: int, weight: float, gradient) -> np.ndarray:
    """The losses (N,) of logits (N, V); ``gradient``, which may be the logits, gets weight dL/dlogits."""
    N, V = logits.shape
    losses = np.empty(N, wide(logits.dtype), like=logits)
    stride = logits.strides[0] // logits.itemsize if N > 1 else V
    arguments = (
        logits,
        targets.astype(np.int64, copy=False),
        losses,
        gradient,
        V,
        stride,
        ignore_index,
        weight,
    )
    launch(logits, "cross_entropy", (logits.dtype, gradient.dtype), N, threads_for(V), *arguments)
    return losses


def linear_cross_entropy(
    input: Tensor, weight: Tensor, bias: Tensor | None, targets, ignore_index: int, num_targets: float
) -> Tensor:
    """A chunk of rows at a time, as in ``losses.py``; the num_targets comes in at the end, as a short type would
    round p / num_targets to nothing."""
    x = contiguous(as_rows(input.data))  # (N, C)
    w = weight.data.astype(x.dtype, copy=False)  # (V, C)
    (N, C), V, sums_in = x.shape, len(w), wide(x.dtype)
    width = -(-V // ALIGNED) * ALIGNED
    step = max(1, LOGITS // width)
    logits = np.empty((min(step, N), width), sums_in, like=x)[:, :V]
    gradient = logits if x.dtype == sums_in else np.empty((min(step, N), width), x.dtype, like=x)[:, :V]
    dx = np.empty((N, C), sums_in, like=x) if input.wants_grad else None
    dw = np.zeros((V, C), sums_in, like=x) if weight.wants_grad else None
    db = np.zeros(V, sums_in, like=x) if bias is not None and bias.wants_grad else None
    total = np.zeros((), sums_in, like=x)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        n = rows.stop - start
        z, g = logits[:n], gradient[:n]
        gemm(x[rows], w.T, out=z)
        if bias is not None:
            z += bias.data
        total = total + cross_entropy(z, targets[rows], ignore_index, 1.0, g).sum()
        if dx is not None:
            gemm(g, w, out=dx[rows])
        if dw is not None:
            gemm(g.T, x[rows], out=dw, beta=1)
        if db is not None:
            db += sums_over_rows(contiguous(g), sums_in)[1]
    shape, dtypes = input.shape, [None if t is None else t.dtype for t in (input, weight, bias)]

    def vjp(grad):
        factor = grad / num_targets  # an array on the device: asking for its value would mean to wait for it
        results = []
        for d, dtype in zip((dx, dw, db), dtypes):
            if d is not None:
                d *= factor
                d = d.astype(dtype, copy=False)
            results.append(d)
        if dx is not None:
            results[0] = results[0].reshape(shape)
        return results

    return Tensor.from_op(total / num_targets, (input, weight, bias), vjp)

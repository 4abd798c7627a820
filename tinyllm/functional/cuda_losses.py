"""The losses on a GPU; see ``cuda.py``."""

import numpy as np

from tinyllm.backend.cuda.launch import contiguous, gemm, launch, sums_over_rows, threads_for
from tinyllm.backend.dtypes import accumulation_dtype, tf32_allowed
from tinyllm.functional.cuda import for_products
from tinyllm.functional.linear import check_linear
from tinyllm.functional.losses import Targets, check_capped_loss, check_reduction, smoothed
from tinyllm.tensor import Tensor
from tinyllm.tensor_ops import as_rows

LOGITS = 2**27  # elements of one chunk of rows
ALIGNED = 64  # elements: tensor cores are faster if rows of logits begin at aligned addresses


def cross_entropy(input: Tensor, target, **options) -> Tensor:
    """The loss of half-precision logits is float32."""
    targets = Targets(target, input.shape, **options)
    logits, shape, dtype = contiguous(as_rows(input.data)), input.shape, input.dtype
    dlogits = np.empty(logits.shape, accumulation_dtype(dtype), like=logits)
    losses = _cross_entropy(logits, *_on_device(targets, dlogits), dlogits)

    def vjp(grad):
        scale = (grad / targets.number).reshape(-1, 1)
        return ((dlogits * scale).astype(dtype, copy=False).reshape(shape),)

    return smoothed(Tensor.from_op(targets.reduced(losses), (input,), vjp), targets, input)


def _on_device(targets: Targets, like):
    """The targets (N,), -1 where ignored, and their weights (or None), on the device of ``like``."""
    index = np.where(targets.counted, targets.index, -1).astype(np.int64, copy=False)
    weights = None if targets.weights is None else targets.weights.astype(like.dtype)
    return [None if x is None else np.asarray(x, like=like) for x in (index, weights)]


def _cross_entropy(logits, index, weights, gradient, softcap=None):
    """The weighted losses (N,) of logits (N, V); ``gradient``, which may be the logits, is set to dL/dlogits.

    Neither is divided by the number of targets yet: in half precision p / number would underflow.
    """
    N, V = logits.shape
    losses = np.empty(N, accumulation_dtype(logits.dtype), like=logits)
    stride = logits.strides[0] // logits.itemsize if N > 1 else V
    arguments = (logits, index, weights, losses, gradient, V, stride, -1, 1.0, softcap or 0.0)
    launch(logits, "cross_entropy", (logits.dtype, gradient.dtype), N, threads_for(V), *arguments)
    return losses


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    softcap: float | None = None,
    **options,
) -> Tensor:
    """A chunk of rows at a time, as in ``losses.py``; the division by ``num_targets`` comes last."""
    check_linear(input, linear_weight, linear_bias)
    x = for_products(contiguous(as_rows(input.data)))  # (N, C)
    w, bias, tf32 = linear_weight.data.astype(x.dtype, copy=False), linear_bias, tf32_allowed()  # (V, C)
    (N, C), V, sums_in = x.shape, len(w), accumulation_dtype(x.dtype)
    options["reduction"] = check_reduction(reduction)
    softcap = check_capped_loss(softcap, options.get("label_smoothing", 0))
    targets = Targets(target, (*input.shape[:-1], V), **options)
    width = -(-V // ALIGNED) * ALIGNED
    step = max(1, LOGITS // width)
    logits = np.empty((min(step, N), width), sums_in, like=x)[:, :V]
    gradient = logits if x.dtype == sums_in else np.empty((min(step, N), width), x.dtype, like=x)[:, :V]
    index, weights = _on_device(targets, logits)
    dx = np.empty((N, C), sums_in, like=x) if input.needs_grad else None
    dw = np.zeros((V, C), sums_in, like=x) if linear_weight.needs_grad else None
    db = np.zeros(V, sums_in, like=x) if bias is not None and bias.needs_grad else None
    total = np.zeros((), sums_in, like=x)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        n = rows.stop - start
        z, g = logits[:n], gradient[:n]
        gemm(x[rows], w.T, out=z, tf32=tf32)
        if bias is not None:
            z += bias.data
        some = None if weights is None else weights[rows]
        total = total + _cross_entropy(z, index[rows], some, g, softcap).sum()
        if dx is not None:
            gemm(g, w, out=dx[rows], tf32=tf32)
        if dw is not None:
            gemm(g.T, x[rows], out=dw, beta=1, tf32=tf32)
        if db is not None:
            db += sums_over_rows(contiguous(g), sums_in)[1]
    shape, dtypes = input.shape, [None if t is None else t.dtype for t in (input, linear_weight, bias)]

    def vjp(grad):
        factor = grad / targets.number  # stays on the device: reading its value would synchronise with it
        results = []
        for d, dtype in zip((dx, dw, db), dtypes):
            if d is not None:
                d *= factor
                d = d.astype(dtype, copy=False)
            results.append(d)
        if dx is not None:
            results[0] = results[0].reshape(shape)
        return results

    loss = Tensor.from_op(total / targets.number, (input, linear_weight, bias), vjp)
    return smoothed(loss, targets, input, linear_weight, bias)

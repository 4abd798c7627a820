"""How wrong was the prediction, and what would have been better?

Cross-entropy of the next token: loss = Σ -log p(target) / num_targets with p = softmax(logits), over the
targets that are not ``ignore_index``. Its gradient is what makes training simple:

    d loss / d logits = (p - onehot(target)) / num_targets,   zero for ignored targets

``num_targets`` is the number of targets that count unless it is given: micro-batches of one step all divide
by the step's total, so that their gradients add up to those of the whole batch.
"""

from functools import partial

import numpy as np

from tinyllm.backend.cuda.launch import library_of, on_gpu
from tinyllm.backend.dtypes import is_short
from tinyllm.backend.threads import each_block, matmul, one_blas_thread, run_tasks
from tinyllm.checks import check_ids
from tinyllm.errors import Error
from tinyllm.functional import cuda as gpu
from tinyllm.tensor import Tensor, as_rows

CHUNK = 256  # rows of logits at a time; with fewer, the weight's way through memory dominates

COLUMNS = 512  # classes of dW at a time, in each thread


def cross_entropy(
    input: Tensor, target, *, ignore_index: int = -100, num_targets: float | None = None
) -> Tensor:
    """Cross-entropy of logits (..., V) and integer targets (...): a scalar in the logits' dtype.

    Of logits in a short type it is float32.
    """
    if is_short(input.dtype):
        input = input.astype(np.float32)
    logits = as_rows(input.data)  # (N, V)
    given, target = target, _check_targets(target, input.shape, ignore_index, like=logits)
    num_targets = _num_targets(given, ignore_index, num_targets)
    shape = input.shape
    dlogits = logits.copy()
    losses = _into_gradient(dlogits, target, ignore_index, num_targets)

    def vjp(grad):
        return ((dlogits * grad).reshape(shape),)

    return Tensor.from_op(losses.sum() / num_targets, (input,), vjp)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    num_targets: float | None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without ever holding all logits.

    x (..., C), W (V, C), targets (...). A chunk of rows at a time: its logits become its loss, then
    (in place) its gradient, which becomes its part of dx, dW and db and is forgotten. The gradients are
    formed in the forward pass, because the logits would have to be computed again otherwise.
    """
    x, w = as_rows(input.data), linear_weight.data  # (N, C), (V, C)
    if linear_weight.ndim != 2 or input.ndim == 0 or x.shape[1] != w.shape[1]:
        raise Error(f"linear_cross_entropy: input {input.shape} does not fit a weight {w.shape} (V, C)")
    given, target = target, _check_targets(target, (*input.shape[:-1], len(w)), ignore_index, like=x)
    num_targets = _num_targets(given, ignore_index, num_targets)
    if on_gpu(input, linear_weight, linear_bias):
        return gpu.linear_cross_entropy(input, linear_weight, linear_bias, target, ignore_index, num_targets)
    b = None if linear_bias is None else linear_bias.data
    dx = np.empty_like(x) if input.wants_grad else None
    dw = (np.empty_like if len(x) else np.zeros_like)(w) if linear_weight.wants_grad else None
    db = np.zeros_like(b) if b is not None and linear_bias.wants_grad else None
    total = np.zeros((), x.dtype, like=x)
    columns = [slice(first, first + COLUMNS) for first in range(0, len(w), COLUMNS)]
    chunk = np.empty((min(CHUNK, len(x)), len(w)), x.dtype, like=x)  # one for all: it is the largest array

    def add_to_dw(some, logits, rows):  # a small product to add, not one of W's size
        if rows.start == 0:
            np.matmul(logits[:, some].T, x[rows], out=dw[some])
        else:
            dw[some] += logits[:, some].T @ x[rows]

    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        logits = matmul(x[rows], w.T, out=chunk[: len(x[rows])])
        if b is not None:
            logits += b
        total = total + _into_gradient(logits, target[rows], ignore_index, num_targets).sum()
        if dx is not None:
            matmul(logits, w, out=dx[rows])
        if dw is not None:
            with one_blas_thread():
                run_tasks(partial(add_to_dw, logits=logits, rows=rows), columns)
        if db is not None:
            db += logits.sum(axis=0)
    shape = input.shape

    def vjp(grad):
        if grad.item() != 1:  # it is 1 where backward() begins
            for d in (dx, dw, db):
                if d is not None:
                    d *= grad
        return (None if dx is None else dx.reshape(shape)), dw, db

    return Tensor.from_op(total / num_targets, (input, linear_weight, linear_bias), vjp)


def _into_gradient(logits, target, ignore_index, num_targets):
    """In place: logits (N, V) -> (p - onehot) / num_targets. Returns the loss (N, 1) of each row, undivided."""
    if library_of(logits) is not None:
        return gpu.cross_entropy(logits, target, ignore_index, 1 / num_targets, gradient=logits)
    counted = (target != ignore_index).reshape(-1, 1)
    weight = np.where(counted, 1 / num_targets, 0).astype(logits.dtype)
    safe = np.where(counted[:, 0], target, 0)
    losses = np.empty((len(logits), 1), logits.dtype, like=logits)

    def rows_of(rows):
        z, index = logits[rows], safe[rows].reshape(-1, 1)
        z -= z.max(axis=1, keepdims=True)
        at_target = np.take_along_axis(z, index, axis=1)
        np.exp(z, out=z)
        total = z.sum(axis=1, keepdims=True)
        losses[rows] = np.where(counted[rows], np.log(total) - at_target, 0)
        z *= weight[rows] / total
        np.put_along_axis(z, index, np.take_along_axis(z, index, axis=1) - weight[rows], axis=1)

    each_block(rows_of, *logits.shape, like=logits)
    return losses


def _check_targets(target, logits_shape, ignore_index, like):
    """Targets as a flat integer array, checked on the host, then beside the logits."""
    target = np.asarray(target) if isinstance(target, (list, tuple, int)) else target
    if tuple(target.shape) != tuple(logits_shape[:-1]):
        raise Error(
            f"targets of shape {tuple(target.shape)} do not fit logits of shape {tuple(logits_shape)}; "
            f"they need shape {tuple(logits_shape[:-1])}"
        )
    if isinstance(target, np.ndarray) and target.size:
        check_ids(np.where(target == ignore_index, 0, target), logits_shape[-1], name="targets")
    return np.asarray(target.reshape(-1), like=like)


def _num_targets(target, ignore_index, num_targets):
    """The number of targets that count, unless the caller divides by something else.

    It is counted where the caller has them: from the host there is no GPU to wait for.
    """
    if num_targets is None:
        num_targets = int(np.not_equal(target, ignore_index).sum().item())
        if num_targets == 0:
            raise Error(f"every target is ignore_index ({ignore_index}): there is no loss to compute")
    if not num_targets > 0:
        raise Error(f"num_targets must be positive, not {num_targets}")
    return float(num_targets)  # a NumPy number would widen the loss

"""How wrong was the prediction, and what would have been better?

Cross-entropy of the next token: loss = Σ_n -log p(target_n) / num_targets with p = softmax(logits), over the
targets that are not ``ignore_index``. ``num_targets`` defaults to their number; micro-batches of one step all
divide by the step's total, so that their gradients add up to those of the whole batch. With ``weights``, an
array of the targets' shape, each target's loss is multiplied by its weight, and ``num_targets`` defaults to
the sum of the weights.
"""

import math
from functools import partial

import numpy as np

from tinyllm.backend.threads import each_block, matmul, one_blas_thread, run_tasks
from tinyllm.checks import check_ids
from tinyllm.errors import Error
from tinyllm.functional.linear import check_linear
from tinyllm.tensor import Tensor
from tinyllm.tensor_ops import as_rows, to_memory_of

CHUNK = 256  # rows of logits at a time; with fewer, reading the weight from memory dominates
COLUMNS = 512  # classes of dW at a time, in each thread


def cross_entropy(
    input: Tensor,
    target,
    *,
    ignore_index: int = -100,
    num_targets: float | None = None,
    weights=None,
) -> Tensor:
    """Cross-entropy of logits (..., V) and integer targets (...): a scalar in the logits' dtype.

    For a row z of logits with target t, -log p_t = log Σ_j exp(z_j) - z_t. With δ_kt = 1 if k = t, else 0,

        ∂(-log p_t)/∂z_k = exp(z_k) / Σ_j exp(z_j) - δ_kt = p_k - δ_kt,

    so dlogits = (p - onehot(target)) · weight / num_targets, and zero where the target is ignored. An
    untrained model's logits are nearly equal: p_t ≈ 1/V, and the loss is near -ln(1/V) = ln V (10.82 for
    GPT-2's 50257 tokens).
    """
    targets = Targets(target, input.shape, ignore_index, num_targets, weights)
    dlogits, shape = as_rows(input.data).copy(), input.shape  # (N, V)
    losses = _into_gradient(dlogits, *targets.columns(dlogits))

    def vjp(grad):
        return ((dlogits * grad).reshape(shape),)

    return Tensor.from_op(losses.sum() / targets.number, (input,), vjp)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    num_targets: float | None = None,
    weights=None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without ever holding all logits.

    x (..., C), W (V, C), targets (...). A chunk of rows at a time, the logits are reduced to their loss and
    replaced in place by their gradient d, which yields dx = d W and the chunk's share of dW = dᵀ x and
    db = Σ_rows d. This happens in the forward pass; otherwise the logits would have to be computed twice.
    """
    check_linear(input, linear_weight, linear_bias)
    x, w = as_rows(input.data), linear_weight.data  # (N, C), (V, C)
    targets = Targets(target, (*input.shape[:-1], len(w)), ignore_index, num_targets, weights)
    columns = targets.columns(x)
    b = None if linear_bias is None else linear_bias.data
    dx = np.empty_like(x) if input.needs_grad else None
    dw = (np.empty_like if len(x) else np.zeros_like)(w) if linear_weight.needs_grad else None
    db = np.zeros_like(b) if b is not None and linear_bias.needs_grad else None
    total = np.zeros((), x.dtype, like=x)
    classes = [slice(first, first + COLUMNS) for first in range(0, len(w), COLUMNS)]
    chunk = np.empty((min(CHUNK, len(x)), len(w)), x.dtype, like=x)  # the largest array: reused

    def add_to_dw(some, logits, rows):  # a slice at a time: the product is small, not of the size of W
        if rows.start == 0:
            np.matmul(logits[:, some].T, x[rows], out=dw[some])
        else:
            dw[some] += logits[:, some].T @ x[rows]

    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        logits = matmul(x[rows], w.T, out=chunk[: len(x[rows])])
        if b is not None:
            logits += b
        total = total + _into_gradient(logits, *(c if c is None else c[rows] for c in columns)).sum()
        if dx is not None:
            matmul(logits, w, out=dx[rows])
        if dw is not None:
            with one_blas_thread():
                run_tasks(partial(add_to_dw, logits=logits, rows=rows), classes)
        if db is not None:
            db += logits.sum(axis=0)
    shape = input.shape

    def vjp(grad):
        if grad.item() != 1:  # it is 1 if backward() starts at this loss
            for d in (dx, dw, db):
                if d is not None:
                    d *= grad
        return (None if dx is None else dx.reshape(shape)), dw, db

    return Tensor.from_op(total / targets.number, (input, linear_weight, linear_bias), vjp)


def _into_gradient(logits, counted, index, scale, weights):
    """In place: logits (N, V) -> (p - onehot) scale. Return each row's weighted loss (N, 1), undivided."""
    losses = np.empty((len(logits), 1), logits.dtype, like=logits)

    def rows_of(rows):
        z, at = logits[rows], index[rows]
        z -= z.max(axis=1, keepdims=True)
        at_target = np.take_along_axis(z, at, axis=1)
        np.exp(z, out=z)
        total = z.sum(axis=1, keepdims=True)
        losses[rows] = np.where(counted[rows], np.log(total) - at_target, 0)
        z *= scale[rows] / total
        np.put_along_axis(z, at, np.take_along_axis(z, at, axis=1) - scale[rows], axis=1)

    each_block(rows_of, *logits.shape, like=logits)
    return losses if weights is None else losses * weights


class Targets:
    """Checked targets and weights as flat arrays; the sum of the losses is divided by ``number``.

    ``counted`` is False for ignored targets, whose weight is 0 (unless ``weights`` is None).
    """

    def __init__(self, target, logits_shape, ignore_index, num_targets, weights):
        target, weights = (_as_array(x) for x in (target, weights))
        if tuple(target.shape) != tuple(logits_shape[:-1]):
            raise Error(
                f"targets of shape {tuple(target.shape)} do not fit logits of shape {tuple(logits_shape)}; "
                f"they need shape {tuple(logits_shape[:-1])}"
            )
        if isinstance(target, np.ndarray) and target.size:
            check_ids(np.where(target == ignore_index, 0, target), logits_shape[-1], name="targets")
        if weights is not None and tuple(weights.shape) != tuple(target.shape):
            raise Error(f"weights of shape {weights.shape} do not fit targets of shape {target.shape}")
        self.target, self.counted = target.reshape(-1), (target != ignore_index).reshape(-1)
        weights = None if weights is None else to_memory_of(weights, target)
        self.weights = None if weights is None else np.where(self.counted, weights.reshape(-1), 0)
        weights = self.counted if weights is None else self.weights
        self.number = _num_targets(weights, ignore_index, num_targets)
        self.scale = weights / self.number

    def columns(self, like) -> list:
        """Columns (N, 1), as arrays like the logits: counted, valid class index, gradient scale, weights."""
        index = np.where(self.counted, self.target, 0)
        scale = self.scale.astype(like.dtype)
        weights = None if self.weights is None else self.weights.astype(like.dtype)
        columns = (self.counted, index, scale, weights)
        return [None if x is None else np.asarray(x.reshape(-1, 1), like=like) for x in columns]


def _as_array(x):
    """Targets or weights as an array, from a Tensor, array, list or number."""
    if isinstance(x, Tensor):
        return x.data
    return x if x is None or hasattr(x, "dtype") else np.asarray(x)


def _num_targets(weight, ignore_index, num_targets) -> float:
    """The divisor of the summed loss: as given, else the number of counted targets or their total weight."""
    if num_targets is None:
        num_targets = weight.sum().item()
        if num_targets == 0:
            raise Error(f"no target counts: pass one that is not {ignore_index} and has a weight above 0")
    if not isinstance(num_targets, int | float | np.number) or not 0 < num_targets < math.inf:
        raise Error(f"num_targets must be positive, not {num_targets}: pass the number of targets that count")
    return float(num_targets)  # a NumPy float64 would turn a float32 loss into float64

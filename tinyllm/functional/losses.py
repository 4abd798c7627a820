"""How wrong was the prediction, and what would have been better?

Cross-entropy of the next token: loss = Σ_n -log p(target_n) / num_targets with p = softmax(logits), over the
targets that are not ``ignore_index``. ``num_targets`` defaults to their number; micro-batches of one step all
divide by the step's total, so that their gradients add up to those of the whole batch. With ``weights``, an
array of the targets' shape, each target's loss is multiplied by its weight, and ``num_targets`` defaults to
the sum of the weights. As in torch, ``weight`` (V,) has a weight for the targets of each class, and
``reduction`` is "mean", "sum" (which is not divided) or "none" (the loss of each target).
"""

import math
from functools import partial

import numpy as np

from tinyllm.backend.threads import each_block, matmul, one_blas_thread, run_tasks, sum_last_axis
from tinyllm.checks import as_array, check_ids
from tinyllm.errors import Error
from tinyllm.functional.activations import check_softcap
from tinyllm.functional.linear import check_linear
from tinyllm.tensor import Tensor
from tinyllm.tensor_ops import array_of, as_rows, to_memory_of

CHUNK = 256  # rows of logits at a time, or more; with fewer, reading the weight from memory dominates
LOGITS = 2**20  # logits at a time, if that is more rows
COLUMNS = 512  # classes of dW at a time, in each thread


def cross_entropy(
    input: Tensor,
    target,
    *,
    weight=None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    num_targets: float | None = None,
    weights=None,
) -> Tensor:
    """Cross-entropy of logits (..., V) and integer targets (...): a scalar in the logits' dtype.

    For a row z of logits with target t, -log p_t = log Σ_j exp(z_j) - z_t. With δ_kt = 1 if k = t, else 0,

        ∂(-log p_t)/∂z_k = exp(z_k) / Σ_j exp(z_j) - δ_kt = p_k - δ_kt,

    so dlogits = (p - onehot(target)) · weight / num_targets, and zero where the target is ignored. An
    untrained model's logits are nearly equal: p_t ≈ 1/V, and the loss is near -ln(1/V) = ln V (10.82 for
    GPT-2's 50257 tokens).

    With label smoothing ε every class c is the target, too, with the weight s_c = ε weight_c / V, and the
    original one has its weight times 1 - ε. See ``smoothed``. Szegedy et al., arXiv 1512.00567, section 7.
    """
    options = ignore_index, num_targets, weights, weight, reduction, label_smoothing
    targets = Targets(target, input.shape, *options)
    dlogits, shape = as_rows(input.data).copy(), input.shape  # (N, V)
    losses = _into_gradient(dlogits, *targets.columns(dlogits))

    def vjp(grad):
        return ((dlogits * grad.reshape(-1, 1)).reshape(shape),)

    return smoothed(Tensor.from_op(targets.reduced(losses), (input,), vjp), targets, input)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target,
    *,
    linear_bias: Tensor | None = None,
    weight=None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    num_targets: float | None = None,
    weights=None,
    softcap: float | None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without ever holding all logits.

    x (..., C), W (V, C), targets (...). A chunk of rows at a time, the logits are reduced to their loss and
    replaced in place by their gradient d, which yields dx = d W and the chunk's share of dW = dᵀ x and
    db = Σ_rows d. This happens in the forward pass; otherwise the logits would have to be computed twice. It
    needs one dL/d(loss) for all rows: ``reduction`` is "mean" or "sum".

    With a ``softcap`` c the logits are z = c tanh(y / c) of y = x Wᵀ + b (see the op of that name), and d,
    the gradient with respect to z, is multiplied by ∂z/∂y = 1 - (z / c)². Not with label smoothing.
    """
    check_linear(input, linear_weight, linear_bias)
    softcap = check_capped_loss(softcap, label_smoothing)
    x, w = as_rows(input.data), linear_weight.data  # (N, C), (V, C)
    options = ignore_index, num_targets, weights, weight, check_reduction(reduction), label_smoothing
    targets = Targets(target, (*input.shape[:-1], len(w)), *options)
    columns = targets.columns(x)
    b = None if linear_bias is None else linear_bias.data
    dx = np.empty_like(x) if input.needs_grad else None
    dw = (np.empty_like if len(x) else np.zeros_like)(w) if linear_weight.needs_grad else None
    db = np.zeros_like(b) if b is not None and linear_bias.needs_grad else None
    total = np.zeros((), x.dtype, like=x)
    classes = [slice(first, first + COLUMNS) for first in range(0, len(w), COLUMNS)]
    most = rows_of_logits(len(w))
    chunk = np.empty((min(most, len(x)), len(w)), x.dtype, like=x)  # the largest array: reused

    def add_to_dw(some, logits, rows):  # a slice at a time: the product is small, not of the size of W
        if rows.start == 0:
            np.matmul(logits[:, some].T, x[rows], out=dw[some])
        else:
            dw[some] += logits[:, some].T @ x[rows]

    for start in range(0, len(x), most):
        rows = slice(start, start + most)
        logits = matmul(x[rows], w.T, out=chunk[: len(x[rows])])
        if b is not None:
            logits += b
        parts = [c if c is None else c[rows] for c in columns]
        total = total + _into_gradient(logits, *parts, softcap).sum()
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

    loss = Tensor.from_op(total / targets.number, (input, linear_weight, linear_bias), vjp)
    return smoothed(loss, targets, input, linear_weight, linear_bias)


def rows_of_logits(num_classes: int) -> int:
    """How many rows of logits ``linear_cross_entropy`` computes at a time."""
    return max(CHUNK, LOGITS // max(1, num_classes))


def check_capped_loss(softcap: float | None, label_smoothing: float) -> float | None:
    if softcap is not None and label_smoothing:
        raise Error(
            "linear_cross_entropy has no label_smoothing with a softcap: use "
            "cross_entropy(softcap(linear(...), cap), ...)"
        )
    return None if softcap is None else check_softcap(softcap)


def check_reduction(reduction: str) -> str:
    if reduction == "none":
        raise Error("linear_cross_entropy has no reduction='none': use cross_entropy(linear(...), ...)")
    return reduction


def smoothed(loss: Tensor, targets, input: Tensor, weight: Tensor | None = None, bias=None) -> Tensor:
    """``loss`` and what label smoothing adds to it, for logits z = input (Wᵀ + b).

    A row whose classes have the weights a_c = α [c = t] + s_c, with S = Σ_c s_c, has the loss

        Σ_c a_c (log Σ_j exp(z_j) - z_c) = (α + S) (log Σ_j exp(z_j) - z_t) + S z_t - Σ_c s_c z_c.

    The first term is the usual loss with the weight α + S. The rest is linear in z, and so in the input.
    """
    if targets.shares is None:
        return loss
    x = input.reshape(-1, input.shape[-1]).astype(loss.dtype)
    index, shares, each = (
        np.asarray(a.astype(dtype), like=x.data)
        for a, dtype in ((targets.index, np.int64), (targets.shares, x.dtype), (targets.each, x.dtype))
    )
    if weight is None:
        at_target, at_all = x[np.arange(len(index), like=index), index], x @ shares
    else:
        weight = weight.astype(x.dtype)
        at_target, at_all = (x * weight[index]).sum(axis=-1), x @ (shares @ weight)
    if bias is not None:
        bias = bias.astype(x.dtype)
        at_target, at_all = at_target + bias[index], at_all + shares @ bias
    return loss + targets.reduced((at_target * shares.sum().item() - at_all) * each)


def _into_gradient(logits, counted, index, scale, weights, softcap=None):
    """In place: logits (N, V) -> (p - onehot) scale. Return each row's weighted loss (N, 1), undivided."""
    losses = np.empty((len(logits), 1), logits.dtype, like=logits)

    def rows_of(rows):
        z, at = logits[rows], index[rows]
        if softcap is not None:
            z /= softcap
            np.tanh(z, out=z)
            slope = 1 - z * z  # of one block only
            z *= softcap
        z -= z.max(axis=1, keepdims=True)
        at_target = np.take_along_axis(z, at, axis=1)
        np.exp(z, out=z)
        total = sum_last_axis(z)
        losses[rows] = np.where(counted[rows], np.log(total) - at_target, 0)
        z *= scale[rows] / total
        np.put_along_axis(z, at, np.take_along_axis(z, at, axis=1) - scale[rows], axis=1)
        if softcap is not None:
            z *= slope

    each_block(rows_of, *logits.shape, like=logits)
    return losses if weights is None else losses * weights


class Targets:
    """Checked targets and weights as flat arrays; the sum of the losses is divided by ``number``.

    ``counted`` is False for ignored targets, whose weight is 0 (unless ``weights`` is None). ``shares`` are
    the weights of all classes in label smoothing, ``each`` those of the targets without their class's.
    """

    def __init__(
        self,
        target,
        logits_shape,
        ignore_index=-100,
        num_targets=None,
        weights=None,
        weight=None,
        reduction="mean",
        label_smoothing=0.0,
    ):
        target, weights, weight = (_as_array(x) for x in (target, weights, weight))
        if reduction not in ("mean", "sum", "none") or (num_targets is not None and reduction != "mean"):
            raise Error(f"reduction is {reduction!r}: choose 'mean', or without num_targets 'sum' or 'none'")
        if not 0 <= label_smoothing <= 1:
            raise Error(f"label_smoothing is {label_smoothing}: choose a number between 0 and 1")
        if not hasattr(target, "astype"):
            raise Error(f"targets are a {type(target).__name__}: give integers in a list or an array")
        if weight is not None and weight.shape != tuple(logits_shape[-1:]):
            raise Error(f"weight of shape {weight.shape} does not fit logits of shape {tuple(logits_shape)}")
        if tuple(target.shape) != tuple(logits_shape[:-1]):
            raise Error(
                f"targets of shape {tuple(target.shape)} do not fit logits of shape {tuple(logits_shape)}; "
                f"they need shape {tuple(logits_shape[:-1])}"
            )
        if isinstance(target, np.ndarray) and target.size:
            zero = target.dtype.type(0)  # so that booleans stay booleans, which are refused
            check_ids(np.where(target == ignore_index, zero, target), logits_shape[-1], name="targets")
        if weights is not None and tuple(weights.shape) != tuple(target.shape):
            raise Error(f"weights of shape {weights.shape} do not fit targets of shape {target.shape}")
        self.shape, self.reduction = target.shape, reduction
        self.counted = (target != ignore_index).reshape(-1)
        self.index = np.where(self.counted, target.reshape(-1), 0)
        weights, weight = (None if x is None else to_memory_of(x, target) for x in (weights, weight))
        weights = None if weights is None else np.where(self.counted, weights.reshape(-1), 0)
        self.each = self.counted if weights is None else weights
        weights = weights if weight is None else self.each * weight[self.index]
        total = self.counted if weights is None else weights
        self.number = _num_targets(total, ignore_index, num_targets) if reduction == "mean" else 1.0
        self.shares = None
        if label_smoothing:
            weight = np.ones_like(self.counted, shape=logits_shape[-1:]) if weight is None else weight
            self.shares = weight * (label_smoothing / max(1, logits_shape[-1]))
            weights = total * (1 - label_smoothing) + self.each * self.shares.sum()
        self.weights, self.scale = weights, (self.counted if weights is None else weights) / self.number

    def columns(self, like) -> list:
        """Columns (N, 1), as arrays like the logits: counted, valid class index, gradient scale, weights."""
        scale = self.scale.astype(like.dtype)
        weights = None if self.weights is None else self.weights.astype(like.dtype)
        columns = (self.counted, self.index, scale, weights)
        return [None if x is None else np.asarray(x.reshape(-1, 1), like=like) for x in columns]

    def reduced(self, losses):
        """The result of the op, from the weighted losses of all targets."""
        return losses.reshape(self.shape) if self.reduction == "none" else losses.sum() / self.number


def _as_array(x):
    """Targets or weights as an array, from a Tensor, array, list or number."""
    return None if x is None else as_array(array_of(x))


def _num_targets(weight, ignore_index, num_targets) -> float:
    """The divisor of the summed loss: as given, else the number of counted targets or their total weight."""
    if num_targets is None:
        num_targets = weight.sum().item()
        if num_targets == 0:
            raise Error(f"no target counts: pass one that is not {ignore_index} and has a weight above 0")
    if not isinstance(num_targets, int | float | np.number) or not 0 < num_targets < math.inf:
        raise Error(f"num_targets must be positive, not {num_targets}: pass the number of targets that count")
    return float(num_targets)  # a NumPy float64 would turn a float32 loss into float64

"""What happens in one training step, and how is a model evaluated?

A batch is one or more arrays with a row for each example. Let N be the number of targets in all of it: for a
language model the next token at every position, but for those that are -100 and do not count. A step is

    L = 1/N Σ loss of each target                 forward, and
    g = ∂L/∂θ                                     backward, a few rows at a time: a micro-batch
    g = g · min(1, clip / ‖g‖)                    clipping, against a batch that would throw the model far off
    θ = AdamW(θ, g)                               the update, unless L or ‖g‖ is not finite

Activations are kept for one micro-batch at a time, and gradients are added up over all of them. Each divides
its sum by N, not by its own number of targets: so the sum is the gradient of the whole batch, whatever counts
where, and ``micro_batch`` is a matter of memory only.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tinyllm.backend.random import manual_seed
from tinyllm.errors import Error
from tinyllm.nn import Module, evaluating
from tinyllm.optim import AdamW, LossScale, NoLossScale, clip_grad_norm
from tinyllm.tensor import Tensor, no_grad

Check = Callable[[], None]


class StepResult(NamedTuple):
    """What a step found."""

    loss: float
    grad_norm: float  # before clipping
    updated: bool  # False: one of the two is not finite, and the weights are as they were


def language_model_loss(model: Module, ids, targets, num_targets: int) -> Tensor:
    return model.loss(ids, targets, num_targets=num_targets)


def count_targets(batch: tuple) -> int:
    """How many targets count: those in the batch's last array that are not -100."""
    if len(batch) > 2 and batch[-1].dtype.kind not in "iu":  # weights, say
        raise Error(f"the last array of a batch is {batch[-1].dtype}, not targets: say how to count them")
    return int((batch[-1] != -100).sum())


def do_nothing() -> None:
    """A check that never breaks anything off."""


def training_step(
    model: Module,
    optimizer: AdamW,
    batch: tuple,
    num_targets: int,
    loss_fn: Callable[..., Tensor] = language_model_loss,
    micro_batch: int | None = None,
    clip: float = 1.0,
    loss_scale: LossScale | NoLossScale | None = None,
    seed: int = 0,
    step: int = 0,
    check: Check = do_nothing,
) -> StepResult:
    """One update of the model's parameters from one batch.

    ``loss_fn(model, *rows, num_targets=N)`` is the loss of some rows: a sum over them, divided by N. Dropout
    follows from ``seed`` and ``step``. ``check()`` is called before each micro-batch and before the update;
    what it raises breaks off the step.
    """
    loss_scale = loss_scale or NoLossScale()
    try:
        loss = accumulate_gradients(
            model, batch, num_targets, loss_fn, micro_batch, loss_scale, seed, step, check
        )
        loss_scale.unscale(optimizer.parameters)
        grad_norm = clip_grad_norm(optimizer.parameters, clip)
        check()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            optimizer.step()
        if math.isfinite(loss):  # or it is not the scale's fault
            loss_scale.update(finite)
    finally:
        optimizer.zero_grad()
        model.zero_grad()  # of parameters, too, that the optimizer does not have
    return StepResult(loss, grad_norm, finite)


def accumulate_gradients(
    model: Module,
    batch: tuple,
    num_targets: int,
    loss_fn: Callable[..., Tensor],
    micro_batch: int | None,
    loss_scale: LossScale | NoLossScale,
    seed: int,
    step: int,
    check: Check = do_nothing,
) -> float:
    """Add ∂L/∂θ, times the loss scale, to every parameter's ``.grad``; returns L."""
    losses = []
    rows = len(batch[0])
    for first in range(0, rows, micro_batch or rows):
        check()
        manual_seed(seed, step, first)
        part = (array[first : first + (micro_batch or rows)] for array in batch)
        loss = loss_fn(model, *part, num_targets=num_targets)
        loss.backward(loss_scale.seed(loss))
        losses.append(loss)
    total = 0.0
    for loss in losses:  # not before: a GPU still computes while we prepare the next one, until it is asked
        total += loss.item()
    return total


def evaluate(
    model: Module,
    batches: Iterable[tuple],
    loss_fn: Callable[..., Tensor] = language_model_loss,
    count: Callable[[tuple], int] = count_targets,
    check: Check = do_nothing,
) -> float:
    """The mean loss of the targets in all ``batches``: without dropout, and nothing is kept for a gradient.

    ``check()`` is called before every batch; what it raises breaks off the evaluation.
    """
    total, targets = 0.0, 0
    with evaluating(model), no_grad():
        for batch in batches:
            check()
            total += loss_fn(model, *batch, num_targets=1).item()
            targets += count(batch)
    if targets == 0:
        raise Error("there are no targets to evaluate the model on: give batches in which some count")
    return total / targets

"""What happens in one training step, and how is a model evaluated?

A batch is one or more arrays with one row per example. Let N be its number of targets: for a language model,
the next token at every position, except targets of -100, which are ignored. A step is

    L = 1/N Σ loss of each target                 forward, and
    g = ∂L/∂θ                                     backward, for a few rows at a time: a micro-batch
    g = g · min(1, clip / ‖g‖)                    clipping, which bounds the effect of an unusual batch
    θ = AdamW(θ, g), or Muon                      the update, unless L or ‖g‖ is not finite

Only one micro-batch's activations are in memory at a time; gradients are accumulated over all of them. Each
micro-batch divides its sum by N, not by its own number of targets. The accumulated gradient is therefore that
of the whole batch, however targets are distributed, and ``micro_batch`` affects only memory. For the same
reason several processes can share the micro-batches (``workers.py``, ``data_parallel.py``). The
load-balancing loss of a mixture of experts is no such sum: each micro-batch has its own
(``models/mixture.py``).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np

from tinyllm.backend import distributed
from tinyllm.backend.random import manual_seed
from tinyllm.errors import Error
from tinyllm.nn import Module, evaluating
from tinyllm.optim import AdamW, LossScale, NoLossScale, clip_grad_norm
from tinyllm.tensor import Tensor, no_grad

Check = Callable[[], None]


class StepResult(NamedTuple):
    """The loss and gradient norm of a step."""

    loss: float
    grad_norm: float  # before clipping
    updated: bool  # False if one of the two is not finite: the weights are unchanged


def weights_are_finite(model: Module) -> bool:
    """Whether all parameters are finite. After a finite gradient they are not if a huge rate overflowed."""
    return all(np.isfinite(parameter.data).all().item() for parameter in model.parameters())


def language_model_loss(model: Module, ids, targets, num_targets: int) -> Tensor:
    return model.loss(ids, targets, num_targets=num_targets)


def count_targets(batch: tuple) -> int:
    """The number of targets: those in the batch's last array that are not -100."""
    if len(batch) > 2 and batch[-1].dtype.kind not in "iu":  # weights, for example
        raise Error(f"the last array of a batch is {batch[-1].dtype}, not targets: give a count(batch)")
    return int((batch[-1] != -100).sum())


class MicroBatch(NamedTuple):
    """Some rows of a batch's arrays, and the number of the first of them."""

    first: int
    rows: tuple


def micro_batches(batch: tuple, size: int) -> list[MicroBatch]:
    """A batch in parts of ``size`` rows; the last one may be smaller."""
    starts = range(0, len(batch[0]), size)
    return [MicroBatch(start, tuple(array[start : start + size] for array in batch)) for start in starts]


def do_nothing() -> None:
    """A check that never interrupts."""


class Alone:
    """What several processes do together in a step, for a single one."""

    @contextmanager
    def dealt(self, batch: tuple, size: int, how: tuple) -> Iterator[list[MicroBatch]]:
        """The micro-batches of ``size`` rows that this process computes within the block.

        ``how`` are the further arguments of ``add_gradient``, for other processes.
        """
        yield micro_batches(batch, size)

    def all_losses(self, losses: list[float]) -> list[float]:
        """The losses of all micro-batches of the batch, in order, from those of this process."""
        return losses

    def memory(self) -> int:
        """The bytes that this process's workers (``workers.py``) have for themselves."""
        return 0

    def clip_grad_norm(self, optimizer: AdamW, max_norm: float, check: Check) -> float:
        """Sum the gradients of all processes, clip them by their norm, call ``check``; returns the norm."""
        norm = clip_grad_norm(optimizer.parameters, max_norm)
        check()
        return norm

    def update(self, optimizer: AdamW) -> None:
        """Update the parameters on all processes."""
        optimizer.step()

    def parts(self, optimizer: AdamW, max_norm: float) -> dict[str, Callable[[], object]]:
        """What follows the gradients in a step, in order, as functions to profile."""
        clipped = partial(self.clip_grad_norm, optimizer, max_norm, do_nothing)
        return {"clip_grad_norm": clipped, type(optimizer).__name__: optimizer.step}


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
    replicas: Alone | None = None,
) -> StepResult:
    """Update the model's parameters once, from one batch.

    ``loss_fn(model, *rows, num_targets=N)`` is the loss of some rows: a sum over them, divided by N. Dropout
    masks depend on ``seed`` and ``step``. ``check()`` is called before each micro-batch and before the
    update; an exception that it raises interrupts the step. ``replicas`` shares it with other processes.
    """
    loss_scale, replicas = loss_scale or NoLossScale(), replicas or Alone()
    try:
        loss = accumulate_gradients(
            model, batch, num_targets, loss_fn, micro_batch, loss_scale, seed, step, check, replicas
        )
        loss_scale.unscale(optimizer.parameters)
        grad_norm = replicas.clip_grad_norm(optimizer, clip, check)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            replicas.update(optimizer)
        if math.isfinite(loss):  # otherwise a smaller scale would not help
            loss_scale.update(finite)
    finally:
        optimizer.zero_grad()
        model.zero_grad()  # also of parameters that the optimizer does not have
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
    replicas: Alone | None = None,
) -> float:
    """Add ∂L/∂θ, times the loss scale, to the ``.grad`` of every parameter; returns L.

    With ``replicas``, the gradient is that of this process's micro-batches, and L that of all.
    """
    losses, replicas, how = [], replicas or Alone(), (num_targets, loss_scale, seed, step)
    with replicas.dealt(batch, micro_batch or len(batch[0]), how) as parts:
        for part in parts:
            check()
            losses.append(add_gradient(model, loss_fn, part, *how))
    # Only now: ``item`` waits for a GPU, which otherwise computes asynchronously.
    return sum(replicas.all_losses([loss.item() for loss in losses]))


def add_gradient(
    model: Module,
    loss_fn: Callable[..., Tensor],
    part: MicroBatch,
    num_targets: int,
    loss_scale: LossScale | NoLossScale,
    seed: int,
    step: int,
) -> Tensor:
    """Add the gradient of a micro-batch to the ``.grad`` of every parameter; returns its loss."""
    manual_seed(seed, step, part.first)
    loss = loss_fn(model, *part.rows, num_targets=num_targets)
    loss.backward(loss_scale.seed(loss))
    return loss


def evaluate(
    model: Module,
    batches: Iterable[tuple],
    loss_fn: Callable[..., Tensor] = language_model_loss,
    count: Callable[[tuple], int] = count_targets,
    check: Check = do_nothing,
) -> float:
    """The mean loss of the targets in all ``batches``, in eval mode and without gradients.

    ``check()`` is called before every batch; an exception that it raises interrupts the evaluation. Several
    processes take the batches in turn. All of them must call this, and all get the same number.
    """
    processes, sums, targets = distributed.current(), [], 0
    with evaluating(model), no_grad():
        for number, batch in enumerate(batches):
            if number % processes.size == processes.rank:
                check()
                sums.append(loss_fn(model, *batch, num_targets=1).item())
                targets += count(batch)
    sums, targets = zip(*processes.gather((sums, targets)))
    if sum(targets) == 0:
        raise Error("the batches have no targets to evaluate: give some that are not -100")
    in_order = itertools.chain(*itertools.zip_longest(*sums, fillvalue=0.0))
    return sum(in_order) / sum(targets)

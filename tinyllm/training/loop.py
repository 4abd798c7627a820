"""How is a model trained? Step by step, each on its own batch.

``fit`` trains any Module on arrays of your own. ``tinyllm train`` runs the same ``training_steps``, and keeps
a folder with checkpoints and logs (``run.py``).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from typing import NamedTuple

import numpy as np

from tinyllm.backend import compute_dtype
from tinyllm.checks import check_at_least, is_integer
from tinyllm.errors import Error
from tinyllm.nn import Module
from tinyllm.optim import AdamW, LossScale, NoLossScale
from tinyllm.tensor import Tensor
from tinyllm.training.step import (
    Alone,
    count_targets,
    language_model_loss,
    training_step,
    weights_are_finite,
)
from tinyllm.training.workers import Workers

LEARNING_RATE = 3e-4


class CompletedStep(NamedTuple):
    """The inputs and the results of one step."""

    step: int  # counted from 1
    batch: tuple
    lr: float
    loss_scale: float  # 1 except in float16
    seconds: float
    loss: float
    grad_norm: float  # before clipping
    updated: bool  # False if loss or grad_norm is not finite: the weights are unchanged

    @property
    def overflowed(self) -> bool:
        """Whether the update was skipped because the scaled gradients overflowed."""
        return not self.updated and math.isfinite(self.loss) and self.loss_scale > 1

    def what_is_not_finite(self) -> str:
        return (
            f"the loss is {self.loss} and the gradient norm {self.grad_norm} at learning rate {self.lr:.3g}"
        )


def training_steps(
    model: Module,
    optimizer: AdamW,
    batch_at: Callable[[int], tuple],
    count: Callable[[tuple], int],
    loss_fn: Callable[..., Tensor],
    lr_at: Callable[[int], float],
    steps: Iterable[int],
    loss_scale: LossScale | NoLossScale,
    **options,
) -> Iterator[CompletedStep]:
    """Run the ``steps`` (numbers from 0) lazily, one per iteration.

    ``batch_at(step)`` is the batch of a step, ``count(batch)`` the number of its targets and ``lr_at(step)``
    its learning rate; ``options`` are those of ``training_step``.
    """
    for step in steps:
        started = time.perf_counter()
        batch = _batch(batch_at, step)
        num_targets = _number_of_targets(count(batch), step)
        optimizer.lr, scale = lr_at(step), loss_scale.scale
        # A run that diverges ends with one message, without NumPy's warnings.
        with np.errstate(over="ignore", invalid="ignore"):
            result = training_step(
                model, optimizer, batch, num_targets, loss_fn, loss_scale=loss_scale, step=step, **options
            )
        yield CompletedStep(step + 1, batch, optimizer.lr, scale, time.perf_counter() - started, *result)


def fit(
    model: Module,
    batch_at: Callable[[int], np.ndarray | tuple],
    steps: int = 100,
    lr: float | Callable[[int], float] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    count: Callable[[tuple], int] | None = None,
    micro_batch: int | None = None,
    optimizer: AdamW | None = None,
    on_step: Callable[[Module, AdamW, dict], object] | None = None,
    *,
    clip: float = 1.0,
    seed: int = 0,
    first_step: int = 0,
    processes: int = 1,
) -> list[dict]:
    """Train a model; returns a record of every step: ``step`` (from 1), ``loss``, ``lr`` and ``grad_norm``.

    ``batch_at(step)``, a pure function of the step (from 0), returns an array or a tuple of arrays that share
    axis 0. ``count(batch)`` returns its number of targets: by default, those in the last array that are not
    -100. ``loss_fn(model, *rows, num_targets)`` returns a sum over some rows of the arrays, divided by
    ``num_targets``; by default it is ``model.loss``. Gradients are accumulated over ``micro_batch`` rows.

    ``lr`` is a learning rate or a function of the step; by default the ``optimizer``'s, or 3e-4 with AdamW on
    the parameters that require a gradient when ``fit`` is called. An optimizer of your own is a subclass of
    ``AdamW`` that defines ``step``, see there. Gradients are clipped to the norm ``clip``. Dropout is on; its
    mask depends on ``seed``, the step and the row (axis 0 of the input of ``F.dropout``), so ``micro_batch``
    does not change it. ``on_step(model, optimizer, record)`` is called after every step.

    Several ``processes`` share every step, a core each, which makes small models faster (``workers.py``; on
    Linux). The others see the model, ``loss_fn`` and what these refer to as they were at the call.

    To resume after ``first_step`` steps, give the weights and the optimizer's state that they ended with: the
    further ``steps`` are bitwise those of one run (in float16 only up to the loss scale, which begins anew).

    Raises ``Error`` for an invalid argument, batch or loss, and FloatingPointError, before the update, if the
    loss or the gradient norm is not finite, and at the end if the weights are not. The dtype of products is
    that of the enclosing ``backend.autocast``; in float16 the loss is scaled, and a step whose gradients
    overflow is skipped (its grad_norm is not finite).
    """
    _check_arguments(
        batch_at, steps, first_step, micro_batch, clip, seed, loss_fn=loss_fn, count=count, on_step=on_step
    )
    check_at_least(processes, 1, "processes")
    optimizer = AdamW(model, LEARNING_RATE) if optimizer is None else optimizer
    _check_optimizer(optimizer, model)
    if loss_fn is None and not hasattr(model, "loss"):
        raise Error(f"a {type(model).__name__} has no method loss(ids, targets, num_targets): give a loss_fn")
    records, first_lr = [], optimizer.lr
    loss_scale = LossScale() if compute_dtype() == np.float16 else NoLossScale()
    data = batch_at, count or count_targets, _checked(loss_fn)
    lr_at, numbers = _schedule(first_lr if lr is None else lr), range(first_step, first_step + steps)
    options = dict(micro_batch=micro_batch, clip=clip, seed=seed)
    modes = [(module, module.training) for module in model.modules()]
    model.train().zero_grad()
    try:
        with _sharing(processes, model, optimizer, data[-1]) as options["replicas"]:
            for completed in training_steps(model, optimizer, *data, lr_at, numbers, loss_scale, **options):
                if not completed.updated and not completed.overflowed:
                    raise FloatingPointError(
                        f"step {completed.step}: {completed.what_is_not_finite()}: use a smaller lr"
                    )
                records.append({key: getattr(completed, key) for key in ("step", "loss", "lr", "grad_norm")})
                if on_step is not None:
                    on_step(model, optimizer, records[-1])
                    model.train()  # on_step may have changed the mode
        if not weights_are_finite(model):
            raise FloatingPointError(
                f"the weights after step {first_step + steps} are not finite: use a smaller lr"
            )
    finally:
        optimizer.lr = first_lr
        for module, mode in modes:
            module.training = mode
    return records


def _sharing(processes: int, *of_a_step):
    """The context within which processes share steps."""
    return closing(Workers(processes, *of_a_step)) if processes > 1 else nullcontext(Alone())


def _check_arguments(
    batch_at, steps: int, first_step: int, micro_batch: int | None, clip, seed: int, **functions
) -> None:
    if not callable(batch_at):
        raise Error(f"batch_at is a {type(batch_at).__name__}: give a function of the step's number")
    check_at_least(steps, 1, "steps")
    check_at_least(first_step, 0, "first_step")
    check_at_least(seed, 0, "seed")
    if seed >= 2**64 or not isinstance(clip, int | float) or not clip > 0:
        raise Error(f"seed is {seed} and clip {clip!r}: choose a seed below 2**64 and a clip above 0")
    if micro_batch is not None:
        check_at_least(micro_batch, 1, "micro_batch")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise Error(f"{name} is a {type(function).__name__}: give a function, or omit it")


def _check_optimizer(optimizer, model: Module) -> None:
    if not isinstance(optimizer, AdamW):  # a Muon is one, too
        what = type(optimizer).__name__
        raise Error(
            f"optimizer is a {what}: give an optim.AdamW, an optim.Muon, or a subclass with its own step()"
        )
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for _, parameter in optimizer.parameters):
        raise Error(
            "the optimizer has no parameter of the model, so nothing would be trained: make it of this model"
        )


def _batch(batch_at, step: int) -> tuple:
    try:
        arrays = batch_at(step)
    except StopIteration:  # of next(iterator)
        raise Error(f"batch_at({step}) has no more data: train fewer steps, or begin again") from None
    batch = arrays if isinstance(arrays, tuple) else (arrays,)
    rows = {array.shape[0] if getattr(array, "shape", ()) else 0 for array in batch}
    if len(rows) != 1 or rows == {0}:
        found = ", ".join(str(getattr(array, "shape", type(array).__name__)) for array in batch)
        raise Error(
            f"batch_at({step}) returned ({found}): give an array, or a tuple of arrays, with the same number "
            "of rows in each, at least one"
        )
    return batch


def _number_of_targets(count, step: int) -> int:
    if not is_integer(count) or count < 0:
        raise Error(f"count(batch) of step {step} is {count!r}: give the batch's number of targets")
    if count == 0:
        raise Error(f"the batch of step {step} has no targets: give at least one that is not -100")
    return count


def _schedule(lr) -> Callable[[int], float]:
    def lr_at(step: int) -> float:
        rate = lr(step) if callable(lr) else lr
        if not isinstance(rate, int | float | np.number) or not 0 <= rate < math.inf:
            raise Error(f"the learning rate of step {step} is {rate!r}: give a number of at least 0")
        return float(rate)

    return lr_at


def _checked(loss_fn: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """The loss of ``fit``, which raises ``Error`` if the result is not a loss."""

    def checked(model: Module, *rows, num_targets: int) -> Tensor:
        if loss_fn is None and len(rows) != 2:
            raise Error(f"model.loss takes ids and targets, not {len(rows)} arrays: give a loss_fn")
        loss = (loss_fn or language_model_loss)(model, *rows, num_targets=num_targets)
        if not isinstance(loss, Tensor) or loss.size != 1:
            what = f"a Tensor of shape {loss.shape}" if isinstance(loss, Tensor) else type(loss).__name__
            raise Error(f"loss_fn returned {what}: give a Tensor of one number, a sum / num_targets")
        return loss

    return checked

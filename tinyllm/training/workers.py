"""How do several cores compute one step of a small model?

An op of a small model takes microseconds. Divided among threads it takes hardly less: Python's interpreter
runs one thread at a time, and waking another takes as long as the op. So the rows of the batch are divided
instead, among processes: this one and workers, each with one core and an interpreter of its own.

    parameters θ      in memory that all share; only this process writes them
    gradients g_r     of process r's rows, in memory that it shares with this one
    a step            each process: g_r = ∂/∂θ Σ loss of its rows / N;  this one: g = Σ g_r, clip, update θ

Every process divides by the number N of all targets, and dropout's masks depend on the row of the batch, so
g is the gradient of the batch as one process computes it in micro-batches. The sum has a fixed order: the
numbers of a run depend on how many processes it has, but not on which finishes first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from tinyllm.backend import distributed
from tinyllm.backend.forked import Forked, can_fork, shared_copies
from tinyllm.backend.memory import private_memory
from tinyllm.backend.threads import in_this_thread, num_threads, one_blas_thread
from tinyllm.errors import Error
from tinyllm.models.mixture import is_balanced
from tinyllm.nn import Module
from tinyllm.optim import AdamW
from tinyllm.optim.parameters import each_block_of, rows
from tinyllm.tensor import Tensor
from tinyllm.training.data_parallel import runs
from tinyllm.training.step import Alone, MicroBatch, add_gradient, micro_batches

# Parameters. A step of 3 million takes 0.87 of the time that two threads need, one of 11 million the same.
SMALL_MODEL = 2**22


def suitable_number(model: Module, rows: int) -> int:
    """How many processes should share a step of ``rows`` rows: one for each core if the model is small.

    A mixture of experts has a load-balancing loss for each part of a batch, so it is not divided unasked.
    """
    small = model.num_parameters() <= SMALL_MODEL and not is_balanced(model)
    if not (small and on_host(model) and can_fork()) or distributed.current().size > 1:
        return 1
    return min(num_threads(), rows)


def on_host(model: Module) -> bool:
    return all(isinstance(parameter.data, np.ndarray) for parameter in model.parameters())


class Workers(Alone):
    """This process and ``number - 1`` workers; see the top of this file. They live until ``close``.

    A worker has the model, the loss and their options as they were when this was made; only the values of
    the optimizer's parameters are those of now. Raises ``Error`` where processes cannot be forked.
    """

    def __init__(self, number: int, model: Module, optimizer: AdamW, loss_fn: Callable[..., Tensor]):
        if not (can_fork() and on_host(model)):
            raise Error(f"{number} processes can share a step only on Linux and on the CPU: use 1")
        self._model, self._loss_fn, self._workers = model, loss_fn, []
        self._parameters = [parameter for _, parameter in optimizer.parameters]
        data = [parameter.data for parameter in self._parameters]
        self._weights = shared_copies(data)
        self._gradients = [shared_copies([np.zeros_like(array) for array in data]) for _ in range(number - 1)]
        self._share_weights()
        try:
            for gradients in self._gradients:
                self._workers.append(Forked(partial(self._compute, gradients)))
        except BaseException:
            self.close()
            raise

    def _compute(self, gradients: list, parts: list[MicroBatch], how: tuple) -> tuple[list, list]:
        """In a worker: fill its ``gradients``; returns the losses, and which parameters have a gradient."""
        with np.errstate(over="ignore", invalid="ignore"):  # as in ``training_steps``
            losses = [add_gradient(self._model, self._loss_fn, part, *how).item() for part in parts]
        found = [parameter.grad is not None for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, gradients):
            if parameter.grad is not None:
                gradient[...] = parameter.grad
        self._model.zero_grad()
        return losses, found

    def close(self) -> None:
        """End the workers. The parameters keep their values."""
        while self._workers:
            self._workers.pop().close()

    def memory(self) -> int:
        return sum(private_memory(worker.pid) for worker in self._workers)

    def _share_weights(self) -> None:
        """Bring arrays by which the parameters' were replaced, as loading weights does, to the workers."""
        for parameter, shared in zip(self._parameters, self._weights):
            if parameter.data is not shared:
                if parameter.shape != shared.shape or parameter.dtype != shared.dtype:
                    raise Error(
                        f"a parameter was replaced by {parameter.dtype} {parameter.shape} for {shared.dtype} "
                        f"{shared.shape}, which processes that share a step do not see: use 1 process"
                    )
                shared[...] = parameter.data
                parameter.data = shared

    @contextmanager
    def dealt(self, batch: tuple, size: int, how: tuple) -> Iterator[list[MicroBatch]]:
        """Each process computes a run of the micro-batches, which are at most its share of the rows."""
        self._share_weights()
        number = len(self._workers) + 1
        share = -(-len(batch[0]) // number)
        own, *others = runs(micro_batches(batch, min(size, share)), number)
        try:
            for worker, parts in zip(self._workers, others):
                worker.ask(parts, how)
            with in_this_thread(), one_blas_thread():
                yield own
        except BaseException:
            self.close()  # what they compute is of no use any more
            raise

    def all_losses(self, losses: list[float]) -> list[float]:
        """The losses in order; the workers' gradients are added to those of this process."""
        try:
            answers = [worker.answer() for worker in self._workers]
        except BaseException:
            self.close()
            raise
        self._add([found for _, found in answers])
        return [*losses, *itertools.chain.from_iterable(theirs for theirs, _ in answers)]

    def _add(self, found: list[list[bool]]) -> None:
        """Add the workers' gradients to those of this process, in order, where they have ``found`` one."""
        sums, addends = [], []
        for index, parameter in enumerate(self._parameters):
            theirs = [arrays[index] for arrays, here in zip(self._gradients, found) if here[index]]
            if parameter.grad is None and theirs:  # this process had no rows
                parameter.grad = theirs.pop(0).copy()
            if theirs:
                sums.append(rows(parameter.grad))
                addends.append([rows(array) for array in theirs])

        def add(i, block):
            for addend in addends[i]:
                sums[i][block] += addend[block]

        each_block_of(sums, add)

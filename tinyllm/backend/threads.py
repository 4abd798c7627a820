"""Blocks of work and matrix products on all cores."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
from threadpoolctl import ThreadpoolController

SMALL_PRODUCT = 2**20  # multiplications: below, starting a second thread costs more than it saves
FEW_ROWS = 16  # below, a product takes the time of reading its matrix
BLOCK = 128 * 1024  # elements: small enough for the cache, large enough that the GIL is no bottleneck


def num_threads() -> int:
    """Threads for our own pool: as many as the user allows BLAS, else the cores we may run on.

    The user says so in OMP_NUM_THREADS, or in OPENBLAS_NUM_THREADS where that is not set.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        asked = os.environ.get(name, "")
        if asked.isdecimal() and int(asked) > 0:
            return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Workers:
    """The pool and the handle on BLAS's own threads, made when first needed."""

    pool = blas = None
    busy = threading.local()


def _forget_workers():
    _Workers.pool = _Workers.blas = None


if hasattr(os, "register_at_fork"):  # a forked child inherits the object, but not its threads
    os.register_at_fork(after_in_child=_forget_workers)


def run_tasks(function, tasks: list) -> None:
    """``function(task)`` for every task, on all cores. Tasks write to places of their own.

    Every thread, this one too, takes the next task when it is done with one: to hand over each by itself
    would take longer than a small one. What a task raises ends its thread's share, and is raised here.
    """
    if getattr(_Workers.busy, "first_task_only", False):
        tasks = tasks[:1]
    helpers = min(num_threads(), len(tasks)) - 1
    if helpers < 1 or in_task():
        for task in tasks:
            function(task)
        return
    if _Workers.pool is None:
        _Workers.pool = ThreadPoolExecutor(num_threads(), thread_name_prefix="tinyllm")
    left = collections.deque(tasks)

    def work():
        _Workers.busy.flag = True  # work inside a task stays in its thread
        try:
            while (task := _next(left)) is not None:
                function(task)
        finally:
            _Workers.busy.flag = False

    # A copy of our context each: np.errstate holds in the helpers, too.
    running = [_Workers.pool.submit(contextvars.copy_context().run, work) for _ in range(helpers)]
    try:
        work()
    finally:
        wait(running)  # they write into our arrays
    for helper in running:
        helper.result()


def _next(tasks: collections.deque):
    """The next task, for one thread only; None if there is none left."""
    try:
        return tasks.popleft()
    except IndexError:
        return None


@contextlib.contextmanager
def first_task_only():
    """Within this block ``run_tasks`` runs the first of its tasks: they are alike, and only shapes matter."""
    _Workers.busy.first_task_only = True
    try:
        yield
    finally:
        _Workers.busy.first_task_only = False


def in_task() -> bool:
    """Whether this thread is at work for ``run_tasks``, beside others."""
    return getattr(_Workers.busy, "flag", False)


@contextlib.contextmanager
def one_blas_thread():
    """While our pool runs matrix products, BLAS does not start threads of its own.

    Telling it takes as long as a small product; inside another such block there is nothing to tell, so
    that whoever runs many small ones puts one block around them all.
    """
    if getattr(_Workers.busy, "one_blas_thread", False):
        yield
        return
    if _Workers.blas is None:
        _Workers.blas = ThreadpoolController()
    _Workers.busy.one_blas_thread = True
    try:
        with _Workers.blas.limit(limits=1, user_api="blas"):
            yield
    finally:
        _Workers.busy.one_blas_thread = False


def step_of_few_rows():
    """What to put around a pass of the model over few rows, as when a text is written token by token.

    Its products take the time of reading every weight once, and BLAS's own threads, still awake from the
    product before, share that in two microseconds where our pool would take fifty: measured on two cores,
    18 ms a token of SmolLM2-135M instead of 27. But OpenBLAS's threads stay awake for 2**26 ticks of the
    clock, offering their core to others all that time, and where another program takes it each product
    waits for it to come back: 600 ms a token. With OPENBLAS_THREAD_TIMEOUT=20, 2**20 ticks, it is 40 to 70.
    OpenBLAS reads that when it is loaded: ``import tinyllm`` sets it if NumPy is not there yet. Without it
    BLAS has one thread in this block.
    """
    return contextlib.nullcontext() if _BLAS_FALLS_ASLEEP else one_blas_thread()


_BLAS_FALLS_ASLEEP = "OPENBLAS_THREAD_TIMEOUT" in os.environ


def matmul(a, b, out=None, bias=None):
    """a @ b (+ bias, a row, if given) for matrices, the rows of the result shared out among our threads.

    BLAS could use all cores by itself, but its threads go on spinning for a while after each product, and
    take the cores from the elementwise work that follows. After a product of few rows there is hardly any:
    it is left to BLAS (see ``step_of_few_rows``).
    """
    if not isinstance(a, np.ndarray) or len(a) < FEW_ROWS:
        out = np.matmul(a, b, out=out)
        if bias is not None:
            out += bias
        return out
    if out is None:
        out = np.empty((a.shape[0], b.shape[1]), a.dtype, like=a)

    def multiply(part):
        np.matmul(a[part], b, out=out[part])
        if bias is not None:  # while the part is in the cache
            out[part] += bias

    small = a.size * b.shape[1] <= SMALL_PRODUCT
    with one_blas_thread():
        run_tasks(multiply, [slice(None)] if small else _shares(len(a)))
    return out


def _shares(length: int) -> list[slice]:
    """``range(length)`` in parts of nearly the same size, one for each of our threads."""
    step = -(-length // num_threads())
    return [slice(start, start + step) for start in range(0, length, step)]


def each_block(function, rows: int, row_size: int, like) -> None:
    """``function(slice)`` over ``range(rows)`` in blocks of about BLOCK elements, on all cores.

    The blocks depend on the shape only, so a result does not depend on the number of threads. On a
    device array there is one call: a GPU wants one large kernel, not many small ones.
    """
    step = max(1, BLOCK // max(1, row_size))
    if not isinstance(like, np.ndarray) or rows <= step:
        function(slice(0, rows))
        return
    run_tasks(function, [slice(start, min(start + step, rows)) for start in range(0, rows, step)])

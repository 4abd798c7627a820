"""Blockwise work and matrix products on all cores."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import threading
from collections.abc import Sequence

import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_limits

from tinyllm.backend.helpers import run_parts
from tinyllm.backend.recording import as_one_call

# Handing work to a second thread takes 25 to 100 microseconds, most of which the system needs to wake it.
SMALL_PRODUCT = 2**23  # multiplications; below, a second thread costs more than it saves
WIDE = 3  # columns per row of a result from which its columns are split among threads
FEW_ROWS = 16  # below, a product is limited by reading its matrix
UNPACKED = 10**6  # multiplications, below which OpenBLAS with AVX-512 does not copy the operands first
FEW_ROWS_PRODUCT = 2**17  # multiplications of few rows, from which the matrix is read in blocks
SHARED = 2**18  # elements of a matrix from which a product of few rows is shared among threads
HEAD_START = 2**17  # elements that a thread reads until another one is awake, in 40 microseconds
BLOCK = 2**17  # elements: small enough for the cache, large enough to keep the GIL from being a bottleneck
FEW_BLOCKS = 3  # elementwise work on so many blocks is done before a second thread is at work


VARIABLES = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"


def num_threads() -> int:
    """How many threads work: OMP_NUM_THREADS, else OPENBLAS_NUM_THREADS, else the available cores."""
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return len(available_cores())


def available_cores() -> list[int]:
    """The numbers of the cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def threads_are_chosen() -> bool:
    """Whether the environment says how many threads to use."""
    return any(os.environ.get(name) for name in VARIABLES)


def use_threads(number: int) -> None:
    """Use this many threads from now on, as if OMP_NUM_THREADS had been set at the start."""
    os.environ[VARIABLES[0]] = str(number)
    threadpool_limits(limits=number, user_api="blas")


class _Workers:
    """BLAS's libraries, found when first used, and what each thread is doing."""

    blas = None
    busy = threading.local()


def run_tasks(function, tasks: Sequence, elements: float = math.inf) -> None:
    """Call ``function(task)`` for every task, on all cores. Tasks must not write to the same memory.

    Each thread, including this one, takes the next task from a shared queue, because submitting tasks one by
    one takes longer than a small task. An exception ends the thread's work and is raised here. If all tasks
    together work on few ``elements``, they are done in this thread before another one would be at work.
    """
    if getattr(_Workers.busy, "first_task_only", False):
        tasks = tasks[:1]
    helpers = min(threads_for(elements), len(tasks)) - 1
    if helpers < 1:
        for task in tasks:
            function(task)
        return
    left = collections.deque(tasks)

    def work(_):
        _Workers.busy.flag = True  # nested work stays in this thread
        try:
            while (task := _next(left)) is not None:
                function(task)
        finally:
            _Workers.busy.flag = False

    run_parts(work, [None] * (helpers + 1))


def threads_for(elements: float) -> int:
    """How many threads ``run_tasks`` gives to work on so many elements."""
    return 1 if elements <= FEW_BLOCKS * BLOCK or in_task() else num_threads()


def _next(tasks: collections.deque):
    """The next task, or None if none is left. Thread-safe."""
    try:
        return tasks.popleft()
    except IndexError:
        return None


@contextlib.contextmanager
def first_task_only():
    """Within this block ``run_tasks`` runs only the first task, to measure what depends on shapes only."""
    _Workers.busy.first_task_only = True
    try:
        yield
    finally:
        _Workers.busy.first_task_only = False


@contextlib.contextmanager
def in_this_thread():
    """Within this block ``run_tasks`` runs all tasks in this thread."""
    before, _Workers.busy.flag = in_task(), True
    try:
        yield
    finally:
        _Workers.busy.flag = before


def in_task() -> bool:
    """Whether this thread is running a task of ``run_tasks`` in parallel with others."""
    return getattr(_Workers.busy, "flag", False)


class one_blas_thread:
    """Within this block BLAS uses one thread, because our own threads run products in parallel.

    In a nested block the setting is not changed again, so many small products should be surrounded by one.
    """

    def __enter__(self):
        self.before = []
        self.outermost = not getattr(_Workers.busy, "one_blas_thread", False)
        if not self.outermost:
            return
        if _Workers.blas is None:
            libraries = ThreadpoolController().lib_controllers
            _Workers.blas = [library for library in libraries if library.user_api == "blas"]
        _Workers.busy.one_blas_thread = True
        # Not by the controller's limit(), which asks every library for all that it knows: 10 microseconds.
        for library in _Workers.blas:
            if (number := library.get_num_threads()) != 1:
                self.before.append((library, number))
                library.set_num_threads(1)

    def __exit__(self, *exception):
        for library, number in self.before:
            library.set_num_threads(number)
        if self.outermost:
            _Workers.busy.one_blas_thread = False


def step_of_few_rows(rows: int):
    """Context manager for a forward pass over few rows, such as a decoding step.

    The time of its products is that of reading every weight once. With one row, BLAS's threads, still
    spinning after the previous product, start in two microseconds, our own threads in fifty: a token of
    SmolLM2-135M takes 18 ms instead of 27 on two cores. But OpenBLAS's threads spin for 2**26 clock ticks and
    yield their core meanwhile. If another program takes it, each product waits until it is returned: 600 ms
    per token. With OPENBLAS_THREAD_TIMEOUT=20 (2**20 ticks) it is 40 to 70 ms. OpenBLAS reads the variable
    when it is loaded, and ``import tinyllm`` sets it unless NumPy was imported before. Without it, and with
    several rows (see ``few_rows``), BLAS uses one thread in this block.
    """
    return contextlib.nullcontext() if rows == 1 and _BLAS_THREADS_SLEEP else one_blas_thread()


_BLAS_THREADS_SLEEP = "OPENBLAS_THREAD_TIMEOUT" in os.environ


def matmul(a, b, out=None, bias=None):
    """a @ b for matrices (+ the row ``bias`` if given), on all cores.

    BLAS's own threads keep spinning after each product, so that they start the next one at once, and compete
    for the cores with the elementwise work that follows. If they soon sleep (see ``step_of_few_rows``) they
    are used: 128 rows pass through SmolLM2-135M in 0.86 of the time, 4,096 through a small GPT-2 in the same.

    Otherwise BLAS has one thread, and our own share the rows or the columns. BLAS copies both operands into
    the order in which it reads them, and every thread copies the one that is not split. So the columns are
    split if they are many more than the rows, as in the prefill of a prompt.
    """
    on_host = isinstance(a, np.ndarray)
    if out is None and on_host:
        out = np.empty((a.shape[0], b.shape[1]), a.dtype, like=a)
    if not on_host or len(a) < FEW_ROWS:
        if on_host and len(a) > 1 and len(a) * b.size > FEW_ROWS_PRODUCT and b.T.flags.c_contiguous:
            out = few_rows(a, b.T, out)
        else:
            out = np.matmul(a, b, out=out)
        if bias is not None:
            out += bias
        return out

    limited = in_task() or getattr(_Workers.busy, "one_blas_thread", False)
    if _BLAS_THREADS_SLEEP and not limited:
        np.matmul(a, b, out=out)
        if bias is not None:
            each_block(lambda rows: np.add(out[rows], bias, out=out[rows]), *out.shape, like=out)
        return out

    def multiply(part):
        rows, columns = part
        np.matmul(a[rows], b[:, columns], out=out[part])
        if bias is not None:
            out[part] += bias[columns]

    (rows, columns), every = out.shape, slice(None)
    if a.size * columns <= SMALL_PRODUCT:
        parts = [(every, every)]
    elif columns >= WIDE * rows:
        parts = [(every, share) for share in _shares(columns, multiple=64)]
    else:
        parts = [(share, every) for share in _shares(rows)]
    with one_blas_thread():
        run_tasks(multiply, parts)
    return out


@as_one_call
def few_rows(a, *products):
    """``out`` = a wᵀ for few rows a (M, in) and each w (out, in), given as (w, out, w, out, ...).

    BLAS copies w into the order in which it reads it, which takes longer than multiplying it by few rows: 8
    rows cost as much as 5 products of one row. So a block of rows of w is multiplied at a time. OpenBLAS's
    kernels for small products do not copy, and others copy a block that is still in the cache when it is
    read. Several matrices are shared among the threads as one.
    """
    rows, (M, K) = 64, a.shape
    while rows > 1 and rows * M * K > UNPACKED:
        rows //= 2

    def multiply(part):
        for w, out in part:
            count = len(w) // rows
            blocks, whole = w[: count * rows].reshape(count, rows, K), out[:, : count * rows]
            np.matmul(a, blocks.swapaxes(1, 2), out=whole.reshape(M, count, rows).swapaxes(0, 1))
            if count * rows < len(w):
                np.matmul(a, w[count * rows :].T, out=out[:, count * rows :])

    pairs = list(zip(products[::2], products[1::2]))
    total = sum(len(w) for w, _ in pairs)
    threads = 1 if total * K < SHARED or in_task() else num_threads()
    with one_blas_thread():
        run_parts(multiply, _divided(pairs, total, threads, HEAD_START // K, rows))
    return products[-1]


def _divided(pairs: list, total: int, threads: int, head_start: int, multiple: int) -> list[list]:
    """The ``total`` rows of the matrices w of ``pairs`` (w, out) in a list of (w, out) for each thread.

    All get equally many, but the first one ``head_start`` more, in multiples of a number.
    """
    parts, ends = [], [(head_start + n * max(0, total - head_start) // threads) for n in range(1, threads)]
    ends = [*(min(total, end // multiple * multiple) for end in ends), total]
    for first, stop in zip([0, *ends], ends):
        part, start = [], 0
        for w, out in pairs:
            rows = slice(max(first - start, 0), max(stop - start, 0))
            if len(w[rows]):
                part.append((w[rows], out[:, rows]))
            start += len(w)
        parts += [part] if part else []
    return parts


def sum_rows(a):
    """Σ_rows of a matrix, on all cores: partial sums of blocks, added in order."""
    parts = {}

    def add(rows):
        parts[rows.start] = np.ones_like(a, shape=len(a[rows])) @ a[rows]

    each_block(add, *a.shape, like=a)
    return in_order(parts)


def in_order(parts: dict):
    """The sum of the blocks' parts by their first rows: it must not depend on which thread finishes first."""
    return sum(parts[start] for start in sorted(parts))


def sum_last_axis(x):
    """Σ over the last axis of x (..., C) as (..., 1): a product with ones, in a quarter of ``sum``'s time."""
    return (x @ np.ones_like(x, shape=x.shape[-1:]))[..., None]


def _shares(length: int, multiple: int = 1) -> list[slice]:
    """Split ``range(length)`` into slices of nearly equal size, one for each thread."""
    step = -(-length // (num_threads() * multiple)) * multiple
    return [slice(start, start + step) for start in range(0, length, step)]


def each_block(function, rows: int, row_size: int, like) -> None:
    """Call ``function(slice)`` for blocks of ``range(rows)`` of about BLOCK elements each, on all cores.

    The blocks depend on the shape only, so results do not depend on the number of threads. For a GPU array
    there is one call, because one large kernel is faster than many small ones.
    """
    if not isinstance(like, np.ndarray):
        function(slice(0, rows))
        return
    starts = _starts(rows, row_size)
    sums = min(rows, row_size) > 1  # which may be products
    with one_blas_thread() if sums else contextlib.nullcontext():
        run_tasks(lambda start: function(_block(start, starts.step, rows)), starts, rows * row_size)


def blocks_of(rows: int, row_size: int) -> list[slice]:
    """``range(rows)`` in slices of about BLOCK elements each."""
    starts = _starts(rows, row_size)
    return [_block(start, starts.step, rows) for start in starts]


def _starts(rows: int, row_size: int) -> range:
    return range(0, max(rows, 1), max(1, BLOCK // max(1, row_size)))


def _block(start: int, step: int, rows: int) -> slice:
    return slice(start, min(start + step, rows))

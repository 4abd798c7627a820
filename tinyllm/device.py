"""Where do the arrays live, who draws the random numbers, and how are all cores used?

The ops call NumPy; a CuPy array takes the call over by NumPy's own dispatch (NEP 13, 18, 35), so what
is here is the little that is left: scattering, addressed random numbers, and blocks of work on threads.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import ctypes
import math
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController

from tinyllm import kernels
from tinyllm.errors import Error

# ------------------------------------------------------------------------------------- types


def dtype_of(name) -> np.dtype:
    """The dtype of that name: float32, float64, or one of the short ones, bfloat16 and float16.

    What is a dtype, or NumPy's class for one, stands for itself.
    """
    if isinstance(name, str) and name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products on a GPU may round what they multiply to TF32: 10 bits for 23, and faster.

    They add up in float32 either way. It concerns the whole process; at first it is not allowed.
    """
    kernels.Products.tf32 = allowed


# ---------------------------------------------------------------------------------- placement


def pick_device(name: str) -> str:
    """The device a name means: "auto" is "cuda" if CuPy sees a GPU, else "cpu"; others stand as they are.

    Raises ``Error`` for another name, and for a GPU that is not there, or that CuPy cannot use.
    """
    if name == "auto":
        try:
            return pick_device("cuda")
        except Error:
            return "cpu"
    kind, colon, number = name.partition(":")
    numbered = number.isascii() and number.isdecimal()
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not numbered)):
        raise Error(f"unknown device {name!r}; use auto, cpu, cuda, or cuda:1 and so on")
    if kind == "cuda":
        gpus = _gpus_seen(name)
        if int(number or 0) >= gpus:
            raise Error(f"there is no device {name!r}: CuPy sees {gpus} GPUs, numbered from 0")
    return name


def _gpus_seen(name: str) -> int:
    try:
        import cupy
    except ModuleNotFoundError:
        raise Error(
            f"device {name!r} needs a GPU and CuPy: pip install 'tinyllm[gpu12]' for CUDA 12, gpu13 for 13, "
            "or choose cpu"
        ) from None
    except ImportError as error:  # its message is a page: what it is about stands first
        reason = " ".join(str(error).split())[:200]
        raise Error(f"device {name!r}: CuPy does not load ({reason}): install it again") from None
    try:
        return cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's own: no driver, or one older than the CUDA it is built for
        raise Error(
            f"device {name!r}: CuPy {cupy.__version__} finds no GPU ({error}): see to the driver "
            "(nvidia-smi), and that this CuPy is the one for its CUDA (gpu12 or gpu13)"
        ) from None


def to_device(array, device: str):
    """The array on "cpu" or "cuda[:N]": itself if it is there, else a copy. Raises Error as `pick_device`.

    CuPy computes on one GPU at a time, the thread's current one: that is, from here on, the one named.
    """
    device = pick_device(device)
    if device == "cpu":
        return array if isinstance(array, np.ndarray) else array.get()
    import cupy

    cupy.cuda.Device(number_of(device)).use()
    return cupy.asarray(array)


def beside(array, like):
    """The array on the device of ``like``: itself if it is there, else a copy."""
    if isinstance(like, np.ndarray):
        return array if isinstance(array, np.ndarray) else array.get()
    if type(array) is type(like) and array.device == like.device:
        return array
    with like.device:
        return np.asarray(array, like=like)


def number_of(device: str) -> int:
    """Which GPU "cuda:1" is: the first unless it says so."""
    return int(device.partition(":")[2] or 0)


# ------------------------------------------------------------------------------- scattering


def scatter_add(buffer, index, values) -> None:
    """``buffer[index] += values`` where an element named twice receives both; ``buffer`` is contiguous."""
    # np.add.at is fast on one dimension only: address every element by its flat position.
    rows = hasattr(index, "dtype") and index.dtype.kind in "iu"  # of an embedding
    if rows and kernels.library_of(buffer) is not None:
        kernels.add_rows_at(buffer, index, values)
        return
    if rows:  # no table needed
        size = math.prod(buffer.shape[1:])
        places = index.reshape(-1, 1).astype(np.int64) * size + np.arange(size, like=buffer)
    else:
        places = np.arange(buffer.size, like=buffer).reshape(buffer.shape)[index]
    np.add.at(buffer.reshape(-1), places.reshape(-1), values.reshape(-1))


# --------------------------------------------------------------------------- random numbers


class _Stream(threading.local):
    seed, step, micro_batch, op = 0, 0, 0, 0


_stream = _Stream()


def manual_seed(seed: int, step: int = 0, micro_batch: int = 0) -> None:
    """Dropout from here on, in this thread, follows from these three numbers alone.

    Every dropout is addressed by (seed, step, micro_batch, number of the op since this call), so a
    mask can be drawn again for the backward pass, and a resumed run needs no generator state.
    """
    _stream.seed, _stream.step, _stream.micro_batch, _stream.op = seed, step, micro_batch, 0


def next_address() -> tuple[int, int, int, int]:
    """The address (seed, step, micro_batch, op) of one op's random numbers; the next call gets another."""
    address = (_stream.seed, _stream.step, _stream.micro_batch, _stream.op)
    _stream.op += 1
    return address


def dropout_mask(address, block: int, shape, p: float, like):
    """0 with probability ``p``, else 1/(1 - p), in ``like``'s dtype: the same every time for an address.

    Philox is a function from a counter and a key to random bits (Salmon et al., "Parallel Random
    Numbers: As Easy as 1, 2, 3", SC 2011): nothing is remembered between draws. ``block`` tells
    apart the parts of one op that are drawn one after the other. Sixteen bits decide each element (a
    quarter of the cost of a float32), so it is zero with probability round(65536 p) / 65536.
    """
    if kernels.library_of(like) is not None:
        kept = kernels.dropout_kept(address, [block], math.prod(shape), p, like).reshape(shape)
        return (kept * kernels.wide(like.dtype).type(1 / (1 - p))).astype(like.dtype, copy=False)
    seed, step, micro_batch, op = address
    key, counter = np.array([seed, step], np.uint64), np.array([0, block, op, micro_batch], np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    size = math.prod(shape)
    draws = bits.random_raw(-(-size // 4)).view(np.uint16)[:size].reshape(shape)  # four in 64 bits
    mask = np.multiply(draws >= round(p * 65536), 1 / (1 - p), dtype=like.dtype)
    return np.asarray(mask, like=like)


# ----------------------------------------------------------------------------------- memory


def keep_memory() -> None:
    """Ask the C library to keep freed memory for the next step instead of returning it to the system.

    A training step frees and allocates gigabytes, and the system clears every page it hands out:
    measured for GPT-2 124M, 20,000 page faults and a fifth of the time of a step, against 5 faults.
    It concerns the whole process, so programs call it (``tinyllm train`` does), the library does
    not. Only glibc has the settings; elsewhere this does nothing.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def peak_memory(device: str = "cpu") -> int | None:
    """The peak resident memory of this process in bytes; None where the system does not say (Windows).

    Of a GPU, the current one: what CuPy's pool has taken of its memory, and keeps for the arrays to come.
    """
    if device != "cpu":
        import cupy

        return cupy.get_default_memory_pool().total_bytes()
    try:
        import resource
    except ImportError:
        return None
    if sys.platform == "linux":  # ru_maxrss survives exec: a child would start with its parent's peak
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


# ---------------------------------------------------------------------------------- threads

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
    on_gpu = kernels.library_of(a) is not None
    if on_gpu or not isinstance(a, np.ndarray) or len(a) < FEW_ROWS:
        out = kernels.gemm(a, b, out) if on_gpu else np.matmul(a, b, out=out)
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

"""Memory: reuse freed memory, measure the peak, and explain out-of-memory errors."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from pathlib import Path

import numpy as np

from tinyllm.backend.device import is_ampere
from tinyllm.backend.dtypes import Precision


def keep_memory() -> None:
    """Make the C library keep freed memory for the next step instead of returning it to the system.

    A training step frees and allocates gigabytes, and the system must clear every page it provides: for
    GPT-2 124M 20,000 page faults per step, a fifth of its time, instead of 5. The setting affects the whole
    process, so only programs such as ``tinyllm train`` call this, never the library. It does nothing unless
    the C library is glibc.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_MMAP_THRESHOLD, 2**30)


SMALL_ARRAY = 2**20  # elements
MANY_ROWS = 2  # for each channel


def is_kept(shape: tuple[int, ...], like) -> bool:
    """Whether an op keeps an array (..., C) for the backward pass that it could also compute again.

    It does if the array is small, or if its rows are at least twice its channels. Weights, their gradients
    and averages take memory in proportion to C², activations in proportion to rows times C: with few rows
    the weights are most of what a step holds, and what recomputation saves is needed to stay at half of
    PyTorch's memory. With many rows activations are most of it, of which PyTorch holds several times as
    much. On a GPU (``like`` is not NumPy's) memory is scarce and nothing is kept. The answer depends on
    shapes only, never on free memory, so that a run is the same wherever it is repeated.
    """
    if not isinstance(like, np.ndarray):
        return False
    size = math.prod(shape)
    return size <= SMALL_ARRAY or size >= MANY_ROWS * math.prod(shape[-1:]) ** 2


def peak_memory(device: str = "cpu") -> int | None:
    """The peak resident memory of this process in bytes; None on Windows, which does not report it.

    For a GPU, the memory that CuPy's pool has allocated on the current one and keeps for reuse.
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


def private_memory(pid: int) -> int:
    """The bytes in memory of a process that no other one shares; on Linux."""
    found = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    return 1024 * sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", found, re.MULTILINE)))


def out_of_memory(error: MemoryError, dtype: Precision, remedies: list[str]) -> str:
    """The message for an out-of-memory error: the requested and the free memory, and remedies.

    ``remedies`` are those of the program. For a GPU, half precision instead of ``dtype`` is added, and a
    larger memory limit if there is one.
    """
    asked = str(error).rstrip(".") or "the memory is full"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(error, cupy.cuda.memory.OutOfMemoryError):
        free, total = cupy.cuda.runtime.memGetInfo()
        asked += f", and {free / 1e9:.2f} of the GPU's {total / 1e9:.2f} GB are free"
        if dtype in ("float32", "tf32"):
            remedies = [*remedies, f"--dtype {'bfloat16' if is_ampere(cupy.cuda.Device()) else 'float16'}"]
        if cupy.get_default_memory_pool().get_limit() > 0:
            remedies = [*remedies, "a larger --gpu-memory"]
    return f"{asked}: try {' or '.join(remedies)}"

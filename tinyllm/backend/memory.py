"""Memory: keep what was freed, measure the peak, and say what to try when it runs out."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

from tinyllm.backend.device import is_ampere
from tinyllm.backend.dtypes import Precision


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


def out_of_memory(error: MemoryError, dtype: Precision, remedies: list[str]) -> str:
    """The sentence about memory that ran out: what was asked, what is free, and what to try.

    ``remedies`` are the program's own; a GPU's are added: a shorter type than ``dtype``, and more of its
    memory where CuPy was allowed a part only.
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

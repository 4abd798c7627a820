"""On which device does a program compute, in which types, and what if the memory there does not suffice?

What ``--device``, ``--dtype`` and ``--gpu-memory`` mean, for every program that has them.
"""

from __future__ import annotations

import math
import sys
from typing import Literal, get_args

import numpy as np

from tinyllm.device import allow_tf32, dtype_of, number_of, pick_device
from tinyllm.errors import Error

Precision = Literal["float32", "tf32", "bfloat16", "float16", "float64"]  # what --dtype names
PRECISIONS = get_args(Precision)
SHORT = ("tf32", "bfloat16", "float16")  # for the sake of a GPU: a CPU multiplies float32 faster
AMPERE = 80  # compute capability 8.0, the first with products of bfloat16 and TF32


def describe_device(device: str) -> str:
    """A device that ``pick_device`` returned; if it is a GPU, with its name and CuPy's version."""
    if device == "cpu":
        return device
    import cupy

    return f"{device} ({_gpu_name(device)}, CuPy {cupy.__version__})"


def _gpu_name(device: str) -> str:
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(number_of(device))["name"].decode("utf-8")


def open_device(name: str, dtype: Precision = "float32", gpu_memory: float | None = None) -> str:
    """Make the device that a program asks for ready; returns its name, as ``pick_device``.

    A GPU becomes the one that this thread computes on; CuPy takes at most ``gpu_memory`` GB (10⁹ bytes) of
    its memory; its float32 products are TF32 if that is the ``dtype`` (``allow_tf32``), else float32. What
    "auto" took is said on stderr.

    Raises ``Error`` as ``pick_device``, for a dtype that the device multiplies slower than float32 or not at
    all, and for a ``gpu_memory`` that is not above 0, or asked of a CPU.
    """
    device = pick_device(name)
    if device == "cpu":
        _check_cpu(dtype, gpu_memory)
    else:
        _open_gpu(device, dtype, gpu_memory)
    if name == "auto":
        print(f"device: {describe_device(device)}", file=sys.stderr)
    return device


def weights_dtype(dtype: Precision) -> np.dtype:
    """What a program that only reads a model keeps its weights in for products in ``dtype``."""
    return dtype_of("float32" if dtype == "tf32" else dtype)


def _check_cpu(dtype: str, gpu_memory: float | None) -> None:
    if dtype in SHORT:
        raise Error(f"--dtype {dtype} needs a GPU: a CPU multiplies float32 faster, so choose that")
    if gpu_memory is not None:
        raise Error(f"--gpu-memory {gpu_memory} bounds a GPU's memory: on a CPU leave it out, or say None")


def _open_gpu(device: str, dtype: str, gpu_memory: float | None) -> None:
    import cupy

    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        raise Error(f"--gpu-memory is {gpu_memory}: it must be a number of gigabytes above 0")
    gpu = cupy.cuda.Device(number_of(device))
    if dtype in ("tf32", "bfloat16") and not _is_ampere(gpu):
        *major, minor = gpu.compute_capability  # "75"
        raise Error(
            f"--dtype {dtype} needs a GPU of compute capability 8.0 or more, and {_gpu_name(device)} has "
            f"{''.join(major)}.{minor}: choose float16"
        )
    gpu.use()
    allow_tf32(dtype == "tf32")
    if gpu_memory is not None:
        cupy.get_default_memory_pool().set_limit(size=math.ceil(gpu_memory * 10**9))


def _is_ampere(gpu) -> bool:
    return int(gpu.compute_capability) >= AMPERE


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
            remedies = [*remedies, f"--dtype {'bfloat16' if _is_ampere(cupy.cuda.Device()) else 'float16'}"]
        if cupy.get_default_memory_pool().get_limit() > 0:
            remedies = [*remedies, "a larger --gpu-memory"]
    return f"{asked}: try {' or '.join(remedies)}"

"""Devices: selecting one by name, moving arrays between them, and scatter-add on any of them.

Ops call NumPy's functions; for CuPy arrays NumPy dispatches the call to CuPy (NEP 13, 18, 35).
"""

from __future__ import annotations

import math
import sys

import numpy as np

from tinyllm.backend.cuda import launch
from tinyllm.backend.dtypes import Precision
from tinyllm.checks import pip_install
from tinyllm.errors import Error

FOR_A_GPU = ("tf32", "bfloat16", "float16")  # slower than float32 on a CPU
AMPERE = 80  # compute capability 8.0, the first to support bfloat16 and TF32 products


def pick_device(name: str) -> str:
    """Resolve a device name. "auto" is "cuda" if CuPy finds a GPU, else "cpu"; others are returned unchanged.

    Raises ``Error`` for an unknown name, and for a GPU that does not exist or that CuPy cannot use.
    """
    if not isinstance(name, str):
        raise Error(f"a device is a name such as cuda:1, not {name!r}; to convert the dtype use astype()")
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
        gpus = _count_gpus(name)
        if number_of(name) >= gpus:
            raise Error(f"there is no device {name!r}: CuPy finds {gpus} GPUs, numbered from 0")
    return name


def _count_gpus(name: str) -> int:
    try:
        import cupy
    except ModuleNotFoundError:
        raise Error(
            f"device {name!r} needs a GPU and CuPy: {pip_install('gpu12')} for CUDA 12 or gpu13 "
            "for CUDA 13, or choose cpu"
        ) from None
    except ImportError as error:  # the message is long; its beginning names the cause
        reason = " ".join(str(error).split())[:200]
        raise Error(f"device {name!r}: CuPy cannot be imported ({reason}): reinstall it") from None
    try:
        return cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's exception for a missing or outdated driver
        raise Error(
            f"device {name!r}: CuPy {cupy.__version__} finds no GPU ({error}): check the driver with "
            "nvidia-smi, and that CuPy matches its CUDA version (gpu12 or gpu13)"
        ) from None


def to_device(array, device: str):
    """Move an array to "cpu" or "cuda[:N]"; no copy if it is there already. Raises as ``pick_device``.

    The named GPU becomes the thread's current one, on which CuPy computes.
    """
    device = pick_device(device)
    if device == "cpu":
        return array if isinstance(array, np.ndarray) else array.get()
    import cupy

    cupy.cuda.Device(number_of(device)).use()
    return cupy.asarray(array)


def to_device_of(array, like):
    """Move an array to the device of ``like``; no copy if it is there already."""
    if isinstance(like, np.ndarray):
        return array if isinstance(array, np.ndarray) else array.get()
    if type(array) is type(like) and array.device == like.device:
        return array
    with like.device:
        return np.asarray(array, like=like)


def number_of(device: str) -> int:
    """The index of a GPU: 1 for "cuda:1"; for "cuda" 0, or that of ``use_gpu``."""
    return int(device.partition(":")[2] or _Default.gpu)


class _Default:
    gpu = 0


def use_gpu(number: int) -> None:
    """Let "cuda" be this GPU: several processes on a host take one each."""
    _Default.gpu = number


# ------------------------------------------------------------------------------- scattering


def scatter_add(buffer, index, values) -> None:
    """``buffer[index] += values``, accumulating repeated indices. ``buffer`` must be contiguous."""
    # np.add.at is fast in one dimension only, so every element is addressed by its flat position.
    rows = hasattr(index, "dtype") and index.dtype.kind in "iu"  # rows of an embedding
    if rows and launch.library_of(buffer) is not None:
        launch.add_rows_at(buffer, index, values)
        return
    if rows:  # flat positions by arithmetic
        size = math.prod(buffer.shape[1:])
        places = index.reshape(-1, 1).astype(np.int64) * size + np.arange(size, like=buffer)
    else:
        places = np.arange(buffer.size, like=buffer).reshape(buffer.shape)[index]
    np.add.at(buffer.reshape(-1), places.reshape(-1), values.reshape(-1))


def describe_device(device: str) -> str:
    """The name of a device returned by ``pick_device``; for a GPU also its model and CuPy's version."""
    if device == "cpu":
        return device
    import cupy

    return f"{device} ({_gpu_name(device)}, CuPy {cupy.__version__})"


def _gpu_name(device: str) -> str:
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(number_of(device))["name"].decode("utf-8")


def open_device(name: str, dtype: Precision = "float32", gpu_memory: float | None = None) -> str:
    """Prepare a program's device; returns its name, as ``pick_device``.

    A GPU becomes this thread's current one, and CuPy's memory pool is limited to ``gpu_memory`` GB (10⁹
    bytes). The choice of "auto" is printed to stderr. Run the model under ``autocast(dtype)``.

    Raises ``Error`` as ``pick_device``, for a dtype that the device does not support or that is slower there
    than float32, and for a ``gpu_memory`` that is not positive or given for a CPU.
    """
    device = pick_device(name)
    if device == "cpu":
        _check_cpu(dtype, gpu_memory)
    else:
        _open_gpu(device, dtype, gpu_memory)
    if name == "auto":
        print(f"device: {describe_device(device)}", file=sys.stderr)
    return device


def _check_cpu(dtype: str, gpu_memory: float | None) -> None:
    if dtype in FOR_A_GPU:
        raise Error(f"--dtype {dtype} needs a GPU: a CPU multiplies float32 faster, so use float32")
    if gpu_memory is not None:
        raise Error(f"--gpu-memory {gpu_memory} bounds a GPU's memory: omit it on a CPU")


def _open_gpu(device: str, dtype: str, gpu_memory: float | None) -> None:
    import cupy

    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        raise Error(f"--gpu-memory is {gpu_memory}: give a positive number of gigabytes")
    gpu = cupy.cuda.Device(number_of(device))
    if dtype in ("tf32", "bfloat16") and not is_ampere(gpu):
        *major, minor = gpu.compute_capability  # "75"
        raise Error(
            f"--dtype {dtype} needs a GPU of compute capability 8.0 or higher, but {_gpu_name(device)} has "
            f"{''.join(major)}.{minor}: choose float16"
        )
    gpu.use()
    if gpu_memory is not None:
        cupy.get_default_memory_pool().set_limit(size=math.ceil(gpu_memory * 10**9))


def is_ampere(gpu) -> bool:
    return int(gpu.compute_capability) >= AMPERE

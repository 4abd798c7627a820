"""Where arrays live: devices by name, moving arrays between them, and adding into them by index.

The ops call NumPy; a CuPy array takes the call over by NumPy's own dispatch (NEP 13, 18, 35).
"""

from __future__ import annotations

import math
import sys

import numpy as np

from tinyllm.backend.cuda import launch
from tinyllm.backend.dtypes import Precision
from tinyllm.errors import Error

FOR_A_GPU = ("tf32", "bfloat16", "float16")  # a CPU multiplies float32 faster
AMPERE = 80  # compute capability 8.0, the first with products of bfloat16 and TF32


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
            f"device {name!r} needs a GPU and CuPy: pip install 'tinyllm-numpy[gpu12]' for CUDA 12, "
            "gpu13 for CUDA 13, or choose cpu"
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


def to_device_of(array, like):
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
    if rows and launch.library_of(buffer) is not None:
        launch.add_rows_at(buffer, index, values)
        return
    if rows:  # no table needed
        size = math.prod(buffer.shape[1:])
        places = index.reshape(-1, 1).astype(np.int64) * size + np.arange(size, like=buffer)
    else:
        places = np.arange(buffer.size, like=buffer).reshape(buffer.shape)[index]
    np.add.at(buffer.reshape(-1), places.reshape(-1), values.reshape(-1))


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

    A GPU becomes the one that this thread computes on, and CuPy takes at most ``gpu_memory`` GB (10⁹ bytes)
    of its memory. What "auto" took is said on stderr. Run the model under ``autocast(dtype)``.

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


def _check_cpu(dtype: str, gpu_memory: float | None) -> None:
    if dtype in FOR_A_GPU:
        raise Error(f"--dtype {dtype} needs a GPU: a CPU multiplies float32 faster, so choose that")
    if gpu_memory is not None:
        raise Error(f"--gpu-memory {gpu_memory} bounds a GPU's memory: omit it on a CPU")


def _open_gpu(device: str, dtype: str, gpu_memory: float | None) -> None:
    import cupy

    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        raise Error(f"--gpu-memory is {gpu_memory}: it must be a number of gigabytes above 0")
    gpu = cupy.cuda.Device(number_of(device))
    if dtype in ("tf32", "bfloat16") and not is_ampere(gpu):
        *major, minor = gpu.compute_capability  # "75"
        raise Error(
            f"--dtype {dtype} needs a GPU of compute capability 8.0 or more, and {_gpu_name(device)} has "
            f"{''.join(major)}.{minor}: choose float16"
        )
    gpu.use()
    if gpu_memory is not None:
        cupy.get_default_memory_pool().set_limit(size=math.ceil(gpu_memory * 10**9))


def is_ampere(gpu) -> bool:
    return int(gpu.compute_capability) >= AMPERE

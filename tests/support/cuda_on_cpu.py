"""A simulation of CuPy, its compiler, a GPU and cuBLAS on a CPU.

``Simulator`` compiles a CUDA kernel for the CPU with g++ and runs it one thread at a time (see
``cuda_headers/``). It is stricter than a GPU: undefined behaviour is an error even where a GPU would happen
to compute the right result. ``simulated_cupy`` makes ``import cupy`` import a fake whose arrays are
``DeviceArray``, and registers the simulator as their kernel library.
"""

import ctypes
import functools
import hashlib
import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import as_strided
from support.cublas_on_cpu import bytes_at, gemm
from support.device_array import DeviceArray
from support.fake_cupy import FakeCupy, fake_cupy

from tinyllm.backend.cuda import launch

HEADERS = Path(__file__).with_name("cuda_headers")
# Each kernel is compiled to its own library: the __shared__ arrays of two kernels must not be merged
# (hidden), nor those of other kernels be counted (gc-sections). Fortified longjmp refuses to jump to another
# stack.
FLAGS = """-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -fno-strict-aliasing
-ffunction-sections -fdata-sections -Wl,--gc-sections -U_FORTIFY_SOURCE
-Wall -Werror -Wno-error=maybe-uninitialized -Wno-unknown-pragmas""".split()

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None,
    reason="needs g++ on Linux: CUDA kernels are compiled for the CPU",
)

GPUS = [  # for ``put`` (conftest.py); a real one does not need g++
    pytest.param("simulated GPU", marks=needs_compiler),
    pytest.param("GPU", marks=pytest.mark.gpu),
]

# C type of an element -> dtypes of the arrays
ELEMENTS = {
    "float": ("float32",),
    "double": ("float64",),
    "__half": ("float16",),
    "__nv_bfloat16": ("bfloat16",),
    "bool": ("bool",),
    "signed char": ("int8",),
    "unsigned char": ("uint8", "bool"),
    "short": ("int16",),
    "unsigned short": ("uint16",),
    "int": ("int32",),
    "unsigned int": ("uint32",),
    "long long": ("int64",),
    "unsigned long long": ("uint64",),
}
# C type of a number -> the Python types that CuPy passes as it, whatever the kernel's parameter
NUMBERS = {
    "bool": (ctypes.c_bool, (bool, np.bool_)),
    "int": (ctypes.c_int, (np.int32,)),
    "unsigned int": (ctypes.c_uint, (np.uint32,)),
    "long long": (ctypes.c_longlong, (int, np.int64)),
    "unsigned long long": (ctypes.c_ulonglong, (int, np.uint64)),
    "float": (ctypes.c_float, (np.float32,)),
    "double": (ctypes.c_double, (float, np.float64)),
}
MOST_BLOCKS = {"x": 2**31 - 1, "y": 65535, "z": 65535}
MOST_THREADS = {"x": 1024, "y": 1024, "z": 64}

RED_ZONE = 2**16  # bytes on either side of an argument
ALIGNMENT = 512  # CuPy's
POISON = np.full(RED_ZONE // 2 + 1, 0x7FF5, np.uint16).view(np.uint8)  # NaN in every type of float


class Simulator:
    """The counterpart of launch.py's ``CuPyLibrary`` for ``DeviceArray``.

    ``seed`` determines the order in which threads run. The seeds 2n and 2n + 1 give opposite orders, so a
    result that depends on the order differs between the two. ``source`` is CUDA C++, by default tinyllm's
    kernels.
    """

    def __init__(self, seed: int = 0, source: str | None = None):
        self.seed = seed
        self.source = launch.SOURCE.read_text(encoding="utf-8") if source is None else source

    def kernel(self, expression: str) -> Callable[[tuple, tuple, tuple], None]:
        """The kernel named by ``expression``, such as ``swiglu<float>``: a function (grid, block, args).

        Raises ``RuntimeError`` if it does not compile. The function raises ``TypeError`` for arguments of the
        wrong type, ``ValueError`` for a grid or block that CUDA refuses, and ``RuntimeError`` for a barrier
        that not all threads reach and for writes outside of the arrays.
        """
        library, parameters = _compiled(self.source, expression)

        def launch(grid: tuple, block: tuple, args: tuple) -> None:
            sizes = _checked_sizes(expression, grid, block)
            if len(args) != len(parameters):
                raise TypeError(f"{expression} takes {len(parameters)} arguments, not {len(args)}")
            for i, (parameter, value) in enumerate(zip(parameters, args)):
                _check_argument(f"{expression}, argument {i}", parameter, value)
            memory = _Memory(expression, parameters, args)
            pointers = [_c_value(p, v, memory) for p, v in zip(parameters, args)]
            addresses = (ctypes.c_void_p * len(args))(*[ctypes.addressof(p) for p in pointers])
            message = ctypes.create_string_buffer(1000)
            if not library.launch(
                sizes, addresses, ctypes.c_uint64(self.seed), message, ctypes.c_size_t(1000)
            ):
                raise RuntimeError(f"{expression}: {message.value.decode()}")
            memory.copy_back()

        return launch

    gemm = staticmethod(gemm)


# ---------------------------------------------------------------------------------- compiling


@functools.cache
def _compiled(source: str, expression: str) -> tuple[ctypes.PyDLL, list[str]]:
    """The library of one kernel, and the C types of the kernel's parameters."""
    text = f'#include "cuda_on_cpu.h"\n#line 1 "kernels.cu"\n{source}\n\nSIMULATE(&{expression})\n'
    headers = [path.read_bytes() for path in sorted(HEADERS.iterdir())]
    content = "\0".join([text, *FLAGS]).encode() + b"".join(headers) + _compiler_version()
    path = _folder() / f"{hashlib.sha256(content).hexdigest()}.so"
    if not path.exists():
        _compile(text, expression, path)
    library = ctypes.PyDLL(str(path))  # it has global state, so a launch keeps the GIL
    library.launch.restype = ctypes.c_bool
    names = ctypes.create_string_buffer(10_000)
    library.parameters(names, ctypes.c_size_t(len(names)))
    return library, names.value.decode().split(";")[:-1]


def _compile(text: str, expression: str, path: Path) -> None:
    """Test processes may compile the same kernel concurrently: each writes its own file, then renames it."""
    mine = path.with_suffix(f".{os.getpid()}")
    command = ["g++", *FLAGS, f"-I{HEADERS}", "-x", "c++", "-", "-o", str(mine)]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if done.returncode != 0:
        raise RuntimeError(f"{expression} does not compile:\n{done.stderr}")
    mine.replace(path)


@functools.cache
def _compiler_version() -> bytes:
    return subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout


@functools.cache
def _folder() -> Path:
    """The cache of compiled kernels, kept between test runs and writable by this user only."""
    folder = Path(tempfile.gettempdir()) / f"tinyllm-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} is owned by another user: remove it")
    return folder


# ---------------------------------------------------------------------------------- arguments


def _checked_sizes(expression: str, grid: tuple, block: tuple) -> ctypes.Array:
    sizes = []
    for what, given, most in (("grid", grid, MOST_BLOCKS), ("block", block, MOST_THREADS)):
        if not isinstance(given, tuple) or not 1 <= len(given) <= 3:
            raise TypeError(f"{expression}: the {what} is a tuple of one to three numbers, not {given!r}")
        for (axis, limit), size in itertools.zip_longest(most.items(), given, fillvalue=1):
            if not 1 <= size <= limit:
                raise ValueError(f"{expression}: {what}.{axis} is {size}, but CUDA allows 1 to {limit}")
            sizes.append(size)
    if math.prod(sizes[:3]) >= 2**31:
        raise ValueError(f"{expression}: the grid {grid} is too large for the simulator")
    threads = math.prod(sizes[3:])
    if threads > 1024 or threads % 32:
        raise ValueError(f"{expression}: a block of {threads} threads is not a multiple of 32 up to 1024")
    return (ctypes.c_uint * 6)(*sizes)


def _check_argument(place: str, parameter: str, value) -> None:
    if parameter.endswith("*"):
        dtypes = ELEMENTS[parameter.removeprefix("const ").removesuffix("*")]
        if value is None:
            return
        if not isinstance(value, DeviceArray):
            raise TypeError(
                f"{place}: {parameter} takes a device array or None, not a {type(value).__name__}"
            )
        if value.dtype.name not in dtypes:
            raise TypeError(f"{place}: {parameter} takes an array of {dtypes[0]}, not of {value.dtype}")
        if _address(value._array) % value.itemsize:
            raise TypeError(f"{place}: the array's address is not a multiple of {value.itemsize}")
        return
    c_type, types = NUMBERS.get(parameter, (None, ()))
    if type(value) not in types:
        raise TypeError(f"{place}: {parameter} does not take a {type(value).__name__}, as CuPy passes it")
    if c_type(value).value != value and value == value:
        raise ValueError(f"{place}: {value} does not fit {parameter}")


def _c_value(parameter: str, value, memory: "_Memory"):
    """The argument as a ctypes object, whose address is passed to the kernel."""
    if parameter.endswith("*"):
        return ctypes.c_void_p(None if value is None else memory.address(value))
    return NUMBERS[parameter][0](value)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _owner(array: np.ndarray) -> np.ndarray:
    """The array that owns the memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


class _Memory:
    """Copies of the memory of a kernel's arguments between red zones. Views of one array share one copy.

    After the launch the copies are compared: only elements of the given arrays may have changed, and only
    where the kernel's parameter is a non-const pointer.
    """

    def __init__(self, expression: str, parameters: list[str], args: tuple):
        self.expression = expression
        self.copies: dict[int, _Copy] = {}  # by the address of the original
        arrays = [(i, p, v) for i, (p, v) in enumerate(zip(parameters, args)) if isinstance(v, DeviceArray)]
        devices = {array.device for _, _, array in arrays}
        if len(devices) > 1:
            raise TypeError(f"{expression}: arrays on {' and '.join(sorted(map(str, devices)))}")
        for i, parameter, array in arrays:
            owner = _owner(array._array)
            if _address(owner) not in self.copies:
                self.copies[_address(owner)] = _Copy(owner)
            writable = not parameter.startswith("const ")
            self.copies[_address(owner)].add(i, array._array, writable)

    def address(self, array: DeviceArray) -> int:
        return self.copies[_address(_owner(array._array))].address(array._array)

    def copy_back(self) -> None:
        for copy in self.copies.values():
            if fault := copy.fault():
                raise RuntimeError(f"{self.expression} wrote {fault}")
        for copy in self.copies.values():
            copy.copy_back()


class _View(NamedTuple):
    """The part of an array's memory that an argument refers to: bytes ``low`` to ``high``."""

    argument: int
    low: int
    high: int
    itemsize: int
    writable: bool


_SPARE: dict[int, list[np.ndarray]] = {}  # by size: memory that holds nothing but POISON


def _poisoned(size: int) -> np.ndarray:
    """At least ``size`` aligned bytes of POISON: filling them anew would take longer than most kernels."""
    size = -(-size // RED_ZONE) * RED_ZONE
    if _SPARE.setdefault(size, []):
        return _SPARE[size].pop()
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    aligned = buffer[-_address(buffer) % ALIGNMENT :][:size]
    aligned.view(np.uint16)[:] = POISON.view(np.uint16)[0]
    return aligned


class _Copy:
    """A copy of one array's memory between red zones."""

    def __init__(self, owner: np.ndarray):
        self.first, end = byte_bounds(owner)
        size = end - self.first if owner.size else 0
        self.original = bytes_at(self.first, size)
        self.all = _poisoned(size + 2 * RED_ZONE)
        self.inside = self.all[RED_ZONE : RED_ZONE + size]
        self.inside[:] = self.original
        self.before = self.inside.copy()
        self.writable = np.zeros(size, bool)
        self.views: list[_View] = []

    def address(self, view: np.ndarray) -> int:
        return _address(self.inside) + _address(view) - self.first

    def add(self, argument: int, view: np.ndarray, writable: bool) -> None:
        low, high = byte_bounds(view) if view.size else (_address(view),) * 2
        low, high = low - self.first, high - self.first
        self.views.append(_View(argument, low, high, view.itemsize, writable))
        if writable and view.flags.c_contiguous:
            self.writable[low:high] = True
        elif writable and view.size:
            start = _address(view) - self.first
            shape, strides = (*view.shape, view.itemsize), (*view.strides, 1)
            as_strided(self.writable[start:], shape, strides)[...] = True

    def fault(self) -> str | None:
        """A description of the first forbidden write, or None."""
        strays = (self.inside != self.before) & ~self.writable
        end = RED_ZONE + len(strays)
        zones = [(self.all[start:][:RED_ZONE], POISON[start % 2 :][:RED_ZONE]) for start in (0, end)]
        if not strays.any() and all(zone.tobytes() == poison.tobytes() for zone, poison in zones):
            return None
        below, above = (zone != poison for zone, poison in zones)
        place = int(np.argmax(np.concatenate([below, strays, above]))) - RED_ZONE
        candidates = [view for view in self.views if view.writable] or self.views
        view = min(candidates, key=lambda v: max(v.low - place, place - v.high + 1, 0))  # the nearest
        place -= (place - view.low) % view.itemsize
        if place < view.low:
            where = f"{view.low - place} bytes before"
        elif place >= view.high:
            where = f"{place - view.high} bytes after"
        else:
            where = "between the elements of" if view.writable else "into const"
        return f"{where} argument {view.argument}"

    def copy_back(self) -> None:
        if any(view.writable for view in self.views):
            np.copyto(self.original, self.inside, where=self.writable)
        words = slice(RED_ZONE // 2, -(-(RED_ZONE + len(self.inside)) // 2))
        self.all.view(np.uint16)[words] = POISON.view(np.uint16)[0]
        _SPARE[len(self.all)].append(self.all)


# --------------------------------------------------------------------------------------- CuPy


def simulated_cupy(monkeypatch) -> FakeCupy:
    """``fake_cupy`` with kernels and products computed by a simulated GPU."""
    module = fake_cupy(monkeypatch)
    monkeypatch.setitem(launch.LIBRARIES, module.ndarray, Simulator())
    return module

"""Instruction sets: holding a measurement's process to AVX2, and checking that it obeys.

Most processors have AVX2 but not AVX-512, with which the libraries differ much more in speed. ``--isa avx2``
measures what those processors would see: every library picks its kernels when it is loaded, and each has an
environment variable that limits the choice. Whether it obeyed is read from the library itself.

What cannot be limited: the C++ compiler of ``torch.compile`` is called with ``-march=native``, so it may use
AVX-512 in loops that inductor has not vectorised itself. That can only favour PyTorch.

At its top this module imports the standard library only, so that a variant's process loads that variant's
libraries and no others.
"""

import ctypes
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable
from getpass import getuser
from typing import Literal

Isa = Literal["native", "avx2"]

# The kernels of OpenBLAS that use AVX2 and nothing beyond
OPENBLAS_AVX2 = {"Haswell", "Zen", "Excavator"}

# The variables by which a library's choice of kernels, or of their blocks, is limited
LIMITS = {
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES",
    "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY",
}  # fmt: skip

UNNAMED = "kernels that it does not name"

# ---- In the program that starts the measurements ----


def held_to(isa: Isa, environment: dict[str, str]) -> dict[str, str]:
    """The environment, changed so that a new process is held to this instruction set.

    For ``native`` it is held to nothing: a variable that limits a library of this shell (a container may set
    ``OPENBLAS_CORETYPE`` for the sake of an old OpenBLAS) is left out, or its machine would be called slower
    than it is. The kernels in llama.cpp's wheel (xllamacpp) are chosen when it is built, and are AVX2's.
    """
    environment = {name: value for name, value in environment.items() if name not in LIMITS}
    if isa == "native":
        return environment
    return environment | {
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": " ".join(_numpy_beyond_avx2()),
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels, and those that torch.compile generates
        # A process with AVX-512 that finds the latter in its cache ends with a corrupt heap (torch 2.13).
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), f"torchinductor-avx2-{getuser()}"),
    }


def check_isa(isa: Isa, facts: dict) -> None:
    """Raise ``Error`` if this machine (``process.machine()``) does not have the instruction set."""
    from tinyllm.errors import Error

    if isa == "avx2" and facts["instructions"] not in ("AVX2", "AVX-512"):
        raise Error(f"--isa avx2: {facts['cpu']} has no AVX2, so choose native")


def in_use(isa: Isa, facts: dict) -> str:
    """The instruction set of a measurement: ``AVX2``, ``AVX-512``, or the name of another architecture."""
    return "AVX2" if isa == "avx2" else facts["instructions"]


def processor(isa: Isa, facts: dict) -> str:
    """The processor and the instruction set, for a report."""
    used, widest = in_use(isa, facts), facts["instructions"]
    if used != widest:
        return f"{facts['cpu']} ({widest}) held to {used}"
    return f"{facts['cpu']} ({used}, the widest it has)" if used == "AVX2" else f"{facts['cpu']} ({used})"


# ---- In a measurement's own process ----


def check_obeyed(isa: Isa) -> None:
    """Exit with code 1 if a library of this process uses more than it was held to, or does not say."""
    if isa == "avx2" and (wrong := not_avx2()):
        sys.exit(f"--isa avx2: this process was not held to AVX2, so its times are not valid: {wrong}.")


def not_avx2() -> str:
    """The libraries of this process whose kernels are not known to be AVX2's, in words; "" if none."""
    return ", ".join(f"{library} uses {kernel}" for library, (kernel, avx2) in kernels().items() if not avx2)


@functools.cache  # MKL and oneDNN name their kernels only once
def kernels() -> dict[str, tuple[str, bool]]:
    """Library of this process -> (the kernels it says it uses, whether they are AVX2's)."""
    from threadpoolctl import threadpool_info

    found = {}
    if "numpy" in sys.modules:
        beyond = _numpy_beyond_avx2()
        found["NumPy"] = " ".join(beyond) or "at most AVX2", not beyond
        blas = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
        for pool in blas:
            kernel = pool.get("architecture", UNNAMED)
            found[pool["internal_api"]] = kernel, kernel in OPENBLAS_AVX2
        if not blas:
            found["NumPy's BLAS"] = UNNAMED, False
    if torch := sys.modules.get("torch"):
        capability = torch.backends.cpu.get_cpu_capability()
        found["torch"] = capability, capability == "AVX2"
        if torch.backends.mkl.is_available():
            said = printed(lambda: _verbose(torch.backends.mkl, lambda: torch.ones(8, 8) @ torch.ones(8, 8)))
            kernel = re.search(r"architecture (.*?)(?:, Lnx|, Win|, OSX|$)", said, re.MULTILINE)
            found["MKL"] = _named(kernel)
        if torch.backends.mkldnn.is_available():
            said = printed(lambda: _verbose(torch.backends.mkldnn, lambda: torch.ones(8, 8).to_mkldnn()))
            found["oneDNN"] = _named(re.search(r"cpu,isa:(.*)", said))
    if xllamacpp := sys.modules.get("xllamacpp"):
        features = " ".join(re.findall(r"(\w+) = 1", xllamacpp.get_system_info()))
        found["llama.cpp"] = features, "AVX2" in features and "AVX512" not in features
    return found


def printed(function: Callable[[], object]) -> str:
    """What a call prints on stdout, including what libraries in C print."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            function()
        finally:
            ctypes.CDLL(None).fflush(None)  # the buffers of C's stdio
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode(errors="replace")


def _verbose(library, function: Callable[[], object]) -> None:
    with library.verbose(library.VERBOSE_ON):
        function()


def _named(found: re.Match | None) -> tuple[str, bool]:
    """The kernels that a library printed, and whether they are at most AVX2's.

    On processors that are not Intel's, MKL names "Intel(R) Architecture processors", which is accepted.
    """
    if not found:
        return UNNAMED, False
    return found[1].strip(), re.search(r"512|AVX ?10|AMX", found[1]) is None


def _numpy_beyond_avx2() -> list[str]:
    """NumPy's groups of kernels beyond AVX2 that this process may use: X86_V4, AVX512_SKX and the like."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    wider = [name for name in __cpu_dispatch__ if name == "X86_V4" or name.startswith("AVX512")]
    return [name for name in wider if __cpu_features__[name]]

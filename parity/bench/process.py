"""Measurements in separate processes, and facts about the machine they ran on.

At its top this module imports the standard library only, so that a variant's process loads that variant's
libraries and no others.
"""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

# ---- Starting a process ----


def with_threads(threads: int) -> dict[str, str]:
    """The environment of a process that computes with this many threads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads))


def in_own_process(module: str, request: list, environment: dict) -> subprocess.CompletedProcess:
    """Run ``python -m module`` with the request as a JSON argument and wait for it."""
    command = [sys.executable, "-P", "-m", module, json.dumps(request)]
    return subprocess.run(command, env=environment | python_path(), stdout=subprocess.PIPE, text=True)


def python_path() -> dict[str, str]:
    """PYTHONPATH with the folder of this package first: ``python -P`` does not search the working folder."""
    folders = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def result_of(child: subprocess.CompletedProcess, name: str, number: int) -> dict:
    """The JSON on the last line of a process's output; exit with code 1 if the process failed."""
    if child.returncode != 0:
        sys.exit(f"\n{name} failed in round {number} (code {child.returncode}): no report.")
    return json.loads(child.stdout.splitlines()[-1])


# ---- Facts about a process and its machine ----


def peak_memory() -> int:
    """The peak resident memory of this process, in bytes, plus what its forked processes have alone.

    So does ``tinyllm train``, whose functions would load tinyllm into PyTorch's process.
    """
    import multiprocessing
    import resource

    if sys.platform == "linux":  # ru_maxrss survives exec: a child would start with its parent's peak
        own = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        for child in multiprocessing.active_children():
            rollup = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
            own += re.findall(r"^Private_\w+: +(\d+) kB", rollup, re.MULTILINE)
        return 1024 * sum(map(int, own))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def libraries() -> dict[str, str]:
    """The array libraries that this process loaded: version, BLAS, and the kernels the BLAS selected."""
    import numpy as np
    from threadpoolctl import threadpool_info

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    kernels = {pool["architecture"] for pool in threadpool_info() if "architecture" in pool}
    found = {"numpy": " ".join([np.__version__, "with", blas["name"], blas["version"], *sorted(kernels)])}
    if torch := sys.modules.get("torch"):
        blas = re.search(r"\bBLAS_INFO=(\w+)", torch.__config__.show())
        kernels = torch.backends.cpu.get_cpu_capability()
        found["torch"] = f"{torch.__version__} with {blas[1] if blas else 'unknown BLAS'} {kernels}"
    if transformers := sys.modules.get("transformers"):
        found["transformers"] = transformers.__version__
    if xllamacpp := sys.modules.get("xllamacpp"):
        found["xllamacpp"] = xllamacpp.__version__
    return found


def machine() -> dict:
    """The processor's name and instruction set, its cores, the current load, the system, and Python."""
    cpu, instructions = platform.processor(), platform.machine()
    if sys.platform == "linux":
        about = Path("/proc/cpuinfo").read_text()
        named = re.search(r"model name\s*: (.*)", about)
        cpu = named[1] if named else platform.machine()
        widest = {"avx512f": "AVX-512", "avx2": "AVX2"}  # in order of preference
        instructions = next((name for flag, name in widest.items() if f" {flag} " in about), instructions)
    elif sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        cpu = subprocess.check_output(command, text=True).strip()
    return {
        "cpu": cpu,
        "instructions": instructions,
        "cores": os.cpu_count(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",  # before measuring
        "system": platform.platform(),
        "python": platform.python_version(),
    }


# ---- For the reports ----


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def describe(facts: dict) -> str:
    """``name value, name value …``"""
    return ", ".join(f"{name} {fact}" for name, fact in facts.items())

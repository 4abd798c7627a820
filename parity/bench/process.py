"""A measurement in a process of its own, and what it ran on.

At its top this module imports the standard library only, so that a variant's process holds that variant's
libraries and nothing else.
"""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

# ---- Starting one ----


def with_threads(threads: int) -> dict[str, str]:
    """Our environment variables, and those that say how many threads a process is to have."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads))


def in_own_process(module: str, request: list, environment: dict) -> subprocess.CompletedProcess:
    """``python -m module`` with the request as JSON, to its end."""
    command = [sys.executable, "-m", module, json.dumps(request)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)


def result_of(child: subprocess.CompletedProcess, name: str, number: int) -> dict:
    """The JSON that a process printed last. If it failed, the program ends with exit code 1."""
    if child.returncode != 0:
        sys.exit(f"\n{name} failed in round {number} (code {child.returncode}): no report.")
    return json.loads(child.stdout.splitlines()[-1])


# ---- What it says of itself ----


def peak_memory() -> int:
    """The peak resident memory of this process, in bytes.

    As ``tinyllm.backend.memory.peak_memory``, which would bring tinyllm into PyTorch's process.
    """
    import resource

    if sys.platform == "linux":  # ru_maxrss survives exec: a child would start with its parent's peak
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def libraries() -> dict[str, str]:
    """The array libraries this process loaded: their version, their BLAS, the kernels it chose."""
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
    return found


def machine() -> dict:
    """The processor by name, its cores and how many it is already using, the operating system, the Python."""
    cpu = platform.processor()
    if sys.platform == "linux":
        named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = named[1] if named else platform.machine()
    elif sys.platform == "darwin":
        cpu = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    system, python = platform.platform(), platform.python_version()
    load = f"{os.getloadavg()[0]:.1f}"  # much above 0 before we start: the times will be somebody else's, too
    return {"cpu": cpu, "cores": os.cpu_count(), "load": load, "system": system, "python": python}


# ---- For the reports ----


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def describe(facts: dict) -> str:
    """``name value, name value …``"""
    return ", ".join(f"{name} {fact}" for name, fact in facts.items())

"""The environment of the tests: threads, signals, import path, Hypothesis profiles, devices.

HYPOTHESIS_PROFILE=thorough runs ten times as many examples. Tests marked ``gpu`` need CuPy and a GPU.
"""

import gc
import os
import signal
import sys
from pathlib import Path

# Several test processes share the cores (pytest -n), so each gets one BLAS thread. The variables must be set
# before NumPy is imported, and are inherited by the processes that tests start.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# Those processes import this checkout too, even if another copy of tinyllm is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# They read the bytecode that this process writes; compiling tinyllm again would double their start-up time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell that starts the tests in the background lets them ignore Ctrl-C; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from hypothesis import Phase, settings  # noqa: E402
from support.cuda_on_cpu import GPUS, Simulator  # noqa: E402
from support.device_array import DeviceArray  # noqa: E402

from tinyllm import Error  # noqa: E402
from tinyllm.backend.cuda import launch  # noqa: E402
from tinyllm.backend.device import pick_device  # noqa: E402
from tinyllm.data.corpus import load_text  # noqa: E402

# Without Phase.explain, which tries a failing input again and again: half of the time of the planted faults.
phases = [Phase.explicit, Phase.generate, Phase.shrink]
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, phases=phases)
settings.register_profile("thorough", deadline=None, max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    try:
        if marked:
            pick_device("cuda")
    except Error as error:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=str(error)))


def pytest_collection_finish():
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    gc.freeze()  # modules and tests live to the end: the collector need not look at them again and again


@pytest.fixture(params=["strict array", *GPUS])
def put(request, monkeypatch):
    """Moves an array to the device under test."""
    if request.param == "GPU":
        import cupy

        return cupy.asarray
    if request.param == "simulated GPU":
        monkeypatch.setitem(launch.LIBRARIES, DeviceArray, Simulator())
    return DeviceArray.of


@pytest.fixture(scope="session")
def verdict():
    """The classic run's text. Its tests are skipped without TINYLLM_DATA, a cached copy and a network."""
    if not (Path(os.environ.get("TINYLLM_DATA", "")) / "the-verdict.txt").is_file():
        try:
            load_text("the-verdict")
        except Error as error:
            pytest.skip(f"neither TINYLLM_DATA nor the network has it: {error}")
    return load_text("the-verdict")

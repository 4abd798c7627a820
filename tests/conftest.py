"""One thread per test process; how much Hypothesis tries; which devices there are to test on.

HYPOTHESIS_PROFILE=thorough tries ten times as much. Tests marked ``gpu`` need CuPy and a GPU. Several test
processes share the cores (pytest -n): threads of each one's BLAS would fight over them. The variables must be
set before NumPy is imported, and reach the processes that tests start.
"""

import os
import sys

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from support.cuda_on_cpu import GPUS, Simulator  # noqa: E402
from support.device_array import DeviceArray  # noqa: E402

from tinyllm import Error  # noqa: E402
from tinyllm.backend.cuda import launch  # noqa: E402
from tinyllm.backend.device import pick_device  # noqa: E402

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40)
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


@pytest.fixture(params=["strict array", *GPUS])
def put(request, monkeypatch):
    """Moves an array to the device under test."""
    if request.param == "GPU":
        import cupy

        return cupy.asarray
    if request.param == "simulated GPU":
        monkeypatch.setitem(launch.LIBRARIES, DeviceArray, Simulator())
    return DeviceArray.of

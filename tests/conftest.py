"""One thread per test process, and how much Hypothesis tries: HYPOTHESIS_PROFILE=thorough, ten times as much.

Several test processes share the cores (pytest -n): threads of each one's BLAS would fight over them.
The variables must be set before NumPy is imported, and reach the processes that tests start.
"""

import os
import sys

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

from hypothesis import settings  # noqa: E402

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40)
settings.register_profile("thorough", deadline=None, max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_finish():
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)

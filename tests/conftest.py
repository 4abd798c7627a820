"""How many examples does Hypothesis try, and which? HYPOTHESIS_PROFILE=thorough for ten times as many."""

import os
import sys

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_finish():
    if "torch" in sys.modules:  # several test processes share the cores
        sys.modules["torch"].set_num_threads(1)

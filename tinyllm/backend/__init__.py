"""The only code that knows about CuPy, threads and 16-bit types.

Importing it sets OPENBLAS_THREAD_TIMEOUT, unless NumPy is loaded already or the variable is set: OpenBLAS
reads it once, when NumPy loads it, and its threads then fall asleep between two tokens. Without it decoding
must keep to one of them (``threads.step_of_few_rows`` says why). Measured on two AVX-512 cores,
SmolLM2-135M in float32, in turn: a token took 1.31 times as long where a program had imported NumPy first.
Such a program says ``os.environ["OPENBLAS_THREAD_TIMEOUT"] = "20"`` before ``import numpy``.
"""

import os
import sys

if "numpy" not in sys.modules:
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")

from tinyllm.backend.device import to_device_of
from tinyllm.backend.dtypes import autocast, compute_dtype
from tinyllm.backend.random import manual_seed

__all__ = ["autocast", "compute_dtype", "manual_seed", "to_device_of"]

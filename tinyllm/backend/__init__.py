"""Everything that depends on CuPy, threads or 16-bit types.

Importing it sets OPENBLAS_THREAD_TIMEOUT, unless the variable is set or NumPy was imported before. OpenBLAS
reads it once, when NumPy loads OpenBLAS; its idle threads then sleep between two tokens. Without it decoding
uses a single BLAS thread (see ``threads.step_of_few_rows``): for SmolLM2-135M in float32 on two AVX-512 cores
a token takes 1.31 times as long. A program that imports NumPy first should set
``os.environ["OPENBLAS_THREAD_TIMEOUT"] = "20"`` before ``import numpy``.
"""

import os
import sys

if "numpy" not in sys.modules:
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")

from tinyllm.backend.device import to_device_of
from tinyllm.backend.dtypes import autocast, compute_dtype
from tinyllm.backend.random import manual_seed

__all__ = ["autocast", "compute_dtype", "manual_seed", "to_device_of"]

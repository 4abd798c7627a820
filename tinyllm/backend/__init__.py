"""The only code that knows about CuPy, threads and 16-bit types."""

from tinyllm.backend.dtypes import autocast, compute_dtype
from tinyllm.backend.random import manual_seed

__all__ = ["autocast", "compute_dtype", "manual_seed"]

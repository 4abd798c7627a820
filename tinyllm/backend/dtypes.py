"""Data types by name, half precision, and the types in which products and sums are computed.

A half-precision type (bfloat16, float16) has 16 bits. It is for matrix products on a GPU, where it doubles
the speed and halves the memory; sums of half-precision values are always computed in float32. Micikevicius
et al., "Mixed Precision Training", arXiv 1710.03740, section 3.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import Literal, get_args

import numpy as np

from tinyllm.errors import Error

Precision = Literal["float32", "tf32", "bfloat16", "float16", "float64"]  # what --dtype names

PRECISIONS = get_args(Precision)


def dtype_of(name) -> np.dtype:
    """The dtype of that name (float32, float64, bfloat16, float16); a dtype stands for itself."""
    if isinstance(name, str) and name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def is_floating(dtype: np.dtype) -> bool:
    """Whether it can have a gradient."""
    return dtype.kind == "f" or is_half(dtype)


def is_half(dtype: np.dtype) -> bool:
    """Whether it is bfloat16 or float16."""
    return dtype.itemsize == 2 and dtype.kind not in "iu"


def accumulation_dtype(dtype: np.dtype) -> np.dtype:
    """The type in which sums, norms, softmax and losses of ``dtype`` are computed: float32 for half
    precision.

    Ten thousand ones add up to 256 in bfloat16, which has no 257.
    """
    return np.dtype(np.float32) if is_half(dtype) else dtype


def weights_dtype(dtype: Precision) -> np.dtype:
    """The type in which a program that only reads a model keeps its weights for products in ``dtype``."""
    return dtype_of("float32" if dtype == "tf32" else dtype)


_products: ContextVar[str] = ContextVar("dtype of products", default="float32")


@contextlib.contextmanager
def autocast(dtype: Precision | None):
    """Within this block products on a GPU are computed in ``dtype``, whatever the parameters' type.

    "bfloat16" and "float16": operands are converted, sums are float32. "tf32": float32 operands are rounded
    to 10 bits after the point. "float32", "float64" and None: in the type of the operands. It holds in this
    thread; an op's backward pass uses what its forward pass used. A CPU computes in the operands' type
    always.
    """
    if dtype is not None and dtype not in PRECISIONS:
        raise Error(f"autocast dtype is {dtype!r}: choose one of {', '.join(PRECISIONS)}, or None")
    token = _products.set(dtype or "float32")
    try:
        yield
    finally:
        _products.reset(token)


def compute_dtype(like=None) -> np.dtype | None:
    """The half-precision type of products that ``autocast`` asks for; None: the operands' own, as on a CPU.

    ``like`` is an array, to ask about the device that it is on.
    """
    name = "float32" if isinstance(like, np.ndarray) else _products.get()
    return dtype_of(name) if name in ("bfloat16", "float16") else None


def tf32_allowed() -> bool:
    """Whether float32 products may be rounded to TF32."""
    return _products.get() == "tf32"

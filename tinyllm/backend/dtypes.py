"""Data types by name, and the dtypes in which products and sums are computed.

A half-precision type (bfloat16, float16) has 16 bits. It is used for matrix products on a GPU, where it
doubles the speed and halves the memory. Sums of half-precision values are always computed in float32.
Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.
"""

from __future__ import annotations

import contextlib
import sys
from contextvars import ContextVar
from typing import Literal, get_args

import numpy as np

from tinyllm.errors import Error

Precision = Literal["float32", "tf32", "bfloat16", "float16", "float64"]  # the values of --dtype

PRECISIONS = get_args(Precision)


def dtype_of(name) -> np.dtype:
    """The dtype of a name (float32, float64, bfloat16, float16) or of anything that NumPy takes as one."""
    if isinstance(name, str) and name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    try:
        return np.dtype(name)
    except TypeError:
        raise Error(f"unknown dtype {name!r}: choose float32, float64, bfloat16 or float16") from None


def is_floating(dtype: np.dtype) -> bool:
    """Whether arrays of this dtype can have a gradient."""
    return dtype.kind == "f" or is_half(dtype)


def is_half(dtype: np.dtype) -> bool:
    """Whether the dtype is bfloat16 or float16."""
    return dtype.itemsize == 2 and dtype.kind not in "iu"


def accumulation_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in which sums, norms, softmax and losses are computed: float32 for half precision.

    In bfloat16, which cannot represent 257, adding up ten thousand ones gives 256.
    """
    return np.dtype(np.float32) if is_half(dtype) else dtype


def weights_dtype(dtype: Precision) -> np.dtype:
    """The dtype of the weights in inference when products are computed in ``dtype``.

    float32 for "tf32", which rounds operands only within a product; otherwise ``dtype`` itself, so "bfloat16"
    and "float16" halve the weights' memory.
    """
    return dtype_of("float32" if dtype == "tf32" else dtype)


def mixed_dtypes(*dtypes) -> str:
    """The message of an op, the caller of the function that calls this one, on operands of these dtypes."""
    op = sys._getframe(2).f_code.co_name.strip("_")
    mixed = " and ".join(map(str, dict.fromkeys(dtypes)))
    return (
        f"{op} cannot mix {mixed}: convert to one dtype with astype(), such as Tensor(x.astype(np.float32)) "
        "for a NumPy array, which is float64 by default"
    )


def mixed_precision(dtypes) -> bool:
    """Whether these are float32 and one half-precision dtype: products on a GPU convert their weights."""
    return len(set(dtypes)) == 2 and {accumulation_dtype(dtype) for dtype in dtypes} == {np.dtype(np.float32)}


_products: ContextVar[str] = ContextVar("dtype of products", default="float32")


@contextlib.contextmanager
def autocast(dtype: Precision | None):
    """Context manager: within the block, compute matrix products on a GPU in ``dtype``.

    "bfloat16" and "float16": operands are converted and sums are accumulated in float32. "tf32": float32
    operands are rounded to a mantissa of 10 bits. "float32", "float64" and None: the dtype of the operands,
    as always on a CPU. The setting is per thread. An op's backward pass uses the dtype of its forward pass.
    """
    if dtype is not None and dtype not in PRECISIONS:
        raise Error(f"autocast dtype is {dtype!r}: choose one of {', '.join(PRECISIONS)}, or None")
    token = _products.set(dtype or "float32")
    try:
        yield
    finally:
        _products.reset(token)


def compute_dtype(like=None) -> np.dtype | None:
    """The half-precision dtype of products set by ``autocast``, or None for the dtype of the operands.

    If ``like`` is an array on a CPU, the result is None.
    """
    name = "float32" if isinstance(like, np.ndarray) else _products.get()
    return dtype_of(name) if name in ("bfloat16", "float16") else None


def tf32_allowed() -> bool:
    """Whether float32 products may be rounded to TF32."""
    return _products.get() == "tf32"

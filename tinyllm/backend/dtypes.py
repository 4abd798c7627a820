"""Data types by name, half precision, and the dtype that sums are computed in."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

# ------------------------------------------------------------------------------------- types


def dtype_of(name) -> np.dtype:
    """The dtype of that name: float32, float64, or one of the short ones, bfloat16 and float16.

    What is a dtype, or NumPy's class for one, stands for itself.
    """
    if isinstance(name, str) and name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products on a GPU may round what they multiply to TF32: 10 bits for 23, and faster.

    They add up in float32 either way. It concerns the whole process; at first it is not allowed.
    """
    Products.tf32 = allowed


class Products:
    """What float32 products round their operands to: nothing, or TF32's 10 bits after the point."""

    tf32 = False


def wide(dtype: np.dtype) -> np.dtype:
    """What sums, norms, softmax and losses of ``dtype`` are computed in: float32 for the short types."""
    return np.dtype(np.float32) if is_short(dtype) else dtype


def is_short(dtype: np.dtype) -> bool:
    """Whether it is bfloat16 or float16."""
    return dtype.itemsize == 2 and dtype.kind not in "iu"


Precision = Literal["float32", "tf32", "bfloat16", "float16", "float64"]  # what --dtype names

PRECISIONS = get_args(Precision)


def weights_dtype(dtype: Precision) -> np.dtype:
    """What a program that only reads a model keeps its weights in for products in ``dtype``."""
    return dtype_of("float32" if dtype == "tf32" else dtype)

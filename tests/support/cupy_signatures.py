"""The NumPy functions, methods and ufuncs that CuPy 14 implements, with CuPy's signatures.

``test_device_array.py`` compares the lists with the installed package. ``DeviceArray`` refuses everything
that is not listed: before adding a line, check that CuPy has it.
"""

import inspect
from collections.abc import Callable

import numpy as np


def _by_name(groups: dict[str, Callable]) -> dict[str, inspect.Signature]:
    return {name: inspect.signature(call) for names, call in groups.items() for name in names.split()}


# NumPy function -> signature of CuPy's function of that name. Omitted on purpose: `ones`, `full` and `eye`
# (with `like=` NumPy 2 passes a `device` that CuPy does not accept: use `ones_like(x, shape=...)`) and
# `subok`, which must be None in CuPy. The third argument of `argmax` is `out` in NumPy and `dtype` in CuPy:
# keywords only.
FUNCTIONS = _by_name(
    {
        "all any amax amin max min": lambda a, axis=None, out=None, keepdims=False: ...,
        "mean prod sum": lambda a, axis=None, dtype=None, out=None, keepdims=False: ...,
        "std var": lambda a, axis=None, dtype=None, out=None, ddof=0, keepdims=False: ...,
        "argmax argmin": lambda a, axis=None, *, dtype=None, out=None, keepdims=False: ...,
        "count_nonzero squeeze flip": lambda a, axis=None: ...,
        "cumsum": lambda a, axis=None, dtype=None, out=None: ...,
        "linalg.norm": lambda x, ord=None, axis=None, keepdims=False: ...,
        "argsort sort": lambda a, axis=-1, kind=None: ...,
        "argpartition partition": lambda a, kth, axis=-1: ...,
        "searchsorted": lambda a, v, side="left", sorter=None: ...,
        "unique": lambda ar, return_index=False, return_inverse=False, return_counts=False, axis=None, *,
        equal_nan=True: ...,
        "bincount": lambda x, weights=None, minlength=None: ...,
        "arange": lambda start, stop=None, step=1, dtype=None: ...,
        "empty zeros": lambda shape, dtype=float, order="C": ...,
        "empty_like": lambda prototype, dtype=None, order="K", *, shape=None: ...,
        "ones_like zeros_like": lambda a, dtype=None, order="K", *, shape=None: ...,
        "full_like": lambda a, fill_value, dtype=None, order="K", *, shape=None: ...,
        "array": lambda obj, dtype=None, copy=True, order="K", ndmin=0: ...,
        "asarray": lambda a, dtype=None, order=None, *, copy=None: ...,
        "ascontiguousarray": lambda a, dtype=None: ...,
        "concatenate stack": lambda tup, axis=0, out=None, *, dtype=None, casting="same_kind": ...,
        "split": lambda ary, indices_or_sections, axis=0: ...,
        "copyto": lambda dst, src, casting="same_kind", where=None: ...,
        "reshape": lambda a, newshape, order="C", *, copy=None: ...,
        "broadcast_to": lambda array, shape: ...,
        "ravel": lambda a, order="C": ...,
        "expand_dims": lambda a, axis: ...,
        "transpose": lambda a, axes=None: ...,
        "swapaxes": lambda a, axis1, axis2: ...,
        "moveaxis": lambda a, source, destination: ...,
        "roll": lambda a, shift, axis=None: ...,
        "repeat": lambda a, repeats, axis=None: ...,
        "tile": lambda A, reps: ...,
        "tril triu": lambda m, k=0: ...,
        "take": lambda a, indices, axis=None, out=None: ...,
        "take_along_axis": lambda a, indices, axis: ...,
        "put_along_axis": lambda arr, indices, values, axis: ...,
        "where": lambda condition, x=None, y=None: ...,
        "clip": lambda a, a_min, a_max, out=None: ...,
        "round": lambda a, decimals=0, out=None: ...,
        "nan_to_num": lambda x, copy=True, nan=0.0, posinf=None, neginf=None: ...,
        "dot outer": lambda a, b, out=None: ...,
        "vdot": lambda a, b: ...,
        "tensordot": lambda a, b, axes=2: ...,
        "einsum": lambda *operands, dtype=None, optimize=False: ...,
        "allclose isclose": lambda a, b, rtol=1e-5, atol=1e-8, equal_nan=False: ...,
        "array_equal": lambda a1, a2, equal_nan=False: ...,
        "may_share_memory shares_memory": lambda a, b, max_work=None: ...,
        "ndim nonzero shape": lambda a: ...,
        "result_type": lambda *arrays_and_dtypes: ...,
    }
)  # fmt: skip

# Array methods have the signature of the function of the same name, except for these.
METHODS = {name: FUNCTIONS[name] for name in FUNCTIONS if hasattr(np.ndarray, name)} | _by_name(
    {
        "astype": lambda self, dtype, order="K", *, copy=True: ...,
        "clip": lambda self, min=None, max=None, out=None: ...,
        "copy flatten": lambda self, order="C": ...,
        "fill": lambda self, value: ...,
        "reshape": lambda self, *shape, order="C", copy=None: ...,
        "transpose": lambda self, *axes: ...,
        "view": lambda self, dtype=None: ...,
    }
)

# Ufuncs do not accept `where=`, and only add and multiply have `reduce` (there is `np.max`, but no
# `np.maximum.reduce`). `erf` is scipy.special's, for which CuPy uses cupyx.scipy.special's.
UFUNCS = _by_name(
    {
        """absolute add arccos arcsin arctan arctan2 bitwise_and bitwise_or bitwise_xor cbrt ceil conjugate
        copysign cos cosh divide equal erf exp exp2 expm1 fabs floor floor_divide fmax fmin greater
        greater_equal hypot invert isfinite isinf isnan left_shift less less_equal log log10 log1p log2
        logaddexp logical_and logical_not logical_or logical_xor maximum minimum multiply negative not_equal
        positive power reciprocal remainder right_shift rint sign signbit sin sinh sqrt square subtract tan
        tanh trunc multiply.outer""": lambda *inputs, out=None, dtype=None, casting="same_kind": ...,
        "matmul": lambda *inputs, axes=None, axis=None, keepdims=False, casting="same_kind", dtype=None,
        signature=None, order="K", out=None: ...,
        "add.reduce multiply.reduce": lambda array, axis=0, dtype=None, out=None, keepdims=False: ...,
        "add.at": lambda a, indices, b=None: ...,
    }
)  # fmt: skip

"""Launch this package's CUDA kernels and cuBLAS's matrix products.

The kernels are in ``kernels.cu``, the ops that use them in ``functional/cuda.py``. CuPy compiles each kernel
for the required dtypes when it is first used, and caches it on disk. Everything else on a GPU is CuPy's: the
arrays, their memory, and NumPy's functions.

Half precision (bfloat16, float16) is the input and output of products only. Their sums, and all other ops,
are computed in float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinyllm.backend.dtypes import accumulation_dtype, is_half
from tinyllm.errors import Error

SOURCE = Path(__file__).with_name("kernels.cu")
C_TYPES = {"float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"}
MOST_THREADS = 512  # per block: enough to hide memory latency, and two blocks fit on a multiprocessor
ROWS = 256  # rows per partial sum of over_rows
CHUNK = 2**16  # elements per block of the kernels that process many arrays

# cuBLAS's codes for dtypes and for the dtype in which a product is computed (library_types.h, cublas_api.h)
CUDA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77
ANY_ALGORITHM = -1
NOT_INITIALIZED, ALLOC_FAILED = 1, 3


# ------------------------------------------------------------------------- compiling, launching


@functools.cache
def _compiled(expression: str):
    import cupy

    source = SOURCE.read_text(encoding="utf-8")
    return cupy.RawModule(code=source, name_expressions=(expression,)).get_function(expression)


class CuPyLibrary:
    """Kernels and matrix products for CuPy arrays."""

    def kernel(self, expression: str):
        """The kernel ``expression``, such as ``gelu<true, float>``; call it with (grid, block, args)."""
        return _compiled(expression)

    def gemm(self, *arguments) -> None:
        """cublasGemmStridedBatchedEx. Raises MemoryError if cuBLAS cannot allocate its workspace."""
        from cupy.cuda import cublas, device

        try:
            cublas.gemmStridedBatchedEx(device.get_cublas_handle(), *arguments)
        except cublas.CUBLASError as error:  # CuPy raises OutOfMemoryError for arrays only
            if error.status not in (NOT_INITIALIZED, ALLOC_FAILED):
                raise
            raise MemoryError(f"cuBLAS cannot allocate GPU memory for its workspace ({error})") from None


LIBRARIES: dict[type, CuPyLibrary] = {}  # type of array -> library


def library_of(array) -> CuPyLibrary | None:
    """The library that compiles and launches kernels for this array, or None if there are no kernels."""
    kind = type(array)
    if kind is np.ndarray:
        return None
    if kind not in LIBRARIES and kind.__module__.partition(".")[0] == "cupy":
        LIBRARIES[kind] = CuPyLibrary()
    return LIBRARIES.get(kind)


def on_gpu(*tensors) -> bool:
    """Whether an op of these Tensors is computed by GPU kernels.

    Raises ``Error`` if they are on different devices, or in half precision but not on a GPU.
    """
    for tensor in tensors:
        if type(tensor.data) is not np.ndarray:
            check_one_device(*tensors)
            if library_of(tensor.data) is not None:
                return True
            break
    for tensor in tensors:
        if is_half(tensor.data.dtype):
            raise Error(f"{tensor.data.dtype} needs a GPU: use float32, or to('cuda')")
    return False


def check_one_device(*tensors) -> None:
    """Raise ``Error`` naming both if two Tensors are on different devices."""
    names = dict.fromkeys(_device_name(tensor.data) for tensor in tensors)
    if len(names) > 1:
        raise Error(f"an op got arrays on {' and '.join(names)}: move one of them with to(device)")


def _device_name(array) -> str:
    return "cpu" if isinstance(array, np.ndarray) else f"cuda:{array.device.id}"


def launch(like, name: str, types: Sequence, grid, block, *arguments) -> None:
    """Launch ``name<types>`` with ``grid`` blocks of ``block`` threads, each a number or a tuple.

    ``types`` are dtypes and booleans. Arrays must be contiguous, because a kernel gets only their address.
    """
    grid, block = (n if isinstance(n, tuple) else (n,) for n in (grid, block))
    if 0 in grid:
        return
    names = [str(t).lower() if isinstance(t, bool) else C_TYPES[np.dtype(t).name] for t in types]
    expression = f"{name}<{', '.join(names)}>" if names else name
    library_of(like).kernel(expression)(grid, block, arguments)


def elementwise(like, name: str, types: Sequence, size: int, *arguments) -> None:
    """``launch`` with one thread for each of ``size`` elements."""
    launch(like, name, types, -(-size // MOST_THREADS), MOST_THREADS, *arguments)


def threads_for(row: int) -> int:
    """The block size for a row of this length, a multiple of 32, the size of a warp."""
    return min(MOST_THREADS, -(-row // 32) * 32)


# ------------------------------------------------------------------------------ matrix products


def gemm(a, b, out=None, dtype=None, alpha: float = 1.0, beta: float = 0.0, tf32: bool = False):
    """alpha A B + beta ``out`` for matrices A (M, K), B (K, N), or batches of them (n, M, K), (n, K, N).

    The result is ``out``, or a new array of ``dtype`` (default: the operands'). Sums are accumulated in
    float32, or in float64 for float64. With ``tf32``, float32 operands are rounded to a mantissa of 10 bits.
    """
    shape = (*a.shape[:-1], b.shape[-1])
    if out is None:
        out = np.empty(shape, dtype or a.dtype, like=a)
    if out.size == 0 or a.shape[-1] == 0:  # cuBLAS does not accept empty matrices
        if beta == 0:
            out[...] = 0
        return out
    a, a_transposed, a_lead = _for_cublas(a)
    b, b_transposed, b_lead = _for_cublas(b)
    if a.dtype == np.float64:
        compute = COMPUTE_64F
    else:
        compute = COMPUTE_32F_FAST_TF32 if a.dtype == np.float32 and tf32 else COMPUTE_32F
    factors = np.array([alpha, beta], np.float64 if compute == COMPUTE_64F else np.float32)
    address = factors.ctypes.data
    # cuBLAS is column-major: it interprets a row-major matrix as its transpose. Cᵀ = Bᵀ Aᵀ in its terms is
    # C = A B in ours, without copying a matrix.
    library_of(a).gemm(
        *(b_transposed, a_transposed, shape[-1], shape[-2], a.shape[-1], address),
        *(b.data.ptr, CUDA_TYPES[b.dtype.name], b_lead, _batch_stride(b)),
        *(a.data.ptr, CUDA_TYPES[a.dtype.name], a_lead, _batch_stride(a), address + factors.itemsize),
        *(out.data.ptr, CUDA_TYPES[out.dtype.name], _lead(out), _batch_stride(out)),
        *(shape[0] if len(shape) == 3 else 1, compute, ANY_ALGORITHM),
    )
    return out


def _for_cublas(x):
    """(x, or a contiguous copy; 1 if it is column-major, 0 if row-major; its leading dimension)."""
    rows, columns = x.shape[-2:]
    down, across = (stride // x.itemsize for stride in x.strides[-2:])
    if (across == 1 or columns == 1) and (down >= columns or rows == 1):
        return x, 0, down if rows > 1 else columns
    if (down == 1 or rows == 1) and across >= rows:
        return x, 1, across
    return np.ascontiguousarray(x, like=x), 0, columns


def _lead(out) -> int:
    """The leading dimension of an output matrix, whose rows are contiguous."""
    return out.strides[-2] // out.itemsize if out.shape[-2] > 1 else out.shape[-1]


def _batch_stride(x) -> int:
    return x.strides[0] // x.itemsize if x.ndim == 3 else 0


# ------------------------------------------------------------------------------------- sums


def sums_over_rows(g, dtype, x=None, mean=None, inv=None, centred: bool = False):
    """(Σ g x̂, Σ g) over the rows of g (N, C), in ``dtype``; without x the first is None.

    x̂ = (x - mean) inv. For a norm that is not ``centred`` mean is None, and the second sum is None.
    """
    N, C = g.shape
    parts, sum_dtype = -(-N // ROWS), accumulation_dtype((g if x is None else x).dtype)
    dw = None if x is None else np.empty((parts, C), sum_dtype, like=g)
    db = np.empty((parts, C), sum_dtype, like=g) if x is None or centred else None
    types = (sum_dtype if x is None else x.dtype, g.dtype)
    launch(g, "over_rows", types, (-(-C // 32), parts), (32, 8), x, mean, inv, g, dw, db, N, C, ROWS)
    return tuple(None if part is None else part.sum(axis=0).astype(dtype, copy=False) for part in (dw, db))


def add_rows_at(buffer, index, values) -> None:
    """``buffer[index] += values`` by rows, accumulating repeated indices in a fixed order."""
    C = buffer.size // len(buffer)
    ids = index.reshape(-1).astype(np.int64) % len(buffer)  # -1 is the last row, as in NumPy
    order = np.argsort(ids, kind="stable")
    values = contiguous(values.reshape(-1, C))
    types, arguments = (values.dtype, buffer.dtype), (ids[order], order, values, buffer, ids.size, C)
    launch(buffer, "embedding_back", types, ids.size, threads_for(C), *arguments)


def contiguous(array):
    return array if array.flags.c_contiguous else np.ascontiguousarray(array, like=array)


# ----------------------------------------------------------------------------------- dropout


def dropout_kept(
    address: tuple[int, int, int, int],
    numbers: Sequence[int],
    size: int,
    bits: int,
    threshold: int,
    like,
    start: int = 0,
):
    """1 where an element is kept, else 0, as bytes (len(numbers), size), from ``random.dropout_mask``'s bits.

    ``bits`` and ``threshold`` are those of ``random.rounded``; ``start`` is the counter value at which each
    part starts.
    """
    seed, step, _, op = address
    kept = np.empty((len(numbers), size), np.uint8, like=like)
    parts = np.asarray(np.array(numbers, np.int64), like=like)
    threads = len(numbers) * -(-size // (256 // bits))
    arguments = kept, parts, len(numbers), size, threshold, seed, step, op, start
    elementwise(like, "dropout_mask", (bits == 32,), threads, *arguments)
    return kept


# -------------------------------------------------------------------- many arrays at once


class Many:
    """Lists of arrays, for a kernel that processes all of them in one launch: a block per CHUNK of elements.

    All lists have the same length, their n-th arrays the same size; all arrays are contiguous, of one dtype
    and on one GPU (``fit_for_many``).
    """

    def __init__(self, *lists: Sequence):
        sizes = [array.size for array in lists[0]]
        blocks = [(j, first) for j, size in enumerate(sizes) for first in range(0, size, CHUNK)]
        pointers = [array.data.ptr for array in itertools.chain(*lists)]
        self.like, self.count, self.blocks = lists[0][0], len(sizes), len(blocks)
        # One copy to the device for all three tables.
        table = np.asarray(np.array([*pointers, *sizes, *itertools.chain(*blocks)], np.int64), like=self.like)
        ends = len(pointers), len(pointers) + len(sizes)
        self.table = table[: ends[0]], table[ends[0] : ends[1]], table[ends[1] :]

    def launch(self, name: str, *arguments) -> None:
        launch(self.like, name, (self.like.dtype,), self.blocks, MOST_THREADS, *self.table, CHUNK, *arguments)


def fit_for_many(arrays: Sequence) -> bool:
    """Whether all arrays are contiguous, of one dtype, and on a GPU with kernels."""
    return bool(arrays) and all(
        library_of(array) is not None and array.flags.c_contiguous and array.dtype == arrays[0].dtype
        for array in arrays
    )


def sum_of_squares(arrays: Sequence) -> float:
    """Σ x² over all arrays, in float64, with a single synchronization."""
    many = Many(arrays)
    sums = np.empty(many.blocks, np.float64, like=many.like)
    many.launch("sum_of_squares", sums)
    return sums.sum().item()


def scale(arrays: Sequence, factor: float) -> None:
    """Multiply every array by ``factor``, in place."""
    Many(arrays).launch("scale", factor)


def adamw(parameters: Sequence, grads: Sequence, m: Sequence, v: Sequence, numbers, betas) -> None:
    """One step of AdamW for all parameters. ``numbers`` has (step size, ε, decay) for each."""
    many = Many(parameters, grads, m, v)
    numbers = np.asarray(np.array(numbers, np.float64).reshape(-1), like=many.like)
    many.launch("adamw", many.count, numbers, *betas)

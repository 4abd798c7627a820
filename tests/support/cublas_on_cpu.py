"""A CPU version of cuBLAS's batched matrix product, as strict about its arguments as the library."""

import ctypes

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

TYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float64), 2: np.dtype(np.float16)}
TYPES[14] = np.dtype(ml_dtypes.bfloat16)
FLOAT, DOUBLE, FLOAT_FROM_TF32 = 68, 70, 77


def gemm(
    transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB,
    beta, C, Ctype, ldc, strideC, batch, compute_type, algo,
) -> None:  # fmt: skip
    """cublasGemmStridedBatchedEx without its handle: C = alpha op(A) op(B) + beta C for batches of matrices.

    op(A) is (m, k), op(B) (k, n) and C (m, n), all column-major; ``ld`` is the distance of columns in
    elements and ``stride`` that of the batch's matrices. ``A``, ``B`` and ``C`` are addresses, ``alpha`` and
    ``beta`` addresses of numbers on the host. Half-precision values are multiplied exactly and accumulated in
    float32. Raises ``ValueError`` for arguments that cuBLAS refuses, and for overlapping results.
    """
    compute = _checked_types(Atype, Btype, Ctype, compute_type)
    rows_a, columns_a = _stored(transa, m, k)
    rows_b, columns_b = _stored(transb, k, n)
    if min(m, n, k, batch) < 0:
        raise ValueError(f"a product of negative size: m {m}, n {n}, k {k}, batch {batch}")
    for name, lead, rows in (("lda", lda, rows_a), ("ldb", ldb, rows_b), ("ldc", ldc, m)):
        if lead < max(1, rows):
            raise ValueError(f"{name} {lead} is smaller than the {rows} rows of its matrix")
    if not (-1 <= algo <= 23 or 99 <= algo <= 115):
        raise ValueError(f"there is no algorithm {algo}")
    if 0 in (m, n, batch):
        return
    c = _matrices(C, Ctype, batch, strideC, m, n, ldc)
    _check_apart(c)
    a = _operand(_matrices(A, Atype, batch, strideA, rows_a, columns_a, lda), transa, compute_type)
    b = _operand(_matrices(B, Btype, batch, strideB, rows_b, columns_b, ldb), transb, compute_type)
    number = ctypes.c_double if compute == np.float64 else ctypes.c_float
    alpha, beta = (compute.type(number.from_address(place).value) for place in (alpha, beta))
    product = alpha * np.matmul(a.astype(compute, copy=False), b.astype(compute, copy=False))
    if beta != 0:  # otherwise C may be uninitialized and is not read
        product += beta * c.astype(compute)
    c[...] = product


def _checked_types(Atype: int, Btype: int, Ctype: int, compute_type: int) -> np.dtype:
    """The dtype in which the product is computed. Raises ``ValueError`` if cuBLAS lacks the combination."""
    takes = {FLOAT: (0, 2, 14), DOUBLE: (1,), FLOAT_FROM_TF32: (0,)}.get(compute_type, ())
    results = {Atype} if compute_type == DOUBLE else {Atype, 0}
    if Atype not in takes or Btype != Atype or Ctype not in results:
        raise ValueError(f"no product of types {Atype} and {Btype} into {Ctype}, computed as {compute_type}")
    return np.dtype(np.float64 if compute_type == DOUBLE else np.float32)


def _stored(transposed: int, rows: int, columns: int) -> tuple[int, int]:
    """The stored shape of a matrix that is (rows, columns) after the optional transposition."""
    if transposed not in (0, 1, 2):  # 2 conjugates, too: nothing to do for real numbers
        raise ValueError(f"there is no operation {transposed}: 0 is the matrix itself, 1 its transpose")
    return (columns, rows) if transposed else (rows, columns)


def _matrices(
    address: int, kind: int, batch: int, stride: int, rows: int, columns: int, lead: int
) -> np.ndarray:
    """(batch, rows, columns), column by column at an address."""
    dtype = TYPES[kind]
    if address % dtype.itemsize:
        raise ValueError(f"address {address} is not a multiple of {dtype.itemsize}, the size of {dtype}")
    one = bytes_at(address, dtype.itemsize).view(dtype)
    strides = (stride * dtype.itemsize, dtype.itemsize, lead * dtype.itemsize)
    return as_strided(one, (batch, rows, columns), strides)


def _operand(matrices: np.ndarray, transposed: int, compute_type: int) -> np.ndarray:
    matrices = matrices.swapaxes(1, 2) if transposed else matrices
    return _to_tf32(matrices) if compute_type == FLOAT_FROM_TF32 else matrices


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to a mantissa of 10 bits, ties away from zero, like cvt.rna.tf32.f32."""
    bits = x.copy().view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _check_apart(c: np.ndarray) -> None:
    """Check that no element is written twice, which would be undefined behaviour."""
    reach = 0  # of the axes with smaller strides
    for stride, size in sorted(zip(c.strides, c.shape)):
        if stride <= reach and size > 1:
            break
        reach += stride * (size - 1)
    else:
        return  # every step of an axis leads past all elements before it
    batch, rows, columns = (np.arange(n) * stride for n, stride in zip(c.shape, c.strides))
    places = (batch[:, None, None] + rows[:, None] + columns).ravel()
    if len(np.unique(places)) < c.size:
        raise ValueError("matrices of C overlap: strideC is too small")


def bytes_at(address: int, size: int) -> np.ndarray:
    """The memory at an address."""
    return np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)

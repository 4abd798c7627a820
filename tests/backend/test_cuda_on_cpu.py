"""The simulated GPU: correct kernels equal NumPy, and every kind of mistake is detected.

The kernels here are valid CUDA; those with a mistake name it.
"""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import cuda_on_cpu
from support.cublas_on_cpu import TYPES
from support.cuda_on_cpu import RED_ZONE, Simulator, needs_compiler, simulated_cupy
from support.device_array import Device, DeviceArray

import tinyllm.backend.cuda.launch
from tinyllm import GPT2, GPT2Config
from tinyllm.backend.device import pick_device

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef long long Int;

__device__ Int this_thread() {
    Int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * Int(blockIdx.z));
    Int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    return block * blockDim.x * blockDim.y * blockDim.z + thread;
}

// One thread per element, which writes its index
__global__ void numbers(Int* y) { y[this_thread()] = this_thread(); }

// The order in which threads run
__global__ void order(Int* y, unsigned long long* count) { y[atomicAdd(count, 1ull)] = this_thread(); }

// The sum of each row of x (gridDim.x, n)
template <class T> __global__ void __launch_bounds__(1024) row_sum(const T* __restrict__ x, T* y, Int n) {
    __shared__ T of_warp[32];
    T total = 0;
    for (Int i = threadIdx.x; i < n; i += blockDim.x) total += x[blockIdx.x * n + i];
    for (int step = 16; step > 0; step /= 2) total += __shfl_down_sync(0xffffffff, total, step);
    if (threadIdx.x % warpSize == 0) of_warp[threadIdx.x / warpSize] = total;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (unsigned i = 1; i < blockDim.x / warpSize; i++) total += of_warp[i];
    y[blockIdx.x] = total;
}

// 64 elements of x reversed, repeatedly; the mistake is a missing barrier before or after a read
template <bool WAIT_TO_READ, bool WAIT_TO_WRITE>
__global__ void reverse(const float* x, float* y, Int rounds) {
    __shared__ float shared[64];
    for (Int i = 0; i < rounds; i++) {
        shared[threadIdx.x] = x[i * 64 + threadIdx.x];
        if (WAIT_TO_READ) __syncthreads();
        y[i * 64 + threadIdx.x] = shared[63 - threadIdx.x];
        if (WAIT_TO_WRITE) __syncthreads();
    }
}

// Neighbours through shared memory: within a warp __syncwarp is needed
template <bool WAIT> __global__ void swap(float* x) {
    __shared__ float shared[32];
    shared[threadIdx.x] = x[threadIdx.x];
    if (WAIT) __syncwarp();
    x[threadIdx.x] = shared[threadIdx.x ^ 1];
}

template <class T> __global__ void exchanges(const T* x, T* y) {
    int i = threadIdx.x;
    y[i] = __shfl_xor_sync(0xffffffff, x[i], 5);
    y[i + 64] = __shfl_down_sync(0xffffffff, x[i], 3);
    y[i + 128] = __shfl_sync(0xffffffff, x[i], 7);
}

template <int MISTAKE> __global__ void stuck(Int* y) {
    if (MISTAKE == 0 && threadIdx.x == 33) return;
    if (MISTAKE == 1 && threadIdx.x == 33) __syncthreads();
    if (MISTAKE == 2 && threadIdx.x < 32) __syncwarp(), __syncwarp();
    if (MISTAKE == 3 && threadIdx.x == 33) return;
    if (MISTAKE == 3) __syncwarp();
    if (MISTAKE == 4) y[0] = __shfl_sync(0xffff, y[0], 0);
    if (MISTAKE == 5 && threadIdx.x == 33) __syncwarp();
    if (MISTAKE == 6 && threadIdx.x % 2 == 0) __syncwarp();
    if (MISTAKE == 6 && threadIdx.x % 2 == 1) __syncwarp();
    __syncthreads();  // reached by all threads
    y[0] = 1;
}

template <class T> __global__ void untouched(T* y) {
    __shared__ T shared[7];
    if (threadIdx.x > 0) return;
    y[blockIdx.x] = shared[3];
    shared[3] = T(1.0f);
}

template <int SIZE> __global__ void large(float* y) {
    __shared__ float shared[SIZE];
    shared[threadIdx.x] = 1;
    __syncthreads();
    y[0] = shared[31];
}

__global__ void also_large(float* y) {  // its memory is not shared with other kernels
    __shared__ float shared[12288];
    shared[threadIdx.x] = 1;
    __syncthreads();
    y[0] = shared[31];
}

// x by an address in a list, and x as an argument
__global__ void write_through(const Int* pointers, const float* x, float* y) {
    *(float*)pointers[0] = 2;
    y[0] = x[0];
}

// y[at] = x[at], in bounds or not
template <class T> __global__ void copy_at(const T* x, T* y, Int at) { y[at] = x[at]; }
__global__ void write_at(float* x, float* y, Int at) { y[at] = 1; }
__global__ void write_const(const float* x) { *(float*)x = 1; }

template <class T> __global__ void widen(const T* x, float* y, Int n) {
    Int i = this_thread();
    if (i < n) y[i] = x[i];
}
template <class T> __global__ void narrow(const float* x, T* y, Int n) {
    Int i = this_thread();
    if (i < n) y[i] = T(x[i]);
}

template <class T> __global__ void functions(const T* x, T* y, Int n) {
    Int i = this_thread();
    if (i >= n) return;
    y[i] = exp(x[i]), y[n + i] = log(fabs(x[i])), y[2 * n + i] = tanh(x[i]), y[3 * n + i] = erf(x[i]);
    y[4 * n + i] = sqrt(x[i] * x[i]), y[5 * n + i] = max(x[i], T(0)), y[6 * n + i] = min(x[i], T(0));
    y[7 * n + i] = sizeof(exp(x[i]) + log(x[i]) + tanh(x[i]) + erf(x[i]) + sqrt(x[i]));
    y[8 * n + i] = -INFINITY;
}

__global__ void high(const unsigned long long* x, unsigned long long* y) {
    y[threadIdx.x] = __umul64hi(x[threadIdx.x], x[31 - threadIdx.x]);
}

__global__ void takes(const float* a, const long long* b, unsigned char* c, long long d, double e, bool f,
                      float g, int h, unsigned long long i) {
    c[0] = a[0] + b[0] + d + e + f + g + h + i;
}
"""

pytestmark = needs_compiler
FIRST, SECOND = Simulator(0, SOURCE), Simulator(1, SOURCE)
BOTH = pytest.mark.parametrize("simulator", [FIRST, SECOND], ids=["seed0", "seed1"])
of = DeviceArray.of


def zeros(*shape, dtype=np.float32):
    return of(np.zeros(shape, dtype))


# ------------------------------------------------------------------------------ the execution


@BOTH
@pytest.mark.parametrize(
    "grid, block", [((3,), (64,)), ((2, 3), (8, 8)), ((2, 3, 2), (4, 4, 2)), ((1,), (1024,))]
)
def test_every_thread_runs_once_with_its_index(simulator, grid, block):
    y = zeros(math.prod(grid) * math.prod(block), dtype=np.int64)
    simulator.kernel("numbers")(grid, block, (y,))
    np.testing.assert_array_equal(y.get(), np.arange(y.size))


def test_two_seeds_run_threads_in_opposite_orders():
    orders = []
    for simulator in (FIRST, SECOND, Simulator(2, SOURCE)):
        y = zeros(4 * 128, dtype=np.int64)
        simulator.kernel("order")((4,), (128,), (y, zeros(1, dtype=np.uint64)))
        orders.append(y.get().tolist())
    assert sorted(orders[0]) == list(range(512)) != orders[0]
    assert orders[1] == orders[0][::-1]
    assert orders[2] not in orders[:2]


@BOTH
@pytest.mark.parametrize("dtype, name", [("float32", "float"), ("float64", "double"), ("int64", "long long")])
@pytest.mark.parametrize("rows, n, threads", [(1, 32, 32), (3, 100, 64), (5, 7, 1024), (2, 2000, 96)])
def test_sum_with_shuffles_and_shared_memory(simulator, dtype, name, rows, n, threads):
    x = np.random.default_rng(n).integers(-99, 99, (rows, n)).astype(dtype)  # integers, so sums are exact
    y = zeros(rows, dtype=dtype)
    simulator.kernel(f"row_sum<{name}>")((rows,), (threads,), (of(x), y, n))
    np.testing.assert_array_equal(y.get(), x.sum(axis=1))


@BOTH
@pytest.mark.parametrize("dtype, name", [("int32", "int"), ("float32", "float"), ("float64", "double")])
def test_exchanges_within_a_warp(simulator, dtype, name):
    x, i = np.arange(64, dtype=dtype) ** 2, np.arange(64)
    y = zeros(3, 64, dtype=dtype)
    simulator.kernel(f"exchanges<{name}>")((1,), (64,), (of(x), y))
    down = np.where(i % 32 + 3 < 32, i + 3, i)
    np.testing.assert_array_equal(y.get(), [x[i ^ 5], x[down], x[i // 32 * 32 + 7]])


def test_missing_barrier_is_detected():
    x = np.arange(5 * 64, dtype=np.float32).reshape(5, 64)

    def results(expression):
        for simulator in (FIRST, SECOND):
            y = zeros(5, 64)
            simulator.kernel(expression)((1,), (64,), (of(x), y, 5))
            yield y.get()

    for right in results("reverse<true, true>"):
        np.testing.assert_array_equal(right, x[:, ::-1])
    for mistake in ("reverse<false, true>", "reverse<true, false>", "reverse<false, false>"):
        first, second = results(mistake)
        assert not np.array_equal(first, second)


def test_lanes_of_a_warp_do_not_run_in_step():
    x = np.arange(32, dtype=np.float32)
    found = {}
    for wait in ("true", "false"):
        for simulator in (FIRST, SECOND):
            y = of(x)
            simulator.kernel(f"swap<{wait}>")((1,), (32,), (y,))
            found.setdefault(wait, []).append(np.array_equal(y.get(), x[np.arange(32) ^ 1]))
    assert found["true"] == [True, True] and found["false"] == [False, False]


def line(text):
    """The number of the line of SOURCE that has this text."""
    (number,) = [i for i, line in enumerate(SOURCE.splitlines(), 1) if text in line]
    return f"line {number}"


BARRIER = line("reached by all threads")
STUCK = {
    0: rf"barrier not reached by all threads: .* {BARRIER}, thread \(33, 0, 0\) has ended",
    1: rf"barrier not reached by all threads: .* {BARRIER}, thread \(33, 0, 0\) .* {line('MISTAKE == 1')}",
    3: rf"exchange not reached by all 32 .* {line('== 3) __syncwarp')}, thread \(33, 0, 0\) has ended",
    4: "exchange of less than a warp is not simulated",
    5: rf"exchange not reached by all 32 .* {line('MISTAKE == 5')}, .* __syncthreads in {BARRIER}",
    6: rf"exchange not reached by all 32 .* {line('% 2 == 1')}, .* {line('% 2 == 0')}",
}


@BOTH
@pytest.mark.parametrize("mistake", STUCK)
def test_deadlocked_threads_are_detected(simulator, mistake):
    y = zeros(1, dtype=np.int64)
    with pytest.raises(RuntimeError, match=rf"stuck<{mistake}>: block \(0, 0, 0\): {STUCK[mistake]}"):
        simulator.kernel(f"stuck<{mistake}>")((1,), (64,), (y,))
    assert y.get() == 0
    simulator.kernel("stuck<2>")((1,), (64,), (y,))  # one warp alone is valid, also after the failure
    assert y.get() == 1


@BOTH
@pytest.mark.parametrize("name", ["float", "double", "__half", "__nv_bfloat16"])
def test_shared_memory_is_initially_nan(simulator, name):
    dtype = {"float": "float32", "double": "float64", "__half": "float16"}.get(name, ml_dtypes.bfloat16)
    y = zeros(4, dtype=dtype)
    simulator.kernel(f"untouched<{name}>")((4,), (32,), (y,))
    assert np.isnan(y.get()).all()  # also in the last block, after other blocks wrote


def test_shared_memory_is_limited_as_on_a_gpu():
    y = zeros(1)
    FIRST.kernel("large<12288>")((1,), (32,), (y,))
    assert y.get() == 1
    with pytest.raises(RuntimeError, match="bytes of __shared__ memory: a block has 49152"):
        FIRST.kernel("large<12289>")((1,), (32,), (y,))


@pytest.mark.parametrize(
    "grid, block, message",
    [
        ((0,), (32,), "grid.x is 0"),
        ((2**31,), (32,), "grid.x is 2147483648"),
        ((1, 65536), (32,), "grid.y is 65536"),
        ((1, 1, 65536), (32,), "grid.z is 65536"),
        ((65535, 65535), (32,), "too large for the simulator"),
        ((1,), (33,), "a block of 33 threads is not a multiple of 32"),
        ((1,), (2048,), "block.x is 2048"),
        ((1,), (64, 32), "a block of 2048 threads is not .* up to 1024"),
        ((1,), (1, 1, 128), "block.z is 128"),
    ],
)
def test_invalid_grids_and_blocks_are_refused(grid, block, message):
    with pytest.raises(ValueError, match=message):
        FIRST.kernel("numbers")(grid, block, (zeros(1, dtype=np.int64),))


# ----------------------------------------------------------------------------------- memory


@BOTH
@pytest.mark.parametrize("at", [0, 9])
def test_writing_within_an_array_is_allowed(simulator, at):
    x, y = of(np.arange(10, dtype=np.float32)), zeros(10)
    simulator.kernel("copy_at<float>")((1,), (32,), (x, y, at))
    np.testing.assert_array_equal(y.get(), np.where(np.arange(10) == at, np.arange(10), 0))


@pytest.mark.parametrize(
    "at, message",
    [
        (10, "0 bytes after argument 1"),
        (RED_ZONE // 4 + 9, "65532 bytes after argument 1"),
        (-1, "4 bytes before argument 1"),
        (-RED_ZONE // 4, "65536 bytes before argument 1"),
    ],
)
def test_writing_outside_of_an_array_is_detected(at, message):
    y = zeros(10)
    with pytest.raises(RuntimeError, match=f"write_at wrote {message}$"):
        FIRST.kernel("write_at")((1,), (32,), (None, y, at))
    assert not y.get().any()


def test_writing_outside_of_a_view_is_detected():
    buffer = zeros(4, 10)
    launch = FIRST.kernel("write_at")
    for view, at, message in [
        (buffer[1], 10, "0 bytes after argument 1"),
        (buffer[1], -1, "4 bytes before argument 1"),
        (buffer[:, :2], 2, "between the elements of argument 1"),
        (buffer[::-1], 10, "0 bytes after argument 1"),
    ]:
        with pytest.raises(RuntimeError, match=f"write_at wrote {message}"):
            launch((1,), (32,), (None, view, at))
    assert not buffer.get().any()
    launch((1,), (32,), (buffer[2], buffer[1], 10 - 10))
    launch((1,), (32,), (None, buffer[:, 2:4], 31))
    assert np.flatnonzero(buffer.get()).tolist() == [10, 33]


def test_writing_to_const_is_detected():
    with pytest.raises(RuntimeError, match="write_const wrote into const argument 0"):
        FIRST.kernel("write_const")((1,), (32,), (zeros(2),))


@pytest.mark.parametrize("name, dtype", [("float", "f4"), ("double", "f8"), ("__half", "f2")])
def test_reading_outside_of_an_array_gives_nan(name, dtype):
    y = zeros(11, dtype=dtype)
    FIRST.kernel(f"copy_at<{name}>")((1,), (32,), (zeros(10, dtype=dtype), y, 10))
    assert np.isnan(y.get()[10])


@pytest.mark.parametrize("size", [60, 61])
def test_memory_after_an_array_holds_nothing_of_earlier_launches(size):
    x, y = of(np.ones(size, np.uint8)), of(np.ones(size, np.uint8))
    FIRST.kernel("copy_at<unsigned char>")((1,), (32,), (x, y, 0))
    for at in range(1, 16):
        y = zeros(at + 1)
        FIRST.kernel("copy_at<float>")((1,), (32,), (zeros(1), y, at))
        assert np.isnan(y.get()[at])


def test_arguments_that_share_memory_share_it_in_the_kernel():
    buffer = of(np.arange(6, dtype=np.float32))
    FIRST.kernel("copy_at<float>")((1,), (32,), (buffer[2:], buffer[:4], 3))  # buffer[3] = buffer[5]
    FIRST.kernel("copy_at<float>")((1,), (32,), (buffer.reshape(2, 3), buffer, 5))
    np.testing.assert_array_equal(buffer.get(), [0, 1, 2, 5, 4, 5])


def test_writes_through_a_list_of_addresses_persist():
    x, y = zeros(3), zeros(1)
    FIRST.kernel("write_through")((1,), (32,), (of(np.array([x.data.ptr])), x, y))
    assert x.get().tolist() == [2, 0, 0] and y.get() == 0  # the kernel saw a copy of x


# -------------------------------------------------------------------------------- arguments

RIGHT = (
    zeros(1),
    zeros(1, dtype=np.int64),
    zeros(1, dtype=np.uint8),
    1,
    2.0,
    True,
    np.float32(3),
    np.int32(4),
    5,
)


def test_arguments_of_every_type_are_passed():
    c = zeros(1, dtype=np.uint8)
    FIRST.kernel("takes")((1,), (32,), (*RIGHT[:2], c, *RIGHT[3:]))
    assert c.get() == 16
    c = zeros(1, dtype=bool)  # one byte per element in CUDA
    FIRST.kernel("takes")((1,), (32,), (*RIGHT[:2], c, -14, *RIGHT[4:]))
    assert c.get()


@pytest.mark.parametrize(
    "i, value, message",
    [
        (0, zeros(1, dtype=np.float64), r"const float\* takes an array of float32, not of float64"),
        (0, zeros(1, dtype=np.float16), r"const float\* takes an array of float32, not of float16"),
        (0, zeros(1, dtype=ml_dtypes.bfloat16), r"const float\* takes an array of float32, not of bfloat16"),
        (0, np.zeros(1, np.float32), r"const float\* takes a device array or None, not a ndarray"),
        (0, 0, r"const float\* takes a device array or None, not a int"),
        (1, zeros(1, dtype=np.int32), r"const long long\* takes an array of int64, not of int32"),
        (1, zeros(1, dtype=np.uint64), r"const long long\* takes an array of int64, not of uint64"),
        (2, zeros(1, dtype=np.int8), r"unsigned char\* takes an array of uint8, not of int8"),
        (3, 1.0, "long long does not take a float"),
        (3, True, "long long does not take a bool"),
        (3, np.int32(1), "long long does not take a int32"),
        (3, zeros(1, dtype=np.int64), "long long does not take a DeviceArray"),
        (3, None, "long long does not take a NoneType"),
        (4, 1, "double does not take a int"),
        (4, np.float32(1), "double does not take a float32"),
        (5, 1, "bool does not take a int"),
        (6, 1.0, "float does not take a float, as CuPy passes it"),
        (7, 1, "int does not take a int, as CuPy passes it"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(i, value, message):
    with pytest.raises(TypeError, match=rf"takes, argument {i}: {message}"):
        FIRST.kernel("takes")((1,), (32,), (*RIGHT[:i], value, *RIGHT[i + 1 :]))


@pytest.mark.parametrize("i, value", [(3, 2**63), (8, -1), (8, 2**64)])
def test_integers_out_of_range_are_refused(i, value):
    with pytest.raises(ValueError, match=f"takes, argument {i}: {value} does not fit"):
        FIRST.kernel("takes")((1,), (32,), (*RIGHT[:i], value, *RIGHT[i + 1 :]))


def test_wrong_number_of_arguments_is_refused():
    for args in (RIGHT[:-1], (*RIGHT, None)):
        with pytest.raises(TypeError, match=f"takes takes 9 arguments, not {len(args)}"):
            FIRST.kernel("takes")((1,), (32,), args)


def test_invalid_arrays_are_refused():
    odd = DeviceArray(np.zeros(9, np.uint8)[1:].view(np.float32))
    with pytest.raises(TypeError, match=r"write_at, argument 1: .* not a multiple of 4"):
        FIRST.kernel("write_at")((1,), (32,), (None, odd, 0))
    there = DeviceArray.of(np.zeros(1, np.float32), Device(1))
    with pytest.raises(TypeError, match="write_at: arrays on <CUDA Device 0> and <CUDA Device 1>"):
        FIRST.kernel("write_at")((1,), (32,), (zeros(1), there, 0))


# -------------------------------------------------------------------------------- the language


@pytest.mark.parametrize("name, dtype", [("__half", np.float16), ("__nv_bfloat16", ml_dtypes.bfloat16)])
def test_every_half_precision_value_converts_to_float(name, dtype):
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    y = zeros(x.size)
    FIRST.kernel(f"widen<{name}>")((64,), (1024,), (of(x), y, x.size))
    np.testing.assert_array_equal(y.get(), x.astype(np.float32))  # NaN included
    assert (np.signbit(y.get()) == np.signbit(x.astype(np.float32)))[~np.isnan(y.get())].all()


@pytest.mark.parametrize("name, dtype", [("__half", np.float16), ("__nv_bfloat16", ml_dtypes.bfloat16)])
def test_floats_round_to_the_nearest_half_precision_value(name, dtype):
    with np.errstate(over="ignore", invalid="ignore"):
        short = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
        middle = (short[:-1].astype(np.float64) / 2 + short[1:].astype(np.float64) / 2).astype(np.float32)
        around = np.concatenate([np.nextafter(middle, np.float32(e)) for e in (-np.inf, np.inf)])
        anything = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32).view(np.float32)
        x = np.concatenate([short, middle, around, anything])
        want = x.astype(dtype)
    y = zeros(x.size, dtype=dtype)
    FIRST.kernel(f"narrow<{name}>")((-(-x.size // 1024),), (1024,), (of(x), y, x.size))
    nan = np.isnan(x)
    np.testing.assert_array_equal(y.get().view(np.uint16)[~nan], want.view(np.uint16)[~nan])
    assert np.isnan(y.get()[nan].astype(np.float32)).all()


@pytest.mark.parametrize("name, dtype", [("float", np.float32), ("double", np.float64)])
def test_functions_preserve_the_type(name, dtype):
    x = np.array([-3, -0.5, 1e-3, 0.25, 2, 30], dtype)
    y = zeros(9, x.size, dtype=dtype)
    FIRST.kernel(f"functions<{name}>")((1,), (32,), (of(x), y, x.size))
    erf = np.array([math.erf(v) for v in x.tolist()])
    want = [np.exp(x), np.log(abs(x)), np.tanh(x), erf, abs(x), np.maximum(x, 0), np.minimum(x, 0)]
    np.testing.assert_allclose(y.get()[:7], np.array(want), rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(y.get()[7], x.itemsize)
    np.testing.assert_array_equal(y.get()[8], -np.inf)


def test_umul64hi_is_the_upper_half_of_the_product():
    x = np.random.default_rng(0).integers(0, 2**64, 32, dtype=np.uint64)
    y = zeros(32, dtype=np.uint64)
    FIRST.kernel("high")((1,), (32,), (of(x), y))
    assert y.get().tolist() == [int(a) * int(b) >> 64 for a, b in zip(x, x[::-1])]


# Refused by CUDA too, or here because it is never intended: `h` is a half-precision number.
REFUSED = """
h = d;
h = H(d);
h = H(1);
h = h * h;
h = -h;
f = h - f;
f += h;
f = exp(h);
if (h == h) f = 0;
f = sin(f);
f = __shfl_xor_sync(0xffffffff, f, 16, 16);
f = __shfl_xor_sync(0xffffffff, h, 16);
const float c = 0; c = 1;
int never_used;
""".strip().splitlines()


@pytest.mark.parametrize("line", REFUSED)
def test_invalid_code_does_not_compile(line):
    end = "y[0] = H(f + float(d));"
    kernel = f"template <class H> __global__ void k(H h, float f, double d, H* y) {{ {line} {end} }}"
    source = f"#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n{kernel}"
    for name in ("__half", "__nv_bfloat16"):
        with pytest.raises(RuntimeError, match=rf"k<{name}> does not compile:\n(.|\n)*kernels\.cu"):
            Simulator(0, source).kernel(f"k<{name}>")


def test_missing_kernel_is_reported():
    with pytest.raises(RuntimeError, match="nothing does not compile"):
        FIRST.kernel("nothing")


def test_kernel_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_on_cpu, "_folder", lambda: tmp_path)
    cuda_on_cpu._compiled.__wrapped__(SOURCE, "numbers")
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
    monkeypatch.setattr(cuda_on_cpu, "_compile", None)
    cuda_on_cpu._compiled.__wrapped__(SOURCE, "numbers")
    with pytest.raises(TypeError):
        cuda_on_cpu._compiled.__wrapped__(SOURCE + "\n", "numbers")


# --------------------------------------------------------------------------------------- gemm

F32, F64, F16, BF16 = 0, 1, 2, 14
COMBINATIONS = [(F32, F32, 68), (F32, F32, 77), (F64, F64, 70), (F16, F16, 68), (F16, F32, 68)]
COMBINATIONS += [(BF16, BF16, 68), (BF16, F32, 68)]


def gemm(A, B, C, *, m=1, n=1, k=1, trans=(0, 0), ld=(1, 1, 1), strides=(0, 0, 0), alpha=1.0, beta=0.0,
         batch=1, types=(F32, F32, 68), algo=-1):  # fmt: skip
    factors = np.array([alpha, beta], np.float64 if types[2] == 70 else np.float32)
    place = factors.ctypes.data
    a, b, c = (array.data.ptr for array in (A, B, C))
    FIRST.gemm(
        *(*trans, m, n, k, place, a, types[0], ld[0], strides[0], b, types[0], ld[1], strides[1]),
        *(place + factors.itemsize, c, types[1], ld[2], strides[2], batch, types[2], algo),
    )


@given(st.data())
@example(None)
def test_gemm_equals_its_definition(data):
    """Small integers are exact in every type, so the order of summation does not matter."""

    def draw(strategy, otherwise):
        return otherwise if data is None else data.draw(strategy)

    m, n, k, batch = (draw(st.integers(0, 5), size) for size in (3, 4, 5, 2))
    trans = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)), (0, 1))
    types = draw(st.sampled_from(COMBINATIONS), COMBINATIONS[0])
    alpha, beta = draw(st.sampled_from([1.0, -2.0, 0.5]), 1.0), draw(st.sampled_from([0.0, 1.0, -0.5]), 0.0)
    rows = (k if trans[0] else m, n if trans[1] else k, m)
    columns = (m if trans[0] else k, k if trans[1] else n, n)
    ld = [max(1, r) + draw(st.integers(0, 2), 1) for r in rows]
    strides = [lead * c + draw(st.integers(0, 2), 1) for lead, c in zip(ld, columns)]
    rng = np.random.default_rng(draw(st.integers(0, 99), 0))
    sizes = [batch * stride + 8 for stride in strides]
    A, B = (rng.integers(-3, 4, size).astype(TYPES[types[0]]) for size in sizes[:2])
    C = rng.integers(-3, 4, sizes[2]).astype(TYPES[types[1]])
    if beta == 0:
        C[:] = np.nan

    def a(i, r, l):
        return float(A[i * strides[0] + (r * ld[0] + l if trans[0] else l * ld[0] + r)])

    def b(i, l, c):
        return float(B[i * strides[1] + (l * ld[1] + c if trans[1] else c * ld[1] + l)])

    want = C.copy()
    for i, r, c in np.ndindex(batch, m, n):
        at = i * strides[2] + c * ld[2] + r
        kept = beta * float(C[at]) if beta else 0.0
        want[at] = alpha * sum(a(i, r, l) * b(i, l, c) for l in range(k)) + kept
    out = of(C)
    gemm(of(A), of(B), out, m=m, n=n, k=k, trans=trans, ld=ld, strides=strides, alpha=alpha, beta=beta,
         batch=batch, types=types)  # fmt: skip
    np.testing.assert_array_equal(out.get().astype(np.float64), want.astype(np.float64))


def test_gemm_writes_into_columns_of_a_larger_matrix():
    """Two products (2, 3) (3, 2), row-major, whose results are the column halves of one (2, 4) matrix."""
    x, y = np.arange(12.0).reshape(2, 2, 3), np.arange(12.0).reshape(2, 3, 2)
    out = zeros(2, 4, dtype=np.float64)  # for cuBLAS the transposed product, column-major
    gemm(of(y), of(x), out, m=2, n=2, k=3, ld=(2, 3, 4), strides=(6, 6, 2), batch=2, types=(F64, F64, 70))
    np.testing.assert_array_equal(out.get(), np.concatenate(list(x @ y), axis=1))


@pytest.mark.parametrize("kind", [F16, BF16])
def test_half_precision_accumulates_in_float32(kind):
    ones, out = zeros(5000, dtype=TYPES[kind]) + 1, zeros(1)
    gemm(ones, ones, out, k=5000, ld=(1, 5000, 1), types=(kind, F32, 68))
    assert out.get() == 5000


@pytest.mark.parametrize(
    "x, rounded",
    [
        (1 + 2**-10, 1 + 2**-10),
        (1 + 2**-11, 1 + 2**-10),
        (1 + 2**-12, 1),
        (-1 - 2**-11, -1 - 2**-10),
        (np.inf, np.inf),
    ],
)
def test_tf32_rounds_both_operands_to_ten_bits(x, rounded):
    for types, want in (((F32, F32, 77), rounded), ((F32, F32, 68), x)):
        one, other, out = zeros(1) + 1, of(np.array([x], np.float32)), zeros(2)
        gemm(one, other, out[:1], types=types)
        gemm(other, one, out[1:], types=types)
        assert out.get().tolist() == [want, want]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(m=2), "lda 1 is smaller than the 2 rows"),
        (dict(k=2, trans=(1, 0)), "lda 1 is smaller than the 2 rows"),
        (dict(k=2), "ldb 1 is smaller than the 2 rows"),
        (dict(n=2, trans=(0, 1)), "ldb 1 is smaller than the 2 rows"),
        (dict(m=2, ld=(2, 1, 1)), "ldc 1 is smaller than the 2 rows"),
        (dict(k=0, ld=(1, 0, 1)), "ldb 0 is smaller"),
        (dict(n=-1), "negative size: m 1, n -1"),
        (dict(batch=-1), "negative size"),
        (dict(trans=(3, 0)), "no operation 3"),
        (dict(algo=50), "no algorithm 50"),
        (dict(batch=2), "matrices of C overlap"),
        (dict(types=(F32, F32, 70)), "no product of types 0 and 0 into 0, computed as 70"),
        (dict(types=(F64, F64, 68)), "no product"),
        (dict(types=(F16, F16, 77)), "no product"),
        (dict(types=(F32, F16, 68)), "no product"),
        (dict(types=(BF16, F16, 68)), "no product"),
        (dict(types=(F16, F64, 68)), "no product"),
        (dict(types=(3, 3, 68)), "no product"),
        (dict(types=(F16, F16, 64)), "no product"),
    ],
)
def test_gemm_refuses_what_cublas_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        gemm(zeros(4), zeros(4), zeros(4), **wrong)


def test_misaligned_address_is_refused():
    odd = DeviceArray(np.zeros(9, np.uint8)[1:].view(np.float32))
    with pytest.raises(ValueError, match=r"address \d+ is not a multiple of 4"):
        gemm(zeros(4), odd, zeros(4))


# --------------------------------------------------------------------------------------- CuPy


def test_model_runs_on_the_simulated_gpu(monkeypatch):
    here = GPT2(
        GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=4, vocab_size=5), rng=np.random.default_rng(0)
    )
    weights = {name: parameter.data for name, parameter in here.named_parameters()}
    with monkeypatch.context() as patch:
        cupy = simulated_cupy(patch)
        model = here.to("cuda:1")
        assert pick_device("auto") == "cuda" and pick_device("cuda:1") == "cuda:1"
        assert type(tinyllm.backend.cuda.launch.LIBRARIES[cupy.ndarray]) is Simulator
        for name, parameter in model.named_parameters():
            assert type(parameter.data) is DeviceArray and parameter.data.device.id == 1
            np.testing.assert_array_equal(parameter.data.get(), weights[name])
    assert DeviceArray not in tinyllm.backend.cuda.launch.LIBRARIES

"""Device selection, its errors, and device memory, with a fake CuPy."""

import builtins
import operator
import sys

import numpy as np
import pytest
from support.fake_cupy import OutOfMemoryError, fake_cupy

from tinyllm.backend.device import describe_device, open_device, pick_device, to_device
from tinyllm.backend.dtypes import PRECISIONS, weights_dtype
from tinyllm.backend.memory import out_of_memory, peak_memory
from tinyllm.errors import Error


@pytest.fixture
def cupy(monkeypatch):
    return fake_cupy(monkeypatch)


@pytest.mark.parametrize("name, number", [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_array_is_moved_to_the_gpu_of_that_index(cupy, name, number):
    assert pick_device(name) == name
    array = np.arange(3)
    there = to_device(array, name)
    assert isinstance(there, cupy.ndarray) and np.array_equal(there.get(), array)
    assert cupy.current == number
    assert to_device(there, name) is there
    assert np.array_equal(to_device(there, "cpu"), array)
    assert to_device(array, "cpu") is array


def test_auto_selects_a_gpu_if_available(cupy):
    assert pick_device("auto") == "cuda"
    cupy.count = 0
    assert pick_device("auto") == "cpu"
    cupy.count = RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
    assert pick_device("auto") == "cpu"


def test_missing_gpu_is_refused(cupy):
    with pytest.raises(Error, match="no device 'cuda:2': CuPy finds 2 GPUs, numbered from 0"):
        pick_device("cuda:2")
    cupy.count = 0
    with pytest.raises(Error, match="no device 'cuda': CuPy finds 0 GPUs"):
        to_device(np.zeros(1), "cuda")


def test_missing_or_outdated_driver_is_reported(cupy):
    cupy.count = RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
    with pytest.raises(Error, match=r"CuPy 14.2.0 finds no GPU \(cudaErrorInsufficientDriver.*nvidia-smi"):
        pick_device("cuda")


@pytest.mark.parametrize(
    "error, message",
    [
        (
            ModuleNotFoundError("No module named 'cupy'"),
            r"needs a GPU and CuPy: pip install 'tinyllm-numpy\[gpu12",
        ),
        (
            ImportError("=====\nCuPy is not\ncorrectly installed"),
            r"cannot be imported \(===== CuPy is not corr",
        ),
    ],
)
def test_cupy_import_error_is_reported(monkeypatch, error, message):
    real = builtins.__import__

    def failing(name, *args, **kwargs):
        if name == "cupy":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(builtins, "__import__", failing)
    with pytest.raises(Error, match=message):
        pick_device("cuda")
    assert pick_device("auto") == "cpu"
    assert open_device("auto") == "cpu"
    assert peak_memory() > 10**7


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", "CUDA", "cuda:\u00b2"])
def test_unknown_device_names_are_refused(cupy, name):
    with pytest.raises(Error, match="unknown device"):
        pick_device(name)


# A program's device


def test_auto_prints_its_choice(cupy, capsys):
    assert open_device("auto") == "cuda"
    assert capsys.readouterr() == ("", "device: cuda (Paper GPU, CuPy 14.2.0)\n")
    cupy.count = 0
    assert open_device("auto") == "cpu"
    assert capsys.readouterr() == ("", "device: cpu\n")
    assert open_device("cpu") == describe_device("cpu") == "cpu"
    assert capsys.readouterr() == ("", "")


def test_open_device_selects_the_named_gpu(cupy, capsys):
    assert open_device("cuda:1") == "cuda:1"
    assert cupy.current == 1
    assert describe_device("cuda:1") == "cuda:1 (Paper GPU, CuPy 14.2.0)"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16", "float16"])
def test_half_precision_and_tf32_need_a_gpu(cupy, capsys, dtype):
    cupy.count = 0
    for name in ("cpu", "auto"):
        with pytest.raises(Error, match=f"--dtype {dtype} needs a GPU: a CPU multiplies float32 faster"):
            open_device(name, dtype)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("capability, reported", [("75", "7.5"), ("61", "6.1"), ("80", None), ("120", None)])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_dtypes_depend_on_compute_capability(cupy, dtype, capability, reported):
    cupy.capability = capability
    if reported is None or dtype not in ("tf32", "bfloat16"):
        assert open_device("cuda", dtype) == "cuda"
        return
    with pytest.raises(Error) as refused:
        open_device("cuda:1", dtype)
    assert str(refused.value) == (
        f"--dtype {dtype} needs a GPU of compute capability 8.0 or higher, but Paper GPU has {reported}: "
        "choose float16"
    )
    assert cupy.current == 0


def test_weights_dtype_of_every_precision():
    assert [weights_dtype(name).name for name in PRECISIONS] == [
        "float32",
        "float32",
        "bfloat16",
        "float16",
        "float64",
    ]


# Memory


@pytest.mark.parametrize("gigabytes, size", [(1.5, 1_500_000_000), (2, 2 * 10**9), (1e-10, 1), (None, 77)])
def test_gpu_memory_limits_the_pool(cupy, gigabytes, size):
    cupy.limit = 77  # the default is CUPY_GPU_MEMORY_LIMIT; 0 means no limit
    open_device("cuda", gpu_memory=gigabytes)
    assert cupy.limit == size


@pytest.mark.parametrize("gigabytes", [0, -1, float("nan"), float("inf")])
def test_invalid_gpu_memory_is_refused(cupy, gigabytes):
    with pytest.raises(Error, match=f"--gpu-memory is {gigabytes}: give a positive number"):
        open_device("cuda", gpu_memory=gigabytes)
    assert cupy.limit == 0


def test_gpu_memory_is_refused_on_a_cpu():
    with pytest.raises(
        Error,
        match="--gpu-memory 2 bounds a GPU's memory: omit it on a CPU",
    ):
        open_device("cpu", gpu_memory=2)


def test_peak_memory_of_a_gpu_is_the_pools_size(cupy):
    cupy.taken = 123
    assert peak_memory("cuda") == 123
    assert peak_memory("cpu") > 10**7


def test_out_of_gpu_memory_message(cupy):
    error = OutOfMemoryError(4_096, 2_000)
    begins = (
        "Out of memory allocating 4,096 bytes (allocated so far: 2,000 bytes), and 2.00 of the GPU's 8.00 GB "
    )
    assert out_of_memory(error, "float32", ["less"]) == begins + "are free: try less or --dtype bfloat16"
    assert out_of_memory(error, "bfloat16", ["less", "few"]) == begins + "are free: try less or few"
    assert out_of_memory(error, "float64", ["less"]) == begins + "are free: try less"
    cupy.capability = "75"
    assert out_of_memory(error, "float32", ["less"]) == begins + "are free: try less or --dtype float16"


def test_out_of_limited_gpu_memory_message(cupy):
    cupy.limit = 5_000
    message = out_of_memory(OutOfMemoryError(4_096, 2_000, 5_000), "float16", ["less"])
    assert "limit set to: 5,000 bytes), and 2.00 of" in message
    assert message.endswith(": try less or a larger --gpu-memory")


def test_out_of_host_memory_message(cupy, monkeypatch):
    with pytest.raises(MemoryError) as numpys:
        np.empty(2**60, np.float32)
    for there in (True, False):
        message = out_of_memory(numpys.value, "float32", ["less"])
        assert message.startswith("Unable to allocate 4.00 EiB for an array with shape")
        assert message.endswith("data type float32: try less")
        assert out_of_memory(MemoryError(), "float32", ["less"]) == "the memory is full: try less"
        if there:
            monkeypatch.delitem(sys.modules, "cupy")


def test_fake_cupy_matches_cupy():
    real = pytest.importorskip("cupy")
    theirs = real.cuda.memory.OutOfMemoryError
    assert issubclass(theirs, MemoryError)
    for numbers in ((4_096, 2_000), (4_096, 2_000, 5_000)):
        assert str(theirs(*numbers)) == str(OutOfMemoryError(*numbers))
    for name in (
        "ndarray asarray get_default_memory_pool cuda.Device.use cuda.Device.compute_capability "
        "cuda.runtime.getDeviceCount cuda.runtime.getDeviceProperties cuda.runtime.memGetInfo "
        "cuda.MemoryPool.set_limit cuda.MemoryPool.get_limit cuda.MemoryPool.total_bytes"
    ).split():
        operator.attrgetter(name)(real)

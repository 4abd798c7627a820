"""Which device a name means, and what is said where it cannot be had; CuPy is a stand-in."""

import builtins
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tinyllm.device import pick_device, to_device
from tinyllm.errors import Error


@pytest.fixture
def cupy(monkeypatch):
    """A CuPy that sees two GPUs; its ``count`` may be a number or an exception."""
    chosen = []

    def count():
        if isinstance(module.count, Exception):
            raise module.count
        return module.count

    class Device:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            chosen.append(self.number)

        def __exit__(self, *_):
            pass

    cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=count), Device=Device)
    module = SimpleNamespace(cuda=cuda, asarray=np.array, __version__="14.2.0", count=2, chosen=chosen)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.mark.parametrize("name, number", [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_an_array_goes_to_the_gpu_of_that_number(cupy, name, number):
    assert pick_device(name) == name
    array = np.arange(3)
    there = to_device(array, name)
    assert there is not array and np.array_equal(there, array)
    assert cupy.chosen == [number]


def test_auto_takes_a_gpu_if_there_is_one(cupy):
    assert pick_device("auto") == "cuda"
    cupy.count = 0
    assert pick_device("auto") == "cpu"
    cupy.count = RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
    assert pick_device("auto") == "cpu"


def test_a_gpu_that_is_not_there(cupy):
    with pytest.raises(Error, match="no device 'cuda:2': CuPy sees 2 GPUs, numbered from 0"):
        pick_device("cuda:2")
    cupy.count = 0
    with pytest.raises(Error, match="no device 'cuda': CuPy sees 0 GPUs"):
        to_device(np.zeros(1), "cuda")


def test_a_driver_that_is_missing_or_too_old(cupy):
    cupy.count = RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
    with pytest.raises(Error, match=r"CuPy 14.2.0 finds no GPU \(cudaErrorInsufficientDriver.*nvidia-smi"):
        pick_device("cuda")


@pytest.mark.parametrize(
    "error, said",
    [
        (ModuleNotFoundError("No module named 'cupy'"), r"needs a GPU and CuPy: pip install 'tinyllm\[gpu12"),
        (ImportError("=====\nCuPy is not\ncorrectly installed"), r"does not load \(===== CuPy is not corr"),
    ],
)
def test_a_cupy_that_does_not_load(monkeypatch, error, said):
    real = builtins.__import__

    def failing(name, *args, **kwargs):
        if name == "cupy":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(builtins, "__import__", failing)
    with pytest.raises(Error, match=said):
        pick_device("cuda")
    assert pick_device("auto") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", "CUDA", "cuda:\u00b2"])
def test_other_names(cupy, name):
    with pytest.raises(Error, match="unknown device"):
        pick_device(name)

"""Fixtures for the tests of ``bench --device``."""

import pytest
from support.bench_cuda import TASKS
from support.fake_cupy import fake_cupy

from parity.bench.cuda.works import SMALL_WORKS, write_weights
from tinyllm import backend


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """task -> the folder with the weights of its work"""
    folders = {name: tmp_path_factory.mktemp(name) / "model" for name in TASKS}
    for name, folder in folders.items():
        write_weights(SMALL_WORKS[name], folder)
    return folders


@pytest.fixture
def cupy(monkeypatch):
    """A fake CuPy; ``done`` lists the calls of the device, ``precisions`` the autocasts."""
    module = fake_cupy(monkeypatch)
    module.done, module.taken, module.free = [], 3 * 10**9, 2 * 10**9
    module.pool.free_all_blocks = lambda: module.done.append("free_all_blocks")
    module.cuda.Device.synchronize = lambda self: module.done.append("synchronize")
    module.cuda.runtime.driverGetVersion = lambda: 12090
    module.cuda.runtime.runtimeGetVersion = lambda: 12080
    module.precisions, autocast = [], backend.autocast

    def recorded(dtype):
        module.precisions.append(dtype)
        return autocast(dtype)

    monkeypatch.setattr(backend, "autocast", recorded)
    return module

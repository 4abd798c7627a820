"""A fake ``cupy`` module with the parts that tinyllm's programs use. It needs no GPU.

Its arrays are ``device_array.DeviceArray``. The driver's answers are attributes that a test can set.
``test_devices.py`` compares its names and messages with the installed package, if there is one.
"""

import sys
from types import SimpleNamespace

from support import device_array
from support.device_array import DeviceArray


class OutOfMemoryError(MemoryError):
    """CuPy's exception with CuPy's message."""

    def __init__(self, size, total, limit=0):
        so_far = f"allocated so far: {total:,} bytes" + (f", limit set to: {limit:,} bytes" if limit else "")
        super().__init__(f"Out of memory allocating {size:,} bytes ({so_far}).")


class FakeCupy(SimpleNamespace):
    """Reports ``count`` GPUs of one compute capability, or raises ``count`` if it is an exception."""

    def __init__(self):
        super().__init__(count=2, capability="90", limit=0, taken=0, free=2 * 10**9)
        fake = self

        class Device(device_array.Device):
            compute_capability = property(lambda self: fake.capability)

        def count():
            if isinstance(self.count, Exception):
                raise self.count
            return self.count

        self.__version__ = "14.2.0"
        self.ndarray = DeviceArray
        self.cuda = SimpleNamespace(
            Device=Device,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=SimpleNamespace(
                getDeviceCount=count,
                getDeviceProperties=lambda number: {"name": b"Paper GPU"},
                memGetInfo=lambda: (self.free, 8 * 10**9),
            ),
        )
        self.pool = SimpleNamespace(
            set_limit=lambda size: setattr(self, "limit", size),
            get_limit=lambda: self.limit,
            total_bytes=lambda: self.taken,
        )

    def get_default_memory_pool(self):
        return self.pool

    @property
    def current(self) -> int:
        """The index of the thread's current GPU."""
        return device_array.Device.current

    def asarray(self, array):
        """The array on the current GPU, copied unless it is there already."""
        if isinstance(array, DeviceArray):
            return array if array.device == device_array.Device() else DeviceArray.of(array.get())
        return DeviceArray.of(array)


def fake_cupy(monkeypatch) -> FakeCupy:
    """Make ``import cupy`` import the fake for the duration of a test; returns it."""
    module = FakeCupy()
    monkeypatch.setattr(device_array.Device, "current", 0)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module

"""A stand-in for the module ``cupy``: as much of it as tinyllm's programs ask for, with no GPU behind it.

Its arrays are `device_array.DeviceArray`s; what the driver would say are attributes for a test to set.
`test_devices.py` compares its names and messages with the installed package, where there is one.
"""

import sys
from types import SimpleNamespace

from support import device_array
from support.device_array import DeviceArray


class OutOfMemoryError(MemoryError):
    """CuPy's, with its message."""

    def __init__(self, size, total, limit=0):
        so_far = f"allocated so far: {total:,} bytes" + (f", limit set to: {limit:,} bytes" if limit else "")
        super().__init__(f"Out of memory allocating {size:,} bytes ({so_far}).")


class StandIn(SimpleNamespace):
    """Sees ``count`` GPUs (or raises it, if it is an exception), all of one name and compute capability."""

    def __init__(self):
        super().__init__(count=2, capability="90", limit=0, taken=0, free=2 * 10**9)
        stand_in = self

        class Device(device_array.Device):
            compute_capability = property(lambda self: stand_in.capability)

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
        """The number of the thread's current GPU."""
        return device_array.Device.current

    def asarray(self, array):
        """Copied to the current GPU, unless it is there."""
        if isinstance(array, DeviceArray):
            return array if array.device == device_array.Device() else DeviceArray.of(array.get())
        return DeviceArray.of(array)


def stand_in_cupy(monkeypatch) -> StandIn:
    """For the length of a test, ``import cupy`` finds a stand-in; returns it."""
    module = StandIn()
    monkeypatch.setattr(device_array.Device, "current", 0)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module

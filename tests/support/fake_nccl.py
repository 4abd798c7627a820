"""A fake ``cupy.cuda.nccl``, with its call signatures: addresses, counts, types, operations, streams.

What NCCL would do among GPUs, it does with MPI on the memory at these addresses.
"""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
from support import device_array
from support.fake_cupy import FakeCupy

NCCL_FLOAT32, NCCL_FLOAT64, NCCL_SUM, STREAM, BYTES = 7, 8, 0, 4711, 128
TYPES = {NCCL_FLOAT32: np.float32, NCCL_FLOAT64: np.float64}


def get_unique_id() -> tuple[int, ...]:
    return tuple(i % 256 - 128 for i in range(BYTES))


class NcclCommunicator:
    """CuPy's class of this name, as of version 14."""

    def __init__(self, ndev: int, commId: tuple, rank: int):
        from mpi4py import MPI

        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        assert isinstance(commId, tuple)
        assert commId == get_unique_id()
        assert (ndev, rank) == (self._comm.size, self._comm.rank)

    def reduceScatter(
        self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int
    ) -> None:
        assert (op, stream) == (NCCL_SUM, STREAM)
        send = memory(sendbuf, recvcount * self._comm.size, datatype)
        self._comm.Reduce_scatter_block(send, memory(recvbuf, recvcount, datatype), op=self._mpi.SUM)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        assert stream == STREAM
        whole = memory(recvbuf, count * self._comm.size, datatype)
        self._comm.Allgather(memory(sendbuf, count, datatype), whole)


def memory(address: int, count: int, datatype: int) -> np.ndarray:
    kind = np.dtype(TYPES[datatype])
    return np.frombuffer((ctypes.c_byte * (count * kind.itemsize)).from_address(address), kind)


def install(gpus: int) -> None:
    """Make ``import cupy`` import the fake with NCCL, in a process that has nothing else to do."""
    cupy = FakeCupy()
    cupy.count = gpus
    cupy.cuda.Device.pci_bus_id = property(lambda device: f"0000:{device.id:02x}:00.0")
    cupy.cuda.get_current_stream = lambda: SimpleNamespace(ptr=STREAM)
    cupy.cuda.nccl = SimpleNamespace(
        available=True,
        NCCL_FLOAT32=NCCL_FLOAT32,
        NCCL_FLOAT64=NCCL_FLOAT64,
        NCCL_SUM=NCCL_SUM,
        get_unique_id=get_unique_id,
        NcclCommunicator=NcclCommunicator,
    )
    device_array.Device.current = 0
    sys.modules |= {"cupy": cupy, "cupy.cuda": cupy.cuda, "cupy.cuda.nccl": cupy.cuda.nccl}

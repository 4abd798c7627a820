"""Several processes that train one model: who they are, and how they exchange arrays and messages.

Every process runs the same program, started by ``mpiexec -n N`` (or by Slurm's srun). Its number among them
is its rank. There are three implementations of one interface:

    OneProcess   no other process; nothing is imported
    MPI          NumPy arrays through mpi4py (``--distributed mpi``)
    NCCL         CuPy arrays through NCCL; the processes find each other through MPI (``--distributed nccl``)

Two calls move arrays. A reduce-scatter sums the arrays of all processes, and each gets its share of the sum;
an all-gather gives the shares of all to everyone. One after the other they are an all-reduce. Messages, which
are small Python objects, go through ``gather``; a broadcast is what the first process gives to it.

Every process makes the same calls in the same order, or the others wait for ever. Therefore an exception
travels as a message: what one process raises within ``agreed`` the others raise in their next ``gather``, and
what is raised ``from`` it counts as raised by all. Between a ``gather`` and the array calls that follow it
nothing may fail on one process only; if it does, that process ends all of them with ``abort``.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import numpy as np

from tinyllm.backend import device
from tinyllm.backend.threads import available_cores, threads_are_chosen, use_threads
from tinyllm.checks import pip_install
from tinyllm.errors import Error

# Variables in which launchers tell a process how many there are, and its rank
LAUNCHERS = {
    "PMI_SIZE": "PMI_RANK",  # MPICH, Intel MPI
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",  # Open MPI
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}

TOLD = Error, FloatingPointError, MemoryError, OSError  # exceptions with a message for the user

POLLING, LONGEST_PAUSE = 0.05, 2e-3  # the share of a wait between two looks, and its bound in seconds


class OneProcess:
    """The interface, for a process that has no others."""

    rank, size = 0, 1
    local_rank = 0  # among the processes of this host
    host = platform.node()

    def gather(self, value=None) -> list:
        """The values of all processes by rank; each gives a small Python object. Also a barrier."""
        return [value]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A block that succeeds on all processes or raises on all the exception of the first that failed."""
        yield

    def reduce_scatter(self, addends, total) -> None:
        """total (n,) = the sum over all processes of addends[rank]; ``addends`` is (size, n)."""
        total[:] = addends[0]

    def all_gather(self, part, whole) -> None:
        """whole[r] = the ``part`` (n,) of process r, for ``whole`` (size, n)."""
        whole[0] = part


class MPI(OneProcess):
    """The processes of MPI's world communicator.

    MPI computes each element of a sum once, on one process, so that all processes get the same bits.
    """

    def __init__(self, mpi):
        self._mpi, self._comm = mpi, mpi.COMM_WORLD
        self.rank, self.size, self.host = self._comm.rank, self._comm.size, mpi.Get_processor_name()
        self.local_rank = self._comm.Split_type(mpi.COMM_TYPE_SHARED).rank
        self.hosts = self.gather(self.host)

    def name(self, rank: int) -> str:
        """A process in a message."""
        return f"process {rank} on {self.hosts[rank]}"

    def gather(self, value=None, error: BaseException | None = None) -> list:
        """The values of all processes by rank, unless one of them has an ``error``, which is then raised."""
        try:
            self._wait()
            found = self._comm.allgather((value, None if error is None else _portable(error)))
        except BaseException as failure:
            self.abort(failure)
        first = next((rank for rank, (_, failed) in enumerate(found) if failed is not None), None)
        if first is None:
            return [value for value, _ in found]
        raised = error if first == self.rank else self._as_here(first, *found[first][1])
        raised.is_shared = True
        raise raised

    def _wait(self) -> None:
        """Wait for all processes, and leave the core to those that still compute, unlike MPI's own calls."""
        request, started = self._comm.Ibarrier(), time.perf_counter()
        while not request.Test():
            time.sleep(min(POLLING * (time.perf_counter() - started), LONGEST_PAUSE))

    def _as_here(self, rank: int, kind: type[BaseException], args: tuple) -> BaseException:
        """The exception of another process, which names it unless that is the first, which speaks for all."""
        if rank > 0 and issubclass(kind, TOLD):
            return kind(f"{self.name(rank)}: {args[0]}")
        return kind(*args)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if _is_shared(error):
                raise
            self.gather(error=error)
        else:
            self.gather()

    def reduce_scatter(self, addends, total) -> None:
        with self._aborting():
            self._comm.Reduce_scatter_block(addends, total, op=self._mpi.SUM)

    def all_gather(self, part, whole) -> None:
        with self._aborting():
            self._comm.Allgather(part, whole)

    @contextmanager
    def _aborting(self) -> Iterator[None]:
        try:
            yield
        except BaseException as failure:
            self.abort(failure)

    def abort(self, failure: BaseException) -> None:
        """End all processes at once, with one sentence that names this one."""
        reason = " ".join(str(failure).split()) or type(failure).__name__
        print(f"tinyllm: process {self.rank} on {self.host}: {reason}", file=sys.stderr, flush=True)
        self._comm.Abort(130 if isinstance(failure, KeyboardInterrupt) else 1)


class NCCL(MPI):
    """One GPU for each process. Arrays go through NCCL, messages through MPI."""

    def __init__(self, mpi, cupy, nccl):
        super().__init__(mpi)
        self._cupy, self._nccl = cupy, nccl
        with self.agreed():
            gpus = cupy.cuda.runtime.getDeviceCount()
            # A launcher may show each process its own GPU only.
            device.use_gpu(self.local_rank if gpus > 1 else 0)
            pick = device.pick_device("cuda")
        with self.agreed():
            self._check_own_gpu(pick)
        (unique_id, *_) = self.gather(nccl.get_unique_id() if self.rank == 0 else None)
        self._communicator = nccl.NcclCommunicator(self.size, unique_id, self.rank)
        self._types = {np.dtype("float32"): nccl.NCCL_FLOAT32, np.dtype("float64"): nccl.NCCL_FLOAT64}

    def _check_own_gpu(self, name: str) -> None:
        with self._cupy.cuda.Device(device.number_of(name)) as gpu:
            used = self.gather((self.host, gpu.pci_bus_id))
        for rank, gpu in enumerate(used):
            if gpu in used[:rank]:
                raise Error(
                    f"process {used.index(gpu)} and process {rank} have the same GPU, {gpu[1]} on {gpu[0]}: "
                    "start at most one process for each GPU"
                )

    def reduce_scatter(self, addends, total) -> None:
        how = self._types[total.dtype], self._nccl.NCCL_SUM, self._stream
        with self._aborting():
            self._communicator.reduceScatter(addends.data.ptr, total.data.ptr, total.size, *how)

    def all_gather(self, part, whole) -> None:
        how = self._types[part.dtype], self._stream
        with self._aborting():
            self._communicator.allGather(part.data.ptr, whole.data.ptr, part.size, *how)

    @property
    def _stream(self) -> int:
        return self._cupy.cuda.get_current_stream().ptr


def _is_shared(error: BaseException | None) -> bool:
    """Whether all processes raised an exception, or that which is its cause."""
    return error is not None and (getattr(error, "is_shared", False) or _is_shared(error.__cause__))


def _portable(error: BaseException) -> tuple[type[BaseException], tuple]:
    """(class, arguments) of what the other processes raise when this one raised ``error``."""
    for kind in TOLD:
        if isinstance(error, kind):
            return kind, (str(error),)
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return type(error), error.args
    return SystemExit, (1,)  # a mistake in the program: this process shows its traceback


# ---------------------------------------------------------------------- opening and finding them

ALONE = OneProcess()


class _Opened:
    """MPI can be started once in a program: its processes, and those that are in use now."""

    by_kind: ClassVar[dict[str, MPI]] = {}
    now: OneProcess = ALONE


def current() -> OneProcess:
    """The processes that train together with this one."""
    return _Opened.now


def shared_out(function: Callable, items: Sequence) -> list:
    """``[function(item) for item in items]``, of which each process computes its share, and all get all."""
    processes = current()
    found = processes.gather([function(item) for item in items[processes.rank :: processes.size]])
    results = [None] * len(items)
    for rank, theirs in enumerate(found):
        results[rank :: processes.size] = theirs
    return results


def is_first() -> bool:
    """Whether this process speaks for all that were started together."""
    for opened in _Opened.by_kind.values():
        return opened.rank == 0
    size, rank = launched()
    return size < 2 or rank == 0


def launched() -> tuple[int, int]:
    """(how many processes the launcher of this one started, its rank); (0, 0) without a launcher."""
    for size, rank in LAUNCHERS.items():
        if os.environ.get(size, "").isdecimal() and os.environ.get(rank, "").isdecimal():
            return int(os.environ[size]), int(os.environ[rank])
    return 0, 0


@contextmanager
def opened(kind: str | None) -> Iterator[OneProcess]:
    """Within this block ``current()`` is all processes, which agree on its outcome; None is this one alone.

    In a nested block they stay the same. Raises ``Error`` if ``kind`` is unknown, if a package, the launcher
    or a GPU is missing, and for None if a launcher started several processes: each would train the same.
    """
    if kind is None and _Opened.now is ALONE and launched()[0] > 1:
        raise Error(
            f"this is one of {launched()[0]} processes, and each would write the same run: add --distributed "
            "mpi, or start it without mpiexec"
        )
    if kind is None or _Opened.now is not ALONE:
        yield _Opened.now
        return
    if kind not in _Opened.by_kind:
        _Opened.by_kind[kind] = _open(kind)
        _share_cores(_Opened.by_kind[kind])
    _Opened.now = _Opened.by_kind[kind]
    try:
        with _Opened.now.agreed():
            yield _Opened.now
    finally:
        _Opened.now = ALONE


def _open(kind: str) -> MPI:
    if kind not in ("mpi", "nccl"):
        raise Error(f"--distributed {kind!r} is unknown: choose mpi or nccl")
    mpi = _import_mpi(kind)
    size = mpi.COMM_WORLD.size
    started, _ = launched()
    if size == 1 and started == 0:
        raise Error(f"--distributed {kind} needs a launcher: mpiexec -n 2 tinyllm … --distributed {kind}")
    if size != max(started, 1):
        raise Error(
            f"the launcher started {started} processes, and mpi4py sees {size}: use the mpiexec of the MPI "
            f"that mpi4py loads, {mpi.Get_library_version().split(chr(10))[0].strip()}"
        )
    if kind == "mpi":
        return MPI(mpi)
    try:
        import cupy
        from cupy.cuda import nccl
    except ImportError as error:
        raise Error(
            f"--distributed nccl needs CuPy with NCCL ({error}): {pip_install('gpu12')}, or mpi"
        ) from None
    if not nccl.available:
        raise Error("--distributed nccl needs NCCL, which CuPy does not find: pip install nvidia-nccl-cu12")
    return NCCL(mpi, cupy, nccl)


def _import_mpi(kind: str):
    try:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"  # only the main thread calls MPI
        from mpi4py import MPI as mpi
    except ImportError:
        raise Error(f"--distributed {kind} needs mpi4py: {pip_install('mpi')}") from None
    except RuntimeError as error:  # mpi4py finds no MPI library
        reason = " ".join(str(error).split())[:200]
        raise Error(f"--distributed {kind}: mpi4py finds no MPI ({reason}): {pip_install('mpi')}") from None
    return mpi


def _share_cores(processes: MPI) -> None:
    """Give each process its share of its host's cores, unless OMP_NUM_THREADS or the like is set."""
    found = processes.gather((processes.host, available_cores()))
    if not threads_are_chosen():
        host, cores = found[processes.rank]
        mine = sum(1 / sum(core in theirs for there, theirs in found if there == host) for core in cores)
        use_threads(max(1, int(mine + 1e-9)))

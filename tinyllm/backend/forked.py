"""Processes forked from this one, and memory that they share with it.

A forked process begins with everything that this one has, a model or a function of any kind, without reading
or copying it: the system copies a page when one of the two writes to it. Unlike a thread it has an
interpreter of its own, so neither waits for the other's lock.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.util import Finalize

import numpy as np

from tinyllm.backend.threads import use_threads
from tinyllm.errors import Error

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def can_fork() -> bool:
    """Whether processes can be forked: on Linux. macOS's BLAS does not work in them; Windows has no fork."""
    return sys.platform == "linux"


def shared_copies(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Copies of arrays in memory which processes forked later share with this one."""
    starts, size = [], 0
    for array in arrays:
        starts.append(size)
        size += -(-array.nbytes // 64) * 64  # a cache line, the alignment that NumPy's kernels prefer
    try:
        memory = mmap.mmap(-1, max(size, 1))
    except OSError as error:
        raise MemoryError(f"{size:,} bytes cannot be shared among processes ({error.strerror})") from None
    copies = []
    for array, start in zip(arrays, starts):
        copies.append(np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape))
        copies[-1][...] = array
    return copies


class Forked:
    """A process of one thread that calls ``function(*arguments)`` for every ``ask``.

    The function sees this process's memory as it was when the other was forked, and what is shared as it is
    now. The other process ends on ``close()`` or with this one, however that ends, and leaves signals to it.
    """

    def __init__(self, function: Callable):
        context = multiprocessing.get_context("fork")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(function, other, os.getpid()), daemon=True)
        with warnings.catch_warnings():
            # Python 3.12 warns of locks that another thread holds. The function takes none: it computes.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                self._process.start()
            except OSError as error:
                raise Error(f"no further process can be started ({error.strerror}): use fewer") from None
        other.close()
        self.pid = self._process.pid
        # Also when this is garbage, and at the end of the program: ``multiprocessing`` would wait for ever.
        self.close = Finalize(self, _end, (self._process, self._connection), exitpriority=1)

    def ask(self, *arguments) -> None:
        """Send the arguments of a call."""
        try:
            self._connection.send(arguments)
        except OSError:
            raise self._ended() from None

    def answer(self):
        """Wait for the result of the call; raises what the function raised."""
        try:
            result, error = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if error is not None:
            raise error
        return result

    def _ended(self) -> Error:
        self._process.join()
        code = self._process.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        full = ", perhaps because the memory is full" if how == "SIGKILL" else ""
        return Error(f"process {self.pid}, which computes a part of every step, ended with {how}{full}")


def _end(process, connection) -> None:
    """End a process, whatever it is doing."""
    process.kill()
    process.join()
    process.close()
    connection.close()


def _work(function: Callable, connection, parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides, and kills this process
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    use_threads(1)
    while os.getppid() == parent:
        try:
            arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            found = function(*arguments), None
        except Exception as error:
            found = None, _portable(error)
        connection.send(found)


def _portable(error: Exception) -> Exception:
    """An exception to raise in the other process, with this one's traceback."""
    try:
        found = pickle.loads(pickle.dumps(error))
    except Exception:
        found = Error(f"{type(error).__name__}: {error}")
    found.add_note(f"in process {os.getpid()}:\n{''.join(traceback.format_exception(error))}")
    return found

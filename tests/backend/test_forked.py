"""Processes forked from this one, and memory shared with them."""

import gc
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tinyllm.backend.forked import Forked, can_fork, shared_copies
from tinyllm.backend.memory import private_memory
from tinyllm.backend.threads import num_threads
from tinyllm.errors import Error

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux only")


def answer(function, *arguments):
    process = Forked(function)
    try:
        process.ask(*arguments)
        return process.answer()
    finally:
        process.close()


def test_it_sees_memory_as_it_was_and_shared_arrays_as_they_are():
    kept = [1]
    (shared,) = shared_copies([np.arange(3.0)])
    process = Forked(lambda factor: (kept[0], (factor * shared).tolist()))
    kept[0], shared[1] = 2, 7
    for factor in (2, 3):
        process.ask(factor)
        assert process.answer() == (1, [0, 7 * factor, 2 * factor])
    process.close()


def test_it_writes_shared_arrays_but_no_others():
    own, (shared,) = np.zeros(3), shared_copies([np.zeros(3)])

    def write():
        own[:], shared[:] = 1, 1

    answer(write)
    assert own.tolist() == [0, 0, 0]
    assert shared.tolist() == [1, 1, 1]


def test_shared_copies_are_equal_aligned_and_apart():
    given = [np.arange(5, dtype=np.float32), np.float64(3), np.arange(12).reshape(3, 4).T, np.zeros((0, 2))]
    copies = shared_copies([np.asarray(array) for array in given])
    for array, copy in zip(given, copies):
        np.testing.assert_array_equal(copy, array)
        assert (copy.dtype, copy.shape) == (np.asarray(array).dtype, np.shape(array))
        assert copy.flags.c_contiguous
        assert copy.ctypes.data % 64 == 0 or not copy.size
    copies[0][:] = 9
    assert copies[1] == 3
    assert given[0][1] == 1


def test_shared_memory_lives_as_long_as_its_arrays():
    copies = shared_copies([np.ones(2**20), np.ones(1)])
    before = private_memory(os.getpid())
    kept = copies[1]
    del copies
    gc.collect()
    assert kept[0] == 1
    del kept
    gc.collect()
    assert before - private_memory(os.getpid()) >= 2**22


def test_memory_that_is_too_small_to_share():
    huge = np.broadcast_to(np.float64(0), (2**57,))
    with pytest.raises(MemoryError, match=r"1,152,921,504,606,846,976 bytes cannot be shared"):
        shared_copies([huge])


def test_it_has_one_thread_and_ignores_the_signals_of_a_terminal(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert answer(num_threads) == 1
    handled = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    assert answer(lambda: [signal.getsignal(number) for number in handled]) == [signal.SIG_IGN] * 3


def test_what_it_raises_is_raised_here_with_its_traceback():
    def fail(text):
        raise KeyError(text)

    process = Forked(fail)
    for text in ("one", "two"):  # it goes on afterwards
        process.ask(text)
        with pytest.raises(KeyError, match=text) as found:
            process.answer()
        assert "in fail" in found.value.__notes__[0]
    process.close()


def receive(number):
    signal.raise_signal(number)


@pytest.mark.parametrize(
    ("end", "argument", "how"), [(os._exit, 3, "exit code 3"), (receive, signal.SIGUSR1, "SIGUSR1")]
)
def test_a_process_that_ends_is_named(end, argument, how):
    process = Forked(end)
    process.ask(argument)
    with pytest.raises(Error, match=rf"process {process.pid}, .* ended with {how}$"):
        process.answer()
    with pytest.raises(Error, match=how):
        process.ask()
    process.close()


def test_closing_ends_it_whatever_it_does_and_leaves_nothing_open():
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    process = Forked(lambda: signal.pause())
    process.ask()
    pid = process.pid
    process.close()
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_ends_when_nobody_refers_to_it():
    process = Forked(lambda: signal.pause())
    process.ask()
    pid = process.pid
    del process
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_it_ends_with_the_program_however_that_ends(end):
    program = f"""
import os, signal, time
from tinyllm.backend.forked import Forked, shared_copies
import numpy as np
(begun,) = shared_copies([np.zeros(1)])
def work():
    begun[0] = 1
    signal.pause()
process = Forked(work)
process.ask()
while not begun[0]:
    time.sleep(0.01)
print(process.pid, flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=60)
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{int(done.stdout)}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)

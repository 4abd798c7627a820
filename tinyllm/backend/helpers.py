"""Threads that take parts of a piece of work.

Handing work to a thread of ``concurrent.futures`` takes 25 microseconds of Python, besides waking the thread.
A helper is woken by one lock and waited for by another.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable


class _Helper:
    """A thread that runs one function at a time."""

    def __init__(self):
        self.given, self.finished = threading.Lock(), threading.Lock()  # each released by the other thread
        self.given.acquire()
        self.finished.acquire()
        threading.Thread(target=self._work, name="tinyllm helper", daemon=True).start()

    def start(self, function: Callable, part) -> None:
        # In a copy of this context, so that np.errstate applies there too.
        self.run, self.part, self.error = contextvars.copy_context().run, (function, part), None
        self.given.release()

    def wait(self) -> BaseException | None:
        """Wait for the end of the function, and return the exception that it raised."""
        self.finished.acquire()
        error, self.error, self.part = self.error, None, None
        return error

    def _work(self) -> None:
        while True:
            self.given.acquire()
            try:
                self.run(*self.part)
            except BaseException as error:  # raised in the thread that waits
                self.error = error
            self.finished.release()


class _Helpers:
    """The helpers, started when first used, and the lock of the thread that they work for."""

    threads: list[_Helper]

    @classmethod
    def reset(cls) -> None:
        cls.threads, cls.lock = [], threading.Lock()


_Helpers.reset()
if hasattr(os, "register_at_fork"):  # a forked child inherits the objects but not their threads
    os.register_at_fork(after_in_child=_Helpers.reset)


def run_parts(function: Callable, parts: list) -> None:
    """``function(part)`` for the first part in this thread and for each other one in a thread of its own.

    Parts must not write to the same memory, and the function must not call this one. While the helpers work
    for another thread, all parts are done here.
    """
    lock = _Helpers.lock
    if len(parts) == 1 or not lock.acquire(blocking=False):
        for part in parts:
            function(part)
        return
    try:
        while len(_Helpers.threads) < len(parts) - 1:
            _Helpers.threads.append(_Helper())
        running = _Helpers.threads[: len(parts) - 1]
        for helper, part in zip(running, parts[1:]):
            helper.start(function, part)
        errors = []
        try:
            function(parts[0])
        finally:
            errors = [helper.wait() for helper in running]  # they may still be writing to the arrays
    finally:
        lock.release()
    for error in filter(None, errors):
        raise error

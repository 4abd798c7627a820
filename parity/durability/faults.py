"""Fault injection into calls that change the disk.

The calls are counted, and one of them fails: either it raises an error, like a failing disk, or the process
dies.
"""

from __future__ import annotations

import builtins
import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock


def raising(error: BaseException) -> Callable[[], None]:
    """A failure for ``writing`` that raises this error."""

    def fail() -> None:
        raise error

    return fail


def die() -> None:
    """A failure for ``writing`` that kills the process: nothing is flushed, closed or cleaned up."""
    os.kill(os.getpid(), KILL)


KILL = 9  # SIGKILL; Windows lacks the name, and terminates a process on any unknown number

KILLED = KILL if os.name == "nt" else -KILL  # exit code of a killed process


@contextmanager
def writing(fail_at: int | None = None, fail: Callable[[], None] | None = None) -> Iterator[list[str]]:
    """Count every mkdir, open for writing, write, flush and rename; call number ``fail_at`` fails.

    Yields the list of the calls so far: "mkdir", "open", "write", "flush", "fsync", "replace".
    """
    calls = []

    def note(what: str) -> None:
        calls.append(what)
        if len(calls) - 1 == fail_at:
            fail()

    def noted(what: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            note(what)
            return function(*args, **kwargs)

        return call

    real_open = builtins.open

    def open_(file, mode="r", *args, **kwargs):
        if not set("wax") & set(mode):
            return real_open(file, mode, *args, **kwargs)
        note("open")
        return _Written(real_open(file, mode, *args, **kwargs), note)

    with contextlib.ExitStack() as patched:
        patched.enter_context(mock.patch("builtins.open", open_))
        for name in ("mkdir", "fsync", "replace"):
            patched.enter_context(mock.patch.object(os, name, noted(name, getattr(os, name))))
        yield calls


class _Written:
    """An open file that counts its writes and flushes for ``writing``."""

    def __init__(self, file, note: Callable[[str], None]):
        self.file, self.note = file, note

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.note("write")
        return self.file.write(data)

    def flush(self):
        self.note("flush")
        self.file.flush()

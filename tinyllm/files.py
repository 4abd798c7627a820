"""Writing and reading files safely.

A process can be killed, a disk fill up, the power fail, at any moment. What must never be half there is
written under another name, flushed to the disk, and renamed: the rename happens or it does not. What may be
damaged later carries its own SHA-256. Two processes that would write the same files are kept apart by a lock
that the system takes back from a process that dies. And what is read may come from anywhere: a path may lead
to a pipe or a device, and a JSON file may hold what Python's parser lets pass.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tinyllm.errors import Error

if TYPE_CHECKING:
    from filelock import BaseFileLock

SAVING = ".saving-"  # begins the name of what is not complete yet


def sync(file: BinaryIO) -> None:
    """Bring what was written to an open file onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk: what was renamed there stays renamed."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and bring it onto the disk."""
    with open(path, "wb") as file:
        file.write(data)
        sync(file)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, or replace one: whoever looks sees the old file or the new one, never a part."""
    new = path.with_name(SAVING + path.name)
    write_synced(new, data)
    os.replace(new, path)
    sync_folder(path.parent)


def lock(path: Path, busy: str) -> BaseFileLock:
    """Become the one holder of the lock in a file, until ``release()`` or the end of the process.

    Raises ``Error(busy)`` at once if there is another one, and OSError if the file cannot be made.
    """
    from filelock import FileLock, Timeout

    found = FileLock(path)
    try:
        found.acquire(timeout=0)
    except Timeout:
        raise Error(busy) from None
    return found


def sealed(content: dict) -> bytes:
    """A JSON object as a file in which one changed bit is noticed.

    Its last member, ``sha256``, is the hash of the file as it would be without it.
    """
    digest = hashlib.sha256(_as_json(content)).hexdigest()
    return _as_json(content | {"sha256": digest})


def read_sealed(path: Path) -> dict:
    """What ``sealed`` wrote into a file, ``sha256`` included.

    Raises ``Error``, naming the file, if it is not there, or not as it was written, down to the last space.
    """
    data = read_file(path)
    try:
        found = json.loads(data)
        content = {key: value for key, value in found.items() if key != "sha256"}
        whole = sealed(content) == data
    except (ValueError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise Error(f"{path} is damaged (it does not have the SHA-256 it was written with): copy it again")
    return found


def _as_json(content: dict) -> bytes:
    return json.dumps(content, indent=2, allow_nan=False).encode("utf-8") + b"\n"


def check_is_file(path: str | Path) -> None:
    """Raise OSError if the path leads to nothing, or to something other than a file."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file", os.fspath(path))


def read_file(path: str | Path, size: int = -1) -> bytes:
    """All bytes of a file, or the first ``size``. Raises Error, naming it, if it cannot be read."""
    try:
        check_is_file(path)
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise Error(f"{path} cannot be read ({error.strerror}): check the path or copy it again") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, line ends as Python's. Raises Error, naming the file, if there is none."""
    data = read_file(path)
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()
    except ValueError as error:
        raise Error(f"{path} is not text in UTF-8 ({error}): copy it again") from error


def read_json(path: str | Path) -> dict:
    """The JSON object in a UTF-8 file. Raises Error, naming the file, if there is none."""
    data = read_file(path)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise Error(f"{path} is not JSON in UTF-8 ({error}): correct it or copy it again") from error
    if not isinstance(value, dict):
        raise Error(f"{path} holds a JSON {type(value).__name__}, not an object {{...}}: correct it")
    return value


HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # or a whole one, of two halves


def parse_json(data: bytes):
    """The value of a JSON text in UTF-8 (RFC 8259); ValueError if it is anything else.

    Python's own parser also accepts NaN, 1e999 (as infinity), a key that is there twice (the last one
    counts) and half a character (which cannot be written again).
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if HALF_CHARACTER.search(data):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is too large for a float")
    return number

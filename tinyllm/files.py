"""Crash-safe writing and defensive reading of files.

A process may be killed, a disk may fill up and the power may fail at any moment. A file that must never be
incomplete is therefore written under a temporary name, flushed to disk and renamed, because a rename is
atomic. A file that might be corrupted later contains its own SHA-256. A lock, which the operating system
releases when its holder dies, keeps two processes from writing the same files. Input is untrusted: a path may
name a pipe or a device, and a JSON file may contain values that Python's parser accepts but JSON forbids.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tinyllm.errors import Error

if TYPE_CHECKING:
    from filelock import BaseFileLock

SAVING = ".saving-"  # prefix of the names of incomplete files
MAX_BYTES = 2**29  # of a file that is read into memory at once: a large tokenizer.json has 2**25


def printable(path: str | Path) -> str:
    r"""A path, or a text with paths in it, in which bytes that are not UTF-8 are escaped, as \xff."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def sync(file: BinaryIO) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a crash."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and flush it to disk."""
    with open(path, "wb") as file:
        file.write(data)
        sync(file)


def write_whole(path: Path, data: bytes) -> None:
    """Write or replace a file atomically: a reader sees the old contents or the new, never a mixture."""
    with replacing(path) as new, open(new, "wb") as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a new file to write, which then replaces ``path`` atomically, or is removed on failure.

    Its name is its own, so that two programs that write the same file at once do not write into each other's:
    the last one to finish replaces the other's. A link to a file stays a link; a device or a pipe is written
    directly.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    new = path.with_name(f"{SAVING}{secrets.token_hex(4)}-{path.name}")
    try:
        yield new
        with open(new, "rb+") as file:
            sync(file)
        os.replace(new, path)
    except (Exception, KeyboardInterrupt):
        new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def check_is_writable(path: Path) -> None:
    """Raise ``Error`` if a file cannot be written, as far as that can be told before."""
    if path.is_dir():
        raise Error(f"{path} cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise Error(f"{path} cannot be written: there is no folder {path.parent}")
    if (path.is_file() or not path.exists()) and not os.access(path.parent, os.W_OK | os.X_OK):
        raise Error(f"{path} cannot be written: no file can be made in {path.parent}")


def check_writable(folder: Path, option: str) -> None:
    """Raise ``Error``, naming the option, if the folder cannot be made or written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise Error(f"{option} {folder}: {existing} is not a folder: choose another {option}")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise Error(f"{option} {folder}: {existing} cannot be written to: choose another {option}")


def append_whole(path: Path, data: bytes) -> None:
    """Append to a file. Raises OSError, and leaves the file as it was, if the disk is full, say."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)
        raise OSError(f"{path} cannot be written ({error.strerror or error})") from error


def lock(path: Path, busy: str) -> BaseFileLock:
    """Acquire an exclusive lock file, held until ``release()`` or the end of the process.

    Raises ``Error(busy)`` immediately if it is held already, and OSError if the file cannot be created.
    """
    from filelock import FileLock, Timeout

    found = FileLock(path)
    try:
        found.acquire(timeout=0)
    except Timeout:
        raise Error(busy) from None
    return found


def sealed(content: dict) -> bytes:
    """Serialize a JSON object so that any later change can be detected.

    Its last member, ``sha256``, is the hash of the serialization without that member.
    """
    digest = hashlib.sha256(_as_json(content)).hexdigest()
    return _as_json(content | {"sha256": digest})


def read_sealed(path: Path) -> dict:
    """Read a file written by ``sealed``; the result includes ``sha256``.

    Raises ``Error``, naming the file, if it cannot be read or differs by a single byte.
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


def check_is_file(path: str | Path | int) -> os.stat_result:
    """Raise OSError unless the path, or the descriptor of an open file, is that of a regular file."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a regular file", str(path))
    return status


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, without ever waiting for a pipe or a device. Raises OSError.

    The path is checked before it is opened, because opening a device may have an effect, and the open file
    again, because the path may have been replaced in between.
    """
    # Files in /proc have size 0, but may be endless, or wait: they are read as empty files.
    empty = check_is_file(path).st_size == 0
    return open(os.devnull, "rb") if empty else open(path, "rb", opener=_open_without_waiting)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a regular file, in hex. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_without_waiting(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        check_is_file(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_file(path: str | Path, size: int = MAX_BYTES) -> bytes:
    """Read a file, or its first ``size`` bytes. Raises ``Error``, naming it, if it cannot be read.

    A file is refused if it has more than ``MAX_BYTES``: it is not read into memory to find out what it is.
    """
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno()).st_size
            if size == MAX_BYTES < found:
                raise OSError(errno.EFBIG, f"it has more than {MAX_BYTES:,} bytes", str(path))
            return file.read(min(size, found))  # read() allocates as much as it is asked for
    except OSError as error:
        raise Error(f"{path} cannot be read ({error.strerror}): check the path or copy it again") from error


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file with line ends converted to \\n. Raises ``Error``, naming it, if that fails."""
    data = read_file(path)
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()
    except ValueError as error:
        raise Error(f"{path} is not text in UTF-8 ({error}): copy it again") from error


def read_json(path: str | Path) -> dict:
    """Read a JSON object from a UTF-8 file. Raises ``Error``, naming it, if that fails."""
    data = read_file(path)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise Error(f"{path} is not JSON in UTF-8 ({error}): correct it or copy it again") from error
    if not isinstance(value, dict):
        raise Error(f"{path} contains a JSON {type(value).__name__}, not an object {{...}}: correct it")
    return value


SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # alone, or one of a pair


def parse_json(data: bytes):
    """Parse UTF-8 JSON (RFC 8259). Raises ValueError if it is anything else.

    Stricter than Python's parser, which also accepts NaN, 1e999 (as infinity), duplicate keys (the last one
    wins) and unpaired surrogates (which cannot be encoded again).
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if SURROGATE.search(data):  # encoding fails on an unpaired one
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """The object with these keys and values. Raises ValueError for a key that occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is too large for a float")
    return number

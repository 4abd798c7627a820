"""How is a file read that somebody else made?

Nothing about it is believed, not even that it is a file: a pipe of that name would keep us waiting for ever,
a device never end. Links are followed, wherever they lead: Hugging Face's cache is made of links out of its
folders, and only who may write into a folder can put one there. A name that stands in a file is another
matter: it must not lead anywhere else (see ``pretrained.py``'s shards).
"""

import errno
import io
import json
import math
import os
import re
import stat
from pathlib import Path

from tinyllm.errors import Error

HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # or a whole one, of two halves


def check_is_file(path: str | Path) -> None:
    """Raise OSError if there is nothing at the end of the path, or something other than a file."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, and no file", os.fspath(path))


def read_file(path: str | Path) -> bytes:
    """All bytes of a file. Raises Error, naming it, if there is no such file or it cannot be read."""
    try:
        check_is_file(path)
        return Path(path).read_bytes()
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


def parse_json(data: bytes):
    """The value of a JSON text in UTF-8 (RFC 8259); ValueError if it is anything else.

    Python's own parser is kinder: to NaN, to 1e999 (which it makes infinity), to a key that is there twice
    (the last one wins) and to half a character (which cannot be written again).
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
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is too large for a float")
    return number

"""Documents in plain-text and .jsonl files, gzip-compressed or not, single or in folders; and known texts.

A plain file is one document; each line of a .jsonl file is one. Files are read in blocks, so that a document
may be larger than memory.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tinyllm.data.named import BOOK, PublishedFile
from tinyllm.errors import Error
from tinyllm.files import open_regular, unique_keys
from tinyllm.tokenizers.base import check_text

KNOWN_TEXTS = ("python-docs", "python-docstrings", "python-docstrings-test", "the-verdict")
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")  # of the files read from a folder without a pattern
BLOCK_BYTES = 2**20
LONGEST_LINE = 2**26  # bytes of a line in a .jsonl file, which is parsed in memory

# Edith Wharton, 1908, public domain: the training text of Raschka's "Build a Large Language Model (From
# Scratch)".
VERDICT_FILE = "the-verdict.txt"
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
VERDICT_URL = f"{BOOK}/ch02/01_main-chapter-code/the-verdict.txt"


@dataclass(frozen=True)
class Piece:
    """A document or a part of one, in order."""

    text: str
    ends_document: bool


def find_files(name: str | Path, pattern: str | None = None) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files to read, in order, and the files of a folder that are left out.

    From a folder and the folders below it, sorted by path: the files that match the glob ``pattern``, or by
    default those that end in one of ``SUFFIXES``. Case is ignored. A pattern with a slash, such as
    ``docs/*.md``, is matched against the end of the path, as in ``PurePath.match``. Raises ``Error`` if there
    are none, or if a path cannot be read or is neither a file nor a folder. Training runs are left out.
    """
    if pattern is not None and not (isinstance(pattern, str) and PurePosixPath(pattern).parts):
        raise Error(f"pattern {pattern!r} matches nothing: give a glob pattern such as '*.py'")
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        known = ", ".join(KNOWN_TEXTS)
        raise Error(f"no text {str(name)!r}: give the path of a file or folder, or one of {known}") from None
    except (OSError, ValueError) as error:  # ValueError: the path contains a zero byte
        reason = getattr(error, "strerror", None) or error  # strerror does not repeat the path
        raise Error(f"text {str(name)!r} cannot be read ({reason}): check the path") from None
    if stat.S_ISDIR(mode):
        return _files_in(Path(name), pattern)
    if not stat.S_ISREG(mode):  # a pipe can be read only once
        raise Error(f"text {str(name)!r} is neither a file nor a folder: save the text as a file first")
    return (Path(name),), ()


def is_jsonl(path: Path) -> bool:
    return path.name.lower().endswith((".jsonl", ".jsonl.gz"))


def read_documents(files: Iterable[Path], field: str | None) -> Iterator[Piece]:
    """The documents of the files, block by block; ``field`` names the text in a .jsonl object.

    Raises ``Error``, naming the file and the position, if one cannot be read, is damaged or is malformed.
    """
    for path in files:
        yield from _read_jsonl(path, field) if is_jsonl(path) else _read_plain(path)


def python_docs() -> str:
    """The help topics that ship with CPython, sorted by name and joined by blank lines."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def the_verdict() -> Path:
    """The path of "The Verdict": in the folder TINYLLM_DATA, or downloaded once and cached."""
    return PublishedFile(VERDICT_FILE, VERDICT_URL, VERDICT_SHA256).find("the-verdict")


def _files_in(folder: Path, pattern: str | None) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    def refuse(error: OSError):  # by default os.walk skips a folder that cannot be read
        raise Error(f"folder {error.filename!r} cannot be read ({error.strerror}): check its permissions")

    def relative(path: Path) -> str:  # sorts the same on every system
        return path.relative_to(folder).as_posix()

    def selected(path: Path) -> bool:
        if pattern is None:
            return path.name.lower().endswith(SUFFIXES)
        # Below the folder's own name, so that **/*.py matches a file directly in the folder.
        return PurePosixPath(top, relative(path).lower()).match(pattern.lower())

    top, files, left_out = folder.absolute().name.lower(), [], []
    for root, folders, names in os.walk(folder, onerror=refuse):
        if root != os.fspath(folder) and {"config.json", "metrics.jsonl"} <= {*names}:  # a training run
            left_out += [Path(root, name) for name in [*folders, *names]]
            folders.clear()
            continue
        left_out += [Path(root, name) for name in folders if os.path.islink(Path(root, name))]
        for name in names:
            path = Path(root, name)
            (files if os.path.isfile(path) and selected(path) else left_out).append(path)
    if not files:
        problem = "has no .txt or .jsonl file" if pattern is None else f"has no file that matches {pattern!r}"
        counts = Counter(path.suffix.lower() or "without a suffix" for path in left_out).most_common(8)
        found = ", ".join(f"{count} {suffix}" for suffix, count in counts) or "no files"
        raise Error(f"folder {str(folder)!r} {problem}; it holds {found}: give a pattern such as '*.py'")
    return tuple(sorted(files, key=relative)), tuple(sorted(left_out, key=relative))


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. Failures inside the ``with`` block become an ``Error``."""
    try:
        if path.suffix.lower() == ".gz":
            if path.stat().st_size == 0:  # gzip.open would return an empty text
                raise EOFError("the file is empty")
            with open_regular(path) as packed, gzip.open(packed) as file:
                yield file
        else:
            with open_regular(path) as file:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Error(f"{str(path)!r} is damaged or truncated ({error}): compress the text again") from None
    except OSError as error:
        raise Error(f"text {str(path)!r} cannot be read ({error}): check the file") from None


def _read_plain(path: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")()  # text mode would convert \r\n to \n
    offset = 0
    with _open(path) as file:
        for data in itertools.chain(iter(partial(file.read, BLOCK_BYTES), b""), [b""]):
            held = len(decoder.getstate()[0])  # bytes of a character that the last block cut off
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise Error(
                    f"text {str(path)!r} is not UTF-8 at byte offset {offset - held + error.start} "
                    f"({error.object[error.start]:#04x}): save it as UTF-8 first"
                ) from None
            offset += len(data)
            yield Piece(text, ends_document=not data)


def _read_jsonl(path: Path, field: str) -> Iterator[Piece]:
    with _open(path) as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise Error(
                    f"line {number} of {str(path)!r} has more than {LONGEST_LINE:,} bytes: split its document"
                )
            if not line.isspace():
                yield Piece(_document(line, field, f"line {number} of {str(path)!r}"), ends_document=True)


def _document(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise Error(
            f"{where} is not UTF-8 at byte offset {error.start} of the line ({line[error.start]:#04x}): "
            "save the file as UTF-8 first"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Error(f"{where} is not JSON ({error}): correct it") from None
    if not isinstance(record, dict):
        raise Error(f"{where} is a JSON {type(record).__name__}: write an object with the text in a field")
    if field not in record:
        raise Error(f"{where} has no field {field!r}, only {list(record)}: name the one with the text")
    try:
        check_text(record[field])  # JSON can encode a lone surrogate
    except Error as error:
        raise Error(f"field {field!r} in {where}: {error}, or choose another field") from None
    return record[field]

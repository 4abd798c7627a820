"""Where does the text come from?

From a known name, a file, or a folder of files, gzip'd or not, and it may be larger than memory. A text is
a sequence of documents: a plain file is one, a line of a .jsonl file is one. ``open_corpus`` reads it once,
to count and hash it; after that it is read anew whenever it is asked for: in ``pieces`` of about a million
characters, by ``documents``, or whole (``load_text``). Between two documents stands ``<|endoftext|>`` when
they become ids (``encode_documents``).
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyllm.errors import Error
from tinyllm.tokenizers.base import END_OF_TEXT, Tokenizer

KNOWN_TEXTS = ("python-docs", "the-verdict")

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")  # of the files in a folder that are read

# Edith Wharton, 1908, public domain: the text of the classic run.
VERDICT_FILE = "the-verdict.txt"

VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"

VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt"
)

BLOCK_BYTES = 2**20  # read from a file at a time

PIECE_CHARACTERS = 2**20  # a longer document is cut at the first place after so many

LONGEST_PIECE = 16 * 2**20  # where that place has to come by

# A document may be cut after a character that is no whitespace, before one that is: GPT-2's pattern joins no
# such two and looks at nothing that lies before, so the tokens of the pieces are those of the whole. U+001C
# to U+001F are whitespace in Python and not in the pattern: no cut is made beside them.
CUT = re.compile(r"\S(?=[^\S\x1c-\x1f])")


@dataclass(frozen=True)
class Text:
    """A text in memory and where it came from; ``sha256`` and ``left_out`` are those of its ``Corpus``."""

    name: str
    documents: tuple[str, ...]
    sha256: str
    left_out: tuple[Path, ...] = ()

    @property
    def text(self) -> str:
        """The documents one after another, with nothing between them."""
        return "".join(self.documents)


@dataclass(frozen=True)
class Piece:
    """A document or a part of one, in order."""

    text: str
    ends_document: bool


class Corpus:
    """A text that is read when it is needed, a little at a time: what ``open_corpus`` returns.

    ``name``: as it was asked for. ``files``: where it stands, in order (none for ``python-docs``).
    ``left_out``: what else the folder holds, and was not read. ``num_documents``, ``num_characters``,
    ``num_bytes``: the size of the text itself, in UTF-8, after decompression. ``sha256``: of one document,
    the hex digest of its UTF-8 bytes; of several, the digest of their digests one after another, so that
    moving a document's end changes it, and compressing a file does not.
    """

    def __init__(self, name: str, files: tuple[Path, ...], left_out: tuple[Path, ...], field: str | None):
        self.name, self.files, self.left_out, self.field = name, files, left_out, field
        measured = _Measure()
        for block in self._read():
            measured.add(block)
        if measured.blank:
            raise Error(f"text {name!r} is empty or only whitespace: give a text with words in it")
        self.num_documents, self.num_characters = measured.documents, measured.characters
        self.num_bytes, self.sha256 = measured.bytes, measured.sha256

    def pieces(self) -> Iterator[Piece]:
        """The text, however large, in pieces that fit memory: short documents whole, long ones cut.

        A document of ``PIECE_CHARACTERS`` or more is cut at the first place after so many where a
        character that is no whitespace is followed by one that is. Where to cut depends on the text alone.
        Raises ``Error`` if no such place comes within ``LONGEST_PIECE`` characters, or at the end if the
        text is no longer the one that was opened.
        """
        text = ""
        for block in self._read_again():
            text += block.text
            start = 0
            while found := CUT.search(text, start + PIECE_CHARACTERS - 1):
                yield Piece(text[start : found.end()], ends_document=False)
                start = found.end()
            text = text[start:]
            if len(text) > LONGEST_PIECE:
                raise Error(
                    f"text {self.name!r} has {len(text):,} characters without a place to cut (whitespace "
                    "after something else): break its longest lines"
                )
            if block.ends_document:
                yield Piece(text, ends_document=True)
                text = ""

    def documents(self) -> Iterator[str]:
        """The documents, each of them whole."""
        blocks = []
        for block in self._read_again():
            blocks.append(block.text)
            if block.ends_document:
                yield "".join(blocks)
                blocks = []

    def sample(self, characters: int, validation_fraction: float = 0.1) -> list[str]:
        """Pieces of about so many characters together, evenly spread over the part to train on.

        That part is the first ``1 - validation_fraction`` of the bytes, none of which ``TokenFile.split``
        puts into the validation part. Raises ``Error`` if not even the first piece lies in it.
        """
        check_fraction(validation_fraction)
        training_bytes = (1 - validation_fraction) * self.num_bytes
        chosen, taken, position = [], 0, 0
        for piece in self.pieces():
            size = len(piece.text.encode("utf-8"))
            if position + size > training_bytes:
                break
            if taken * training_bytes <= characters * position:  # behind the pace that spreads them
                chosen.append(piece.text)
                taken += len(piece.text)
            position += size
        if not chosen:
            raise Error(
                f"text {self.name!r} has {self.num_bytes:,} bytes, too few to take pieces as a sample: use "
                "all of it"
            )
        return chosen

    def _read(self) -> Iterator[Piece]:
        """The documents in the blocks they are read in."""
        if not self.files:
            yield Piece(_python_docs(), ends_document=True)
        for path in self.files:
            yield from _read_jsonl(path, self.field) if _is_jsonl(path) else _read_plain(path)

    def _read_again(self) -> Iterator[Piece]:
        measured = _Measure()
        for block in self._read():
            measured.add(block)
            yield block
        if measured.sha256 != self.sha256:
            raise Error(f"text {self.name!r} changed since it was opened: leave it alone and start again")


class _Measure:
    """Counts and hashes documents as their blocks go by."""

    def __init__(self):
        self.documents = self.characters = self.bytes = 0
        self.blank = True
        self._document, self._digests = hashlib.sha256(), hashlib.sha256()
        self._last_digest = b""

    def add(self, block: Piece) -> None:
        data = block.text.encode("utf-8")
        self.characters += len(block.text)
        self.bytes += len(data)
        self.blank = self.blank and not block.text.strip()
        self._document.update(data)
        if block.ends_document:
            self.documents += 1
            self._last_digest = self._document.digest()
            self._digests.update(self._last_digest)
            self._document = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._last_digest.hex() if self.documents == 1 else self._digests.hexdigest()


def open_corpus(name_or_path: str | Path, field: str | None = None) -> Corpus:
    """The text of a known name, a file or a folder, read through once; every byte of it as it stands.

    Known names: ``python-docs`` (the topics that ship with CPython, about 465,000 characters; the text
    differs between Python releases, and so does its hash) and ``the-verdict`` (20,479 characters: from
    the folder in ``TINYLLM_DATA`` if it is there, otherwise downloaded once and cached). A known name
    wins over a file of that name; a path with a separator (``./python-docs``) or a ``Path`` is always
    a file.

    A ``.jsonl`` file holds a JSON object a line, and the string in its ``field`` is a document (a blank
    line holds none); any other file is a document, in UTF-8. Either may be gzip'd, and then ends in
    ``.gz``. A folder stands for the .txt, .jsonl, .txt.gz and .jsonl.gz files in it and in the folders
    below, sorted by path; a link to a file is read as that file. What is left out is in ``left_out``:
    other files, and links to folders, which may lead in a circle.

    Raises ``Error`` if there is no such file or nothing to read in the folder; naming the file and place,
    if one cannot be read, is damaged, is not UTF-8, or has a line that is not as described; if the text is
    blank, or if ``field`` is missing for a .jsonl file or given without one.
    """
    files, left_out = (), ()
    if name_or_path == "the-verdict":
        files = (_the_verdict(),)
    elif name_or_path != "python-docs":
        files, left_out = _find_files(name_or_path)
    jsonl = next((path for path in files if _is_jsonl(path)), None)
    if jsonl is not None and field is None:
        raise Error(f"{str(jsonl)!r} holds JSON objects: say which field of theirs is the text")
    if jsonl is None and field is not None:
        raise Error(f"text {str(name_or_path)!r} has no .jsonl file: leave the field {field!r} out")
    return Corpus(str(name_or_path), files, left_out, field)


def load_text(name_or_path: str | Path, field: str | None = None) -> Text:
    """The text of ``open_corpus``, all of it in memory; ``Error`` as there."""
    corpus = open_corpus(name_or_path, field)
    return Text(corpus.name, tuple(corpus.documents()), corpus.sha256, corpus.left_out)


def train_validation_split(text: str | Iterable[str], validation_fraction: float = 0.1) -> tuple:
    """The text's first ``int(len(text) * (1 - validation_fraction))`` characters, and the rest.

    One text gives two. Documents count as one text and give two tuples of documents: the one that the cut
    falls into ends the first and begins the second. Raises ``Error`` unless 0 < validation_fraction < 1
    and both parts get at least one character.
    """
    check_fraction(validation_fraction)
    documents = (text,) if isinstance(text, str) else tuple(text)
    length = sum(len(document) for document in documents)
    cut = int(length * (1 - validation_fraction))
    if cut == 0 or cut == length:
        raise Error(
            f"a text of {length} characters leaves nothing on one side of a split with "
            f"validation_fraction {validation_fraction}: use a longer text"
        )
    train, validation = [], []
    for document in documents:
        if cut > 0:
            train.append(document[:cut])
        if cut < len(document) or cut == 0:
            validation.append(document[cut:])
        cut = max(cut - len(document), 0)
    return (train[0], validation[0]) if isinstance(text, str) else (tuple(train), tuple(validation))


def check_fraction(validation_fraction: float) -> None:
    if not 0 < validation_fraction < 1:
        raise Error(f"validation_fraction is {validation_fraction}: choose one between 0 and 1, such as 0.1")


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str], special: str = "refuse") -> np.ndarray:
    """The ids of the documents, joined by the id of ``<|endoftext|>``: an array (n,) of uint32.

    What ``special`` says is about ``<|endoftext|>`` and its like inside a document (``Tokenizer.encode``),
    never about the joining. Raises ``Error`` as ``encode`` does, or if there are several documents and
    the tokenizer has no ``<|endoftext|>``.
    """
    parts = []
    for i, document in enumerate(documents):
        if i > 0:
            parts.append(np.array([end_of_text_id(tokenizer)], dtype=np.uint32))
        parts.append(tokenizer.encode_array(document, special))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that stands between documents; ``Error`` if the tokenizer has none."""
    if END_OF_TEXT not in tokenizer.special_tokens:
        raise Error(
            f"tokenizer {tokenizer.name!r} has no {END_OF_TEXT} to put between documents: "
            f"add it by with_special_tokens([{END_OF_TEXT!r}]), or give a text of one document"
        )
    return tokenizer.special_tokens[END_OF_TEXT]


# ------------------------------------------------------------------------------ known names


def _python_docs() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _the_verdict() -> Path:
    folder = os.environ.get("TINYLLM_DATA")
    if folder and (Path(folder) / VERDICT_FILE).exists():
        path = Path(folder) / VERDICT_FILE
        with _open(path) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != VERDICT_SHA256:
            raise Error(
                f"{str(path)!r} is not the expected text (SHA-256 {found}, not {VERDICT_SHA256}): "
                f"replace it with {VERDICT_URL}, or remove it"
            )
        return path
    import pooch

    try:
        path = pooch.retrieve(
            VERDICT_URL, "sha256:" + VERDICT_SHA256, VERDICT_FILE, pooch.os_cache("tinyllm")
        )
    except (OSError, ValueError) as error:  # no network, a refused download, or a wrong hash
        reason = " ".join(str(error).split())
        raise Error(
            f"the-verdict could not be downloaded: put {VERDICT_URL} into a folder as {VERDICT_FILE!r} "
            f"and set TINYLLM_DATA to that folder ({reason})"
        ) from None
    return Path(path)


# -------------------------------------------------------------------------------- the files


def _find_files(name: str | Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files to read and those left out."""
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        known = ", ".join(KNOWN_TEXTS)
        raise Error(f"no text {str(name)!r}: give the path of a file or folder, or one of {known}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
        reason = getattr(error, "strerror", None) or error  # without the name once more
        raise Error(f"text {str(name)!r} cannot be read ({reason}): check the path") from None
    if stat.S_ISDIR(mode):
        return _files_in(Path(name))
    if not stat.S_ISREG(mode):  # a pipe can be read once only
        raise Error(f"text {str(name)!r} is neither a file nor a folder: save the text as a file first")
    return (Path(name),), ()


def _files_in(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    def refuse(error: OSError):  # without it os.walk passes over a folder that cannot be read
        raise Error(f"folder {error.filename!r} cannot be read ({error.strerror}): check its permissions")

    files, left_out = [], []
    for root, folders, names in os.walk(folder, onerror=refuse):
        left_out += [Path(root, name) for name in folders if os.path.islink(Path(root, name))]
        for name in names:
            path = Path(root, name)
            usable = name.lower().endswith(SUFFIXES) and os.path.isfile(path)
            (files if usable else left_out).append(path)
    if not files:
        raise Error(
            f"folder {str(folder)!r} has no text among its {len(left_out)} files: their names must end in "
            f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )

    def by_path(path: Path) -> str:  # the same order on every system
        return path.relative_to(folder).as_posix()

    return tuple(sorted(files, key=by_path)), tuple(sorted(left_out, key=by_path))


def _is_jsonl(path: Path) -> bool:
    return path.name.lower().endswith((".jsonl", ".jsonl.gz"))


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; what goes wrong while they are read is an ``Error``."""
    try:
        if path.suffix.lower() == ".gz":
            if path.stat().st_size == 0:  # gzip.open takes it for an empty text
                raise EOFError("the file is empty")
            with gzip.open(path) as file:
                yield file
        else:
            with open(path, "rb") as file:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Error(f"{str(path)!r} is damaged or cut short ({error}): compress the text again") from None
    except OSError as error:
        raise Error(f"text {str(path)!r} cannot be read ({error}): check the file") from None


def _read_plain(path: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")()  # text mode would turn \r\n into \n
    offset = 0
    with _open(path) as file:
        for data in itertools.chain(iter(partial(file.read, BLOCK_BYTES), b""), [b""]):
            held = len(decoder.getstate()[0])  # bytes of a character that the last block ended in
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
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield Piece(_document(line, field, f"line {number} of {str(path)!r}"), ends_document=True)


def _document(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Error(
            f"{where} is not UTF-8 at its byte offset {error.start} ({line[error.start]:#04x}): "
            "save the file as UTF-8 first"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Error(f"{where} is not JSON ({error}): correct it") from None
    if not isinstance(record, dict):
        raise Error(f"{where} is a JSON {type(record).__name__}: write an object, with the text in a field")
    if field not in record:
        raise Error(f"{where} has no field {field!r} among its {list(record)}: name the one with the text")
    if not isinstance(record[field], str):
        raise Error(
            f"field {field!r} in {where} is a {type(record[field]).__name__}: name one that holds a string"
        )
    try:
        record[field].encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write it as \ud800
        raise Error(
            f"field {field!r} in {where} has half a character, the lone surrogate "
            f"{record[field][error.start]!r}: remove it"
        ) from None
    return record[field]

"""A training text from a known name, a file or a folder of files. It may be larger than memory.

A text is a sequence of documents. ``open_corpus`` reads it once to count and hash it. Later reads start from
the files again: in ``pieces`` of about a million characters, by ``documents``, or as a whole (``load_text``).
``encode_documents`` turns documents into ids and separates them with ``<|endoftext|>``. A text may contain
that marker itself: read with ``split``, it gives the same documents as a .jsonl file.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.checks import check_fraction
from tinyllm.data.documents import (
    KNOWN_TEXTS,
    Piece,
    find_files,
    is_jsonl,
    python_docs,
    read_documents,
    the_verdict,
)
from tinyllm.data.unseen import python_docstrings
from tinyllm.errors import Error
from tinyllm.tokenizers.base import END_OF_TEXT, Tokenizer

PIECE_CHARACTERS = 2**20  # a longer document is cut at the first possible position from here on
LONGEST_PIECE = 16 * 2**20  # characters; an error if there is no such position before

# Known texts that are made, not read from a file
MADE = {
    "python-docs": python_docs,
    "python-docstrings": lambda: python_docstrings(0),
    "python-docstrings-test": lambda: python_docstrings(1),
}

# A document may be cut between a character that is not whitespace and one that is. GPT-2's pattern never
# joins the two and has no lookbehind, so the pieces have the same tokens as the whole document.
# U+001C to U+001F are whitespace in Python but not in the pattern: no cut is made next to them.
CUT = re.compile(r"\S(?=[^\S\x1c-\x1f])")


@dataclass(frozen=True)
class Text:
    """A text in memory; ``name``, ``sha256`` and ``left_out`` are those of its ``Corpus``."""

    name: str
    documents: tuple[str, ...]
    sha256: str
    left_out: tuple[Path, ...] = ()

    @property
    def text(self) -> str:
        """The documents, concatenated without a separator."""
        return "".join(self.documents)


class Corpus:
    """A text that is read on demand, block by block; ``open_corpus`` returns one.

    ``name``: the argument of ``open_corpus``. ``files``: the files of the text, in order (none for one that
    is made). ``left_out``: the files of the folder that are not part of the text. ``num_documents``,
    ``num_characters``, ``num_bytes`` (UTF-8): the size of the text after decompression. ``sha256``: for one
    document, the hex digest of its UTF-8 bytes; for several, the digest of their concatenated digests, so
    that it depends on where documents end, but not on whether files are compressed.
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

    def pieces(self, split: bool = False) -> Iterator[Piece]:
        """The text in pieces that fit in memory: short documents whole, long documents cut.

        With ``split``, an ``<|endoftext|>`` in the text separates documents and belongs to none of them.

        A piece ends at the first position from ``PIECE_CHARACTERS`` on where a character that is not
        whitespace is followed by one that is. The cuts depend only on the text. Raises ``Error`` if there is
        no such position within ``LONGEST_PIECE`` characters or, after the last piece, if the files have
        changed since the corpus was opened.
        """
        text = ""
        for block in self._read_again(split):
            text += block.text
            start = 0
            while found := CUT.search(text, start + PIECE_CHARACTERS - 1):
                yield Piece(text[start : found.end()], ends_document=False)
                start = found.end()
            text = text[start:]
            if len(text) > LONGEST_PIECE:
                raise Error(
                    f"text {self.name!r} has {len(text):,} characters without a place to cut (a space or "
                    "line break after another character): break its longest lines"
                )
            if block.ends_document:
                yield Piece(text, ends_document=True)
                text = ""

    def documents(self, split: bool = False) -> Iterator[str]:
        """The documents, each as one string; ``split`` as for ``pieces``.

        Raises ``Error`` at the end if the files have changed.
        """
        blocks = []
        for block in self._read_again(split):
            blocks.append(block.text)
            if block.ends_document:
                yield "".join(blocks)
                blocks = []

    def sample(self, characters: int, validation_fraction: float = 0.1, split: bool = False) -> list[str]:
        """Pieces that have about ``characters`` characters in total, spread evenly over the training part.

        The training part is the first ``1 - validation_fraction`` of the bytes; ``TokenFile.split`` puts none
        of them into the validation part. ``split`` as for ``pieces``. Raises ``Error`` if the first piece is
        already longer than that.
        """
        check_fraction(validation_fraction)
        sizes = (len(piece.text.encode("utf-8")) for piece in self.pieces(split))
        training_bytes = (1 - validation_fraction) * (sum(sizes) if split else self.num_bytes)
        chosen, taken, position = [], 0, 0
        for piece in self.pieces(split):
            size = len(piece.text.encode("utf-8"))
            if position + size > training_bytes:
                break
            if taken * training_bytes <= characters * position:  # fewer than an even spread up to here
                chosen.append(piece.text)
                taken += len(piece.text)
            position += size
        if not chosen:
            raise Error(
                f"text {self.name!r} has only {self.num_bytes:,} bytes, too few to sample from: use all of it"
            )
        return chosen

    def _read(self) -> Iterator[Piece]:
        """The documents, block by block."""
        if not self.files:
            return iter([Piece(MADE[self.name](), ends_document=True)])
        return read_documents(self.files, self.field)

    def _read_again(self, split: bool) -> Iterator[Piece]:
        measured = _Measure()

        def blocks() -> Iterator[Piece]:
            for block in self._read():
                measured.add(block)
                yield block

        yield from _split(blocks()) if split else blocks()
        if measured.sha256 != self.sha256:
            raise Error(f"text {self.name!r} changed while it was in use: do not modify it, and start again")


def _split(blocks: Iterable[Piece]) -> Iterator[Piece]:
    """The blocks, with a document ended at each ``<|endoftext|>``, which is removed."""
    text = ""
    for block in blocks:
        *whole, text = (text + block.text).split(END_OF_TEXT)
        yield from (Piece(document, ends_document=True) for document in whole)
        # The end of a block may be a part of the marker.
        keep = len(text) if block.ends_document else max(0, len(text) - len(END_OF_TEXT) + 1)
        yield Piece(text[:keep], block.ends_document)
        text = text[keep:]


class _Measure:
    """Counts and hashes documents, block by block."""

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


def open_corpus(name_or_path: str | Path, field: str | None = None, pattern: str | None = None) -> Corpus:
    """The text of a known name, a file or a folder, read once to measure it; no byte of it is changed.

    Known names: ``python-docs`` (the topics that ship with CPython, about 465,000 characters; the text,
    and so its hash, differs between Python releases), ``python-docstrings`` and ``python-docstrings-test``
    (docstrings of the standard library, 45,000 characters each, see ``unseen.py``) and ``the-verdict``
    (20,479 characters: from the folder in ``TINYLLM_DATA`` if it is there, otherwise downloaded once and
    cached). A known name takes precedence over a file of that name; a path with a separator
    (``./python-docs``) or a ``Path`` is always a file.

    A ``.jsonl`` file has one JSON object per line, and the string in its ``field`` is a document (blank
    lines are skipped); any other file is one document, in UTF-8. A file whose name ends in ``.gz`` is
    decompressed. From a folder and the folders below it, files are read in the order of their paths: those
    that match the glob ``pattern``, such as ``*.py`` (``find_files``), or by default .txt, .jsonl, .txt.gz
    and .jsonl.gz files. A link to a file is read as that file. ``left_out`` lists the rest: other files,
    and links to folders, which could form a cycle.

    Raises ``Error`` if there is no such file or the folder has none to read; naming the file and the
    place, if one cannot be read, is damaged, is not UTF-8, or has a line that is not as described; if the
    text is blank; if ``field`` is missing for a .jsonl file or given without one; or if ``pattern`` is
    given without a folder.
    """
    if not isinstance(name_or_path, str | Path):
        raise Error(f"the text is {name_or_path!r}: give the path of a file or folder, or a known name")
    files, left_out = (), ()
    if name_or_path == "the-verdict":
        files = (the_verdict(),)
    elif name_or_path not in MADE:
        files, left_out = find_files(name_or_path, pattern)
    if pattern is not None and not is_folder(name_or_path):
        raise Error(f"text {str(name_or_path)!r} is not a folder: omit the pattern {pattern!r}")
    jsonl = next((path for path in files if is_jsonl(path)), None)
    if jsonl is not None and field is None:
        raise Error(f"{str(jsonl)!r} contains JSON objects: give the name of the field with the text")
    if jsonl is None and field is not None:
        raise Error(f"text {str(name_or_path)!r} has no .jsonl file: omit the field {field!r}")
    return Corpus(str(name_or_path), files, left_out, field)


def is_folder(name_or_path: str | Path) -> bool:
    """Whether a text is a folder, from which a pattern may select files."""
    return name_or_path not in KNOWN_TEXTS and Path(name_or_path).is_dir()


def has_json_lines(name_or_path: str | Path, pattern: str | None = None) -> bool:
    """Whether a text has .jsonl files, which need a field; raises ``Error`` as ``find_files`` does."""
    if name_or_path in KNOWN_TEXTS:
        return False
    files, _ = find_files(name_or_path, pattern)
    return any(map(is_jsonl, files))


def load_text(name_or_path: str | Path, field: str | None = None, pattern: str | None = None) -> Text:
    """The text of ``open_corpus``, all of it in memory; raises the same errors."""
    corpus = open_corpus(name_or_path, field, pattern)
    return Text(corpus.name, tuple(corpus.documents()), corpus.sha256, corpus.left_out)


def train_validation_split(text: str | Iterable[str], validation_fraction: float = 0.1) -> tuple:
    """Split a text into its first ``int(len(text) * (1 - validation_fraction))`` characters and the rest.

    A str gives two strings. Documents are split as if they were concatenated and give two tuples; the
    document that contains the cut is divided between them. Raises ``Error`` unless 0 < validation_fraction
    < 1 and both parts get at least one character.
    """
    check_fraction(validation_fraction)
    documents = (text,) if isinstance(text, str) else tuple(text)
    length = sum(len(document) for document in documents)
    cut = int(length * (1 - validation_fraction))
    if cut == 0 or cut == length:
        needed = max(2, math.ceil(1 / (1 - validation_fraction)))
        raise Error(
            f"the text has only {length} characters, but a split with validation_fraction "
            f"{validation_fraction} needs at least {needed}: use a longer text"
        )
    train, validation = [], []
    for document in documents:
        if cut > 0:
            train.append(document[:cut])
        if cut < len(document) or cut == 0:
            validation.append(document[cut:])
        cut = max(cut - len(document), 0)
    return (train[0], validation[0]) if isinstance(text, str) else (tuple(train), tuple(validation))


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str], special: str = "refuse") -> np.ndarray:
    """The ids of the documents, separated by the id of ``<|endoftext|>``: an array (n,) of uint32.

    ``special`` applies to special tokens inside a document (see ``Tokenizer.encode``), not to the separators.
    Raises ``Error`` as ``encode`` does, or if there are several documents and the tokenizer has no
    ``<|endoftext|>``.
    """
    if isinstance(documents, str):
        raise Error("the documents are a str: give a list of texts, or encode one text with tokenizer.encode")
    parts = []
    for i, document in enumerate(documents):
        if i > 0:
            parts.append(np.array([end_of_text_id(tokenizer)], dtype=np.uint32))
        parts.append(tokenizer.encode_array(document, special))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)


def splits(tokenizer: Tokenizer, special: str) -> bool:
    """Whether ``<|endoftext|>`` in a text, encoded with this ``special``, separates documents."""
    return special == "allow" and END_OF_TEXT in tokenizer.special_tokens


def count_bytes(tokenizer: Tokenizer, documents: Iterable[str], special: str = "refuse") -> int:
    """The number of UTF-8 bytes of the documents, without those of special tokens encoded as their ids.

    Such a marker stands for no byte, just as the ``<|endoftext|>`` between documents.
    """
    if isinstance(documents, str):
        raise Error("the documents are a str: give a list of texts")
    num_bytes = 0
    for document in documents:
        markers = tokenizer.find_special(document) if special == "allow" else []
        num_bytes += len(document.encode("utf-8")) - sum(len(found[0].encode("utf-8")) for found in markers)
    return num_bytes


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that separates documents. Raises ``Error`` if the tokenizer has none."""
    if END_OF_TEXT not in tokenizer.special_tokens:
        raise Error(
            f"tokenizer {tokenizer.name!r} has no {END_OF_TEXT} to separate documents: "
            f"add it by with_special_tokens([{END_OF_TEXT!r}]), or give a text of one document"
        )
    return tokenizer.special_tokens[END_OF_TEXT]

"""A text to train on, from a known name, a file or a folder of files; it may be larger than memory.

A text is a sequence of documents. ``open_corpus`` reads it once, to count and hash it; after that it is read
anew whenever it is asked for: in ``pieces`` of about a million characters, by ``documents``, or whole
(``load_text``). Between two documents stands ``<|endoftext|>`` when they become ids (``encode_documents``).
"""

from __future__ import annotations

import hashlib
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
from tinyllm.errors import Error
from tinyllm.tokenizers.base import END_OF_TEXT, Tokenizer

PIECE_CHARACTERS = 2**20  # a longer document is cut at the first place after so many
LONGEST_PIECE = 16 * 2**20  # where that place has to come by

# A document may be cut after a character that is not whitespace, before one that is: GPT-2's pattern never
# joins the two and looks at nothing that lies before, so the tokens of the pieces are those of the whole.
# U+001C to U+001F are whitespace in Python and not in the pattern: no cut is made beside them.
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
        character that is not whitespace is followed by one that is. Where to cut depends on the text alone.
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
            raise Error(f"text {self.name!r} has {self.num_bytes:,} bytes, too few to sample: use all of it")
        return chosen

    def _read(self) -> Iterator[Piece]:
        """The documents in the blocks they are read in."""
        if not self.files:
            return iter([Piece(python_docs(), ends_document=True)])
        return read_documents(self.files, self.field)

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


def open_corpus(name_or_path: str | Path, field: str | None = None, pattern: str | None = None) -> Corpus:
    """The text of a known name, a file or a folder, read once to measure it; no byte of it is changed.

    Known names: ``python-docs`` (the topics that ship with CPython, about 465,000 characters; the text,
    and so its hash, differs between Python releases) and ``the-verdict`` (20,479 characters: from the
    folder in ``TINYLLM_DATA`` if it is there, otherwise downloaded once and cached). A known name takes
    precedence over a file of that name; a path with a separator (``./python-docs``) or a ``Path`` is always
    a file.

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
    files, left_out = (), ()
    if name_or_path == "the-verdict":
        files = (the_verdict(),)
    elif name_or_path != "python-docs":
        files, left_out = find_files(name_or_path, pattern)
    if pattern is not None and (name_or_path in KNOWN_TEXTS or not Path(name_or_path).is_dir()):
        raise Error(f"text {str(name_or_path)!r} is not a folder: omit the pattern {pattern!r}")
    jsonl = next((path for path in files if is_jsonl(path)), None)
    if jsonl is not None and field is None:
        raise Error(f"{str(jsonl)!r} contains JSON objects: give the name of the field with the text")
    if jsonl is None and field is not None:
        raise Error(f"text {str(name_or_path)!r} has no .jsonl file: omit the field {field!r}")
    return Corpus(str(name_or_path), files, left_out, field)


def load_text(name_or_path: str | Path, field: str | None = None, pattern: str | None = None) -> Text:
    """The text of ``open_corpus``, all of it in memory; raises the same errors."""
    corpus = open_corpus(name_or_path, field, pattern)
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

"""Token ids on disk, for a text larger than memory.

``tokenize_corpus`` encodes the text in chunks of about a million characters, several in parallel, and writes
their ids in order into a folder:

    tokens.bin    the ids: uint16 if the vocabulary has at most 65,536 of them, else uint32, little-endian
    index.json    the text and tokenizer they belong to, and the number of ids and bytes of text per chunk

``index.json`` is written last: without it the file is incomplete. Until then the ids are in ``tokens.part``,
and ``tokens.progress`` has one line for each chunk that is safely on disk. After an interruption (Ctrl-C,
kill -9, a full disk) only the last few chunks are lost, and the next call resumes from there. ``TokenFile``
reads the ids through a memory map: only the pages in use are loaded into memory.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.backend.threads import num_threads
from tinyllm.checks import check_fraction
from tinyllm.data.corpus import (
    CUT,
    PIECE_CHARACTERS,
    Corpus,
    count_bytes,
    encode_documents,
    end_of_text_id,
    splits,
)
from tinyllm.errors import Error
from tinyllm.files import (
    check_is_file,
    lock,
    open_regular,
    parse_json,
    read_file,
    sync,
    sync_folder,
    write_whole,
)
from tinyllm.tokenizers.base import Tokenizer

FORMAT = 1
TOKENS, INDEX, PART, PROGRESS, LOCK = "tokens.bin", "index.json", "tokens.part", "tokens.progress", "lock"
CHECKED_AT_ONCE = 2**20  # bytes of ids
CHUNKS_PER_FLUSH = 16  # the most finished chunks that a crash can lose


@dataclass(frozen=True)
class TokenFile:
    """The token ids of a corpus on disk: ``tokens`` (n,) is read-only, ``index`` is that of index.json."""

    folder: Path
    tokens: np.memmap
    index: dict

    @classmethod
    def open(
        cls,
        folder: str | Path,
        corpus: Corpus | None = None,
        tokenizer: Tokenizer | None = None,
        special: str | None = None,
    ) -> TokenFile:
        """Open the file that ``tokenize_corpus`` wrote into this folder.

        Raises ``Error`` if it is incomplete or damaged, or if it does not belong to the given corpus,
        tokenizer or ``special`` (None: not checked). With a tokenizer all ids are checked once: otherwise an
        id out of range would stop a training run only when it is reached, perhaps hours later.
        """
        folder = Path(folder)
        try:
            for name in (INDEX, TOKENS):
                check_is_file(folder / name)
            index = parse_json(read_file(folder / INDEX))
            size = (folder / TOKENS).stat().st_size
        except FileNotFoundError:
            raise Error(
                f"{str(folder)!r} does not contain a complete token file: write it with tokenize_corpus"
            ) from None
        except (OSError, ValueError) as error:
            raise Error(
                f"{str(folder / INDEX)!r} cannot be read ({error}): delete the folder and tokenize again"
            ) from None
        _check_same(index, folder, corpus, tokenizer, special)
        _check_counts(index, folder)
        expected = index["count"] * np.dtype(index["dtype"]).itemsize
        if size != expected:
            raise Error(
                f"{str(folder / TOKENS)!r} has {size:,} bytes, not the {expected:,} of its index: delete the "
                "folder and tokenize again"
            )
        if tokenizer is not None:
            _check_range(folder, index["dtype"], tokenizer)
        return cls(folder, np.memmap(folder / TOKENS, dtype=index["dtype"], mode="r"), index)

    def split(self, validation_fraction: float) -> tuple[np.ndarray, np.ndarray, int]:
        """The training ids, the validation ids, and the number of bytes of the validation text.

        The cut is at the end of the chunk that contains byte ``(1 - validation_fraction) * num_bytes``.
        Raises ``Error`` unless 0 < validation_fraction < 1 and there is a chunk after the cut.
        """
        check_fraction(validation_fraction)
        tokens, num_bytes = np.cumsum(self.index["chunks"], axis=0).T  # up to the end of each chunk
        last = int(np.searchsorted(num_bytes, (1 - validation_fraction) * num_bytes[-1]))
        if last == len(num_bytes) - 1:
            raise Error(
                f"no chunk of the token file (it has {len(num_bytes)}) begins after the first "
                f"{1 - validation_fraction:g} of the text: choose a larger validation_fraction, or read the "
                "text into memory"
            )
        cut = int(tokens[last])
        return self.tokens[:cut], self.tokens[cut:], int(num_bytes[-1] - num_bytes[last])


def tokenize_corpus(
    corpus: Corpus, tokenizer: Tokenizer, special: str, folder: str | Path, progress: bool = True
) -> TokenFile:
    """Encode the corpus into a token file in this folder, or open the one that is already there.

    The ids are those of ``encode_documents(tokenizer, corpus.documents(), special)``. (A document too long
    for one chunk is cut where no token of GPT-2's pattern crosses the cut; with another pattern its ids may
    differ there.) Memory use does not depend on the size of the text, and an interrupted call resumes.
    ``progress`` shows a progress bar if there is a terminal.

    Raises ``Error`` if the folder contains the tokens of another text, tokenizer or ``special``, if another
    process is writing to it, if writing fails (disk full), and as ``encode_documents`` does.
    """
    folder = Path(folder)
    if corpus.num_documents > 1:
        end_of_text_id(tokenizer)
    for token in tokenizer.special_tokens:
        if CUT.search(token):
            raise Error(f"special token {token!r} contains a space, where a text may be cut: rename it")
    if not (folder / INDEX).exists():
        with _locked(folder):
            if not (folder / INDEX).exists():  # no other process finished it before we got the lock
                _write(corpus, tokenizer, special, folder, progress)
    return TokenFile.open(folder, corpus, tokenizer, special)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """The hex SHA-256 of the tokenizer's definition (``to_json``), which determines the ids of any text."""
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode("utf-8")).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Exclude other writers."""
    busy = (
        f"another process is writing a token file to {str(folder)!r}: wait for it, or choose another folder"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder / LOCK, busy)
    except OSError as error:
        raise Error(f"{str(folder)!r} cannot be written ({error}): choose another folder") from None
    try:
        yield
    finally:
        held.release()


def _write(corpus: Corpus, tokenizer: Tokenizer, special: str, folder: Path, progress: bool) -> None:
    """Write the complete file, resuming from the chunks that are already in the folder."""
    from tqdm import tqdm

    about = _about(corpus, tokenizer, special)
    chunks, unrecorded = [], []  # of [number of ids, bytes of text]
    try:
        chunks = _resume(folder, about, corpus, tokenizer, special)
        done = sum(num_bytes for _, num_bytes in chunks)
        options = dict(desc="tokenize", unit="B", unit_scale=True, dynamic_ncols=True)
        encoded = _encode(corpus, tokenizer, special, first=len(chunks))
        with (
            tqdm(total=corpus.num_bytes, initial=done, disable=None if progress else True, **options) as bar,
            open(folder / PART, "ab") as part,
            open(folder / PROGRESS, "ab") as record,
            closing(encoded),
        ):
            for ids, num_bytes in encoded:
                part.write(ids.astype(about["dtype"]).tobytes())
                unrecorded.append([len(ids), num_bytes])
                bar.update(num_bytes)
                if len(unrecorded) == CHUNKS_PER_FLUSH:
                    _record(part, record, unrecorded)
                    chunks += unrecorded
                    unrecorded = []
            _record(part, record, unrecorded)
            chunks += unrecorded
        _finish(folder, about | {"count": sum(count for count, _ in chunks), "chunks": chunks})
    except OSError as error:
        raise _cannot_write(error, folder, about, chunks, unrecorded) from None


def _encode(
    corpus: Corpus, tokenizer: Tokenizer, special: str, first: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The ids and the number of bytes of every chunk from ``first`` on, in order."""

    def encode(documents: list[str]) -> tuple[np.ndarray, int]:
        num_bytes = count_bytes(tokenizer, documents, special)
        return encode_documents(tokenizer, documents, special), num_bytes

    # Threads, not processes: 85% of the time is spent in tiktoken, which releases the GIL. On two busy cores
    # processes were a fifth faster, but each has to be started and takes memory, and on Windows and macOS
    # it imports the calling script again.
    threads = num_threads()
    running = deque()
    with ThreadPoolExecutor(threads) as pool:
        for documents in itertools.islice(_chunks(corpus, splits(tokenizer, special)), first, None):
            running.append(pool.submit(encode, documents))
            if len(running) > 2 * threads:  # enough to keep the threads busy
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _chunks(corpus: Corpus, split: bool) -> Iterator[list[str]]:
    """The documents in groups of a million characters or more; a thread encodes one group at a time.

    The last document of a chunk may continue in the next chunk. If it does not, the next chunk begins with
    an empty document, so that joining its documents puts ``<|endoftext|>`` in front of the first.
    """
    chunk, characters = [], 0
    for piece in corpus.pieces(split):
        chunk.append(piece.text)
        characters += len(piece.text)
        if characters >= PIECE_CHARACTERS:  # always true after a piece that does not end its document
            yield chunk
            chunk, characters = ([""] if piece.ends_document else []), 0
    if len(chunk) > 1 or characters > 0:
        yield chunk


def _about(corpus: Corpus, tokenizer: Tokenizer, special: str) -> dict:
    """The text and tokenizer of the file: the first line of tokens.progress, and part of index.json."""
    return {
        "format": FORMAT,
        "dtype": "<u2" if tokenizer.vocab_size <= 2**16 else "<u4",
        "tokenizer": tokenizer.to_json(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "corpus": {"name": corpus.name, "sha256": corpus.sha256, "bytes": corpus.num_bytes},
        "special": special,
    }


def _check_same(found, folder: Path, corpus: Corpus | None, tokenizer: Tokenizer | None, special: str | None):
    """Raise ``Error`` if the description found in the folder is of another text, tokenizer or ``special``."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise Error(
            f"{str(folder)!r} has no token file of format {FORMAT}: delete that folder, or choose another"
        )
    match found:
        case {
            "dtype": "<u2" | "<u4",
            "tokenizer_sha256": str(),
            "corpus": {"sha256": str(), "bytes": int()},
            "special": str(),
        }:
            pass
        case _:
            raise _damaged(folder)
    if corpus is not None and corpus.sha256 != found["corpus"]["sha256"]:
        problem = f"the tokens in {str(folder)!r} are of another text than {corpus.name!r}, or it has changed"
    elif tokenizer is not None and tokenizer_sha256(tokenizer) != found["tokenizer_sha256"]:
        problem = f"the tokens in {str(folder)!r} are of another tokenizer than {tokenizer.name!r}"
    elif special is not None and special != found["special"]:
        problem = (
            f"the tokens in {str(folder)!r} were encoded with special={found['special']!r}, not {special!r}"
        )
    else:
        return
    raise Error(f"{problem}: delete that folder to tokenize again, or choose another folder")


def _check_counts(index: dict, folder: Path) -> None:
    """Raise ``Error`` unless the chunks add up to the index's totals of ids and bytes."""
    if not _are_chunks(index.get("chunks")) or not index["chunks"]:
        raise _damaged(folder)
    count, num_bytes = (sum(column) for column in zip(*index["chunks"]))
    missing = index["corpus"]["bytes"] - num_bytes  # those of special tokens, if they are encoded as ids
    if index.get("count") != count or missing < 0 or (missing and index["special"] != "allow") or count == 0:
        raise _damaged(folder)


def _are_chunks(found) -> bool:
    """Whether the value is a list of pairs of whole numbers of at least 0."""
    return isinstance(found, list) and all(
        isinstance(chunk, list) and len(chunk) == 2 and all(type(n) is int and n >= 0 for n in chunk)
        for chunk in found
    )


def _check_range(folder: Path, dtype: str, tokenizer: Tokenizer) -> None:
    with open_regular(folder / TOKENS) as file:  # a memory map would count towards the process's memory
        while data := file.read(CHECKED_AT_ONCE):
            largest = np.frombuffer(data, dtype).max()
            if largest >= tokenizer.vocab_size:
                raise Error(
                    f"{str(folder / TOKENS)!r} is damaged (it contains id {largest}, but the tokenizer has "
                    f"{tokenizer.vocab_size} ids): delete the folder and tokenize again"
                )


def _damaged(folder: Path) -> Error:
    return Error(f"the index of {str(folder)!r} is damaged: delete the folder and tokenize again")


def _resume(folder: Path, about: dict, corpus: Corpus, tokenizer: Tokenizer, special: str) -> list[list[int]]:
    """Cut both files back to the last recorded chunk, and return the recorded chunks."""
    part, progress = folder / PART, folder / PROGRESS
    if part.exists():
        check_is_file(part)
    lines = read_file(progress) if progress.exists() else b""
    lines = lines[: lines.rfind(b"\n") + 1]  # a crash may have cut the last line
    if not lines:
        part.write_bytes(b"")
        progress.write_bytes(_line(about))
        return []
    try:
        found, *chunks = [parse_json(line) for line in lines.splitlines()]
        if not _are_chunks(chunks) or sum(num_bytes for _, num_bytes in chunks) > corpus.num_bytes:
            raise ValueError("its chunks are not pairs of whole numbers")
    except ValueError as error:
        raise Error(f"{str(progress)!r} is damaged ({error}): delete the folder and start again") from None
    _check_same(found, folder, corpus, tokenizer, special)
    if not part.exists():  # interrupted in _finish, before the index was written
        os.replace(folder / TOKENS, part)
    size = sum(count for count, _ in chunks) * np.dtype(about["dtype"]).itemsize
    if part.stat().st_size < size:
        raise Error(
            f"{str(part)!r} has fewer tokens than {PROGRESS!r} records: delete the folder and start again"
        )
    os.truncate(part, size)
    os.truncate(progress, len(lines))
    return chunks


def _record(part, record, chunks: list[list[int]]) -> None:
    """Record chunks, after their ids are safely on disk."""
    sync(part)
    record.write(b"".join(_line(chunk) for chunk in chunks))
    sync(record)


def _line(value) -> bytes:
    return json.dumps(value).encode("utf-8") + b"\n"


def _finish(folder: Path, index: dict) -> None:
    os.replace(folder / PART, folder / TOKENS)
    sync_folder(folder)  # even after a power failure there is no index without its tokens
    write_whole(folder / INDEX, _line(index))
    os.remove(folder / PROGRESS)


def _cannot_write(error: OSError, folder: Path, about: dict, chunks: list, unrecorded: list) -> Error:
    total, done = about["corpus"]["bytes"], sum(num_bytes for _, num_bytes in chunks)
    remedy = "fix this"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        tokens, num_bytes = np.sum(chunks + unrecorded, axis=0) if chunks + unrecorded else (1, 1)
        missing = (total - done) * tokens / num_bytes * np.dtype(about["dtype"]).itemsize
        remedy = f"free about {missing / 1e6:,.1f} MB more"
    return Error(
        f"the token file in {str(folder)!r} cannot be written ({error.strerror}) after {done / 1e6:,.1f} of "
        f"{total / 1e6:,.1f} MB of text: {remedy} and run it again; it resumes from there"
    )

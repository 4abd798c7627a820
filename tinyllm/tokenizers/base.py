"""The base class of tokenizers: text to token ids and back, and special tokens.

A special token, such as ``<|endoftext|>`` between documents or ``<|user|>`` in a chat, marks the structure of
a text. It has one id, and ordinary text is never encoded as it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

from tinyllm.checks import check_ids, pip_install
from tinyllm.errors import Error
from tinyllm.files import write_whole

FILE_NAME = "tinyllm_tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
IMAGE_TOKEN = "<image_soft_token>"


class Tokenizer:
    """The interface of all tokenizers: text to ids and back, and special tokens.

    A subclass sets ``name``, ``vocab_size`` and ``special_tokens``, and defines ``_encode_ordinary``,
    ``decode_bytes`` and, for ``with_special_tokens``, ``_is_token``; see ``char.py``.

    ``vocab_size`` is the largest id + 1. ``special_tokens`` maps the names of special tokens to their ids;
    ``added_tokens`` names those added by ``with_special_tokens``.
    """

    name: str
    vocab_size: int
    special_tokens: dict[str, int]
    added_tokens: tuple[str, ...] = ()
    # From the files of a published model, see ``load_tokenizer``.
    bos_id: int | None = None
    add_bos: bool = False
    template_bos: int | None = None  # the id that the template in a tokenizer.json puts before a text
    eos_ids: tuple[int, ...] = ()
    closing_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    other_tokens: Mapping[str, str] = MappingProxyType({})  # such as pad_token, for a chat template

    def __repr__(self):
        return f"<{type(self).__name__} {self.name}: {self.vocab_size:,} ids>"

    def encode(self, text: str, special: str = "refuse") -> list[int]:
        """The token ids of a text, a list of n ints.

        ``special`` determines the treatment of a special token such as ``<|endoftext|>`` inside the text:
        ``"refuse"`` raises ``Error``, ``"allow"`` encodes it as its id, ``"text"`` encodes it as ordinary
        text. If two special tokens begin at the same position, the longer one is used. Raises ``Error`` if
        the text is not a valid str, or contains something that the tokenizer cannot encode.
        """
        return self.encode_array(text, special).tolist()

    def encode_array(self, text: str, special: str = "refuse") -> np.ndarray:
        """The ids of ``encode`` as an array (n,) of uint32: 4 bytes per id instead of a list's 36."""
        check_text(text, special)
        found = [] if special == "text" else self.find_special(text)
        if special == "refuse" and found:
            raise Error(
                f"the text contains the special token {found[0][0]!r}: set special to 'allow' to encode it "
                "as its id, or to 'text' to encode it as ordinary text"
            )
        return self.encode_around(text, found)

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        """The ids as the model's input: preceded by ``bos_id`` if ``add_bos``, unless they begin with it."""
        ids = list(ids)
        absent = self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]
        return [self.bos_id, *ids] if absent else ids

    def merged_pairs(self) -> np.ndarray:
        """(V, 2): the two ids that were merged to each id of byte-pair encoding, -1 where it is not known."""
        return np.full((self.vocab_size, 2), -1, np.int64)

    def find_special(self, text: str) -> list[re.Match]:
        """The matches of special tokens in a text, in order; of two at the same position, the longer one."""
        return find_names(self.special_tokens, text)

    def encode_around(self, text: str, found: list[re.Match], before: Sequence[int] = ()) -> np.ndarray:
        """Encode the special tokens ``found`` as their ids, and the text between them as ordinary text.

        ``before`` are the ids of the text that this one continues: then no space is added in front of it.
        """
        arrays, end = [], 0
        for match in found:
            arrays.append(self._encode_ordinary(text[end : match.start()], end))
            arrays.append(np.array([self.special_tokens[match[0]]], dtype=np.uint32))
            end = match.end()
        return np.concatenate([*arrays, self._encode_ordinary(text[end:], end)])

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        """The ids (n,), uint32, of a part of a text, at position ``start``, without special tokens."""
        raise NotImplementedError

    def with_special_tokens(self, names: Sequence[str]) -> Tokenizer:
        """A copy of the tokenizer with additional special tokens, at new ids after the last one.

        Raises ``Error`` for a name that is empty, repeated or already a token. A model's embeddings must
        grow with the vocabulary: ``extend_vocabulary`` does both.
        """
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise Error(f"the names of special tokens are {names!r}: give a list of str")
        extended = copy.copy(self)
        extended.special_tokens = dict(self.special_tokens)
        for name in names:
            if not isinstance(name, str) or name == "":
                raise Error(f"special token {name!r} is not a name: give a str of at least one character")
            check_text(name)
            if name in extended.special_tokens or self._is_token(name):
                raise Error(f"special token {name!r} is already a token: omit it, or choose another name")
            extended.special_tokens[name] = extended.vocab_size
            extended.vocab_size += 1
        extended.added_tokens = (*self.added_tokens, *names)
        return extended

    def with_file_tokens(self, tokens: Mapping[int, Mapping]) -> Tokenizer:
        """The tokenizer with the tokens that a model's files add to its vocabulary: id -> properties.

        The properties are those of Hugging Face's ``AddedToken``: ``content``, ``special``, ``lstrip``, …
        Raises ``Error`` if the vocabulary has another token with one of the ids.
        """
        raise NotImplementedError

    def token_ids(self) -> set[int]:
        """The ids that have a token: some vocabularies have gaps below ``vocab_size``."""
        return set(range(self.vocab_size))

    def unused_ids(self, rows: int) -> list[int]:
        """The ids without a token among the ``rows`` of a model, which must never be sampled."""
        return sorted(set(range(rows)) - self.token_ids())

    def _is_token(self, name: str) -> bool:
        """Whether an ordinary token has exactly this text."""
        raise NotImplementedError

    def decode_bytes(self, ids) -> bytes:
        """The UTF-8 bytes of the ids (list or integer array (n,)); a token may end inside a character.

        Raises ``Error`` naming an id outside 0..vocab_size-1.
        """
        raise NotImplementedError

    def decode(self, ids) -> str:
        """The text of the ids (list or integer array (n,)); incomplete UTF-8 becomes U+FFFD, ``�``.

        A token may end inside a character, so decode all ids of a text at once, or pass the result of
        ``decode_bytes`` to an incremental decoder. Raises ``Error`` naming an id outside 0..vocab_size-1.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> dict:
        """The tokenizer's definition, from which ``load_tokenizer`` rebuilds it; ``kind`` selects the class.

        Raises ``Error`` for the tokenizer of a published model.
        """
        raise Error(
            f"tokenizer {self.name!r} is not one of tinyllm's own: copy its file instead of saving it"
        )

    def save(self, folder: str | Path) -> None:
        """Write ``tinyllm_tokenizer.json`` into the folder, which is created if necessary.

        Raises ``Error`` as ``to_json`` does, and OSError if the file cannot be written.
        """
        definition = json.dumps(self.to_json())
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE_NAME, f"{definition}\n".encode())


def extend_vocabulary(
    model, tokenizer: Tokenizer, names: Sequence[str], rng: np.random.Generator
) -> Tokenizer:
    """Add special tokens: return the extended tokenizer, and resize the model's embeddings in place.

    The model's new rows are sampled with ``rng`` (see ``LanguageModel.resize_token_embeddings``); its rows
    for the old ids are unchanged. Raises ``Error``, before any change, if tokenizer and model have different
    numbers of ids, or as ``with_special_tokens`` does.
    """
    check_fits(tokenizer, model)
    extended = tokenizer.with_special_tokens(names)
    model.resize_token_embeddings(extended.vocab_size, rng)
    return extended


def check_fits(tokenizer: Tokenizer, model, padded: bool = False) -> None:
    """Raise ``Error`` unless the model has as many ids as the tokenizer.

    With ``padded`` the model may have more, because the vocabularies of some published models are padded to a
    multiple of 64, for example, with ids that are never used. It may also lack the last id if that is the one
    for images, which Gemma's tokenizer has for models with and without them.
    """
    rows, last = model.config.vocab_size, tokenizer.vocab_size - 1
    without_images = padded and tokenizer.special_tokens.get(IMAGE_TOKEN) == last == rows
    if (tokenizer.vocab_size > rows and not without_images) or (tokenizer.vocab_size < rows and not padded):
        raise Error(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the model has {rows}: use "
            "the tokenizer that the model was trained with"
        )


def find_names(names: Iterable[str], text: str) -> list[re.Match]:
    """The matches of the names in a text, in order; of two at the same position, the longer one."""
    known, first, of_lengths = _index(tuple(filter(None, names)))
    found, position = [], 0
    while known and (start := first.search(text, position)):
        matches = (pattern.match(text, start.start()) for pattern in of_lengths)
        match = next((each for each in matches if each and each[0] in known), None)
        position = match.end() if match else start.end()
        found += [match] if match else []
    return found


@lru_cache(maxsize=16)
def _index(names: tuple[str, ...]) -> tuple[frozenset[str], re.Pattern, list[re.Pattern]]:
    """The names, a pattern of their first characters, and one of n characters per length, longest first.

    A set is searched in a few microseconds; one pattern with Gemma's 6,000 names takes 75 where it fails.
    """
    first = "|".join(re.escape(character) for character in {name[0] for name in names})
    lengths = sorted({len(name) for name in names}, reverse=True)
    of_lengths = [re.compile(f"(?s:.{{{length}}})") for length in lengths]
    return frozenset(names), re.compile(first), of_lengths


def check_text(text: str, special: str = "refuse") -> None:
    """Raise ``Error`` if the text is not a str or has a lone surrogate, or if ``special`` is unknown."""
    if not isinstance(text, str):
        raise Error(f"the text is a {type(text).__name__}: give a str")
    if special not in ("refuse", "allow", "text"):
        raise Error(f"special is {special!r}: choose 'refuse', 'allow' or 'text'")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # tiktoken would silently replace it by U+FFFD
        raise Error(
            f"the text has a lone surrogate (half a character), {text[error.start]!r}, at position "
            f"{error.start}: remove it"
        ) from None


def check_sequence(ids, vocab_size: int) -> list[int]:
    """The ids of one sequence as a list of int, checked as by ``check_ids``, except that it may be empty."""
    if np.asarray(ids, dtype=object).size == 0:
        return []
    checked = check_ids(ids, vocab_size)
    if checked.ndim != 1:
        raise Error(f"ids have shape {checked.shape}: decode one sequence at a time")
    return checked.tolist()


def require(name: str):
    """Import the library that runs a published tokenizer. Raises ``Error`` if it is not installed."""
    try:
        return __import__(name)
    except ImportError as error:
        raise Error(f"this tokenizer needs the package {name}: {pip_install('models')}") from error


@contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """Convert a library's exceptions about a file to an ``Error`` that begins with ``problem``."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        raise Error(f"{problem} ({reason}): copy it again") from error

"""What every tokenizer has: text to token ids and back, and special tokens.

A special token, such as ``<|endoftext|>`` between documents or ``<|user|>`` in a chat, stands for
something that no text says: it has one id, and no merge makes it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tinyllm.checks import check_ids
from tinyllm.errors import Error

FILE_NAME = "tinyllm_tokenizer.json"
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """What every tokenizer has: text to ids and back, and special tokens.

    ``special_tokens`` holds their ids by name; ``added_tokens`` names those that came with
    ``with_special_tokens``.
    """

    name: str
    vocab_size: int
    special_tokens: dict[str, int]
    added_tokens: tuple[str, ...] = ()
    # What a model's files say of its tokenizer, see ``load_tokenizer``
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    def __repr__(self):
        return f"<{type(self).__name__} {self.name}: {self.vocab_size:,} ids>"

    def encode(self, text: str, special: str = "refuse") -> list[int]:
        """The token ids of a text.

        ``special`` says what happens to a special token such as ``<|endoftext|>`` inside the text:
        ``"refuse"`` raises ``Error``, ``"allow"`` makes it its id, ``"text"`` encodes it as ordinary text.
        Where two special tokens begin at the same place, the longer one counts.
        """
        return self.encode_array(text, special).tolist()

    def encode_array(self, text: str, special: str = "refuse") -> np.ndarray:
        """The ids of ``encode`` as an array (n,) of uint32: four bytes each, where a list takes 36."""
        check_text(text, special)
        found = [] if special == "text" else self.find_special(text)
        if special == "refuse" and found:
            raise Error(
                f"the text contains the special token {found[0][0]!r}: set special to 'allow' to encode it "
                "as its id, or to 'text' to encode it as ordinary text"
            )
        return self.encode_around(text, found)

    def find_special(self, text: str) -> list[re.Match]:
        """Where special tokens stand in a text; where two begin at the same place, the longer one."""
        if not self.special_tokens:
            return []
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return list(re.finditer("|".join(map(re.escape, longest_first)), text))

    def encode_around(self, text: str, found: list[re.Match]) -> np.ndarray:
        """The special tokens at these places as their ids, and all between them as ordinary text."""
        arrays, end = [], 0
        for match in found:
            arrays.append(self._encode_ordinary(text[end : match.start()], end))
            arrays.append(np.array([self.special_tokens[match[0]]], dtype=np.uint32))
            end = match.end()
        return np.concatenate([*arrays, self._encode_ordinary(text[end:], end)])

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        """The ids (n,), uint32, of a text without special tokens, which stands at ``start`` in the whole."""
        raise NotImplementedError

    def with_special_tokens(self, names: Sequence[str]) -> Tokenizer:
        """A tokenizer of the same kind with these special tokens as well, at new ids after the last one.

        Raises ``Error`` naming a name that is empty, given twice, or a token already. A model has to
        grow with it: ``extend_vocabulary`` does both.
        """
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise Error(f"the names of special tokens are {names!r}: give a list of str")
        extended = copy.copy(self)
        extended.special_tokens = dict(self.special_tokens)
        for name in names:
            if not isinstance(name, str) or name == "":
                raise Error(f"special token {name!r} has no name: give a str of at least one character")
            check_text(name)
            if name in extended.special_tokens or self._is_token(name):
                raise Error(f"special token {name!r} is a token already: omit it, or take another name")
            extended.special_tokens[name] = extended.vocab_size
            extended.vocab_size += 1
        extended.added_tokens = (*self.added_tokens, *names)
        return extended

    def _is_token(self, name: str) -> bool:
        """Whether one of the ordinary ids is this text."""
        raise NotImplementedError

    def decode_bytes(self, ids) -> bytes:
        """The UTF-8 bytes of the ids (list or 1-D integer array); a token may be half a character.

        Raises ``Error`` naming an id outside 0..vocab_size-1.
        """
        raise NotImplementedError

    def decode(self, ids) -> str:
        """The text of the ids (list or 1-D integer array); incomplete UTF-8 becomes U+FFFD, ``�``.

        A token may be half a character, so decode all ids of a text at once, or feed ``decode_bytes``
        to an incremental decoder. Raises ``Error`` naming an id outside 0..vocab_size-1.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> dict:
        """What ``load_tokenizer`` needs to build this tokenizer again; ``kind`` says which class.

        Raises ``Error`` for a published model's tokenizer.
        """
        raise Error(f"tokenizer {self.name!r} is not tinyllm's own: copy its file instead of saving it")

    def save(self, folder: str | Path) -> None:
        """Write ``tinyllm_tokenizer.json`` into the folder, which is made if it is not there."""
        definition = json.dumps(self.to_json())
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(definition + "\n", encoding="utf-8")


def extend_vocabulary(
    model, tokenizer: Tokenizer, names: Sequence[str], rng: np.random.Generator
) -> Tokenizer:
    """New special tokens for both: the tokenizer with these names, and the model grown in place to match.

    The model's new rows are drawn from ``rng``, see ``LanguageModel.resize_token_embeddings``; what it
    computed for the old ids stays. Raises ``Error``, before anything changes, if the two do not belong
    together or as ``with_special_tokens`` does.
    """
    check_fits(tokenizer, model)
    extended = tokenizer.with_special_tokens(names)
    model.resize_token_embeddings(extended.vocab_size, rng)
    return extended


def check_fits(tokenizer: Tokenizer, model, padded: bool = False) -> None:
    """``Error`` unless the tokenizer has as many ids as the model.

    With ``padded`` the model may have more: some are padded with rows that no id uses, to a multiple of
    64, say. Never may it have fewer.
    """
    rows = model.config.vocab_size
    if tokenizer.vocab_size > rows or (tokenizer.vocab_size < rows and not padded):
        raise Error(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and the model {rows}: use the "
            "tokenizer that the model was trained with"
        )


def check_text(text: str, special: str = "refuse") -> None:
    """``Error`` if the text is not a str or has a lone surrogate, or if ``special`` is an unknown word."""
    if not isinstance(text, str):
        raise Error(f"the text is a {type(text).__name__}: give a str")
    if special not in ("refuse", "allow", "text"):
        raise Error(f"special is {special!r}: choose 'refuse', 'allow' or 'text'")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # tiktoken would put U+FFFD there without a word
        raise Error(
            f"the text has half a character, the lone surrogate {text[error.start]!r}, at {error.start}: "
            "remove it"
        ) from None


def check_sequence(ids, vocab_size: int) -> list[int]:
    """The ids of one sequence as a list of int, checked as ``check_ids`` does; there may be none."""
    if np.asarray(ids, dtype=object).size == 0:
        return []
    checked = check_ids(ids, vocab_size)
    if checked.ndim != 1:
        raise Error(f"ids have shape {checked.shape}: decode one sequence at a time")
    return checked.tolist()


def require(name: str):
    """The library that runs a published tokenizer, imported. Raises ``Error`` if it is not installed."""
    try:
        return __import__(name)
    except ImportError as error:
        raise Error(f"this tokenizer needs {name}: pip install 'tinyllm-numpy[models]'") from error


@contextmanager
def refusals(said: str) -> Iterator[None]:
    """A library's exceptions about a file become an ``Error`` that begins with what is ``said``."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:  # the libraries raise Exception itself, and Rust's panic is not one
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        raise Error(f"{said} ({reason}): copy it again") from error

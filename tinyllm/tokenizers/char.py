"""One id per character."""

from __future__ import annotations

import numpy as np

from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer, check_sequence, check_text


class CharTokenizer(Tokenizer):
    """One id per character, in the order given; there are no special tokens, unless some are added.

    Raises ``Error`` if there are no characters or one comes twice; ``encode`` does for an unseen one.
    """

    name = "char"

    def __init__(self, characters: str):
        check_text(characters)
        if not characters:
            raise Error("a character tokenizer needs a character at least: give it a text that is not empty")
        self._id_of = {character: i for i, character in enumerate(characters)}
        if len(self._id_of) < len(characters):
            twice = next(c for i, c in enumerate(characters) if c in characters[:i])
            raise Error(f"character {twice!r} comes twice: give each once, or use CharTokenizer.from_text")
        self.characters = characters
        self.vocab_size = len(characters)
        self.special_tokens = {}

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The tokenizer of a text's own characters, sorted."""
        return cls("".join(sorted(set(text))))

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        try:
            return np.array([self._id_of[character] for character in text], dtype=np.uint32)
        except KeyError as error:
            unseen = error.args[0]
            raise Error(
                f"character {unseen!r} (U+{ord(unseen):04X}, at {start + text.index(unseen)}) is not one of "
                f"this tokenizer's {len(self.characters)}: omit it, or make the tokenizer from a text that "
                "has it"
            ) from None

    def _is_token(self, name: str) -> bool:
        return name in self._id_of

    def decode_bytes(self, ids) -> bytes:
        checked = check_sequence(ids, self.vocab_size)
        tokens = [*self.characters, *self.special_tokens]
        return "".join(tokens[i] for i in checked).encode("utf-8")

    def to_json(self) -> dict:
        return {"kind": "char", "characters": self.characters, "added_tokens": list(self.added_tokens)}

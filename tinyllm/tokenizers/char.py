"""A tokenizer with one id per character."""

from __future__ import annotations

import numpy as np

from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer, check_sequence, check_text


class CharTokenizer(Tokenizer):
    """One id per character, in the given order, and no special tokens unless they are added.

    Raises ``Error`` if there are no characters or one is repeated; ``encode`` raises it for any other
    character.
    """

    name = "char"

    def __init__(self, characters: str):
        check_text(characters)
        if not characters:
            raise Error("the text is empty, but a character tokenizer needs at least one: give a longer text")
        self._id_of = {character: i for i, character in enumerate(characters)}
        if len(self._id_of) < len(characters):
            twice = next(c for i, c in enumerate(characters) if c in characters[:i])
            raise Error(f"character {twice!r} is repeated: give each once, or use CharTokenizer.from_text")
        self.characters = characters
        self.vocab_size = len(characters)
        self.special_tokens = {}

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The tokenizer of the characters that occur in a text, sorted by code point."""
        check_text(text)
        return cls("".join(sorted(set(text))))

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        try:
            return np.array([self._id_of[character] for character in text], dtype=np.uint32)
        except KeyError as error:
            unseen = error.args[0]
            position = start + text.index(unseen)
            raise Error(
                f"character {unseen!r} (U+{ord(unseen):04X}, at position {position}) is not one of the "
                f"tokenizer's {len(self.characters)} characters: omit it, or create the tokenizer from a "
                "text that contains it"
            ) from None

    def _is_token(self, name: str) -> bool:
        return name in self._id_of

    def decode_bytes(self, ids) -> bytes:
        checked = check_sequence(ids, self.vocab_size)
        tokens = [*self.characters, *self.special_tokens]
        return "".join(tokens[i] for i in checked).encode("utf-8")

    def to_json(self) -> dict:
        return {"kind": "char", "characters": self.characters, "added_tokens": list(self.added_tokens)}

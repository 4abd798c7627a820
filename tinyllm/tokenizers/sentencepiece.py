"""SentencePiece models (Llama 2)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer, check_sequence, refusals, require
from tinyllm.tokenizers.huggingface import sentencepiece_bytes

if TYPE_CHECKING:
    import sentencepiece


# What a piece is, under the same numbers in SentencePiece's models and in a GGUF's tokenizer.ggml.token_type.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6


# ---------------------------------------------------------------------------- Llama 2: SentencePiece


class SentencePieceTokenizer(Tokenizer):
    """A vocabulary that the library sentencepiece runs; ``processor`` is its own object.

    Special tokens are its control and unknown pieces, ``<s>`` and ``</s>`` among them, which the library
    itself never makes of a text. With ``special="allow"`` every stretch of text between two of them is a
    text of its own and gets the leading space, as in Meta's code for Llama 2, which encodes each turn of
    a chat by itself.
    """

    def __init__(self, name: str, processor: sentencepiece.SentencePieceProcessor):
        self.name = name
        self.processor = processor
        self.vocab_size = len(processor)
        self.special_tokens = {
            processor.id_to_piece(i): i
            for i in range(len(processor))
            if processor.is_control(i) or processor.is_unknown(i)
        }

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        return np.array(self.processor.encode(text), dtype=np.uint32)

    def _is_token(self, name: str) -> bool:
        return self.processor.id_to_piece(self.processor.piece_to_id(name)) == name

    def decode_bytes(self, ids) -> bytes:
        names = {i: name for name, i in self.special_tokens.items()}
        pieces = []
        for i in check_sequence(ids, self.vocab_size):
            pieces.append(names[i].encode("utf-8") if i in names else self._bytes_of(i))
        return b"".join(pieces)

    def _bytes_of(self, i: int) -> bytes:
        piece = self.processor.id_to_piece(i)
        # A piece that is spelled <0x41> need not be a byte: the model says.
        return (
            sentencepiece_bytes(piece)
            if self.processor.is_byte(i)
            else piece.replace("▁", " ").encode("utf-8")
        )

    def decode(self, ids) -> str:
        """The text of the ids as the library makes it, special tokens under their names between.

        It takes off the one space that ``encode`` put in front of each stretch of text; ``decode_bytes``
        keeps it, so ids that continue a text go through that: `` is`` after ``It``.
        """
        names = {i: name for name, i in self.special_tokens.items()}
        checked = check_sequence(ids, self.vocab_size)
        parts = []
        for special, group in itertools.groupby(checked, names.__contains__):
            stretch = list(group)
            parts.append("".join(names[i] for i in stretch) if special else self.processor.decode(stretch))
        return "".join(parts)

    def to_json(self) -> dict:
        raise Error(f"tokenizer {self.name!r} is a published model's: copy its file instead of saving it")


def read_sentencepiece(file: Path) -> SentencePieceTokenizer:
    return load_sentencepiece(file, file.read_bytes())


def load_sentencepiece(source: Path, model: bytes) -> SentencePieceTokenizer:
    library = require("sentencepiece")
    with refusals(f"{source} holds no complete SentencePiece model"):
        processor = library.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(str(source), processor)
    tokenizer.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
    tokenizer.eos_ids = (processor.eos_id(),) if processor.eos_id() >= 0 else ()
    return tokenizer

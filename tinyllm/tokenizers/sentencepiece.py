"""SentencePiece models, as Llama 2 has them, run by the library sentencepiece."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllm.files import read_file
from tinyllm.tokenizers.base import Tokenizer, check_sequence, refusals, require

if TYPE_CHECKING:
    import sentencepiece

# What a piece is, under the same numbers in SentencePiece's models and in a GGUF's tokenizer.ggml.token_type.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


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
        return piece_bytes(piece) if self.processor.is_byte(i) else piece.replace("▁", " ").encode("utf-8")

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


def read_sentencepiece(file: Path, model: bytes | None = None) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model: what a file holds, or what was made of it."""
    library = require("sentencepiece")
    model = read_file(file) if model is None else model
    with refusals(f"{file} does not hold a complete SentencePiece model"):
        processor = library.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(str(file), processor)
    tokenizer.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
    tokenizer.eos_ids = (processor.eos_id(),) if processor.eos_id() >= 0 else ()
    return tokenizer


def piece_bytes(piece: str) -> bytes:
    """A piece as text: a space is written ``▁``, and a byte that is not a whole character ``<0xE2>``."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode("utf-8")

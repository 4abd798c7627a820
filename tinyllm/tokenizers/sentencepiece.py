"""SentencePiece models, such as Llama 2's, run by the library sentencepiece."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllm.files import read_file
from tinyllm.tokenizers.base import Tokenizer, check_sequence, library_errors, require

if TYPE_CHECKING:
    import sentencepiece

# Types of pieces, numbered alike in SentencePiece's models and in GGUF's tokenizer.ggml.token_type.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class SentencePieceTokenizer(Tokenizer):
    """A vocabulary run by the library sentencepiece; ``processor`` is the library's object.

    Special tokens are the control and unknown pieces, including ``<s>`` and ``</s>``; the library never
    encodes text as control pieces. With ``special="allow"`` each stretch of text between two special tokens
    is encoded as a separate text, with a leading space, as in Meta's code for Llama 2, which encodes the
    turns of a chat one by one.
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
        # A piece spelled <0x41> is a byte only if the model says so.
        return piece_bytes(piece) if self.processor.is_byte(i) else piece.replace("▁", " ").encode("utf-8")

    def decode(self, ids) -> str:
        """The text of the ids as decoded by the library, with special tokens as their names.

        The library removes the leading space that ``encode`` adds to each stretch of text. ``decode_bytes``
        keeps it, so use that for ids that continue a text: `` is`` after ``It``.
        """
        names = {i: name for name, i in self.special_tokens.items()}
        checked = check_sequence(ids, self.vocab_size)
        parts = []
        for special, group in itertools.groupby(checked, names.__contains__):
            stretch = list(group)
            parts.append("".join(names[i] for i in stretch) if special else self.processor.decode(stretch))
        return "".join(parts)


def read_sentencepiece(file: Path, model: bytes | None = None) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model: the bytes ``model``, by default the content of the file.

    Raises ``Error`` if the model is damaged or the library is not installed.
    """
    library = require("sentencepiece")
    model = read_file(file) if model is None else model
    with library_errors(f"{file} is not a complete SentencePiece model"):
        processor = library.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(str(file), processor)
    tokenizer.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
    tokenizer.add_bos = True  # as in Meta's code for Llama 2, and in llama.cpp
    tokenizer.eos_ids = (processor.eos_id(),) if processor.eos_id() >= 0 else ()
    return tokenizer


def piece_bytes(piece: str) -> bytes:
    """The UTF-8 bytes of a piece: ``▁`` is a space, and ``<0xE2>`` a byte."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode("utf-8")

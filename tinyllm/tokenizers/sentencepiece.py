"""SentencePiece models, such as Llama 2's, run by the library sentencepiece."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllm.errors import Error
from tinyllm.files import read_file
from tinyllm.tokenizers.base import Tokenizer, check_sequence, find_names, library_errors, require

if TYPE_CHECKING:
    import sentencepiece

# Types of pieces, numbered alike in SentencePiece's models and in GGUF's tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class SentencePieceTokenizer(Tokenizer):
    """A vocabulary run by the library sentencepiece; ``processor`` is the library's object.

    Special tokens are the control and unknown pieces, including ``<s>`` and ``</s>``; the library never
    encodes text as control pieces. With ``special="allow"`` each stretch of text between two special tokens
    is encoded as a separate text, with a leading space, as in Meta's code for Llama 2, which encodes the
    turns of a chat one by one.

    ``with_file_tokens`` adds tokens that are not pieces of the model, special or not. As in transformers, one
    that is not special is encoded as its id wherever it occurs, and no space is added after an added token.
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
        self._added: dict[str, Mapping] = {}  # name -> id and properties

    def with_file_tokens(self, tokens: Mapping[int, Mapping]) -> SentencePieceTokenizer:
        extended = copy.copy(self)
        extended.special_tokens, extended._added = dict(self.special_tokens), dict(self._added)
        for i, token in tokens.items():
            name = token["content"]
            if self.special_tokens.get(name) == i:
                continue
            if i < len(self.processor) and self.processor.id_to_piece(i) != name:
                piece = self.processor.id_to_piece(i)
                raise Error(f"{self.name} has the token {piece!r} with the id {i}: correct that of {name!r}")
            extended._added[name] = {**token, "id": i}
            if token["special"]:
                extended.special_tokens[name] = i
            extended.vocab_size = max(extended.vocab_size, i + 1)
        return extended

    def file_tokens(self) -> dict[str, Mapping]:
        """The tokens added by ``with_file_tokens``: name -> ``id`` and properties."""
        return dict(self._added)

    @cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        """A processor that adds no space in front of a text."""
        # Fields at the end of a message take precedence over earlier ones.
        model = self.processor.serialized_model_proto() + proto_field(3, proto_field(3, 0))
        return type(self.processor)(model_proto=model)

    def _after(self, i: int) -> sentencepiece.SentencePieceProcessor:
        """The processor for the text after a token with this id that is special or added."""
        is_piece = i < len(self.processor) and self.processor.id_to_piece(i) not in self._added
        return self.processor if is_piece else self._continuing

    def _names(self) -> dict[int, str]:
        added = {token["id"]: name for name, token in self._added.items()}
        return {i: name for name, i in self.special_tokens.items()} | added

    def token_ids(self) -> set[int]:
        return {*range(len(self.processor)), *self._names()}

    def encode_around(self, text: str, found: list[re.Match], before: Sequence[int] = ()) -> np.ndarray:
        ordinary = find_names(self._added.keys() - self.special_tokens.keys(), text)
        ids, end, processor = [], 0, self.processor
        if len(before):
            processor = self._after(before[-1]) if before[-1] in self._names() else self._continuing
        for match in sorted([*found, *ordinary], key=re.Match.start):
            if match.start() < end:
                continue
            token = self._added.get(match[0], {})
            i = token.get("id", self.special_tokens.get(match[0]))
            part = text[end : match.start()]
            ids += [*processor.encode(part.rstrip() if token.get("lstrip") else part), i]
            end, processor = match.end(), self._after(i)
            if token.get("rstrip"):
                end += len(text[end:]) - len(text[end:].lstrip())
        return np.array(ids + processor.encode(text[end:]), dtype=np.uint32)

    def _is_token(self, name: str) -> bool:
        return self.processor.id_to_piece(self.processor.piece_to_id(name)) == name

    def decode_bytes(self, ids) -> bytes:
        names, pieces = self._names(), []
        for i in check_sequence(ids, self.vocab_size):
            pieces.append(names[i].encode("utf-8") if i in names else self._bytes_of(i))
        return b"".join(pieces)

    def _bytes_of(self, i: int) -> bytes:
        if i >= len(self.processor):
            raise Error(f"{self.name} has no token with id {i}: decode ids of this tokenizer only")
        piece = self.processor.id_to_piece(i)
        # A piece spelled <0x41> is a byte only if the model says so.
        return piece_bytes(piece) if self.processor.is_byte(i) else piece.replace("▁", " ").encode("utf-8")

    def decode(self, ids) -> str:
        """The text of the ids as decoded by the library, with special tokens as their names.

        The library removes the leading space that ``encode`` adds to each stretch of text. ``decode_bytes``
        keeps it, so use that for ids that continue a text: `` is`` after ``It``.
        """
        names, checked = self._names(), check_sequence(ids, self.vocab_size)
        self.decode_bytes(checked)  # raises an error for an id without a token
        parts, processor = [], self.processor
        for named, group in itertools.groupby(checked, names.__contains__):
            stretch = list(group)
            parts.append("".join(names[i] for i in stretch) if named else processor.decode(stretch))
            processor = self._after(stretch[-1])
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


def proto_field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer: a varint, or bytes preceded by their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """A protocol buffer's integer: seven bits per byte, lowest first; the eighth bit means more follow."""
    low = []
    while value >= 128:
        low.append(value % 128 | 128)
        value //= 128
    return bytes([*low, value])


def piece_bytes(piece: str) -> bytes:
    """The UTF-8 bytes of a piece: ``▁`` is a space, and ``<0xE2>`` a byte."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode("utf-8")

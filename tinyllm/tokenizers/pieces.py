"""The pieces of a SentencePiece model, for writing them in other programs' formats."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tinyllm.errors import Error
from tinyllm.tokenizers.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceTokenizer,
)

BPE = 2  # trainer_spec.model_type of sentencepiece_model.proto


@dataclass
class Pieces:
    """Of every id the text, the score, by which pairs are merged, and the type; how a text begins."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    add_space_prefix: bool

    def ids_of(self, *types: int) -> list[int]:
        return [i for i, kind in enumerate(self.types) if kind in types]


def pieces_of(tokenizer: SentencePieceTokenizer) -> Pieces:
    """The pieces of a tokenizer, with the tokens that files added to it.

    Raises ``Error`` if its model is not BPE, or changes a text in another way than by adding a space.
    """
    pieces, kind, charsmap, squeeze = Pieces([], [], [], True), 1, b"", True
    for number, message in _fields(tokenizer.processor.serialized_model_proto()):
        fields = list(_fields(message)) if number in (1, 2, 3) else []
        if number == 1:
            found = {1: b"", 2: b"\0\0\0\0", 3: NORMAL} | dict(fields)
            pieces.tokens.append(found[1].decode("utf-8"))
            pieces.scores.append(struct.unpack("<f", found[2])[0])
            pieces.types.append(found[3])
        for field, value in fields:
            match number, field:
                case 2, 3:
                    kind = value
                case 3, 2:
                    charsmap = value
                case 3, 3:
                    pieces.add_space_prefix = bool(value)
                case 3, 4:
                    squeeze = bool(value)
    if kind != BPE:
        raise Error(
            f"{tokenizer.name} is a SentencePiece model of type {kind}, not BPE: it cannot be exported"
        )
    if charsmap or squeeze:
        raise Error(f"{tokenizer.name} normalizes a text before it is encoded: it cannot be exported")
    own = [pieces.tokens[i] for i in pieces.ids_of(USER_DEFINED)]
    if pieces.add_space_prefix and (names := [*own, *tokenizer.file_tokens()]):
        raise Error(
            f"{tokenizer.name} has the tokens {', '.join(names)}, after which it adds no space, as it does "
            "after others: other programs cannot tell them apart"
        )
    for name, token in sorted(tokenizer.file_tokens().items(), key=lambda item: item[1]["id"]):
        i = token["id"]
        for unused in range(len(pieces.tokens), i + 1):
            pieces.tokens.append(f"[PAD{unused}]")
            pieces.scores.append(0.0)
            pieces.types.append(UNUSED)
        pieces.tokens[i], pieces.types[i] = name, CONTROL if token["special"] else USER_DEFINED
    if UNKNOWN not in pieces.types:
        raise Error(f"{tokenizer.name} has no unknown piece: it cannot be exported")
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: number, and a varint or the bytes of anything else."""
    position = 0

    def varint() -> int:
        nonlocal position
        value, shift = 0, 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        size = varint() if size is None else size
        yield tag >> 3, data[position : position + size]
        position += size

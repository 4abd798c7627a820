"""The tokenizer inside a GGUF file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllm.checks import is_integer
from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer, require
from tinyllm.tokenizers.huggingface import TokenizersTokenizer, build_byte_level, distinct
from tinyllm.tokenizers.sentencepiece import BYTE, CONTROL, UNKNOWN, USER_DEFINED, load_sentencepiece
from tinyllm.weights.gguf import GGUFFile

if TYPE_CHECKING:
    pass


GGUF_PRE = ("gpt-2", "smollm", "llama-bpe")


# ---------------------------------------------------------------------------- GGUF


def read_gguf(file: Path) -> Tokenizer:
    metadata = GGUFFile(file).metadata
    tokens = _gguf_list(file, metadata, "tokens")
    if len(set(tokens)) < len(tokens):
        raise Error(f"{file} has {len(tokens)} tokens, {len(set(tokens))} of them different: copy it again")
    ordinary = np.ones(len(tokens), np.int32)
    types = _gguf_numbers(file, metadata, "token_type", ordinary)
    if not np.isin(types, range(1, 7)).all():
        raise Error(f"{file} has a token of a type that there is not: copy it again")
    types = types.tolist()
    model = _gguf_text(file, metadata, "ggml.model")
    if model == "gpt2":
        tokenizer = _gguf_byte_level(file, metadata, tokens, types)
    elif model == "llama":
        tokenizer = load_sentencepiece(file, _sentencepiece_model(file, metadata, tokens, types))
    else:
        raise Error(f"{file} has a vocabulary of the kind {model!r}: only 'gpt2' and 'llama' are read")
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom")}
    for key, i in ids.items():
        if i is not None and not (is_integer(i) and 0 <= i < len(tokens)):
            raise Error(f"{file} has {i!r} as tokenizer.ggml.{key}_token_id, which is no id: copy it again")
    tokenizer.bos_id = ids["bos"]
    tokenizer.eos_ids = distinct([ids["eos"], ids["eot"], ids["eom"]])
    tokenizer.chat_template = _gguf_text(file, metadata, "chat_template")
    return tokenizer


def _gguf_text(file: Path, metadata: dict, key: str) -> str | None:
    value = metadata.get(f"tokenizer.{key}")
    if not isinstance(value, str | None):
        raise Error(f"{file} has something other than a text in tokenizer.{key}: copy it again")
    return value


def _gguf_list(file: Path, metadata: dict, key: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        raise Error(f"{file} has no list tokenizer.ggml.{key}: use the tokenizer of the model's folder")
    return value


def _gguf_numbers(file: Path, metadata: dict, key: str, default: np.ndarray | None = None) -> np.ndarray:
    """One number per token."""
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, np.ndarray) or len(value) != len(metadata["tokenizer.ggml.tokens"]):
        raise Error(f"{file} has no number for each token in tokenizer.ggml.{key}: copy it again")
    return value


def _gguf_switch(file: Path, metadata: dict, key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise Error(f"{file} has something other than yes or no in tokenizer.ggml.{key}: copy it again")
    return value


def _gguf_byte_level(file: Path, metadata: dict, tokens: list[str], types: list[int]) -> TokenizersTokenizer:
    pre = _gguf_text(file, metadata, "ggml.pre")
    pre = "llama-bpe" if pre in ("llama3", "llama-v3") else pre  # llama.cpp's other names for it
    if pre not in GGUF_PRE:
        raise Error(f"{file} cuts a text in pieces as {pre!r} does: only {', '.join(GGUF_PRE)} are read")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = build_byte_level(file, vocabulary, _gguf_list(file, metadata, "merges"), pre)
    library = require("tokenizers")
    for token, kind in zip(tokens, types):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            added = library.AddedToken(token, normalized=False, special=kind != USER_DEFINED)
            if kind == USER_DEFINED:
                tokenizer.add_tokens([added])
            else:
                tokenizer.add_special_tokens([added])
    return TokenizersTokenizer(str(file), tokenizer)


def _sentencepiece_model(file: Path, metadata: dict, tokens: list[str], types: list[int]) -> bytes:
    """The SentencePiece model that a GGUF's vocabulary was, in its file format again: a protocol buffer.

    Field numbers from sentencepiece_model.proto: pieces 1 (text 1, score 2, type 3), trainer_spec 2
    (model_type 3 = BPE, vocab_size 4, byte_fallback 35, the ids and names of unk, bos and eos 40 … 47),
    normalizer_spec 3 (add_dummy_prefix 3, remove_extra_whitespaces 4).
    """
    scores = _gguf_numbers(file, metadata, "scores").tolist()
    if types.count(UNKNOWN) != 1:
        raise Error(f"{file} has {types.count(UNKNOWN)} unknown tokens instead of one: copy it again")
    pieces = b"".join(
        _field(1, _field(1, token.encode("utf-8")) + b"\x15" + struct.pack("<f", score) + _field(3, kind))
        for token, score, kind in zip(tokens, scores, types)
    )
    unknown = types.index(UNKNOWN)
    trainer = _field(3, 2) + _field(4, len(tokens)) + _field(35, int(BYTE in types))
    trainer += _field(40, unknown) + _field(45, tokens[unknown].encode("utf-8"))
    prefix = _gguf_switch(file, metadata, "add_space_prefix", True)
    squeeze = _gguf_switch(file, metadata, "remove_extra_whitespaces", False)
    normalizer = _field(1, b"identity") + _field(3, int(prefix)) + _field(4, int(squeeze))
    return pieces + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer: a whole number, or bytes with their length in front."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    low = []
    while value >= 128:
        low.append(value % 128 | 128)
        value //= 128
    return bytes([*low, value])

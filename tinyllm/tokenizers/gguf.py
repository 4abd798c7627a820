"""The tokenizer of a GGUF file: a byte-level BPE or SentencePiece vocabulary, stored in the file's keys."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer, require
from tinyllm.tokenizers.configs import distinct, end_ids
from tinyllm.tokenizers.huggingface import TokenizersTokenizer, build_byte_level
from tinyllm.tokenizers.sentencepiece import (
    BYTE,
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    proto_field,
    read_sentencepiece,
)
from tinyllm.weights.gguf import GGUFFile

# llama.cpp's names of pre-tokenizers (src/llama-vocab.cpp), and of the one that splits a text in the same way
PRE_TOKENIZERS = {
    "smollm": "smollm",
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "mellum", "exaone4", "a.x-4.0"), "gpt-2"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"), "llama-bpe"),
    **dict.fromkeys(("smaug-bpe", "dbrx"), "smaug-bpe"),  # Llama 3's pieces, with all merges
    "qwen2": "qwen2",  # of Qwen2 to Qwen3
}


def read_gguf(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file, with the ``bos_id``, ``eos_ids`` and chat template in the file.

    Raises ``Error`` if the file is damaged, or has an unsupported vocabulary or a missing library.
    """
    file = GGUFFile(path)
    tokens = file.value("tokenizer.ggml.tokens", list)
    if len(set(tokens)) < len(tokens):
        raise Error(
            f"{path} has {len(tokens)} tokens, but only {len(set(tokens))} of them differ: copy it again"
        )
    types = _numbers(file, "token_type", "iu", len(tokens), np.ones(len(tokens), np.int32))
    if not set(types) <= set(range(1, 7)):
        raise Error(f"{path} has a token of an unknown type: copy it again")
    model = file.value("tokenizer.ggml.model", str | None)
    if model == "gpt2":
        tokenizer = _read_byte_level(file, tokens, types)
    elif model == "llama":
        tokenizer = read_sentencepiece(path, _sentencepiece_model(file, tokens, types))
    else:
        raise Error(
            f"{path} has a vocabulary of kind {model!r}, but only 'gpt2' and 'llama' are supported: use the "
            "tokenizer.json of the model's Hugging Face folder"
        )
    names = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")
    # llama.cpp's defaults for a SentencePiece vocabulary
    defaults = {name: i for i, name in ((1, names[0]), (2, names[1])) if types[i : i + 1] == [CONTROL]}
    defaults = defaults if model == "llama" else {}
    ids = [file.value(f"tokenizer.ggml.{name}", int | None, defaults.get(name)) for name in names]
    for name, i in zip(names, ids):
        if i is not None and not 0 <= i < len(tokens):
            raise Error(
                f"{path} has tokenizer.ggml.{name} = {i}, not an id below {len(tokens)}: copy it again"
            )
    tokenizer.bos_id = ids[0]
    tokenizer.eos_ids = distinct([*ids[1:], *end_ids(tokenizer)])
    tokenizer.add_bos = file.value("tokenizer.ggml.add_bos_token", bool, tokenizer.add_bos)
    if file.value("tokenizer.ggml.add_eos_token", bool, False):
        tokenizer.closing_ids = distinct(ids[1:2])
    tokenizer.chat_template = file.value("tokenizer.chat_template", str | None)
    return tokenizer


def _numbers(file: GGUFFile, key: str, kinds: str, count: int, default: np.ndarray | None = None) -> list:
    """The value of a key that has one number per token, of a dtype of these ``kinds``."""
    value = file.value(f"tokenizer.ggml.{key}", np.ndarray, default)
    if len(value) != count or value.dtype.kind not in kinds:
        raise Error(
            f"{file.path} has {len(value)} {value.dtype} in tokenizer.ggml.{key} instead of {count} "
            f"{'float32' if kinds == 'f' else 'int32'}: copy it again"
        )
    return value.tolist()


def _read_byte_level(file: GGUFFile, tokens: list[str], types: list[int]) -> TokenizersTokenizer:
    pre = file.value("tokenizer.ggml.pre", str | None)
    if pre in (None, "default"):
        raise Error(
            f"{file.path} does not say how its tokenizer splits a text (tokenizer.ggml.pre is missing or "
            "'default'): convert the model with a newer llama.cpp, or use its Hugging Face folder"
        )
    if pre not in PRE_TOKENIZERS:
        raise Error(
            f"{file.path} has the pre-tokenizer {pre!r}, but only {', '.join(PRE_TOKENIZERS)} are supported: "
            "use the tokenizer.json of the model's Hugging Face folder"
        )
    pre = PRE_TOKENIZERS[pre]
    # Rows of the model without a token, such as [PAD151669], must never be sampled.
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}
    merges = file.value("tokenizer.ggml.merges", list)
    tokenizer = build_byte_level(file.path, vocabulary, merges, pre)
    library = require("tokenizers")
    for kinds, special in (((USER_DEFINED,), False), ((UNKNOWN, CONTROL), True)):
        named = (token for token, kind in zip(tokens, types) if kind in kinds)
        # All in one call: after each call the library rebuilds its index of all of them.
        tokenizer.add_tokens([library.AddedToken(name, normalized=False, special=special) for name in named])
    readable = TokenizersTokenizer(str(file.path), tokenizer)
    readable.add_bos = pre == "llama-bpe"  # llama.cpp's default
    return readable


def _sentencepiece_model(file: GGUFFile, tokens: list[str], types: list[int]) -> bytes:
    """A GGUF file's vocabulary, converted back to a SentencePiece model, which is a protocol buffer.

    Field numbers from sentencepiece_model.proto: pieces 1 (text 1, score 2, type 3), trainer_spec 2
    (model_type 3 = BPE, vocab_size 4, byte_fallback 35, the ids and names of unk, bos and eos 40 … 47),
    normalizer_spec 3 (add_dummy_prefix 3, remove_extra_whitespaces 4).
    """
    scores = _numbers(file, "scores", "f", len(tokens))
    unknown, pieces = _unknown_id(file, types), []
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types)):
        if kind == USER_DEFINED:  # GGUF has it as it occurs in a text: two spaces, not two ▁
            token = token.replace(" ", "▁")
        piece = proto_field(1, token.encode("utf-8")) + b"\x15" + struct.pack("<f", score)
        pieces.append(proto_field(1, piece + proto_field(3, UNKNOWN if i == unknown else kind)))
    trainer = proto_field(3, 2) + proto_field(4, len(tokens)) + proto_field(35, int(BYTE in types))
    trainer += proto_field(40, unknown) + proto_field(45, tokens[unknown].encode("utf-8"))
    prefix = file.value("tokenizer.ggml.add_space_prefix", bool, True)
    squeeze = file.value("tokenizer.ggml.remove_extra_whitespaces", bool, False)
    normalizer = proto_field(1, b"identity") + proto_field(3, int(prefix)) + proto_field(4, int(squeeze))
    return b"".join(pieces) + proto_field(2, trainer) + proto_field(3, normalizer)


def _unknown_id(file: GGUFFile, types: list[int]) -> int:
    """The id of the unknown token: the only one of that type, or the one that a key names (Gemma's)."""
    if UNKNOWN in types:
        ids = [i for i, kind in enumerate(types) if kind == UNKNOWN]
    else:
        named = file.value("tokenizer.ggml.unknown_token_id", int | None)
        ids = [named] if named is not None and 0 <= named < len(types) else []
    if len(ids) != 1:
        raise Error(f"{file.path} has {len(ids)} unknown tokens instead of one: copy it again")
    return ids[0]

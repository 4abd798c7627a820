"""A tokenizer as the keys of a GGUF file, from which llama.cpp rebuilds it."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tokenizers.configs import END_OF_TURN
from tinyllm.tokenizers.export import ends_of_text, library_tokenizer
from tinyllm.tokenizers.gguf import PRE_TOKENIZERS
from tinyllm.tokenizers.huggingface import SENTENCEPIECE_DECODERS, build_byte_level
from tinyllm.tokenizers.pieces import pieces_of
from tinyllm.tokenizers.sentencepiece import (
    BYTE,
    BYTE_PIECE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceTokenizer,
)
from tinyllm.weights.gguf_export import INSTEAD

NAMED_ENDS = ("eos", "eot", "eom")  # tokenizer.ggml.eos_token_id, …


def tokenizer_keys(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The keys ``tokenizer.…`` of a tokenizer whose model has ``rows`` ids.

    Ids without a token are written as llama.cpp's converter writes them: ``[PAD7]``, of the type unused.
    Raises ``Error``, saying what is in the way, for a tokenizer that llama.cpp has no form for.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        keys = _sentencepiece_keys(tokenizer)
    else:
        keys = _library_keys(tokenizer)
    for name in ("tokens", "token_type", "scores"):  # a model may lack the last id, see ``check_fits``
        if name in keys:
            keys[name] = keys[name][:rows]
    for i in range(len(keys["tokens"]), rows):
        keys["tokens"].append(f"[PAD{i}]")
        keys["token_type"].append(UNUSED)
        if "scores" in keys:
            keys["scores"].append(0.0)
    ends = ends_of_text(tokenizer)
    if not ends:
        raise Error(
            f"the tokenizer {tokenizer.name} has no token that ends a text, and llama.cpp would take one of "
            f"its own choice: {INSTEAD}"
        )
    for i in ends[len(NAMED_ENDS) :]:
        if keys["tokens"][i] not in END_OF_TURN:
            raise Error(
                f"the tokenizer {tokenizer.name} has {len(ends)} tokens that end a text, and GGUF has no "
                f"place for {keys['tokens'][i]!r}: {INSTEAD}"
            )
    keys |= {f"{name}_token_id": i for name, i in zip(NAMED_ENDS, ends)}
    # Without this key llama.cpp takes an id of its own choice, also where no text begins with it.
    keys["bos_token_id"] = ends[0] if tokenizer.bos_id is None else tokenizer.bos_id
    keys |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": False}
    keys = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    if tokenizer.chat_template is not None:
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys


def _sentencepiece_keys(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    pieces = pieces_of(tokenizer)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": _as_typed(pieces.tokens, pieces.types),
        "scores": pieces.scores,
        "token_type": pieces.types,
        "unknown_token_id": pieces.ids_of(UNKNOWN)[0],
        "add_space_prefix": pieces.add_space_prefix,
    }


def _library_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of a tokenizer that Hugging Face's library runs, or can run."""
    definition = json.loads(library_tokenizer(tokenizer).to_str())
    vocabulary, added = definition["model"]["vocab"], definition["added_tokens"]
    for token in added:
        flags = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if flags:
            raise Error(
                f"the tokenizer {tokenizer.name} has the token {token['content']!r} with {flags[0]}, for "
                f"which GGUF has no place: {INSTEAD}"
            )
    size = max([*vocabulary.values(), *(token["id"] for token in added)]) + 1
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for token in added:
        i = token["id"]
        tokens[i], types[i] = token["content"], CONTROL if token["special"] else USER_DEFINED
    keys = {"tokens": tokens, "token_type": types}
    merges = definition["model"]["merges"]
    if not merges:
        raise Error(f"the tokenizer {tokenizer.name} has no merges, which a GGUF file needs: {INSTEAD}")
    for part in itertools.chain.from_iterable(merges):
        if " " in part:
            raise Error(
                f"the tokenizer {tokenizer.name} merges {part!r}, and GGUF has no place for its space: "
                f"{INSTEAD}"
            )
    if definition["decoder"] in SENTENCEPIECE_DECODERS:
        return keys | _pieces_keys(tokenizer, definition, keys, merges)
    return keys | {
        "model": "gpt2",
        "pre": _pre_tokenizer(tokenizer, definition),
        "merges": [" ".join(pair) for pair in merges],
    }


def _pieces_keys(tokenizer: Tokenizer, definition: dict, keys: dict, merges: list) -> dict[str, Any]:
    """Those of a BPE over characters, SentencePiece's: scores that order its merges."""
    vocabulary, model = definition["model"]["vocab"], definition["model"]
    normalizer = definition["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Prepend", "prepend": "▁"}
    if steps not in ([replace], [prefix, replace]) or definition["pre_tokenizer"] is not None:
        raise Error(
            f"the tokenizer {tokenizer.name} splits or normalizes a text in a way that GGUF has no place "
            f"for, {normalizer or definition['pre_tokenizer']}: {INSTEAD}"
        )
    scores = [0.0] * len(keys["tokens"])
    for rank, (left, right) in reversed(list(enumerate(merges))):
        scores[vocabulary[left + right]] = -float(rank + 1)
    unknown = vocabulary[model["unk_token"]] if model["unk_token"] is not None else None
    for i, token in enumerate(keys["tokens"]):
        if i == unknown:
            keys["token_type"][i] = UNKNOWN
        elif model["byte_fallback"] and BYTE_PIECE.fullmatch(token):
            keys["token_type"][i] = BYTE
    found = {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix in steps}
    found["tokens"] = _as_typed(keys["tokens"], keys["token_type"])
    return found if unknown is None else found | {"unknown_token_id": unknown}


def _as_typed(tokens: list[str], types: list[int]) -> list[str]:
    """The tokens with those that are searched in a text as they are there: with spaces, not ▁."""
    return [token.replace("▁", " ") if kind == USER_DEFINED else token for token, kind in zip(tokens, types)]


def _pre_tokenizer(tokenizer: Tokenizer, definition: dict) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer splits a text."""
    known, found = _known_pre_tokenizers(), _comparable(definition)
    for name, other in known.items():
        if found == other:
            return name
    raise Error(
        f"the tokenizer {tokenizer.name} splits a text in a way that has no name in llama.cpp "
        f"({json.dumps(definition['pre_tokenizer'], ensure_ascii=False)}), only {', '.join(known)} have one: "
        f"{INSTEAD}"
    )


@cache
def _known_pre_tokenizers() -> dict[str, dict]:
    """The parts of a tokenizer that each name stands for."""
    names = dict.fromkeys(PRE_TOKENIZERS.values())
    built = {name: build_byte_level(Path(name), {"a": 0}, [], name) for name in names}
    return {name: _comparable(json.loads(each.to_str())) for name, each in built.items()}


def _comparable(definition: dict) -> dict:
    """What determines a text's ids besides vocabulary and merges, in one form."""
    steps = definition["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    plain = [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]
    return {
        "normalizer": definition["normalizer"],
        "steps": plain,
        "ignore_merges": definition["model"]["ignore_merges"],
    }

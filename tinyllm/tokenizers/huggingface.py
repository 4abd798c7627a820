"""Published byte-pair encodings in Hugging Face's formats, run by the library tokenizers.

The formats are ``tokenizer.json``, which defines the whole tokenizer, and the older ``vocab.json`` with
``merges.txt`` of GPT-2 and Qwen2. They are used by two families that treat a space differently. Byte-level
BPE (GPT-2, Llama 3, SmolLM2) merges the bytes of the UTF-8 text: a space is a byte like any other.
SentencePiece (Llama 2) merges characters, writes a space as ``▁``, adds one at the beginning of every text,
and falls back to the bytes ``<0x00>`` … ``<0xFF>`` for a character without a piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllm.checks import is_integer
from tinyllm.errors import Error
from tinyllm.files import read_json, read_text
from tinyllm.tokenizers.base import (
    END_OF_TEXT,
    Tokenizer,
    check_sequence,
    check_text,
    library_errors,
    require,
)
from tinyllm.tokenizers.components import check_components, flatten
from tinyllm.tokenizers.configs import FLAGS, named_tokens, tokenizer_class
from tinyllm.tokenizers.sentencepiece import piece_bytes
from tinyllm.tokenizers.tiktoken import BYTE_OF, LLAMA3_PATTERN

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_JSON, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
# By class of transformers: how the text of such a pair of files is split, see ``build_byte_level``
SPLIT_AS = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}

# How the library decodes SentencePiece's pieces. A vocabulary that adds no leading space omits the last step.
_STEPS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]

SENTENCEPIECE_DECODERS = [{"type": "Sequence", "decoders": steps} for steps in (_STEPS, _STEPS[:3])]

SPARE_IDS = 2**20  # the most unused ids of a vocabulary; the library allocates memory for each


class TokenizersTokenizer(Tokenizer):
    """A byte-pair encoding run by Hugging Face's library, byte-level or SentencePiece-like.

    ``tokenizer`` is the library's object. Added tokens that it does not mark as special (a run of spaces,
    ``<think>``) are part of the vocabulary: wherever they occur in a text, they are encoded as their ids. For
    ``special="allow"`` the library encodes special tokens itself; for ``"text"`` a copy of it with
    ``encode_special_tokens`` set encodes them as ordinary text.

    Raises ``Error`` if the model is not BPE, if the decoder is neither byte-level nor SentencePiece-like, or
    if the tokenizer would drop unknown characters. Some byte-level vocabularies lack single bytes (SmolLM2's
    lacks 21, including U+0004 and the first byte of U+50000). The library silently drops them; ``encode``
    raises ``Error`` naming the character.
    """

    def __init__(self, name: str, tokenizer: tokenizers.Tokenizer):
        self.name = name
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._ids = set(vocabulary.values())
        self._added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in self._added.items() if token.special}
        self._check_model()
        self._byte_level = self._check_decoder()
        symbols = BYTE_OF.keys() - tokenizer.get_vocab(with_added_tokens=False) if self._byte_level else ()
        self._missing = {BYTE_OF[symbol] for symbol in symbols}
        opening, self.closing_ids = self._around_a_text()
        if len(opening) > 1:
            raise Error(f"{name} puts {len(opening)} tokens before a text: choose a tokenizer that puts one")
        self.bos_id = self.template_bos = opening[0] if opening else None
        self.add_bos = self.bos_id is not None

    def _around_a_text(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor puts before and after a text."""
        processor = self.tokenizer.post_processor
        definition = {} if processor is None else json.loads(processor.__getstate__())
        for step in definition.get("processors", [definition]):
            match step:
                case {"single": list(pieces), "special_tokens": tokens}:
                    text = next(i for i, piece in enumerate(pieces) if "Sequence" in piece)
                    return tuple(
                        tuple(i for piece in part for i in tokens[piece["SpecialToken"]["id"]]["ids"])
                        for part in (pieces[:text], pieces[text + 1 :])
                    )
                case {"cls": [_, int(first)], "sep": [_, int(last)]}:  # BERT's and RoBERTa's
                    return (first,), (last,)
        return (), ()

    def _check_model(self) -> None:
        kind = type(self.tokenizer.model).__name__
        if kind != "BPE":
            raise Error(
                f"{self.name} is a tokenizer of type {kind}: choose a model with BPE, such as GPT-2 or Llama"
            )

    def _check_decoder(self) -> bool:
        """Whether the decoder is byte-level. Raises ``Error`` if it is not SentencePiece's either."""
        decoder = self.tokenizer.decoder
        definition = None if decoder is None else json.loads(decoder.__getstate__())
        if definition is not None and definition["type"] == "ByteLevel":
            if not any(part["type"] == "ByteLevel" for part in self._parts):
                raise Error(f"{self.name} decodes bytes, but has no pre-tokenizer ByteLevel: add it")
            return True
        if definition in SENTENCEPIECE_DECODERS:
            model = self.tokenizer.model
            pieces = (model.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
            if model.unk_token is None and not (model.byte_fallback and None not in pieces):
                raise Error(
                    f"{self.name} has neither an unknown token nor byte fallback with all 256 bytes: add one "
                    "of them"
                )
            return False
        raise Error(
            f"{self.name} has an unsupported decoder ({definition}): choose a model with a byte-level or "
            "SentencePiece-like tokenizer"
        )

    @cached_property
    def _text_only(self) -> tokenizers.Tokenizer:
        copy = type(self.tokenizer).from_str(self.tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def encode_array(self, text: str, special: str = "refuse") -> np.ndarray:
        if special != "allow":
            return super().encode_array(text, special)
        # Not split at special tokens, as in the base class: some of them absorb adjacent spaces.
        check_text(text, special)
        return self._encode(self.tokenizer, text)

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """A copy that encodes special tokens as ordinary text, and adds no space in front of it."""
        definition = json.loads(self.tokenizer.to_str())
        for kind in ("normalizer", "pre_tokenizer"):
            definition[kind] = _without_prefix(definition[kind])
        copy = type(self.tokenizer).from_str(json.dumps(definition))
        copy.encode_special_tokens = True
        return copy

    @property
    def _parts(self) -> list[dict]:
        """The normalizers and pre-tokenizers, in order."""
        places = (self.tokenizer.normalizer, "normalizers"), (self.tokenizer.pre_tokenizer, "pretokenizers")
        states = [(json.loads(part.__getstate__()), key) for part, key in places if part is not None]
        return [part for state, key in states for part in flatten(state, key)]

    @cached_property
    def _prefix(self) -> str:
        """Where a space is added: "first" in a text, "always", also after an added token, or "never"."""
        parts = self._parts
        if any(part["type"] == "Prepend" or part.get("add_prefix_space") for part in parts):
            return "always"
        return next((part["prepend_scheme"] for part in parts if "prepend_scheme" in part), "never")

    def encode_around(self, text: str, found: list[re.Match], before: Sequence[int] = ()) -> np.ndarray:
        arrays, end, last = [], 0, before[-1] if len(before) else None
        for match in found:
            i = self.special_tokens[match[0]]
            part = text[end : match.start()]
            arrays.append(self._encode_after(last, part.rstrip() if self._added[i].lstrip else part))
            arrays.append(np.array([i], np.uint32))
            end, last = match.end(), i
        return np.concatenate([*arrays, self._encode_after(last, text[end:])])

    def _encode_after(self, last: int | None, text: str) -> np.ndarray:
        """The ids of ordinary text after the token ``last``, or at the beginning of a text."""
        if last in self._added and self._added[last].rstrip:  # it absorbs the spaces after it
            text = text.lstrip()
        if self._prefix == "never" or last is None or (self._prefix == "always" and last in self._added):
            named = any(name in text for name in self.special_tokens)
            ids = self._encode(self._text_only if named else self.tokenizer, text)
        else:
            ids = self._encode(self._continuing, text)
        unknown = self.special_tokens.get(self.tokenizer.model.unk_token)
        made = (set(self.special_tokens.values()) - {unknown}).intersection(ids.tolist())
        if made:
            token = self.tokenizer.id_to_token(min(made))
            raise Error(f"{self.name} cannot encode {token!r} as ordinary text: omit it")
        return ids

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
        with library_errors(f"{self.name} cannot encode this text"):
            # A batch of one: unlike encode(), it lets other threads run, and it computes no offsets.
            (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids = encoding.ids
        data = text.encode("utf-8")
        if not self._missing.isdisjoint(data) and self.decode_bytes(ids) != data:
            lost = next(c for c in text if not self._missing.isdisjoint(c.encode("utf-8")))
            raise Error(f"{self.name} has no token for character {lost!r} (U+{ord(lost):04X}): omit it")
        return np.array(ids, dtype=np.uint32)

    def with_special_tokens(self, names: Sequence[str]) -> TokenizersTokenizer:
        extended = super().with_special_tokens(names)
        for copied in ("_text_only", "_continuing"):
            extended.__dict__.pop(copied, None)
        extended.tokenizer = type(self.tokenizer).from_str(self.tokenizer.to_str())
        extended.tokenizer.add_special_tokens(list(names))
        for name in names:
            if extended.tokenizer.token_to_id(name) != extended.special_tokens[name]:
                raise Error(
                    f"{self.name} has unused ids, and {name!r} would get one of them: add it to the file"
                )
        extended._added = extended.tokenizer.get_added_tokens_decoder()
        return extended

    def with_file_tokens(self, tokens: Mapping[int, Mapping]) -> TokenizersTokenizer:
        new = {i: token for i, token in tokens.items() if not self._has(i, token)}
        if not new:
            return self
        library = require("tokenizers")
        tokenizer = library.Tokenizer.from_str(self.tokenizer.to_str())
        for i, token in sorted(new.items()):
            tokenizer.add_tokens([library.AddedToken(**token)])
            if tokenizer.token_to_id(token["content"]) != i:
                found = tokenizer.token_to_id(token["content"])
                raise Error(f"{self.name} gives the added token {token['content']!r} the id {found}, not {i}")
        # Read again: the object itself would still treat a token that is no longer special as one that is.
        return TokenizersTokenizer(self.name, library.Tokenizer.from_str(tokenizer.to_str()))

    def _has(self, i: int, token: Mapping) -> bool:
        """Whether it has an added token, with these properties unless only some are given."""
        known = self._added.get(i)
        if known is None or known.content != token["content"]:
            return False
        return not token.keys() >= {*FLAGS} or all(getattr(known, flag) == token[flag] for flag in FLAGS)

    def token_ids(self) -> set[int]:
        return self._ids

    def _is_token(self, name: str) -> bool:
        return self.tokenizer.token_to_id(name) is not None

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self._bytes_of(i) for i in check_sequence(ids, self.vocab_size))

    def _bytes_of(self, i: int) -> bytes:
        token = self.tokenizer.id_to_token(i)
        if token is None:
            raise Error(f"{self.name} has no token with id {i}: decode ids of this tokenizer only")
        if not self._byte_level:
            return piece_bytes(token)
        if not BYTE_OF.keys() >= set(token):  # plain text, not byte symbols
            return token.encode("utf-8")
        data = bytes(BYTE_OF[symbol] for symbol in token)
        # A single symbol is a byte's, unless the vocabulary lacks that byte.
        is_text = i in self._added and (len(data) > 1 or data[0] in self._missing)
        return token.encode("utf-8") if is_text else data

    def decode(self, ids) -> str:
        """The text of the ids: the result of ``decode_bytes`` as UTF-8, with one difference.

        SentencePiece adds a space at the beginning of a text, and ``decode`` removes it, as the library does.
        ``decode_bytes`` keeps it, so use that for ids that continue a text: `` is`` after ``It``.
        """
        if self._byte_level:  # the library takes the letters of an added token, such as é, for byte symbols
            return super().decode(ids)
        checked = check_sequence(ids, self.vocab_size)
        self.decode_bytes(checked)  # raises an error for an id without a token, which the library skips
        return self.tokenizer.decode(checked, skip_special_tokens=False)


def _without_prefix(component: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer of a tokenizer.json that adds no space in front of a text."""
    match component:
        case {"type": "Sequence"}:
            key = "normalizers" if "normalizers" in component else "pretokenizers"
            return component | {key: [*filter(None, map(_without_prefix, component[key]))]}
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return component | {"prepend_scheme": "never"}
        case {"add_prefix_space": _}:
            return component | {"add_prefix_space": False}
    return component


def read_tokenizer_json(file: Path) -> TokenizersTokenizer:
    """The tokenizer in a ``tokenizer.json``. Raises ``Error`` if it is damaged or unsupported.

    Added tokens that a config next to it names, such as ``eos_token``, are special whatever the file says.
    """
    library = require("tokenizers")
    definition = read_json(file)
    match definition:
        case {"model": {"vocab": dict(vocabulary)}}:
            _check_vocabulary(file, vocabulary)
    check_components(file, definition)
    if isinstance(definition.get("added_tokens"), list):
        named = named_tokens(file.parent)
        for token in definition["added_tokens"]:
            match token:
                case {"content": str(name)} if name in named:  # as in transformers
                    token["special"] = True
    definition |= {"truncation": None, "padding": None}
    with library_errors(f"{file} is not a complete tokenizer"):
        tokenizer = library.Tokenizer.from_str(json.dumps(definition))
    return TokenizersTokenizer(str(file), tokenizer)


def read_vocab_and_merges(file: Path) -> TokenizersTokenizer:
    """The tokenizer in GPT-2's pair of files: the ids of tokens in byte symbols, and the merges in order.

    Raises ``Error`` if one of them is missing or damaged, or if they are those of another class than GPT-2's
    and Qwen2's, because the files do not say how a text is split before its pieces are merged.
    """
    kind = tokenizer_class(file.parent)
    if kind not in SPLIT_AS:
        raise Error(
            f"{file.parent} has the files of a {kind}, but {VOCAB} and {MERGES} are read as those of "
            f"{' or '.join(SPLIT_AS)} only: save the tokenizer as {TOKENIZER_JSON} with transformers"
        )
    vocabulary = read_json(file.with_name(VOCAB))
    lines = read_text(file.with_name(MERGES)).split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line]
    _check_vocabulary(file.with_name(VOCAB), vocabulary)
    tokenizer = build_byte_level(file.with_name(VOCAB), vocabulary, merges, SPLIT_AS[kind])
    tokenizer.add_special_tokens([END_OF_TEXT] if END_OF_TEXT in vocabulary else [])
    return TokenizersTokenizer(str(file.parent), tokenizer)


def build_byte_level(source: Path, vocabulary: dict[str, int], merges: list[str], pre: str):
    """The library's byte-level BPE for a vocabulary in byte symbols and merges such as ``"Ġ t"``.

    ``pre``, a value of ``PRE_TOKENIZERS``, is llama.cpp's name of the pre-tokenizer, which splits a text.
    """
    library = require("tokenizers")
    split = library.pre_tokenizers
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for merge, pair in zip(merges, pairs):
        if len(pair) != 2:
            raise Error(f"{source} has a merge that is not a pair of tokens, {merge!r}: copy it again")
    with library_errors(f"{source} is not a complete BPE vocabulary"):
        # Llama 3 encodes a piece that is a token as that token, without applying merges.
        model = library.models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe")
    tokenizer = library.Tokenizer(model)
    gpt2_pieces = split.ByteLevel(add_prefix_space=False)
    llama3_pieces = split.Split(library.Regex(LLAMA3_PATTERN), "isolated")
    qwen_pieces = split.Split(library.Regex(LLAMA3_PATTERN.replace("{1,3}", "")), "isolated")  # single digits
    whole = split.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = {
        "gpt-2": gpt2_pieces,
        "smollm": split.Sequence([split.Digits(individual_digits=True), gpt2_pieces]),
        "llama-bpe": split.Sequence([llama3_pieces, whole]),
        "smaug-bpe": split.Sequence([llama3_pieces, whole]),
        "qwen2": split.Sequence([qwen_pieces, whole]),
    }[pre]
    if pre == "qwen2":  # as in its tokenizer.json; llama.cpp leaves it to the user
        tokenizer.normalizer = library.normalizers.NFC()
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _check_vocabulary(source: Path, vocabulary: dict) -> None:
    """Raise ``Error`` unless ids are distinct and not much larger than the number of tokens.

    The library allocates memory up to the largest id, and of two tokens with one id it would decode only one.
    """
    for token, i in vocabulary.items():
        if not is_integer(i) or not 0 <= i < len(vocabulary) + SPARE_IDS:
            raise Error(f"{source} gives the token {token!r} the id {i!r}: copy it again")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise Error(f"{source} gives two tokens the same id: copy it again")

"""How are other people's tokenizers read?

A published model brings its vocabulary in one of five shapes, told apart by what is inside the file:

- ``tokenizer.json``, Hugging Face's own description, or GPT-2's older ``vocab.json`` with ``merges.txt``;
- ``tokenizer.model`` as Llama 3 has it: one line per token, its bytes in base64 and its rank;
- ``tokenizer.model`` as Llama 2 has it: a SentencePiece model, with a score for every piece;
- a GGUF file, which holds either kind of vocabulary among its keys.

Each goes to the library that it was made with, so that the ids are the ones the model was trained on.
Two families hide behind the shapes, and they treat a space differently. Byte-level BPE (GPT-2, Llama 3,
SmolLM2) merges the bytes of the UTF-8 text: a space is a byte like the others. SentencePiece (Llama 2)
merges characters, writes a space as ``▁``, puts one in front of every text, and falls back to the bytes
``<0x00>`` … ``<0xFF>`` for a character that it has no piece for.

Nothing is added to a text: a model's first token, ``bos_id``, is the caller's to put in front.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllm.data import is_integer
from tinyllm.errors import Error
from tinyllm.gguf_file import MAGIC, GGUFFile
from tinyllm.reading import check_is_file, read_json, read_text
from tinyllm.tokenizer import (
    BYTE_ORDER,
    END_OF_TEXT,
    PRINTABLE,
    TiktokenTokenizer,
    Tokenizer,
    check_sequence,
    check_text,
)

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

TOKENIZER_JSON, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.model"
VOCAB, MERGES = "vocab.json", "merges.txt"

# Llama 3's pieces: contractions, words with the character before them, up to three digits, punctuation with
# the line ends after it, line ends, whitespace (github.com/meta-llama/llama3, llama/tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3's file holds no special tokens: they are the 256 ids after it, under the names that Llama 3.1 to 3.3
# have on the hub. (Llama 3.0 called 128004, 128008 and 128010 reserved, and used none of them.)
LLAMA3_SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *[f"<|reserved_special_token_{n}|>" for n in range(3, 248)],
]

BASE64_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
SYMBOLS = [chr(byte) for byte in PRINTABLE] + [chr(256 + n) for n in range(256 - len(PRINTABLE))]
BYTE_OF = dict(zip(SYMBOLS, BYTE_ORDER))

# How SentencePiece's pieces become text, in the library's words. Without the last step for a vocabulary that
# puts no space in front of a text.
_STEPS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]
SENTENCEPIECE_DECODERS = [{"type": "Sequence", "decoders": steps} for steps in (_STEPS, _STEPS[:3])]

# What a piece is, under the same numbers in SentencePiece's models and in a GGUF's tokenizer.ggml.token_type.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6

# Ids that a vocabulary may leave out; the library takes memory for each.
SPARE_IDS = 2**20

GGUF_PRE = ("gpt-2", "smollm", "llama-bpe")


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder, or in one of the files named above.

    Besides what every ``Tokenizer`` has, it knows from the files beside it (``tokenizer_config.json``,
    ``generation_config.json``, ``config.json``, ``chat_template.jinja``; or from the GGUF's keys)
    ``bos_id`` (the id that begins a text, or None), ``eos_ids`` (a tuple of the ids that end one, maybe
    empty) and ``chat_template`` (or None, see ``chat.py``). Where ``tokenizer_config.json`` names a bos
    token or says there is none, that counts; ids that end a text are gathered from all of them.

    Raises ``Error`` if nothing of the kind is there, the file is damaged or of a kind that would be read
    wrongly, or a package is not installed.
    """
    path = Path(path)
    file = _find_file(path) if path.is_dir() else path
    kind = _kind(file)
    if kind == "gguf":
        return _read_gguf(file)
    tokenizer = {
        "json": _read_tokenizer_json,
        "pair": _read_vocab_and_merges,
        "tiktoken": _read_llama3,
        "sentencepiece": _read_sentencepiece,
    }[kind](file)
    _describe(tokenizer, file.parent)
    return tokenizer


def _find_file(folder: Path) -> Path:
    for name in (TOKENIZER_JSON, TOKENIZER_MODEL, VOCAB):
        if (folder / name).exists():
            return folder / name
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) > 1:
        raise Error(f"{folder} holds {len(ggufs)} GGUF files: name the one to take, {ggufs[0].name}, say")
    if not ggufs:
        raise Error(
            f"{folder} holds no tokenizer ({TOKENIZER_JSON}, {TOKENIZER_MODEL}, {VOCAB} with {MERGES}, or a "
            ".gguf file): copy the model's one into it"
        )
    return ggufs[0]


def _kind(file: Path) -> str:
    """Which of the five shapes a file has, from its first line; only GPT-2's pair goes by its names."""
    if file.name in (VOCAB, MERGES):
        return "pair"
    try:
        check_is_file(file)
        with open(file, "rb") as opened:
            start = opened.readline(4096)
    except OSError as error:
        raise Error(f"{file} cannot be read ({error.strerror}): check the path") from error
    if start.startswith(MAGIC):
        return "gguf"
    if start.lstrip().startswith(b"{"):
        return "json"
    if BASE64_LINE.fullmatch(start):
        return "tiktoken"
    if start.startswith(b"\n"):  # the tag of ModelProto's first field, the pieces
        return "sentencepiece"
    raise Error(
        f"{file} is no tokenizer known here: give a {TOKENIZER_JSON}, Llama's {TOKENIZER_MODEL} or a GGUF"
    )


def _import(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise Error(f"this tokenizer needs the package {name}: pip install 'tinyllm[models]'") from error


@contextmanager
def _refusals(said: str) -> Iterator[None]:
    """What a library has against a file, as an ``Error`` that begins with what is ``said``."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:  # the libraries raise Exception itself, and a panic of Rust's is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        raise Error(f"{said} ({reason}): copy it again") from error


# ---------------------------------------------------------------------------- the library tokenizers


class TokenizersTokenizer(Tokenizer):
    """A byte-pair encoding that Hugging Face's library runs, byte-level or SentencePiece-like.

    ``tokenizer`` is the library's own object. Added tokens that it does not mark special (a run of
    spaces, ``<think>``) are part of the vocabulary: a text that says them gets their ids, here as there.
    The special ones are the library's, too, for ``special="allow"``; for ``"text"`` a second copy of it
    has ``encode_special_tokens`` set, which makes it read them as any other text.

    Raises ``Error`` if its model is no BPE, if its decoder is neither of the two named, or if it would
    drop characters that it does not know. Some byte-level vocabularies lack single bytes (SmolLM2's 21
    of them, U+0004 and the first byte of U+50000 among them): the library would leave these out without
    a word, and ``encode`` raises ``Error`` naming the character.
    """

    def __init__(self, name: str, tokenizer: tokenizers.Tokenizer):
        self.name = name
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self.special_tokens = {
            token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._check_model()
        self._byte_level = self._check_decoder()
        ordinary = tokenizer.get_vocab(with_added_tokens=False)
        self._missing = {
            byte for symbol, byte in BYTE_OF.items() if self._byte_level and symbol not in ordinary
        }

    def _check_model(self) -> None:
        kind = type(self.tokenizer.model).__name__
        if kind != "BPE":
            raise Error(
                f"{self.name} describes a tokenizer of type {kind}: only BPE is read, GPT's and Llama's"
            )

    def _check_decoder(self) -> bool:
        """Whether tokens are bytes in GPT-2's symbols; ``Error`` if they are not SentencePiece's either."""
        decoder = self.tokenizer.decoder
        definition = None if decoder is None else json.loads(decoder.__getstate__())
        if definition is not None and definition["type"] == "ByteLevel":
            return True
        if definition in SENTENCEPIECE_DECODERS:
            model = self.tokenizer.model
            if not model.byte_fallback and model.unk_token is None:
                raise Error(f"{self.name} has neither bytes nor a token for an unknown character: correct it")
            return False
        raise Error(
            f"{self.name} turns ids into text in a way not known here ({definition}): only byte-level and "
            "SentencePiece-like decoders are read"
        )

    @cached_property
    def _text_only(self) -> tokenizers.Tokenizer:
        copy = type(self.tokenizer).from_str(self.tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def encode_array(self, text: str, special: str = "refuse") -> np.ndarray:
        if special != "allow":
            return super().encode_array(text, special)
        # The base class would cut the text at special tokens; some take the spaces around them along.
        check_text(text, special)
        return self._encode(self.tokenizer, text)

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        named = any(name in text for name in self.special_tokens)
        ids = self._encode(self._text_only if named else self.tokenizer, text)
        forbidden = set(self.special_tokens.values()) - {
            self.special_tokens.get(self.tokenizer.model.unk_token)
        }
        made = forbidden.intersection(ids.tolist())
        if made:
            token = self.tokenizer.id_to_token(min(made))
            raise Error(f"{self.name} cannot encode {token!r} as ordinary text: leave it out")
        return ids

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        data = text.encode("utf-8")
        if not self._missing.isdisjoint(data) and self.decode_bytes(ids) != data:
            lost = next(c for c in text if not self._missing.isdisjoint(c.encode("utf-8")))
            raise Error(
                f"the vocabulary of {self.name} has no token for character {lost!r} (U+{ord(lost):04X}): "
                "leave it out"
            )
        return np.array(ids, dtype=np.uint32)

    def with_special_tokens(self, names: Sequence[str]) -> TokenizersTokenizer:
        extended = super().with_special_tokens(names)
        extended.__dict__.pop("_text_only", None)
        extended.tokenizer = type(self.tokenizer).from_str(self.tokenizer.to_str())
        extended.tokenizer.add_special_tokens(list(names))
        for name in names:
            if extended.tokenizer.token_to_id(name) != extended.special_tokens[name]:
                raise Error(f"{self.name} leaves ids out, and {name!r} would get one of them: add it there")
            extended._added = {**extended._added, extended.special_tokens[name]: name}
        return extended

    def _is_token(self, name: str) -> bool:
        return self.tokenizer.token_to_id(name) is not None

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self._bytes_of(i) for i in check_sequence(ids, self.vocab_size))

    def _bytes_of(self, i: int) -> bytes:
        token = self.tokenizer.id_to_token(i)
        if token is None:
            raise Error(f"{i} is no id of {self.name}, which leaves it out")
        if not self._byte_level:
            return _sentencepiece_bytes(token)
        if i in self._added or not BYTE_OF.keys() >= set(token):  # a token that is written as it reads
            return token.encode("utf-8")
        return bytes(BYTE_OF[symbol] for symbol in token)

    def decode(self, ids) -> str:
        """The text of the ids as the library makes it.

        It is ``decode_bytes`` read as UTF-8, with one difference: SentencePiece puts a space in front of
        a text, and ``decode`` takes one off again at the start. Ids that continue a text therefore go
        through ``decode_bytes``, which keeps it: `` is`` after ``It``.
        """
        checked = check_sequence(ids, self.vocab_size)
        self.decode_bytes(checked)  # the library would skip an id that it has no token for
        return self.tokenizer.decode(checked, skip_special_tokens=False)

    def to_json(self) -> dict:
        raise Error(f"tokenizer {self.name!r} is a published model's: copy its file instead of saving it")


def _sentencepiece_bytes(piece: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode("utf-8")


def _read_tokenizer_json(file: Path) -> TokenizersTokenizer:
    library = _import("tokenizers")
    definition = read_json(file)
    match definition:
        case {"model": {"vocab": dict(vocabulary)}}:
            _check_vocabulary(file, vocabulary)
    with _refusals(f"{file} is no complete tokenizer"):
        tokenizer = library.Tokenizer.from_str(json.dumps(definition))
    return TokenizersTokenizer(str(file), tokenizer)


def _check_vocabulary(source: Path, vocabulary: dict) -> None:
    """``Error`` unless every token has an id of its own, none far beyond their number.

    The library counts up to the largest, and two tokens of one id would share it in one direction only.
    """
    for token, i in vocabulary.items():
        if not is_integer(i) or not 0 <= i < len(vocabulary) + SPARE_IDS:
            raise Error(f"{source} gives the token {token!r} the id {i!r}: copy it again")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise Error(f"{source} gives two tokens the same id: copy it again")


def _read_vocab_and_merges(file: Path) -> TokenizersTokenizer:
    """GPT-2's pair: the ids of the tokens in the byte symbols, and the merges in their order."""
    vocabulary = read_json(file.with_name(VOCAB))
    merges_file = file.with_name(MERGES)
    lines = read_text(merges_file).split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line]
    _check_vocabulary(file.with_name(VOCAB), vocabulary)
    tokenizer = _build_byte_level(file.with_name(VOCAB), vocabulary, merges, "gpt-2")
    tokenizer.add_special_tokens([END_OF_TEXT] if END_OF_TEXT in vocabulary else [])
    return TokenizersTokenizer(str(file.parent), tokenizer)


def _build_byte_level(source: Path, vocabulary: dict[str, int], merges: list[str], pre: str):
    """A byte-level BPE in the library, from tokens in byte symbols and merges (``"Ġ t"``).

    ``pre`` says into which pieces a text is cut first, under llama.cpp's name for it.
    """
    library = _import("tokenizers")
    split = library.pre_tokenizers
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for merge, pair in zip(merges, pairs):
        if len(pair) != 2:
            raise Error(f"{source} has a merge that is no pair of tokens, {merge!r}: copy it again")
    with _refusals(f"{source} holds no complete BPE vocabulary"):
        # Llama 3 takes a piece that is a token as a whole, before any merge.
        model = library.models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe")
    tokenizer = library.Tokenizer(model)
    gpt2_pieces = split.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = {
        "gpt-2": gpt2_pieces,
        "smollm": split.Sequence([split.Digits(individual_digits=True), gpt2_pieces]),
        "llama-bpe": split.Sequence(
            [
                split.Split(library.Regex(LLAMA3_PATTERN), "isolated"),
                split.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }[pre]
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


# ---------------------------------------------------------------------------- Llama 3: tiktoken


def _read_llama3(file: Path) -> TiktokenTokenizer:
    import tiktoken

    ranks = _read_ranks(file)
    special_tokens = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
    )
    tokenizer = TiktokenTokenizer(str(file), encoding)
    tokenizer.bos_id = special_tokens["<|begin_of_text|>"]
    tokenizer.eos_ids = tuple(
        special_tokens[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    )
    return tokenizer


def _read_ranks(file: Path) -> dict[bytes, int]:
    """The rank of every token, 0 upwards; all 256 single bytes are there, or tiktoken would panic."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError as error:
            raise Error(f"{file} is damaged in line {number} ({error}): copy it again") from error
        if token in ranks or rank != len(ranks):
            raise Error(
                f"{file} is damaged: line {number} repeats a token or leaves out a rank, copy it again"
            )
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise Error(f"{file} has no token for the byte {missing[0]:#04x}: copy it again")
    return ranks


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
            _sentencepiece_bytes(piece)
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


def _read_sentencepiece(file: Path) -> SentencePieceTokenizer:
    return _load_sentencepiece(file, file.read_bytes())


def _load_sentencepiece(source: Path, model: bytes) -> SentencePieceTokenizer:
    library = _import("sentencepiece")
    with _refusals(f"{source} holds no complete SentencePiece model"):
        processor = library.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(str(source), processor)
    tokenizer.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
    tokenizer.eos_ids = (processor.eos_id(),) if processor.eos_id() >= 0 else ()
    return tokenizer


# ---------------------------------------------------------------------------- GGUF


def _read_gguf(file: Path) -> Tokenizer:
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
        tokenizer = _load_sentencepiece(file, _sentencepiece_model(file, metadata, tokens, types))
    else:
        raise Error(f"{file} has a vocabulary of the kind {model!r}: only 'gpt2' and 'llama' are read")
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom")}
    for key, i in ids.items():
        if i is not None and not (is_integer(i) and 0 <= i < len(tokens)):
            raise Error(f"{file} has {i!r} as tokenizer.ggml.{key}_token_id, which is no id: copy it again")
    tokenizer.bos_id = ids["bos"]
    tokenizer.eos_ids = _distinct([ids["eos"], ids["eot"], ids["eom"]])
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
    tokenizer = _build_byte_level(file, vocabulary, _gguf_list(file, metadata, "merges"), pre)
    library = _import("tokenizers")
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


# ---------------------------------------------------------------------------- the files beside


def _describe(tokenizer: Tokenizer, folder: Path) -> None:
    """Set ``bos_id``, ``eos_ids`` and ``chat_template`` from the folder, over what the vocabulary said."""
    said = {
        name: read_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    }
    own = said["tokenizer_config.json"]
    model = said["generation_config.json"] or said["config.json"]
    bos = _ids_of(tokenizer, [own.get("bos_token", model.get("bos_token_id"))], folder)
    eos = _ids_of(tokenizer, [own.get("eos_token"), *_as_list(model.get("eos_token_id"))], folder)
    if bos or "bos_token" in own:
        tokenizer.bos_id = bos[0] if bos else None
    tokenizer.eos_ids = eos or tokenizer.eos_ids
    tokenizer.chat_template = _chat_template(folder, own)


def _as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def _ids_of(tokenizer: Tokenizer, found: list, folder: Path) -> tuple[int, ...]:
    """The ids of tokens given as ids, as names, or as Hugging Face's dict with the name as ``content``."""
    ids = []
    for token in found:
        name = token.get("content") if isinstance(token, dict) else token
        i = tokenizer.special_tokens.get(name) if isinstance(name, str) else name
        if token is not None and not (is_integer(i) and 0 <= i < tokenizer.vocab_size):
            raise Error(
                f"a config in {folder} names the special token {token!r}, which {tokenizer.name} lacks"
            )
        ids.append(i)
    return _distinct(ids)


def _distinct(ids: list[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _chat_template(folder: Path, tokenizer_config: dict) -> str | None:
    """``chat_template.jinja`` counts before ``tokenizer_config.json``, and of several the default."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    match tokenizer_config.get("chat_template"):
        case None | str() as template:
            return template
        case list(templates):
            for entry in templates:
                match entry:
                    case {"name": "default", "template": str(template)}:
                        return template
    raise Error(
        f"the chat_template in {folder / 'tokenizer_config.json'} is no text: correct it or remove it"
    )

"""Byte-level BPE through tiktoken: GPT-2's vocabulary and Llama 3's."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllm.errors import Error
from tinyllm.tokenizers.base import END_OF_TEXT, Tokenizer, check_sequence

if TYPE_CHECKING:
    import regex
    import tiktoken

GPT2_VOCABULARY = Path(__file__).parents[1] / "assets" / "vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# GPT-2 splits a text into these pieces first (contractions, words with the space before them, numbers,
# punctuation, whitespace) and merges only inside a piece. The original ends in ` ?\p{L}+ … \s+(?!\S)|\s+`;
# this makes the same pieces with less backtracking, as in tiktoken_ext/openai_public.py.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# GPT-2's vocabulary file is text, so a byte stands there as a visible symbol: itself if it is printable,
# otherwise the next character from U+0100 on (a space is Ġ). Bytes have their ids in this order too.
PRINTABLE = b"".join(bytes(range(ord(a), ord(z) + 1)) for a, z in ("!~", "¡¬", "®ÿ"))
BYTE_ORDER = PRINTABLE + bytes(byte for byte in range(256) if byte not in PRINTABLE)
SYMBOLS = [chr(byte) for byte in PRINTABLE] + [chr(256 + n) for n in range(256 - len(PRINTABLE))]
BYTE_OF = dict(zip(SYMBOLS, BYTE_ORDER))

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
BASE64_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")  # a token and its rank


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding that tiktoken runs: ids of merged byte sequences, any text can be encoded.

    ``encoding`` is tiktoken's own object, for everything else it can do.
    """

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name = name
        self.vocab_size = encoding.n_vocab
        self.encoding = encoding
        ids = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
        self.special_tokens = dict(sorted(ids.items(), key=lambda item: item[1]))

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        try:
            # Not encode_ordinary: what is a ValueError here is a panic there.
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:
            problem = f"the text cannot be tokenized ({error})"
            raise Error(f"{problem}: shorten its longest run of whitespace") from None

    def with_special_tokens(self, names: Sequence[str]) -> TiktokenTokenizer:
        import tiktoken

        extended = super().with_special_tokens(names)
        extended.encoding = tiktoken.Encoding(  # extended as tiktoken's README does it
            self.encoding.name,
            pat_str=self.encoding._pat_str,
            mergeable_ranks=self.encoding._mergeable_ranks,
            special_tokens=extended.special_tokens,
        )
        return extended

    def _is_token(self, name: str) -> bool:
        try:
            self.encoding.encode_single_token(name)
        except KeyError:
            return False
        return True

    def decode_bytes(self, ids) -> bytes:
        checked = check_sequence(ids, self.vocab_size)
        try:
            return self.encoding.decode_bytes(checked)
        except KeyError as error:  # some vocabularies of tiktoken's leave ids out
            raise Error(f"{error.args[0]}: tokenizer {self.name!r} leaves that id out") from None

    def to_json(self) -> dict:
        if self.name != "gpt2":
            return super().to_json()
        return {"kind": "gpt2", "added_tokens": list(self.added_tokens)}


def gpt2() -> TiktokenTokenizer:
    """GPT-2's tokenizer, 50,257 ids, from the vocabulary inside this package; nothing is downloaded.

    The ids: 256 single bytes, then one per merge in the order they were learned (a lower id merges
    first), then ``<|endoftext|>``. Radford et al. 2019; the file is OpenAI's.
    """
    import tiktoken

    ranks = _gpt2_ranks()
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=50257,
    )
    return TiktokenTokenizer("gpt2", encoding)


def _gpt2_ranks() -> dict[bytes, int]:
    data = GPT2_VOCABULARY.read_bytes()
    if hashlib.sha256(data).hexdigest() != GPT2_SHA256:
        raise Error(f"{str(GPT2_VOCABULARY)!r} is damaged (its SHA-256 is not GPT-2's): reinstall tinyllm")
    ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_ORDER)}
    for line in data.decode("utf-8").split("\n")[1:-1]:  # after "#version", to the last line's end
        left, right = line.split(" ")
        ranks[bytes(BYTE_OF[symbol] for symbol in left + right)] = len(ranks)
    return ranks


def read_llama3(file: Path) -> TiktokenTokenizer:
    """Llama 3's tokenizer, from a ``tokenizer.model`` of tokens in base64 and their ranks."""
    import tiktoken

    ranks = _read_ranks(file)
    special_tokens = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
    )
    tokenizer = TiktokenTokenizer(str(file), encoding)
    tokenizer.bos_id = special_tokens["<|begin_of_text|>"]
    ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    tokenizer.eos_ids = tuple(special_tokens[name] for name in ends)
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
            raise Error(f"{file} is damaged (line {number} repeats a token or skips a rank): copy it again")
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise Error(f"{file} has no token for the byte {missing[0]:#04x}: copy it again")
    return ranks


def check_pattern(pattern: str) -> regex.Pattern:
    """The pattern, compiled; ``Error`` if it is not a regular expression or matches the empty text."""
    import regex  # unlike re, it knows \p{L} and \p{N}; tiktoken imports it too

    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise Error(f"pattern {pattern!r} is not a regular expression ({error}): correct it") from None
    if compiled.match(""):  # tiktoken would panic
        raise Error(f"pattern {pattern!r} matches the empty text: make it match at least one character")
    return compiled

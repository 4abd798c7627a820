"""Byte-level BPE with tiktoken: the vocabularies of GPT-2 and Llama 3."""

from __future__ import annotations

import base64
import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinyllm.errors import Error
from tinyllm.files import read_file
from tinyllm.tokenizers.base import END_OF_TEXT, Tokenizer, check_sequence

if TYPE_CHECKING:
    import regex
    import tiktoken

GPT2_VOCABULARY = Path(__file__).parents[1] / "assets" / "vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# GPT-2 first splits a text into these pieces (contractions, words with the preceding space, numbers,
# punctuation, whitespace) and merges only inside a piece. The original ends in ` ?\p{L}+ … \s+(?!\S)|\s+`;
# this equivalent, from tiktoken_ext/openai_public.py, backtracks less.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# GPT-2's vocabulary file is text, so it writes each byte as a visible symbol: as itself if it is printable,
# otherwise as the next character from U+0100 on (a space is Ġ). The ids of the bytes are in this order too.
PRINTABLE = b"".join(bytes(range(ord(a), ord(z) + 1)) for a, z in ("!~", "¡¬", "®ÿ"))
BYTE_ORDER = PRINTABLE + bytes(byte for byte in range(256) if byte not in PRINTABLE)
SYMBOLS = [chr(byte) for byte in PRINTABLE] + [chr(256 + n) for n in range(256 - len(PRINTABLE))]
BYTE_OF = dict(zip(SYMBOLS, BYTE_ORDER))

# Llama 3's pieces: contractions, words with the preceding character, up to three digits, punctuation with
# the following line breaks, line breaks, whitespace (github.com/meta-llama/llama3, llama/tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3's file has no special tokens: they are the next 256 ids, with the names used on the hub by Llama 3.1
# to 3.3. (In Llama 3.0, 128004, 128008 and 128010 are reserved and unused.)
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
    """A byte-level byte-pair encoding run by tiktoken. Any text can be encoded.

    ``encoding`` is tiktoken's own object, for its other methods.
    """

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name = name
        self.vocab_size = encoding.n_vocab
        self.encoding = encoding
        ids = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
        self.special_tokens = dict(sorted(ids.items(), key=lambda item: item[1]))

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        try:
            # Not encode_ordinary, which panics instead of raising ValueError.
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:
            raise Error(
                f"the text cannot be tokenized ({error}): shorten its longest run of whitespace"
            ) from None

    def merged_pairs(self) -> np.ndarray:
        ranks, pairs = self.encoding._mergeable_ranks, super().merged_pairs()
        for left, right in merges_of(ranks):
            pairs[ranks[left + right]] = ranks[left], ranks[right]
        return pairs

    def with_special_tokens(self, names: Sequence[str]) -> TiktokenTokenizer:
        extended = super().with_special_tokens(names)
        extended.encoding = self._encoding_with(extended.special_tokens)
        return extended

    def with_file_tokens(self, tokens: Mapping[int, Mapping]) -> TiktokenTokenizer:
        """See ``Tokenizer``; the tokens may rename special tokens, and all of them are special."""
        names = {token["content"]: i for i, token in tokens.items()}
        for name, i in names.items():
            if i < len(self.encoding._mergeable_ranks):
                raise Error(f"{self.name} already has a token with the id {i}: correct that of {name!r}")
        kept = {name: i for name, i in self.special_tokens.items() if i not in tokens}
        extended = copy.copy(self)
        extended.special_tokens = dict(sorted((kept | names).items(), key=lambda item: item[1]))
        extended.encoding = self._encoding_with(extended.special_tokens)
        extended.vocab_size = extended.encoding.n_vocab
        return extended

    def token_ids(self) -> set[int]:
        return {*self.encoding._mergeable_ranks.values(), *self.special_tokens.values()}

    def _encoding_with(self, special_tokens: dict[str, int]) -> tiktoken.Encoding:
        import tiktoken

        return tiktoken.Encoding(  # extended as tiktoken's README does it
            self.encoding.name,
            pat_str=self.encoding._pat_str,
            mergeable_ranks=self.encoding._mergeable_ranks,
            special_tokens=special_tokens,
        )

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
        except KeyError as error:  # some of tiktoken's vocabularies have unused ids
            raise Error(f"{error.args[0]}: tokenizer {self.name!r} has no token with that id") from None

    def to_json(self) -> dict:
        if self.name != "gpt2":
            return super().to_json()
        return {"kind": "gpt2", "added_tokens": list(self.added_tokens)}


def gpt2() -> TiktokenTokenizer:
    """GPT-2's tokenizer, 50,257 ids, from the vocabulary file in this package; nothing is downloaded.

    The ids are 256 single bytes, one id per merge in the order they were learned (lower ids are merged
    first), and ``<|endoftext|>``. Radford et al. 2019; the file is OpenAI's. Raises ``Error`` if it is
    damaged.
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
        raise Error(f"{str(GPT2_VOCABULARY)!r} is damaged (wrong SHA-256): reinstall tinyllm-numpy")
    ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_ORDER)}
    for line in data.decode("utf-8").split("\n")[1:-1]:  # without "#version" and the empty last line
        left, right = line.split(" ")
        ranks[bytes(BYTE_OF[symbol] for symbol in left + right)] = len(ranks)
    return ranks


def read_llama3(file: Path) -> TiktokenTokenizer:
    """Llama 3's tokenizer, from a ``tokenizer.model`` with a token in base64 and its rank on each line.

    Raises ``Error`` if the file is damaged.
    """
    import tiktoken

    ranks = _read_ranks(file)
    special_tokens = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
    )
    tokenizer = TiktokenTokenizer(str(file), encoding)
    tokenizer.bos_id, tokenizer.add_bos = special_tokens["<|begin_of_text|>"], True
    ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    tokenizer.eos_ids = tuple(special_tokens[name] for name in ends)
    return tokenizer


def _read_ranks(file: Path) -> dict[bytes, int]:
    """The rank of every token, from 0 on. Checks for all 256 single bytes: tiktoken panics without them."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(file).splitlines(), start=1):
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
    """Compile the pattern. Raises ``Error`` if it is not a regular expression or matches the empty string."""
    import regex  # unlike re, it supports \p{L} and \p{N}; tiktoken depends on it

    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise Error(f"pattern {pattern!r} is not a regular expression ({error}): correct it") from None
    if compiled.match(""):  # tiktoken would panic
        raise Error(f"pattern {pattern!r} matches the empty string: make it match at least one character")
    return compiled


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of a vocabulary of ranks, in order: the two tokens that each longer token is made from.

    tiktoken joins the two adjacent parts whose concatenation has the lowest rank, until none is a token. A
    token's own bytes, joined by tokens of lower ranks only, end as the two parts of its merge; a token that
    no merge reaches ends as more.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            lowest = min(joined)
            if lowest >= rank:
                break
            i = joined.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges

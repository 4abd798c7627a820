"""How is a byte-pair vocabulary trained?

Initially every byte is a token. Then, until the vocabulary is large enough:

    count the pairs of adjacent tokens
    make the most frequent pair a new token, and replace every occurrence of the pair by it

Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", arXiv 1508.07909,
section 3.2. Tokens consist of bytes, so that any text can be encoded, and pairs are merged only inside the
pieces into which a pattern splits the text (words with the preceding space, numbers, punctuation), so that no
token spans two words (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, 2.2).

Recounting all pairs after each merge would process the whole text thousands of times. Three optimisations
give the same merges much faster:

1. Most pieces of a text are repeated. Each distinct piece is stored once, with its number of occurrences.
2. A merge changes counts only in the pieces that contain its pair; an index from pairs to pieces finds them.
3. A heap has the most frequent pair on top. When a count changes, a new entry is pushed and the old one
   stays; outdated entries are discarded when they reach the top.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from tinyllm.errors import Error
from tinyllm.tokenizers.base import END_OF_TEXT, check_text
from tinyllm.tokenizers.tiktoken import BYTE_ORDER, GPT2_PATTERN, TiktokenTokenizer, check_pattern

MAX_BYTES = 8 * 2**20  # total length of all tokens; 50,000 merges of English text have 0.3 MB


def train_bpe(
    text: str | Iterable[str], vocab_size: int, pattern: str = GPT2_PATTERN
) -> list[tuple[int, int]]:
    """Learn the merges of a text, in order: id 256 + i is the concatenation of the two ids ``merges[i]``.

    ``text`` is one str or an iterable of documents, which is consumed once. No piece spans two documents. An
    ``<|endoftext|>`` in a text also separates documents, and is not counted.

    Ids 0 to 255 are the bytes in GPT-2's order (``BYTE_ORDER``), followed by one id per merge and
    ``<|endoftext|>``. So there are ``vocab_size`` - 257 merges. ``BPETokenizer(merges)`` is the tokenizer.

    Of equally frequent pairs, the one with the smaller ids (compared as tuples) is merged first. This is the
    rule of the ``tokenizers`` package, so the merges equal its merges with ``min_frequency=2``. In a run
    ``aaa`` the pair ``aa`` is counted twice, although only one of the two can be merged.

    Raises ``Error`` if ``vocab_size`` is below 257, if the pattern is invalid or does not cover the text, or
    if the text has too few merges: a pair must occur at least twice.
    """
    from tqdm import tqdm

    if type(vocab_size) is not int or vocab_size < 257:
        raise Error(f"vocab_size is {vocab_size!r}: choose at least 257, the 256 bytes and {END_OF_TEXT}")
    one_text = isinstance(text, str | bytes) or not isinstance(text, Iterable)
    piece_counts = _count_pieces([text] if one_text else text, pattern)
    pieces = [[BYTE_ORDER.index(byte) for byte in piece.encode("utf-8")] for piece in piece_counts]
    counts = list(piece_counts.values())

    pair_counts = Counter()
    pieces_with = defaultdict(set)  # pair -> indices of the pieces that contain it, or once did
    for i, piece in enumerate(pieces):
        for pair in pairwise(piece):
            pair_counts[pair] += counts[i]
            pieces_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]  # heapq's top is the smallest
    heapq.heapify(heap)

    merges = []
    for new_id in tqdm(range(256, vocab_size - 1), desc="merges", delay=2, leave=False):
        best = _pop_most_frequent(heap, pair_counts)
        if pair_counts[best] < 2:
            raise Error(
                f"vocab_size is {vocab_size}, but the text has only {len(merges)} merges (a pair must occur "
                f"at least twice): choose a vocab_size of at most {257 + len(merges)}, or give a longer text"
            )
        merges.append(best)

        change = Counter()  # the change of the pair counts, in the few pieces that contain the pair
        for i in pieces_with.pop(best):
            for pair in pairwise(pieces[i]):
                change[pair] -= counts[i]
            pieces[i] = merge_pair(pieces[i], best, new_id)
            for pair in pairwise(pieces[i]):
                change[pair] += counts[i]
                pieces_with[pair].add(i)
        for pair, difference in change.items():
            if difference != 0:
                pair_counts[pair] += difference
                heapq.heappush(heap, (-pair_counts[pair], pair))
    return merges


class BPETokenizer(TiktokenTokenizer):
    """A byte-level byte-pair encoding, from the merges that ``train_bpe`` learned.

    Ids 0 to 255 are the bytes in ``BYTE_ORDER``, id 256 + i is the concatenation of the two ids
    ``merges[i]``, then come ``<|endoftext|>`` and any special tokens added later. Merges are applied inside
    the pieces into which ``pattern`` splits a text. Raises ``Error`` naming a merge that is not a pair of
    earlier ids or gives an existing token, or an invalid pattern; ``encode`` raises ``Error`` if the pattern
    does not cover the text. Without merges every byte is a token: it is named ``bytes``.
    """

    def __init__(self, merges: list[tuple[int, int]], pattern: str = GPT2_PATTERN):
        import tiktoken

        check_pattern(pattern)
        ranks = _bpe_ranks(merges)
        name = f"bpe:{len(ranks) + 1}" if merges else "bytes"
        try:
            encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
            )
        except ValueError as error:
            raise Error(f"pattern {pattern!r} is not valid in tiktoken ({error}): correct it") from None
        super().__init__(name, encoding)
        self.merges = [tuple(pair) for pair in merges]
        self.pattern = pattern

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        ids = super()._encode_ordinary(text, start)
        if self.encoding.decode_bytes(ids) != text.encode("utf-8"):  # tiktoken skips what does not match
            raise Error(f"pattern {self.pattern!r} skips a part of the text: train with another pattern")
        return ids

    def to_json(self) -> dict:
        merges, added = [list(pair) for pair in self.merges], list(self.added_tokens)
        return {"kind": "bpe", "pattern": self.pattern, "merges": merges, "added_tokens": added}


def merge_pair(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """The ids with every occurrence of the pair, from left to right, replaced by ``new_id``."""
    merged = []
    i = 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def parse_bpe(spec: str) -> int:
    """The vocabulary size in ``"bpe:VOCAB"``, as on the command line. Raises ``Error`` for anything else."""
    match = re.fullmatch("bpe:([0-9]{1,9})", spec)
    if match is None:
        raise Error(
            f"tokenizer {spec!r} is not of the form bpe:VOCAB: give the vocabulary size, as in bpe:2048"
        )
    return int(match[1])


def _count_pieces(texts: Iterable[str], pattern: str) -> Counter[str]:
    """The number of occurrences of each piece in all documents. Merges never cross a piece boundary."""
    compiled = check_pattern(pattern)
    pieces = Counter()
    for text in texts:
        check_text(text)
        for document in text.split(END_OF_TEXT):
            end = 0
            for match in compiled.finditer(document):
                if match.start() != end or match.end() == end:
                    break
                pieces[match[0]] += 1
                end = match.end()
            if end != len(document):
                raise Error(
                    f"pattern {pattern!r} skips {document[end : end + 20]!r}: correct it so that its matches "
                    "cover any text"
                )
    return pieces


def _pop_most_frequent(heap: list, pair_counts: Counter) -> tuple[int, int] | None:
    """Remove and return the most frequent pair; ``None`` (whose count is 0) if there is none."""
    while heap:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count == pair_counts[pair]:
            return pair
    return None


def _bpe_ranks(merges: list[tuple[int, int]]) -> dict[bytes, int]:
    tokens, num_bytes = [bytes([byte]) for byte in BYTE_ORDER], 0
    ranks = {token: i for i, token in enumerate(tokens)}
    for i, pair in enumerate(merges):
        if not _is_pair(pair, len(tokens)):
            raise Error(f"merges[{i}] is {pair!r}: give two ids from 0 to {len(tokens) - 1}")
        token = tokens[pair[0]] + tokens[pair[1]]
        if token in ranks:
            raise Error(f"merges[{i}] gives {token!r}, which is already id {ranks[token]}: remove it")
        num_bytes += len(token)
        if num_bytes > MAX_BYTES:  # each merge can double the longest token
            raise Error(f"the tokens up to merges[{i}] have more than {MAX_BYTES:,} bytes: give fewer merges")
        ranks[token] = len(tokens)
        tokens.append(token)
    return ranks


def _is_pair(value, num_ids: int) -> bool:
    is_two = isinstance(value, list | tuple) and len(value) == 2
    return is_two and all(type(i) is int and 0 <= i < num_ids for i in value)

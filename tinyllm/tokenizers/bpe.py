"""How is a byte-pair vocabulary trained?

Every byte is a token at first. Then, until there are enough tokens:

    count each pair of neighbouring tokens
    make one new token of the most frequent pair, and put it wherever that pair stands

Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", arXiv 1508.07909,
section 3.2. On bytes, so that every text can be written, and only inside the pieces a pattern cuts (words
with the space before them, numbers, punctuation), so that no token joins a word to the next: Radford et
al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2.

Counting anew for each merge would read the whole text thousands of times. Three things make it quick,
and the merges stay the same:

1. A text repeats its pieces. Each distinct piece is kept once, with how often it occurs.
2. A merge changes the counts only in the pieces that hold its pair; we remember which these are.
3. The most frequent pair is on top of a heap. When a count changes, a new entry goes in and the old one
   stays; an entry whose count is no longer true is thrown away when it comes to the top.
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

MAX_BYTES = 8 * 2**20  # of all tokens together; 50,000 merges of English make 0.3 MB


def train_bpe(
    text: str | Iterable[str], vocab_size: int, pattern: str = GPT2_PATTERN
) -> list[tuple[int, int]]:
    """The merges a text teaches, in the order learned: ``merges[i]`` are the two ids that id 256 + i joins.

    ``text`` is one str, or an iterable of documents, which is gone through once; no piece reaches from
    one document into the next. An ``<|endoftext|>`` in a text stands between documents too, and is not
    counted.

    The ids of the vocabulary: 0 to 255 are the bytes in GPT-2's order (``BYTE_ORDER``), then one per
    merge, then ``<|endoftext|>``; so there are ``vocab_size`` - 257 merges. ``BPETokenizer(merges)``
    is the tokenizer.

    Of pairs that are equally frequent the one with the smaller ids comes first (the first ids compared
    first): the rule of the ``tokenizers`` package, so these are its merges with ``min_frequency=2``. In
    a run ``aaa`` the pair ``aa`` counts twice, though only the first two become a token.

    Raises ``Error`` if ``vocab_size`` is below 257, if the pattern does not work or leaves a part of the
    text out, or if so many merges cannot be learned: a pair must occur at least twice.
    """
    from tqdm import tqdm

    if type(vocab_size) is not int or vocab_size < 257:
        raise Error(f"vocab_size is {vocab_size!r}: the least is 257, the 256 bytes and {END_OF_TEXT}")
    one_text = isinstance(text, str | bytes) or not isinstance(text, Iterable)
    piece_counts = _count_pieces([text] if one_text else text, pattern)
    pieces = [[BYTE_ORDER.index(byte) for byte in piece.encode("utf-8")] for piece in piece_counts]
    counts = list(piece_counts.values())

    pair_counts = Counter()
    pieces_with = defaultdict(set)  # pair -> indices of the pieces that hold it, or did once
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
                f"vocab_size is {vocab_size}, but the text teaches only {len(merges)} merges (a pair must "
                f"occur at least twice): ask for at most {257 + len(merges)}, or give a longer text"
            )
        merges.append(best)

        change = Counter()  # of the pair counts, in the few pieces that hold the pair
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
    """A byte-level byte-pair encoding of our own, from the merges that ``train_bpe`` learned.

    Ids 0 to 255 are the bytes in ``BYTE_ORDER``, id 256 + i joins the two ids of ``merges[i]``,
    ``<|endoftext|>`` comes next, and special tokens added later come after it. Merges apply inside the
    pieces that ``pattern`` cuts. Raises ``Error`` naming a merge that is not a pair of earlier ids or makes
    a token that is there already, or a pattern that does not work; ``encode`` does for a text of which
    the pattern leaves a part out.
    """

    def __init__(self, merges: list[tuple[int, int]], pattern: str = GPT2_PATTERN):
        import tiktoken

        check_pattern(pattern)
        ranks = _bpe_ranks(merges)
        name = f"bpe:{len(ranks) + 1}"
        try:
            encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
            )
        except ValueError as error:
            raise Error(f"pattern {pattern!r} means nothing to tiktoken: {error}") from None
        super().__init__(name, encoding)
        self.merges = [tuple(pair) for pair in merges]
        self.pattern = pattern

    def _encode_ordinary(self, text: str, start: int) -> np.ndarray:
        ids = super()._encode_ordinary(text, start)
        if self.encoding.decode_bytes(ids) != text.encode("utf-8"):  # tiktoken skips what does not match
            raise Error(f"pattern {self.pattern!r} leaves out a part of the text: train with another one")
        return ids

    def to_json(self) -> dict:
        merges, added = [list(pair) for pair in self.merges], list(self.added_tokens)
        return {"kind": "bpe", "pattern": self.pattern, "merges": merges, "added_tokens": added}


def merge_pair(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """The ids with ``new_id`` wherever the pair stands, from left to right."""
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
    """The vocabulary size in ``"bpe:VOCAB"``, as on the command line; ``Error`` if it is not that."""
    match = re.fullmatch("bpe:([0-9]{1,9})", spec)
    if match is None:
        raise Error(f"tokenizer {spec!r} is not bpe:VOCAB: write the number of ids, such as bpe:2048")
    return int(match[1])


def _count_pieces(texts: Iterable[str], pattern: str) -> Counter[str]:
    """How often each piece occurs, over all documents; no merge crosses a piece's end."""
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
                    f"pattern {pattern!r} leaves out {document[end : end + 20]!r}: it must cut every text "
                    "into pieces and lose nothing"
                )
    return pieces


def _pop_most_frequent(heap: list, pair_counts: Counter) -> tuple[int, int] | None:
    """The most frequent pair, its entry taken off the heap; ``None`` (which counts 0) if there is none."""
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
            raise Error(f"merges[{i}] is {pair!r}: it must be two ids from 0 to {len(tokens) - 1}")
        token = tokens[pair[0]] + tokens[pair[1]]
        if token in ranks:
            raise Error(f"merges[{i}] makes {token!r}, which is id {ranks[token]} already: remove it")
        num_bytes += len(token)
        if num_bytes > MAX_BYTES:  # each merge can double the longest token
            raise Error(f"merges[{i}] makes more than {MAX_BYTES:,} bytes of tokens: omit it")
        ranks[token] = len(tokens)
        tokens.append(token)
    return ranks


def _is_pair(value, num_ids: int) -> bool:
    is_two = isinstance(value, list | tuple) and len(value) == 2
    return is_two and all(type(i) is int and 0 <= i < num_ids for i in value)

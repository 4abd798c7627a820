"""A solution of exercise 17, byte-pair encoding."""

from collections import Counter
from itertools import pairwise


def most_frequent_pair(pieces):
    counts = Counter(pair for piece in pieces for pair in pairwise(piece))
    return min(counts, key=lambda pair: (-counts[pair], pair), default=None)


def merge(piece, pair, new_id):
    merged, i = [], 0
    while i < len(piece):
        if tuple(piece[i : i + 2]) == tuple(pair):
            merged.append(new_id)
            i += 2
        else:
            merged.append(piece[i])
            i += 1
    return merged

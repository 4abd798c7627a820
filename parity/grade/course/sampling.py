"""Exercises on choosing the next token, and on merging tokens."""

from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from hypothesis import strategies as st

from parity.grade.course.losses import softmax
from parity.grade.exercise import Mistake, Part, exercise, sizes

# --------------------------------------------------------------------------------------- top-k


@st.composite
def top_k_inputs(draw):
    """Few different logits, so that some are equal."""
    size = draw(sizes(2, 6))
    logits = np.array(draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))) / 2.0
    return {
        "logits": logits,
        "k": draw(st.integers(1, size)),
        "temperature": draw(st.sampled_from([1.0, 0.5, 2.0])),
    }


def torch_top_k(logits, k, temperature):
    """k largest logits, of equal ones those with the smallest ids."""
    order = torch.sort(torch.tensor(logits), descending=True, stable=True).indices[:k].numpy()
    return kept_alone(logits / temperature, order)


def kept_alone(scores, kept):
    p = np.zeros(len(scores))
    p[kept] = softmax(scores[kept][None])[0]
    return p


def by_threshold(logits, k, temperature):
    return kept_alone(logits / temperature, np.flatnonzero(logits >= np.sort(logits)[-k]))


def last_of_ties(logits, k, temperature):
    return kept_alone(logits / temperature, np.argsort(logits, kind="stable")[::-1][:k])


exercise(
    "top_k",
    Part(
        "top_k_probabilities",
        ("p",),
        top_k_inputs(),
        torch_top_k,
        (
            Mistake(
                "ties kept",
                "If several logits equal the k-th largest, you keep them all: keep exactly k, of equal ones "
                "those with the smallest ids.",
                by_threshold,
            ),
            Mistake(
                "the last of equal logits",
                "Of equal logits keep the smallest ids; a reversed ascending sort keeps the largest.",
                last_of_ties,
            ),
            Mistake(
                "not renormalised",
                "The kept probabilities must sum to 1: take the softmax of the kept logits, or divide again.",
                lambda logits, k, temperature: np.where(
                    torch_top_k(logits, k, temperature) > 0, softmax((logits / temperature)[None])[0], 0.0
                ),
            ),
            Mistake(
                "multiplied by the temperature",
                "Divide by the temperature: above 1 it makes the distribution flatter.",
                lambda logits, k, temperature: torch_top_k(logits, k, 1 / temperature),
            ),
            Mistake(
                "no temperature",
                "temperature does not affect your result: divide the logits by it.",
                lambda logits, k, temperature: torch_top_k(logits, k, 1.0),
            ),
            Mistake(
                "the k smallest",
                "Keep the k largest logits, not the smallest.",
                lambda logits, k, temperature: kept_alone(
                    logits / temperature, np.argsort(logits, kind="stable")[:k]
                ),
            ),
        ),
    ),
)

# --------------------------------------------------------------------------------------- top-p


@st.composite
def top_p_inputs(draw):
    """Distinct logits: the order is beyond doubt; the bound is not near a sum of probabilities."""
    size = draw(sizes(2, 6))
    logits = np.array(draw(st.permutations(range(size)))) / 2.0
    p = draw(st.sampled_from([0.13, 0.37, 0.61, 0.89, 1.0]))
    return {"logits": logits, "top_p": p}


def nucleus(logits, top_p, renormalised=True, ascending=False):
    p = softmax(logits[None])[0]
    order = np.argsort(p if ascending else -p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    kept = np.zeros(len(p))
    kept[order] = np.where(before < top_p, p[order], 0.0)
    return kept / kept.sum() if renormalised else kept


def without_crossing(logits, top_p):
    """Only while the sum is at most top_p: nan if that is no token."""
    if top_p == 1.0:
        raise ValueError("rounding decides whether the sum of all exceeds 1")
    p = softmax(logits[None])[0]
    order = np.argsort(-p)
    kept = np.zeros(len(p))
    kept[order] = np.where(np.cumsum(p[order]) <= top_p, p[order], 0.0)
    return kept / kept.sum()


def each_above(logits, top_p):
    """nan if no probability is."""
    p = softmax(logits[None])[0]
    return np.where(p >= top_p, p, 0.0) / p[p >= top_p].sum()


def torch_nucleus(logits, top_p):
    p, order = torch.softmax(torch.tensor(logits), 0).sort(descending=True)
    p[p.cumsum(0) - p >= top_p] = 0
    return torch.zeros_like(p).scatter(0, order, p / p.sum()).numpy()


exercise(
    "top_p",
    Part(
        "top_p_probabilities",
        ("p",),
        top_p_inputs(),
        torch_nucleus,
        (
            Mistake(
                "the token that crosses top_p is dropped",
                "Keep the token with which the sum reaches top_p, too: otherwise nothing may be left.",
                without_crossing,
            ),
            Mistake(
                "not renormalised",
                "The kept probabilities must sum to 1: divide by their sum.",
                lambda **given: nucleus(**given, renormalised=False),
            ),
            Mistake(
                "the least likely first",
                "Sort by decreasing probability: the nucleus begins with the most likely token.",
                lambda **given: nucleus(**given, ascending=True),
            ),
            Mistake(
                "not sorted",
                "Sort the probabilities before you add them up; then put them back in order of id.",
                lambda logits, top_p: (
                    lambda p: np.where(np.cumsum(p) - p < top_p, p, 0) / p[np.cumsum(p) - p < top_p].sum()
                )(softmax(logits[None])[0]),
            ),
            Mistake(
                "a bound for each probability",
                "top_p bounds the sum of the most likely probabilities, not each of them.",
                each_above,
            ),
        ),
    ),
)

# ----------------------------------------------------------------------------------------- BPE


@st.composite
def bpe_inputs(draw):
    """Sequences of few ids, with runs."""
    pieces = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=3))
    return {"pieces": pieces}


def pair_counts(pieces):
    return Counter(pair for piece in pieces for pair in pairwise(piece))


def most_frequent_pair(pieces, ties=min, joined=False, apart=False):
    if joined:
        pieces = [[id for piece in pieces for id in piece]]
    counts = Counter() if apart else pair_counts(pieces)
    if apart:
        for piece in pieces:
            counts.update(zip(piece[::2], piece[1::2]))
    if not counts:
        return None
    most = max(counts.values())
    return ties(pair for pair, count in counts.items() if count == most)


@st.composite
def merge_inputs(draw):
    piece = draw(st.lists(st.integers(0, 2), min_size=0, max_size=8))
    pair = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return {"piece": piece, "pair": pair, "new_id": draw(st.integers(3, 9))}


def merge(piece, pair, new_id, from_the_right=False, once=False):
    out, i, done = [], 0, False
    if from_the_right:
        return merge(piece[::-1], pair[::-1], new_id)[::-1]
    while i < len(piece):
        if tuple(piece[i : i + 2]) == pair and not (once and done):
            out.append(new_id)
            i, done = i + 2, True
        else:
            out.append(piece[i])
            i += 1
    return out


def overlapping(piece, pair, new_id):
    """Every occurrence gives a new id, also if two share an element."""
    out, i = [], 0
    while i < len(piece):
        if tuple(piece[i : i + 2]) == pair:
            out.append(new_id)
            if tuple(piece[i + 1 : i + 3]) != pair:
                i += 1
        else:
            out.append(piece[i])
        i += 1
    return out


exercise(
    "bpe",
    Part(
        "most_frequent_pair",
        ("pair",),
        bpe_inputs(),
        most_frequent_pair,
        (
            Mistake(
                "pairs across pieces",
                "A pair never spans two pieces: count within each piece.",
                lambda pieces: most_frequent_pair(pieces, joined=True),
            ),
            Mistake(
                "the largest of equally frequent pairs",
                "Of equally frequent pairs choose the one with the smaller ids, compared as tuples.",
                lambda pieces: most_frequent_pair(pieces, ties=max),
            ),
            Mistake(
                "the first of equally frequent pairs",
                "Of equally frequent pairs choose the one with the smaller ids, not the one seen first.",
                lambda pieces: most_frequent_pair(pieces, ties=lambda pairs: next(iter(pairs))),
            ),
            Mistake(
                "every second pair",
                "Every two neighbours are a pair: (a, b) and (b, c) of a b c; you step over the second.",
                lambda pieces: most_frequent_pair(pieces, apart=True),
            ),
        ),
    ),
    Part(
        "merge",
        ("merged",),
        merge_inputs(),
        merge,
        (
            Mistake(
                "only the first occurrence",
                "Merge every occurrence of the pair, not the first alone.",
                lambda **given: merge(**given, once=True),
            ),
            Mistake(
                "from the right",
                "In a run such as a a a the first two are merged: go from left to right.",
                lambda **given: merge(**given, from_the_right=True),
            ),
            Mistake(
                "overlapping occurrences",
                "In a run such as a a a the pair occurs twice, but both need the middle a: after a merge "
                "continue behind it.",
                overlapping,
            ),
        ),
    ),
)

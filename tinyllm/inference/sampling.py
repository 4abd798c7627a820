"""How is the next token chosen from the logits?"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np

from tinyllm.checks import check_not_negative, is_integer
from tinyllm.errors import Error

FEW = 256  # tokens, among which the sampled one nearly always is


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ``Error`` unless 0 ≤ temperature < ∞, top_k is None or ≥ 1, and top_p None or 0 < top_p ≤ 1."""
    check_not_negative(temperature, "temperature")
    if top_k is not None and (not is_integer(top_k) or top_k < 1):
        raise Error(f"top_k is {top_k!r}: choose a whole number of at least 1, or none")
    if top_p is not None and (not isinstance(top_p, Real) or not 0 < top_p <= 1):
        raise Error(f"top_p is {top_p!r}: choose a number above 0 and at most 1, or none")


def suppress(logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """The logits (B, V) with -inf, so that these ids have probability 0; ids from V on are ignored.

    Raises ``Error`` if no id is left.
    """
    ids, vocab_size = np.asarray(ids, dtype=np.int64), logits.shape[1]
    if len(ids) >= vocab_size and len(np.unique(ids[ids < vocab_size])) == vocab_size:
        raise Error(f"suppress_ids has all {vocab_size:,} ids: leave one that can be sampled")
    if len(ids):
        logits = logits.copy()
        logits[:, ids[ids < vocab_size]] = -np.inf
    return logits


def choose_tokens(
    logits: np.ndarray,
    uniforms: np.ndarray,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:
    """Sample one token per row of ``logits`` (B, V) by inverting the CDF at ``uniforms`` (B,): ids (B,).

    The tokens are sorted by decreasing probability (see ``probabilities``), ties by increasing id. The
    sampled token is the first at which the cumulative sum exceeds the row's uniform number in [0, 1). Raises
    ``Error`` as ``probabilities`` does.
    """
    if temperature == 0 or top_k is not None or logits.shape[1] <= FEW:
        return _choose(logits, uniforms, temperature, top_k, top_p)
    tokens = np.array([_choose_of_few(*row, temperature, top_p) for row in zip(logits, uniforms)])
    others = tokens < 0
    if others.any():
        tokens[others] = _choose(logits[others], uniforms[others], temperature, top_k, top_p)
    return tokens


def _choose_of_few(logits: np.ndarray, uniform: float, temperature: float, top_p: float | None) -> int:
    """The token that ``_choose`` samples from logits (V,) if it is among the ``FEW`` largest, else -1.

    All tokens must be summed over, but only these be sorted: 49,152 take five times as long.
    """
    peak = logits.max()
    if not np.isfinite(peak):
        return -1
    order = most_likely(logits[None], FEW)[0]
    with np.errstate(over="ignore"):
        weights = np.exp((logits.astype(np.float64) - peak) / temperature)
    cdf = np.cumsum(weights[order] / weights.sum())
    if top_p is not None:
        kept = 1 + int((cdf < top_p).sum())  # the shortest prefix whose sum reaches top_p
        if kept > len(cdf):
            return -1
        cdf = cdf[:kept] / cdf[kept - 1]
    rank = int((cdf <= uniform).sum())
    return int(order[rank]) if rank < len(cdf) else -1


def _choose(
    logits: np.ndarray, uniforms: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """``choose_tokens``, with all candidates sorted."""
    order, weights = _candidates(logits, temperature, top_k, top_p)
    cdf = np.cumsum(weights, axis=-1)
    cdf /= cdf[:, -1:]  # the last is exactly 1, above every uniform number
    rank = (cdf <= uniforms[:, None]).sum(axis=-1)
    return np.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


def probabilities(
    logits: np.ndarray, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
    """The distribution that ``choose_tokens`` samples from: (B, V) in float64, from logits (B, V).

    ``temperature`` 0 is greedy: probability 1 for the largest logit, the first of equal ones. Otherwise

        p = softmax(logits / temperature)

    and the tokens are sorted by decreasing p, ties by increasing id. ``top_k`` keeps the first k of them
    (Fan et al., arXiv 1805.04833, 5.4). Of these, renormalised, ``top_p`` keeps the shortest prefix whose sum
    reaches ``top_p`` (nucleus sampling: Holtzman et al., arXiv 1904.09751, 3.1). The probabilities kept are
    scaled to sum to 1; all others are exactly 0. Raises ``Error`` if a row's largest logit is not finite.
    """
    order, weights = _candidates(logits, temperature, top_k, top_p)
    p = np.zeros(logits.shape)
    np.put_along_axis(p, order, weights / weights.sum(axis=-1, keepdims=True), axis=-1)
    return p


def _candidates(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of nonzero probability, the most likely first, and their weights in float64: both (B, ≤ V)."""
    if not np.isfinite(logits.max(axis=-1)).all():  # a single -inf only excludes a token
        raise Error(
            "the model's logits are not finite, so the weights are damaged or training diverged: load them "
            "again, or go back to an earlier checkpoint"
        )
    if temperature == 0:
        largest = logits.argmax(axis=-1)[:, None]
        return largest, np.ones(largest.shape)
    order = most_likely(logits, top_k)
    kept = np.take_along_axis(logits, order, axis=-1).astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature gives -inf for all but the largest: weight 0
        weights = np.exp((kept - kept[:, :1]) / temperature)
    weights /= weights.sum(axis=-1, keepdims=True)
    if top_p is not None:
        before = np.cumsum(weights, axis=-1) - weights  # the sum over all tokens of higher rank
        weights[before >= top_p] = 0
    return order, weights


def most_likely(logits: np.ndarray, count: int | None) -> np.ndarray:
    """The ids of each row's ``count`` largest logits (None: of all), in decreasing order, ties by id.

    A few of many are found by partition: sorting the 49,152 logits of SmolLM2 takes a tenth of a step.
    """
    vocab_size = logits.shape[1]
    if count is None or count >= vocab_size:
        return np.argsort(-logits, axis=-1, kind="stable")  # stable: ties stay in order of id
    rows = []
    for row in logits:
        least = np.partition(row, vocab_size - count)[vocab_size - count]
        above = np.flatnonzero(row > least)
        kept = np.concatenate([above, np.flatnonzero(row == least)[: count - len(above)]])
        rows.append(kept[np.argsort(-row[kept], kind="stable")])
    return np.stack(rows)

"""How is the next token chosen from the logits?"""

from __future__ import annotations

import math

import numpy as np

from tinyllm.checks import is_integer
from tinyllm.errors import Error


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ``Error`` unless the three are in their ranges (see ``probabilities``)."""
    numbers = int | float | np.number
    if not isinstance(temperature, numbers) or not 0 <= temperature < math.inf:
        raise Error(f"temperature is {temperature!r}: choose a number of at least 0")
    if top_k is not None and (not is_integer(top_k) or top_k < 1):
        raise Error(f"top_k is {top_k!r}: choose a whole number of at least 1, or none")
    if top_p is not None and (not isinstance(top_p, numbers) or not 0 < top_p <= 1):
        raise Error(f"top_p is {top_p!r}: choose a number above 0 and at most 1, or none")


def choose_tokens(
    logits: np.ndarray,
    uniforms: np.ndarray,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:
    """One token per row of ``logits`` (B, V), decided by ``uniforms`` (B,) in [0, 1): ids (B,).

    The token drawn is the first, in falling order of probability (see ``probabilities``), equal ones by
    id, at which the running sum of the probabilities exceeds the uniform number.
    """
    order, weights = _candidates(logits, temperature, top_k, top_p)
    running = np.cumsum(weights, axis=-1)
    running /= running[:, -1:]  # the last is exactly 1, above every uniform number
    drawn = (running <= uniforms[:, None]).sum(axis=-1)
    return np.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]


def probabilities(
    logits: np.ndarray, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
    """What ``choose_tokens`` draws from: every token's probability, (B, V) in float64, of logits (B, V).

    ``temperature`` 0 takes the largest logit, of equal ones the first. Otherwise
    p = softmax(logits / temperature), and tokens in falling order of p, equal ones by id, are kept up to
    the first ``top_k`` (exactly that many, if there are as many) and, of those, up to the first at which
    their renormalised sum reaches ``top_p`` (Holtzman et al., arXiv 1904.09751, 3.1). What is kept is
    scaled to sum to 1; the rest is exactly 0. Raises ``Error`` if a row has no softmax.
    """
    order, weights = _candidates(logits, temperature, top_k, top_p)
    p = np.zeros(logits.shape)
    np.put_along_axis(p, order, weights / weights.sum(axis=-1, keepdims=True), axis=-1)
    return p


def _candidates(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The ids that may be drawn, the most likely first, and their weights in float64: both (B, ≤ V)."""
    if not np.isfinite(logits.max(axis=-1)).all():  # a single -inf is a token that cannot come
        raise Error("the model's logits are not finite: its weights are damaged, or diverged in training")
    if temperature == 0:
        largest = logits.argmax(axis=-1)[:, None]
        return largest, np.ones(largest.shape)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]  # stable: equal logits stay in order of id
    kept = np.take_along_axis(logits, order, axis=-1).astype(np.float64)
    with np.errstate(over="ignore"):  # at a tiny temperature, -inf for all but the largest: weight 0
        weights = np.exp((kept - kept[:, :1]) / temperature)
    weights /= weights.sum(axis=-1, keepdims=True)
    if top_p is not None:
        before = np.cumsum(weights, axis=-1) - weights  # the sum of all that rank higher
        weights[before >= top_p] = 0
    return order, weights

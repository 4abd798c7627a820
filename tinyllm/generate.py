"""How does a model that scores the next token write a text?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from tinyllm.data import check_ids, is_integer
from tinyllm.device import to_device
from tinyllm.errors import Error
from tinyllm.nn import evaluating
from tinyllm.tensor import no_grad


def generate(
    model,
    ids,
    max_new_tokens: int = 30,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: np.random.Generator | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[np.ndarray]:
    """Continue the prompts ``ids`` (B, T): yields an array (B,) of token ids at every step.

    Each token is drawn as ``choose_tokens`` says, with one uniform number per row and step from
    ``rng`` (a fresh one if None), so a row's text does not depend on its neighbours. A row that drew
    one of ``stop_ids`` repeats it; when all rows have, generation ends. Past the model's context the
    window slides: the oldest token is dropped and the rest computed afresh.

    The arguments are checked at the call. The model is in eval mode, without gradients, during each
    step only; between steps it is as it was.
    """
    ids = check_ids(ids, model.config.vocab_size, name="prompt ids")
    ids = ids[None] if ids.ndim == 1 else ids  # one prompt is a batch of one
    stop_ids = check_ids(stop_ids, model.config.vocab_size, name="stop_ids") if len(stop_ids) else ()
    if ids.ndim != 2 or ids.shape[1] > model.context:
        raise Error(
            f"prompts of shape {ids.shape} do not fit: give (batch, time) with at most {model.context} "
            f"tokens, the model's context"
        )
    if not is_integer(max_new_tokens) or max_new_tokens < 0:
        raise Error(f"max_new_tokens is {max_new_tokens!r}: choose a whole number of at least 0")
    check_sampling(temperature, top_k, top_p)
    rng = np.random.default_rng() if rng is None else rng
    return _steps(model, ids, max_new_tokens, temperature, top_k, top_p, rng, stop_ids)


def _steps(model, ids, max_new_tokens, temperature, top_k, top_p, rng, stop_ids):
    finished = np.zeros(len(ids), bool)
    for _ in range(max_new_tokens):
        logits = _last_logits(model, ids[:, -model.context :])  # (B, V)
        tokens = choose_tokens(logits, rng.random(len(ids)), temperature, top_k, top_p)
        tokens = np.where(finished, ids[:, -1], tokens)  # (B,)
        ids = np.concatenate([ids, tokens[:, None]], axis=1)
        yield tokens
        finished |= np.isin(tokens, stop_ids)
        if finished.all():
            return


def _last_logits(model, ids):
    with evaluating(model), no_grad():
        return to_device(model(ids, last_only=True).data[:, 0], "cpu")


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ``Error`` unless the three are in their ranges (see ``probabilities``)."""
    if not 0 <= temperature < math.inf:
        raise Error(f"temperature is {temperature}: choose a number of at least 0")
    if top_k is not None and (not is_integer(top_k) or top_k < 1):
        raise Error(f"top_k is {top_k!r}: choose a whole number of at least 1, or none")
    if top_p is not None and not 0 < top_p <= 1:
        raise Error(f"top_p is {top_p}: choose a number above 0 and at most 1, or none")


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
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
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

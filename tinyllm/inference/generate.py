"""How does a model that scores the next token write a text?

It reads the prompt, draws a token from the scores at its end, reads that token, and so on. What it has read
it keeps in a cache (``cache.py``), so that a step reads one token and not the whole text again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tinyllm.backend.device import to_device
from tinyllm.backend.dtypes import accumulation_dtype
from tinyllm.backend.threads import step_of_few_rows
from tinyllm.checks import check_ids, is_integer
from tinyllm.errors import Error
from tinyllm.inference.sampling import check_sampling, choose_tokens
from tinyllm.nn import evaluating
from tinyllm.tensor import Tensor, no_grad


def generate(
    model,
    ids,
    max_new_tokens: int = 30,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: np.random.Generator | None = None,
    stop_ids: Sequence[int] = (),
    use_cache: bool = True,
    slide: bool = False,
) -> Iterator[np.ndarray]:
    """Continue the prompts ``ids``: yields an array (B,) of token ids at every step.

    ``ids`` is (B, T), or B lists of any length each. A token is drawn as ``choose_tokens`` says, with one
    uniform number per row and step from ``rng`` (a fresh one if None), so a row's text does not depend on
    its neighbours. A row that drew one of ``stop_ids`` repeats it; when all rows have, generation ends.
    ``use_cache=False`` reads the whole text again at every step: the same tokens, later.

    When the longest row has filled the model's context:

    - GPT-2 goes on. Its window slides: the oldest token is dropped and the rest, whose positions have all
      changed, read afresh. From here on there is no cache.
    - Llama ends. Its last token is drawn from a full context.
    - Llama with ``slide`` goes on. Whenever the cache is full, its oldest quarter is dropped. What is kept
      was computed in sight of what is dropped, so this is not what the model would say to the window alone
      (which is what ``slide`` without a cache does). Keys keep the turns they had, and a new token's
      position goes on counting from the beginning of the text: RoPE sees distances only, and none is
      longer than the context. Rows of different length drop by the longest.

    The arguments are checked at the call. The model is in eval mode, without gradients, during each
    step only; between steps it is as it was. The cache lives as long as the iterator.
    """
    ids, padding = _check_prompts(ids, model)
    if not isinstance(stop_ids, Sequence | np.ndarray):
        raise Error(f"stop_ids is {stop_ids!r}: give a list of token ids")
    stop_ids = check_ids(stop_ids, model.config.vocab_size, name="stop_ids") if len(stop_ids) else ()
    if not is_integer(max_new_tokens) or max_new_tokens < 0:
        raise Error(f"max_new_tokens is {max_new_tokens!r}: choose a whole number of at least 0")
    check_sampling(temperature, top_k, top_p)
    if rng is not None and not hasattr(rng, "random"):
        raise Error(f"rng is {rng!r}: give np.random.default_rng(seed)")
    rng = np.random.default_rng() if rng is None else rng
    if not (slide or model.learned_positions):
        max_new_tokens = min(max_new_tokens, model.context - ids.shape[1] + 1)
    sampling = (temperature, top_k, top_p)
    return _steps(model, ids, padding, max_new_tokens, sampling, rng, stop_ids, use_cache)


def _check_prompts(ids, model) -> tuple[np.ndarray, np.ndarray]:
    """The prompts (B, T), filled up on the left to the same length, and with how much of that: (B,)."""
    vocab_size, context = model.config.vocab_size, model.context
    if _is_ragged(ids):
        rows = [check_ids(row, vocab_size, name=f"prompt ids[{i}]") for i, row in enumerate(ids)]
    else:
        rows = check_ids(ids, vocab_size, name="prompt ids")
        rows = rows[None] if rows.ndim == 1 else rows  # one prompt is a batch of one
    longest = max(row.size for row in rows)
    if any(row.ndim != 1 for row in rows) or longest > context:
        shape = rows.shape if isinstance(rows, np.ndarray) else (len(rows), longest)
        raise Error(
            f"prompts of shape {shape} do not fit: give (batch, time) with at most {context} "
            f"tokens, the model's context"
        )
    padding = np.array([longest - row.size for row in rows])
    return np.stack([np.pad(row, (fill, 0)) for row, fill in zip(rows, padding)]), padding


def _is_ragged(ids) -> bool:
    """Whether the ids are lists, or arrays, of different length."""
    if not isinstance(ids, (list, tuple)):
        return False
    lists = [row for row in ids if isinstance(row, (list, tuple)) or np.ndim(row) == 1]
    return len({len(row) for row in lists}) > 1


def _steps(model, ids, padding, max_new_tokens, sampling, rng, stop_ids, use_cache):
    B, T = ids.shape
    cache = model.new_cache(B, T + max_new_tokens, padding) if use_cache else None
    modules = [module for _, module in model.named_modules()]
    unread, finished = ids, np.zeros(B, bool)
    for _ in range(max_new_tokens):
        if cache is not None and cache.length + unread.shape[1] > cache.room:  # the context is full
            if model.learned_positions:
                cache = None
            else:
                cache.drop_oldest(max(1, cache.room // 4))
        if (unread >= model.config.vocab_size).any():
            raise Error(
                f"the model's head chose class {unread.max()}, and the model takes ids below "
                f"{model.config.vocab_size}: give it a head of one class for each id"
            )
        with evaluating(model, modules):
            logits = _read_window(model, ids, padding) if cache is None else _read(model, unread, cache)
        tokens = choose_tokens(logits, rng.random(B), *sampling)
        tokens = np.where(finished, ids[:, -1], tokens)  # (B,)
        ids = np.concatenate([ids, tokens[:, None]], axis=1)
        unread, finished = ids[:, -1:], finished | np.isin(tokens, stop_ids)
        yield tokens
        if finished.all():
            return


def _read(model, ids, cache=None) -> np.ndarray:
    """The logits (B, V), on the host, of what follows the ids (B, T), which follow what the cache holds."""
    with no_grad(), step_of_few_rows():
        logits = model(ids, last_only=True, cache=cache)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            what = f"a Tensor {logits.shape}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise Error(f"the model's head returned {what}: generate needs a Tensor (batch, 1, classes)")
        logits = to_device(logits.data[:, 0], "cpu")
    return logits.astype(accumulation_dtype(logits.dtype), copy=False)


def _read_window(model, ids, padding) -> np.ndarray:
    """As ``_read``, of the last tokens that fit the context, without a cache; rows of any length."""
    window = ids[:, -model.context :]
    padding = np.maximum(padding - (ids.shape[1] - window.shape[1]), 0)
    if not padding.any():
        return _read(model, window)
    return np.concatenate([_read(model, row[None, fill:]) for row, fill in zip(window, padding)])

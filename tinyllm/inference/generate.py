"""How does a model that predicts one token generate a text?

The prefill runs the model on the prompt. Then every decoding step samples a token from the logits at the last
position and runs the model on that token. The keys and values of earlier tokens are kept in a cache
(``models/cache.py``), so that a step processes one token instead of the whole text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from tinyllm.backend.device import to_device
from tinyllm.backend.dtypes import accumulation_dtype
from tinyllm.backend.threads import step_of_few_rows
from tinyllm.checks import as_generator, check_at_least, check_ids, check_model
from tinyllm.errors import Error
from tinyllm.inference.decoding import DecodingSteps
from tinyllm.inference.sampling import check_sampling, choose_tokens, suppress
from tinyllm.inference.speculative import Speculation, speculation
from tinyllm.models.cache import Cache
from tinyllm.models.rope import changes_with_length
from tinyllm.tensor import Tensor, no_grad


def generate(
    model,
    ids,
    max_new_tokens: int = 30,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: np.random.Generator | int | None = None,
    stop_ids: Sequence[int] = (),
    use_cache: bool = True,
    slide: bool = False,
    suppress_ids: Sequence[int] = (),
    cache: Cache | None = None,
    speculate=None,
) -> Iterator[np.ndarray]:
    """Continue the prompts ``ids``: yields the sampled token ids (B,) of each step.

    ``ids`` is (B, T), one prompt (T,), or B lists of different lengths. Tokens are sampled by
    ``choose_tokens`` with ``temperature``, ``top_k`` and ``top_p``, from one uniform number per row and step
    of ``rng`` (a newly seeded generator if None), so a row's text does not depend on the other rows. A row
    that has sampled one of ``stop_ids`` repeats it; generation ends when all rows have, or after
    ``max_new_tokens``. ``use_cache=False`` processes the whole text again at every step: the same tokens,
    more slowly. So does a model none of whose layers uses the cache (see ``look_back``), such as one of
    convolutions. If some do and others look back without it, ``use_cache=False`` is needed.

    A ``cache`` of an earlier call may be given again, with the rows in the same order: what its rows have in
    common with the prompts is not processed again, so the second turn of a conversation begins at once. It
    must have been filled by the same model with the same weights, and serves one call at a time.

    ``suppress_ids`` have probability 0. A model with more ids than its tokenizer has tokens needs
    ``suppress_ids=tokenizer.unused_ids(model.config.vocab_size)``.

    ``speculate`` gives the same text faster where the next tokens can be guessed (``speculative.py``): from
    the text so far with "prompt", or by a smaller model with the same vocabulary. It needs a cache and one
    prompt.

    When the longest row has filled the model's context:

    - GPT-2 continues with a sliding window. The oldest token is dropped, and the others are processed again,
      because their learned positions have changed. From then on there is no cache.
    - Llama stops. Its last token is sampled from a full context.
    - Llama with ``slide`` continues. Whenever the cache of a row is full, its oldest quarter is dropped. The
      keys and values that remain were computed with the dropped tokens in context, so the result differs from
      running the model on the remaining window alone (``slide`` with ``use_cache=False``). Keys keep their
      rotation and positions keep counting from the beginning of the text: RoPE depends only on distances, and
      none exceeds the context.

    When a text becomes longer than those the model was trained on, RoPE of type "longrope" rotates all keys
    anew once: the text is processed again. "dynamic" does so with every token, from then on without a cache.

    The arguments are checked at the call, not at the first step; invalid ones raise ``Error``. The model is
    in eval mode and without gradients only during a step; between steps its mode is restored. The cache is
    freed with the iterator, unless it was given. Parameters that multiply the same input, such as q_proj's
    and k_proj's, may become views of one matrix: their values stay, but ``.data`` is another array.
    """
    check_model(model, "config")
    prompts = _check_prompts(ids, model)
    stop_ids = _check_list(stop_ids, model, "stop_ids")
    suppress_ids = _check_list(suppress_ids, model, "suppress_ids")
    max_new_tokens = check_at_least(max_new_tokens, 0, "max_new_tokens")
    check_sampling(temperature, top_k, top_p)
    rng = np.random.default_rng() if rng is None else as_generator(rng)
    longest = max(map(len, prompts))
    if not (slide or model.learned_positions):
        max_new_tokens = min(max_new_tokens, model.context - longest + 1)
    if speculate is not None:
        if cache is None and not use_cache:
            raise Error("speculate needs a cache: omit use_cache=False, or speculate")
        speculate = speculation(speculate, model, prompts, longest + max_new_tokens)
    if cache is not None:
        _check_cache(cache, len(prompts), min(longest + max_new_tokens, model.context))
    elif use_cache:
        cache = model.new_cache(len(prompts), longest + max_new_tokens)
    sampling = (temperature, top_k, top_p)
    steps = _steps(model, prompts, max_new_tokens, sampling, rng, stop_ids, cache, suppress_ids, speculate)
    return steps if speculate is None else speculate.tidy(steps, prompts[0], cache)


def _check_list(ids, model, name: str) -> np.ndarray:
    if isinstance(ids, Sequence) or (isinstance(ids, np.ndarray) and ids.ndim):
        checked = check_ids(ids, model.config.vocab_size, name=name) if len(ids) else np.zeros(0, np.int64)
        if checked.ndim == 1:
            return checked
    raise Error(f"{name} is {ids!r}: give a list of token ids")


def _check_prompts(ids, model) -> list[list[int]]:
    """The prompts, a list of ids for each row."""
    vocab_size, context = model.config.vocab_size, model.context
    if _is_ragged(ids):
        rows = [check_ids(row, vocab_size, name=f"prompt ids[{i}]") for i, row in enumerate(ids)]
    else:
        rows = check_ids(ids, vocab_size, name="prompt ids")
        rows = rows[None] if rows.ndim < 2 else rows  # one prompt is a batch of one
    longest = max(row.size for row in rows)
    if any(row.ndim != 1 for row in rows) or longest > context:
        shape = rows.shape if isinstance(rows, np.ndarray) else (len(rows), longest)
        raise Error(
            f"the prompt ids have shape {shape}: give (batch, time) with at most {context} tokens, the "
            "model's context"
        )
    return [row.tolist() for row in rows]


def _is_ragged(ids) -> bool:
    """Whether the ids are lists or arrays of different lengths."""
    if not isinstance(ids, (list, tuple)):
        return False
    lists = [row for row in ids if isinstance(row, (list, tuple)) or np.ndim(row) == 1]
    return len({len(row) for row in lists}) > 1


def _check_cache(cache: Cache, rows: int, tokens: int) -> None:
    if not isinstance(cache, Cache):
        raise Error(f"cache is a {type(cache).__name__}: give one that model.new_cache() returned")
    if len(cache.texts) != rows or cache.capacity < tokens:
        raise Error(
            f"the cache has {len(cache.texts)} rows of up to {cache.capacity} tokens, but {rows} of up to "
            f"{tokens} are needed: create one with new_cache(), or with cache.with_capacity() for more tokens"
        )


def _check_texts(cache: Cache, texts: Sequence[Sequence[int]]) -> None:
    if any(len(old) >= len(text) or old != text[: len(old)] for old, text in zip(cache.texts, texts)):
        raise Error("the cache was used for another text meanwhile: give each generate() a cache of its own")


def _steps(model, texts, max_new_tokens, sampling, rng, stop_ids, cache, suppress_ids, speculate):
    if cache is not None:
        cache.keep_prefix(texts)
    run, changes = DecodingSteps(model, max_new_tokens), changes_with_length(model.config)
    tokens, finished = np.zeros(len(texts), np.int64), np.zeros(len(texts), bool)
    for left in range(max_new_tokens, 0, -1):
        if (tokens >= model.config.vocab_size).any():
            raise Error(
                f"the model's head sampled class {tokens.max()}, but the model's ids are below "
                f"{model.config.vocab_size}: give it a head with one class per id"
            )
        if cache is not None and not _make_room(model, texts, cache, changes):
            cache = None
        logits = _next_logits(model, run, texts, cache, speculate, _most_at_once(changes, texts, left) - 1)
        if cache is not None and run.ignores_cache:  # a further pass would see the new tokens only
            cache.clear()
            cache = None
        sampled = choose_tokens(suppress(logits, suppress_ids), rng.random(len(texts)), *sampling)
        tokens = np.where(finished, tokens, sampled)  # (B,)
        finished |= np.isin(tokens, stop_ids)
        for text, token in zip(texts, tokens.tolist()):
            text.append(token)
        yield tokens
        if finished.all():
            return


def _make_room(model, texts, cache: Cache, changes: list[tuple[int, bool]]) -> bool:
    """Drop the oldest tokens of rows whose cache is full; False if no cache can hold what is needed.

    That is so if dropping changes positions, and if all keys are rotated anew with every token. Where they
    are rotated anew once (``changes_with_length``), the row is cleared, and so processed again.
    """
    lengths = np.array(list(map(len, texts)))
    full = lengths - cache.lengths > cache.free
    if full.any() and model.learned_positions:
        return False
    if full.any():
        cache.drop_oldest(np.where(full, max(1, cache.capacity // 4), 0))
    for length, again in changes:
        if again and (lengths > length).any():
            return False
        for row in np.flatnonzero((lengths > length) & (cache.lengths <= length)):
            cache[row : row + 1].clear()
    return True


def _most_at_once(changes: list[tuple[int, bool]], texts, left: int) -> int:
    """How many of ``left`` tokens a pass may add to the text: none before and after a change of angles."""
    return min([left, *(length - len(texts[0]) + 1 for length, _ in changes if len(texts[0]) <= length)])


def _next_logits(
    model, run: DecodingSteps, texts, cache: Cache | None, speculate: Speculation | None, left: int
) -> np.ndarray:
    """The logits (B, V) after each text, from its tokens that are not in the cache.

    Without a cache they are those after the last tokens that fit the context. Neighbouring rows with equally
    many tokens to process are one batch, so there is no padding. Speculation, for one text, computes the
    logits after up to ``left`` candidates, too.
    """
    if speculate is not None and cache is not None:
        logits = speculate.accepted(texts[0], cache)
        if logits is not None:
            return logits
    if cache is not None:
        _check_texts(cache, texts)
    if speculate is not None and cache is not None:
        candidates = speculate.propose(texts[0], cache, left)
        if candidates:
            ids = np.array([[texts[0][-1], *candidates]])
            return speculate.keep(candidates, logits_of(run, ids, cache, last_only=False)[0])
    if cache is None:
        new = [text[-model.context :] for text in texts]
    else:
        new = [text[len(cached) :] for text, cached in zip(texts, cache.texts)]
    parts, first = [], 0
    for _, rows in itertools.groupby(new, len):
        ids = np.array(list(rows))  # (rows, T)
        some = slice(first, first + len(ids))
        part = cache if cache is None or len(ids) == len(texts) else cache[some]
        parts.append(logits_of(run, ids, part)[:, 0])
        first = some.stop
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def logits_of(run: DecodingSteps, ids, cache: Cache | None, last_only: bool = True) -> np.ndarray:
    """The logits (B, T, V), or the last ones (B, 1, V), on the host, for the ids (B, T) that continue those
    in the cache.
    """
    count = 1 if last_only else ids.shape[1]
    with no_grad(), step_of_few_rows(ids.size):
        logits = run(ids, cache, last_only)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] != count:
            found = f"a Tensor {logits.shape}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise Error(
                f"the model's head returned {found}: generate needs a Tensor (batch, {count}, classes)"
            )
        logits = to_device(logits.data, "cpu")
    return logits.astype(accumulation_dtype(logits.dtype), copy=False)

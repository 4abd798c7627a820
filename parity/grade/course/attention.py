"""Exercises on attention, heads, rotary positions and the key-value cache."""

import math

import numpy as np
import torch
import torch.nn.functional as TF
from hypothesis import strategies as st

from parity.grade.course.losses import softmax
from parity.grade.exercise import Mistake, Part, arrays, exercise, gradients, sizes, value

# ----------------------------------------------------------------------------- causal attention


@st.composite
def attention_inputs(draw, backward: bool):
    T, D = draw(sizes()), draw(sizes())
    grad = {"grad": draw(arrays(T, D))} if backward else {}
    return grad | {name: draw(arrays(T, D)) for name in "qkv"}


def torch_attention(q, k, v):
    return TF.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def weights(q, k, power=0.5, offset=0, axis=-1, mask="before"):
    """The attention weights (T, S); ``offset`` -1 shows each position the next one."""
    scores = q @ k.T / q.shape[-1] ** power
    visible = np.tri(*scores.shape, -offset, dtype=bool)
    if mask == "none":
        return softmax(scores, axis)
    if mask == "after":
        return softmax(scores, axis) * visible
    scores = np.where(visible, scores, -1e300 if mask == "before" else 0.0)
    return softmax(scores, axis)


exercise(
    "causal_attention",
    Part(
        "causal_attention",
        ("y",),
        attention_inputs(backward=False),
        lambda q, k, v: value(torch_attention, q, k, v),
        (
            Mistake(
                "no scale",
                "Divide the scores by sqrt(D): with D channels their variance is D times larger.",
                lambda q, k, v: weights(q, k, power=0) @ v,
            ),
            Mistake(
                "divided by D",
                "Divide the scores by the square root of D, not by D.",
                lambda q, k, v: weights(q, k, power=1) @ v,
            ),
            Mistake(
                "divided by the square root of T",
                "Divide by the square root of D, the channels of q, not of T, the positions.",
                lambda q, k, v: weights(q * math.sqrt(q.shape[1] / len(q)), k) @ v,
            ),
            Mistake(
                "no mask",
                "Position t must not see positions after t: mask their scores.",
                lambda q, k, v: weights(q, k, mask="none") @ v,
            ),
            Mistake(
                "mask off by one: the next position seen",
                "Position t sees positions up to t, but yours sees t + 1, too.",
                lambda q, k, v: weights(q, k, offset=-1) @ v,
            ),
            Mistake(
                "masked after the softmax",
                "Mask the scores before the softmax, with -inf: otherwise the rows do not sum to 1.",
                lambda q, k, v: weights(q, k, mask="after") @ v,
            ),
            Mistake(
                "masked with 0",
                "A score of 0 is a score like any other, exp(0) = 1: mask with -inf.",
                lambda q, k, v: weights(q, k, mask="zero") @ v,
            ),
            Mistake(
                "softmax over the queries",
                "Each query's weights sum to 1: the softmax is over the keys, the last axis.",
                lambda q, k, v: weights(q, k, axis=0) @ v,
            ),
        ),
    ),
    Part(
        "causal_attention_gradient",
        ("dq", "dk", "dv"),
        attention_inputs(backward=True),
        lambda grad, q, k, v: gradients(torch_attention, grad, q, k, v),
        (
            Mistake(
                "no scale in dq and dk",
                "The scores are q · k / sqrt(D): dq and dk have the factor 1/sqrt(D), too.",
                lambda **given: attention_gradient(**given, power=0),
            ),
            Mistake(
                "the softmax's sum missing",
                "Through the softmax: dS = P (dP - Σ_s P dP), with the sum of each row subtracted.",
                lambda **given: attention_gradient(**given, centred=False),
            ),
            Mistake(
                "dv with P not transposed",
                "v_s is used by every query t: dv = Pᵀ grad, not P grad.",
                lambda **given: attention_gradient(**given, transposed=False),
            ),
            Mistake(
                "dq and dk exchanged",
                "Return dq, dk, dv, in this order.",
                lambda **given: (lambda dq, dk, dv: (dk, dq, dv))(*attention_gradient(**given)),
            ),
        ),
    ),
)


def attention_gradient(grad, q, k, v, power=0.5, centred=True, transposed=True):
    p, dp = weights(q, k), grad @ v.T
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) if centred else dp) / q.shape[1] ** power
    return ds @ k, ds.T @ q, (p.T if transposed else p) @ grad


# --------------------------------------------------------------------------------------- heads


@st.composite
def split_inputs(draw):
    T, H, D = draw(sizes()), draw(sizes(1, 3)), draw(sizes(1, 3))
    return {"x": draw(arrays(T, H * D)), "heads": H}


@st.composite
def joined_inputs(draw):
    return {"x": draw(arrays(draw(sizes(1, 3)), draw(sizes()), draw(sizes(1, 3))))}


exercise(
    "heads",
    Part(
        "split_heads",
        ("y",),
        split_inputs(),
        lambda x, heads: value(lambda t: t.unflatten(-1, (heads, -1)).transpose(0, 1), x),
        (
            Mistake(
                "no transposition",
                "The shape is right, but rows are mixed: reshape to (T, H, D) first, then exchange the axes.",
                lambda x, heads: x.reshape(heads, len(x), -1),
            ),
            Mistake(
                "channels interleaved",
                "Head h has the D neighbouring channels from h D: the heads are the first factor, (H, D).",
                lambda x, heads: x.reshape(len(x), -1, heads).transpose(2, 0, 1),
            ),
            Mistake(
                "heads not in front",
                "The result is (H, T, D): exchange the first two axes.",
                lambda x, heads: x.reshape(len(x), heads, -1),
            ),
        ),
    ),
    Part(
        "join_heads",
        ("y",),
        joined_inputs(),
        lambda x: value(lambda t: t.transpose(0, 1).flatten(1), x),
        (
            Mistake(
                "no transposition",
                "The shape is right, but rows are mixed: exchange the axes to (T, H, D) first, then reshape.",
                lambda x: x.reshape(x.shape[1], -1),
            ),
            Mistake(
                "channels interleaved",
                "Keep the D channels of a head next to each other: (T, H, D), not (T, D, H).",
                lambda x: x.transpose(1, 2, 0).reshape(x.shape[1], -1),
            ),
        ),
    ),
)

# ----------------------------------------------------------------- grouped-query attention


@st.composite
def grouped_inputs(draw):
    T, D, groups, each = draw(sizes(1, 3)), draw(sizes(1, 3)), draw(sizes(1, 3)), draw(sizes(1, 3))
    given = {"q": draw(arrays(groups * each, T, D))}
    return given | {name: draw(arrays(groups, T, D)) for name in "kv"}


def torch_grouped(q, k, v):
    return TF.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]


def grouped(q, k, v, head_of):
    return np.stack([weights(q[h], k[head_of(h)]) @ v[head_of(h)] for h in range(len(q))])


exercise(
    "grouped_query_attention",
    Part(
        "grouped_query_attention",
        ("y",),
        grouped_inputs(),
        lambda q, k, v: value(torch_grouped, q, k, v),
        (
            Mistake(
                "heads interleaved",
                "Query heads 0 to H/G - 1 share the first key head, the next H/G the second: h // (H/G), "
                "not h % G (np.repeat, not np.tile).",
                lambda q, k, v: grouped(q, k, v, lambda h: h % len(k)),
            ),
            Mistake(
                "the first key head for all",
                "Each group of query heads has a key and value head of its own.",
                lambda q, k, v: grouped(q, k, v, lambda h: 0),
            ),
            Mistake(
                "the wrong divisor",
                "The size of a group is H / G, so head h reads key head h // (H / G), not h // G.",
                lambda q, k, v: grouped(q, k, v, lambda h: h // len(k)),
            ),
            Mistake(
                "no mask",
                "Position t must not see positions after t: mask their scores.",
                lambda q, k, v: np.stack(
                    [
                        weights(q[h], k[h * len(k) // len(q)], mask="none") @ v[h * len(k) // len(q)]
                        for h in range(len(q))
                    ]
                ),
            ),
        ),
    ),
)

# ------------------------------------------------------------------------------------- RoPE


@st.composite
def rope_inputs(draw):
    T, pairs = draw(sizes()), draw(sizes(1, 3))
    theta = draw(st.sampled_from([100.0, 10000.0]))
    return {"x": draw(arrays(T, 2 * pairs)), "start": draw(st.integers(0, 3)), "theta": theta}


def torch_rope(x, start, theta):
    """transformers' formula: x cos + rotate_half(x) sin."""
    x = torch.tensor(x)
    T, D = x.shape
    frequencies = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = (start + torch.arange(T, dtype=torch.float64))[:, None] * frequencies
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    half = torch.cat([-x[:, D // 2 :], x[:, : D // 2]], -1)
    return (x * cos + half * sin).numpy()


def rope(x, start, theta, sign=1, interleaved=False, first=0, per_pair=2):
    T, D = x.shape
    frequencies = theta ** (-np.arange(D // 2) * per_pair / D)
    angles = (start + first + np.arange(T))[:, None] * frequencies
    cos, sin = np.cos(angles), sign * np.sin(angles)
    a, b = (x[:, ::2], x[:, 1::2]) if interleaved else (x[:, : D // 2], x[:, D // 2 :])
    rotated = a * cos - b * sin, b * cos + a * sin
    return np.stack(rotated, -1).reshape(T, D) if interleaved else np.concatenate(rotated, -1)


exercise(
    "rope",
    Part(
        "rope",
        ("y",),
        rope_inputs(),
        torch_rope,
        (
            Mistake(
                "neighbouring channels paired",
                "Channels i and i + D/2 are a pair (Hugging Face's layout); you pair 2i and 2i + 1 (Meta's).",
                lambda **given: rope(**given, interleaved=True),
            ),
            Mistake(
                "rotated backwards",
                "The rotation is (a cos - b sin, b cos + a sin): yours has the opposite sign of sin.",
                lambda **given: rope(**given, sign=-1),
            ),
            Mistake(
                "the start ignored",
                "Row t has the position start + t: without it a cached text would begin again at 0.",
                lambda x, start, theta: rope(x, 0, theta),
            ),
            Mistake(
                "positions counted from 1",
                "Row 0 has the position start: positions count from 0.",
                lambda **given: rope(**given, first=1),
            ),
            Mistake(
                "the exponent halved",
                "Pair i has the frequency theta^(-2i/D), not theta^(-i/D).",
                lambda **given: rope(**given, per_pair=1),
            ),
        ),
    ),
)

# ------------------------------------------------------------------------------- KV cache


@st.composite
def cache_inputs(draw):
    held, new, D = draw(st.integers(0, 3)), draw(sizes(1, 3)), draw(sizes(1, 3))
    given = {name: draw(arrays(new, D)) for name in "qkv"}
    return given | {"cached_k": draw(arrays(held, D)), "cached_v": draw(arrays(held, D))}


def torch_cached(q, k, v, cached_k, cached_v):
    """The last rows of attention over the whole text, with any queries in front."""
    keys, values = np.concatenate([cached_k, k]), np.concatenate([cached_v, v])
    queries = np.concatenate([np.zeros_like(cached_k), q])
    return value(torch_attention, queries, keys, values)[len(cached_k) :], keys, values


def cached(q, k, v, cached_k, cached_v, offset=None, masked=True, new_first=False, scale=1.0):
    order = (lambda old, new: [new, old]) if new_first else (lambda old, new: [old, new])
    keys, values = np.concatenate(order(cached_k, k)), np.concatenate(order(cached_v, v))
    scores = q @ keys.T / math.sqrt(q.shape[1]) * scale
    offset = len(cached_k) if offset is None else offset
    if masked:
        scores = np.where(np.tri(*scores.shape, offset, dtype=bool), scores, -np.inf)
    return softmax(scores) @ values, keys, values


exercise(
    "kv_cache",
    Part(
        "cached_attention",
        ("y", "keys", "values"),
        cache_inputs(),
        torch_cached,
        (
            Mistake(
                "mask aligned with the first key",
                "The new queries are the last: query t sees all cached keys and the new ones up to t.",
                lambda **given: cached(**given, offset=0),
            ),
            Mistake(
                "no mask",
                "With one new token no mask is needed, but of several the first must not see the others.",
                lambda **given: cached(**given, masked=False),
            ),
            Mistake(
                "the new keys first",
                "The cached keys and values are older: they come before the new ones.",
                lambda **given: cached(**given, new_first=True),
            ),
            Mistake(
                "the cache ignored",
                "The new queries attend to the cached keys, too: concatenate them with the new ones.",
                lambda q, k, v, cached_k, cached_v: (
                    weights(q, k) @ v, np.concatenate([cached_k, k]), np.concatenate([cached_v, v])
                ),
            ),
            Mistake(
                "no scale",
                "Divide the scores by sqrt(D).",
                lambda **given: cached(**given, scale=math.sqrt(given["q"].shape[1])),
            ),
            Mistake(
                "the new tokens alone returned",
                "Return all keys and values, cached and new: they are the cache of the next step.",
                lambda **given: (cached(**given)[0], given["k"], given["v"]),
            ),
        ),
    ),
)  # fmt: skip

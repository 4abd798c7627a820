"""The cases that attention is proven on: three arrays, views of one buffer, learned biases."""

import numpy as np
from hypothesis import strategies as st

from parity.ops import strategies as some
from parity.ops.attention import addresses, at_address, kept_weights, torch_attention, visible_keys
from parity.ops.cases import Case
from tinyllm import functional as F
from tinyllm.functional import composed


@st.composite
def masks(draw, shape):
    """None, booleans or numbers to add (including -inf); some queries have no visible key."""
    kind = draw(st.sampled_from([None, bool, float]))
    if kind is None:
        return None
    rng = np.random.default_rng(draw(some.SEEDS))
    shape = draw(st.sampled_from([shape, (1, *shape[1:]), shape[2:], (shape[0], 1, 1, shape[3])]))
    visible = rng.random(shape) < draw(st.sampled_from([0.3, 0.8]))
    return visible if kind is bool else np.where(visible, rng.standard_normal(shape), -np.inf)


@st.composite
def variants(draw):
    """Causal or not, then perhaps in a window, perhaps with a softcap."""
    is_causal = draw(st.booleans())
    window = draw(st.sampled_from([None, 1, 2, 3, 5, 9])) if is_causal else None
    return {"is_causal": is_causal, "window": window, "softcap": draw(st.sampled_from([None, None, 0.7, 5]))}


@st.composite
def of_three_arrays(draw):
    (B, G, T, S), D, E = (
        (draw(st.integers(1, n)) for n in (2, 3, 7, 7)),
        *(draw(st.integers(0, 4)) for _ in "DE"),
    )
    R = draw(st.sampled_from([1, 1, 2, 4]))  # query heads per key-value head; 4: more than QUERY_BLOCK
    H = G * R
    mask = draw(masks((B, H, T, S)))
    options = draw(variants()) | {"scale": draw(st.sampled_from([None, 0.3]))}
    gqa = {"enable_gqa": R > 1 or draw(st.booleans())}
    p, address = draw(st.sampled_from([0, 0, 0.4])), draw(addresses())
    q, k, v = (draw(some.arrays(shape)) for shape in [(B, H, T, D), (B, G, S, D), (B, G, S, E)])
    kept = kept_weights(q, k, options | gqa | {"attn_mask": mask}, p, address) if p else None

    def call(function):
        def op(q, k, v):
            own = mask.astype(q.dtype) if mask is not None and mask.dtype != bool else mask
            return function(q, k, v, attn_mask=own, dropout_p=p, **options, **gqa)

        return at_address(address, op)

    visible = visible_keys((B, H, T, S), mask, options["is_causal"], options["window"])
    every_query_has_a_key = visible.any(-1).all()
    return Case(
        f"attention B={B} H={H} G={G} T={T} S={S} D={D} E={E}, {options}, mask={mask!r}, p={p} at {address}",
        [q, k, v],
        call(F.scaled_dot_product_attention),
        lambda q, k, v: torch_attention(q, k, v, mask, kept=kept, **options),
        # The plain form has one block, and so another dropout mask: a test of its own compares them.
        call(composed.scaled_dot_product_attention) if every_query_has_a_key and not p else None,
        draw(some.subsets(3)),
        draw(some.SEEDS),
    )


@st.composite
def of_one_buffer(draw):
    """Query, key and value are strided views of one array, and their gradients are added into one buffer."""
    B, T, H, D = (draw(st.integers(1, n)) for n in (2, 7, 3, 4))
    window = draw(st.none() | st.integers(1, 7))

    def call(function):
        def op(x):
            qkv = x.reshape(B, T, 3, H, D).swapaxes(1, 3)  # (B, H, 3, T, D)
            return function(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True, window=window)

        return op

    return Case(
        f"attention of views of one buffer, B={B} T={T} H={H} D={D}, window={window}",
        [draw(some.arrays((B, T, 3 * H * D)))],
        call(F.scaled_dot_product_attention),
        call(torch_attention),
        call(composed.scaled_dot_product_attention),
        seed=draw(some.SEEDS),
    )


@st.composite
def with_learned_biases(draw):
    """The mask is a Tensor of numbers with a gradient; inputs are (B, H, T, D), or one head as (B, T, D)."""
    B, G, T, S, D = (draw(st.integers(1, n)) for n in (2, 2, 7, 7, 3))
    H, given = G * draw(st.sampled_from([1, 2])), draw(variants())
    heads, shared = draw(st.sampled_from([((H,), (G,)), ((), ())]))
    scores = (B, *heads, T, S)
    bias = draw(st.sampled_from([scores, scores[1:], (1, *scores[1:]), (T, S), (1, S), (T, 1)]))
    shapes = [(B, *heads, T, D), (B, *shared, S, D), (B, *shared, S, 2), bias]
    p, address = draw(st.sampled_from([0, 0, 0.4])) if heads else 0, draw(addresses())
    inputs = [draw(some.arrays(shape)) for shape in shapes]
    options = given | {"enable_gqa": True}
    kept = kept_weights(*inputs[:2], options | {"attn_mask": inputs[3]}, p, address) if p else None
    every_query_has_a_key = visible_keys(scores, None, given["is_causal"], given["window"]).any(-1).all()
    plain = every_query_has_a_key and not p
    plain_options = {
        "enable_gqa": bool(heads)
    }  # it repeats heads along axis 1, which (B, T, D) does not have
    return Case(
        f"attention with learned biases {shapes}, {given}, p={p} at {address}",
        inputs,
        at_address(address, lambda *x: F.scaled_dot_product_attention(*x, dropout_p=p, **options)),
        lambda *x: torch_attention(*x, kept=kept, **given),
        (lambda *x: composed.scaled_dot_product_attention(*x, **options | plain_options)) if plain else None,
        draw(some.subsets(4)),
        draw(some.SEEDS),
    )

"""The cases that each op of ``tinyllm.functional`` is proven on: one strategy per op, named like the op.

A strategy draws shapes, layouts and options, and returns the same computation in tinyllm and in torch.
"""

import numpy as np
import torch
import torch.nn.functional as TF
from hypothesis import strategies as st

from parity.ops import strategies as some
from parity.ops.attention import addresses, at_address, kept_weights, torch_attention, visible_keys
from parity.ops.cases import Case
from tinyllm import functional as F
from tinyllm import split
from tinyllm.backend.random import dropout_mask
from tinyllm.functional import composed

CASES: dict[str, st.SearchStrategy[Case]] = {}  # public op -> its cases, filled by ``register``


def register(strategy):
    """Decorator of a composite strategy: its cases are the proof of the op of the same name."""
    CASES[strategy.__name__] = st.composite(strategy)()
    return strategy


# ------------------------------------------------------- projections, norms and activations


@register
def linear(draw):
    lead, c_in, c_out = draw(some.shapes()), draw(st.integers(0, 5)), draw(st.integers(0, 5))
    inputs = [draw(some.arrays((*lead, c_in))), draw(some.arrays((c_out, c_in)))]
    if draw(st.booleans()):
        inputs.append(draw(some.arrays((c_out,))))
    label, needs = f"linear {lead} {c_in} -> {c_out}", draw(some.subsets(len(inputs)))
    return Case(label, inputs, F.linear, TF.linear, composed.linear, needs, draw(some.SEEDS))


@register
def embedding(draw):
    rows, channels = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(some.SEEDS))
    ids = rng.integers(0, rows, draw(some.shapes(min_side=1))).astype(draw(some.INTEGERS))
    given = draw(st.sampled_from([ids, ids.tolist()])) if ids.ndim else ids
    return Case(
        f"embedding of {given!r}",
        [draw(some.arrays((rows, channels)))],
        lambda w: F.embedding(given, w),
        lambda w: TF.embedding(torch.tensor(ids.astype(np.int64)), w),
        lambda w: composed.embedding(ids, w),
        seed=draw(some.SEEDS),
    )


@st.composite
def normalized_shapes(draw):
    """The last axes that a norm is over, and the form in which they are given."""
    channels = draw(st.sampled_from([(n,) for n in range(1, 7)] + [(2, 3), (1, 4), (3, 1, 2)]))
    return channels, draw(st.sampled_from([channels, list(channels), *channels * (len(channels) == 1)]))


@register
def layer_norm(draw):
    lead, (channels, shape) = draw(some.shapes()), draw(normalized_shapes())
    # With one channel x̂ is 0, and torch has a rounding error divided by sqrt(eps) instead.
    eps = draw(st.sampled_from([1e-5, 1e-6, 0.1] + [1e-12] * (channels[-1] > 1)))
    parts = draw(st.sampled_from(["", "w", "b", "wb"]))
    inputs = [
        draw(some.arrays((*lead, *channels), some.spread)),
        *(draw(some.arrays(channels)) for _ in parts),
    ]

    def call(function, normalized_shape):
        def op(x, *rest):
            given = dict(zip(parts, rest))
            return function(x, normalized_shape, given.get("w"), given.get("b"), eps)

        return op

    return Case(
        f"layer_norm {lead} of {shape}, x{parts}, eps={eps}",
        inputs,
        call(F.layer_norm, shape),
        call(TF.layer_norm, channels),
        call(composed.layer_norm, shape),
        draw(some.subsets(len(inputs))),
        draw(some.SEEDS),
    )


@register
def rms_norm(draw):
    lead, (channels, shape) = draw(some.shapes()), draw(normalized_shapes())
    eps, weighted = draw(st.sampled_from([None, 1e-5, 1e-12, 0.1])), draw(st.booleans())
    # Where all channels of a row are near 0, the gradient is too steep for a central difference.
    inputs = [draw(some.arrays((*lead, *channels), some.nonzero))]
    inputs += [draw(some.arrays(channels))] * weighted

    def call(function, normalized_shape):
        return lambda x, w=None: function(x, normalized_shape, w, eps)

    return Case(
        f"rms_norm {lead} of {shape}, weighted={weighted}, eps={eps}",
        inputs,
        call(F.rms_norm, shape),
        call(TF.rms_norm, channels),
        call(composed.rms_norm, shape),
        draw(some.subsets(len(inputs))),
        draw(some.SEEDS),
    )


@register
def relu(draw):
    x = draw(some.arrays(draw(some.shapes()), some.nonzero))  # at 0 a central difference gives 1/2
    return Case("relu", [x], F.relu, TF.relu, composed.relu, seed=draw(some.SEEDS))


@register
def silu(draw):
    x = draw(some.arrays(draw(some.shapes())))
    return Case("silu", [x], F.silu, TF.silu, composed.silu, seed=draw(some.SEEDS))


@register
def swiglu(draw):
    """Two arrays, or both halves of one projection, as views."""
    shape, of_one = draw(some.shapes(min_dims=1)), draw(st.booleans())
    wide = (*shape[:-1], 2 * shape[-1])

    def call(function):
        return (lambda x: function(*split(x, 2, axis=-1))) if of_one else function

    def torch_swiglu(*x):
        gate, up = x[0].chunk(2, -1) if of_one else x
        return TF.silu(gate) * up

    inputs = [draw(some.arrays(wide))] if of_one else [draw(some.arrays(shape)) for _ in range(2)]
    needs = draw(some.subsets(len(inputs)))
    label = f"swiglu {shape}{' of one projection' * of_one}"
    return Case(label, inputs, call(F.swiglu), torch_swiglu, call(composed.swiglu), needs, draw(some.SEEDS))


@register
def gelu(draw):
    approximate = draw(st.sampled_from(["none", "tanh"]))
    return Case(
        f"gelu {approximate}",
        [draw(some.arrays(draw(some.shapes())))],
        lambda x: F.gelu(x, approximate),
        lambda x: TF.gelu(x, approximate=approximate),
        composed.gelu if approximate == "tanh" else None,
        seed=draw(some.SEEDS),
    )


@register
def softmax(draw):
    shape = list(draw(some.shapes(min_dims=1)))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    return Case(
        f"softmax of {shape}, dim {dim}",
        [draw(some.arrays(shape))],
        lambda x: F.softmax(x, dim),
        lambda x: TF.softmax(x, dim),
        lambda x: composed.softmax(x, dim),
        seed=draw(some.SEEDS),
    )


# ---------------------------------------------------------------------------------- losses


@st.composite
def loss_options(draw, lead, classes, reductions):
    """Targets, some of them ignored, and the options of both losses."""
    rng = np.random.default_rng(draw(some.SEEDS))
    ignore_index = draw(st.sampled_from([-100, -1, 0, classes, 10_000]))
    target = rng.integers(0, classes, lead).astype(draw(st.sampled_from([np.int64, np.int32, np.int16])))
    target = np.where(rng.random(lead) < draw(st.sampled_from([0, 0.3])), ignore_index, target)
    divisors = [1, 7, 2.5, np.int64(3), np.float64(2.5)]  # a count is often a NumPy number
    if (target != ignore_index).any():
        divisors.append(None)
    reduction = draw(st.sampled_from(reductions))
    weight = draw(st.none() | st.just(0.5 + rng.random(classes)))
    return target, {
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": draw(st.sampled_from([0, 0.1, 1.0])),
        "num_targets": draw(st.sampled_from(divisors)) if reduction == "mean" else None,
    }


def torch_cross_entropy(logits, target, num_targets=None, weight=None, reduction="mean", **options):
    """torch has no num_targets: its sum, divided by ``num_targets``."""
    flat = torch.tensor(target.reshape(-1).astype(np.int64))
    options |= {"weight": None if weight is None else torch.tensor(weight)}
    options |= {"reduction": "sum" if num_targets is not None else reduction}
    loss = TF.cross_entropy(logits.reshape(len(flat), logits.shape[-1]), flat, **options)
    return loss.reshape(target.shape if reduction == "none" else ()) / float(num_targets or 1)


@register
def cross_entropy(draw):
    lead, classes = draw(some.shapes()), draw(st.integers(1, 6))
    target, options = draw(loss_options(lead, classes, ["mean", "mean", "sum", "none"]))
    return Case(
        f"cross_entropy {lead}, {classes} classes, {options}",
        [draw(some.arrays((*lead, classes)))],
        lambda x: F.cross_entropy(x, target, **options),
        lambda x: torch_cross_entropy(x, target, **options),
        # np.reshape cannot infer an axis (-1) of an empty array.
        (lambda x: composed.cross_entropy(x, target, **options)) if target.size else None,
        seed=draw(some.SEEDS),
    )


@register
def linear_cross_entropy(draw):
    lead, channels, classes = draw(some.shapes()), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    target, options = draw(loss_options(lead, classes, ["mean", "mean", "sum"]))
    inputs = [draw(some.arrays((*lead, channels))), draw(some.arrays((classes, channels)))]
    if draw(st.booleans()):
        inputs.append(draw(some.arrays((classes,))))

    def call(function):
        return lambda x, w, b=None: function(x, w, target, linear_bias=b, **options)

    return Case(
        f"linear_cross_entropy {lead}, {channels} -> {classes} classes, {options}",
        inputs,
        call(F.linear_cross_entropy),
        lambda x, w, b=None: torch_cross_entropy(TF.linear(x, w, b), target, **options),
        call(composed.linear_cross_entropy) if target.size else None,
        draw(some.subsets(len(inputs))),
        draw(some.SEEDS),
    )


# --------------------------------------------------------------------- dropout and attention


@register
def dropout(draw):
    """torch multiplies by the same mask."""
    shape, p, training = (
        draw(some.shapes()),
        draw(st.sampled_from([0, 0.1, 0.5, 0.999, 1])),
        draw(st.booleans()),
    )
    address = draw(addresses())
    mask = dropout_mask(address, shape, p, like=np.ones(1)) if training else np.ones(shape)
    return Case(
        f"dropout {shape}, p={p}, training={training}, address {address}",
        [draw(some.arrays(shape))],
        at_address(address, lambda x: F.dropout(x, p, training)),
        lambda x: x * torch.tensor(mask),
        at_address(address, lambda x: composed.dropout(x, p, training)),
        seed=draw(some.SEEDS),
    )


@st.composite
def attention_masks(draw, shape):
    """None, booleans or numbers to add (including -inf); some queries have no visible key."""
    kind = draw(st.sampled_from([None, bool, float]))
    if kind is None:
        return None
    rng = np.random.default_rng(draw(some.SEEDS))
    shape = draw(st.sampled_from([shape, (1, *shape[1:]), shape[2:], (shape[0], 1, 1, shape[3])]))
    visible = rng.random(shape) < draw(st.sampled_from([0.3, 0.8]))
    return visible if kind is bool else np.where(visible, rng.standard_normal(shape), -np.inf)


@st.composite
def attention_of_three_arrays(draw):
    (B, G, T, S), D, E = (
        (draw(st.integers(1, n)) for n in (2, 3, 7, 7)),
        *(draw(st.integers(0, 4)) for _ in "DE"),
    )
    R = draw(st.sampled_from([1, 1, 2, 4]))  # query heads per key-value head; 4: more than QUERY_BLOCK
    H = G * R
    mask = draw(attention_masks((B, H, T, S)))
    options = {"is_causal": draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.3]))}
    gqa = {"enable_gqa": R > 1 or draw(st.booleans())}
    p, address = draw(st.sampled_from([0, 0, 0.4])), draw(addresses())
    q, k, v = (draw(some.arrays(shape)) for shape in [(B, H, T, D), (B, G, S, D), (B, G, S, E)])
    kept = kept_weights(q, k, options | gqa | {"attn_mask": mask}, p, address) if p else None

    def call(function):
        def op(q, k, v):
            own = mask.astype(q.dtype) if mask is not None and mask.dtype != bool else mask
            return function(q, k, v, attn_mask=own, dropout_p=p, **options, **gqa)

        return at_address(address, op)

    every_query_has_a_key = visible_keys((B, H, T, S), mask, options["is_causal"]).any(-1).all()
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
def attention_of_one_buffer(draw):
    """Query, key and value are strided views of one array, and their gradients are added into one buffer."""
    B, T, H, D = (draw(st.integers(1, n)) for n in (2, 7, 3, 4))

    def call(function):
        def op(x):
            qkv = x.reshape(B, T, 3, H, D).swapaxes(1, 3)  # (B, H, 3, T, D)
            return function(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)

        return op

    return Case(
        f"attention of views of one buffer, B={B} T={T} H={H} D={D}",
        [draw(some.arrays((B, T, 3 * H * D)))],
        call(F.scaled_dot_product_attention),
        call(torch_attention),
        call(composed.scaled_dot_product_attention),
        seed=draw(some.SEEDS),
    )


@st.composite
def attention_with_learned_biases(draw):
    """The mask is a Tensor of numbers with a gradient; inputs are (B, H, T, D), or one head as (B, T, D)."""
    B, G, T, S, D = (draw(st.integers(1, n)) for n in (2, 2, 7, 7, 3))
    H, is_causal = G * draw(st.sampled_from([1, 2])), draw(st.booleans())
    heads, shared = draw(st.sampled_from([((H,), (G,)), ((), ())]))
    scores = (B, *heads, T, S)
    bias = draw(st.sampled_from([scores, scores[1:], (1, *scores[1:]), (T, S), (1, S), (T, 1)]))
    shapes = [(B, *heads, T, D), (B, *shared, S, D), (B, *shared, S, 2), bias]
    p, address = draw(st.sampled_from([0, 0, 0.4])) if heads else 0, draw(addresses())
    inputs = [draw(some.arrays(shape)) for shape in shapes]
    options = {"is_causal": is_causal, "enable_gqa": True}
    kept = kept_weights(*inputs[:2], options | {"attn_mask": inputs[3]}, p, address) if p else None
    every_query_has_a_key = visible_keys(scores, None, is_causal).any(-1).all()
    plain = every_query_has_a_key and not p
    plain_options = {
        "enable_gqa": bool(heads)
    }  # it repeats heads along axis 1, which (B, T, D) does not have
    return Case(
        f"attention with learned biases {shapes}, causal={is_causal}, p={p} at {address}",
        inputs,
        at_address(address, lambda *x: F.scaled_dot_product_attention(*x, dropout_p=p, **options)),
        lambda *x: torch_attention(*x, is_causal=is_causal, kept=kept),
        (lambda *x: composed.scaled_dot_product_attention(*x, **options | plain_options)) if plain else None,
        draw(some.subsets(4)),
        draw(some.SEEDS),
    )


@register
def scaled_dot_product_attention(draw):
    cases = attention_of_three_arrays() | attention_of_one_buffer() | attention_with_learned_biases()
    return draw(cases)


@register
def rope(draw):
    """In torch, (a, b) is a complex number, multiplied by exp(i angle)."""
    B, H, T, half = (draw(st.integers(1, n)) for n in (3, 3, 7, 3))
    shape = draw(st.sampled_from([(T, half), (B, 1, T, half)]))  # the second: positions of each row
    angles = draw(some.arrays(shape))
    cos, sin = 1.5 * np.cos(angles), 1.5 * np.sin(angles)  # some models scale them

    def call(function):
        return lambda x: function(x, cos.astype(x.dtype), sin.astype(x.dtype))

    def torch_rope(x):
        rotated = torch.complex(*x.chunk(2, -1)) * torch.complex(torch.tensor(cos), torch.tensor(sin))
        return torch.cat([rotated.real, rotated.imag], -1)

    return Case(
        f"rope B={B} H={H} T={T} D={2 * half}, angles {angles.shape}",
        [draw(some.arrays((B, H, T, 2 * half)))],
        call(F.rope),
        torch_rope,
        call(composed.rope),
        seed=draw(some.SEEDS),
    )

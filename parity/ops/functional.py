"""The cases that each op of ``tinyllm.functional`` is proven on: one strategy per op, named like the op.

A strategy draws shapes, layouts and options, and returns the same computation in tinyllm and in torch.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as TF
from hypothesis import strategies as st

from parity.ops import attention_cases, losses
from parity.ops import strategies as some
from parity.ops.attention import addresses, at_address
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


register(losses.cross_entropy)
register(losses.linear_cross_entropy)

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
    offset = draw(st.sampled_from([0.0, 0.0, 1.0, -2.5]))
    # Where all channels of a row are near 0, the gradient is too steep for a central difference.
    inputs = [draw(some.arrays((*lead, *channels), some.nonzero))]
    inputs += [draw(some.arrays(channels))] * weighted

    def call(function, normalized_shape):
        return lambda x, w=None: function(x, normalized_shape, w, eps, offset)

    def torch_rms_norm(x, w=None):
        return TF.rms_norm(x, channels, None if w is None else w + offset, eps)

    return Case(
        f"rms_norm {lead} of {shape}, weighted={weighted}, eps={eps}, offset={offset}",
        inputs,
        call(F.rms_norm, shape),
        torch_rms_norm,
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


@st.composite
def gated(draw, ours, activation, plain):
    """Two arrays, or both halves of one projection, as views."""
    shape, of_one = draw(some.shapes(min_dims=1)), draw(st.booleans())
    wide = (*shape[:-1], 2 * shape[-1])

    def call(function):
        return (lambda x: function(*split(x, 2, axis=-1))) if of_one else function

    def theirs(*x):
        gate, up = x[0].chunk(2, -1) if of_one else x
        return activation(gate) * up

    inputs = [draw(some.arrays(wide))] if of_one else [draw(some.arrays(shape)) for _ in range(2)]
    needs = draw(some.subsets(len(inputs)))
    label = f"{plain.__name__} {shape}{' of one projection' * of_one}"
    return Case(label, inputs, call(ours), theirs, call(plain), needs, draw(some.SEEDS))


@register
def swiglu(draw):
    return draw(gated(F.swiglu, TF.silu, composed.swiglu))


@register
def geglu(draw):
    return draw(gated(F.geglu, partial(TF.gelu, approximate="tanh"), composed.geglu))


@register
def softcap(draw):
    x, cap = draw(some.arrays(draw(some.shapes()))), draw(st.sampled_from([0.3, 1, 30.0, np.float64(2)]))
    return Case(
        f"softcap {x.shape} at {cap}",
        [x],
        lambda x: F.softcap(x, cap),
        lambda x: cap * torch.tanh(x / cap),
        lambda x: composed.softcap(x, float(cap)),
        seed=draw(some.SEEDS),
    )


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


@register
def scaled_dot_product_attention(draw):
    cases = (
        attention_cases.of_three_arrays()
        | attention_cases.of_one_buffer()
        | attention_cases.with_learned_biases()
    )
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

"""The language model's own ops: against torch.nn.functional, against themselves written plainly, at extremes.

``CASES`` holds one strategy per op; the four checks of ``parity.ops.cases`` run over all of them, with the
ops' block sizes so small that a few rows make many blocks. What needs the real sizes is further down.
"""

import importlib
import inspect
import math
import pkgutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from support.ops import (
    addresses,
    at_address,
    attend,
    both_dtypes,
    caught,
    kept_weights,
    leaf,
    normal,
    place_of_error,
    scale_one_gradient,
    small_blocks,
    torch_attention,
    torch_value_and_gradient,
    value_and_gradient,
    visible_keys,
)
from support.suite import proven

from parity.ops import strategies as some
from parity.ops.cases import (
    Case,
    check_composed,
    check_direction,
    check_float32,
    check_torch,
    run,
)
from tinyllm import Tensor, functional, manual_seed, no_grad, split
from tinyllm import functional as F
from tinyllm.backend import threads
from tinyllm.backend.random import dropout_mask, next_address
from tinyllm.errors import Error
from tinyllm.functional import attention, composed, losses

# ---------------------------------------------------------------------- ops without dropout


@st.composite
def linear(draw):
    lead, c_in, c_out = draw(some.shapes()), draw(st.integers(0, 5)), draw(st.integers(0, 5))
    inputs = [draw(some.arrays((*lead, c_in))), draw(some.arrays((c_out, c_in)))]
    if draw(st.booleans()):
        inputs.append(draw(some.arrays((c_out,))))
    label, needs = f"linear {lead} {c_in} -> {c_out}", draw(some.subsets(len(inputs)))
    return Case(label, inputs, F.linear, TF.linear, composed.linear, needs, draw(some.SEEDS))


@st.composite
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
def layer_norm(draw):
    lead, channels = draw(some.shapes()), draw(st.integers(1, 6))
    shape = draw(st.sampled_from([channels, (channels,), [channels]]))
    # One channel's norm is 0, where torch has a rounding error divided by sqrt(eps).
    eps = draw(st.sampled_from([1e-5, 1e-6, 0.1] + [1e-12] * (channels > 1)))
    parts = draw(st.sampled_from(["", "w", "b", "wb"]))
    inputs = [
        draw(some.arrays((*lead, channels), some.spread)),
        *(draw(some.arrays((channels,))) for _ in parts),
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
        call(TF.layer_norm, (channels,)),
        call(composed.layer_norm, shape),
        draw(some.subsets(len(inputs))),
        draw(some.SEEDS),
    )


@st.composite
def rms_norm(draw):
    lead, channels = draw(some.shapes()), draw(st.integers(1, 6))
    shape = draw(st.sampled_from([channels, (channels,), [channels]]))
    eps, weighted = draw(st.sampled_from([None, 1e-5, 1e-12, 0.1])), draw(st.booleans())
    # A row whose channels are all near 0 is steep: no central difference would follow it.
    inputs = [draw(some.arrays((*lead, channels), some.nonzero))]
    inputs += [draw(some.arrays((channels,)))] * weighted

    def call(function, normalized_shape):
        return lambda x, w=None: function(x, normalized_shape, w, eps)

    return Case(
        f"rms_norm {lead} of {shape}, weighted={weighted}, eps={eps}",
        inputs,
        call(F.rms_norm, shape),
        call(TF.rms_norm, (channels,)),
        call(composed.rms_norm, shape),
        draw(some.subsets(len(inputs))),
        draw(some.SEEDS),
    )


@st.composite
def silu(draw):
    x = draw(some.arrays(draw(some.shapes())))
    return Case("silu", [x], F.silu, TF.silu, composed.silu, seed=draw(some.SEEDS))


@st.composite
def swiglu(draw):
    """Two arrays, or both halves of one product, as views."""
    shape, of_one = draw(some.shapes(min_dims=1)), draw(st.booleans())
    wide = (*shape[:-1], 2 * shape[-1])

    def call(function):
        return (lambda x: function(*split(x, 2, axis=-1))) if of_one else function

    def torch_swiglu(*x):
        gate, up = x[0].chunk(2, -1) if of_one else x
        return TF.silu(gate) * up

    inputs = [draw(some.arrays(wide))] if of_one else [draw(some.arrays(shape)) for _ in range(2)]
    needs = draw(some.subsets(len(inputs)))
    label = f"swiglu {shape}{' of one product' * of_one}"
    return Case(label, inputs, call(F.swiglu), torch_swiglu, call(composed.swiglu), needs, draw(some.SEEDS))


@st.composite
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


@st.composite
def softmax(draw):
    shape = list(draw(some.shapes(min_dims=1)))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] = max(1, shape[dim])
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
def loss_options(draw, lead, classes):
    """Targets, some of them ignored, and the options of both losses."""
    rng = np.random.default_rng(draw(some.SEEDS))
    ignore_index = draw(st.sampled_from([-100, -1, 0, classes, 10_000]))
    target = rng.integers(0, classes, lead).astype(draw(st.sampled_from([np.int64, np.int32, np.int16])))
    target = np.where(rng.random(lead) < draw(st.sampled_from([0, 0.3])), ignore_index, target)
    divisors = [1, 7, 2.5, np.int64(3), np.float64(2.5)]  # NumPy's too: a count is often one
    if (target != ignore_index).any():
        divisors.append(None)
    return target, {"ignore_index": ignore_index, "num_targets": draw(st.sampled_from(divisors))}


def torch_cross_entropy(logits, target, ignore_index=-100, num_targets=None):
    """torch has no num_targets: the sum, divided by it, or by the number of targets that count."""
    flat = torch.tensor(target.reshape(-1).astype(np.int64))
    total = TF.cross_entropy(
        logits.reshape(len(flat), logits.shape[-1]), flat, ignore_index=ignore_index, reduction="sum"
    )
    return total / float((target != ignore_index).sum() if num_targets is None else num_targets)


@st.composite
def cross_entropy(draw):
    lead, classes = draw(some.shapes()), draw(st.integers(1, 6))
    target, options = draw(loss_options(lead, classes))
    return Case(
        f"cross_entropy {lead}, {classes} classes, {options}",
        [draw(some.arrays((*lead, classes)))],
        lambda x: F.cross_entropy(x, target, **options),
        lambda x: torch_cross_entropy(x, target, **options),
        # np.reshape cannot infer an axis (-1) of no elements.
        (lambda x: composed.cross_entropy(x, target, **options)) if target.size else None,
        seed=draw(some.SEEDS),
    )


@st.composite
def linear_cross_entropy(draw):
    lead, channels, classes = draw(some.shapes()), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    target, options = draw(loss_options(lead, classes))
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


@st.composite
def dropout(draw):
    """The torch twin is handed the same mask."""
    shape, p, training = draw(some.shapes()), draw(st.sampled_from([0, 0.1, 0.5, 0.9])), draw(st.booleans())
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
    """None, booleans or numbers to add (-inf among them); some rows see nothing."""
    kind = draw(st.sampled_from([None, bool, float]))
    if kind is None:
        return None
    rng = np.random.default_rng(draw(some.SEEDS))
    shape = draw(st.sampled_from([shape, (1, *shape[1:]), shape[2:], (shape[0], 1, 1, shape[3])]))
    visible = rng.random(shape) < draw(st.sampled_from([0.3, 0.8]))
    return visible if kind is bool else np.where(visible, rng.standard_normal(shape), -np.inf)


@st.composite
def attentions(draw):
    (B, G, T, S), D, E = (
        (draw(st.integers(1, n)) for n in (2, 3, 7, 7)),
        *(draw(st.integers(1, 4)) for _ in "DE"),
    )
    R = draw(st.sampled_from([1, 1, 2, 4]))  # query heads to a key-value head; 4: more than QUERY_BLOCK
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

    every_query_sees = visible_keys((B, H, T, S), mask, options["is_causal"]).any(-1).all()
    return Case(
        f"attention B={B} H={H} G={G} T={T} S={S} D={D} E={E}, {options}, mask={mask!r}, p={p} at {address}",
        [q, k, v],
        call(F.scaled_dot_product_attention),
        lambda q, k, v: torch_attention(q, k, v, mask, kept=kept, **options),
        # Written plainly there is one block, and so another mask: a test of its own below.
        call(composed.scaled_dot_product_attention) if every_query_sees and not p else None,
        draw(some.subsets(3)),
        draw(some.SEEDS),
    )


@st.composite
def attention_of_one_buffer(draw):
    """Query, key and value are strided views of one product, and their gradients land in one buffer."""
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
def rope(draw):
    """In torch, (a, b) is a complex number, multiplied by exp(i angle)."""
    B, H, T, half = (draw(st.integers(1, n)) for n in (3, 3, 7, 3))
    shape = draw(st.sampled_from([(T, half), (B, 1, T, half)]))  # the second: rows have their own positions
    angles = draw(some.arrays(shape))
    cos, sin = 1.5 * np.cos(angles), 1.5 * np.sin(angles)  # some models scale them

    def call(function):
        return lambda x: function(x, cos.astype(x.dtype), sin.astype(x.dtype))

    def torch_rope(x):
        turned = torch.complex(*x.chunk(2, -1)) * torch.complex(torch.tensor(cos), torch.tensor(sin))
        return torch.cat([turned.real, turned.imag], -1)

    return Case(
        f"rope B={B} H={H} T={T} D={2 * half}, angles {angles.shape}",
        [draw(some.arrays((B, H, T, 2 * half)))],
        call(F.rope),
        torch_rope,
        call(composed.rope),
        seed=draw(some.SEEDS),
    )


CASES = {
    "linear": linear(),
    "embedding": embedding(),
    "layer_norm": layer_norm(),
    "rms_norm": rms_norm(),
    "gelu": gelu(),
    "silu": silu(),
    "swiglu": swiglu(),
    "softmax": softmax(),
    "dropout": dropout(),
    "scaled_dot_product_attention": attentions() | attention_of_one_buffer(),
    "rope": rope(),
    "cross_entropy": cross_entropy(),
    "linear_cross_entropy": linear_cross_entropy(),
}

# ------------------------------------------------------------------------- the four checks

every_op = pytest.mark.parametrize("op", CASES)


@proven("op", CASES)
@given(data=st.data())
def test_value_and_gradients_are_torchs(op, data):
    with small_blocks():
        check_torch(data.draw(CASES[op]))


@every_op
@given(data=st.data())
def test_the_gradient_is_the_derivative_along_a_random_direction(op, data):
    with small_blocks():
        check_direction(data.draw(CASES[op]))


@every_op
@given(data=st.data())
def test_the_fused_op_is_the_composed_one(op, data):
    with small_blocks():
        check_composed(data.draw(CASES[op].filter(lambda case: case.composed)))


@every_op
@given(data=st.data())
def test_float32_stays_float32_and_close_to_float64(op, data):
    with small_blocks():
        check_float32(data.draw(CASES[op]))


@every_op
@given(data=st.data())
def test_one_thread_and_four_give_the_same_bits(op, data):
    with small_blocks(), ThreadPoolExecutor(4) as pool, pytest.MonkeyPatch.context() as patch:
        case = data.draw(CASES[op])
        patch.setattr(threads._Workers, "pool", pool)
        patch.setattr(threads, "num_threads", lambda: 1)
        out, grads, _ = run(case.ours, case)
        patch.setattr(threads, "num_threads", lambda: 4)
        same_out, same_grads, _ = run(case.ours, case)
    for one, four in zip([out, *grads], [same_out, *same_grads]):
        np.testing.assert_array_equal(one, four)


@pytest.mark.parametrize("position", [0, -1])
@every_op
def test_a_gradient_off_by_one_part_in_a_hundred_million_is_caught(op, position, monkeypatch):
    scale_one_gradient(monkeypatch, position, 1 + 1e-8)
    with small_blocks():
        find(CASES[op], caught, settings=settings(phases=[Phase.generate]))  # raises if no example is caught


def test_every_public_op_has_a_case_and_is_written_plainly():
    assert set(functional.__all__) == set(CASES)
    assert all(callable(getattr(composed, name)) for name in functional.__all__)


# -------------------------------------------------------------------- the real block sizes


@pytest.mark.parametrize(
    "H, T, S, is_causal, p",
    [
        (2, 300, 300, True, 0),
        (2, 130, 290, True, 0),
        (1, 290, 40, True, 0),
        (3, 260, 257, False, 0),
        (2, 270, 270, True, 0.3),
    ],
)
def test_attention_beyond_one_block_of_queries(H, T, S, is_causal, p):
    q, k, v = normal(1, H, T, 4), normal(1, H, S, 4, seed=1), normal(1, H, S, 3, seed=2)
    address = (5, 6, 7, 0)
    kept = kept_weights(q, k, {"is_causal": is_causal}, p, address) if p else None
    case = Case(
        f"attention H={H} T={T} S={S} is_causal={is_causal} p={p}",
        [q, k, v],
        at_address(address, lambda *x: F.scaled_dot_product_attention(*x, dropout_p=p, is_causal=is_causal)),
        lambda *x: torch_attention(*x, is_causal=is_causal, kept=kept),
    )
    assert T > attention.QUERY_BLOCK
    check_torch(case)


@pytest.mark.parametrize("rows, classes", [(losses.CHUNK + 9, 5), (4, losses.COLUMNS + 7)])
def test_losses_beyond_one_chunk_of_rows_or_columns(rows, classes):
    target = np.random.default_rng(0).integers(0, classes, rows)
    target[::3] = -100
    x, w, b = normal(rows, 3), normal(classes, 3, seed=1), normal(classes, seed=2)
    check_torch(
        Case(
            f"linear_cross_entropy, {rows} rows of {classes}",
            [x, w, b],
            lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b),
            lambda x, w, b: torch_cross_entropy(TF.linear(x, w, b), target),
        )
    )
    logits = x @ w.T
    ours, theirs = lambda x: F.cross_entropy(x, target), lambda x: torch_cross_entropy(x, target)
    check_torch(Case("cross_entropy", [logits], ours, theirs))


@pytest.mark.parametrize(
    "op",
    [
        lambda x, w: F.gelu(x, "tanh"),
        lambda x, w: F.gelu(x),
        lambda x, w: F.silu(x),
        lambda x, w: F.swiglu(x, x * 2),
        lambda x, w: F.layer_norm(x, 7, w, w),
        lambda x, w: F.layer_norm(x, 7),
        lambda x, w: F.rms_norm(x, 7, w),
    ],
)
def test_what_is_recomputed_is_what_was_computed(op):
    """To the last bit, and in another array: the first is not kept. Without gradients it is."""
    x, w = (Tensor(normal(*shape).astype(np.float32), requires_grad=True) for shape in ((2, 5, 7), (7,)))
    with small_blocks():
        y = op(x, w)
        again = y.saved()()
        with no_grad():
            z = op(x, w)
    assert again is not y.data and again.shape == y.shape and again.tobytes() == y.data.tobytes()
    assert z.saved()() is z.data and z.data.tobytes() == y.data.tobytes()
    assert x.saved()() is x.data


def test_elementwise_ops_beyond_one_block():
    shape = (3, threads.BLOCK // 2 + 5)
    for ours, theirs in [
        (lambda x: F.gelu(x, "tanh"), lambda x: TF.gelu(x, approximate="tanh")),
        (F.gelu, TF.gelu),
        (lambda x: F.layer_norm(x, shape[1]), lambda x: TF.layer_norm(x, shape[1:])),
        (lambda x: F.rms_norm(x, shape[1]), lambda x: TF.rms_norm(x, shape[1:])),
        (F.silu, TF.silu),
        (lambda x: F.swiglu(x, x * 2), lambda x: TF.silu(x) * x * 2),
    ]:
        check_torch(Case("beyond one block", [normal(*shape)], ours, theirs))


def test_linear_cross_entropy_is_torchs_op_of_that_name():
    target = np.array([1, 4, -100, 0])
    check_torch(
        Case(
            "linear_cross_entropy",
            [normal(4, 3), normal(5, 3, seed=1)],
            lambda x, w: F.linear_cross_entropy(x, w, target),
            lambda x, w: TF.linear_cross_entropy(x, w, torch.tensor(target)),
        )
    )


def test_targets_and_ids_may_be_lists():
    logits = Tensor(normal(2, 5))
    assert F.cross_entropy(logits, [1, 2]).item() == F.cross_entropy(logits, np.array([1, 2])).item()
    assert F.cross_entropy(Tensor(normal(5)), 3).shape == ()


# --------------------------------------------------------------------------------- dropout


def test_dropout_keeps_the_share_it_says():
    """Within five standard deviations of a mean of 200,000 draws; kept elements are scaled by 1/(1 - p)."""
    n = 200_000
    for p in (0.1, 0.5, 0.9):
        mask = dropout_mask((1, 2, 3, 4), (1, n), p, like=np.ones(1))[0]
        assert set(np.unique(mask)) == {0, 1 / (1 - p)}
        assert abs((mask > 0).mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
        neighbours = (mask[1:] > 0) & (mask[:-1] > 0)  # independent: both are kept with (1 - p)²
        both = (1 - p) ** 2
        assert abs(neighbours.mean() - both) < 5 * math.sqrt(3 * both * (1 - both) / n)


def test_every_part_of_an_address_gives_another_mask_and_the_same_address_the_same():
    parts = [((0, 0, 0, 0), None), ((0, 0, 0, 0), 1)]
    parts += [((1, 0, 0, 0), None), ((0, 1, 0, 0), None), ((0, 0, 1, 0), None), ((0, 0, 0, 1), None)]
    n = 100_000

    def kept_at(address, part):
        return dropout_mask(address, (1, n), 0.5, like=np.ones(1), part=part)[0] > 0

    kept = [kept_at(*part) for part in parts]
    for i, one in enumerate(kept):
        np.testing.assert_array_equal(one, kept_at(*parts[i]))
        for other in kept[:i]:  # independent masks agree in half their elements
            assert abs((one == other).mean() - 0.5) < 5 * math.sqrt(0.25 / n)


@pytest.mark.parametrize("width", [1, 5, 16, 33])
def test_a_batch_divided_into_micro_batches_drops_the_same_elements(width):
    """Rows of the global batch address the bits: of activations, and of attention's weights."""
    x = Tensor(np.ones((6, 3, width)))
    q = Tensor(normal(6, 2, 5, 4))

    def dropped(rows):
        manual_seed(3, 2, rows.start)
        activations = F.dropout(x[rows], 0.5).data
        attended = F.scaled_dot_product_attention(q[rows], q[rows], q[rows], dropout_p=0.5, is_causal=True)
        return activations, attended.data

    whole = dropped(slice(0, 6))
    for size in (1, 2, 4):
        parts = [dropped(slice(first, min(first + size, 6))) for first in range(0, 6, size)]
        for one, several in zip(whole, zip(*parts)):
            np.testing.assert_array_equal(np.concatenate(several), one)


def test_manual_seed_starts_the_numbering_of_ops_again():
    x = Tensor(np.ones((50, 50)))

    def two(*address):
        manual_seed(*address)
        return F.dropout(x).data, F.dropout(x).data

    first, second = two(3)
    assert (first != second).any()
    np.testing.assert_array_equal(two(3), (first, second))
    for other in ((4,), (3, 1), (3, 0, 1)):
        assert (two(*other)[0] != first).any()


def test_dropout_outside_training_is_the_input_and_uses_no_address():
    x = Tensor(np.ones(3))
    manual_seed(1)
    assert F.dropout(x, 0.5, training=False) is x and F.dropout(x, 0.0) is x
    F.scaled_dot_product_attention(*[Tensor(np.ones((1, 1, 1, 1)))] * 3)
    assert next_address() == (1, 0, 0, 0)


def test_attention_dropout_keeps_its_share_and_no_two_blocks_share_a_mask():
    B, H, T, p = 2, 5, 40, 0.3
    with small_blocks():
        q, k = normal(B, H, T, 2), normal(B, H, T, 2, seed=1)
        kept = kept_weights(q, k, {}, p, (1, 2, 3, 0)) > 0  # (B, H, T, S)
    rows = kept.reshape(-1, T)
    assert abs(kept.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.size)
    assert len(np.unique(rows, axis=0)) == len(rows)  # 400 rows of 40: a chance of 1e-4 that two agree


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_dropout_is_the_composed_one_where_there_is_one_head_and_block(is_causal):
    shape, address = (1, 1, 20, 4), (1, 2, 0, 1)

    def call(function):
        return at_address(address, lambda *x: function(*x, dropout_p=0.4, is_causal=is_causal))

    inputs = [normal(*shape, seed=i) for i in range(3)]
    ours, plain = call(F.scaled_dot_product_attention), call(composed.scaled_dot_product_attention)
    check_composed(Case("attention with dropout", inputs, ours, None, plain))


# ------------------------------------------------------------------------- extreme values


HUGE_LOGITS = np.array(
    [[1e4, -1e4, 0, 1], [-1e4, -1e4, -1e4, -1e4 - 1], [1e4, 1e4, 1e4 - 1, -1e4], [3, 1, 2, 1e4]]
)


@both_dtypes
def test_softmax_of_logits_of_ten_thousand(dtype, close):
    """The largest is subtracted exactly, so a probability is off by its own rounding and exp's only."""
    x, weights = HUGE_LOGITS.astype(dtype), np.arange(4)
    out, grad = value_and_gradient(lambda x: F.softmax(x) * weights, x)
    reference = torch_value_and_gradient(lambda x: x.softmax(-1) * torch.tensor(weights), x)
    np.testing.assert_allclose(out, reference[0], rtol=0, atol=3 * close)
    np.testing.assert_allclose(grad, reference[1], rtol=0, atol=3 * close)


@both_dtypes
@pytest.mark.parametrize("target", [[1, 3, 3, 0], [0, 0, 0, 3], [-100, 3, -100, 3]])
def test_cross_entropy_of_logits_of_ten_thousand(dtype, close, target):
    """A loss of 2e4 is off by roundings of 2e4; the gradient, at most 1, by roundings of 1."""
    x, target = HUGE_LOGITS.astype(dtype), np.array(target)
    reference, reference_grad = torch_value_and_gradient(lambda x: torch_cross_entropy(x, target), x)
    identity = np.eye(4, dtype=dtype)
    for function in (
        lambda x: F.cross_entropy(x, target),
        lambda x: F.linear_cross_entropy(x, Tensor(identity), target),
    ):
        out, grad = value_and_gradient(function, x)
        np.testing.assert_allclose(out, reference, rtol=close, atol=close)
        np.testing.assert_allclose(grad, reference_grad, rtol=0, atol=close)


@both_dtypes
def test_attention_with_scores_of_ten_thousand(dtype, close):
    """Scores of 1e4 carry roundings of 1e4 into exp: a weight may be off by 1e4 times the precision."""
    q, k, v = (normal(1, 2, 5, 4, seed=i).astype(dtype) for i in range(3))
    q *= 100
    k *= 100
    leaves = [Tensor(a, requires_grad=True) for a in (q, k, v)]
    F.scaled_dot_product_attention(*leaves, is_causal=True).backward(np.ones_like(v))
    theirs = [torch.tensor(a.astype(np.float64), requires_grad=True) for a in (q, k, v)]
    torch_attention(*theirs, is_causal=True).sum().backward()
    for ours, reference, scale in zip(leaves, theirs, (100, 100, 1)):
        np.testing.assert_allclose(ours.grad, reference.grad.numpy(), rtol=0, atol=1e4 * close * scale)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["boolean", "-inf", "causal, more queries than keys", "no keys"])
def test_a_query_that_sees_nothing_gets_zeros_and_gives_none(kind, dtype):
    T, S = 5, {"causal, more queries than keys": 3, "no keys": 0}.get(kind, 5)
    blind = [0, 1, 2, 3, 4] if kind == "no keys" else [0, 1]  # these queries see nothing
    visible = np.ones((T, S), bool)
    visible[blind] = False
    mask = {"boolean": visible, "-inf": np.where(visible, 0, -np.inf).astype(dtype)}.get(kind)
    q, k, v = (Tensor(normal(1, 2, n, 4, seed=n).astype(dtype), requires_grad=True) for n in (T, S, S))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind.startswith("causal"))
    out.backward(np.ones_like(out.data))
    assert (out.data[:, :, blind] == 0).all() and (q.grad[:, :, blind] == 0).all()
    assert (out.data[:, :, 2:] != 0).all() or kind == "no keys"
    assert all(np.isfinite(x.grad).all() and x.grad.shape == x.shape for x in (q, k, v))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_mask_of_the_lowest_number_is_a_mask(dtype):
    """Many programs add finfo.min instead of -inf: such a key gets no weight if another is visible."""
    q, k, v = (Tensor(normal(1, 1, 4, 2, seed=i).astype(dtype)) for i in range(3))
    visible = np.tri(4, dtype=bool)
    numbers = np.where(visible, 0, np.finfo(dtype).min).astype(dtype)
    by_number = F.scaled_dot_product_attention(q, k, v, attn_mask=numbers)
    np.testing.assert_array_equal(
        by_number.data, F.scaled_dot_product_attention(q, k, v, attn_mask=visible).data
    )


def test_layer_norm_of_rows_far_from_zero():
    """A mean of 1e4 carries a rounding of 1e4 · 6e-8 into every element: 1e-3 of a row of unit variance."""
    x = (normal(20, 64) + 1e4).astype(np.float32)
    weights = normal(20, 64, seed=1)
    out, grad = value_and_gradient(lambda x: F.layer_norm(x, 64) * weights.astype(x.dtype), x)
    wide, wide_grad = value_and_gradient(lambda x: F.layer_norm(x, 64) * weights, x.astype(np.float64))
    bound = 1e4 * 2**-23 * np.abs(weights).max()
    np.testing.assert_allclose(out, wide, rtol=0, atol=bound)
    np.testing.assert_allclose(grad, wide_grad, rtol=0, atol=bound)
    reference = torch_value_and_gradient(lambda x: TF.layer_norm(x, (64,)) * torch.tensor(weights), x)
    np.testing.assert_allclose(wide, reference[0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(wide_grad, reference[1], rtol=0, atol=1e-10)


@both_dtypes
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_far_from_zero(approximate, dtype, close):
    x = np.array([-1e4, -100, -10, -5, 0, 5, 10, 100, 1e4], dtype)
    out, grad = value_and_gradient(lambda x: F.gelu(x, approximate), x)
    reference, reference_grad = torch_value_and_gradient(lambda x: TF.gelu(x, approximate=approximate), x)
    np.testing.assert_allclose(out, reference, rtol=close, atol=close)
    np.testing.assert_allclose(grad, reference_grad, rtol=close, atol=close)
    assert out[0] == 0 and out[-1] == x[-1] and grad[0] == 0 and grad[-1] == 1


# ---------------------------------------------------------------------------------- errors


def turn(x, angles, dtype=np.float64):
    return F.rope(leaf(*x), np.ones(angles, dtype), np.ones(angles, dtype))


ERRORS = {  # what is done -> what the sentence must say: the value, and the remedy
    "an unknown gelu": (lambda: F.gelu(leaf(2), "erf"), ["'erf'", "'none' or 'tanh'"]),
    "dropout of everything": (lambda: F.dropout(leaf(2), 1.0), ["1.0", "below 1"]),
    "negative dropout": (lambda: F.dropout(leaf(2), -0.1), ["-0.1", "at least 0"]),
    "attention without heads": (lambda: attend(q=(2, 2, 4)), ["(2, 2, 4)", "(B, H, T, D)"]),
    "attention of other sizes": (
        lambda: attend(k=(1, 1, 3, 5)),
        ["(1, 1, 2, 4)", "(1, 1, 3, 5)", "(1, 1, 3, 4)"],
    ),
    "attention of other heads": (
        lambda: attend(k=(1, 2, 3, 4), v=(1, 2, 3, 4)),
        ["(1, 1, 2, 4)", "(1, 2, 3, 4)"],
    ),
    "shared heads that nobody asked for": (
        lambda: attend(q=(1, 4, 2, 4), k=(1, 2, 3, 4), v=(1, 2, 3, 4)),
        ["(1, 4, 2, 4)", "(1, 2, 3, 4)", "enable_gqa=True"],
    ),
    "heads that cannot be shared": (
        lambda: attend(q=(1, 3, 2, 4), k=(1, 2, 3, 4), v=(1, 2, 3, 4), enable_gqa=True),
        ["(1, 3, 2, 4)", "(1, 2, 3, 4)"],
    ),
    "rope of an odd head size": (lambda: turn((1, 2, 3, 5), (3, 2)), ["(1, 2, 3, 5)", "even"]),
    "rope without heads": (lambda: turn((2, 3, 4), (3, 2)), ["(2, 3, 4)", "(B, H, T, D)"]),
    "rope with the angles of other positions": (
        lambda: turn((1, 2, 3, 4), (4, 2)),
        ["(3, 2) or (1, 1, 3, 2)", "not (4, 2)"],
    ),
    "rope with angles in another dtype": (
        lambda: turn((1, 2, 3, 4), (3, 2), np.float32),
        ["float64", "not in float32"],
    ),
    "swiglu of two shapes": (lambda: F.swiglu(leaf(2, 3), leaf(3)), ["(2, 3)", "(3,)", "same shape"]),
    "rms_norm of other channels": (
        lambda: F.rms_norm(leaf(2, 3), 4),
        ["rms_norm", "4", "(2, 3)", "last axis"],
    ),
    "an integer attention mask": (
        lambda: attend(attn_mask=np.ones((2, 3), int)),
        ["int64", "boolean", "float64"],
    ),
    "attention dropout of 1.5": (lambda: attend(dropout_p=1.5), ["1.5", "below 1"]),
    "linear of other channels": (lambda: F.linear(leaf(2, 3), leaf(5, 4)), ["(2, 3)", "(5, 4)", "(out, in)"]),
    "an attention mask that gets no gradient": (lambda: attend(attn_mask=leaf(2, 3)), ["Tensor", ".data"]),
    "an attention mask of another shape": (
        lambda: attend(attn_mask=np.ones((3, 2))),
        ["(3, 2)", "(1, 1, 2, 3)"],
    ),
    "weights of another shape": (
        lambda: F.cross_entropy(leaf(2, 3), np.array([0, 1]), weights=np.ones(3)),
        ["(3,)", "(2,)"],
    ),
    "linear of a number": (lambda: F.linear(leaf(), leaf(5, 4)), ["()", "(5, 4)"]),
    "an id that is too large": (lambda: F.embedding(np.array([0, 5]), leaf(5, 2)), ["5", "0 to 4"]),
    "a negative id": (lambda: F.embedding([[1, -1]], leaf(5, 2)), ["-1", "0 to 4"]),
    "an id that is no integer": (lambda: F.embedding(np.array([0.5]), leaf(5, 2)), ["0.5", "integer"]),
    "layer_norm of other channels": (lambda: F.layer_norm(leaf(2, 3), 4), ["4", "(2, 3)", "last axis"]),
    "layer_norm over two axes": (
        lambda: F.layer_norm(leaf(4, 2, 3), (2, 3)),
        ["(2, 3)", "(4, 2, 3)", "last axis"],
    ),
    "targets of another shape": (
        lambda: F.cross_entropy(leaf(2, 3), np.array([1])),
        ["(1,)", "(2, 3)", "(2,)"],
    ),
    "a target that is no class": (lambda: F.cross_entropy(leaf(2, 3), np.array([1, 3])), ["3", "0 to 2"]),
    "a negative target": (lambda: F.cross_entropy(leaf(2, 3), np.array([1, -1])), ["-1", "0 to 2"]),
    "nothing but ignored targets": (
        lambda: F.cross_entropy(leaf(1, 3), np.array([-100])),
        ["no target counts", "-100"],
    ),
    "no targets": (lambda: F.cross_entropy(leaf(0, 3), np.array([], int)), ["no target counts"]),
    "a divisor of 0": (
        lambda: F.cross_entropy(leaf(1, 3), np.array([0]), num_targets=0),
        ["num_targets", "positive", "0"],
    ),
    "a head of other channels": (
        lambda: F.linear_cross_entropy(leaf(2, 3), leaf(5, 4), np.array([0, 1])),
        ["(2, 3)", "(5, 4)"],
    ),
    "targets of another shape at the head": (
        lambda: F.linear_cross_entropy(leaf(2, 3), leaf(5, 3), np.array([0])),
        ["(1,)", "(2,)"],
    ),
    "a target that the head has not": (
        lambda: F.linear_cross_entropy(leaf(1, 3), leaf(5, 3), np.array([5])),
        ["5", "0 to 4"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_the_value_and_the_remedy(name):
    call, words = ERRORS[name]
    with pytest.raises(Error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_every_error_of_the_ops_is_raised_above():
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(functional.__path__, "tinyllm.functional.")
    ]
    places = {place_of_error(call) for call, _ in ERRORS.values()}
    for module in modules:
        raised = sum(path == module.__file__ for path, _ in places)
        assert raised == inspect.getsource(module).count("raise Error("), module.__name__


@pytest.mark.parametrize(
    "mask", [True, False, [[True]], [[True, False, True]], [[0.5, -1, 2]], 1.5, [[1, 2, 3]]]
)
def test_an_attention_mask_may_be_a_list_or_a_number(mask):
    for dtype in (np.float32, np.float64):
        q, k, v = (Tensor(normal(1, 2, T, 4, seed=T).astype(dtype)) for T in (2, 3, 3))
        as_array = np.asarray(mask) if np.asarray(mask).dtype == bool else np.asarray(mask, dtype)
        ours = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).data
        expected = F.scaled_dot_product_attention(
            q, k, v, attn_mask=np.broadcast_to(as_array, (1, 2, 2, 3))
        ).data
        assert ours.dtype == dtype and ours.tobytes() == expected.tobytes()


@given(data=st.data())
def test_weights_multiply_each_targets_loss(data):
    """As torch's losses without reduction, weighted, summed and divided."""
    rng = np.random.default_rng(data.draw(some.SEEDS))
    rows, classes = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    x, w, b = rng.standard_normal((rows, 4)), rng.standard_normal((classes, 4)), rng.standard_normal(classes)
    target = np.where(rng.random(rows) < 0.2, -100, rng.integers(0, classes, rows))
    weights = rng.random(rows) + 0.1
    num_targets = data.draw(st.none() | st.floats(0.5, 9))
    target[0] = 0

    def theirs(x, w, b):
        logits = TF.linear(x, w, b)
        losses = TF.cross_entropy(logits, torch.tensor(target), reduction="none") * torch.tensor(weights)
        return losses.sum() / (weights[target != -100].sum() if num_targets is None else num_targets)

    def ours(x, w, b, module=F):
        return module.cross_entropy(F.linear(x, w, b), target, num_targets=num_targets, weights=weights)

    def fused(x, w, b):
        options = dict(num_targets=num_targets, weights=weights)
        return F.linear_cross_entropy(x, w, target, linear_bias=b, **options)

    with small_blocks():
        for call in (ours, fused, lambda *inputs: ours(*inputs, module=composed)):
            check_torch(Case("cross_entropy with weights", [x, w, b], call, theirs))


@pytest.mark.parametrize("op", ["linear", "bias", "layer_norm", "attention", "linear_cross_entropy"])
def test_float32_and_float64_do_not_mix(op):
    x, wide = leaf(2, 2, dtype=np.float32), leaf(2, 2)
    four = {"dtype": np.float32}
    calls = {
        "linear": lambda: F.linear(x, wide),
        "bias": lambda: F.linear(x, leaf(2, 2, dtype=np.float32), leaf(2)),
        "layer_norm": lambda: F.layer_norm(x, 2, leaf(2)),
        "attention": lambda: F.scaled_dot_product_attention(
            leaf(1, 1, 2, 2, **four), leaf(1, 1, 2, 2), leaf(1, 1, 2, 2)
        ),
        "linear_cross_entropy": lambda: F.linear_cross_entropy(x, wide, np.array([0, 1])),
    }
    with pytest.raises(Error, match=r"float32.*float64|float64.*float32"):
        calls[op]()


def test_targets_and_weights_may_be_tensors_or_lists():
    x, target, weights = Tensor(normal(3, 4)), np.array([0, 3, 1]), np.array([1.0, 2.0, 0.5])
    expected = F.cross_entropy(x, target, weights=weights).data
    for form in (Tensor, list):
        assert F.cross_entropy(x, form(target), weights=form(weights)).data == expected


@pytest.mark.parametrize("num_targets", ["3", math.inf, math.nan, -1])
def test_a_loss_is_divided_by_a_number_above_0(num_targets):
    with pytest.raises(Error, match=f"num_targets must be positive, not {num_targets}"):
        F.cross_entropy(Tensor(normal(1, 4)), np.array([0]), num_targets=num_targets)

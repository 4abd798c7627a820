"""The ops of a language model: against torch, against their plain form, and at extreme values.

The checks of ``parity.ops.cases`` run on the cases of ``parity.ops.functional``, with block sizes so small
that a few rows make many blocks. Tests with the default block sizes follow.
"""

import importlib
import inspect
import math
import pkgutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from support.ops import (
    attend,
    both_dtypes,
    fails,
    keeping,
    leaf,
    normal,
    place_of_error,
    scale_one_gradient,
    small_blocks,
    torch_value_and_gradient,
    value_and_gradient,
)
from support.suite import proven

from parity.ops import strategies as some
from parity.ops.attention import at_address, kept_weights, torch_attention
from parity.ops.cases import Case, check_composed, check_direction, check_float32, check_torch, run
from parity.ops.functional import CASES
from parity.ops.losses import torch_cross_entropy
from tinyllm import Tensor, functional, manual_seed, no_grad
from tinyllm import functional as F
from tinyllm.backend import threads
from tinyllm.backend.random import dropout_mask, next_address, rounded
from tinyllm.errors import Error
from tinyllm.functional import attention, composed, losses

# ------------------------------------------------------------------------ checks of every op

every_op = pytest.mark.parametrize("op", CASES)


@proven("op", CASES)
@given(data=st.data())
def test_output_and_gradients_match_torch(op, data):
    with small_blocks():
        check_torch(data.draw(CASES[op]))


@every_op
@given(data=st.data())
def test_gradient_matches_directional_derivative(op, data):
    with small_blocks():
        check_direction(data.draw(CASES[op]))


@every_op
@given(data=st.data())
def test_fused_op_matches_plain_form(op, data):
    with small_blocks():
        check_composed(data.draw(CASES[op].filter(lambda case: case.composed)))


@every_op
@given(data=st.data())
def test_float32_results_are_float32_and_close_to_float64(op, data):
    with small_blocks():
        check_float32(data.draw(CASES[op]))


@every_op
@given(data=st.data())
def test_one_and_four_threads_are_bitwise_identical(op, data):
    with small_blocks(), pytest.MonkeyPatch.context() as patch:
        case = data.draw(CASES[op])
        patch.setattr(threads, "num_threads", lambda: 1)
        out, grads, _ = run(case.ours, case)
        patch.setattr(threads, "num_threads", lambda: 4)
        same_out, same_grads, _ = run(case.ours, case)
    for one, four in zip([out, *grads], [same_out, *same_grads]):
        np.testing.assert_array_equal(one, four)


@every_op
@settings(max_examples=20)
@given(data=st.data())
def test_what_is_kept_equals_what_is_computed_again(op, data):
    with small_blocks():
        case = data.draw(CASES[op])
        with keeping(everything=True):
            out, grads, _ = run(case.ours, case)
        with keeping(everything=False):
            same_out, same_grads, _ = run(case.ours, case)
    np.testing.assert_allclose(same_out, out, rtol=1e-13, atol=1e-14)
    for kept, again in zip(grads, same_grads):
        if kept is not None:
            close = 1e-13 * max(1, np.abs(kept).max(initial=0))
            np.testing.assert_allclose(again, kept, rtol=1e-12, atol=close)


@pytest.mark.parametrize("position", [0, -1])
@every_op
def test_relative_gradient_error_of_1e_8_is_detected(op, position, monkeypatch):
    scale_one_gradient(monkeypatch, position, 1 + 1e-8)
    with small_blocks():
        find(CASES[op], fails, settings=settings(phases=[Phase.generate]))  # raises if every example passes


@pytest.mark.parametrize("op", sorted({*functional.__all__, *CASES}))
def test_public_op_has_cases_and_plain_form(op):
    assert op in functional.__all__, f"{op} has cases, but functional/__init__.py does not export it"
    assert op in CASES, f"{op} is not proven: add a strategy named {op} to parity/ops/functional.py"
    assert hasattr(composed, op), f"{op} has no plain form: add one to functional/composed.py"


# ---------------------------------------------------------------------- default block sizes


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
def test_attention_over_several_blocks_of_queries(H, T, S, is_causal, p):
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
def test_losses_over_several_chunks_of_rows_or_columns(rows, classes):
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
        lambda x, w: F.geglu(x, x * 2),
        lambda x, w: F.softcap(x, 2.0),
        lambda x, w: F.layer_norm(x, 7, w, w),
        lambda x, w: F.layer_norm(x, 7),
        lambda x, w: F.rms_norm(x, 7, w),
        lambda x, w: F.rms_norm(x, 7, w, offset=1.0),
    ],
)
def test_recomputed_output_is_bitwise_identical(op):
    """With gradients it is recomputed into another array; without them the first array is kept."""
    x, w = (Tensor(normal(*shape).astype(np.float32), requires_grad=True) for shape in ((2, 5, 7), (7,)))
    with small_blocks(), keeping(everything=False):
        y = op(x, w)
        again = y.saved()()
        with no_grad():
            z = op(x, w)
    assert again is not y.data and again.shape == y.shape and again.tobytes() == y.data.tobytes()
    assert z.saved()() is z.data and z.data.tobytes() == y.data.tobytes()
    assert x.saved()() is x.data


def test_elementwise_ops_over_several_blocks():
    shape = (3, threads.BLOCK // 2 + 5)
    for ours, theirs in [
        (lambda x: F.gelu(x, "tanh"), lambda x: TF.gelu(x, approximate="tanh")),
        (F.gelu, TF.gelu),
        (lambda x: F.layer_norm(x, shape[1]), lambda x: TF.layer_norm(x, shape[1:])),
        (lambda x: F.rms_norm(x, shape[1]), lambda x: TF.rms_norm(x, shape[1:])),
        (F.silu, TF.silu),
        (lambda x: F.swiglu(x, x * 2), lambda x: TF.silu(x) * x * 2),
        (lambda x: F.geglu(x, x * 2), lambda x: TF.gelu(x, approximate="tanh") * x * 2),
        (lambda x: F.softcap(x, 2.0), lambda x: 2 * torch.tanh(x / 2)),
    ]:
        for everything in (True, False):
            with keeping(everything):
                check_torch(Case("several blocks", [normal(*shape)], ours, theirs))


@pytest.mark.parametrize("label_smoothing", [0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_matches_torch_op_of_the_same_name(reduction, label_smoothing):
    target, weight = np.array([1, 4, -100, 0]), np.array([1, 0.5, 2, 1, 3.0])
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    theirs = options | {"weight": torch.tensor(weight), "ignore_index": -100}
    check_torch(
        Case(
            "linear_cross_entropy",
            [normal(4, 3), normal(5, 3, seed=1)],
            lambda x, w: F.linear_cross_entropy(x, w, target, weight=weight, **options),
            lambda x, w: TF.linear_cross_entropy(x, w, torch.tensor(target), **theirs),
        )
    )


def test_sum_of_ignored_targets_is_0_as_in_torch():
    x, target = leaf(2, 3), np.array([-100, -100])
    loss = F.cross_entropy(x, target, reduction="sum", label_smoothing=0.1)
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


def test_targets_accept_lists_and_numbers():
    logits = Tensor(normal(2, 5))
    assert F.cross_entropy(logits, [1, 2]).item() == F.cross_entropy(logits, np.array([1, 2])).item()
    assert F.cross_entropy(Tensor(normal(5)), 3).shape == ()


# --------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [1e-9, 1e-5, 1e-3, 0.003, 0.1, 0.2, 1 / 3, 0.5, 0.9, 0.999, 0.9999, 0.99999])
def test_mean_of_a_dropout_mask_is_1_and_its_rate_is_p(p):
    """From the probability with which an element is dropped, a count of integers below a threshold."""
    bits, threshold, scale = rounded(p)
    rate = threshold / 2**bits
    assert (1 - rate) * scale == pytest.approx(1, abs=1e-15)
    assert abs(rate - p) <= (2**-33 if min(p, 1 - p) < 2**-8 else 2**-17)
    assert min(rate / p, (1 - rate) / (1 - p)) == pytest.approx(1, abs=0.2 if p == 1e-9 else 0.002)
    if p in (0.1, 0.2, 0.5, 0.9):  # the masks of earlier runs
        assert (bits, threshold) == (16, round(p * 65536))


@pytest.mark.parametrize("p", [1e-3, 0.999, 0.9999])
def test_rare_elements_are_dropped_or_kept_as_often_as_p_says(p):
    n, rate = 2_000_000, min(p, 1 - p)
    mask = dropout_mask((1, 2, 3, 4), (4, n // 4), p, like=np.ones(1))
    rare = (mask == 0) if p < 0.5 else (mask > 0)
    assert abs(rare.mean() - rate) < 5 * math.sqrt(rate / n)
    assert mask.mean() == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / n))


def test_dropout_of_everything_is_zero_and_has_a_zero_gradient():
    x = leaf(3, 4)
    y = F.dropout(x, 1)
    y.backward(np.ones((3, 4)))
    assert (y.data == 0).all() and (x.grad == 0).all()
    assert (attend(dropout_p=1).data == 0).all()


@pytest.mark.parametrize(
    "numbers", [(1.5,), (-1,), (True,), ("1",), (0, 2.0), (0, 0, -3), (2**64,), (0, 2**64)]
)
def test_manual_seed_refuses_what_is_not_a_whole_number_from_0(numbers):
    with pytest.raises(Error, match=r"whole number|below"):
        manual_seed(*numbers)


def test_dropout_keeps_a_fraction_of_1_minus_p():
    """Within five standard deviations of 200,000 elements; kept elements are scaled by 1/(1 - p)."""
    n = 200_000
    for p in (0.1, 0.5, 0.9):
        mask = dropout_mask((1, 2, 3, 4), (1, n), p, like=np.ones(1))[0]
        assert np.unique(mask) == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
        assert abs((mask > 0).mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
        neighbours = (mask[1:] > 0) & (mask[:-1] > 0)  # if independent, P(both kept) = (1 - p)²
        both = (1 - p) ** 2
        assert abs(neighbours.mean() - both) < 5 * math.sqrt(3 * both * (1 - both) / n)


def test_dropout_mask_depends_on_every_part_of_its_address():
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
def test_micro_batches_drop_the_same_elements_as_the_whole_batch(width):
    """Random bits are addressed by the row of the global batch, for activations and attention weights."""
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


def test_manual_seed_resets_the_op_counter():
    x = Tensor(np.ones((50, 50)))

    def two(*address):
        manual_seed(*address)
        return F.dropout(x).data, F.dropout(x).data

    first, second = two(3)
    assert (first != second).any()
    np.testing.assert_array_equal(two(3), (first, second))
    for other in ((4,), (3, 1), (3, 0, 1)):
        assert (two(*other)[0] != first).any()


def test_dropout_outside_training_returns_its_input_and_uses_no_address():
    x = Tensor(np.ones(3))
    manual_seed(1)
    assert F.dropout(x, 0.5, training=False) is x and F.dropout(x, 0.0) is x
    F.scaled_dot_product_attention(*[Tensor(np.ones((1, 1, 1, 1)))] * 3)
    assert next_address() == (1, 0, 0, 0)


def test_attention_dropout_keeps_a_fraction_of_1_minus_p_and_blocks_have_distinct_masks():
    B, H, T, p = 2, 5, 40, 0.3
    with small_blocks():
        q, k = normal(B, H, T, 2), normal(B, H, T, 2, seed=1)
        kept = kept_weights(q, k, {}, p, (1, 2, 3, 0)) > 0  # (B, H, T, S)
    rows = kept.reshape(-1, T)
    assert abs(kept.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.size)
    assert len(np.unique(rows, axis=0)) == len(rows)  # 400 rows of 40: two agree with probability 1e-4


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_dropout_matches_plain_form_for_one_head_and_block(is_causal):
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
def test_softmax_of_logits_of_1e4(dtype, close):
    """The maximum is subtracted exactly, so the only errors are the rounding of exp and of the quotient."""
    x, weights = HUGE_LOGITS.astype(dtype), np.arange(4)
    out, grad = value_and_gradient(lambda x: F.softmax(x) * weights, x)
    reference = torch_value_and_gradient(lambda x: x.softmax(-1) * torch.tensor(weights), x)
    np.testing.assert_allclose(out, reference[0], rtol=0, atol=3 * close)
    np.testing.assert_allclose(grad, reference[1], rtol=0, atol=3 * close)


@both_dtypes
@pytest.mark.parametrize("target", [[1, 3, 3, 0], [0, 0, 0, 3], [-100, 3, -100, 3]])
def test_cross_entropy_of_logits_of_1e4(dtype, close, target):
    """The rounding error is relative to 2e4 for the loss, and to 1 for the gradient."""
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
def test_attention_with_scores_of_1e4(dtype, close):
    """exp amplifies the rounding of scores of 1e4: a weight's error may be 1e4 times the precision."""
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
def test_query_without_visible_keys_has_zero_output_and_zero_gradient(kind, dtype):
    T, S = 5, {"causal, more queries than keys": 3, "no keys": 0}.get(kind, 5)
    blind = [0, 1, 2, 3, 4] if kind == "no keys" else [0, 1]  # queries without visible keys
    visible = np.ones((T, S), bool)
    visible[blind] = False
    mask = {"boolean": visible, "-inf": np.where(visible, 0, -np.inf).astype(dtype)}.get(kind)
    q, k, v = (Tensor(normal(1, 2, n, 4, seed=n).astype(dtype), requires_grad=True) for n in (T, S, S))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind.startswith("causal"))
    out.backward(np.ones_like(out.data))
    assert (out.data[:, :, blind] == 0).all() and (q.grad[:, :, blind] == 0).all()
    assert (out.data[:, :, 2:] != 0).all() or kind == "no keys"
    assert all(np.isfinite(x.grad).all() and x.grad.shape == x.shape for x in (q, k, v))


def test_mask_in_a_tensor_without_gradient_is_its_array():
    q, k, v = (Tensor(normal(1, 1, 4, 2, seed=i)) for i in range(3))
    for mask in (np.tri(4, dtype=bool), normal(4, 4), normal(1, 1, 1, 4)):
        ours = F.scaled_dot_product_attention(q, k, v, attn_mask=Tensor(mask))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        np.testing.assert_array_equal(ours.data, expected.data)


def test_learned_biases_of_one_query_get_a_gradient():
    q, k, v = (Tensor(normal(1, 2, n, 4, seed=n)) for n in (1, 5, 5))
    bias = leaf(2, 1, 5)
    F.scaled_dot_product_attention(q, k, v, attn_mask=bias).sum().backward()
    assert np.abs(bias.grad).max() > 0
    assert bias.grad.sum(axis=-1) == pytest.approx(0)  # adding a constant to a row changes nothing


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mask_of_finfo_min_masks_like_boolean_mask(dtype):
    """Many programs add finfo.min instead of -inf: such a key gets weight 0 if another key is visible."""
    q, k, v = (Tensor(normal(1, 1, 4, 2, seed=i).astype(dtype)) for i in range(3))
    visible = np.tri(4, dtype=bool)
    numbers = np.where(visible, 0, np.finfo(dtype).min).astype(dtype)
    by_number = F.scaled_dot_product_attention(q, k, v, attn_mask=numbers)
    np.testing.assert_array_equal(
        by_number.data, F.scaled_dot_product_attention(q, k, v, attn_mask=visible).data
    )


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("hidden", [-1e9, np.finfo(np.float64).min])
def test_query_whose_keys_are_all_hidden_by_a_number_has_gradients(hidden, kept, monkeypatch):
    """As of padding. All exp(-1e9) have a sum whose logarithm is -1e9, rounded; torch's fused op keeps it."""
    monkeypatch.setattr(attention, "is_kept", lambda shape, like: kept)
    mask = np.where(np.tri(5, 5, -2, dtype=bool), 0, hidden)  # every key of the first two queries
    inputs = [normal(1, 2, 5, 3, seed=i).round() for i in range(3)]  # integers, which -1e9 does not round
    ours = partial(F.scaled_dot_product_attention, attn_mask=mask, scale=1.0)
    case = Case(
        "hidden keys",
        inputs,
        ours,
        lambda q, k, v: (q @ k.mT + torch.tensor(mask)).softmax(-1) @ v,
    )
    check_torch(case)


def test_layer_norm_of_rows_far_from_zero():
    """Rounding a mean of 1e4 shifts every element by up to 1e4 · 6e-8, about 1e-3 of the unit deviation."""
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


def rotate(x, angles, dtype=np.float64):
    return F.rope(leaf(*x), np.ones(angles, dtype), np.ones(angles, dtype))


@pytest.mark.parametrize("name", [name for name in F.__all__ if name != "embedding"])
@pytest.mark.parametrize("array", [np.ones((2, 3)), [1.0, 2.0]], ids=["array", "list"])
def test_every_op_refuses_an_array_as_tensor(name, array):
    first, *others = inspect.signature(op := getattr(F, name)).parameters.values()
    others = {p.name: leaf(2, 3) for p in others if p.default is inspect.Parameter.empty}
    for call in (lambda: op(array, **others), lambda: op(**{first.name: array}, **others)):
        with pytest.raises(Error, match=f"^{name} takes Tensors, not {type(array).__name__}"):
            call()


ERRORS = {  # mistake -> (call, words in its message: the value and the remedy)
    "an unknown gelu": (lambda: F.gelu(leaf(2), "erf"), ["'erf'", "'none' or 'tanh'"]),
    "an exact gelu in plain form": (lambda: composed.gelu(leaf(2), "none"), ["'none'", "functional.gelu"]),
    "an input in NumPy's dtype": (
        lambda: F.linear(leaf(2, 3), leaf(5, 3).astype(np.float32)),
        ["linear cannot mix float64 and float32", "Tensor(x.astype(np.float32))", "default"],
    ),
    "a norm in two dtypes": (
        lambda: F.layer_norm(leaf(2, 3), 3, leaf(3).astype(np.float32)),
        ["layer_norm", "float64 and float32"],
    ),
    "negative dropout": (lambda: F.dropout(leaf(2), -0.1), ["-0.1", "between 0 and 1"]),
    "attention without an axis of heads": (
        lambda: attend(k=(1, 3, 4), v=(1, 3, 4)),
        ["(1, 1, 2, 4)", "(1, 3, 4)", "(B, H, T, D)", "(B, T, D)"],
    ),
    "attention with one axis of heads": (lambda: attend(q=(2, 2, 4)), ["(2, 1, 2, 4)", "(1, 1, 3, 4)"]),
    "attention with head sizes that differ": (
        lambda: attend(k=(1, 1, 3, 5)),
        ["(1, 1, 2, 4)", "(1, 1, 3, 5)", "(1, 1, 3, 4)"],
    ),
    "attention with head counts that differ": (
        lambda: attend(k=(1, 2, 3, 4), v=(1, 2, 3, 4)),
        ["(1, 1, 2, 4)", "(1, 2, 3, 4)"],
    ),
    "shared heads without enable_gqa": (
        lambda: attend(q=(1, 4, 2, 4), k=(1, 2, 3, 4), v=(1, 2, 3, 4)),
        ["(1, 4, 2, 4)", "(1, 2, 3, 4)", "enable_gqa=True"],
    ),
    "attention with batch sizes that differ": (
        lambda: attend(q=(2, 1, 2, 4)),
        ["(2, 1, 2, 4)", "(1, 1, 3, 4)"],
    ),
    "heads that cannot be shared": (
        lambda: attend(q=(1, 3, 2, 4), k=(1, 2, 3, 4), v=(1, 2, 3, 4), enable_gqa=True),
        ["(1, 3, 2, 4)", "(1, 2, 3, 4)"],
    ),
    "values of one head": (lambda: attend((1, 2, 2, 4), (1, 2, 3, 4), (1, 1, 3, 4)), ["do not fit"]),
    "values of one row": (lambda: attend((2, 2, 2, 4), (2, 2, 3, 4), (1, 2, 3, 4)), ["do not fit"]),
    "rope of an odd head size": (lambda: rotate((1, 2, 3, 5), (3, 2)), ["(1, 2, 3, 5)", "even"]),
    "rope without an axis of heads": (lambda: rotate((2, 3, 4), (3, 2)), ["(2, 3, 4)", "(B, H, T, D)"]),
    "rope with angles of another length": (
        lambda: rotate((1, 2, 3, 4), (4, 2)),
        ["(3, 2) or (1, 1, 3, 2)", "not (4, 2)"],
    ),
    "rope with angles in another dtype": (
        lambda: rotate((1, 2, 3, 4), (3, 2), np.float32),
        ["float64", "not in float32"],
    ),
    "rope with a cos in another dtype": (
        lambda: F.rope(leaf(1, 2, 3, 4), np.ones((3, 2), np.float32), np.zeros((3, 2))),
        ["not in float32 and float64"],
    ),
    "rope with a sin in another dtype": (
        lambda: F.rope(leaf(1, 2, 3, 4), np.ones((3, 2)), np.zeros((3, 2), np.float32)),
        ["not in float64 and float32"],
    ),
    "gelu of integers": (lambda: F.gelu(Tensor(np.arange(3))), ["gelu of int64", "astype()"]),
    "layer_norm of integers": (lambda: F.layer_norm(Tensor(np.arange(3)), 3), ["layer_norm of int64"]),
    "cross_entropy of integers": (
        lambda: F.cross_entropy(input=Tensor(np.ones((2, 3), int)), target=[0, 1]),
        ["cross_entropy of int64"],
    ),
    "dropout of booleans": (lambda: F.dropout(Tensor(np.ones(3, bool)), 0.5), ["dropout of bool"]),
    "swiglu of two shapes": (lambda: F.swiglu(leaf(2, 3), leaf(3)), ["(2, 3)", "(3,)", "same shape"]),
    "geglu of two shapes": (lambda: F.geglu(leaf(2, 3), leaf(3)), ["geglu", "(2, 3)", "(3,)", "same shape"]),
    "a cap of 0": (lambda: F.softcap(leaf(2, 3), 0), ["softcap", "0", "positive"]),
    "a cap that is not a number": (lambda: F.softcap(leaf(2, 3), "30"), ["softcap", "'30'", "positive"]),
    "no cap": (lambda: F.softcap(leaf(2, 3), None), ["softcap is None: choose a positive finite number"]),
    "a negative cap in the loss": (
        lambda: F.linear_cross_entropy(leaf(2, 3), leaf(5, 3), [0, 1], softcap=-1.0),
        ["softcap", "-1.0", "positive"],
    ),
    "a cap and label smoothing": (
        lambda: F.linear_cross_entropy(leaf(2, 3), leaf(5, 3), [0, 1], softcap=3.0, label_smoothing=0.1),
        ["label_smoothing", "cross_entropy(softcap(linear("],
    ),
    "rms_norm of the wrong size": (
        lambda: F.rms_norm(leaf(2, 3), 4),
        ["rms_norm", "(4,)", "(2, 3)", "last axes"],
    ),
    "an integer attention mask": (
        lambda: attend(attn_mask=np.ones((2, 3), int)),
        ["int64", "boolean", "float64"],
    ),
    "a window of 0": (lambda: attend(is_causal=True, window=0), ["window is 0", "at least 1"]),
    "a window of 2.0": (lambda: attend(is_causal=True, window=2.0), ["window is 2.0", "whole number"]),
    "a window of two sides": (lambda: attend(window=2), ["window (2)", "is_causal=True"]),
    "a softcap of 0": (lambda: attend(softcap=0.0), ["softcap is 0.0", "positive"]),
    "an infinite softcap": (lambda: attend(softcap=math.inf), ["softcap is inf", "finite"]),
    "a softcap of True": (lambda: attend(softcap=True), ["softcap is True", "positive"]),
    "a dropout that is not a number": (lambda: F.dropout(leaf(2, 3), "0.1"), ["'0.1'", "between 0 and 1"]),
    "attention dropout of 1.5": (lambda: attend(dropout_p=1.5), ["1.5", "between 0 and 1"]),
    "linear of the wrong size": (lambda: F.linear(leaf(2, 3), leaf(5, 4)), ["(2, 3)", "(5, 4)", "(out, in)"]),
    "an attention mask of integers in a Tensor": (
        lambda: attend(attn_mask=Tensor(np.ones((2, 3), int))),
        ["int64", "boolean"],
    ),
    "an attention mask of another shape": (
        lambda: attend(attn_mask=np.ones((3, 2))),
        ["(3, 2)", "(1, 1, 2, 3)"],
    ),
    "weights of another shape": (
        lambda: F.cross_entropy(leaf(2, 3), np.array([0, 1]), weights=np.ones(3)),
        ["(3,)", "(2,)"],
    ),
    "class weights of another shape": (
        lambda: F.cross_entropy(leaf(2, 3), [0, 1], weight=np.ones(2)),
        ["(2,)", "(2, 3)"],
    ),
    "an unknown reduction": (
        lambda: F.cross_entropy(leaf(2, 3), [0, 1], reduction="max"),
        ["'max'", "'mean'", "'sum'", "'none'"],
    ),
    "a divisor of a sum": (
        lambda: F.cross_entropy(leaf(2, 3), [0, 1], reduction="sum", num_targets=2),
        ["'sum'", "num_targets"],
    ),
    "label smoothing above 1": (
        lambda: F.cross_entropy(leaf(2, 3), [0, 1], label_smoothing=1.1),
        ["1.1", "between 0 and 1"],
    ),
    "the head's losses one by one": (
        lambda: F.linear_cross_entropy(leaf(2, 3), leaf(5, 3), [0, 1], reduction="none"),
        ["'none'", "cross_entropy(linear("],
    ),
    "linear of a scalar": (lambda: F.linear(leaf(), leaf(5, 4)), ["()", "(5, 4)"]),
    "an id that is too large": (lambda: F.embedding(np.array([0, 5]), leaf(5, 2)), ["5", "0 to 4"]),
    "a negative id": (lambda: F.embedding([[1, -1]], leaf(5, 2)), ["-1", "0 to 4"]),
    "a negative number as id": (lambda: F.embedding(-1, leaf(5, 2)), ["-1", "0 to 4"]),
    "a negative id in a range": (lambda: F.embedding(range(-1, 1), leaf(5, 2)), ["ids[0] is -1", "0 to 4"]),
    "a boolean as id": (lambda: F.embedding([1, True], leaf(5, 2)), ["ids[1] is True", "integer"]),
    "a negative number as target": (lambda: F.cross_entropy(leaf(5), np.int64(-1)), ["-1", "0 to 4"]),
    "booleans as targets": (lambda: F.cross_entropy(leaf(2, 5), [True, False]), ["True", "integer"]),
    "None as targets": (lambda: F.cross_entropy(leaf(2, 5), None), ["NoneType", "integers"]),
    "an id that is not an integer": (lambda: F.embedding(np.array([0.5]), leaf(5, 2)), ["0.5", "integer"]),
    "layer_norm of the wrong size": (lambda: F.layer_norm(leaf(2, 3), 4), ["(4,)", "(2, 3)", "last axes"]),
    "layer_norm over other axes": (lambda: F.layer_norm(leaf(4, 2, 3), (4, 2)), ["(4, 2)", "(4, 2, 3)"]),
    "layer_norm over no axes": (lambda: F.layer_norm(leaf(2, 3), ()), ["()", "(2, 3)"]),
    "layer_norm of an empty axis": (lambda: F.layer_norm(leaf(2, 0), 0), ["(0,)", "(2, 0)"]),
    "layer_norm with a weight of all positions": (
        lambda: F.layer_norm(leaf(2, 4), 4, leaf(2, 4)),
        ["(2, 4)", "(4,)"],
    ),
    "layer_norm with one bias": (lambda: F.layer_norm(leaf(2, 4), 4, None, leaf(1)), ["(1,)", "(4,)"]),
    "rms_norm with one weight": (lambda: F.rms_norm(leaf(2, 4), 4, leaf(1)), ["(1,)", "(4,)"]),
    "linear with one bias": (lambda: F.linear(leaf(2, 4), leaf(3, 4), leaf(1)), ["(1,)", "(3, 4)"]),
    "linear with a bias per row": (lambda: F.linear(leaf(2, 4), leaf(3, 4), leaf(2, 3)), ["bias", "(2, 3)"]),
    "linear with a kernel": (lambda: F.linear(leaf(2, 4), leaf(3, 4, 1)), ["(3, 4, 1)", "(out, in)"]),
    "a head with a bias of another size": (
        lambda: F.linear_cross_entropy(leaf(1, 4), leaf(3, 4), [0], linear_bias=leaf(4)),
        ["(4,)", "(3, 4)"],
    ),
    "softmax over no axis": (lambda: F.softmax(leaf(2, 3), 2), ["(2, 3)", "2"]),
    "targets of another shape": (
        lambda: F.cross_entropy(leaf(2, 3), np.array([1])),
        ["(1,)", "(2, 3)", "(2,)"],
    ),
    "a target that is not a class": (lambda: F.cross_entropy(leaf(2, 3), np.array([1, 3])), ["3", "0 to 2"]),
    "a negative target": (lambda: F.cross_entropy(leaf(2, 3), np.array([1, -1])), ["-1", "0 to 2"]),
    "only ignored targets": (
        lambda: F.cross_entropy(leaf(1, 3), np.array([-100])),
        ["no target counts", "-100"],
    ),
    "no targets": (lambda: F.cross_entropy(leaf(0, 3), np.array([], int)), ["no target counts"]),
    "a divisor of 0": (
        lambda: F.cross_entropy(leaf(1, 3), np.array([0]), num_targets=0),
        ["num_targets", "positive", "0"],
    ),
    "a head of the wrong size": (
        lambda: F.linear_cross_entropy(leaf(2, 3), leaf(5, 4), np.array([0, 1])),
        ["(2, 3)", "(5, 4)"],
    ),
    "targets of another shape than the head's rows": (
        lambda: F.linear_cross_entropy(leaf(2, 3), leaf(5, 3), np.array([0])),
        ["(1,)", "(2,)"],
    ),
    "a target beyond the head's classes": (
        lambda: F.linear_cross_entropy(leaf(1, 3), leaf(5, 3), np.array([5])),
        ["5", "0 to 4"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_names_the_value_and_the_remedy(name):
    call, words = ERRORS[name]
    with pytest.raises(Error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
def test_enable_gqa_is_advised_only_where_it_helps(heads):
    H, G = heads
    for k in ((2, G, 3, 4), (1, G, 3, 5)):  # another batch, another size of a head
        with pytest.raises(Error) as caught:
            attend(q=(1, H, 2, 4), k=k, v=k)
        assert str(k) in str(caught.value) and "enable_gqa" not in str(caught.value)


def test_every_error_of_the_ops_is_tested():
    modules = [
        importlib.import_module(m.name)
        for m in pkgutil.iter_modules(functional.__path__, "tinyllm.functional.")
    ]
    places = {place_of_error(call) for call, _ in ERRORS.values()}
    for module in modules:
        raised = sum(path == module.__file__ for path, _ in places)
        assert raised == inspect.getsource(module).count("raise Error("), module.__name__


def test_ids_may_be_a_tensor():
    w, ids = leaf(5, 2), np.array([[1, 4], [0, 1]])
    np.testing.assert_array_equal(F.embedding(Tensor(ids), w).data, w.data[ids])
    with pytest.raises(Error, match="0 to 4"):
        F.embedding(Tensor(ids - 1), w)


@pytest.mark.parametrize(
    "mask", [True, False, [[True]], [[True, False, True]], [[0.5, -1, 2]], 1.5, [[1, 2, 3]]]
)
def test_attention_mask_accepts_lists_and_numbers(mask):
    for dtype in (np.float32, np.float64):
        q, k, v = (Tensor(normal(1, 2, T, 4, seed=T).astype(dtype)) for T in (2, 3, 3))
        as_array = np.asarray(mask) if np.asarray(mask).dtype == bool else np.asarray(mask, dtype)
        ours = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).data
        expected = F.scaled_dot_product_attention(
            q, k, v, attn_mask=np.broadcast_to(as_array, (1, 2, 2, 3))
        ).data
        assert ours.dtype == dtype and ours.tobytes() == expected.tobytes()


@given(data=st.data())
def test_weights_scale_the_loss_of_each_target(data):
    """Against torch's losses without reduction, weighted, summed and divided."""
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
def test_ops_reject_mixed_float32_and_float64(op):
    x, wide = leaf(2, 2, dtype=np.float32), leaf(2, 2)
    single = {"dtype": np.float32}
    calls = {
        "linear": lambda: F.linear(x, wide),
        "bias": lambda: F.linear(x, leaf(2, 2, dtype=np.float32), leaf(2)),
        "layer_norm": lambda: F.layer_norm(x, 2, leaf(2)),
        "attention": lambda: F.scaled_dot_product_attention(
            leaf(1, 1, 2, 2, **single), leaf(1, 1, 2, 2), leaf(1, 1, 2, 2)
        ),
        "linear_cross_entropy": lambda: F.linear_cross_entropy(x, wide, np.array([0, 1])),
    }
    with pytest.raises(Error, match=r"float32.*float64|float64.*float32"):
        calls[op]()


def test_targets_and_weights_accept_tensors_and_lists():
    x, target, weights = Tensor(normal(3, 4)), np.array([0, 3, 1]), np.array([1.0, 2.0, 0.5])
    expected = F.cross_entropy(x, target, weights=weights).data
    for form in (Tensor, list):
        assert F.cross_entropy(x, form(target), weights=form(weights)).data == expected


@pytest.mark.parametrize("num_targets", ["3", math.inf, math.nan, -1])
def test_num_targets_must_be_positive_and_finite(num_targets):
    with pytest.raises(Error, match=f"num_targets must be positive, not {num_targets}"):
        F.cross_entropy(Tensor(normal(1, 4)), np.array([0]), num_targets=num_targets)

"""Properties of Llama's ops beyond the comparison with torch: memory, invariances, extreme values."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from support.ops import (
    both_dtypes,
    keeping,
    normal,
    small_blocks,
    torch_value_and_gradient,
    value_and_gradient,
)

from parity.ops.attention import at_address, kept_weights, torch_attention
from parity.ops.cases import Case, assert_close, check_composed, check_torch
from tinyllm import Tensor, manual_seed, no_grad
from tinyllm import functional as F
from tinyllm.functional import attention, composed

# ------------------------------------------------------------------- grouped-query attention


@pytest.mark.parametrize(
    "H, G, T, S, is_causal, p",
    [
        (4, 2, 300, 300, True, 0),
        (6, 1, 130, 290, True, 0),  # multi-query attention, with a cache
        (4, 2, 290, 40, True, 0),
        (6, 2, 150, 257, False, 0),
        (4, 2, 270, 270, True, 0.3),
        (9, 3, 1, 600, True, 0),  # a decoding step
    ],
)
def test_shared_heads_over_several_blocks_of_queries(H, G, T, S, is_causal, p):
    q, k, v = normal(2, H, T, 4), normal(2, G, S, 4, seed=1), normal(2, G, S, 3, seed=2)
    address, options = (5, 6, 7, 0), dict(is_causal=is_causal, enable_gqa=True)
    kept = kept_weights(q, k, options, p, address) if p else None

    def attend(*inputs):
        return F.scaled_dot_product_attention(*inputs, dropout_p=p, **options)

    case = Case(
        f"attention H={H} G={G} T={T} S={S} is_causal={is_causal} p={p}",
        [q, k, v],
        at_address(address, attend),
        lambda *x: torch_attention(*x, is_causal=is_causal, kept=kept),
        lambda *x: composed.scaled_dot_product_attention(*x, **options),
    )
    check_torch(case)
    if p == 0 and not (is_causal and T > S):
        check_composed(case)


def test_query_heads_are_grouped_as_in_torch():
    """Heads 0, 1 and 2 use the first key-value head, heads 3, 4 and 5 the second: groups are consecutive."""
    q, k, v = (torch.tensor(normal(1, H, 5, 4, seed=H)) for H in (6, 2, 2))
    theirs = TF.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours = [Tensor(x.numpy()) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*ours, is_causal=True, enable_gqa=True)
    assert_close(out.data, theirs.numpy(), "shared heads")
    first = F.scaled_dot_product_attention(ours[0][:, :3], *(x[:, :1] for x in ours[1:]), enable_gqa=True,
                                           is_causal=True)  # fmt: skip
    assert_close(out.data[:, :3], first.data, "the first three heads", 1e-15)


def test_enable_gqa_without_shared_heads_is_bitwise_identical():
    inputs = [normal(2, 3, 40, 4, seed=i) for i in range(3)]
    upstream = normal(2, 3, 40, 4, seed=3)
    results = []
    for enable_gqa in (False, True):
        leaves = [Tensor(x, requires_grad=True) for x in inputs]
        attend = at_address((1, 2, 3, 0), F.scaled_dot_product_attention)
        out = attend(*leaves, dropout_p=0.2, is_causal=True, enable_gqa=enable_gqa)
        out.backward(upstream)
        results.append([out.data, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results):
        np.testing.assert_array_equal(one, other)


def test_heads_that_share_keys_have_distinct_dropout_masks():
    B, H, G, T, p = 2, 6, 2, 40, 0.3
    with small_blocks():
        q, k = normal(B, H, T, 2), normal(B, G, T, 2, seed=1)
        kept = kept_weights(q, k, {"enable_gqa": True}, p, (1, 2, 3, 0)) > 0  # (B, H, T, S)
    rows = kept.reshape(-1, T)
    assert abs(kept.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.size)
    assert len(np.unique(rows, axis=0)) == len(rows)  # 480 rows of 40: two agree with probability 1e-4


def test_dropout_of_shared_heads_does_not_depend_on_how_they_are_divided(monkeypatch):
    q, k = Tensor(normal(2, 6, 5, 3)), Tensor(normal(2, 2, 5, 3))

    def attended():
        manual_seed(1)
        return F.scaled_dot_product_attention(q, k, k, dropout_p=0.5, enable_gqa=True).data

    together = attended()
    monkeypatch.setattr(attention, "SCORES", 1)
    np.testing.assert_allclose(attended(), together, rtol=1e-14)


def peak_bytes(function):
    function()  # allocates what is created once, such as the thread pool
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_keys_and_values_are_never_repeated_in_memory():
    """One query of 32 heads over 5,000 keys of one head allocates scores and weights, no copy of K or V."""
    q, k, v = (Tensor(normal(1, H, T, 64).astype(np.float32)) for H, T in ((32, 1), (1, 5000), (1, 5000)))

    def step():
        with no_grad():
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    scores = 32 * 5000 * 4
    assert peak_bytes(step) < 1.2 * scores < k.data.nbytes  # repeated heads would take 32 times this
    grown, upstream = Tensor(k.data, requires_grad=True), np.ones(q.shape, np.float32)

    def forward_and_backward():
        F.scaled_dot_product_attention(q, grown, grown, is_causal=True, enable_gqa=True).backward(upstream)

    assert peak_bytes(forward_and_backward) < 4 * k.data.nbytes + 3 * scores  # dK, dV and a product for each


def test_block_of_shared_heads_has_query_block_rows():
    """With 4 query heads per key-value head, a block has a quarter of the positions of each."""
    rows = []
    matmul = np.matmul

    class Spy(np.ndarray):
        def __matmul__(self, other):
            rows.append(self.shape[-2])
            return matmul(np.asarray(self), np.asarray(other))

    q = Tensor(normal(1, 4, 2 * attention.QUERY_BLOCK, 8).view(Spy))
    k = Tensor(normal(1, 1, 2 * attention.QUERY_BLOCK, 8))
    with no_grad():
        F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert set(rows) == {attention.QUERY_BLOCK}


# ------------------------------------------------------------------------------------- rope


def angles(T, half, start=0):
    return (start + np.arange(T))[:, None] * 100.0 ** (-np.arange(half) / half)


def rotated(x, at):
    return F.rope(Tensor(x), np.cos(at), np.sin(at)).data


def test_rope_matches_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, at = normal(2, 3, 5, 8), normal(2, 1, 5, 8, seed=1), angles(5, 4)
    whole = torch.tensor(np.concatenate([at, at], axis=-1))[None]
    theirs = llama.apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k), whole.cos(), whole.sin())
    for mine, other in zip((q, k), theirs):
        assert_close(rotated(mine, at), other.numpy(), "rope")


def test_rope_pairs_channels_i_and_i_plus_half():
    x = np.zeros((1, 1, 1, 6))
    x[..., 1] = 1
    y = rotated(x, np.full((1, 3), math.pi / 2))
    np.testing.assert_allclose(y[0, 0, 0], [0, 0, 0, 0, 1, 0], atol=1e-15)


def test_product_of_rotated_vectors_depends_only_on_the_distance():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)
    products = [
        (rotated(q, angles(1, 4, t + 7)) * rotated(k, angles(1, 4, t))).sum() for t in (0, 1, 5, 1000)
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-11)
    assert abs(products[0] - (q * k).sum()) > 1e-2


def test_rope_gradient_is_the_inverse_rotation():
    x, at = Tensor(normal(2, 3, 5, 8), requires_grad=True), angles(5, 4)
    y = F.rope(x, np.cos(at), np.sin(at))
    np.testing.assert_allclose((y.data**2).sum(-1), (x.data**2).sum(-1), rtol=1e-14)
    y.backward(y.data)
    np.testing.assert_allclose(x.grad, x.data, rtol=0, atol=1e-14)


def test_rope_keeps_the_memory_order_of_the_projections():
    """q is a (B, H, T, D) view of an array (B, T, H, D). So is the result: swapping back copies nothing."""
    x = normal(2, 5, 3, 8).swapaxes(1, 2)
    assert rotated(x, angles(5, 4)).swapaxes(1, 2).flags.c_contiguous


# ---------------------------------------------------------------------- norm and activations


@both_dtypes
def test_rms_norm_of_rows_of_any_size(dtype, close):
    """Rows of 1e-3, 1 and 1e4 times unit scale are normalised to unit scale, up to eps."""
    size = np.array([[1e-3], [1.0], [1e4]])
    x, weights = (normal(3, 64) * size).astype(dtype), normal(3, 64, seed=1)
    out, grad = value_and_gradient(lambda x: F.rms_norm(x, 64, eps=1e-6) * weights.astype(x.dtype), x)
    reference = torch_value_and_gradient(lambda x: TF.rms_norm(x, (64,), eps=1e-6) * torch.tensor(weights), x)
    np.testing.assert_allclose(out, reference[0], rtol=0, atol=30 * close)
    np.testing.assert_allclose(grad * size, reference[1] * size, rtol=0, atol=30 * close)


def test_rms_norm_of_a_row_of_zeros():
    out, grad = value_and_gradient(lambda x: F.rms_norm(x, 4, eps=1e-4), np.zeros((1, 4)))
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_allclose(grad, 100)


def test_rms_norm_eps_defaults_to_machine_epsilon():
    for dtype in (np.float32, np.float64):
        x = np.full((1, 4), 1e-6, dtype)
        expected = x / np.sqrt(1e-12 + np.finfo(dtype).eps)
        for op in (F.rms_norm, composed.rms_norm):
            np.testing.assert_allclose(op(Tensor(x), 4).data, expected, rtol=1e-6)


FAR = [-1e4, -100, -10, -5, 0, 5, 10, 100, 1e4]


@both_dtypes
@pytest.mark.filterwarnings("error")
def test_silu_swiglu_and_geglu_far_from_zero(dtype, close):
    x = np.array(FAR, dtype)
    for ours, theirs in [
        (F.silu, TF.silu),
        (lambda x: F.swiglu(x, x), lambda x: TF.silu(x) * x),
        (lambda x: F.geglu(x, x), lambda x: TF.gelu(x, approximate="tanh") * x),
    ]:
        out, grad = value_and_gradient(ours, x)
        reference, reference_grad = torch_value_and_gradient(theirs, x)
        np.testing.assert_allclose(out, reference, rtol=2 * close, atol=close)
        np.testing.assert_allclose(grad, reference_grad, rtol=2 * close, atol=close)
    out, grad = value_and_gradient(F.silu, x)
    assert out[0] == 0 and out[-1] == x[-1] and grad[0] == 0 and grad[-1] == 1


@both_dtypes
@pytest.mark.filterwarnings("error")
def test_softcap_saturates_at_the_cap(dtype, close):
    x = np.array([*FAR, -np.inf, np.inf], dtype)
    out, grad = value_and_gradient(lambda x: F.softcap(x, 5.0), x)
    np.testing.assert_allclose(out, 5 * np.tanh(x / 5), rtol=2 * close, atol=0)
    np.testing.assert_allclose(grad, 1 - np.tanh(x.astype(np.float64) / 5) ** 2, rtol=0, atol=close)
    assert np.abs(out).max() <= 5 and out[4] == 0 and grad[4] == 1 and grad[0] == grad[-1] == 0


@both_dtypes
@pytest.mark.filterwarnings("error")
def test_the_capped_loss_of_huge_logits_is_finite(dtype, close):
    """Uncapped the loss would be 2e4; the gradient of a logit far beyond the cap is 0."""
    x, w, target = np.ones((1, 1), dtype), np.array([[1e4], [-1e4], [1]], dtype), np.array([1])
    out, grad = value_and_gradient(lambda x: F.linear_cross_entropy(x, Tensor(w), target, softcap=5.0), x)
    capped = np.array([5, -5, 5 * math.tanh(0.2)])
    p = np.exp(capped) / np.exp(capped).sum()
    np.testing.assert_allclose(out, -math.log(p[1]), rtol=2 * close)
    np.testing.assert_allclose(grad, [[p[2] * (1 - math.tanh(0.2) ** 2)]], rtol=10 * close)


COS = SIN = np.full((1000, 32), math.sqrt(0.5))  # of 45 degrees


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (lambda x, w: F.rms_norm(x, 512, w), [(1000, 512), (512,)]),  # recomputes x̂ in backward
        (lambda x, w: F.rms_norm(x, 512, w, offset=1.0), [(1000, 512), (512,)]),
        (F.swiglu, [(1000, 512), (1000, 512)]),  # recomputes σ
        (F.geglu, [(1000, 512), (1000, 512)]),
        (lambda x: F.softcap(x, 3.0), [(1000, 512)]),
        (lambda x: F.rope(x, COS, SIN), [(1, 8, 1000, 64)]),
    ],
    ids=["rms_norm", "offset rms_norm", "swiglu", "geglu", "softcap", "rope"],
)
def test_op_keeps_only_its_output_for_backward(op, shapes):
    tensors = [Tensor(normal(*shape), requires_grad=True) for shape in shapes]
    with keeping(everything=False):
        op(*tensors)
        tracemalloc.start()
        try:
            out = op(*tensors)
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert out.data.nbytes <= kept < 1.02 * out.data.nbytes

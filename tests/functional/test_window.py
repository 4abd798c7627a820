"""Attention in a window: what it reads, what it keeps, and its edges, beyond the comparison with torch."""

import tracemalloc

import numpy as np
import pytest
from support.ops import normal

from parity.ops.attention import at_address, kept_weights, torch_attention
from parity.ops.cases import Case, check_composed, check_torch
from tinyllm import Tensor, no_grad
from tinyllm import functional as F
from tinyllm.functional import attention, composed


@pytest.mark.parametrize(
    "H, G, T, S, window, p",
    [
        (2, 2, 300, 300, 40, 0),
        (4, 2, 300, 300, 150, 0),  # wider than a block
        (2, 1, 130, 290, 7, 0),  # with a cache
        (2, 2, 290, 40, 7, 0),
        (1, 1, 300, 300, 1, 0),
        (4, 2, 270, 270, 100, 0.3),
    ],
)
def test_window_over_several_blocks_of_queries(H, G, T, S, window, p):
    q, k, v = normal(2, H, T, 4), normal(2, G, S, 4, seed=1), normal(2, G, S, 3, seed=2)
    address, options = (5, 6, 7, 0), dict(is_causal=True, window=window, softcap=2.0)
    kept = kept_weights(q, k, options | {"enable_gqa": True}, p, address) if p else None

    def attend(*inputs):
        return F.scaled_dot_product_attention(*inputs, dropout_p=p, enable_gqa=True, **options)

    case = Case(
        f"attention H={H} G={G} T={T} S={S} window={window} p={p}",
        [q, k, v],
        at_address(address, attend),
        lambda *x: torch_attention(*x, kept=kept, **options),
        lambda *x: composed.scaled_dot_product_attention(*x, enable_gqa=True, **options),
    )
    check_torch(case)
    if p == 0 and T <= S:
        check_composed(case)


def test_wide_window_is_bitwise_identical_to_none():
    inputs = [normal(2, 3, 200, 4, seed=i) for i in range(3)]
    results = []
    for window in (None, 200, 10**9):
        leaves = [Tensor(x, requires_grad=True) for x in inputs]
        attend = at_address((1, 2, 3, 0), F.scaled_dot_product_attention)
        out = attend(*leaves, dropout_p=0.2, is_causal=True, window=window)
        out.backward(inputs[0])
        results.append([out.data, *(leaf.grad for leaf in leaves)])
    for one, *others in zip(*results):
        for other in others:
            np.testing.assert_array_equal(one, other)


def test_keys_outside_all_windows_are_never_read():
    """NaN there changes nothing, forward or backward, or in a decoding step."""
    T, S, window = 150, 400, 20
    q, k, v, g = normal(1, 2, T, 4), *(normal(1, 2, S, 4, seed=i) for i in (1, 2)), normal(1, 2, T, 4, seed=3)
    unseen = S - T - window + 1
    results = []
    for filler in (0.0, np.nan):
        k[:, :, :unseen] = v[:, :, :unseen] = filler
        leaves = [Tensor(x.copy(), requires_grad=True) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, window=window, softcap=3.0)
        out.backward(g)
        with no_grad():
            one = F.scaled_dot_product_attention(
                leaves[0][:, :, -1:], *leaves[1:], is_causal=True, window=window
            )
        results.append([out.data, one.data, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results):
        np.testing.assert_array_equal(one, other)
    dk, dv = results[1][-2:]
    assert not dk[:, :, :unseen].any() and not dv[:, :, :unseen].any()
    assert dk[:, :, unseen].all() and dv[:, :, unseen].all()  # the first key that is seen


def test_a_block_reads_the_window_of_its_first_query_to_its_last():
    shapes = []
    matmul = np.matmul

    class Spy(np.ndarray):
        def __matmul__(self, other):
            shapes.append((self.shape[-2], other.shape[-1]))
            return matmul(np.asarray(self), np.asarray(other))

    T, window = 3 * attention.QUERY_BLOCK, 50
    q, k = Tensor(normal(1, 1, T, 8).view(Spy)), Tensor(normal(1, 1, T, 8))
    with no_grad():
        F.scaled_dot_product_attention(q, k, k, is_causal=True, window=window)
    block = attention.QUERY_BLOCK
    assert sorted(shapes) == [(block, block), *2 * [(block, block + window - 1)]]


def test_memory_is_linear_in_the_length():
    def peak(T):
        leaves = [Tensor(normal(1, 1, T, 2, seed=i), requires_grad=True) for i in range(3)]
        tracemalloc.start()
        try:
            F.scaled_dot_product_attention(*leaves, is_causal=True, window=16, softcap=5.0).sum().backward()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # allocates what is created once, such as the thread pool
    short, long = peak(4_000), peak(16_000)
    assert long < 4.2 * short
    assert long < 16_000 * 8 * 20  # a full row of scores alone would be 16,000 numbers per query


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softcap_of_extreme_scores(dtype):
    """Scores of ±1e30 are ±c: finite weights, and a gradient of 0 rather than NaN."""
    q = Tensor(np.full((1, 1, 1, 1), 1e15, dtype), requires_grad=True)
    k = Tensor(np.array([1e15, -1e15, 0], dtype).reshape(1, 1, 3, 1), requires_grad=True)
    v = Tensor(np.eye(3, dtype=dtype)[None, None])
    out = F.scaled_dot_product_attention(q, k, v, softcap=2.0)
    expected = np.exp([2.0, -2.0, 0.0])
    np.testing.assert_allclose(out.data[0, 0, 0], expected / expected.sum(), rtol=1e-6)
    out.backward(np.array([1, 2, 3], dtype).reshape(out.shape))
    assert out.dtype == q.grad.dtype == dtype
    assert q.grad.item() == 0 and k.grad[0, 0, :2].tolist() == [[0], [0]] and k.grad[0, 0, 2, 0] != 0

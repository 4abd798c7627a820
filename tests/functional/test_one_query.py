"""Attention of a single query, a step of decoding, has a path of its own without a gradient."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm import Tensor
from tinyllm import functional as F


@settings(deadline=None)
@given(st.data())
def test_one_query_attends_as_many_do(data):
    """Without a gradient it has a path of its own; with one it takes that of any number of queries."""
    B, G, R, S, D, E = (data.draw(st.integers(1, most), label=name) for name, most in zip("BGRSDE", [3] * 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="seed"))
    q, k, v = (rng.standard_normal(shape) for shape in ((B, G * R, 1, D), (B, G, S, D), (B, G, S, E)))
    shape = data.draw(st.sampled_from([(B, G * R, 1, S), (B, 1, 1, S), (S,)]), label="mask of shape")
    kind = data.draw(st.sampled_from(["none", "boolean", "nothing is seen", "added"]), label="mask")
    mask = {
        "none": None,
        "boolean": rng.random(shape) < 0.6,
        "nothing is seen": np.zeros(shape, bool),
        "added": np.where(rng.random(shape) < 0.3, -np.inf, rng.standard_normal(shape)),
    }[kind]
    causal = data.draw(st.booleans(), label="causal")

    def attend(query):
        return F.scaled_dot_product_attention(
            query, Tensor(k), Tensor(v), mask, is_causal=causal, scale=0.7, enable_gqa=True
        )

    by_itself, recorded = attend(Tensor(q)), attend(Tensor(q, requires_grad=True))
    assert by_itself.node is None and recorded.node is not None
    assert by_itself.shape == (B, G * R, 1, E)
    np.testing.assert_allclose(by_itself.data, recorded.data, rtol=1e-13, atol=1e-14)

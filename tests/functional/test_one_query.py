"""Attention of a single query without a gradient, a decoding step, has a code path of its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm import Error, Tensor
from tinyllm import functional as F


@settings(deadline=None)
@given(st.data())
def test_one_query_matches_the_general_code_path(data):
    """With a gradient, one query takes the code path for any number of queries."""
    B, G, R, S, D, E = (data.draw(st.integers(1, most), label=name) for name, most in zip("BGRSDE", [3] * 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="seed"))
    q, k, v = (rng.standard_normal(shape) for shape in ((B, G * R, 1, D), (B, G, S, D), (B, G, S, E)))
    shape = data.draw(st.sampled_from([(B, G * R, 1, S), (B, 1, 1, S), (S,)]), label="mask of shape")
    kind = data.draw(st.sampled_from(["none", "boolean", "no visible key", "added"]), label="mask")
    mask = {
        "none": None,
        "boolean": rng.random(shape) < 0.6,
        "no visible key": np.zeros(shape, bool),
        "added": np.where(rng.random(shape) < 0.3, -np.inf, rng.standard_normal(shape)),
    }[kind]
    causal = data.draw(st.booleans(), label="causal")
    options = {
        "window": data.draw(st.none() | st.integers(1, 4), label="window") if causal else None,
        "softcap": data.draw(st.sampled_from([None, 0.7, 30]), label="softcap"),
    }

    def attend(query):
        return F.scaled_dot_product_attention(
            query, Tensor(k), Tensor(v), mask, is_causal=causal, scale=0.7, enable_gqa=True, **options
        )

    without_gradient, with_gradient = attend(Tensor(q)), attend(Tensor(q, requires_grad=True))
    assert without_gradient.node is None and with_gradient.node is not None
    assert without_gradient.shape == (B, G * R, 1, E)
    np.testing.assert_allclose(without_gradient.data, with_gradient.data, rtol=1e-13, atol=1e-14)


def test_a_scale_of_numpy_does_not_widen_float32():
    q, k, v = (Tensor(np.ones((1, 2, length, 4), np.float32)) for length in (1, 3, 3))
    out = F.scaled_dot_product_attention(q, k, v, scale=1 / np.sqrt(4))
    assert out.dtype == np.float32


@pytest.mark.parametrize("mixed", [0, 1, 2])
def test_one_query_of_two_dtypes_is_refused(mixed):
    inputs = [Tensor(np.ones((1, 1, 1, 2), np.float32 if i == mixed else np.float64)) for i in range(3)]
    with pytest.raises(Error, match="scaled_dot_product_attention cannot mix float"):
        F.scaled_dot_product_attention(*inputs)

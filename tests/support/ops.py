"""What the tests of ops share: small inputs, a fault in a gradient, and torch computing the same."""

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from hypothesis import strategies as st

from parity.ops import strategies as some
from parity.ops.cases import assert_close, check_torch
from tinyllm import Tensor, manual_seed
from tinyllm import functional as F
from tinyllm.backend import threads
from tinyllm.backend.random import next_address
from tinyllm.errors import Error
from tinyllm.functional import attention, losses
from tinyllm.tensor_ops import At

# -------------------------------------------------------------------- small inputs


def normal(*shape, seed=0):
    """Normal numbers, the same for the same seed."""
    return np.random.default_rng(seed).standard_normal(shape)


def leaf(*shape, dtype=np.float64):
    """Ones that ask for a gradient."""
    return Tensor(np.ones(shape, dtype), requires_grad=True)


def attend(q=(1, 1, 2, 4), k=(1, 1, 3, 4), v=(1, 1, 3, 4), **options):
    """Attention of ones, of these shapes."""
    return F.scaled_dot_product_attention(leaf(*q), leaf(*k), leaf(*v), **options)


# ------------------------------------------------------------ values and gradients

both_dtypes = pytest.mark.parametrize("dtype, close", [(np.float32, 1e-6), (np.float64, 1e-14)])


def value_and_gradient(function, x):
    """What ``function`` makes of x, and the gradient of its sum, both of the dtype of x."""
    leaf = Tensor(x, requires_grad=True)
    out = function(leaf)
    out.backward(np.ones_like(out.data))
    assert out.dtype == leaf.grad.dtype == x.dtype
    return out.data, leaf.grad


def torch_value_and_gradient(function, x):
    """The same with torch, in float64."""
    leaf = torch.tensor(x.astype(np.float64), requires_grad=True)
    out = function(leaf)
    out.sum().backward()
    return out.detach().numpy(), leaf.grad.numpy()


def place_of_error(call):
    """(file, line) of the ``raise`` that ends in ``call``."""
    with pytest.raises(Error) as caught:
        call()
    return str(caught.traceback[-1].path), caught.traceback[-1].lineno


# ----------------------------------------------------------- a fault in a gradient


def scale_one_gradient(monkeypatch, position, factor):
    """From here on, gradient ``position`` (of those an op returns) comes out ``factor`` times as large."""
    honest = Tensor.from_op

    def wrong(data, parents, vjp, **options):
        def scaled(grad):
            results = list(vjp(grad))
            given = [i for i, result in enumerate(results) if result is not None]
            gradient = results[given[position]]
            if isinstance(gradient, At):
                results[given[position]] = At(gradient.index, np.asarray(gradient.array * factor))
            else:
                results[given[position]] = gradient * factor
            return results

        return honest(data, parents, scaled, **options)

    monkeypatch.setattr(Tensor, "from_op", staticmethod(wrong))


def caught(case):
    """Does the comparison with torch see that this case is wrong?"""
    try:
        check_torch(case)
    except AssertionError:
        return True
    return False


# ----------------------------------------------------------- dropout at an address


@st.composite
def addresses(draw):
    """(seed, step, micro_batch, number of the op)."""
    return draw(some.SEEDS), draw(st.integers(0, 10**6)), draw(st.integers(0, 100)), draw(st.integers(0, 3))


def at_address(address, function):
    """``function`` as the op of number ``address[3]`` after ``manual_seed``."""

    def op(*args, **kwargs):
        manual_seed(*address[:3])
        for _ in range(address[3]):
            next_address()
        return function(*args, **kwargs)

    return op


# -------------------------------------------------------------- attention in torch


def visible_keys(shape, mask=None, is_causal=False):
    """(B, H, T, S) booleans: may a query see a key? Causal aligns to the last key (torch: to the first)."""
    T, S = shape[-2:]
    visible = np.tri(T, S, S - T, dtype=bool) if is_causal else np.ones((T, S), bool)
    if mask is not None:
        visible = visible & (mask if mask.dtype == bool else mask > -np.inf)
    return np.broadcast_to(visible, shape)


def torch_attention(q, k, v, mask=None, is_causal=False, scale=None, kept=None):
    """torch's op, told what each query sees; one that sees nothing gets zeros. ``kept``: a dropout mask.

    Where there are fewer key-value heads, each is repeated for the query heads that share it.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    visible = torch.tensor(visible_keys((*q.shape[:3], k.shape[2]), mask, is_causal).copy())
    sees = visible.any(-1, keepdim=True)
    bias = torch.zeros(()) if mask is None or mask.dtype == bool else torch.tensor(np.maximum(mask, -1e9))
    # A query that sees nothing looks at everything, and its output is multiplied by 0.
    bias = bias.double().masked_fill(~visible & sees, -math.inf)
    if kept is None:
        return TF.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale) * sees
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    return scores.softmax(-1) * torch.tensor(kept) @ v * sees


def kept_weights(q, k, options, p, address):
    """The dropout mask of attention, read off: with the identity as value, the output is the weights."""
    S = k.shape[2]
    identity = Tensor(np.broadcast_to(np.eye(S), (*k.shape[:2], S, S)))
    attend = at_address(address, F.scaled_dot_product_attention)
    weights = attend(Tensor(q), Tensor(k), identity, **options).data
    dropped = attend(Tensor(q), Tensor(k), identity, dropout_p=p, **options).data
    mask = np.where(dropped == 0, 0, 1 / (1 - p))
    assert_close(dropped, weights * mask, "attention weights are kept and scaled, or dropped")
    return mask


# ------------------------------------------------------------ blocks of a few rows


@contextlib.contextmanager
def small_blocks():
    """A few rows, heads and elements make many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", 3)
        patch.setattr(attention, "SCORES", 24)
        patch.setattr(losses, "CHUNK", 3)
        patch.setattr(losses, "COLUMNS", 2)
        patch.setattr(threads, "BLOCK", 8)
        yield

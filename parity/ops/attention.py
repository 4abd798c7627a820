"""Attention in torch with tinyllm's dropout masks, and ops at a given address of the random numbers."""

import math

import numpy as np
import torch
import torch.nn.functional as TF
from hypothesis import strategies as st

from parity.ops import strategies as some
from parity.ops.cases import assert_close
from tinyllm import Tensor, manual_seed
from tinyllm import functional as F
from tinyllm.backend.random import next_address, rounded

# ----------------------------------------------------------- dropout at an address


@st.composite
def addresses(draw):
    """(seed, step, first row, number of the op)."""
    return draw(some.SEEDS), draw(st.integers(0, 10**6)), draw(st.integers(0, 100)), draw(st.integers(0, 3))


def at_address(address, function):
    """``function``, called as op number ``address[3]`` after ``manual_seed``."""

    def op(*args, **kwargs):
        manual_seed(*address[:3])
        for _ in range(address[3]):
            next_address()
        return function(*args, **kwargs)

    return op


# -------------------------------------------------------------- attention in torch


def visible_keys(shape, mask=None, is_causal=False, window=None):
    """Booleans (B, H, T, S): whether a query may attend to a key. Causal aligns the last query and key."""
    T, S = shape[-2:]
    visible = np.tri(T, S, S - T, dtype=bool) if is_causal else np.ones((T, S), bool)
    if window is not None:
        visible &= ~np.tri(T, S, S - T - window, dtype=bool)
    if mask is not None:
        visible = visible & (mask if mask.dtype == bool else mask > -np.inf)
    return np.broadcast_to(visible, shape)


def torch_attention(q, k, v, mask=None, is_causal=False, scale=None, kept=None, window=None, softcap=None):
    """torch's op with an explicit mask; a query without visible keys gets zeros. ``kept``: a dropout mask.

    With dropout or a softcap, which torch's op does not have, its steps one by one.

    If there are fewer key-value heads, each is repeated for the query heads that share it. Inputs (B, T, D)
    are one head. A mask may be a torch tensor of numbers, with a gradient.
    """
    if q.ndim == 3:
        mask = mask[:, None] if mask is not None and mask.ndim == 3 else mask
        q, k, v = (x[:, None] for x in (q, k, v))
        return torch_attention(q, k, v, mask, is_causal, scale, kept, window, softcap)[:, 0]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    numbers = mask.detach().numpy() if isinstance(mask, torch.Tensor) else mask
    visible = torch.tensor(visible_keys((*q.shape[:3], k.shape[2]), numbers, is_causal, window).copy())
    has_key = visible.any(-1, keepdim=True)
    bias = torch.zeros(()) if mask is None or numbers.dtype == bool else torch.as_tensor(mask).clamp(min=-1e9)
    # A query without visible keys attends to all of them, and its output is multiplied by 0.
    bias = bias.double().masked_fill(~visible & has_key, -math.inf)
    if kept is None and softcap is None:
        return TF.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale) * has_key
    scores = q @ k.mT * (max(q.shape[-1], 1) ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = (scores + bias).softmax(-1)
    return (weights if kept is None else weights * torch.tensor(kept)) @ v * has_key


def kept_weights(q, k, options, p, address):
    """The dropout mask of attention: with the identity as value, the output is the weights."""
    S = k.shape[2]
    identity = Tensor(np.broadcast_to(np.eye(S), (*k.shape[:2], S, S)))
    attend = at_address(address, F.scaled_dot_product_attention)
    weights = attend(Tensor(q), Tensor(k), identity, **options).data
    dropped = attend(Tensor(q), Tensor(k), identity, dropout_p=p, **options).data
    mask = np.where(dropped == 0, 0, rounded(p)[2])
    assert_close(dropped, weights * mask, "attention weights are kept and scaled, or dropped")
    return mask

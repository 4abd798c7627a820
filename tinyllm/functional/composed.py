"""What does each op compute? The same ops as in ``tinyllm.functional``, written as the papers write them.

Nothing here defines a gradient: everything is composed of Tensor's methods, and the engine derives the
gradient. That is slower and keeps every intermediate. These forms are for reading, for inspecting attention
weights, and are the specification that the fused ops are tested against.
"""

import math

import numpy as np

from tinyllm.backend.random import dropout_mask, next_address
from tinyllm.errors import Error
from tinyllm.tensor import Tensor
from tinyllm.tensor_einsum import einsum
from tinyllm.tensor_ops import concatenate, where


def linear(input, weight, bias=None):
    """y = x Wᵀ + b: output channel o of a position is the sum over i of x_i W_oi, plus b_o."""
    y = input @ weight.transpose()
    return y if bias is None else y + bias


def embedding(input, weight):
    """Row ``input[i]`` of ``weight``, for every id."""
    return weight[input]


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """Mean 0 and variance 1 over the channels of each position, then a learned scale and shift."""
    axes = tuple(range(-np.size(normalized_shape), 0))
    mean = input.mean(axis=axes, keepdims=True)
    variance = input.var(axis=axes, keepdims=True)
    y = (input - mean) / (variance + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(input, normalized_shape, weight=None, eps=None, offset=0.0):
    """Root mean square 1 over the channels of each position, then a learned scale, weight + offset."""
    eps = float(np.finfo(input.dtype).eps) if eps is None else eps
    axes = tuple(range(-np.size(normalized_shape), 0))
    y = input / ((input * input).mean(axis=axes, keepdims=True) + eps).sqrt()
    return y if weight is None else y * (weight + offset)


def gelu(input, approximate="tanh"):
    """½ x (1 + tanh(sqrt(2/π) (x + 0.044715 x³))), the form in GPT-2.

    The exact form, the default of ``functional.gelu``, needs erf, which Tensor lacks: here it is an Error.
    """
    if approximate != "tanh":
        raise Error(f"composed.gelu has only approximate='tanh', not {approximate!r}: use functional.gelu")
    cubic = input + 0.044715 * (input * input * input)
    return 0.5 * input * (1 + (math.sqrt(2 / math.pi) * cubic).tanh())


def relu(input):
    """max(x, 0)."""
    return where(input > 0, input, 0.0)


def silu(input):
    """x σ(x) = x / (1 + exp(-x)): close to x for large x, close to 0 for very negative x."""
    return input / (1 + (-input).exp())


def swiglu(gate, up):
    """One projection of x, passed through silu, scales the other."""
    return silu(gate) * up


def geglu(gate, up):
    """One projection of x, passed through gelu, scales the other."""
    return gelu(gate) * up


def softcap(input, cap):
    """c tanh(x / c): x if it is small, and never more than the cap c."""
    return cap * (input / cap).tanh()


def softmax(input, dim=-1):
    """exp(x) / Σ exp(x), with the maximum subtracted first so that exp does not overflow."""
    peak = input.detach().max(axis=dim, keepdims=True) if input.size else 0.0
    shifted = (input - peak).exp()
    return shifted / shifted.sum(axis=dim, keepdims=True)


def dropout(input, p=0.5, training=True):
    """Keep each element with probability 1 - p, scaled by 1/(1 - p) so that the mean is unchanged."""
    if not training or p == 0:
        return input
    return input * Tensor(dropout_mask(next_address(), input.shape, p, like=input.data))


def attention_weights(
    query, key, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, window=None, softcap=None
):
    """How much each query t attends to each key s: (B, H, T, S) or (B, T, S), every row sums to 1.

    Each query must have at least one visible key.
    """
    D, T, S = query.shape[-1], query.shape[-2], key.shape[-2]
    key = repeat_heads(key, query.shape[1]) if enable_gqa else key
    scores = einsum("...td,...sd->...ts", query, key) * (1 / math.sqrt(max(D, 1)) if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if is_causal:  # the last query is aligned with the last key
        time, keys = np.arange(T, like=query.data).reshape(-1, 1) + (S - T), np.arange(S, like=query.data)
        visible = keys <= time if window is None else (keys <= time) & (keys > time - window)
        scores = where(visible, scores, -math.inf)
    if attn_mask is not None:
        scores = where(attn_mask, scores, -math.inf) if attn_mask.dtype == bool else scores + attn_mask
    return softmax(scores)


def repeat_heads(x, heads):
    """(B, G, S, D) -> (B, H, S, D): query head h uses key-value head h // (H/G)."""
    return x[:, np.arange(heads, like=x.data) // (heads // x.shape[1])]


def scaled_dot_product_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    window=None,
    softcap=None,
):
    """The output for a query is the mean of the values, weighted by how well their keys match the query."""
    options = is_causal, scale, enable_gqa, window, softcap
    weights = attention_weights(query, key, attn_mask, *options)  # (..., T, S)
    value = repeat_heads(value, query.shape[1]) if enable_gqa else value
    return dropout(weights, dropout_p) @ value  # (..., T, E)


def rope(input, cos, sin):
    """Channels i and i + D/2 are a point in a plane, rotated by an angle proportional to its position."""
    half = input.shape[-1] // 2
    a, b = input[..., :half], input[..., half:]
    return concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def cross_entropy(
    input,
    target,
    *,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    num_targets=None,
    weights=None,
):
    """Σ -log softmax(logits)[target] · weight / num_targets, over the targets that count."""
    shape = target.shape
    logits = input.reshape(-1, input.shape[-1])  # (N, V)
    target = target.reshape(-1)
    counted = target != ignore_index
    peak = logits.detach().max(axis=1, keepdims=True)
    log_sum = (logits - peak).exp().sum(axis=1).log() + peak.reshape(-1)
    rows, index = np.arange(len(target), like=target), np.where(counted, target, 0)
    losses = log_sum - logits[rows, index]
    each = counted * (1.0 if weights is None else weights.reshape(-1))
    weights = each if weight is None else each * weight[index]
    losses = where(counted, losses, 0.0) * weights.astype(input.dtype)
    if label_smoothing:
        everywhere = log_sum.reshape(-1, 1) - logits  # -log p of every class
        everywhere = (everywhere if weight is None else everywhere * weight.astype(input.dtype)).mean(axis=1)
        losses = losses * (1 - label_smoothing) + everywhere * (each * label_smoothing).astype(input.dtype)
    if reduction != "mean":
        return losses.reshape(shape) if reduction == "none" else losses.sum()
    return losses.sum() / (weights.sum().item() if num_targets is None else num_targets)


def linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, softcap=None, **options):
    """The output layer, a cap on its logits if there is one, then the loss."""
    logits = linear(input, linear_weight, linear_bias)
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    return cross_entropy(logits, target, **options)

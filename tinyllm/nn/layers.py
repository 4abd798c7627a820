"""Which layers does a language model have?"""

from __future__ import annotations

import math

import numpy as np

from tinyllm import functional as F
from tinyllm.checks import check_not_negative, check_shape
from tinyllm.functional.activations import check_probability
from tinyllm.nn.init import as_generator, loaded, normal
from tinyllm.nn.module import Module
from tinyllm.tensor import Tensor


class Linear(Module):
    """y = x Wᵀ + b. Initially W (out, in) is from N(0, std²) and b is 0. ``rng`` is that of ``normal``.

    The default std, 0.02, is the value stated for GPT-1 (Radford et al., 2018, section 4.1), where "a simple
    weight initialization of N(0, 0.02) was sufficient" because the model is full of layer norms. It is about
    1/√n for inputs of n = 2,500 channels, which would keep the variance: Var(y) = n std² Var(x).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, rng, std: float = 0.02):
        self.weight = normal(rng, (out_features, in_features), std)
        self.bias = Tensor(np.zeros(out_features, np.float32), requires_grad=True) if bias else None

    def forward(self, x):
        return F.linear(x, loaded(self.weight), self.bias)

    def reset_parameters(self, rng: np.random.Generator | int) -> None:
        """Sample weight and bias from U(-1/√n, 1/√n) for n inputs, PyTorch's default."""
        bound, rng = 1 / math.sqrt(self.weight.shape[1]), as_generator(rng)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                _fill(parameter, rng.uniform(-bound, bound, parameter.shape))


class Embedding(Module):
    """Row i of W (num_embeddings, embedding_dim) for every id i. Initially W is from N(0, std²)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, rng, std: float = 0.02):
        self.weight = normal(rng, (num_embeddings, embedding_dim), std)

    def forward(self, ids):
        return F.embedding(ids, loaded(self.weight))

    def reset_parameters(self, rng: np.random.Generator | int) -> None:
        """Sample the weight from N(0, 1), PyTorch's default."""
        _fill(self.weight, as_generator(rng).standard_normal(self.weight.shape, dtype=np.float32))


def _fill(parameter: Tensor, values: np.ndarray) -> None:
    """Replace a parameter's values, in its dtype and on its device."""
    parameter.replace(np.asarray(values.astype(parameter.dtype), like=parameter.data))


class LayerNorm(Module):
    """``F.layer_norm`` over the last axis, or for a tuple of ``channels`` over as many last axes.

    The learned scale starts at 1 and the optional shift at 0.
    """

    def __init__(self, channels: int | tuple[int, ...], eps: float = 1e-5, bias: bool = True):
        shape = check_shape(channels)
        check_not_negative(eps, "eps")
        self.weight = Tensor(np.ones(shape, np.float32), requires_grad=True)
        self.bias = Tensor(np.zeros(shape, np.float32), requires_grad=True) if bias else None
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """``F.rms_norm`` over the last axis or axes, as for LayerNorm. The learned scale starts at 1."""

    offset = 0.0  # added to the weight

    def __init__(self, channels: int | tuple[int, ...], eps: float | None = None):
        check_not_negative(eps or 0, "eps")
        self.weight = Tensor(np.full(check_shape(channels), 1 - self.offset, np.float32), requires_grad=True)
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps, self.offset)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm with the scale 1 + ``weight``, as in Gemma, so that the weight starts at 0."""

    offset = 1.0


class Dropout(Module):
    """``F.dropout`` in training mode; the identity in eval mode."""

    def __init__(self, p: float):
        check_probability(p)
        self.p = p

    def forward(self, x):
        return F.dropout(x, self.p, self.training)

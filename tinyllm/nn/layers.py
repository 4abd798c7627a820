"""Which layers does a language model have?"""

from __future__ import annotations

import math

import numpy as np

from tinyllm import functional as F
from tinyllm.errors import Error
from tinyllm.nn.init import normal
from tinyllm.nn.module import Module
from tinyllm.tensor import Tensor


class Linear(Module):
    """y = x Wᵀ + b; W (out, in) from N(0, std²), b zero. The rng is as in ``normal``."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, rng, std: float = 0.02):
        self.weight = normal(rng, (out_features, in_features), std)
        self.bias = Tensor(np.zeros(out_features, np.float32), requires_grad=True) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)

    def reset_parameters(self, rng: np.random.Generator) -> None:
        """Draw weight and bias from U(-1/√n, 1/√n) for n inputs, PyTorch's default."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.data[...] = rng.uniform(-bound, bound, parameter.shape)


class Embedding(Module):
    """Row i of W (num_embeddings, embedding_dim) for every id i; W from N(0, std²)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, rng, std: float = 0.02):
        self.weight = normal(rng, (num_embeddings, embedding_dim), std)

    def forward(self, ids):
        return F.embedding(ids, self.weight)

    def reset_parameters(self, rng: np.random.Generator) -> None:
        """Draw the weight from N(0, 1), PyTorch's default."""
        self.weight.data[...] = rng.standard_normal(self.weight.shape, dtype=np.float32)


class LayerNorm(Module):
    """``F.layer_norm`` over the last axis, with a learned scale (from 1) and, if ``bias``, shift (from 0)."""

    def __init__(self, channels: int, eps: float = 1e-5, bias: bool = True):
        self.weight = Tensor(np.ones(channels, np.float32), requires_grad=True)
        self.bias = Tensor(np.zeros(channels, np.float32), requires_grad=True) if bias else None
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """``F.rms_norm`` over the last axis, with a learned scale (from 1)."""

    def __init__(self, channels: int, eps: float | None = None):
        self.weight = Tensor(np.ones(channels, np.float32), requires_grad=True)
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Dropout(Module):
    """``F.dropout`` while training."""

    def __init__(self, p: float):
        if not 0 <= p < 1:
            raise Error(f"dropout probability must be at least 0 and below 1, not {p}")
        self.p = p

    def forward(self, x):
        return F.dropout(x, self.p, self.training)

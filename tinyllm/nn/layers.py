"""Which layers does a language model have?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tinyllm import functional as F
from tinyllm.backend.cuda.launch import on_gpu
from tinyllm.backend.threads import FEW_ROWS, matmul
from tinyllm.errors import Error
from tinyllm.nn.hooks import is_watched
from tinyllm.nn.init import is_meta, normal
from tinyllm.nn.module import Module
from tinyllm.tensor import Tensor, as_rows


class Linear(Module):
    """y = x Wᵀ + b; W (out, in) from N(0, std²), b zero. The rng is as in ``normal``."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, rng, std: float = 0.02):
        self.weight = normal(rng, (out_features, in_features), std)
        self.bias = Tensor(np.zeros(out_features, np.float32), requires_grad=True) if bias else None
        self.fused = None  # of ``fused_linears``: the buffer, and the weight's first row in it

    def forward(self, x, dtype=None):
        return F.linear(x, self.weight, self.bias, dtype)


def fused_linears(
    in_features: int, out_features: Sequence[int], bias: bool = True, *, rng, std: float = 0.02
) -> list[Linear]:
    """Linear layers of one input, whose weights lie below each other in one buffer, for ``fused``."""
    layers = [Linear(in_features, size, bias, rng=None) for size in out_features]
    if rng is not None:
        _lay_rows(normal(rng, (sum(out_features), in_features), std).data, layers)
    return layers


def fuse_rows(*layers: Linear) -> None:
    """Lay the weights as ``fused_linears`` does, unless they lie like that or are stand-ins."""
    weights = [layer.weight.data for layer in layers]
    if not any(map(is_meta, weights)) and not _lie_fused(layers):
        _lay_rows(np.concatenate(weights), layers)


def _lay_rows(buffer, layers: Sequence[Linear]) -> None:
    first = 0
    for layer in layers:
        rows = slice(first, first + layer.weight.shape[0])
        layer.weight.data, layer.fused = buffer[rows], (buffer, first)
        first = rows.stop


def _lie_fused(layers: Sequence[Linear]) -> bool:
    """Whether the weights are the whole of one buffer, in this order."""
    first = 0
    for layer in layers:
        if type(layer) is not Linear or layer.fused is None:
            return False
        weight, (buffer, row) = layer.weight.data, layer.fused
        if weight.base is not buffer or buffer is not layers[0].fused[0] or row != first:
            return False
        first += weight.shape[0]
    return first == len(buffer)


def fused(x: Tensor, *layers: Linear) -> list[Tensor]:
    """[layer(x) for layer in layers]; when a text is written token by token, in one product.

    A product of few rows takes the time of reading its matrix, and one large matrix is read faster than
    several small ones. Layers whose weights no longer lie as ``fused_linears`` laid them, because one was
    given another array or another layer took its place, are applied one by one.
    """
    few = x.ndim > 1 and math.prod(x.shape[:-1]) < FEW_ROWS
    gradient = x.wants_grad or any(layer.weight.wants_grad for layer in layers)
    same = x.dtype == layers[0].weight.dtype
    if not few or gradient or not same or is_watched() or not _lie_fused(layers):
        return [layer(x) for layer in layers]
    y = matmul(as_rows(x.data), layers[0].fused[0].T)
    parts = []
    for layer in layers:
        first, rows = layer.fused[1], layer.weight.data.shape[0]
        part = Tensor(y[:, first : first + rows].reshape(*x.shape[:-1], rows))
        parts.append(part if layer.bias is None else part + layer.bias)
    return parts


def bias_can_wait(x: Tensor, *layers: Module) -> bool:
    """Whether the op after these layers may add their biases where it reads: a GPU saves a pass over memory.

    Not if somebody observes, or if a layer is no plain Linear: then it must be called.
    """
    plain = all(type(layer).forward is Linear.forward and layer.bias is not None for layer in layers)
    return plain and on_gpu(x) and not is_watched()


class Embedding(Module):
    """Row i of W (num_embeddings, embedding_dim) for every id i; W from N(0, std²)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, rng, std: float = 0.02):
        self.weight = normal(rng, (num_embeddings, embedding_dim), std)

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class LayerNorm(Module):
    """``F.layer_norm`` over the last axis, with a learned scale (from 1) and, if ``bias``, shift (from 0)."""

    def __init__(self, channels: int, eps: float = 1e-5, bias: bool = True):
        self.weight = Tensor(np.ones(channels, np.float32), requires_grad=True)
        self.bias = Tensor(np.zeros(channels, np.float32), requires_grad=True) if bias else None
        self.eps = eps

    def forward(self, x):
        dtype = self.product_dtype or self.weight.dtype
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps, dtype)


class RMSNorm(Module):
    """``F.rms_norm`` over the last axis, with a learned scale (from 1)."""

    def __init__(self, channels: int, eps: float | None = None):
        self.weight = Tensor(np.ones(channels, np.float32), requires_grad=True)
        self.eps = eps

    def forward(self, x):
        dtype = self.product_dtype or self.weight.dtype
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps, dtype)


class Dropout(Module):
    """``F.dropout`` while training."""

    def __init__(self, p: float):
        if not 0 <= p < 1:
            raise Error(f"dropout probability must be at least 0 and below 1, not {p}")
        self.p = p

    def forward(self, x):
        return F.dropout(x, self.p, self.training)


def initialize_as_torch(model: Module, rng: np.random.Generator) -> None:
    """Draw all parameters again as PyTorch's layers do when nobody says otherwise.

    Embedding: N(0, 1). Linear, with n inputs: weight and bias from U(-1/√n, 1/√n); norms stay. In the
    classic run on "The Verdict", GPT-2 has a training loss of 0.52 after 12 epochs from these values,
    and of 3.46 from its own.
    """
    for _, module in model.named_modules():
        if isinstance(module, Embedding):
            module.weight.data[...] = rng.standard_normal(module.weight.shape, dtype=np.float32)
        elif isinstance(module, Linear):
            bound = 1 / math.sqrt(module.weight.shape[1])
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    parameter.data[...] = rng.uniform(-bound, bound, parameter.shape)

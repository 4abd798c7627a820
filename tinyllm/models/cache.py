"""How does a model decode a token without computing the whole text again?

A position depends on earlier positions only through their keys and values, and because attention is causal
(Vaswani et al., arXiv 1706.03762) these do not change when a token is appended. So they are computed once and
cached, and a decoding step computes one position instead of all.

The cost is memory: 2 · layers · G · D numbers per token and row. In float32 that is 46 KB per token for
SmolLM2-135M, 1 MB for Llama 2 7B, and 262 KB for Llama 3 8B, where 32 query heads share 8 key-value heads.
Pope et al., "Efficiently Scaling Transformer Inference" (arXiv 2211.05102), section 3.3, analyses this cost.

Shapes: B batch, T new tokens, S tokens so far, G key-value heads of size D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllm.errors import Error
from tinyllm.tensor import Tensor


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values during one forward pass, created by ``Cache.layers``."""

    keys: Any  # (B, G, capacity, D)
    values: Any
    length: int  # number of entries before this pass
    mask: Any  # the result of ``Cache.mask``

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values, (B, G, T, D); returns views of all, (B, G, S, D).

        Raises ``Error`` if they require a gradient, because the cache stores arrays without a graph.
        """
        if key.needs_grad or value.needs_grad:
            raise Error("a cache does not support gradients: use it under no_grad()")
        expected, *found = (x.shape[1::2] for x in (self.keys, key, value))
        if found != [expected, expected]:
            raise Error(
                f"the cache has keys and values of (heads, head size) {expected}, from the config, but the "
                f"layers compute {found[0]} and {found[1]}: generate with use_cache=False"
            )
        end = self.length + key.shape[2]
        self.keys[:, :, self.length : end] = key.data
        self.values[:, :, self.length : end] = value.data
        return Tensor(self.keys[:, :, :end]), Tensor(self.values[:, :, :end])


class Cache:
    """Keys and values of all layers for ``batch`` rows of up to ``capacity`` tokens, initially empty.

    Its arrays have the type, and unless ``dtype`` is given the dtype, of the model's array ``like``.
    ``padding`` (B,) is the number of padding tokens at the start of each row: rows of different length are
    padded on the left so that they end at the same position. Padding is never attended to, and the first
    token after it has position 0.

    ``model(ids, cache=cache)`` treats ids (B, T) as the continuation of the cached text and appends them. If
    it raises, the cache is unchanged.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, capacity: int, size: int, like, padding=None, dtype=None
    ):
        shape, dtype = (batch, heads, capacity, size), dtype or like.dtype
        self.keys = [np.zeros(shape, dtype, like=like) for _ in range(layers)]
        self.values = [np.zeros(shape, dtype, like=like) for _ in range(layers)]
        self.capacity = capacity  # in tokens
        self.length = 0  # number of cached tokens
        # The position of each row's first entry. It is -2 if the row starts with two padding tokens, and
        # after entries were dropped it is the number of tokens before the oldest remaining one.
        self.first = np.zeros(batch, np.int64) if padding is None else -np.asarray(padding, np.int64)

    def positions(self, count: int) -> np.ndarray:
        """Positions of the next ``count`` tokens: (T,), or (B, T) if rows differ. Those of padding are 0."""
        positions = self.first[:, None] + np.arange(self.length, self.length + count)
        same = (self.first == self.first[0]).all()
        return positions[0] if same else np.maximum(positions, 0)

    def mask(self, count: int):
        """(B, 1, 1, S), true where an entry, ``count`` new ones included, is not padding; None if all are."""
        if (self.first >= 0).all():
            return None
        real = self.first[:, None] + np.arange(self.length + count) >= 0
        return np.asarray(real[:, None, None], like=self.keys[0])

    def layers(self, rows: int, count: int) -> list[LayerCache]:
        """Each layer's part of the cache, for appending ``count`` tokens (T) to each of ``rows`` rows (B)."""
        if rows != len(self.first) or self.length + count > self.capacity:
            raise Error(
                f"ids of shape {(rows, count)} do not fit a cache of {len(self.first)} rows that holds "
                f"{self.length} of at most {self.capacity} tokens: create a larger one with new_cache()"
            )
        mask = self.mask(count)
        return [LayerCache(k, v, self.length, mask) for k, v in zip(self.keys, self.values)]

    def drop_oldest(self, count: int) -> None:
        """Remove the ``count`` oldest entries of every row. The others keep their positions."""
        for entries in self.keys + self.values:
            # Copied first, because source and destination overlap.
            entries[:, :, : self.length - count] = entries[:, :, count : self.length].copy()
        self.length -= count
        self.first = self.first + count

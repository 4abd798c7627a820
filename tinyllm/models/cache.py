"""How does a model decode a token without computing the whole text again?

A position looks back through keys and values only, and those of the positions before it do not change when
a token is added: they are computed once and kept. A step of decoding then computes one token, not all.

The price is memory, 2 · layers · G · D numbers for every token and row: for SmolLM2-135M in float32
46 KB a token, for Llama 2 7B 1 MB, for Llama 3 8B, whose 32 query heads share 8 key-value heads, 262 KB.
Vaswani et al.'s decoder (arXiv 1706.03762) allows it because it is causal; Pope et al., "Efficiently Scaling
Transformer Inference" (arXiv 2211.05102), section 3.3, counts what it costs.

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
    """One layer's keys and values during one pass of the model; made by ``Cache.layers``."""

    keys: Any  # (B, G, room, D)
    values: Any
    length: int  # entries there already
    mask: Any  # which keys are not padding, as ``Cache.mask`` says

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of the new tokens, (B, G, T, D) each; returns all so far, (B, G, S, D), without a copy.

        Raises ``Error`` if a gradient is wanted: the cache holds arrays, which have no graph.
        """
        if key.needs_grad or value.needs_grad:
            raise Error("a cache has no gradients: use it under no_grad()")
        expected, *found = (x.shape[1::2] for x in (self.keys, key, value))
        if found != [expected, expected]:
            raise Error(
                f"the cache is for keys and values of (heads, channels) {expected}, as the config says, and "
                f"the layers make {found[0]} and {found[1]}: generate with use_cache=False"
            )
        end = self.length + key.shape[2]
        self.keys[:, :, self.length : end] = key.data
        self.values[:, :, self.length : end] = value.data
        return Tensor(self.keys[:, :, :end]), Tensor(self.values[:, :, :end])


class Cache:
    """Keys and values of all layers, of ``batch`` rows, with room for ``room`` tokens; at first empty.

    Its arrays are made like the model's array ``like``, and of its dtype unless ``dtype`` is given.
    ``padding`` (B,) says how many tokens at the start of each row are padding: rows of different length are
    padded on the left, so that all end together. Padding is never attended to, and the first real token has
    position 0.

    ``model(ids, cache=cache)`` takes ids (B, T) as the continuation of what the cache holds, and adds
    them to it. If that fails, the cache is as it was.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, room: int, head_size: int, like, padding=None, dtype=None
    ):
        shape, dtype = (batch, heads, room, head_size), dtype or like.dtype
        self.keys = [np.zeros(shape, dtype, like=like) for _ in range(layers)]
        self.values = [np.zeros(shape, dtype, like=like) for _ in range(layers)]
        self.room = room  # for how many tokens there are places
        self.length = 0  # how many are taken
        # The position of the first entry: -2 where two of padding come before the text, and later, when
        # entries were dropped, the number of tokens before the oldest one kept.
        self.first = np.zeros(batch, np.int64) if padding is None else -np.asarray(padding, np.int64)

    def positions(self, count: int) -> np.ndarray:
        """Of the next ``count`` tokens: (T,), or (B, T) where the rows differ; those of padding are 0."""
        positions = self.first[:, None] + np.arange(self.length, self.length + count)
        same = (self.first == self.first[0]).all()
        return positions[0] if same else np.maximum(positions, 0)

    def mask(self, count: int):
        """True where an entry, ``count`` new ones included, is not padding: (B, 1, 1, S); None if none is."""
        if (self.first >= 0).all():
            return None
        real = self.first[:, None] + np.arange(self.length + count) >= 0
        return np.asarray(real[:, None, None], like=self.keys[0])

    def layers(self, rows: int, count: int) -> list[LayerCache]:
        """Where each layer is to keep ``count`` new tokens (T) of ``rows`` rows (B)."""
        if rows != len(self.first) or self.length + count > self.room:
            raise Error(
                f"ids of shape {(rows, count)} do not fit a cache of {len(self.first)} rows with "
                f"{self.length} of {self.room} places taken: make a larger one"
            )
        mask = self.mask(count)
        return [LayerCache(k, v, self.length, mask) for k, v in zip(self.keys, self.values)]

    def drop_oldest(self, count: int) -> None:
        """Forget the ``count`` oldest entries of every row; the others keep their positions."""
        for entries in self.keys + self.values:
            # From a copy: the two parts overlap.
            entries[:, :, : self.length - count] = entries[:, :, count : self.length].copy()
        self.length -= count
        self.first = self.first + count

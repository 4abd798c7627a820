"""A solution of exercise 13, the key-value cache."""

import numpy as np


def cached_attention(q, k, v, cached_k, cached_v):
    keys, values = np.concatenate([cached_k, k]), np.concatenate([cached_v, v])
    scores = q @ keys.T / np.sqrt(q.shape[1])
    scores += np.triu(np.full(scores.shape, -np.inf), len(cached_k) + 1)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True) @ values, keys, values

"""A solution of exercise 11, grouped-query attention."""

import numpy as np


def grouped_query_attention(q, k, v):
    k, v = (np.repeat(x, len(q) // len(k), axis=0) for x in (k, v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2])
    scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True) @ v

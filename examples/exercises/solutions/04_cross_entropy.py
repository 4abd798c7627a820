"""A solution of exercise 4, cross-entropy."""

import numpy as np


def cross_entropy(logits, targets):
    rows = np.flatnonzero(targets != -100)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -log_p[rows, targets[rows]].mean()


def cross_entropy_gradient(logits, targets):
    rows = np.flatnonzero(targets != -100)
    e = np.exp(logits[rows] - logits[rows].max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    p[np.arange(len(rows)), targets[rows]] -= 1
    dlogits = np.zeros_like(logits)
    dlogits[rows] = p / len(rows)
    return dlogits

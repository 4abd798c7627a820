"""A solution of exercise 19, top-p."""

import numpy as np


def top_p_probabilities(logits, top_p):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]  # the sum of all more likely tokens
    p[order[before >= top_p]] = 0
    return p / p.sum()

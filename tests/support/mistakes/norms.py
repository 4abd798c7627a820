"""Mistakes in LayerNorm and RMSNorm."""

import numpy as np


def outside_std(x, weight, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + eps) * weight + bias


def outside_row_by_row(x, weight, bias, eps):
    out = np.empty_like(x)
    for i, row in enumerate(x):
        centred = row - row.mean()
        out[i] = weight * centred / ((centred**2).mean() ** 0.5 + eps) + bias
    return out


def outside_sums(x, weight, bias, eps):
    channels = x.shape[1]
    centred = x - x.sum(axis=1, keepdims=True) / channels
    root = np.sqrt(np.einsum("nc,nc->n", centred, centred) / channels)[:, None]
    return bias + weight * np.divide(centred, root + eps)


PLANTED = {
    ("layer_norm", "layer_norm", "eps outside the root"): (outside_std, outside_row_by_row, outside_sums)
}

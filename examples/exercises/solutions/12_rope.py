"""A solution of exercise 12, rotary position embeddings."""

import numpy as np


def rope(x, start, theta):
    T, D = x.shape
    angles = (start + np.arange(T))[:, None] * theta ** (-np.arange(0, D, 2) / D)
    a, b = x[:, : D // 2], x[:, D // 2 :]
    return np.hstack([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)])

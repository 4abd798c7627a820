"""A solution of exercise 3, softmax."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_gradient(grad, x):
    p = softmax(x)
    return p * (grad - (grad * p).sum(axis=-1, keepdims=True))

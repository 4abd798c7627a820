"""A solution of exercise 7, GELU."""

import math

import numpy as np

ROOT, CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu(x):
    return 0.5 * x * (1 + np.tanh(ROOT * (x + CUBIC * x**3)))


def gelu_gradient(grad, x):
    t = np.tanh(ROOT * (x + CUBIC * x**3))
    return grad * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * ROOT * (1 + 3 * CUBIC * x * x))

"""A solution of exercise 8, SwiGLU."""

import numpy as np


def swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def swiglu_gradient(grad, gate, up):
    s = 1 / (1 + np.exp(-gate))
    return grad * up * (s + gate * s * (1 - s)), grad * gate * s

"""A solution of exercise 2, an embedding."""

import numpy as np


def embedding(ids, weight):
    return weight[ids]


def embedding_gradient(grad, ids, weight):
    dweight = np.zeros_like(weight)
    np.add.at(dweight, ids, grad)
    return dweight

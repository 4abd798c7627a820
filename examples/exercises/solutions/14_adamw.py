"""A solution of exercise 14, AdamW."""

import numpy as np


def adamw_step(parameter, grad, m, v, step, lr, weight_decay):
    m = 0.9 * m + 0.1 * grad
    v = 0.999 * v + 0.001 * grad**2
    m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
    return parameter - lr * (m_hat / (np.sqrt(v_hat) + 1e-8) + weight_decay * parameter), m, v

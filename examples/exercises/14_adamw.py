"""Exercise 14: AdamW.

Each parameter has a step size of its own, from averages of its gradient g and of g²:

    m = 0.9 m + 0.1 g,   v = 0.999 v + 0.001 g²,
    m_hat = m / (1 - 0.9^step),   v_hat = v / (1 - 0.999^step),
    parameter = parameter - lr (m_hat / (sqrt(v_hat) + 1e-8) + weight_decay parameter).

m and v start at 0, so for the first steps they are too small: m_hat and v_hat correct that. step counts from
1. The decay is not part of the gradient, which would divide it by sqrt(v_hat), too: that is the W.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2.

When you are done, compare with ``tinyllm/optim/adamw.py``.
Grade it: python -m parity grade examples/exercises/14_adamw.py
"""


def adamw_step(parameter, grad, m, v, step, lr, weight_decay):
    """The new (parameter, m, v), new arrays of the same shape: the arguments stay unchanged."""
    raise NotImplementedError

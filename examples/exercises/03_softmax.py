"""Exercise 3: softmax.

Scores become probabilities, row by row:

    p_i = exp(x_i) / Σ_j exp(x_j).

exp overflows beyond 709, but subtracting the row's maximum from every x_i cancels in the fraction. Each p_i
depends on every x_k of its row, ∂p_i/∂x_k = p_i (δ_ik - p_k) with δ_ik = 1 if i = k, else 0. The chain rule
with grad = dL/dp gives

    dx_k = Σ_i grad_i p_i (δ_ik - p_k) = p_k (grad_k - Σ_i grad_i p_i).

When you are done, compare with ``tinyllm/functional/activations.py``.
Grade it: python -m parity grade examples/exercises/03_softmax.py
"""


def softmax(x):
    """p for x (rows, columns): every row of p sums to 1."""
    raise NotImplementedError


def softmax_gradient(grad, x):
    """dx for grad = dL/dp."""
    raise NotImplementedError

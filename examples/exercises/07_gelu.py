"""Exercise 7: GELU.

GPT-2's activation lets a positive number pass and reduces a negative one to nearly 0, smoothly:

    y = 1/2 x (1 + tanh u),   u = sqrt(2/π) (x + 0.044715 x³).

By the product rule and tanh' = 1 - tanh²,

    dy/dx = 1/2 (1 + tanh u) + 1/2 x (1 - tanh² u) du/dx,   du/dx = sqrt(2/π) (1 + 3 · 0.044715 x²),

and dx = grad dy/dx, element by element. Hendrycks and Gimpel (arXiv 1606.08415), section 2.

When you are done, compare with ``tinyllm/functional/activations.py``.
Grade it: python -m parity grade examples/exercises/07_gelu.py
"""


def gelu(x):
    """y, of the shape of x."""
    raise NotImplementedError


def gelu_gradient(grad, x):
    """dx for grad = dL/dy."""
    raise NotImplementedError

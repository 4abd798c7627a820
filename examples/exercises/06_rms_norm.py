"""Exercise 6: RMSNorm.

LayerNorm without the mean, as Llama uses it: each row x of C channels is divided by its root mean square,

    rms = sqrt(1/C Σ_i x_i² + eps),   x_hat_i = x_i / rms,   y_i = weight_i x_hat_i.

For the gradient let g_i = dL/dx_hat_i = grad_i weight_i. The root depends on every x_k:

    dx_k = (g_k - x_hat_k 1/C Σ_i g_i x_hat_i) / rms,   dweight_i = Σ over rows of grad_i x_hat_i.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).

When you are done, compare with ``tinyllm/functional/norms.py``.
Grade it: python -m parity grade examples/exercises/06_rms_norm.py
"""


def rms_norm(x, weight, eps):
    """y for x (rows, C) and weight (C,): an array of the shape of x."""
    raise NotImplementedError


def rms_norm_gradient(grad, x, weight, eps):
    """(dx, dweight) for grad = dL/dy."""
    raise NotImplementedError

"""Exercise 5: LayerNorm.

Each row x of C channels is centred, scaled to variance 1, and then scaled and shifted by learned weights:

    mean = 1/C Σ_i x_i,   variance = 1/C Σ_i (x_i - mean)²,
    x_hat_i = (x_i - mean) / sqrt(variance + eps),   y_i = weight_i x_hat_i + bias_i.

For the gradient let g_i = dL/dx_hat_i = grad_i weight_i. Mean and variance depend on every x_k, so dx has
three terms:

    dx_k = (g_k - 1/C Σ_i g_i - x_hat_k 1/C Σ_i g_i x_hat_i) / sqrt(variance + eps).

weight and bias are shared by all rows: their gradients are sums over rows.

Ba et al., "Layer Normalization" (arXiv 1607.06450).

When you are done, compare with ``tinyllm/functional/norms.py``.
Grade it: python -m parity grade examples/exercises/05_layer_norm.py
"""


def layer_norm(x, weight, bias, eps):
    """y for x (rows, C), weight (C,) and bias (C,): an array of the shape of x."""
    raise NotImplementedError


def layer_norm_gradient(grad, x, weight, bias, eps):
    """(dx, dweight, dbias) for grad = dL/dy, of the shapes of x, weight and bias."""
    raise NotImplementedError

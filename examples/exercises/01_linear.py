"""Exercise 1: a linear layer.

Every row x of C_in channels becomes a row of C_out channels,

    y_no = Σ_i x_ni weight_oi + bias_o,   in matrices y = x weightᵀ + bias.

With grad = dL/dy the chain rule sums over all elements of y that an input affects: x_ni affects row n only,
weight_oi and bias_o affect channel o of every row:

    dx_ni = Σ_o grad_no weight_oi,   dweight_oi = Σ_n grad_no x_ni,   dbias_o = Σ_n grad_no.

When you are done, compare with ``tinyllm/functional/linear.py``.
Grade it: python -m parity grade examples/exercises/01_linear.py
"""


def linear(x, weight, bias):
    """y (rows, C_out) for x (rows, C_in), weight (C_out, C_in) and bias (C_out,)."""
    raise NotImplementedError


def linear_gradient(grad, x, weight, bias):
    """(dx, dweight, dbias) for grad = dL/dy, of the shapes of x, weight and bias."""
    raise NotImplementedError

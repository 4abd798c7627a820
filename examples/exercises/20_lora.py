"""Exercise 20: LoRA.

A layer is fine-tuned without changing its weight: a product of two small matrices is added,

    y = x weightᵀ + alpha/r (x Aᵀ) Bᵀ,   A (r, C_in), B (C_out, r).

The rank r is the number of rows of A, small against C_in and C_out. weight is frozen and has no gradient, but
x has one through both terms. With grad = dL/dy and s = alpha/r,

    dx = grad weight + s (grad B) A,   dA = s (grad B)ᵀ x,   dB = s gradᵀ (x Aᵀ).

Hu et al., "LoRA" (arXiv 2106.09685), section 4.1.

When you are done, compare with ``tinyllm/nn/lora.py``.
Grade it: python -m parity grade examples/exercises/20_lora.py
"""


def lora(x, weight, A, B, alpha):
    """y (rows, C_out) for x (rows, C_in) and weight (C_out, C_in)."""
    raise NotImplementedError


def lora_gradient(grad, x, weight, A, B, alpha):
    """(dx, dA, dB) for grad = dL/dy."""
    raise NotImplementedError

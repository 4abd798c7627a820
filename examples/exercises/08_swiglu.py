"""Exercise 8: SwiGLU.

Llama's feed-forward network has two projections of its input, and one gates the other. With the sigmoid
σ(a) = 1 / (1 + exp(-a)) and SiLU(a) = a σ(a),

    y = SiLU(gate) up.

σ' = σ (1 - σ), so by the product rule SiLU'(a) = σ(a) + a σ(a) (1 - σ(a)), and element by element

    dgate = grad up SiLU'(gate),   dup = grad SiLU(gate).

Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202), section 2.

When you are done, compare with ``tinyllm/functional/activations.py``.
Grade it: python -m parity grade examples/exercises/08_swiglu.py
"""


def swiglu(gate, up):
    """y, of the shape of gate and up."""
    raise NotImplementedError


def swiglu_gradient(grad, gate, up):
    """(dgate, dup) for grad = dL/dy."""
    raise NotImplementedError

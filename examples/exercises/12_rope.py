"""Exercise 12: rotary position embeddings.

A query or key of D channels is D/2 points of a plane, and each is rotated by an angle proportional to its
position. Then the product of a query and a key depends on their distance only. Channels i and i + D/2 are the
pair (a, b) (Hugging Face's layout), position m rotates it by the angle m ω_i with ω_i = theta^(-2i/D):

    y_i = a cos(m ω_i) - b sin(m ω_i),   y_(i + D/2) = b cos(m ω_i) + a sin(m ω_i),   i = 0 … D/2 - 1.

Row t of x has the position start + t.

Su et al., "RoFormer" (arXiv 2104.09864), section 3.4.2.

When you are done, compare with ``tinyllm/models/rope.py`` and ``tinyllm/functional/rope.py``.
Grade it: python -m parity grade examples/exercises/12_rope.py
"""


def rope(x, start, theta):
    """y for x (T, D) with an even D."""
    raise NotImplementedError

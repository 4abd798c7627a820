"""Exercise 10: several heads.

One projection computes the queries of all H heads at once: a row has H · D channels, of which the D
neighbouring channels from h D belong to head h. Attention works on each head alone, so the heads become the
first axis:

    y[h, t, d] = x[t, h D + d],

and afterwards they are joined again. Both are a reshape and an exchange of axes, in the right order.

Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), section 3.2.2.

When you are done, compare with ``tinyllm/models/gpt2.py``.
Grade it: python -m parity grade examples/exercises/10_heads.py
"""


def split_heads(x, heads):
    """y (H, T, D) for x (T, H · D)."""
    raise NotImplementedError


def join_heads(x):
    """The inverse: (T, H · D) for x (H, T, D)."""
    raise NotImplementedError

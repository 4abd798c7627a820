"""Exercise 11: grouped-query attention.

The key-value cache becomes smaller if several query heads share a key and a value head. There are H query
heads and G key-value heads, and H is a multiple of G: the first H/G query heads share the first key-value
head, the next H/G the second, and so on. Every query head computes causal attention (exercise 9) with its
key-value head.

Ainslie et al., "GQA" (arXiv 2305.13245).

When you are done, compare with ``tinyllm/functional/attention.py``.
Grade it: python -m parity grade examples/exercises/11_grouped_query_attention.py
"""


def grouped_query_attention(q, k, v):
    """y (H, T, D) for q (H, T, D), k (G, T, D) and v (G, T, D)."""
    raise NotImplementedError

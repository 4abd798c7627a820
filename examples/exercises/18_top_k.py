"""Exercise 18: temperature and top-k.

The next token is sampled from softmax(logits / temperature): a temperature below 1 prefers likely tokens,
above 1 it makes the distribution flatter. top-k keeps the k largest logits only, exactly k even if several
are equal: of equal ones those with the smallest ids. The kept probabilities sum to 1, all others are 0.

Fan et al., "Hierarchical Neural Story Generation" (arXiv 1805.04833), section 5.4.

When you are done, compare with ``tinyllm/inference/sampling.py``.
Grade it: python -m parity grade examples/exercises/18_top_k.py
"""


def top_k_probabilities(logits, k, temperature):
    """p (V,) for logits (V,), 1 ≤ k ≤ V and a temperature above 0."""
    raise NotImplementedError

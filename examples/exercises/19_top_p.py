"""Exercise 19: top-p, nucleus sampling.

Where the model is certain few tokens should be possible, and where it is not, many. So keep the smallest set
of most likely tokens whose probabilities sum to at least top_p: go through them by decreasing probability and
stop with the token at which the sum reaches top_p, which is kept, too. The kept probabilities are scaled to
sum to 1, all others are 0.

Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751), section 3.1.

When you are done, compare with ``tinyllm/inference/sampling.py``.
Grade it: python -m parity grade examples/exercises/19_top_p.py
"""


def top_p_probabilities(logits, top_p):
    """p (V,) for logits (V,), no two of which are equal, and 0 < top_p ≤ 1."""
    raise NotImplementedError

"""Exercise 4: cross-entropy.

The loss of a language model: minus the log-probability of the token that came, averaged over all N targets
that are not -100 (padding, or a prompt that is not learned). With p = softmax(logits),

    loss = -1/N Σ_n log p_n,target(n),   log p_i = x_i - max - log Σ_j exp(x_j - max).

The second form has no log(0) where a probability underflows. Its gradient is short, because the exponential
and the logarithm cancel:

    dlogits_ni = 1/N (p_ni - [i = target(n)]),   0 in a row whose target is -100.

At least one target is not -100.

When you are done, compare with ``tinyllm/functional/losses.py``.
Grade it: python -m parity grade examples/exercises/04_cross_entropy.py
"""


def cross_entropy(logits, targets):
    """The loss, a number, for logits (rows, classes) and integer targets (rows,)."""
    raise NotImplementedError


def cross_entropy_gradient(logits, targets):
    """dlogits = d(loss)/d(logits)."""
    raise NotImplementedError

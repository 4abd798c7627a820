"""Exercise 21: direct preference optimization.

People prefer one of two answers, and the model learns to prefer it, too, without moving far from where it
started. An answer's reward is r = beta (log π - log π_ref): the log-probability of the whole answer under the
model minus that under the reference, the model before training. The loss of a pair is

    -log σ(r_chosen - r_rejected),   σ(x) = 1 / (1 + exp(-x)),

and the loss is the mean over the pairs. At the start the model is the reference: both rewards are 0, and the
loss is log 2. For a large negative x exp(-x) overflows, but -log σ(x) = max(-x, 0) + log(1 + exp(-|x|)).

Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290), section 4.

When you are done, compare with ``tinyllm/training/preference.py``.
Grade it: python -m parity grade examples/exercises/21_dpo_loss.py
"""


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """The loss, a number, for log-probabilities (pairs,) under the model and under the reference."""
    raise NotImplementedError

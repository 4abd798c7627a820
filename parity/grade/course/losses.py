"""Exercises on softmax, cross-entropy and direct preference optimization."""

import numpy as np
import torch
import torch.nn.functional as TF
from hypothesis import strategies as st

from parity.grade.exercise import Mistake, Part, arrays, exercise, gradients, sizes, value

# ------------------------------------------------------------------------------------- softmax

# Beyond exp's range (709), as a bad start makes scores, and long answers log-probabilities
LARGE = st.sampled_from([1.0, 1000.0])


@st.composite
def scores(draw, backward: bool):
    rows, columns = draw(sizes()), draw(sizes(2))
    grad = {"grad": draw(arrays(rows, columns))} if backward else {}
    return grad | {"x": draw(arrays(rows, columns)) * draw(LARGE)}


def torch_softmax(x):
    return TF.softmax(x, dim=-1)


def softmax(x, axis=-1, shift=True):
    e = np.exp(x - x.max(axis, keepdims=True) if shift else x)
    return e / e.sum(axis, keepdims=True)


exercise(
    "softmax",
    Part(
        "softmax",
        ("p",),
        scores(backward=False),
        lambda x: value(torch_softmax, x),
        (
            Mistake(
                "the maximum is not subtracted",
                "exp overflows for large scores: subtract the maximum of each row first, which cancels in p.",
                lambda x: softmax(x, shift=False),
            ),
            Mistake(
                "the maximum of the whole array",
                "Subtract the maximum of each row: far below that of the whole array a row has only zeros.",
                lambda x: softmax(x - x.max(), shift=False),
            ),
            Mistake(
                "the wrong axis",
                "Each row must sum to 1, but your columns do: sum over axis -1.",
                lambda x: softmax(x, axis=0),
            ),
            Mistake(
                "all axes",
                "The whole array sums to 1, but each row must: sum over axis -1 with keepdims=True.",
                lambda x: softmax(x, axis=None),
            ),
            Mistake(
                "log-softmax",
                "That is log(p): softmax returns the probabilities themselves.",
                lambda x: value(lambda t: TF.log_softmax(t, dim=-1), x),
            ),
        ),
    ),
    Part(
        "softmax_gradient",
        ("dx",),
        scores(backward=True),
        lambda grad, x: gradients(torch_softmax, grad, x)[0],
        (
            Mistake(
                "the diagonal only",
                "p_i depends on every x_k through the sum: the Jacobian is p_i (δ_ik - p_k), "
                "not p_i (1 - p_i) on its diagonal alone.",
                lambda grad, x: grad * softmax(x) * (1 - softmax(x)),
            ),
            Mistake(
                "the sum's term missing",
                "Subtract Σ_i g_i p_i of each row from g before you multiply by p.",
                lambda grad, x: grad * softmax(x),
            ),
            Mistake(
                "the mean of g",
                "What is subtracted from g is its mean weighted by p, Σ_i g_i p_i, not its plain mean.",
                lambda grad, x: softmax(x) * (grad - grad.mean(-1, keepdims=True)),
            ),
            Mistake(
                "p missing in the sum",
                "The sum that is subtracted is of g_i p_i, not of g_i.",
                lambda grad, x: softmax(x) * (grad - grad.sum(-1, keepdims=True)),
            ),
        ),
    ),
)

# ------------------------------------------------------------------------------- cross-entropy

IGNORED = -100


@st.composite
def logits_and_targets(draw):
    """At least one target is not ignored."""
    rows, classes = draw(sizes()), draw(sizes(2))
    targets = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    ignored = draw(st.lists(st.booleans(), min_size=rows - 1, max_size=rows - 1))
    targets = [IGNORED if skip else target for target, skip in zip(targets, [False, *ignored])]
    return {"logits": draw(arrays(rows, classes)) * draw(LARGE), "targets": np.array(targets)}


def torch_cross_entropy(targets):
    return lambda logits: TF.cross_entropy(logits, torch.tensor(targets), ignore_index=IGNORED)


def log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def picked(table, targets):
    """table[n, targets[n]], 0 where the target is ignored."""
    kept = targets != IGNORED
    return np.where(kept, table[np.arange(len(targets)), np.where(kept, targets, 0)], 0.0)


def cross_entropy(logits, targets, count=None):
    return -picked(log_softmax(logits), targets).sum() / (count or (targets != IGNORED).sum())


def cross_entropy_gradient(logits, targets, count=None, keep_ignored=False, minus_one=True):
    kept = targets != IGNORED
    d = softmax(logits)
    if minus_one:
        d[np.flatnonzero(kept), targets[kept]] -= 1
    return np.where(kept[:, None] | keep_ignored, d, 0.0) / (count or kept.sum())


exercise(
    "cross_entropy",
    Part(
        "cross_entropy",
        ("loss",),
        logits_and_targets(),
        lambda logits, targets: float(value(torch_cross_entropy(targets), logits)),
        (
            Mistake(
                "ignored targets counted",
                "Divide by the number of targets that are not -100, not by the number of rows.",
                lambda logits, targets: cross_entropy(logits, targets, len(targets)),
            ),
            Mistake(
                "the sum",
                "The loss is the mean over the targets that are not -100; yours is the sum.",
                lambda logits, targets: cross_entropy(logits, targets, 1),
            ),
            Mistake(
                "the sign",
                "The loss is minus the mean log-probability, which makes it positive.",
                lambda logits, targets: -cross_entropy(logits, targets),
            ),
            Mistake(
                "ignored targets as indices",
                "A target of -100 has no loss at all: leave its row out before you take the mean.",
                lambda logits, targets: (
                    -log_softmax(logits)[
                        np.arange(len(targets)), np.where(targets == IGNORED, 0, targets)
                    ].mean()
                ),
            ),
            Mistake(
                "log of softmax",
                "log(softmax(x)) is -inf where p underflows: compute x - max - log Σ exp(x - max).",
                lambda logits, targets: (
                    -picked(np.log(softmax(logits)), targets).sum() / (targets != IGNORED).sum()
                ),
            ),
        ),
    ),
    Part(
        "cross_entropy_gradient",
        ("dlogits",),
        logits_and_targets(),
        lambda logits, targets: gradients(torch_cross_entropy(targets), np.float64(1.0), logits)[0],
        (
            Mistake(
                "not divided by the number of targets",
                "The loss is a mean: divide its gradient by the number of targets that are not -100.",
                lambda logits, targets: cross_entropy_gradient(logits, targets, 1),
            ),
            Mistake(
                "ignored targets counted",
                "Divide by the number of targets that are not -100, not by the number of rows.",
                lambda logits, targets: cross_entropy_gradient(logits, targets, len(targets)),
            ),
            Mistake(
                "ignored rows have a gradient",
                "A row whose target is -100 does not affect the loss: its gradient is 0.",
                lambda logits, targets: cross_entropy_gradient(logits, targets, keep_ignored=True),
            ),
            Mistake(
                "1 is not subtracted",
                "Your gradient is p; subtract 1 at each target: p - onehot(target).",
                lambda logits, targets: cross_entropy_gradient(logits, targets, minus_one=False),
            ),
            Mistake(
                "the sign",
                "The gradient is p - onehot(target): yours has the opposite sign.",
                lambda logits, targets: -cross_entropy_gradient(logits, targets),
            ),
        ),
    ),
)

# ----------------------------------------------------------------------------------------- DPO


@st.composite
def preference_pairs(draw):
    pairs = draw(sizes())
    names = "chosen", "rejected", "reference_chosen", "reference_rejected"
    scale = draw(LARGE)
    return {name: (draw(arrays(pairs)) - 3) * scale for name in names} | {
        "beta": draw(st.sampled_from([0.5, 0.1, 2.0]))
    }


def dpo(chosen, rejected, reference_chosen, reference_rejected, beta, mean=True, stable=True):
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    loss = np.logaddexp(0.0, -margin) if stable else np.log(1 + np.exp(-margin))
    return loss.mean() if mean else loss.sum()


def torch_dpo(chosen, rejected, reference_chosen, reference_rejected, beta):
    given = [torch.tensor(x) for x in (chosen, rejected, reference_chosen, reference_rejected)]
    margin = (given[0] - given[2]) - (given[1] - given[3])
    return float(-TF.logsigmoid(beta * margin).mean())


exercise(
    "dpo_loss",
    Part(
        "dpo_loss",
        ("loss",),
        preference_pairs(),
        torch_dpo,
        (
            Mistake(
                "no reference",
                "The reference's log-probabilities do not affect your loss: subtract them from the model's.",
                lambda reference_chosen, reference_rejected, **given: dpo(
                    **given, reference_chosen=0.0, reference_rejected=0.0
                ),
            ),
            Mistake(
                "the reference added",
                "Subtract the reference's log-probabilities: the reward is β log(π / π_ref).",
                lambda chosen, rejected, reference_chosen, reference_rejected, beta: dpo(
                    chosen, rejected, -reference_chosen, -reference_rejected, beta
                ),
            ),
            Mistake(
                "chosen and rejected exchanged",
                "The margin is the chosen answer's reward minus the rejected one's: yours is the opposite.",
                lambda chosen, rejected, reference_chosen, reference_rejected, beta: dpo(
                    rejected, chosen, reference_rejected, reference_chosen, beta
                ),
            ),
            Mistake(
                "no beta",
                "beta does not affect your loss: multiply the margin by it.",
                lambda **given: dpo(**given | {"beta": 1.0}),
            ),
            Mistake(
                "the sum",
                "The loss is the mean over the pairs; yours is the sum.",
                lambda **given: dpo(**given, mean=False),
            ),
            Mistake(
                "beta outside the logarithm",
                "beta multiplies the margin, inside the sigmoid; you multiply the loss by it.",
                lambda **given: given["beta"] * dpo(**given | {"beta": 1.0}),
            ),
            Mistake(
                "overflow",
                "exp(-x) overflows for a large negative x: compute max(-x, 0) + log(1 + exp(-|x|)), "
                "or np.logaddexp(0, -x).",
                lambda **given: dpo(**given, stable=False),
            ),
        ),
    ),
)

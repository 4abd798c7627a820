"""How does a model learn which of two answers is better?

Direct preference optimization (DPO; Rafailov et al., arXiv 2305.18290). Someone prefers the answer y_w to
y_l, both to the prompt x. Reinforcement learning from preferences would fit a reward r(x, y), and then look
for the model π whose answers have the highest reward without leaving π_ref, the model that it started from:

    max_π  E[r(x, y)] - β KL(π ‖ π_ref)        with the solution π(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x)

(eq. 3 and 4; Z normalizes). Solved for the reward, every model is optimal for one:

    r(x, y) = β (log π(y|x) - log π_ref(y|x)) + β log Z(x)                                             (eq. 5)

By Bradley and Terry, y_w is preferred with probability σ(r(x, y_w) - r(x, y_l)), where the unknown Z cancels.
So the likelihood of the preferences is a function of π itself, without a reward model and without sampling:

    L = -log σ(z),    z = β [(log π(y_w|x) - log π_ref(y_w|x)) - (log π(y_l|x) - log π_ref(y_l|x))]    (eq. 7)

Before the first step π = π_ref, so z = 0 and L = log 2. Since d(-log σ(z))/dz = -σ(-z), L is decreased by

    ∂L/∂log π(y_w|x) = -β σ(-z)      a higher probability of the preferred answer
    ∂L/∂log π(y_l|x) = +β σ(-z)      and a lower one of the other,

the more, the less the model agrees with the preference yet. A token's cross-entropy is -log p, so the
gradient of L is that of a cross-entropy whose targets have these numbers, negated, as weights. ``dpo_loss``
computes it so: first each answer's log-probability, without a graph; then, from the same hidden states, one
weighted cross-entropy. Both are fused with the head, so the logits of all tokens are never in memory, and
only the answers' positions go through it.
"""

from typing import NamedTuple

import numpy as np

from tinyllm.data.padded import IGNORED
from tinyllm.errors import Error
from tinyllm.models import LanguageModel
from tinyllm.models.packed import padded
from tinyllm.tensor import Tensor, no_grad


class Preferences(NamedTuple):
    """The losses of P pairs, and the rewards of their answers, the preferred one first; all float64."""

    losses: np.ndarray  # (P,)
    rewards: np.ndarray  # (P, 2): β (log π - log π_ref)
    slopes: np.ndarray  # (P, 2): ∂loss/∂log π


def preferences(log_probs, reference, beta: float) -> Preferences:
    """The DPO loss of pairs: ``log_probs`` and ``reference`` (P, 2) are log π and log π_ref, in nats.

    -log σ(z) = log(exp(0) + exp(-z)) is exact for every z, and so is σ(-z) = exp(-log(exp(0) + exp(z))).
    """
    rewards = beta * (np.asarray(log_probs, np.float64) - reference)
    margin = rewards[:, 0] - rewards[:, 1]  # z
    slope = beta * np.exp(-np.logaddexp(0, margin))  # β σ(-z)
    return Preferences(np.logaddexp(0, -margin), rewards, np.stack([-slope, slope], axis=1))


class Answers:
    """The answers in targets (P, 2, T): the positions that are not ``IGNORED``, M in total.

    An answer's log-probability is the sum over its tokens or, with ``mean``, their mean.
    """

    def __init__(self, targets: np.ndarray, mean: bool):
        flat = targets.reshape(-1)
        self.positions = np.flatnonzero(flat != IGNORED)  # (M,)
        time = targets.shape[-1]
        self.lengths = (np.arange(1, time + 1) * (targets != IGNORED)).max(axis=-1).reshape(-1)  # (2P,)
        self.targets = flat[self.positions]
        self.tokens = (targets != IGNORED).sum(-1).reshape(-1)  # (2P,): of each answer
        self.divisors = self.tokens if mean else np.ones_like(self.tokens)

    def hidden_states(self, model: LanguageModel, ids: np.ndarray) -> Tensor:
        """The hidden states (M, C) that predict the answers' tokens, for ids (P, 2, T).

        Raises ``Error`` for a model with a ``forward`` of its own, of which they are only a part.
        """
        if getattr(model.forward, "__func__", None) is not LanguageModel.forward:
            raise Error(
                f"{type(model).__name__}.forward is overridden, and DPO does not call it: override "
                "hidden_states() and head_logits() instead"
            )
        rows = ids.reshape(-1, ids.shape[-1])
        h = model.hidden_states(rows, padded(self.lengths, rows.shape[1], model))  # (2P, T, C)
        return h.reshape(-1, h.shape[-1])[np.asarray(self.positions, like=h.data)]

    def log_probs(self, model: LanguageModel, h: Tensor) -> np.ndarray:
        """log π (P, 2), in float64, from the hidden states (M, C)."""
        found, ends = [], np.cumsum(self.tokens)
        with no_grad():
            for first, last, divisor in zip(ends - self.tokens, ends, self.divisors):
                loss = model.head_loss(h[first:last], self.targets[first:last], divisor)
                found.append(-loss.item())
        return np.array(found, np.float64).reshape(-1, 2)


def answer_log_probs(model: LanguageModel, ids, targets, mean: bool = False) -> np.ndarray:
    """log π (P, 2) of both answers of P pairs, without a gradient: ids and targets (P, 2, T)."""
    answers = Answers(np.asarray(targets), mean)
    with no_grad():
        return answers.log_probs(model, answers.hidden_states(model, np.asarray(ids)))


def dpo_loss(
    model: LanguageModel, ids, targets, reference, num_targets: int, *, beta: float = 0.1, mean: bool = False
) -> Tensor:
    """Σ L over P pairs, divided by ``num_targets``, with its exact gradient.

    ``ids`` and ``targets`` (P, 2, T) are those of the preferred and the other answer, each after the prompt;
    targets are -100 except at the answer's tokens, of which every row has at least one. ``reference`` (P, 2)
    is ``answer_log_probs`` of the model before the first step. With ``mean`` an answer's log-probability is
    the mean over its tokens, so that long answers have no larger margins than short ones.
    """
    answers = Answers(np.asarray(targets), mean)
    h = answers.hidden_states(model, np.asarray(ids))
    found = preferences(answers.log_probs(model, h), np.asarray(reference), beta)
    weights = np.repeat(-found.slopes.reshape(-1) / answers.divisors, answers.tokens)  # (M,)
    surrogate = model.head_loss(h, answers.targets, num_targets, weights)  # its gradient is that of L
    loss = np.asarray(found.losses.sum() / num_targets, surrogate.dtype, like=surrogate.data)
    return Tensor.from_op(loss, (surrogate,), lambda grad: (grad,))

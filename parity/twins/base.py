"""What is a language model in PyTorch, whatever its architecture? The twin of tinyllm/models/base.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class TorchLanguageModel(nn.Module):
    """Logits and loss; an architecture defines ``hidden_states``, and a ``lm_head``.

    It also says what is the same in tinyllm and in ``transformers``.
    """

    ours: type  # tinyllm's class
    config_class: type  # and its config's
    published: str  # the class of ``transformers``
    attention: str  # its implementation of attention that computes in the dtype of the weights
    note: str | None = None  # what ``exact`` does, for a report

    @staticmethod
    def random_config(n_layer: int, n_head: int, n_embd: int, vocab_size: int, n_positions: int):
        """A config of these sizes with everything that the architecture can have, so that nothing hides."""
        raise NotImplementedError

    @staticmethod
    def in_transformers(config):
        """The class of ``transformers`` with the same config, or what comes closest, its weights random."""
        raise NotImplementedError

    @staticmethod
    def exact(theirs):
        """``theirs``, changed to compute everything in the dtype of its weights."""
        return theirs

    @staticmethod
    def only_published(config) -> list[str]:
        """Parameters that ``transformers`` has in any case, and this config has not: zero there."""
        return []

    @staticmethod
    def can_be_published(config) -> bool:
        """Whether ``transformers`` reads a folder of such a model."""
        return True

    def hidden_states(self, ids) -> torch.Tensor:
        """(B, T) -> (B, T, C), after the final norm."""
        raise NotImplementedError

    def forward(self, ids) -> torch.Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return self.lm_head(self.hidden_states(ids))

    def loss(self, ids, targets, num_targets=None, weights=None) -> torch.Tensor:
        """The mean cross-entropy of the targets (B, T) that are not -100, as ``tinyllm``'s models have it.

        ``weights`` (B, T) multiply each target's loss. The sum is divided by ``num_targets``; if that is not
        given, by the number of targets that count, or by the sum of their weights.
        """
        losses = F.cross_entropy(self(ids).flatten(0, 1), targets.flatten(), reduction="none")
        counted = targets != -100  # the others' losses are 0
        weights = counted if weights is None else weights * counted
        return (losses.view(targets.shape) * weights).sum() / (
            weights.sum() if num_targets is None else num_targets
        )

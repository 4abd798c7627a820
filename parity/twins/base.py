"""The base class of all twins, with everything that language models share; twin of tinyllm/models/base.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class TorchLanguageModel(nn.Module):
    """Logits and loss. An architecture defines ``hidden_states`` and ``lm_head``.

    It also names its counterparts in tinyllm and in ``transformers``.
    """

    ours: type  # tinyllm's class
    config_class: type  # the class of its config
    published: str  # the name of the class in ``transformers``
    attention: str  # the attention implementation there that computes in the dtype of the weights
    note: str | None = None  # description of ``exact`` for a report

    @staticmethod
    def random_config(n_layer: int, n_head: int, n_embd: int, vocab_size: int, n_positions: int):
        """A config of these sizes with every optional part of the architecture enabled."""
        raise NotImplementedError

    @staticmethod
    def in_transformers(config):
        """The model in ``transformers`` with the same config, or the closest one, and random weights."""
        raise NotImplementedError

    @staticmethod
    def exact(theirs):
        """``theirs``, modified to compute everything in the dtype of its weights."""
        return theirs

    @classmethod
    def as_published(cls, arrays: dict) -> dict:
        """The arrays of a tinyllm model under the names, and in the layout, of ``in_transformers``."""
        return arrays

    @staticmethod
    def only_published(config) -> list[str]:
        """Parameters that only ``transformers`` has with this config; they are set to zero there."""
        return []

    @staticmethod
    def can_be_published(config) -> bool:
        """Whether ``transformers`` can load a saved model of this config."""
        return True

    def hidden_states(self, ids) -> torch.Tensor:
        """(B, T) -> (B, T, C), after the final norm."""
        raise NotImplementedError

    def forward(self, ids) -> torch.Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return self.lm_head(self.hidden_states(ids))

    def loss(self, ids, targets, num_targets=None, weights=None) -> torch.Tensor:
        """The mean cross-entropy of the targets (B, T) that are not -100, as in ``tinyllm``'s models.

        ``weights`` (B, T) multiply each target's loss. The sum is divided by ``num_targets`` or, if it is
        omitted, by the number of targets that are not -100, or by the sum of their weights.
        """
        losses = F.cross_entropy(self(ids).flatten(0, 1), targets.flatten(), reduction="none")
        counted = targets != -100  # the others' losses are 0
        weights = counted if weights is None else weights * counted
        return (losses.view(targets.shape) * weights).sum() / (
            weights.sum() if num_targets is None else num_targets
        )

"""A language model that classifies texts, in PyTorch; twin of tinyllm/models/classifier.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from parity.twins.base import TorchLanguageModel
from parity.twins.rope import depends_on_length


class TorchSequenceClassifier(nn.Module):
    """Class logits of a hidden state; the twin of ``SequenceClassifier``."""

    def __init__(self, model: TorchLanguageModel, num_labels: int, pooling: str = "last"):
        super().__init__()
        self.pooling, self.config = pooling, model.config
        self.score = model.lm_head = nn.Linear(model.config.hidden_size, num_labels, bias=False)
        self.add_module(model.ours.prefix.rstrip("."), model)
        self.hidden_states = model.hidden_states

    def forward(self, ids, lengths=None) -> torch.Tensor:
        """Logits (B, K) of ids (B, T), of which the first ``lengths`` (B,) in a row are real."""
        lengths = torch.full((len(ids),), ids.shape[1]) if lengths is None else lengths
        if depends_on_length(self.config):  # each text by itself, without padding
            rows = [self.hidden_states(row[None, :length])[0] for row, length in zip(ids, lengths)]
        else:
            rows = self.hidden_states(ids)  # (B, T, C)
        if self.pooling == "mean":
            states = [row[:length].mean(dim=0) for row, length in zip(rows, lengths)]
        else:
            states = [row[length - 1 if self.pooling == "last" else 0] for row, length in zip(rows, lengths)]
        return self.score(torch.stack(states))

    def loss(self, ids, lengths, targets, num_targets=None) -> torch.Tensor:
        """Σ cross-entropy of the targets (B,) but -100, divided by ``num_targets`` or their number."""
        total = F.cross_entropy(self(ids, lengths), targets, reduction="sum")
        return total / ((targets != -100).sum() if num_targets is None else num_targets)

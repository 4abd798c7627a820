"""LoRA in PyTorch: tinyllm/nn/lora.py again, and put around the layers of a twin."""

from __future__ import annotations

import torch
from torch import nn

from tinyllm import nn as ours


class TorchLoRA(nn.Module):
    """y = x Wᵀ + b + s (d(x) Aᵀ) Bᵀ; the twin of ``tinyllm.nn.LoRA``."""

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float, use_rslora: bool):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scaling = alpha / rank**0.5 if use_rslora else alpha / rank

    def forward(self, x):
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(self.dropout(x)))


def add_lora(twin: nn.Module, model: ours.Module) -> nn.Module:
    """Wrap the layers of a twin that have LoRA in tinyllm's model, and train the same parameters.

    The twin has the weights of the model before LoRA was added. A and B are copied from the model.
    """
    for name, layer in ours.lora_layers(model).items():
        owner, _, last = name.rpartition(".")
        options = layer.rank, layer.alpha, layer.dropout.p, layer.use_rslora
        wrapped = TorchLoRA(twin.get_submodule(name), *options).to(twin.get_submodule(name).weight)
        with torch.no_grad():
            wrapped.lora_A.weight.copy_(torch.tensor(layer.lora_A.weight.data))
            wrapped.lora_B.weight.copy_(torch.tensor(layer.lora_B.weight.data))
        setattr(twin.get_submodule(owner), last, wrapped)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in trained)
    return twin

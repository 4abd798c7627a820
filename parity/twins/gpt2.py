"""What is GPT-2 in PyTorch? tinyllm/models/gpt2.py again, part by part, with torch's own ops.

To be read side by side with it: same config, same names, same order. Weights come from ``bridge.py``.

Shapes: B batch, T time, C = n_embd channels, H = n_head heads of size D = C/H, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tinyllm.models.gpt2 import GELU_FORMS, GPT2Config


class CausalSelfAttention(nn.Module):
    """Every position gathers from itself and the ones before it."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        C = config.n_embd
        self.n_head, self.attn_pdrop = config.n_head, config.attn_pdrop
        self.c_attn = nn.Linear(C, 3 * C, bias=config.qkv_bias)
        self.c_proj = nn.Linear(C, C)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):  # (B, T, C)
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(C, dim=-1)
        )
        dropout_p = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))  # (B, T, C)


class MLP(nn.Module):
    """Every position thinks by itself: out to a wider layer and back."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        C = config.n_embd
        inner = 4 * C if config.n_inner is None else config.n_inner
        self.c_fc = nn.Linear(C, inner)
        self.c_proj = nn.Linear(inner, C)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.approximate = GELU_FORMS[config.activation_function]

    def forward(self, x):  # (B, T, C)
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))  # (B, T, C)


class Block(nn.Module):
    """Attention, then the MLP; each adds to the residual stream what it computed from its norm."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x):  # (B, T, C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TorchGPT2(nn.Module):
    """GPT-2 with its language-model head: the twin of ``tinyllm.GPT2``."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.n_positions, C)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(C, config.layer_norm_epsilon)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=config.lm_head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight  # one matrix, read both ways

    def forward(self, ids, targets=None, num_targets=None) -> torch.Tensor:
        """Logits (B, T, V) of ids (B, T); with ``targets``, their loss as ``tinyllm.GPT2.loss`` has it."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits
        num_targets = (targets != -100).sum() if num_targets is None else num_targets
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return total / num_targets

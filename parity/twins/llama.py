"""What is Llama in PyTorch? tinyllm/models/llama.py again, part by part, with torch's own ops.

To be read side by side with it: same config, same names, same order. Weights come from ``bridge.py``.

Shapes: B batch, T time, C = hidden_size channels, H query heads and G key-value heads of size D, V
vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tinyllm.models.llama import LlamaConfig


def rope_frequencies(config: LlamaConfig) -> torch.Tensor:
    """The angle of each pair of channels per position, (D/2,) in float64; the cases as Llama 3.1 has them."""
    rope, D = config.rope_parameters, config.head_dim
    frequencies = 1 / rope["rope_theta"] ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        trained = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        wavelength = 2 * math.pi / frequencies
        smooth = (trained / wavelength - low) / (high - low)
        between = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
        scaled = torch.where(wavelength > trained / low, frequencies / rope["factor"], between)
        return torch.where(wavelength < trained / high, frequencies, scaled)
    return frequencies


def rope(x, cos, sin):  # (B, H, T, D)
    """Each half of the channels holds one coordinate of the points that are turned."""
    half = x.shape[-1] // 2
    turned_by_90_degrees = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * torch.cat([cos, cos], dim=-1) + turned_by_90_degrees * torch.cat([sin, sin], dim=-1)


class GroupedQueryAttention(nn.Module):
    """Every position gathers from itself and the ones before it; H query heads share G keys and values."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.attention_dropout = D, config.attention_dropout
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, G * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, G * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)

    def forward(self, x, rotation):  # (B, T, C), and cos and sin (T, D/2) of the positions
        B, T, _ = x.shape
        q, k, v = (
            projection(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H or G, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rope(q, *rotation), rope(k, *rotation)
        dropout_p = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=True, enable_gqa=True
        )  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class SwiGLU(nn.Module):
    """Every position thinks by itself: out to a wider layer, gated, and back."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, C, bias=config.mlp_bias)

    def forward(self, x):  # (B, T, C)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, C)


class LlamaBlock(nn.Module):
    """Attention, then the MLP; each adds to the residual stream what it computed from its norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GroupedQueryAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, rotation):  # (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class TorchLlama(nn.Module):
    """Llama with its language-model head: the twin of ``tinyllm.Llama``."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        C = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, C)
        self.layers = nn.ModuleList([LlamaBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(C, config.rms_norm_eps)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight  # one matrix, read both ways

    def forward(self, ids, targets=None, num_targets=None) -> torch.Tensor:
        """Logits (B, T, V) of ids (B, T); with ``targets``, their loss as ``tinyllm.Llama.loss`` has it."""
        x = self.embed_tokens(ids)  # (B, T, C)
        angles = torch.outer(torch.arange(ids.shape[1], dtype=torch.float64), rope_frequencies(self.config))
        rotation = angles.cos().to(x), angles.sin().to(x)
        for layer in self.layers:
            x = layer(x, rotation)
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits
        num_targets = (targets != -100).sum() if num_targets is None else num_targets
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return total / num_targets

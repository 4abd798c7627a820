"""GPT-2 in PyTorch: tinyllm/models/gpt2.py again, part by part, with torch's own ops.

Read the two files side by side: same config, same names, same order. ``bridge.py`` copies the weights.

Shapes: B batch, T time, C = n_embd channels, H = n_head heads of size D = C/H, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from parity.twins.base import TorchLanguageModel
from tinyllm.models.gpt2 import GPT2, GPT2Config

ACTIVATIONS = {
    "relu": F.relu,
    "tanh": torch.tanh,
    **dict.fromkeys(["silu", "swish"], F.silu),
    **dict.fromkeys(["gelu", "gelu_python"], F.gelu),
    **dict.fromkeys(
        ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"],
        partial(F.gelu, approximate="tanh"),
    ),
}


class CausalSelfAttention(nn.Module):
    """Causal self-attention: every position attends to itself and to those before it."""

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
    """The position-wise feed-forward network: C -> 4C -> C channels, unless n_inner is set."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        C = config.n_embd
        inner = 4 * C if config.n_inner is None else config.n_inner
        self.c_fc = nn.Linear(C, inner)
        self.c_proj = nn.Linear(inner, C)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.activation = config.activation_function

    def forward(self, x):  # (B, T, C)
        return self.dropout(self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x))))  # (B, T, C)


class Block(nn.Module):
    """Attention, then the MLP; each reads the normalized residual stream and adds its output to it."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x):  # (B, T, C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TorchGPT2(TorchLanguageModel):
    """GPT-2 with its language-model head: the twin of ``tinyllm.GPT2``."""

    ours, config_class = GPT2, GPT2Config
    published, attention = "GPT2LMHeadModel", "eager"

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
            self.lm_head.weight = self.wte.weight  # one matrix for both

    def hidden_states(self, ids):  # (B, T) -> (B, T, C)
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    # ---- The counterpart in transformers ----

    @staticmethod
    def random_config(**sizes) -> GPT2Config:
        return GPT2Config(**sizes)

    @staticmethod
    def in_transformers(config: GPT2Config):
        """Its head has no bias, so with ``lm_head_bias`` the head is replaced."""
        import transformers

        # The default ids of the special tokens would be outside a small vocabulary.
        theirs = transformers.GPT2Config(**asdict(config), bos_token_id=0, eos_token_id=0)
        theirs._attn_implementation = TorchGPT2.attention
        model = transformers.GPT2LMHeadModel(theirs)
        if config.lm_head_bias:
            model.lm_head = nn.Linear(config.n_embd, config.vocab_size)
            model.tie_weights()
        return model

    @staticmethod
    def only_published(config: GPT2Config) -> list[str]:
        """The bias of Q, K and V."""
        return [] if config.qkv_bias else [f"h.{i}.attn.c_attn.bias" for i in range(config.n_layer)]

    @staticmethod
    def can_be_published(config: GPT2Config) -> bool:
        return config.is_standard

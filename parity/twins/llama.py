"""Llama in PyTorch: tinyllm/models/llama.py again, part by part, with torch's own ops.

Read the two files side by side: same config, same names, same order. ``bridge.py`` copies the weights.

Shapes: B batch, T time, C = hidden_size channels, H query heads and G key-value heads of size D, V
vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from parity.twins.base import TorchLanguageModel
from parity.twins.rope import in_float64, rotation
from tinyllm.models.llama import Llama, LlamaConfig


def rope(x, cos, sin):  # (B, H, T, D)
    """Rotate the points (x[i], x[i + D/2]) of every position by its angles."""
    half = x.shape[-1] // 2
    rotated_by_90_degrees = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * torch.cat([cos, cos], dim=-1) + rotated_by_90_degrees * torch.cat([sin, sin], dim=-1)


def attention(q, k, v, dropout_p, scale=None, window=None, softcap=None):
    """Causal attention of q (B, H, T, D) to the last ``window`` of the keys and values (B, G, T, D)."""
    T, mask = q.shape[2], None
    if window is not None:
        distances = torch.arange(T)[:, None] - torch.arange(T)  # (T, T), query minus key
        mask = (distances >= 0) & (distances < window)
    if softcap is None:
        causal = dict(attn_mask=mask, is_causal=mask is None)
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, scale=scale, enable_gqa=True, **causal
        )
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    mask = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return F.dropout(weights, dropout_p) @ v


class GroupedQueryAttention(nn.Module):
    """Causal self-attention in which H query heads share G key-value heads."""

    scale = softcap = None  # of the scores: by default 1/sqrt(D), and not capped

    def __init__(self, config: LlamaConfig, layer: int = 0):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.attention_dropout = D, config.attention_dropout
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, G * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, G * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)
        self.window = config.window_of(layer)

    def heads(self, x):  # (B, T, C) -> (B, H, T, D), (B, G, T, D), (B, G, T, D)
        B, T, _ = x.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        return (linear(x).view(B, T, -1, self.head_dim).transpose(1, 2) for linear in projections)

    def forward(self, x, rotation):  # (B, T, C), and cos and sin (T, D/2) of the positions
        q, k, v = self.heads(x)
        q, k = rope(q, *rotation), rope(k, *rotation)
        dropout_p = self.attention_dropout if self.training else 0.0
        y = attention(q, k, v, dropout_p, self.scale, self.window, self.softcap)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class SwiGLU(nn.Module):
    """The gated position-wise feed-forward network: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, C, bias=config.mlp_bias)

    def forward(self, x):  # (B, T, C)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, C)


class LlamaBlock(nn.Module):
    """Attention, then the MLP; each reads the normalized residual stream and adds its output to it."""

    norm_class, attention_class, mlp_class = nn.RMSNorm, GroupedQueryAttention, SwiGLU

    def __init__(self, config: LlamaConfig, layer: int = 0):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = self.norm_class(C, eps)
        self.self_attn = self.attention_class(config, layer)
        self.post_attention_layernorm = self.norm_class(C, eps)
        self.mlp = self.mlp_class(config)

    def forward(self, x, rotation):  # (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class TorchLlama(TorchLanguageModel):
    """Llama with its language-model head: the twin of ``tinyllm.Llama``."""

    ours, config_class = Llama, LlamaConfig
    embedding_class, block_class = nn.Embedding, LlamaBlock
    published, attention = "LlamaForCausalLM", "sdpa"
    note = (
        "The Llama of transformers uses torch's RMSNorm and SDPA here, and RoPE angles in float64, because "
        "its own norm, angles and eager softmax are float32 even in a float64 model: an error of about 1e-7."
    )

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        C = config.hidden_size
        self.embed_tokens = self.embedding_class(config.vocab_size, C)
        layers = [self.block_class(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = self.block_class.norm_class(C, config.rms_norm_eps)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight  # one matrix for both

    def rotations(self, length, like):  # for each layer: cos and sin (T, D/2)
        return [rotation(self.config, length, like)] * len(self.layers)

    def hidden_states(self, ids):  # (B, T) -> (B, T, C)
        x = self.embed_tokens(ids)  # (B, T, C)
        for layer, angles in zip(self.layers, self.rotations(ids.shape[1], x)):
            x = layer(x, angles)
        return self.norm(x)

    # ---- The counterpart in transformers ----

    @classmethod
    def random_config(cls, n_layer: int, n_head: int, n_embd: int, vocab_size: int, n_positions: int):
        """Grouped heads, scaled frequencies, and biases if the architecture may have them."""
        values = dict(
            vocab_size=vocab_size,
            hidden_size=n_embd,
            intermediate_size=3 * n_embd,
            num_hidden_layers=n_layer,
            num_attention_heads=n_head,
            num_key_value_heads=n_head // 2 if n_head % 2 == 0 else 1,
            max_position_embeddings=n_positions,
            rope_parameters=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=max(1, n_positions // 2),
            ),
            attention_bias=True,
            mlp_bias=True,
        )
        known = {field.name for field in fields(cls.config_class)}
        return cls.config_class(**{name: value for name, value in values.items() if name in known})

    @staticmethod
    def in_transformers(config: LlamaConfig):
        import transformers

        their_class = getattr(transformers, config.hub_class)
        theirs = their_class.config_class(**asdict(config), bos_token_id=0, eos_token_id=0, pad_token_id=None)
        theirs._attn_implementation = TorchLlama.attention
        return their_class(theirs)

    @staticmethod
    def exact(theirs):
        """A relative of their Llama, with SDPA attention, that computes everything in its weights' dtype.

        Their RMSNorm, RoPE and eager softmax compute in float32 even in a float64 model. The error of 1e-7
        would hide smaller ones. Here the norm is torch's own, and the angles and their cosines are float64.
        The frequencies still come from *their* function, made to compute in float64.
        """
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rotary = theirs.base_model.rotary_emb
        compute = ROPE_INIT_FUNCTIONS.get(rotary.rope_type, rotary.compute_default_rope_parameters)

        def rms_norm(norm, x):
            return torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

        def cos_and_sin(x, position_ids):
            with in_float64():
                frequencies, scaling = compute(theirs.config, seq_len=int(position_ids.max()) + 1)
            angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
            return (angles.cos() * scaling).to(x), (angles.sin() * scaling).to(x)

        rotary.forward = cos_and_sin
        for module in theirs.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = partial(rms_norm, module)
        return theirs

"""What is Llama? GPT-2 with four changes.

1. RMSNorm replaces LayerNorm: divide by the root mean square, do not subtract the mean (arXiv 1910.07467).
2. Rotary position embeddings replace learned ones: queries and keys are rotated by angles proportional to
   their positions, so that their dot product depends on the distance only (arXiv 2104.09864, ``rope.py``).
3. SwiGLU replaces GELU: of two projections, one gates the other (arXiv 2002.05202).
4. Grouped-query attention: several query heads share one key and one value head, which makes the key-value
   cache smaller by that factor (arXiv 2305.13245).

Otherwise this file follows ``gpt2.py``. There are no biases by default, no dropout except on attention
weights, and the head is tied only on request. Touvron et al., "Llama 2" (arXiv 2307.09288), section 2.2;
Llama team, "The Llama 3 Herd of Models" (arXiv 2407.21783), section 3.2. Its relatives' files, such as
``qwen.py``, contain only their changes: each is a subclass.

Shapes: B batch, T time, C = hidden_size channels, H query heads and G key-value heads of size D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tinyllm import functional as F
from tinyllm import nn
from tinyllm.errors import Error
from tinyllm.models.base import LanguageModel, ModelConfig, register
from tinyllm.models.cache import look_back
from tinyllm.models.rope import Rope, checked_rope, longest, older_keys, with_rope_parameters
from tinyllm.models.sizes import LLAMA


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Hugging Face's field names and defaults: the size of Llama 2 7B.

    ``rope_parameters`` contains ``rope_theta``, ``rope_type`` (default "default") and the parameters of that
    type (see ``rope.py``).
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict = field(default_factory=dict)
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False

    model_type, hub_class, sizes = "llama", "LlamaForCausalLM", LLAMA
    whole_heads = True  # transformers requires that hidden_size is divisible, even if head_dim is given
    theta = 10000.0  # rope_theta, if it is not given
    context = property(lambda self: longest(self.rope_parameters, self.max_position_embeddings))
    kv_shape = property(lambda self: (self.num_key_value_heads, self.head_dim))

    def __post_init__(self):
        widths, choices = ("hidden_size", "intermediate_size", "head_dim"), {"hidden_act": ("silu",)}
        self.check(("num_hidden_layers",), widths, ("attention_dropout",), ("rms_norm_eps",), choices)
        C, H = self.hidden_size, self.num_attention_heads
        if C % H and (self.whole_heads or self.head_dim is None):
            raise Error(f"hidden_size ({C}) must be divisible by num_attention_heads ({H})")
        G, D = self.num_key_value_heads or H, self.head_dim or C // H
        if H % G:
            raise Error(f"num_attention_heads ({H}) must be divisible by num_key_value_heads ({G})")
        if D % 2:
            raise Error(f"head_dim must be even, not {D}: RoPE rotates pairs of channels")
        rope = checked_rope(self.rope_parameters, self.max_position_embeddings, D // 2, self.theta)
        # The dataclass is frozen: fill in the defaults this way.
        vars(self).update(num_key_value_heads=G, head_dim=D, rope_parameters=rope)

    @classmethod
    def from_dict(cls, config: Mapping) -> LlamaConfig:
        return super().from_dict(with_rope_parameters(config))

    def to_dict(self, standard: bool = True) -> dict:
        return super().to_dict(standard) | older_keys(self.rope_parameters)

    @classmethod
    def of_size(cls, vocab_size, *, context, n_layer, n_head, n_embd, n_kv_head=None, dropout=0.0,
                tie_head=True, qkv_bias=True, head_bias=False) -> LlamaConfig:  # fmt: skip
        for name, found, only in (("head_bias", head_bias, False), ("qkv_bias", qkv_bias, True)):
            if found != only:
                raise Error(f"{name} is {found}, but a {cls.model_type} has no such choice: omit it")
        # Three matrices of width 8/3 n_embd have the size of GPT-2's two of 4 n_embd (arXiv 2002.05202).
        inner = 64 * math.ceil(8 * n_embd / 3 / 64)
        return cls(vocab_size, n_embd, inner, n_layer, n_head, n_kv_head, head_dim=None,
                   max_position_embeddings=context, rms_norm_eps=1e-5, attention_dropout=dropout,
                   tie_word_embeddings=tie_head)  # fmt: skip


class GroupedQueryAttention(nn.Module):
    """Causal self-attention in which H query heads share G key and value heads."""

    # Of the scores: a Llama has the default, 1/sqrt(D), and no cap (see scaled_dot_product_attention)
    scale = softcap = None

    def __init__(self, config: LlamaConfig, rng, layer: int = 0):
        C, D, std = config.hidden_size, config.head_dim, config.initializer_range
        H, G, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.head_dim, self.attention_dropout, rng = D, config.attention_dropout, nn.as_generator(rng)
        self.q_proj = nn.Linear(C, H * D, bias, rng=rng, std=std)
        self.k_proj = nn.Linear(C, G * D, bias, rng=rng, std=std)
        self.v_proj = nn.Linear(C, G * D, bias, rng=rng, std=std)
        self.o_proj = nn.Linear(H * D, C, bias, rng=rng, std=std)
        self.score_bias = None  # or a module, see ``look_back``
        self.window = config.window_of(layer)  # None: all earlier positions

    def heads(self, x):
        """Queries (B, H, T, D), keys and values (B, G, T, D) of x (B, T, C), not rotated yet."""
        projections = self.q_proj, self.k_proj, self.v_proj
        return (linear(x).rearrange("b t (h d) -> b h t d", d=self.head_dim) for linear in projections)

    def forward(self, x, rotation, cache=None):
        """x (B, T, C), rotation: cos and sin (T, D/2) or (B, 1, T, D/2) of its positions -> (B, T, C)."""
        q, k, v = self.heads(x)
        q, k = F.rope(q, *rotation), F.rope(k, *rotation)  # keys are cached rotated
        k, v, mask = look_back(q, k, v, cache, self.score_bias)  # (B, G, S, D), cached ones included
        dropout_p = self.attention_dropout if self.training else 0.0
        window = self.window if cache is None else None  # otherwise it is in the mask
        y = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal=True, scale=self.scale, enable_gqa=True,
            window=window, softcap=self.softcap,
        )  # (B, H, T, D)  # fmt: skip
        return self.o_proj(y.rearrange("b h t d -> b t (h d)"))  # (B, T, C)


class SwiGLU(nn.Module):
    """The position-wise feed-forward network: expand, gate, project back."""

    def __init__(self, config: LlamaConfig, rng):
        C, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        std, rng = config.initializer_range, nn.as_generator(rng)
        self.gate_proj = nn.Linear(C, inner, bias, rng=rng, std=std)
        self.up_proj = nn.Linear(C, inner, bias, rng=rng, std=std)
        self.down_proj = nn.Linear(inner, C, bias, rng=rng, std=std)

    def forward(self, x):  # (B, T, C)
        return self.down_proj(F.swiglu(self.gate_proj(x), self.up_proj(x)))  # (B, T, C)


class LlamaBlock(nn.Module):
    """Attention, then the MLP. Each reads the normalized residual stream (B, T, C) and adds to it."""

    norm_class, attention_class, mlp_class = nn.RMSNorm, GroupedQueryAttention, SwiGLU

    def __init__(self, config: LlamaConfig, rng, layer: int = 0):
        C, eps, rng = config.hidden_size, config.rms_norm_eps, nn.as_generator(rng)
        self.input_layernorm = self.norm_class(C, eps)
        self.self_attn = self.attention_class(config, rng, layer)
        self.post_attention_layernorm = self.norm_class(C, eps)
        self.mlp = self.mlp_class(config, rng)

    def forward(self, x, rotation, cache=None):  # (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


@register
class Llama(LanguageModel):
    """Llama with its language-model head. Attribute names are the checkpoint's keys without ``model.``.

    Initial weights are from N(0, initializer_range²), as in ``transformers``.
    """

    config_class, token_embedding, blocks, depth = LlamaConfig, "embed_tokens", "layers", "num_hidden_layers"
    prefix, not_parameters = "model.", ("rotary_emb.inv_freq",)  # frequencies, in old files
    embedding_class, block_class, rope_class = nn.Embedding, LlamaBlock, Rope

    def __init__(self, config: LlamaConfig, rng):
        rng = self.configure(config, rng)
        C, std = config.hidden_size, config.initializer_range
        self.rope = self.rope_class(config)
        self.embed_tokens = self.embedding_class(config.vocab_size, C, rng=rng, std=std)
        self.layers = [self.block_class(config, rng, i) for i in range(config.num_hidden_layers)]
        self.norm = self.block_class.norm_class(C, config.rms_norm_eps)
        head_rng = None if config.tie_word_embeddings else rng
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False, rng=head_rng, std=std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight  # one matrix, two uses

    def rotations(self, positions, like) -> list:
        """For each layer, cos and sin of the positions' angles: the same for all."""
        return [self.rope(positions, like)] * len(self.layers)

    def hidden_states(self, ids, cache=None):
        ids, positions, caches = self.start(ids, cache)  # (B, T); (T,) or (B, T); one per layer
        x = self.embed_tokens(ids)  # (B, T, C)
        for layer, angles, layer_cache in zip(self.layers, self.rotations(positions, x.data), caches):
            x = layer(x, angles, layer_cache)
        if cache is not None:
            cache.advance(ids)
        return self.norm(x)

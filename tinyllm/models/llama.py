"""What is Llama? GPT-2 with four changes.

1. RMSNorm replaces LayerNorm: divide by the root mean square, do not subtract the mean (arXiv 1910.07467).
2. Rotary position embeddings replace learned ones: queries and keys are rotated by angles proportional to
   their positions, so that their dot product depends on the distance only (arXiv 2104.09864, ``rope.py``).
3. SwiGLU replaces GELU: of two projections, one gates the other (arXiv 2002.05202).
4. Grouped-query attention: several query heads share one key and one value head, which makes the key-value
   cache smaller by that factor (arXiv 2305.13245).

Otherwise this file follows ``gpt2.py``. There are no biases by default, no dropout except on attention
weights, and the head is tied only on request. Touvron et al., "Llama 2" (arXiv 2307.09288), section 2.2;
Llama team, "The Llama 3 Herd of Models" (arXiv 2407.21783), section 3.2.

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
from tinyllm.models.rope import checked_rope, older_keys, rope_frequencies, rope_of, rotation

LLAMA_3 = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8,
               rms_norm_eps=1e-5, max_position_embeddings=8192,
               rope_parameters=dict(rope_theta=500000.0))  # fmt: skip
LLAMA_3_ROPE = dict(rope_type="llama3", rope_theta=500000.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=8192)  # fmt: skip
LLAMA_3_1 = LLAMA_3 | dict(max_position_embeddings=131072, rope_parameters=LLAMA_3_ROPE | dict(factor=8.0))
LLAMA_3_2 = LLAMA_3_1 | dict(
    intermediate_size=8192, rope_parameters=LLAMA_3_ROPE | dict(factor=32.0), tie_word_embeddings=True
)
SIZES = {
    "toy": dict(
        vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    "Llama-2-7B": dict(max_position_embeddings=4096, rms_norm_eps=1e-5),
    "Llama-3-8B": LLAMA_3,
    "Llama-3.1-8B": LLAMA_3_1,
    "Llama-3.2-1B": LLAMA_3_2 | dict(hidden_size=2048, num_hidden_layers=16),
    "Llama-3.2-3B": LLAMA_3_2 | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24),
}  # fmt: skip


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Hugging Face's field names and defaults: the size of Llama 2 7B.

    ``rope_parameters`` contains ``rope_theta`` (default 10,000), ``rope_type`` (default "default") and the
    parameters of that type (see ``rope.py``).
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

    model_type, hub_class, sizes = "llama", "LlamaForCausalLM", SIZES
    context = property(lambda self: self.max_position_embeddings)
    kv_shape = property(lambda self: (self.num_key_value_heads, self.head_dim))

    def __post_init__(self):
        widths, choices = ("hidden_size", "intermediate_size", "head_dim"), {"hidden_act": ("silu",)}
        self.check(("num_hidden_layers",), widths, ("attention_dropout",), ("rms_norm_eps",), choices)
        C, H = self.hidden_size, self.num_attention_heads
        if C % H:  # transformers requires it even if head_dim is given
            raise Error(f"hidden_size ({C}) must be divisible by num_attention_heads ({H})")
        G = H if self.num_key_value_heads is None else self.num_key_value_heads
        D = C // H if self.head_dim is None else self.head_dim
        if H % G:
            raise Error(f"num_attention_heads ({H}) must be divisible by num_key_value_heads ({G})")
        if D % 2:
            raise Error(f"head_dim must be even, not {D}: RoPE rotates pairs of channels")
        values = dict(num_key_value_heads=G, head_dim=D, rope_parameters=checked_rope(self.rope_parameters))
        vars(self).update(values)  # the dataclass is frozen: fill in the defaults this way

    @classmethod
    def from_dict(cls, config: Mapping) -> LlamaConfig:
        given = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
        return super().from_dict(given | {"rope_parameters": rope_of(config)})

    def to_dict(self, standard: bool = True) -> dict:
        return super().to_dict(standard) | older_keys(self.rope_parameters)

    @classmethod
    def of_size(cls, vocab_size, *, context, n_layer, n_head, n_embd, n_kv_head=None, dropout=0.0,
                tie_head=True, qkv_bias=True, head_bias=False) -> LlamaConfig:  # fmt: skip
        if head_bias:
            raise Error("head_bias is True, but the head of a Llama has no bias: omit it")
        # Three matrices of width 8/3 n_embd have the size of GPT-2's two of 4 n_embd (arXiv 2002.05202).
        inner = 64 * math.ceil(8 * n_embd / 3 / 64)
        return cls(vocab_size, n_embd, inner, n_layer, n_head, n_kv_head, max_position_embeddings=context,
                   rms_norm_eps=1e-5, attention_dropout=dropout, tie_word_embeddings=tie_head)  # fmt: skip


class GroupedQueryAttention(nn.Module):
    """Causal self-attention in which H query heads share G key and value heads."""

    def __init__(self, config: LlamaConfig, rng):
        C, D, std = config.hidden_size, config.head_dim, config.initializer_range
        H, G, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.head_dim, self.attention_dropout, rng = D, config.attention_dropout, nn.as_generator(rng)
        self.q_proj = nn.Linear(C, H * D, bias, rng=rng, std=std)
        self.k_proj = nn.Linear(C, G * D, bias, rng=rng, std=std)
        self.v_proj = nn.Linear(C, G * D, bias, rng=rng, std=std)
        self.o_proj = nn.Linear(H * D, C, bias, rng=rng, std=std)
        self.score_bias = None  # or a module, see ``look_back``

    def forward(self, x, rotation, cache=None):
        """x (B, T, C), rotation: cos and sin (T, D/2) or (B, 1, T, D/2) of its positions -> (B, T, C)."""
        q, k, v = (
            projection(x).rearrange("b t (h d) -> b h t d", d=self.head_dim)  # (B, H or G, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = F.rope(q, *rotation), F.rope(k, *rotation)  # keys are cached rotated
        k, v, mask = look_back(q, k, v, cache, self.score_bias)  # (B, G, S, D), cached ones included
        dropout_p = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=True, enable_gqa=True)
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

    def __init__(self, config: LlamaConfig, rng):
        rng = nn.as_generator(rng)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GroupedQueryAttention(config, rng)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config, rng)

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

    def __init__(self, config: LlamaConfig, rng):
        rng = self.configure(config, rng)
        C, std = config.hidden_size, config.initializer_range
        self.frequencies = rope_frequencies(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, C, rng=rng, std=std)
        self.layers = [LlamaBlock(config, rng) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(C, config.rms_norm_eps)
        head_rng = None if config.tie_word_embeddings else rng
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False, rng=head_rng, std=std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight  # one matrix, two uses

    def hidden_states(self, ids, cache=None):
        ids, positions, caches = self.start(ids, cache)  # (B, T); (T,) or (B, T); one per layer
        x = self.embed_tokens(ids)  # (B, T, C)
        angles = rotation(self.frequencies, positions, like=x.data)
        for layer, layer_cache in zip(self.layers, caches):
            x = layer(x, angles, layer_cache)
        if cache is not None:
            cache.advance(ids)
        return self.norm(x)

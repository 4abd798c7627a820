"""What is GPT-2, from its config to its hidden states?

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3: the sum of token
and position embeddings passes through ``n_layer`` blocks, each ``x + attention(norm(x))`` then
``x + mlp(norm(x))``, and a final norm. The output layer is the token embedding.

Why the projections into the residual stream start with std/sqrt(2 n_layer): the final x is the embedding plus
one term from every attention and every MLP, N = 2 n_layer terms. If at initialization the terms are
independent with mean 0 and variance σ² each, the variance of their sum is the sum of their variances, N σ². A
term is linear in the projection's weight, so dividing the weight by sqrt(N) divides σ² by N: the sum has
variance σ² whatever the depth.

Why one matrix W (V, C) can be embedding and head: row W_i represents token i in both. The embedding looks it
up, x = W_id, and the head scores token i by the dot product z_i = W_i · h, which is large where h points
along W_i (Press and Wolf, arXiv 1608.05859). By the chain rule dL/dW is the sum over both uses: the head
contributes Σ_t (dL/dz_t) h_tᵀ, a matrix product, and the embedding adds each dL/dx_t to row id_t, a scatter.

Shapes: B batch, T time, C = n_embd channels, H = n_head heads of size D = C/H, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tinyllm import functional as F
from tinyllm import nn
from tinyllm.errors import Error
from tinyllm.models.base import LanguageModel, ModelConfig, register
from tinyllm.models.cache import look_back
from tinyllm.tensor_ops import split

# Hugging Face's names of activations. Names of one form of GELU differ in rounding only.
ACTIVATIONS = {
    "relu": F.relu,
    "tanh": lambda x: x.tanh(),
    **dict.fromkeys(["silu", "swish"], F.silu),
    **dict.fromkeys(["gelu", "gelu_python"], F.gelu),
    **dict.fromkeys(
        ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"],
        lambda x: F.gelu(x, approximate="tanh"),
    ),
}

SIZES = {
    "124M": dict(n_layer=12, n_head=12, n_embd=768),
    "355M": dict(n_layer=24, n_head=16, n_embd=1024),
    "774M": dict(n_layer=36, n_head=20, n_embd=1280),
    "1558M": dict(n_layer=48, n_head=25, n_embd=1600),
}


@dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """Hugging Face's field names, and two of tinyllm's own: ``qkv_bias`` and ``lm_head_bias``.

    A model that uses one of these is saved under a ``model_type`` that ``transformers`` refuses.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 n_embd
    activation_function: str = "gelu_new"
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    qkv_bias: bool = True
    lm_head_bias: bool = False

    model_type, hub_class, sizes = "gpt2", "GPT2LMHeadModel", SIZES
    is_standard = property(lambda self: self.qkv_bias and not self.lm_head_bias)
    context = property(lambda self: self.n_positions)
    hidden_size = property(lambda self: self.n_embd)
    kv_shape = property(lambda self: (self.n_head, self.n_embd // self.n_head))

    def __post_init__(self):
        dropouts, choices = ("embd_pdrop", "attn_pdrop", "resid_pdrop"), {"activation_function": ACTIVATIONS}
        self.check(("n_layer",), ("n_embd", "n_inner"), dropouts, ("layer_norm_epsilon",), choices)
        if self.n_embd % self.n_head:
            raise Error(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")

    @classmethod
    def of_size(cls, vocab_size, *, context, n_layer, n_head, n_embd, n_kv_head=None, dropout=0.0,
                tie_head=True, qkv_bias=True, head_bias=False) -> GPT2Config:  # fmt: skip
        if n_kv_head is not None:
            raise Error(f"n_kv_head is {n_kv_head}, but GPT-2 has a key-value head for every head: omit it")
        return cls(vocab_size, context, n_embd, n_layer, n_head, None, "gelu_new", dropout, dropout, dropout,
                   tie_word_embeddings=tie_head, qkv_bias=qkv_bias, lm_head_bias=head_bias)  # fmt: skip


class Conv1D(nn.Linear):
    """A Linear whose checkpoints store the weight as (in, out), from OpenAI's 1 x 1 convolutions."""

    def layout(self, name, array):
        return array.T if name == "weight" else array


class CausalSelfAttention(nn.Module):
    """Each position gathers information from itself and from the positions before it."""

    def __init__(self, config: GPT2Config, rng):
        C, std, rng = config.n_embd, config.initializer_range, nn.as_generator(rng)
        self.n_head, self.attn_pdrop = config.n_head, config.attn_pdrop
        self.c_attn = Conv1D(C, 3 * C, bias=config.qkv_bias, rng=rng, std=std)
        self.c_proj = Conv1D(C, C, rng=rng, std=std / math.sqrt(2 * config.n_layer))
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.score_bias = None  # or a module, see ``look_back``

    def forward(self, x, cache=None):  # (B, T, C)
        q, k, v = (
            part.rearrange("b t (h d) -> b h t d", h=self.n_head)  # (B, H, T, D)
            for part in split(self.c_attn(x), 3, axis=-1)
        )
        k, v, mask = look_back(q, k, v, cache, self.score_bias)  # (B, H, S, D), cached ones included
        dropout_p = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=True)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.rearrange("b h t d -> b t (h d)")))  # (B, T, C)


class MLP(nn.Module):
    """The position-wise feed-forward network: expand to ``inner`` channels, activate, project back."""

    def __init__(self, config: GPT2Config, rng):
        C, std, rng = config.n_embd, config.initializer_range, nn.as_generator(rng)
        inner = config.n_inner or 4 * C
        self.c_fc = Conv1D(C, inner, rng=rng, std=std)
        self.c_proj = Conv1D(inner, C, rng=rng, std=std / math.sqrt(2 * config.n_layer))
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.activation = config.activation_function

    def forward(self, x):  # (B, T, C)
        return self.dropout(self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x))))  # (B, T, C)


class Block(nn.Module):
    """Attention, then the MLP. Each reads the normalized residual stream and adds its output to it."""

    def __init__(self, config: GPT2Config, rng):
        rng = nn.as_generator(rng)
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, rng)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config, rng)

    def forward(self, x, cache=None):  # (B, T, C)
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


@register
class GPT2(LanguageModel):
    """GPT-2 with its language-model head. Attribute names are the checkpoint's keys.

    Initial weights are from N(0, initializer_range²), those of the two projections into the residual stream
    of each block from N(0, initializer_range² / (2 n_layer)).
    """

    config_class, token_embedding, blocks, depth = GPT2Config, "wte", "h", "n_layer"
    into_residual = ("c_proj",)
    prefix, learned_positions = "transformer.", True
    not_parameters = (".attn.bias", ".attn.masked_bias")  # causal masks

    def __init__(self, config: GPT2Config, rng):
        rng = self.configure(config, rng)
        C, std = config.n_embd, config.initializer_range
        self.wte = nn.Embedding(config.vocab_size, C, rng=rng, std=std)
        self.wpe = nn.Embedding(config.n_positions, C, rng=rng, std=std)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = [Block(config, rng) for _ in range(config.n_layer)]
        self.ln_f = nn.LayerNorm(C, config.layer_norm_epsilon)
        head_rng = None if config.tie_word_embeddings else rng
        self.lm_head = nn.Linear(C, config.vocab_size, bias=config.lm_head_bias, rng=head_rng, std=std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight  # one matrix, two uses

    def hidden_states(self, ids, cache=None):
        ids, positions, caches = self.start(ids, cache)  # (B, T); (T,) or (B, T); one per block
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        for block, layer_cache in zip(self.h, caches):
            x = block(x, layer_cache)
        if cache is not None:
            cache.advance(ids)
        return self.ln_f(x)

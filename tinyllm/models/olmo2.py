"""What is OLMo 2? Llama with its norms in other places.

1. The outputs of attention and MLP are normalized before they are added to the residual stream, and their
   inputs are not: the stream grows by vectors of one size per block, which keeps training stable.
2. Queries and keys are normalized too, all heads of a position at once, before they are divided into heads.

Everything else is ``llama.py``. OLMo team, "2 OLMo 2 Furious" (arXiv 2501.00656), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tinyllm import nn
from tinyllm.models.base import register
from tinyllm.models.llama import GroupedQueryAttention, Llama, LlamaBlock, LlamaConfig
from tinyllm.models.sizes import OLMO_2


@dataclass(frozen=True)
class Olmo2Config(LlamaConfig):
    """Hugging Face's field names and defaults."""

    vocab_size: int = 50304
    rms_norm_eps: float = 1e-5
    mlp_bias: ClassVar[bool] = False  # a field of a Llama's config only

    model_type, hub_class, sizes, whole_heads = "olmo2", "Olmo2ForCausalLM", OLMO_2, False


class Olmo2Attention(GroupedQueryAttention):
    """Llama's with normalized queries and keys."""

    def __init__(self, config: Olmo2Config, rng, layer: int = 0):
        super().__init__(config, rng, layer)
        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_norm = nn.RMSNorm(H * D, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(G * D, config.rms_norm_eps)

    def heads(self, x):
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)  # (B, T, H D) …
        return (y.rearrange("b t (h d) -> b h t d", d=self.head_dim) for y in (q, k, v))


class Olmo2Block(LlamaBlock):
    """Attention, then the MLP. Their outputs are normalized and added to the residual stream (B, T, C)."""

    attention_class = Olmo2Attention

    def __init__(self, config: Olmo2Config, rng, layer: int = 0):
        super().__init__(config, rng, layer)
        del self.input_layernorm
        self.post_feedforward_layernorm = self.norm_class(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotation, cache=None):  # (B, T, C)
        x = x + self.post_attention_layernorm(self.self_attn(x, rotation, cache))
        return x + self.post_feedforward_layernorm(self.mlp(x))


@register
class Olmo2(Llama):
    """OLMo 2 with its language-model head."""

    config_class, block_class = Olmo2Config, Olmo2Block

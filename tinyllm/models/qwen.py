"""What are Qwen2 and Qwen3? Llama with one or two changes.

Qwen2 and 2.5: the projections to queries, keys and values have biases, and the output projection has none.

Qwen3, which has no biases again:

1. Queries and keys are normalized by an RMSNorm over each head, before they are rotated. However large the
   weights grow, |q · k| / √D is at most √D times the norms' largest scales, which keeps training stable.
2. The size of a head is a number of its own: in Qwen3-0.6B 16 heads of 128 read 1,024 channels.

In both the upper layers may have a sliding window, see ``mistral.py``. Everything else is ``llama.py``. Qwen
team, "Qwen2 Technical Report" (arXiv 2407.10671), section 2.2.1, and "Qwen3 Technical Report" (arXiv
2505.09388), section 2; the norms are those of Dehghani et al. (arXiv 2302.05442), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tinyllm import nn
from tinyllm.models.base import register
from tinyllm.models.llama import GroupedQueryAttention, Llama, LlamaBlock, LlamaConfig
from tinyllm.models.sizes import QWEN_2_5, QWEN_3
from tinyllm.models.windows import FULL, SLIDING, checked_layer_types


@dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """Hugging Face's field names and defaults.

    With ``use_sliding_window``, layers from number ``max_window_layers`` on see the last ``sliding_window``
    positions only, unless ``layer_types`` has another kind of attention for some of them.
    """

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list | None = None  # None: as max_window_layers says
    attention_bias: ClassVar[bool] = True  # these two are fields of a Llama's config only
    mlp_bias: ClassVar[bool] = False

    model_type, hub_class, sizes = "qwen2", "Qwen2ForCausalLM", QWEN_2_5
    whole_heads, may_be_zero = False, ("max_window_layers",)

    def __post_init__(self):
        super().__post_init__()
        vars(self).update(sliding_window=self.sliding_window if self.use_sliding_window else None)
        kinds = checked_layer_types(self.layer_types, self.usual_kinds, self.sliding_window)
        vars(self).update(layer_types=None if kinds == self.usual_kinds else kinds)

    @property
    def usual_kinds(self) -> list[str]:
        first = self.num_hidden_layers if self.sliding_window is None else self.max_window_layers
        return [FULL if i < first else SLIDING for i in range(self.num_hidden_layers)]

    def window_of(self, layer):
        return self.sliding_window if (self.layer_types or self.usual_kinds)[layer] == SLIDING else None


class Qwen2Attention(GroupedQueryAttention):
    """Llama's with biases, except in the output projection."""

    def __init__(self, config: Qwen2Config, rng, layer: int = 0):
        super().__init__(config, rng, layer)
        self.o_proj.bias = None


class Qwen2Block(LlamaBlock):
    attention_class = Qwen2Attention


@register
class Qwen2(Llama):
    """Qwen2 with its language-model head."""

    config_class, block_class = Qwen2Config, Qwen2Block

    def current_config(self, **changes):
        kinds = [FULL if window is None else SLIDING for window in self.windows()]
        return super().current_config(layer_types=kinds, **changes)


# ------------------------------------------------------------------------------------- Qwen3


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """Hugging Face's field names and defaults: those of ``Qwen2Config`` but for the following."""

    head_dim: int | None = 128  # None: hidden_size / num_attention_heads
    attention_bias: bool = False  # in all four projections

    model_type, hub_class, sizes = "qwen3", "Qwen3ForCausalLM", QWEN_3


class Qwen3Attention(GroupedQueryAttention):
    """Llama's with normalized queries and keys."""

    def __init__(self, config: Qwen3Config, rng, layer: int = 0):
        super().__init__(config, rng, layer)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x):
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (linear(x).rearrange("b t (h d) -> b t h d", d=self.head_dim) for linear in projections)
        q, k = self.q_norm(q), self.k_norm(k)  # over the last axis, D
        return (y.rearrange("b t h d -> b h t d") for y in (q, k, v))


class Qwen3Block(LlamaBlock):
    attention_class = Qwen3Attention


@register
class Qwen3(Qwen2):
    """Qwen3 with its language-model head."""

    config_class, block_class = Qwen3Config, Qwen3Block

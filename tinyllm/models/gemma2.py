"""What is Gemma 2? Llama with more norms, layers of two kinds, and caps.

1. Embeddings are multiplied by √C. The head shares their weight, whose rows have a length of about 1: so the
   elements of the residual stream begin at about 1.
2. The scale of an RMSNorm is 1 + w. Its weight starts at 0.
3. The outputs of attention and MLP are normalized, too, before they are added to the residual stream.
4. GeGLU replaces SwiGLU: GELU in place of SiLU (arXiv 2002.05202).
5. Layers alternate between "sliding_attention", which sees the last positions only, and "full_attention". The
   cache of a sliding layer holds little more than its window.
6. Attention scores are multiplied by 1/√query_pre_attn_scalar. Both they and the logits are capped.

The head is tied. Everything else is ``llama.py``. Gemma team, "Gemma 2" (arXiv 2408.00118), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from tinyllm import functional as F
from tinyllm import nn
from tinyllm.errors import Error
from tinyllm.models.base import register
from tinyllm.models.llama import GroupedQueryAttention, Llama, LlamaBlock, LlamaConfig, SwiGLU
from tinyllm.models.sizes import GEMMA_2
from tinyllm.models.windows import FULL, SLIDING, checked_layer_types


@dataclass(frozen=True)
class Gemma2Config(LlamaConfig):
    """Hugging Face's field names and defaults: the size of Gemma 2 2B.

    ``layer_types`` has the kind of every layer; by default each ``pattern``-th is full, the others sliding.
    """

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    layer_types: list | None = None
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    hidden_act: ClassVar[str] = "silu"  # these two are fields of a Llama's config only
    mlp_bias: ClassVar[bool] = False

    model_type, hub_class, sizes, pattern = "gemma2", "Gemma2ForCausalLM", GEMMA_2, 2

    def __post_init__(self):
        super().__post_init__()
        caps = "final_logit_softcapping", "attn_logit_softcapping"
        caps = [name for name in caps if getattr(self, name) is not None]
        self.check((), (), (), caps, {"hidden_activation": ("gelu_pytorch_tanh",)})
        usual = self.kinds_of(self.num_hidden_layers, self.pattern)
        kinds = checked_layer_types(self.layer_types, usual, self.sliding_window)
        vars(self).update(layer_types=kinds)

    @staticmethod
    def kinds_of(layers: int, pattern: int) -> list[str]:
        """Every ``pattern``-th layer is full."""
        return [SLIDING if number % pattern else FULL for number in range(1, layers + 1)]

    def window_of(self, layer):
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    @classmethod
    def from_dict(cls, config: Mapping) -> Gemma2Config:
        config = dict(config)  # published files name the activation twice, and the window
        for key, other in (("hidden_act", "hidden_activation"), ("sliding_window_size", "sliding_window")):
            value = config.pop(key, None)
            if value not in (None, config.get(other)):
                raise Error(f"{key} is {value!r}, and {other} {config.get(other)!r}")
        return super().from_dict(config)

    @classmethod
    def of_size(cls, vocab_size, **sizes) -> Gemma2Config:
        """The window is a quarter of the context; if there are few layers, the last one is full."""
        config = super().of_size(vocab_size, **sizes)
        n, window = config.num_hidden_layers, math.ceil(config.context / 4)
        kinds = cls.kinds_of(n, min(cls.pattern, n))
        return replace(config, rms_norm_eps=1e-6, query_pre_attn_scalar=config.head_dim,
                       sliding_window=window, layer_types=kinds)  # fmt: skip


class GemmaAttention(GroupedQueryAttention):
    """Llama's, with another scale, with a window in a sliding layer, and with a cap if the config has one."""

    def __init__(self, config: Gemma2Config, rng, layer: int = 0):
        super().__init__(config, rng, layer)
        self.kind, self.scale = config.layer_types[layer], config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping


class GeGLU(SwiGLU):
    """The position-wise feed-forward network: expand, gate with GELU, project back."""

    def forward(self, x):  # (B, T, C)
        return self.down_proj(F.geglu(self.gate_proj(x), self.up_proj(x)))  # (B, T, C)


class GemmaBlock(LlamaBlock):
    """Attention, then the MLP, each between two norms."""

    norm_class, attention_class, mlp_class = nn.OffsetRMSNorm, GemmaAttention, GeGLU

    def __init__(self, config: Gemma2Config, rng, layer: int = 0):
        super().__init__(config, rng, layer)
        self.pre_feedforward_layernorm = self.norm_class(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = self.norm_class(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotation, cache=None):  # (B, T, C)
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotation, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class ScaledEmbedding(nn.Embedding):
    """Row i of W (V, C), multiplied by √C, for every id i."""

    def forward(self, ids):
        return super().forward(ids) * math.sqrt(self.weight.shape[1])


@register
class Gemma2(Llama):
    """Gemma 2 with its language-model head. Attribute names are the checkpoint's keys without ``model.``."""

    config_class, embedding_class, block_class = Gemma2Config, ScaledEmbedding, GemmaBlock
    logit_softcap = property(lambda self: self.config.final_logit_softcapping)

    def kinds(self) -> list[str]:
        """Of the current blocks; of the config's if an attention layer was replaced."""
        kinds = [module.kind for module in self.modules() if isinstance(module, GemmaAttention)]
        return kinds if len(kinds) == len(self.layers) else self.config.layer_types

    def windows(self):
        return [self.config.sliding_window if kind == SLIDING else None for kind in self.kinds()]

    def current_config(self):
        return super().current_config(layer_types=self.kinds())

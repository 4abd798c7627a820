"""What is SmolLM3? Llama with layers that know no positions.

In every fourth layer queries and keys are not rotated (NoPE): attention there depends on what the tokens are,
not on how far apart they are, which helps with texts longer than those in training, and the causal mask still
orders them. Yang et al., "Rope to Nope and Back Again" (arXiv 2501.18795); Kazemnejad et al. (arXiv
2305.19466). Everything else is ``llama.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tinyllm.errors import Error
from tinyllm.models.base import register
from tinyllm.models.llama import GroupedQueryAttention, LlamaBlock, LlamaConfig
from tinyllm.models.qwen import Qwen2, Qwen2Config
from tinyllm.models.sizes import SMOLLM_3
from tinyllm.models.windows import FULL, SLIDING


@dataclass(frozen=True)
class SmolLM3Config(Qwen2Config):
    """Hugging Face's field names and defaults.

    ``no_rope_layers`` has a 1 for each layer that rotates and a 0 for each that does not, by default for
    every ``no_rope_layer_interval``-th. With ``use_sliding_window``, the latter have the window.
    """

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    sliding_window: int | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    no_rope_layers: list | None = None
    no_rope_layer_interval: int = 4
    max_window_layers: ClassVar[int] = 0  # a field of a Qwen's config only

    model_type, hub_class, sizes, theta = "smollm3", "SmolLM3ForCausalLM", SMOLLM_3, 2000000.0

    def __post_init__(self):
        LlamaConfig.__post_init__(self)  # checks the fields that are read here
        n, rotate = self.num_hidden_layers, self.no_rope_layers
        if rotate is None:
            rotate = [int((i + 1) % self.no_rope_layer_interval != 0) for i in range(n)]
        if not isinstance(rotate, list) or len(rotate) != n or any(x not in (0, 1) for x in rotate):
            raise Error(f"no_rope_layers must have 0 or 1 for each of {n} layers, not {rotate!r}")
        vars(self).update(no_rope_layers=rotate)
        super().__post_init__()

    def to_dict(self, standard: bool = True) -> dict:
        """Without an id for padding: that of ``transformers``, 128,004, is not in a smaller vocabulary."""
        return super().to_dict(standard) | {"pad_token_id": None}

    @property
    def usual_kinds(self) -> list[str]:
        has_windows = self.sliding_window is not None
        return [SLIDING if has_windows and not rotates else FULL for rotates in self.no_rope_layers]


class SmolLM3Attention(GroupedQueryAttention):
    """Llama's, in some layers without the rotation."""

    def __init__(self, config: SmolLM3Config, rng, layer: int = 0):
        super().__init__(config, rng, layer)
        self.rotates = bool(config.no_rope_layers[layer])

    def forward(self, x, rotation, cache=None):
        cos, sin = rotation
        unchanged = np.ones_like(cos), np.zeros_like(sin)  # by an angle of 0
        return super().forward(x, rotation if self.rotates else unchanged, cache)


class SmolLM3Block(LlamaBlock):
    attention_class = SmolLM3Attention


@register
class SmolLM3(Qwen2):
    """SmolLM3 with its language-model head."""

    config_class, block_class = SmolLM3Config, SmolLM3Block

    def current_config(self, **changes):
        attentions = [module for module in self.modules() if isinstance(module, SmolLM3Attention)]
        if len(attentions) == len(self.layers):
            changes["no_rope_layers"] = [int(attention.rotates) for attention in attentions]
        return super().current_config(**changes)

"""What is Mistral? Llama with a sliding window.

A query attends to the last W positions only, its own included, instead of to all earlier ones. Time and the
key-value cache then grow with W instead of with the length of the text. A layer still passes on what it saw:
after n layers a position depends on n (W - 1) earlier ones. Jiang et al., "Mistral 7B" (arXiv 2310.06825),
section 2; the idea is Child et al.'s (arXiv 1904.10509) and Beltagy et al.'s (arXiv 2004.05150).

Published from version 0.2 on without a window, a Mistral is a Llama.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from tinyllm.errors import Error
from tinyllm.models.base import register
from tinyllm.models.llama import Llama, LlamaBlock, LlamaConfig
from tinyllm.models.sizes import MISTRAL
from tinyllm.models.windows import FULL, SLIDING


@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """Hugging Face's field names and defaults."""

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096  # None: all earlier positions
    attention_bias: ClassVar[bool] = False  # these two are fields of a Llama's config only
    mlp_bias: ClassVar[bool] = False

    model_type, hub_class, sizes = "mistral", "MistralForCausalLM", MISTRAL
    whole_heads = False

    def window_of(self, layer):
        return self.sliding_window

    @classmethod
    def from_dict(cls, config: Mapping) -> MistralConfig:
        """``layer_types`` may say once more what ``sliding_window`` says."""
        config = dict(config)
        kinds, window = (
            config.pop("layer_types", None) or [],
            config.get("sliding_window", cls.sliding_window),
        )
        only = FULL if window is None else SLIDING
        if not isinstance(kinds, list) or any(kind != only for kind in kinds):
            raise Error(
                f"layer_types {kinds} and sliding_window {window} are not supported: all layers of a Mistral "
                f"are {SLIDING}, or without a window {FULL}"
            )
        return super().from_dict(config)

    @classmethod
    def of_size(cls, vocab_size, **sizes) -> MistralConfig:
        """The window is a quarter of the context."""
        config = super().of_size(vocab_size, **sizes)
        return replace(config, sliding_window=math.ceil(config.context / 4))


class MistralBlock(LlamaBlock):
    """Llama's. The window is an option of its attention."""


@register
class Mistral(Llama):
    """Mistral with its language-model head."""

    config_class, block_class = MistralConfig, MistralBlock

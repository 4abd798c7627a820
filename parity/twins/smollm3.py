"""SmolLM3 in PyTorch: tinyllm/models/smollm3.py again, as a change to the twin of Llama."""

from __future__ import annotations

from dataclasses import replace

from parity.twins.llama import GroupedQueryAttention, LlamaBlock, TorchLlama
from tinyllm.models.smollm3 import SmolLM3, SmolLM3Config


class SmolLM3Attention(GroupedQueryAttention):
    """Llama's, in some layers without the rotation."""

    def __init__(self, config: SmolLM3Config, layer: int = 0):
        super().__init__(config, layer)
        self.rotates = config.no_rope_layers[layer] == 1

    def forward(self, x, rotation):
        cos, sin = rotation
        return super().forward(x, rotation if self.rotates else (cos * 0 + 1, sin * 0))


class SmolLM3Block(LlamaBlock):
    attention_class = SmolLM3Attention


class TorchSmolLM3(TorchLlama):
    """SmolLM3 with its language-model head: the twin of ``tinyllm.models.SmolLM3``."""

    ours, config_class, block_class = SmolLM3, SmolLM3Config, SmolLM3Block
    published, note = "SmolLM3ForCausalLM", TorchLlama.note.replace("Llama", "SmolLM3")

    @classmethod
    def random_config(cls, **sizes):
        """As a Llama's, with every second layer unrotated, in a window of a quarter of the context."""
        config = super().random_config(**sizes)
        window = dict(use_sliding_window=True, sliding_window=max(1, config.max_position_embeddings // 4))
        return replace(config, no_rope_layers=None, no_rope_layer_interval=2, **window)

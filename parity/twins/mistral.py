"""Mistral in PyTorch: tinyllm/models/mistral.py again, as a change to the twin of Llama."""

from __future__ import annotations

from dataclasses import replace

from parity.twins.llama import TorchLlama
from tinyllm.models.mistral import Mistral, MistralConfig


class TorchMistral(TorchLlama):
    """Mistral with its language-model head: the twin of ``tinyllm.models.Mistral``.

    The window is an option of Llama's attention.
    """

    ours, config_class = Mistral, MistralConfig
    published, note = "MistralForCausalLM", TorchLlama.note.replace("Llama", "Mistral")

    @classmethod
    def random_config(cls, **sizes):
        """Grouped heads, scaled frequencies and a window of a quarter of the context."""
        config = super().random_config(**sizes)
        return replace(config, sliding_window=max(1, config.max_position_embeddings // 4))

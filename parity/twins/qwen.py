"""Qwen2 and Qwen3 in PyTorch: tinyllm/models/qwen.py again, as changes to the twin of Llama."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from parity.twins.llama import GroupedQueryAttention, LlamaBlock, TorchLlama
from tinyllm.models.qwen import Qwen2, Qwen2Config, Qwen3, Qwen3Config


class Qwen2Attention(GroupedQueryAttention):
    """Llama's with biases, except in the output projection."""

    def __init__(self, config: Qwen2Config, layer: int = 0):
        super().__init__(config, layer)
        self.o_proj = nn.Linear(self.o_proj.in_features, self.o_proj.out_features, bias=False)


class Qwen2Block(LlamaBlock):
    attention_class = Qwen2Attention


class TorchQwen2(TorchLlama):
    """Qwen2 with its language-model head: the twin of ``tinyllm.models.Qwen2``."""

    ours, config_class, block_class = Qwen2, Qwen2Config, Qwen2Block
    published, note = "Qwen2ForCausalLM", TorchLlama.note.replace("Llama", "Qwen2")

    @classmethod
    def random_config(cls, **sizes):
        """Grouped heads, frequencies extended by YaRN, and a window in the upper layers."""
        config = super().random_config(**sizes)
        n, positions = config.num_hidden_layers, config.max_position_embeddings
        rope = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=max(1, positions // 4))
        window = dict(use_sliding_window=True, sliding_window=max(1, positions // 4))
        return replace(config, rope_parameters=rope, max_window_layers=n // 2, **window)


class Qwen3Attention(GroupedQueryAttention):
    """Llama's with an RMSNorm over every head of the queries and keys."""

    def __init__(self, config: Qwen3Config, layer: int = 0):
        super().__init__(config, layer)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x):
        B, T, _ = x.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (linear(x).view(B, T, -1, self.head_dim) for linear in projections)
        return (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))


class Qwen3Block(LlamaBlock):
    attention_class = Qwen3Attention


class TorchQwen3(TorchQwen2):
    """Qwen3 with its language-model head: the twin of ``tinyllm.models.Qwen3``."""

    ours, config_class, block_class = Qwen3, Qwen3Config, Qwen3Block
    published, note = "Qwen3ForCausalLM", TorchLlama.note.replace("Llama", "Qwen3")

"""OLMo 2 in PyTorch: tinyllm/models/olmo2.py again, as changes to the twin of Llama."""

from __future__ import annotations

from torch import nn

from parity.twins.llama import GroupedQueryAttention, LlamaBlock, TorchLlama
from tinyllm.models.olmo2 import Olmo2, Olmo2Config


class Olmo2Attention(GroupedQueryAttention):
    """Llama's with an RMSNorm over all heads of the queries, and one over those of the keys."""

    def __init__(self, config: Olmo2Config, layer: int = 0):
        super().__init__(config, layer)
        self.q_norm = nn.RMSNorm(self.q_proj.out_features, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.k_proj.out_features, config.rms_norm_eps)

    def heads(self, x):
        B, T, _ = x.shape
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        return (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in (q, k, v))


class Olmo2Block(LlamaBlock):
    """Attention, then the MLP; the output of each is normalized and added to the residual stream."""

    attention_class = Olmo2Attention

    def __init__(self, config: Olmo2Config, layer: int = 0):
        super().__init__(config, layer)
        del self.input_layernorm
        self.post_feedforward_layernorm = self.norm_class(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotation):  # (B, T, C)
        x = x + self.post_attention_layernorm(self.self_attn(x, rotation))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class TorchOlmo2(TorchLlama):
    """OLMo 2 with its language-model head: the twin of ``tinyllm.models.Olmo2``."""

    ours, config_class, block_class = Olmo2, Olmo2Config, Olmo2Block
    published, note = "Olmo2ForCausalLM", TorchLlama.note.replace("Llama", "OLMo 2")

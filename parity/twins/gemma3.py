"""Gemma 3 in PyTorch: tinyllm/models/gemma3.py again, part by part, with torch's own ops.

Like it, this file has Gemma 2's twin (``gemma2.py``) and the changes to it.
"""

from __future__ import annotations

from parity.twins.gemma2 import GemmaAttention, GemmaBlock, OffsetRMSNorm, TorchGemma2, exact_angles
from parity.twins.rope import rotation
from tinyllm.models.gemma3 import Gemma3, Gemma3Config


class Gemma3Attention(GemmaAttention):
    """Gemma 2's, with normalized queries and keys, and the angles of the layer's kind."""

    def __init__(self, config: Gemma3Config, layer: int = 0):
        super().__init__(config, layer)
        self.q_norm = OffsetRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = OffsetRMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x):
        q, k, v = super().heads(x)  # (B, H, T, D), (B, G, T, D)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x, rotations):  # (B, T, C), and cos and sin (T, D/2) of each kind of layer
        return super().forward(x, rotations[self.kind])


class Gemma3Block(GemmaBlock):
    attention_class = Gemma3Attention


class TorchGemma3(TorchGemma2):
    """Gemma 3's text model with its language-model head: the twin of ``tinyllm.models.Gemma3``."""

    ours, config_class, block_class = Gemma3, Gemma3Config, Gemma3Block
    published = "Gemma3ForCausalLM"

    def rotations(self, length, like):  # for each layer: those of both kinds, of which it takes its own
        kinds = self.config.rope_parameters.items()
        return [{kind: rotation(self.config, length, like, rope) for kind, rope in kinds}] * len(self.layers)

    @staticmethod
    def own_options() -> dict:
        full = dict(rope_type="linear", factor=3.0, rope_theta=500.0)
        return dict(rope_parameters=dict(full_attention=full, sliding_attention=dict(rope_theta=20.0)))

    @staticmethod
    def with_exact_angles(rotary):
        kinds = {kind: exact_angles(rotary, name, layer_type=kind) for kind, name in rotary.rope_type.items()}
        rotary.forward = lambda x, position_ids, layer_type: kinds[layer_type](x, position_ids)

"""What is Gemma 3? Gemma 2 with two changes; here the text model.

1. Queries and keys are normalized, head by head, which keeps the scores in bounds and makes the caps
   unnecessary: there is none on the attention scores, and none on the logits by default.
2. Five of six layers are sliding, and rotate queries and keys by angles of their own, with θ = 10,000. The
   full layers have θ = 1,000,000, for contexts of up to 131,072 tokens.

Gemma team, "Gemma 3" (arXiv 2503.19786), section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from tinyllm import nn
from tinyllm.checks import check_at_least
from tinyllm.errors import Error
from tinyllm.models.base import ModelConfig, register
from tinyllm.models.gemma2 import Gemma2, Gemma2Config, GemmaAttention, GemmaBlock
from tinyllm.models.rope import Rope, checked_rope, older_keys, rope_of
from tinyllm.models.sizes import GEMMA_3
from tinyllm.models.windows import FULL, SLIDING

THETAS = {SLIDING: 10000.0, FULL: 1000000.0}  # the defaults


@dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """Those of Gemma 2 with other defaults. ``rope_parameters`` has an item for each kind of layer."""

    vocab_size: int = 262208
    max_position_embeddings: int = 131072
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: ClassVar[None] = None

    model_type, hub_class, sizes, pattern = "gemma3_text", "Gemma3ForCausalLM", GEMMA_3, 6
    classifier_class, short_name = "Gemma3TextForSequenceClassification", "gemma3"

    def __post_init__(self):
        given = of_kinds(self.rope_parameters)
        vars(self).update(rope_parameters={})  # a Llama has parameters of one kind only
        super().__post_init__()
        sizes = self.max_position_embeddings, self.head_dim // 2
        rope = {kind: checked_rope(given[kind], *sizes, THETAS[kind]) for kind in given}
        vars(self).update(rope_parameters=rope)

    @classmethod
    def from_dict(cls, config: Mapping) -> Gemma3Config:
        """Files written before transformers 5 have a number for each θ, and one for the pattern of layers."""
        config = dict(config)
        patterns = [config.pop(key, None) for key in ("sliding_window_pattern", "_sliding_window_pattern")]
        older = {
            SLIDING: {"rope_theta": config.pop("rope_local_base_freq", None)},
            FULL: {key: config.pop(key, None) for key in ("rope_theta", "rope_scaling")},
        }
        given = of_kinds(config.get("rope_parameters") or {})
        rope = {kind: rope_of(older[kind] | {"rope_parameters": given[kind]}) for kind in given}
        found = super().from_dict(config | {"rope_parameters": rope})
        if config.get("layer_types") is not None or not any(patterns):
            return found
        pattern = check_at_least(patterns[0] or patterns[1], 1, "sliding_window_pattern")
        return replace(found, layer_types=cls.kinds_of(found.num_hidden_layers, pattern))

    def to_dict(self, standard: bool = True) -> dict:
        rope = self.rope_parameters
        older = older_keys(rope[FULL]) | {"rope_local_base_freq": rope[SLIDING]["rope_theta"]}
        return ModelConfig.to_dict(self, standard) | older


def of_kinds(rope_parameters: Mapping) -> dict:
    """Those of both kinds of layers, of which either may be omitted. Raises ``Error`` for other keys."""
    found = rope_parameters.items() if isinstance(rope_parameters, Mapping) else [(None, None)]
    if not all(kind in THETAS and isinstance(each or {}, Mapping) for kind, each in found):
        raise Error(
            f"rope_parameters must have an object of parameters for {SLIDING} and one for {FULL}, not "
            f"{rope_parameters!r}"
        )
    return {kind: rope_parameters.get(kind) or {} for kind in THETAS}


class RopeOfKinds:
    """The ``Rope`` of each kind of layer."""

    def __init__(self, config: Gemma3Config):
        self.ropes = {kind: Rope(config, parameters) for kind, parameters in config.rope_parameters.items()}

    def __call__(self, positions, like) -> dict:
        """For each kind of layer, cos and sin of the positions' angles."""
        return {kind: rope(positions, like) for kind, rope in self.ropes.items()}


class Gemma3Attention(GemmaAttention):
    """Gemma 2's, with normalized queries and keys, and the angles of the layer's kind."""

    def __init__(self, config: Gemma3Config, rng, layer: int = 0):
        super().__init__(config, rng, layer)
        self.q_norm = nn.OffsetRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.OffsetRMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x):
        q, k, v = super().heads(x)  # (B, H, T, D), (B, G, T, D)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x, rotations, cache=None):
        """x (B, T, C); ``rotations`` has cos and sin of each kind of layer -> (B, T, C)."""
        return super().forward(x, rotations[self.kind], cache)


class Gemma3Block(GemmaBlock):
    attention_class = Gemma3Attention


@register
class Gemma3(Gemma2):
    """Gemma 3's text model with its language-model head."""

    config_class, block_class, rope_class = Gemma3Config, Gemma3Block, RopeOfKinds

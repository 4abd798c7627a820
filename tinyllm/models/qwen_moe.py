"""What is Qwen3-MoE? A Qwen3 with a mixture of 128 experts per block, of which a token uses eight.

A config may give some layers one network instead. Qwen team, "Qwen3 Technical Report", arXiv 2505.09388. The
router, the experts and the loss are in ``mixture.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tinyllm.errors import Error
from tinyllm.models.base import register
from tinyllm.models.llama import SwiGLU
from tinyllm.models.mixture import Balanced, Mixture, check_experts
from tinyllm.models.qwen import Qwen3, Qwen3Block, Qwen3Config
from tinyllm.models.sizes import QWEN_3_MOE
from tinyllm.models.windows import FULL, SLIDING


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config):
    """Hugging Face's field names and defaults.

    Layer i has a mixture if ``decoder_sparse_step`` divides i + 1 and i is not in ``mlp_only_layers``;
    otherwise one network with ``intermediate_size``. Experts have ``moe_intermediate_size``. With
    ``use_sliding_window`` all layers have the window, whatever ``max_window_layers`` says.
    """

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 4
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list | None = None  # None: none
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001

    model_type, hub_class, sizes = "qwen3_moe", "Qwen3MoeForCausalLM", QWEN_3_MOE

    def __post_init__(self):
        super().__post_init__()
        check_experts(self)
        vars(self).update(mlp_only_layers=self.mlp_only_layers or [])
        if self.layer_types is not None:
            raise Error(f"layer_types is {self.layer_types}, but the layers of {self.model_type} are alike")

    @property
    def usual_kinds(self) -> list[str]:
        return [FULL if self.sliding_window is None else SLIDING] * self.num_hidden_layers

    def has_experts(self, layer: int) -> bool:
        return (layer + 1) % self.decoder_sparse_step == 0 and layer not in self.mlp_only_layers

    @classmethod
    def from_dict(cls, config: Mapping) -> Qwen3MoeConfig:
        """``transformers`` 5 writes ``num_experts`` as ``num_local_experts``."""
        names = {"num_local_experts": "num_experts"}
        return super().from_dict({names.get(key, key): value for key, value in config.items()})

    @classmethod
    def of_size(cls, vocab_size, **options) -> Qwen3MoeConfig:
        """Eight experts; the two of a token have the parameters of a Llama's network."""
        config, experts = super().of_size(vocab_size, **options), {"num_experts": 8, "num_experts_per_tok": 2}
        experts |= {"moe_intermediate_size": config.intermediate_size // 2, "norm_topk_prob": True}
        return replace(config, output_router_logits=True, **experts)


def mixture(config: Qwen3MoeConfig, rng) -> Mixture:
    return Mixture(replace(config, intermediate_size=config.moe_intermediate_size), rng, SwiGLU)


class Qwen3MoeBlock(Qwen3Block):
    """Qwen3's, in most layers with a mixture in place of the one network."""

    def __init__(self, config: Qwen3MoeConfig, rng, layer: int = 0):
        self.mlp_class = mixture if config.has_experts(layer) else SwiGLU
        super().__init__(config, rng, layer)


@register
class Qwen3Moe(Balanced, Qwen3):
    """Qwen3-MoE with its language-model head."""

    config_class, block_class = Qwen3MoeConfig, Qwen3MoeBlock
    fused_names = "mlp", ("gate_proj", "up_proj", "down_proj")

    def current_config(self, **changes):
        mixed = [layer.mlp_class is mixture for layer in self.layers if isinstance(layer, Qwen3MoeBlock)]
        if len(mixed) == len(self.layers) and mixed != [*map(self.config.has_experts, range(len(mixed)))]:
            changes |= {
                "decoder_sparse_step": 1,
                "mlp_only_layers": [i for i, x in enumerate(mixed) if not x],
            }
        return super().current_config(**changes)

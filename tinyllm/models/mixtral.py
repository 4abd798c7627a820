"""What is Mixtral? A Mistral with a mixture of eight experts per block, of which a token uses two.

Otherwise it is Mistral 7B, in the published sizes without a window. Jiang et al., "Mixtral of Experts", arXiv
2401.04088. The router, the experts and the loss are in ``mixture.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinyllm import functional as F
from tinyllm import nn
from tinyllm.models.base import register
from tinyllm.models.mistral import Mistral, MistralBlock, MistralConfig
from tinyllm.models.mixture import Balanced, Mixture, check_experts
from tinyllm.models.sizes import MIXTRAL


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """Hugging Face's field names and defaults: the size of Mixtral 8x7B."""

    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001

    model_type, hub_class, sizes, theta = "mixtral", "MixtralForCausalLM", MIXTRAL, 1000000.0
    num_experts = property(lambda self: self.num_local_experts)
    norm_topk_prob = True

    def __post_init__(self):
        super().__post_init__()
        check_experts(self)

    @classmethod
    def of_size(cls, vocab_size, **options) -> MixtralConfig:
        """Eight experts, without a window; the two of a token have the parameters of a Llama's network."""
        config = super().of_size(vocab_size, **options)
        experts = {"intermediate_size": config.intermediate_size // 2, "output_router_logits": True}
        return replace(config, sliding_window=None, **experts)


class MixtralExpert(nn.Module):
    """A SwiGLU network with Mixtral's names: w1 is the gate, w3 goes up and w2 down."""

    def __init__(self, config: MixtralConfig, rng):
        C, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.w1 = nn.Linear(C, inner, bias=False, rng=rng, std=std)
        self.w2 = nn.Linear(inner, C, bias=False, rng=rng, std=std)
        self.w3 = nn.Linear(C, inner, bias=False, rng=rng, std=std)

    def forward(self, x):  # (rows, C)
        return self.w2(F.swiglu(self.w1(x), self.w3(x)))


class MixtralBlock(MistralBlock):
    """Attention, then the mixture, each of the normalized residual stream (B, T, C)."""

    def __init__(self, config: MixtralConfig, rng, layer: int = 0):
        C, eps, rng = config.hidden_size, config.rms_norm_eps, nn.as_generator(rng)
        self.input_layernorm = self.norm_class(C, eps)
        self.self_attn = self.attention_class(config, rng, layer)
        self.post_attention_layernorm = self.norm_class(C, eps)
        self.block_sparse_moe = Mixture(config, rng, MixtralExpert)

    def forward(self, x, rotation, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


@register
class Mixtral(Balanced, Mistral):
    """Mixtral with its language-model head."""

    config_class, block_class = MixtralConfig, MixtralBlock
    fused_names = "block_sparse_moe", ("w1", "w3", "w2")
    into_residual = "o_proj", "w2"

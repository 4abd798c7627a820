"""Small random mixtures of experts, and the weights of ``transformers``' in our layout."""

from tinyllm.models import MixtralConfig, Qwen3MoeConfig
from tinyllm.weights.fused import per_expert

SIZES = dict(
    vocab_size=23, hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=40, num_experts_per_tok=2,
    output_router_logits=True, router_aux_loss_coef=0.3,
)  # fmt: skip
MIXTRAL = MixtralConfig(**SIZES, num_local_experts=5)
WINDOWED = MixtralConfig(**SIZES, num_local_experts=5, sliding_window=6)
QWEN3_MOE = Qwen3MoeConfig(**SIZES, num_experts=5, moe_intermediate_size=7, norm_topk_prob=True)
MIXED = Qwen3MoeConfig(
    **SIZES | dict(num_hidden_layers=4), num_experts=4, moe_intermediate_size=7, decoder_sparse_step=2,
    mlp_only_layers=[3],
)  # fmt: skip
CONFIGS = {"mixtral": MIXTRAL, "a window": WINDOWED, "qwen3_moe": QWEN3_MOE, "few mixtures": MIXED}


def in_our_layout(model, arrays):
    """Arrays by the names of ``transformers`` 5, as a mapping with the names of our parameters."""
    return per_expert({name.removeprefix("model."): x for name, x in arrays.items()}, *model.fused_names)

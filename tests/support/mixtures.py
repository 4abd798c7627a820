"""Small random mixtures of experts, and the weights of ``transformers``' in our layout."""

import numpy as np
from hypothesis import strategies as st

from tinyllm.models import Mixtral, MixtralConfig, Qwen3Moe, Qwen3MoeConfig
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


def random_mixture(config, seed=0, dtype=np.float64):
    """A model with perturbed parameters, because norm weights of 1 hide mistakes."""
    rng = np.random.default_rng(seed)
    model = (Mixtral if isinstance(config, MixtralConfig) else Qwen3Moe)(config, rng=rng)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        parameter.replace((mean + 0.4 * rng.standard_normal(parameter.shape)).astype(dtype))
    return model.eval()


def in_our_layout(model, arrays):
    """Arrays by the names of ``transformers`` 5, as a mapping with the names of our parameters."""
    return per_expert({name.removeprefix("model."): x for name, x in arrays.items()}, *model.fused_names)


@st.composite
def configs(draw):
    G, R, D, experts = (draw(st.integers(1, n)) for n in (2, 2, 3, 6))
    sizes = dict(
        vocab_size=draw(st.integers(2, 30)),
        hidden_size=G * R * draw(st.integers(1, 4)),
        intermediate_size=draw(st.integers(1, 9)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=G * R,
        num_key_value_heads=G,
        head_dim=2 * D,
        max_position_embeddings=12,
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6, 0.1])),
        tie_word_embeddings=draw(st.booleans()),
        num_experts_per_tok=draw(st.integers(1, experts)),
        output_router_logits=draw(st.booleans()),
        router_aux_loss_coef=draw(st.sampled_from([0.001, 1.0])),
    )
    if draw(st.booleans()):
        window = draw(st.none() | st.integers(1, 13))
        return MixtralConfig(**sizes, num_local_experts=experts, sliding_window=window)
    return Qwen3MoeConfig(
        **sizes,
        num_experts=experts,
        moe_intermediate_size=draw(st.integers(1, 9)),
        norm_topk_prob=draw(st.booleans()),
        decoder_sparse_step=draw(st.integers(1, 2)),
        mlp_only_layers=draw(st.sampled_from([None, [], [0], [1, 2]])),
        attention_bias=draw(st.booleans()),
        use_sliding_window=draw(st.booleans()),
        sliding_window=draw(st.integers(1, 13)),
    )

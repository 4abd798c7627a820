"""Small models with random weights, and helpers shared by several test files."""

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import strategies as st

from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig, nn
from tinyllm.models import ARCHITECTURES, Gemma2Config, Gemma3Config, Mixtral, MixtralConfig
from tinyllm.models.windows import FULL, SLIDING

torch = pytest.importorskip("torch")


class Wrapped(nn.Module):
    """A wrapper around a layer. It has no ``weight`` or other attribute that a model could rely on."""

    def __init__(self, layer):
        self.layer = layer

    def forward(self, *args):
        return self.layer(*args)


SMALL = dict(vocab_size=13, n_positions=8, n_embd=12, n_layer=2, n_head=3)


NO_DROPOUT = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)


def random_gpt2(config, seed=0, dtype=np.float64):
    """A model with perturbed parameters, because biases of 0 and norm weights of 1 hide mistakes."""
    rng = np.random.default_rng(seed)
    model = GPT2(config, rng=rng).astype(dtype).eval()
    for name, parameter in model.named_parameters():
        mean = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
        parameter.replace((mean + 0.3 * rng.standard_normal(parameter.shape)).astype(dtype))
    return model


def batch(config, shape, seed=0):
    """Token ids and targets, of which about a fifth is ignored (but never the first)."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, shape)
    targets = np.where(rng.random(shape) < 0.2, -100, rng.integers(0, config.vocab_size, shape))
    targets[0, 0] = 0
    return ids, targets


def assert_close(ours, theirs, what, tolerance=1e-10):
    """Within ``tolerance`` of the largest element of the reference."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    worst = np.abs(ours - theirs).max()
    assert worst <= tolerance * np.abs(theirs).max(), f"{what}: off by {worst}"


def our_gradients(model):
    modules = dict(model.named_modules())
    return {
        name: modules[name.rpartition(".")[0]].layout(name.rpartition(".")[2], parameter.grad)
        for name, parameter in model.named_parameters()
    }


@st.composite
def configs(draw):
    # Normalizing one channel gives 0 and two give ±1: gradients through the norm would be rounding errors.
    heads = st.tuples(st.integers(1, 4), st.integers(1, 6)).filter(lambda pair: math.prod(pair) > 2)
    n_head, head_size = draw(heads)
    return GPT2Config(
        vocab_size=draw(st.integers(2, 40)),
        n_positions=draw(st.integers(1, 12)),
        n_embd=n_head * head_size,
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_inner=draw(st.none() | st.integers(1, 30)),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu", "relu", "silu", "tanh"])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-6, 1e-12, 0.1])),
        tie_word_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        lm_head_bias=draw(st.booleans()),
        **NO_DROPOUT,
    )


def rewrite(folder, change):
    """Apply ``change`` to the tensors in a folder's model.safetensors."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


RELATIVES = {
    kind: ARCHITECTURES[kind].config_class for kind in ("qwen2", "qwen3", "mistral", "smollm3", "olmo2")
}


SMALL_LLAMA = dict(
    vocab_size=13, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=8,
)  # fmt: skip


ROPES = {
    "default": dict(rope_type="default", rope_theta=500.0),
    "linear": dict(rope_type="linear", rope_theta=1e4, factor=3.0),
    # Some of the frequencies 1, θ^-½ … are kept, some divided, some interpolated.
    "llama3": dict(rope_type="llama3", rope_theta=50.0, factor=8.0, low_freq_factor=1.0,
                   high_freq_factor=4.0, original_max_position_embeddings=12),
    # One of two frequencies is kept, the other interpolated; cos and sin are multiplied by 1.14.
    "yarn": dict(rope_type="yarn", rope_theta=50.0, factor=4.0, beta_fast=8.0, truncate=False,
                 original_max_position_embeddings=64),
    # Texts of more than 8 tokens, and of more than 5, have other frequencies.
    "dynamic": dict(rope_type="dynamic", rope_theta=50.0, factor=2.0),
    "longrope": dict(rope_type="longrope", rope_theta=50.0, short_factor=[1.0, 1.5], long_factor=[2.0, 6.0],
                     original_max_position_embeddings=5),
}  # fmt: skip


EVERYTHING = LlamaConfig(**SMALL_LLAMA, rope_parameters=ROPES["llama3"], attention_bias=True, mlp_bias=True)


SMALL_GEMMA = SMALL_LLAMA | dict(sliding_window=3, query_pre_attn_scalar=7)
GEMMA2 = Gemma2Config(**SMALL_GEMMA, attention_bias=True, attn_logit_softcapping=2.0,
                      final_logit_softcapping=3.0, rope_parameters=ROPES["linear"])  # fmt: skip
GEMMA3 = Gemma3Config(**SMALL_GEMMA, layer_types=[SLIDING, FULL], attention_bias=True,
                      rope_parameters={SLIDING: dict(rope_theta=50.0), FULL: ROPES["linear"]})  # fmt: skip


def random_llama(config, seed=0, dtype=np.float64):
    """A model with perturbed parameters, because biases of 0 and norm weights of 1 hide mistakes.

    Also one of Llama's relatives: the config says which.
    """
    rng = np.random.default_rng(seed)
    model = ARCHITECTURES[config.model_type](config, rng=rng).astype(dtype).eval()
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        parameter.replace((mean + 0.3 * rng.standard_normal(parameter.shape)).astype(dtype))
    return model


def random_model(config, dtype=np.float64):
    make = random_llama if isinstance(config, LlamaConfig) else random_gpt2
    return make(config, dtype=dtype)


def on_host(array):
    return array if isinstance(array, np.ndarray) else array.get()


GPT2_SIZES = dict(vocab_size=23, n_positions=140, n_embd=12, n_layer=2, n_head=3)  # two blocks of queries


LLAMA_SIZES = dict(
    vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=140,
)  # fmt: skip


def gpt2(dropout, **changes):
    drops = dict(embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    return GPT2(GPT2Config(**GPT2_SIZES, **drops, **changes), rng=np.random.default_rng(0))


def llama(dropout, **changes):
    config = LlamaConfig(**LLAMA_SIZES, attention_dropout=dropout, **changes)
    return Llama(config, rng=np.random.default_rng(0))


def gemma(config, dropout, **changes):
    """The caps are so low and the window so short that both have an effect."""
    sizes = LLAMA_SIZES | dict(sliding_window=37, query_pre_attn_scalar=7, final_logit_softcapping=3.0)
    config = config(**sizes | changes, attention_dropout=dropout, layer_types=[SLIDING, FULL])
    return ARCHITECTURES[config.model_type](config, rng=np.random.default_rng(0))


def relative(kind, dropout, **changes):
    """One of Llama's relatives."""
    config = RELATIVES[kind](**LLAMA_SIZES, attention_dropout=dropout, **changes)
    return ARCHITECTURES[kind](config, rng=np.random.default_rng(0))


UNTIED = dict(tie_word_embeddings=False, lm_head_bias=True, qkv_bias=False, activation_function="gelu")


MODELS = {  # name -> the model with a dropout
    "gpt2": gpt2,
    "gpt2 untied": lambda dropout: gpt2(dropout, **UNTIED),
    "llama": llama,
    "mixtral": lambda dropout: Mixtral(
        MixtralConfig(
            **LLAMA_SIZES,
            attention_dropout=dropout,
            num_local_experts=3,
            sliding_window=50,
            output_router_logits=True,
            router_aux_loss_coef=0.1,
        ),
        rng=np.random.default_rng(0),
    ),
    "llama tied": lambda dropout: llama(
        dropout, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "gemma2": lambda dropout: gemma(Gemma2Config, dropout, attn_logit_softcapping=2.0),
    "gemma3": lambda dropout: gemma(Gemma3Config, dropout),
}


RELATIVE_MODELS = {  # the same for Llama's relatives, for texts of more than 9 tokens
    "qwen2": lambda dropout: relative("qwen2", dropout, rope_parameters=ROPES["yarn"]),
    "qwen3": lambda dropout: relative(
        "qwen3", dropout, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "mistral": lambda dropout: relative("mistral", dropout, sliding_window=9),
    "smollm3": lambda dropout: relative("smollm3", dropout, no_rope_layer_interval=2),
    "olmo2": lambda dropout: relative("olmo2", dropout),
}


def ropes(head_dim):
    """Parameters of every type, with as many numbers as such heads have pairs of channels."""
    found = [{}]
    for rope in ROPES.values():
        if rope["rope_type"] != "dynamic" or head_dim > 2:
            lists = {name: x for name, x in rope.items() if isinstance(x, list)}
            found.append(rope | {name: (x * head_dim)[: head_dim // 2] for name, x in lists.items()})
    return st.sampled_from(found)


@st.composite
def llama_configs(draw, config_class=LlamaConfig):
    """Configs of a Llama or of one of its relatives, with small windows if it may have them."""
    G, R, D = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    layers = draw(st.integers(1, 3))
    values = dict(
        vocab_size=draw(st.integers(2, 40)),
        hidden_size=G * R * draw(st.integers(1, 5)) + (not config_class.whole_heads),
        intermediate_size=draw(st.integers(1, 30)),
        num_hidden_layers=layers,
        num_attention_heads=G * R,
        num_key_value_heads=G,
        head_dim=D,
        max_position_embeddings=draw(st.just(12) | st.integers(1, 12)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6, 0.1])),
        rope_parameters=draw(ropes(D)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        use_sliding_window=True,
        sliding_window=draw(st.integers(1, 4) | st.none()),
        max_window_layers=draw(st.integers(0, layers - 1) | st.just(layers)),
        no_rope_layer_interval=draw(st.integers(1, 3)),
    )
    known = {field.name for field in fields(config_class)}
    if "num_experts_per_tok" in known:
        experts = draw(st.integers(1, 5))
        values |= dict(
            num_experts_per_tok=draw(st.integers(1, experts)),
            num_experts=experts,
            num_local_experts=experts,
            moe_intermediate_size=draw(st.integers(1, 9)),
            norm_topk_prob=draw(st.booleans()),
            decoder_sparse_step=draw(st.integers(1, 2)),
            mlp_only_layers=draw(st.sampled_from([None, [], [0], [1, 2]])),
            output_router_logits=draw(st.booleans()),
            router_aux_loss_coef=draw(st.sampled_from([0.001, 1.0])),
        )
    return config_class(**{name: value for name, value in values.items() if name in known})


@st.composite
def gemma_configs(draw, config_class):
    """Of Gemma 2 or 3, with every mixture of kinds of layers and windows from one position on."""
    sizes = vars(draw(llama_configs())) | dict(sliding_window=draw(st.integers(1, 12)))
    n, parameters = sizes["num_hidden_layers"], ropes(sizes["head_dim"])
    for name in ("hidden_act", "mlp_bias", "rope_parameters"):
        del sizes[name]
    if config_class is Gemma2Config:
        sizes["attn_logit_softcapping"] = draw(st.sampled_from([None, 0.7, 50.0]))
        sizes["rope_parameters"] = draw(parameters)
    else:
        drawn = {kind: dict(draw(parameters)) for kind in (SLIDING, FULL)}
        for each in drawn.values():
            each.pop("truncate", None)  # transformers looks for it outside of the kind's parameters
        sizes["rope_parameters"] = drawn
    return config_class(
        **sizes,
        layer_types=draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=n, max_size=n)),
        query_pre_attn_scalar=draw(st.integers(1, 20)),
        final_logit_softcapping=draw(st.sampled_from([None, 0.7, 30.0])),
    )

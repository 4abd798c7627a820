"""Common to every architecture: sources of weights, initialization, options, resizing, registration."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from support.models import (
    EVERYTHING,
    GEMMA2,
    GEMMA3,
    NO_DROPOUT,
    SMALL,
    SMALL_LLAMA,
    Wrapped,
    batch,
    random_model,
)

from tinyllm import GPT2, Error, GPT2Config, Llama, LlamaConfig, Tensor, generate, load_model, nn, optim
from tinyllm.models import ARCHITECTURES, LanguageModel, ModelConfig, empty_model, gpt2, llama, register
from tinyllm.training import fit
from tinyllm.weights import hub
from tinyllm.weights.runs import checkpoint_folder

CONFIGS = {
    "gpt2": GPT2Config(**SMALL, **NO_DROPOUT),
    "gpt2 untied": GPT2Config(**SMALL, **NO_DROPOUT, tie_word_embeddings=False, lm_head_bias=True),
    "llama": EVERYTHING,
    "llama tied": LlamaConfig(**SMALL_LLAMA, tie_word_embeddings=True),
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
both_models = pytest.mark.parametrize("config", [CONFIGS["gpt2"], EVERYTHING], ids=["gpt2", "llama"])


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_blocks_begin_as_the_identity_if_their_projections_are_zero(arch):
    sizes = dict(context=8, n_layer=2, n_head=2, n_embd=16)
    model = ARCHITECTURES[arch](ARCHITECTURES[arch].config_class.of_size(11, **sizes), rng=0).eval()
    ids = np.array([[3, 1, 4, 1, 5]])
    before = model.hidden_states(ids).data
    nn.initialize_as_zero(model, model.into_residual)
    zeros = [x for x in model.parameters() if x.data.ndim == 2 and not x.data.any()]
    assert {len(x.data) for x in zeros} == {16}  # (out, in): those into the residual stream
    found = model.hidden_states(ids).data
    assert not np.allclose(found, before, atol=1e-6)
    setattr(model, model.blocks, [])
    np.testing.assert_array_equal(found, model.hidden_states(ids).data)


# ------------------------------------------------------------------------- where a model comes from


def write_gguf(path, config=EVERYTHING):
    """Write a GGUF file of a Llama whose weights are all 1."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    H, G, D, C = (getattr(config, name) for name in
                  ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"))  # fmt: skip
    V, inner = config.vocab_size, config.intermediate_size
    writer.add_vocab_size(V)
    writer.add_context_length(8)
    writer.add_embedding_length(C)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_key_length(D)
    writer.add_value_length(D)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(D)
    shapes = {
        "token_embd": (V, C), "output_norm": (C,), "output": (V, C), "blk.0.attn_norm": (C,),
        "blk.0.attn_q": (H * D, C), "blk.0.attn_k": (G * D, C), "blk.0.attn_v": (G * D, C),
        "blk.0.attn_output": (C, H * D), "blk.0.ffn_norm": (C,), "blk.0.ffn_gate": (inner, C),
        "blk.0.ffn_up": (inner, C), "blk.0.ffn_down": (C, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_file_loads_through_every_entry_point(tmp_path):
    path = write_gguf(tmp_path / "x.gguf")
    for load in (Llama.from_pretrained, load_model):
        model = load(path, np.float64)
        assert isinstance(model, Llama) and model.config.hidden_size == 12 and not model.training
        assert {p.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    with pytest.raises(Error, match=r"x\.gguf contains .*'llama', not 'gpt2'.*load_model"):
        GPT2.from_pretrained(path)


@both_models
def test_known_name_loads_through_every_entry_point(config, tmp_path, monkeypatch):
    ours = type(random_model(config))
    other = Llama if ours is GPT2 else GPT2
    random_model(config, np.float32).save_pretrained(tmp_path)
    monkeypatch.setattr(hub, "find_pulled", lambda name: tmp_path)
    ids, _ = batch(config, (1, 8))
    expected = ours.from_pretrained(tmp_path)(ids).data
    for load in (ours.from_pretrained, load_model):
        assert np.array_equal(load("smollm2")(ids).data, expected)
    with pytest.raises(Error, match=r"load_model"):
        other.from_pretrained("smollm2")
    monkeypatch.setattr(hub, "find_pulled", lambda name: None)
    for load in (GPT2.from_pretrained, Llama.from_pretrained, load_model, empty_model):
        with pytest.raises(Error, match="tinyllm pull smollm2"):
            load("smollm2")


@both_models
def test_newest_checkpoint_of_a_run_loads_through_every_entry_point(config, tmp_path):
    newest = random_model(config, np.float32)
    for step, seed in ((5, 1), (40, None)):
        model = newest if seed is None else type(newest)(config, rng=np.random.default_rng(seed))
        model.save_pretrained(checkpoint_folder(tmp_path, step))
    ids, _ = batch(config, (1, 8))
    for load in (type(newest).from_pretrained, load_model):
        assert np.array_equal(load(tmp_path)(ids).data, newest(ids).data)


@pytest.mark.parametrize("name", ["124M", "Llama-3.2-1B"])
def test_empty_model_of_a_published_size_has_meta_parameters(name):
    model = empty_model(name)
    assert model.num_parameters() == {"124M": 124_439_808, "Llama-3.2-1B": 1_235_814_400}[name]
    assert all(nn.is_meta(parameter.data) for parameter in model.parameters() if parameter.ndim == 2)


@pytest.mark.parametrize("name", [None, 3])
@pytest.mark.parametrize("load", [load_model, empty_model, GPT2.from_pretrained])
def test_name_of_another_type_is_refused(load, name):
    with pytest.raises(Error, match=f"{name} does not name a model"):
        load(name)


# ------------------------------------------------------------------------ initial weights and rng


@every_model
def test_integer_seed_gives_the_weights_of_its_generator(config):
    """One generator serves the whole model: layers of equal shape get different weights."""
    architecture = type(random_model(config))
    expected = architecture(config, np.random.default_rng(3)).state_dict()
    for seed in (3, np.int64(3)):
        found = architecture(config, rng=seed).state_dict()
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


PARTS = {
    "gpt2": (gpt2.CausalSelfAttention, gpt2.MLP, gpt2.Block),
    "llama": (llama.GroupedQueryAttention, llama.SwiGLU, llama.LlamaBlock),
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in PARTS for part in PARTS[name]])
def test_integer_seed_gives_every_layer_of_a_block_its_own_weights(name, part):
    config = CONFIGS[name]
    expected = part(config, np.random.default_rng(3)).state_dict()
    found = part(config, 3).state_dict()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


@both_models
@pytest.mark.parametrize("rng", [1.5, "x", np.random, np.random.RandomState(0), -1, True], ids=str)
def test_invalid_rng_is_refused(config, rng):
    with pytest.raises(Error, match=r"rng is .*seed"):
        type(random_model(config))(config, rng=rng)


@both_models
def test_config_of_another_type_is_refused(config):
    architecture, other = type(random_model(config)), CONFIGS["llama" if "n_embd" in vars(config) else "gpt2"]
    for wrong in (type(config), {"vocab_size": 13}, None, other):
        with pytest.raises(Error, match=rf"pass a {type(config).__name__}\(\.\.\.\)"):
            architecture(wrong, rng=0)


@every_model
def test_model_without_weights_can_be_counted_and_loaded_but_not_used(config, tmp_path):
    filled = random_model(config, np.float32)
    model, (ids, targets) = type(filled)(config, rng=None), batch(config, (2, 8))
    assert model.num_parameters() == filled.num_parameters()
    uses = {
        "forward": lambda: model(ids),
        "loss": lambda: model.loss(ids, targets),
        "hidden_states": lambda: model.hidden_states(ids),
        "generate": lambda: list(generate(model, ids, 1)),
        "save": lambda: model.save_pretrained(tmp_path / "model"),
        "grow": lambda: model.resize_token_embeddings(20, rng=0),
        "train": lambda: fit(model, lambda step: (ids, targets), steps=1, lr=0.1),
    }
    for name, use in uses.items():
        with pytest.raises(Error, match=r"no weights yet \(rng=None\)"):
            use()
            pytest.fail(f"{name} used a model without weights")
    assert not (tmp_path / "model").exists()
    model.load_state_dict(filled.state_dict())
    assert np.array_equal(model.eval()(ids).data, filled(ids).data)


@both_models
def test_new_head_without_weights_cannot_be_used(config):
    """The loss reads the head's weight without calling the head."""
    model, (ids, targets) = random_model(config, np.float32), batch(config, (2, 8))
    model.lm_head = nn.Linear(12, config.vocab_size, rng=None)
    for use in (lambda: model(ids), lambda: model.loss(ids, targets)):
        with pytest.raises(Error, match="no weights yet"):
            use()


# ----------------------------------------------------------------------------------- the options

SIZE = dict(context=32, n_layer=2, n_head=4, n_embd=24)


def test_of_size_maps_options_to_config_fields():
    gpt2 = GPT2Config.of_size(50, **SIZE, dropout=0.2, tie_head=False, qkv_bias=False, head_bias=True)
    assert gpt2 == GPT2Config(
        vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=4, embd_pdrop=0.2, attn_pdrop=0.2,
        resid_pdrop=0.2, tie_word_embeddings=False, qkv_bias=False, lm_head_bias=True,
    )  # fmt: skip
    llama = LlamaConfig.of_size(50, **SIZE, n_kv_head=2, dropout=0.2, tie_head=True)
    assert llama == LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, attention_dropout=0.2,
        tie_word_embeddings=True,
    )  # fmt: skip
    for config in (gpt2, llama):
        assert config.context == 32
        model = ARCHITECTURES[config.model_type](config, rng=None)
        assert model.config_class is type(config) and model.context == 32


@pytest.mark.parametrize(("config", "option"), [(GPT2Config, "n_kv_head"), (LlamaConfig, "head_bias")])
def test_of_size_refuses_unsupported_options(config, option):
    with pytest.raises(Error, match=option):
        config.of_size(50, **SIZE, **{option: 2 if option == "n_kv_head" else True})


# -------------------------------------------------------------------------------- the vocabulary


@every_model
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_resizing_the_vocabulary_preserves_existing_ids(config, dtype, tmp_path):
    model = random_model(replace(config, initializer_range=0.3), dtype)
    tied = config.tie_word_embeddings
    before = {name: array.copy() for name, array in model.state_dict().items()}
    ids, targets = batch(config, (2, 8))
    logits = model(ids).data
    model.loss(ids, targets).backward()
    model.resize_token_embeddings(np.int64(20), np.random.default_rng(5))
    assert model.config.vocab_size == 20
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.lm_head.bias is None or not model.lm_head.bias.data[13:].any()
    assert (model.lm_head.weight is getattr(model, model.token_embedding).weight) == tied
    for name, array in model.state_dict().items():
        grown = name.startswith(("lm_head", model.token_embedding))
        assert array.dtype == dtype and len(array) == (20 if grown else len(before[name])), name
        assert np.array_equal(array[: len(before[name])], before[name]), name
    np.testing.assert_allclose(model(ids).data[..., :13], logits, rtol=0, atol=100 * np.finfo(dtype).eps)
    assert model([[19]]).shape == (1, 1, 20) and len(list(generate(model, [[19, 3]], 3))) == 3
    rng, std = np.random.default_rng(5), model.config.initializer_range
    rows = std * rng.standard_normal((7, 12), dtype=np.float32)
    embedding = getattr(model, model.token_embedding).weight.data
    np.testing.assert_allclose(embedding[13:], rows, rtol=1e-6)

    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, dtype)
    assert again.config == model.config and np.array_equal(again(ids).data, model(ids).data)


@every_model
def test_frozen_and_trainable_parameters_can_be_resized(config):
    model = random_model(config).requires_grad_(False)
    model.resize_token_embeddings(15, np.random.default_rng(0))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(Error, match="rng is None"):
        model.resize_token_embeddings(40, None)
    model.requires_grad_()
    optimizer = optim.AdamW(model, lr=1e-3)
    ids = np.array([[13, 14, 2]])
    losses = []
    for _ in range(2):
        loss = model.loss(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@both_models
def test_the_vocabulary_keeps_its_size_or_grows_to_a_whole_number(config):
    model = random_model(config)
    before = model.state_dict()
    model.resize_token_embeddings(13, rng=0)
    assert all(np.array_equal(array, before[name]) for name, array in model.state_dict().items())
    for size in (12, 20.0, True):
        with pytest.raises(Error, match=f"vocab_size {size}"):
            model.resize_token_embeddings(size, rng=0)


def linear(rows, **options):
    return nn.Linear(12, rows, rng=np.random.default_rng(0), **options).astype(np.float64)


def with_bias_of(rows):
    head = linear(13)
    head.bias = Tensor(np.zeros(rows))
    return head


class Head(nn.Module):
    """A head that is not a Linear but has a weight and a bias with one row per id."""

    def __init__(self):
        self.inner = linear(13)
        self.weight, self.bias = self.inner.weight, self.inner.bias

    def forward(self, h):
        return self.inner(h) * 2


@every_model
@pytest.mark.parametrize("head", [lambda: linear(13), lambda: linear(13, bias=False), Head])
def test_replaced_head_with_one_row_per_id_can_be_resized(config, head):
    model = random_model(config)
    model.lm_head = head()
    ids, _ = batch(config, (2, 8))
    logits = model(ids).data
    model.resize_token_embeddings(20, np.random.default_rng(0))
    np.testing.assert_allclose(model(ids).data[..., :13], logits, rtol=0, atol=1e-13)
    assert model([[19]]).shape == (1, 1, 20)


@every_model
@pytest.mark.parametrize(
    ("what", "make"),
    [
        ("lm_head", lambda layer: linear(5)),
        ("lm_head", Wrapped),
        ("lm_head", lambda layer: nn.LayerNorm(13)),
        ("lm_head", lambda layer: with_bias_of(12)),
        ("embedding", Wrapped),
        ("embedding", lambda layer: nn.Embedding(14, 12, rng=None)),
    ],
)
def test_resizing_names_an_unsuitable_layer_and_changes_nothing(config, what, make):
    model = random_model(config)
    name = model.token_embedding if what == "embedding" else what
    setattr(model, name, make(getattr(model, name)))
    before = {name: array.copy() for name, array in model.state_dict().items()}
    with pytest.raises(Error, match=rf"{name}, a {type(getattr(model, name)).__name__},.* 13 ids"):
        model.resize_token_embeddings(20, np.random.default_rng(0))
    assert model.config.vocab_size == 13
    assert all(np.array_equal(array, before[n]) for n, array in model.state_dict().items())


# ------------------------------------------------------------------ an architecture of one's own


@dataclass(frozen=True)
class BagConfig(ModelConfig):
    vocab_size: int = 13
    width: int = 4
    tie_word_embeddings: bool = False

    model_type, hub_class = "bag", "None"
    context = property(lambda self: 10)
    kv_shape = property(lambda self: (1, 1))


class Bag(LanguageModel):
    """The mean of the embeddings so far, and a linear layer."""

    config_class, token_embedding, blocks = BagConfig, "table", "parts"

    def __init__(self, config, rng):
        self.config, self.parts = config, []
        self.table = nn.Embedding(config.vocab_size, config.width, rng=rng, std=config.initializer_range)
        self.lm_head = nn.Linear(config.width, config.vocab_size, rng=rng, std=config.initializer_range)

    def hidden_states(self, ids, cache=None):
        ids, _, _ = self.start(ids, cache)
        sums = np.tril(np.ones((ids.shape[1],) * 2, np.float32))
        return (sums / sums.sum(axis=1, keepdims=True)) @ self.table(ids)


def test_registered_architecture_trains_saves_loads_and_generates(tmp_path):
    register(Bag)
    try:
        model = Bag(BagConfig(), rng=np.random.default_rng(0))
        ids, targets = batch(model.config, (2, 8))
        loss = model.loss(ids, targets)
        loss.backward()
        model.save_pretrained(tmp_path)
        again = load_model(tmp_path)
        assert isinstance(again, Bag) and again.loss(ids, targets).item() == loss.item()
        tokens = [list(generate(m, [[1, 2]], 5, 0, use_cache=False)) for m in (model, again)]
        assert np.array_equal(*tokens)
        again.resize_token_embeddings(20, np.random.default_rng(0))
        assert again([[19]]).shape == (1, 1, 20)
    finally:
        del ARCHITECTURES["bag"]
    with pytest.raises(Error, match="'bag'"):
        load_model(tmp_path)


def test_config_keys_of_other_tools_and_null_keys_are_ignored():
    ours = LlamaConfig.preset("Llama-3.2-1B").to_dict()
    foreign = {"unsloth_version": "2025.1", "unsloth_fixed": True, "_attn_implementation_autoset": True}
    generation = {"temperature": 0.7, "top_p": 0.9, "do_sample": True, "torchscript": False}
    nulls = {"quantization_config": None, "sliding_window": None}
    assert LlamaConfig.from_dict(ours | foreign | generation | nulls) == LlamaConfig.from_dict(ours)
    for key, value in (("quantization_config", {"bits": 4}), ("sliding_window", 4096)):
        with pytest.raises(Error, match=key):
            LlamaConfig.from_dict(ours | {key: value})


def test_a_config_may_have_a_field_for_what_is_fixed_without_it():
    @dataclass(frozen=True)
    class PartlyRotated(BagConfig):
        partial_rotary_factor: float = 1.0

    assert PartlyRotated.from_dict({"partial_rotary_factor": 0.5}).partial_rotary_factor == 0.5
    with pytest.raises(Error, match=r"only partial_rotary_factor=1\.0, .* 0\.5"):
        BagConfig.from_dict({"partial_rotary_factor": 0.5})


def test_an_architecture_without_what_it_needs_is_not_registered():
    @dataclass(frozen=True)
    class HalfConfig(ModelConfig):
        vocab_size: int = 5

    class Half(LanguageModel):
        config_class, blocks = HalfConfig, "h"

    with pytest.raises(
        Error, match=r"Half cannot be registered: set config_class\.model_type, token_embedding$"
    ):
        register(Half)
    assert Half not in ARCHITECTURES.values()

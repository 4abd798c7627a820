"""The twins and the bridge: equal weights give equal numbers, and models share no memory."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from support.models import (  # noqa: E402
    EVERYTHING,
    GEMMA2,
    GEMMA3,
    NO_DROPOUT,
    SMALL,
    assert_close,
    batch,
    configs,
    our_gradients,
    random_gpt2,
    random_llama,
    random_model,
)

from parity.twins import bridge  # noqa: E402
from parity.twins.gpt2 import TorchGPT2  # noqa: E402
from parity.twins.llama import TorchLlama  # noqa: E402
from tinyllm import GPT2, Error, GPT2Config, nn  # noqa: E402

CONFIG = GPT2Config(**SMALL, **NO_DROPOUT)
KINDS = {"gpt2": CONFIG, "llama": EVERYTHING, "gemma2": GEMMA2, "gemma3": GEMMA3}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


# ------------------------------------------------------------------------ equal results


@settings(max_examples=25)
@given(config=configs(), rows=st.integers(1, 3), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_logits_loss_and_gradients_agree_in_all_three(config, rows, seed, data):
    model = random_gpt2(config, seed)
    twin, theirs = bridge.to_torch(model), bridge.to_transformers(model)
    ids, targets = batch(config, (rows, data.draw(st.integers(1, config.n_positions))), seed)
    num_targets = data.draw(st.none() | st.integers(1, 50))
    tensors = torch.from_numpy(ids), torch.from_numpy(targets)

    logits = theirs(tensors[0]).logits
    assert_close(model(ids).data, twin(tensors[0]), "logits of the twin")
    assert_close(model(ids).data, logits, "logits of transformers")

    loss, twin_loss = model.loss(ids, targets, num_targets), twin.loss(*tensors, num_targets)
    total = F.cross_entropy(logits.flatten(0, 1), tensors[1].flatten(), reduction="sum")
    their_loss = total / (num_targets or (targets != -100).sum())
    for each in (loss, twin_loss, their_loss):
        each.backward()
    assert loss.item() == pytest.approx(twin_loss.item(), rel=1e-10)
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-10)

    parameters = dict(twin.named_parameters())
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, parameters[name].grad, name)
    published = {name.removeprefix("transformer."): p for name, p in theirs.named_parameters()}
    lacking = set() if config.qkv_bias else {f"h.{i}.attn.c_attn.bias" for i in range(config.n_layer)}
    assert published.keys() == parameters.keys() | lacking
    for name, gradient in our_gradients(model).items():  # in the checkpoint's layout
        assert_close(gradient, published[name].grad, f"{name} of transformers")


@every_kind
def test_twin_loss_is_the_mean_over_targets_or_weights(config):
    twin = bridge.to_torch(random_model(config))
    ids, targets = (torch.from_numpy(array) for array in batch(config, (2, 8)))
    logits = twin(ids)
    uncapped, cap = twin.lm_head(twin.hidden_states(ids)), getattr(config, "final_logit_softcapping", None)
    assert torch.equal(logits, cap * torch.tanh(uncapped / cap) if cap else uncapped)
    mean = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 8)
    weights, counted = torch.rand(2, 8, dtype=torch.float64), targets != -100
    assert not counted.all()
    weighted = (losses * weights)[counted].sum()
    for expected, options in [
        (mean, {}),
        (losses.sum() / 7, {"num_targets": 7}),
        (weighted / weights[counted].sum(), {"weights": weights}),
        (weighted / 7, {"weights": weights, "num_targets": 7}),
    ]:
        assert twin.loss(ids, targets, **options).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@every_kind
def test_twin_has_the_names_and_tying_of_the_model(config, tied):
    model = random_model(replace(config, tie_word_embeddings=tied))
    twin = bridge.TWINS[type(model)](model.config)
    assert (twin.lm_head.weight is next(twin.parameters())) == tied
    called = {name for name, module in twin.named_modules() if not isinstance(module, torch.nn.ModuleList)}
    assert {name for name, _ in model.named_modules()} == called
    shapes = {name: tuple(parameter.shape) for name, parameter in twin.named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


def test_dropout_and_eps_of_gpt2_are_copied_to_the_twin():
    config = GPT2Config(**SMALL, embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3, layer_norm_epsilon=0.7)
    twin = bridge.to_torch(random_gpt2(config))
    block = twin.h[1]
    assert [twin.drop.p, block.attn.attn_pdrop] == [0.1, 0.2]
    assert [block.attn.resid_dropout.p, block.mlp.dropout.p] == [0.3, 0.3]
    assert [block.ln_1.eps, block.ln_2.eps, twin.ln_f.eps] == [0.7, 0.7, 0.7]
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(twin(ids), twin(ids))  # the twin is in eval mode like the model
    assert not torch.equal(twin.train()(ids), twin(ids))


# ------------------------------------------------------------------------------- copying


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, tie_word_embeddings=False, lm_head_bias=True),
        replace(CONFIG, qkv_bias=False),
        EVERYTHING,
        replace(EVERYTHING, tie_word_embeddings=True, attention_bias=False),
        GEMMA2,
        replace(GEMMA3, tie_word_embeddings=False),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_trip_is_bit_exact(config, dtype):
    model = random_model(config, dtype=np.dtype(dtype))
    again = bridge.from_torch(bridge.to_torch(model))
    assert again.config == model.config and again.training == model.training
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and q.dtype == dtype and q.requires_grad
        assert np.array_equal(p.data, q.data), name
    assert (again.lm_head.weight is next(again.parameters())) == model.config.tie_word_embeddings


@pytest.mark.parametrize("mode", [True, False])
@every_kind
def test_the_mode_is_copied(config, mode):
    model = random_model(config).train(mode)
    twin = bridge.to_torch(model)
    assert {module.training for module in twin.modules()} == {mode}
    assert {module.training for _, module in bridge.from_torch(twin).named_modules()} == {mode}
    assert {module.training for module in bridge.to_transformers(model).modules()} == {mode}


@every_kind
def test_models_share_no_memory(config):
    model = random_model(config)
    twin, theirs = bridge.to_torch(model), bridge.to_transformers(model)
    back = bridge.from_torch(twin)
    pair = bridge.from_transformers(theirs)
    models = [model, twin, theirs, back, *pair]
    arrays = [
        [p.data if isinstance(m, nn.Module) else p.detach().numpy() for p in m.parameters()] for m in models
    ]
    for i, some in enumerate(arrays):
        assert len(some) == len(arrays[0])
        for others in arrays[i + 1 :]:
            assert not any(np.shares_memory(a, b) for a in some for b in others)
    next(model.parameters()).data[...] = 7.0
    assert not any((next(other.parameters()) == 7.0).any() for other in (twin, theirs))


def test_from_a_gpt2_of_transformers():
    config = transformers.GPT2Config(
        **SMALL, **NO_DROPOUT, n_inner=7, layer_norm_epsilon=0.1, activation_function="gelu",
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    model, twin = bridge.from_transformers(theirs)
    ids, _ = batch(CONFIG, (2, 8))
    expected = theirs(torch.from_numpy(ids)).logits
    assert_close(model(ids).data, expected, "tinyllm")
    assert_close(twin(torch.from_numpy(ids)).detach().numpy(), expected, "the twin")
    assert not model.training and not twin.training


def test_from_a_llama_of_transformers():
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=8, rms_norm_eps=0.1, attention_bias=True,
        rope_parameters=dict(rope_type="linear", factor=3.0), attn_implementation="sdpa",
    )  # fmt: skip
    theirs = TorchLlama.exact(transformers.LlamaForCausalLM(config).double().eval())
    model, twin = bridge.from_transformers(theirs)
    ids, _ = batch(EVERYTHING, (2, 8))
    expected = theirs(torch.from_numpy(ids)).logits
    assert_close(model(ids).data, expected, "tinyllm")
    assert_close(twin(torch.from_numpy(ids)).detach().numpy(), expected, "the twin")
    assert not model.training and not twin.training


def test_dropout_and_eps_of_llama_are_copied_to_the_twin():
    twin = bridge.to_torch(random_llama(replace(EVERYTHING, attention_dropout=0.2, rms_norm_eps=0.7)))
    layer = twin.layers[1]
    assert layer.self_attn.attention_dropout == 0.2
    assert [layer.input_layernorm.eps, layer.post_attention_layernorm.eps, twin.norm.eps] == [0.7, 0.7, 0.7]
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(twin(ids), twin(ids))  # the twin is in eval mode like the model
    assert not torch.equal(twin.train()(ids), twin(ids))


# -------------------------------------------------------------------------------------- folders


def published(layout: str, folder):
    """Save a random GPT-2 of transformers in a published layout; return the model."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SMALL, **NO_DROPOUT, bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "eager"
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.5)
    shards = dict(max_shard_size="10KB") if layout == "sharded" else {}
    theirs.save_pretrained(folder, **shards)
    if layout == "as on the hub":  # without prefix, and with causal masks among the tensors
        file = folder / "model.safetensors"
        tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
        save_file(tensors | masks, file, metadata={"format": "pt"})
    return theirs


@pytest.mark.parametrize("layout", ["as saved", "as on the hub", "sharded"])
def test_load_pair_in_every_published_layout(tmp_path, layout):
    theirs = published(layout, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "sharded")
    model, twin = bridge.load_pair(tmp_path, dtype="float64")
    ids, _ = batch(CONFIG, (2, 8))
    expected = theirs(torch.from_numpy(ids)).logits
    assert_close(model(ids).data, expected, "tinyllm")
    assert_close(twin(torch.from_numpy(ids)).detach().numpy(), expected, "the twin")
    half, _ = bridge.load_pair(tmp_path)
    assert {parameter.dtype for parameter in half.parameters()} == {np.dtype(np.float32)}


def test_invalid_folders_raise_one_sentence(tmp_path):
    with pytest.raises(Error, match="nowhere"):
        bridge.load_pair(tmp_path / "nowhere")
    with pytest.raises(Error, match=r"config\.json"):
        bridge.load_pair(tmp_path)
    published("as saved", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_inner": 5}))
    with pytest.raises(Error, match=r"Wrong shape \(6\).*h\.0\.mlp\.c_fc\.weight.*h\.1\.mlp\.c_proj\.weight"):
        bridge.load_pair(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(Error, match=r"'bert'.*gpt2"):
        bridge.load_pair(tmp_path)


def test_models_without_a_twin_are_refused():
    with pytest.raises(Error, match=r"Linear.* twin.*GPT2"):
        bridge.to_torch(nn.Linear(2, 2, rng=None))
    with pytest.raises(Error, match=r"Linear.* twin.*TorchGPT2"):
        bridge.from_torch(torch.nn.Linear(2, 2))
    with pytest.raises(Error, match=r"Linear.*GPT2LMHeadModel"):
        bridge.from_transformers(torch.nn.Linear(2, 2))


def test_unsupported_and_mixed_dtypes_are_refused(tmp_path):
    with pytest.raises(Error, match=r"float16 .*float32 or float64"):
        bridge.to_torch(GPT2(CONFIG, rng=np.random.default_rng(0)).astype(np.float16))
    twin = TorchGPT2(CONFIG)
    with pytest.raises(Error, match="bfloat16"):
        bridge.from_torch(TorchGPT2(CONFIG).bfloat16())
    twin.ln_f.double()
    with pytest.raises(Error, match="float32 and float64"):
        bridge.from_torch(twin)
    with pytest.raises(Error, match="float16"):
        bridge.load_pair(tmp_path, dtype="float16")


def test_a_twin_with_another_config_is_refused():
    twin = bridge.to_torch(random_gpt2(CONFIG))
    twin.config = GPT2Config(**SMALL | dict(n_positions=9))
    with pytest.raises(Error, match=r"the PyTorch twin .*wpe.weight is \(8, 12\), not \(9, 12\)"):
        bridge.from_torch(twin)

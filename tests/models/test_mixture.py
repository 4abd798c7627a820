"""Mixtures of experts against the twin and transformers, their loss, their files, and decoding."""

import contextlib
import json
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm import Error, Tensor, generate, load_model, nn, no_grad, optim
from tinyllm.inference.decoding import DecodingSteps
from tinyllm.models import Mixtral, MixtralConfig, Qwen3Moe, Qwen3MoeConfig
from tinyllm.models.mixture import load_balancing_loss
from tinyllm.weights.adapters import load_adapter, save_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.mixtures import (  # noqa: E402
    CONFIGS,
    MIXED,
    MIXTRAL,
    QWEN3_MOE,
    WINDOWED,
    in_our_layout,
)
from support.models import assert_close, batch, llama_configs, random_llama, rewrite  # noqa: E402

from parity.ops import cases as ops  # noqa: E402
from parity.ops.cases import FLOOR  # noqa: E402
from parity.twins import bridge  # noqa: E402

EAGER = dict(dtype=torch.float32, experts_implementation="eager", attn_implementation="eager")
# A window in every layer, whatever max_window_layers says
QWEN3_WINDOWED = replace(QWEN3_MOE, use_sliding_window=True, sliding_window=4, max_window_layers=1)
every_config = pytest.mark.parametrize("name", CONFIGS)


@contextlib.contextmanager
def in_float64():
    """Their balancing loss is float32 even in a float64 model: within this block it is float64."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def their_balancing_loss(theirs, ids, mask):
    """Of transformers: ``mask`` (B, T) is false for padding."""
    function = sys.modules[type(theirs).__module__].load_balancing_loss_func
    config = theirs.config
    logits = theirs(ids, output_router_logits=True).router_logits
    return function(logits, config.num_local_experts, config.num_experts_per_tok, mask)


def real(targets):
    """(B, T): false for the padding after a row's last target."""
    last = [max(np.flatnonzero(row != -100), default=-1) for row in targets]
    return np.arange(targets.shape[1]) <= np.array(last)[:, None]


# ------------------------------------------------------------ against the twin and transformers


@settings(max_examples=25)
@example(config=MIXTRAL, rows=2, padding=3, seed=0, num_targets=None)
@example(config=MIXED, rows=2, padding=0, seed=1, num_targets=7)
@example(config=QWEN3_WINDOWED, rows=2, padding=0, seed=16, num_targets=None)
@given(
    config=llama_configs(MixtralConfig) | llama_configs(Qwen3MoeConfig),
    rows=st.integers(1, 3),
    padding=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
    num_targets=st.none() | st.integers(1, 50),
)
def test_logits_loss_and_gradients_equal_transformers_and_the_twin(config, rows, padding, seed, num_targets):
    """In training mode, where the balancing loss belongs to the loss; no dropout."""
    model = random_llama(config, seed).train()
    ids, targets = batch(config, (rows, 1 + seed % config.context), seed)
    targets[1:, max(1, targets.shape[1] - padding) :] = -100  # but not in the first row
    tensors = torch.from_numpy(ids), torch.from_numpy(targets)
    loss = model.loss(ids, targets, num_targets=num_targets)
    loss.backward()
    counted = int((targets != -100).sum())
    for side, other in (("twin", bridge.to_torch(model)), ("transformers", bridge.to_transformers(model))):
        logits = other(tensors[0]) if side == "twin" else other(tensors[0], output_router_logits=False).logits
        assert_close(model(ids).data, logits, f"logits of {side}")
        if side == "twin":
            expected = other.loss(*tensors, num_targets)
        else:
            flat = logits.flatten(0, 1), tensors[1].flatten()
            expected = torch.nn.functional.cross_entropy(*flat, reduction="sum") / (num_targets or counted)
            if config.output_router_logits and any("gate.weight" in n for n, _ in model.named_parameters()):
                with in_float64():
                    balance = their_balancing_loss(other, tensors[0], torch.from_numpy(real(targets)))
                share = counted / num_targets if num_targets else 1
                expected = expected + config.router_aux_loss_coef * share * balance
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        theirs = {name: p.grad for name, p in other.named_parameters()}
        floor = FLOOR * max(gradient.abs().max() for gradient in theirs.values() if gradient is not None)
        arrays = {name: None if g is None else g.numpy() for name, g in theirs.items()}
        arrays = arrays if side == "twin" else in_our_layout(model, arrays)
        assert set(arrays) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.grad is None:  # an expert that no token chose
                assert ".experts." in name and (arrays[name] is None or not arrays[name].any())
            else:
                ops.assert_close(parameter.grad, arrays[name], f"{name} of {side}", floor=floor.item())


@every_config
def test_unmodified_transformers_differs_by_its_float32_rounding(name):
    """Their router, norms, angles and balancing loss are float32: logits and loss are within 1e-6."""
    model = random_llama(replace(CONFIGS[name], rms_norm_eps=1e-3)).train()
    patched = bridge.to_transformers(model)
    config = type(patched.config).from_dict(patched.config.to_dict())
    config._attn_implementation = config._experts_implementation = "eager"
    theirs = type(patched)(config).double()
    theirs.load_state_dict(patched.state_dict(), strict=True)
    ids = np.random.default_rng(0).integers(0, 23, (2, 17))
    out = theirs(torch.from_numpy(ids), labels=torch.from_numpy(ids), use_cache=False)
    assert_close(model(ids).data, out.logits, "logits", 1e-6)
    targets = np.concatenate([ids[:, 1:], np.full((2, 1), -100)], axis=1)
    cross_entropy, loss = model.eval().loss(ids, targets).item(), None
    with mock.patch(
        "tinyllm.models.mixture.load_balancing_loss", lambda routings, counted: balance(routings)
    ):
        loss = model.train().loss(ids, targets).item()  # they count the last token too
    assert loss == pytest.approx(out.loss.item(), rel=1e-6) and loss > cross_entropy + 0.1


def balance(routings):
    return load_balancing_loss(routings, np.ones(len(routings[0][0].data), bool))


# ----------------------------------------------------------------------- the layer and its loss


def test_a_mixture_is_the_weighted_sum_of_the_experts_with_the_largest_probabilities():
    mixture = random_llama(QWEN3_MOE).layers[0].mlp
    x = Tensor(np.random.default_rng(1).standard_normal((2, 3, 12)))
    logits, expected = x.data @ mixture.gate.weight.data.T, np.zeros(x.shape)
    for b, t in np.ndindex(2, 3):
        chosen = sorted(range(5), key=lambda e: -logits[b, t, e])[:2]
        weights = np.exp(logits[b, t, chosen]) / np.exp(logits[b, t, chosen]).sum()
        for e, weight in zip(chosen, weights):
            expected[b, t] += weight * mixture.experts[e](x[b : b + 1, t]).data[0]
    np.testing.assert_allclose(mixture(x).data, expected, rtol=1e-12)


def test_balancing_loss_is_k_if_all_experts_are_used_alike_and_larger_otherwise():
    uniform = Tensor(np.full((6, 3), 1 / 3))
    even = uniform, np.array([[0, 1], [1, 2], [2, 0]] * 2)
    everyone = np.ones(6, bool)
    assert load_balancing_loss([even], everyone).item() == pytest.approx(2)
    assert load_balancing_loss([even, even], everyone).item() == pytest.approx(2)  # a mean over layers
    one = Tensor(np.tile([0.8, 0.1, 0.1], (6, 1))), np.tile([0, 1], (6, 1))
    assert load_balancing_loss([one], everyone).item() == pytest.approx(3 * (0.8 + 0.1))
    only_first = np.arange(6) < 1
    assert load_balancing_loss([even], only_first).item() == pytest.approx(3 * (1 / 3 + 1 / 3))


@every_config
def test_balancing_loss_is_part_of_the_loss_in_training_mode_only(name):
    model = random_llama(CONFIGS[name])
    ids, targets = batch(model.config, (2, 9))
    evaluated, trained = model.eval().loss(ids, targets), model.train().loss(ids, targets)
    assert trained.item() > evaluated.item() + 0.3 * 2 * 0.5
    silent = random_llama(replace(CONFIGS[name], output_router_logits=False)).train()
    assert silent.loss(ids, targets).item() == evaluated.item()


def test_padding_changes_neither_loss_nor_gradients():
    model = random_llama(QWEN3_MOE).train()
    ids, targets = batch(model.config, (2, 6))
    targets[:, -1] = 1
    model.loss(ids, targets).backward()
    expected, grads = model.loss(ids, targets).item(), [p.grad for p in model.parameters()]
    model.zero_grad()
    longer = np.pad(ids, ((0, 0), (0, 5))), np.pad(targets, ((0, 0), (0, 5)), constant_values=-100)
    loss = model.loss(*longer)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-13)
    for grad, parameter in zip(grads, model.parameters()):
        if grad is not None:
            assert_close(parameter.grad, grad, "a gradient", 1e-12)


def test_the_losses_of_a_divided_batch_are_weighted_by_their_targets():
    model = random_llama(MIXTRAL).train()
    ids, targets = batch(model.config, (3, 8))
    number = (targets != -100).sum()
    parts = [(ids[i : i + 1], targets[i : i + 1]) for i in range(3)]
    alone = sum(model.loss(*part).item() * (part[1] != -100).sum() for part in parts) / number
    assert sum(model.loss(*part, num_targets=number).item() for part in parts) == pytest.approx(alone)
    nothing = model.loss(ids[:1], np.full((1, 8), -100), num_targets=number)
    assert nothing.item() == 0


def test_a_router_learns_to_choose_the_better_expert():
    """Only through the weights: the experts are fixed, and the output should be that of expert 1."""
    mixture = random_llama(replace(QWEN3_MOE, num_experts=2)).layers[0].mlp
    mixture.requires_grad_(False)
    mixture.gate.weight.requires_grad = True
    x = Tensor(np.random.default_rng(0).standard_normal((1, 20, 12)) + 1)
    wanted = mixture.experts[1](x).data
    optimizer, errors = optim.AdamW(mixture, lr=0.05, weight_decay=0.0), []
    for _ in range(60):
        difference = mixture(x) - Tensor(wanted)
        error = (difference * difference).mean()
        error.backward()
        optimizer.step()
        mixture.zero_grad()
        errors.append(error.item())
    assert errors[-1] < 0.05 * errors[0]


# -------------------------------------------------------------------------- decoding and causality


@every_config
def test_a_cache_gives_the_logits_without_one(name):
    """Beyond the window, token by token and in pieces, for rows of different lengths."""
    model = random_llama(CONFIGS[name])
    ids = np.random.default_rng(1).integers(0, 23, (2, 24))
    with no_grad():
        whole, cache, columns = model(ids).data, model.new_cache(2), []
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 15), *((i, i + 1) for i in range(15, 24))):
            columns.append(model(ids[:, start:stop], cache=cache).data)
        assert_close(np.concatenate(columns, axis=1), whole, "logits", 1e-12)
        rows = model.new_cache(2)
        model(ids[:1, :9], cache=rows[:1])
        model(ids[1:, :4], cache=rows[1:])
        both = model(np.stack([ids[0, 9:11], ids[1, 4:6]]), cache=rows).data
    assert_close(both, np.stack([whole[0, 9:11], whole[1, 4:6]]), "rows of different lengths", 1e-12)


@every_config
@pytest.mark.parametrize("rows", [1, 3])
def test_recorded_decoding_does_not_repeat_the_routing_of_earlier_tokens(name, rows):
    """A plan would repeat the products of the experts that the recorded tokens chose."""
    model, run = random_llama(CONFIGS[name]), None
    ids = np.random.default_rng(2).integers(0, 23, (rows, 35))
    with no_grad():
        expected, cache, run = model(ids).data, model.new_cache(rows), DecodingSteps(model, 35)
        logits = [run(ids[:, i : i + 1], cache).data for i in range(35)]
    assert_close(np.concatenate(logits, axis=1), expected, "logits", 1e-12)
    assert not run.enabled and not any(recording.plan for recording in run.recordings.values())


def test_generated_text_is_the_same_with_and_without_a_cache():
    model = random_llama(WINDOWED)
    options = dict(max_new_tokens=30, temperature=0)
    texts = [[*generate(model, [[1, 2, 3]], use_cache=cached, **options)] for cached in (True, False)]
    assert len(texts[0]) == 30 and np.array_equal(*texts)


def test_tokens_do_not_depend_on_later_ones_or_on_other_rows():
    model = random_llama(QWEN3_MOE)
    ids = np.random.default_rng(3).integers(0, 23, (3, 10))
    with no_grad():
        logits = model(ids).data
        changed = ids.copy()
        changed[:, 6:] = 5
        changed[1:] = 7
        np.testing.assert_allclose(model(changed).data[0, :6], logits[0, :6], rtol=1e-12)


# --------------------------------------------------------------------------------------- files


@every_config
def test_folders_are_exchanged_with_transformers(name, tmp_path):
    model = random_llama(CONFIGS[name], dtype=np.float32)
    ids = np.random.default_rng(4).integers(0, 23, (2, 12))
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **EAGER)
    assert type(theirs).__name__ == model.config.hub_class
    assert_close(model(ids).data, theirs(torch.from_numpy(ids)).logits, "logits", 1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert type(again) is type(model)
    for (one, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert one == other and np.array_equal(p.data, q.data), one


@every_config
def test_fused_experts_load_as_well(name, tmp_path):
    """The layout of transformers 5 in memory, as a file."""
    model = random_llama(CONFIGS[name], dtype=np.float32)
    theirs = bridge.to_transformers(model)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    keys = load_keys(tmp_path)
    assert any(key.endswith("experts.gate_up_proj") for key in keys)
    again = load_model(tmp_path)
    for (one, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert np.array_equal(p.data, q.data), one


def load_keys(folder):
    from safetensors.numpy import load_file

    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("removed", [[0], [1], [3], [0, 2], [1, 3]])
def test_layers_keep_their_networks_when_others_are_removed(removed, tmp_path):
    """Of four layers only the second has a mixture."""
    model = random_llama(MIXED).eval()
    for i in removed[::-1]:
        del model.layers[i]
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, np.float64)
    ids = batch(MIXED, (2, 8))[0]
    np.testing.assert_array_equal(again(ids).data, model(ids).data)
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER).double()
        found = theirs(torch.from_numpy(ids), output_router_logits=False).logits.numpy()
    assert np.abs(found - model(ids).data).max() <= 1e-5 * np.abs(found).max()


def test_a_parameter_that_is_fused_and_separate_is_an_error(tmp_path):
    bridge.to_transformers(random_llama(QWEN3_MOE, dtype=np.float32)).save_pretrained(
        tmp_path, save_original_format=False
    )
    twice = "model.layers.0.mlp.experts.3.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors | {twice: torch.zeros(7, 12)})
    with pytest.raises(Error, match=r"experts\.3\.up_proj\.weight.*same parameter"):
        load_model(tmp_path)


def test_a_missing_expert_is_named(tmp_path):
    random_llama(MIXTRAL, dtype=np.float32).save_pretrained(tmp_path)
    missing = "model.layers.1.block_sparse_moe.experts.4.w3.weight"
    rewrite(tmp_path, lambda tensors: {name: x for name, x in tensors.items() if name != missing})
    with pytest.raises(Error, match=r"Missing \(1\): layers\.1\.block_sparse_moe\.experts\.4\.w3\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "config, words",
    [
        (dict(model_type="mixtral", num_experts_per_tok=9), ["num_experts_per_tok is 9", "8 experts"]),
        (dict(model_type="mixtral", router_jitter_noise=0.1), ["router_jitter_noise", "0.1"]),
        (dict(model_type="mixtral", router_aux_loss_coef=-1.0), ["router_aux_loss_coef", "-1.0"]),
        (dict(model_type="mixtral", num_local_experts=10**8), ["100,000,000 experts"]),
        (dict(model_type="mixtral", num_local_experts=5000), ["5,000 experts in 32 layers"]),
        (dict(model_type="qwen3_moe", num_experts=0), ["num_experts", "at least 1", "0"]),
        (dict(model_type="qwen3_moe", num_local_experts=4), ["num_experts_per_tok is 8", "4 experts"]),
        (dict(model_type="qwen3_moe", mlp_only_layers=3), ["mlp_only_layers", "list", "3"]),
        (dict(model_type="qwen3_moe", decoder_sparse_step=0), ["decoder_sparse_step", "at least 1"]),
        (
            dict(model_type="qwen3_moe", use_sliding_window=True, layer_types=["full_attention"] * 24),
            ["layer_types is ['full_attention', ", "are alike"],
        ),
    ],
)
def test_configs_that_do_not_fit_are_refused(config, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Error) as caught:
        load_model(tmp_path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", [Mixtral, Qwen3Moe])
def test_default_configs_are_those_of_transformers(kind):
    theirs = transformers.AutoConfig.for_model(kind.config_class.model_type)
    assert kind.config_class.from_dict(theirs.to_dict()) == kind.config_class()


@pytest.mark.parametrize("kind", [Mixtral, Qwen3Moe])
def test_of_size_makes_two_experts_as_large_as_the_network_of_a_llama(kind):
    found = kind.config_class.of_size(50, context=32, n_layer=2, n_head=4, n_embd=24)
    width = found.intermediate_size if kind is Mixtral else found.moe_intermediate_size
    assert (found.num_experts, found.num_experts_per_tok, width) == (8, 2, 32)
    assert found.output_router_logits and found.norm_topk_prob and found.sliding_window is None


PUBLISHED = [
    (Mixtral, "Mixtral-8x7B", 46_702_792_704, 12_879_925_248),
    (Mixtral, "Mixtral-8x22B", 140_620_634_112, 39_152_031_744),
    (Qwen3Moe, "Qwen3-30B-A3B", 30_532_122_624, 3_353_032_704),
    (Qwen3Moe, "Qwen3-235B-A22B", 235_093_634_560, 22_190_763_520),
]


@pytest.mark.parametrize("kind, size, total, active", PUBLISHED)
def test_published_sizes_have_the_parameters_that_transformers_counts(kind, size, total, active):
    """On the meta device there, with meta parameters here; those of the k experts of a token are active."""
    config = kind.config_class.preset(size)
    model = kind(config, rng=None)
    theirs = getattr(transformers, config.hub_class)
    with torch.device("meta"):
        counted = theirs(theirs.config_class.from_dict(config.to_dict())).num_parameters()
    assert model.num_parameters() == counted == total
    unused = [p.size for expert in range(config.num_experts_per_tok, config.num_experts)
              for block in model.layers for p in mixture_of(block).experts[expert].parameters()]  # fmt: skip
    assert total - sum(unused) == active


def mixture_of(block):
    return block.block_sparse_moe if hasattr(block, "block_sparse_moe") else block.mlp


# --------------------------------------------------------------------------------------- LoRA


def test_lora_on_experts_and_router_is_trained_merged_and_loaded(tmp_path):
    model = random_llama(QWEN3_MOE, dtype=np.float32)
    ids, targets = batch(model.config, (4, 12))
    names = nn.add_lora(model, rank=2, targets=["gate", "gate_proj", "down_proj"], rng=0)
    assert sum(".experts." in name for name in names) == 2 * 5 * 2 and "layers.0.mlp.gate" in names
    optimizer, losses = optim.AdamW(model, lr=1e-2), []
    for _ in range(15):
        loss = model.train().loss(ids, targets)
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    save_adapter(model, tmp_path, base=None)
    again = random_llama(QWEN3_MOE, dtype=np.float32)
    load_adapter(again, tmp_path)
    with no_grad():
        before = model.eval()(ids).data
        assert np.array_equal(again.eval()(ids).data, before)
        nn.merge_lora(model)
        assert_close(model(ids).data, before, "logits of the merged model", 1e-4)

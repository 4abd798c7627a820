"""LoRA: its gradients and training, the layers it is put on, merging, and what it costs.

The layer by itself is a case of ``test_layers.py``; files are in ``tests/weights/test_adapters.py``.
"""

import gc
import logging
import re
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from support.adapters import CONFIGS, randomize, with_lora
from support.models import SMALL, batch, random_gpt2, random_model
from support.ops import keeping

from parity.ops.cases import assert_close
from parity.twins import bridge
from parity.twins.lora import add_lora as add_to_twin
from tinyllm import GPT2, Error, GPT2Config, Tensor, nn, optim
from tinyllm.models import empty_model
from tinyllm.nn.surgery import first_match, matches

both_models = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
LINEAR = ["c_attn", "c_proj", "c_fc"]
OPTIONS = {
    "default": {},
    "all linear": dict(rank=3, alpha=5, targets="all-linear", use_rslora=True),
    "head": dict(rank=2, targets=["lm_head"]),
    "expression": dict(targets=r".*\.(0|1)\..*[oc]_proj"),
}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------------- against torch


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@both_models
def test_loss_and_gradients_equal_torchs(config, options):
    model = with_lora(config, **options)
    twin = add_to_twin(bridge.to_torch(random_model(config)), model)
    ids, targets = batch(config, (2, 8))
    loss = model.loss(ids, targets)
    theirs = twin.loss(torch.from_numpy(ids), torch.from_numpy(targets))
    assert_close(loss.data, theirs.detach().numpy(), "loss")
    loss.backward()
    theirs.backward()
    expected = {name: p.grad.numpy() for name, p in twin.named_parameters() if p.grad is not None}
    assert expected.keys() == trained(model)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in expected), name
        if name in expected:
            assert_close(parameter.grad, expected[name], name)


# ----------------------------------------------------------------------------- the layers


@both_models
def test_the_model_starts_as_it_was_bit_for_bit(config):
    model, (ids, _) = random_model(config), batch(config, (2, 8))
    before = model(ids).data
    names = nn.add_lora(model, rng=0)
    assert names == list(nn.lora_layers(model))
    assert {name.rpartition(".")[2] for name in names} <= {"c_attn", "q_proj", "v_proj"}
    assert np.array_equal(model(ids).data, before)
    assert trained(model) == {f"{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    for layer in nn.lora_layers(model).values():
        A, bound = layer.lora_A.weight.data, 1 / np.sqrt(layer.base_layer.weight.shape[1])
        assert not layer.lora_B.weight.data.any()
        assert A.dtype == np.float64 and 0.5 * bound < np.abs(A).max() <= bound


def test_each_layer_gets_another_random_matrix():
    model = random_model(CONFIGS["gpt2"])
    nn.add_lora(model, rng=0)
    first, second = (layer.lora_A.weight.data for layer in nn.lora_layers(model).values())
    assert not np.array_equal(first, second)


def test_ranks_and_alphas_by_pattern():
    model = random_gpt2(CONFIGS["gpt2"])
    ranks = {r"h\.1\.attn\.c_proj": 3, "c_proj": 4}
    nn.add_lora(model, 8, 16, LINEAR, rank_pattern=ranks, alpha_pattern={"attn.c_attn": 2}, rng=0)
    found = {name: (layer.rank, layer.alpha) for name, layer in nn.lora_layers(model).items()}
    block = {"attn.c_attn": (8, 2), "attn.c_proj": (4, 16), "mlp.c_fc": (8, 16), "mlp.c_proj": (4, 16)}
    expected = {f"h.{number}.{name}": values for number in range(2) for name, values in block.items()}
    assert found == expected | {"h.1.attn.c_proj": (3, 16)}


@pytest.mark.parametrize(
    ("targets", "name", "expected"),
    [
        (["c_attn"], "h.0.attn.c_attn", True),
        (["attn.c_attn"], "h.0.attn.c_attn", True),
        (["h.1.attn.c_attn"], "h.11.attn.c_attn", False),
        (["1.attn.c_attn"], "h.11.attn.c_attn", False),
        (["attn"], "h.0.attn.c_attn", False),
        (["attn"], "h.0.c_attn", False),
        (r"h\.[01]\..*", "h.1.mlp.c_fc", True),
        (r"h\.[01]", "h.1.mlp.c_fc", False),
        (r"c_fc", "h.1.mlp.c_fc", False),
    ],
)
def test_targets_match_as_in_peft(targets, name, expected):
    assert matches(targets, name) is expected
    utils = pytest.importorskip("peft.tuners.tuners_utils")
    config = pytest.importorskip("peft").LoraConfig(target_modules=targets)
    assert bool(utils.check_target_module_exists(config, name)) is expected


@pytest.mark.parametrize(
    "pattern",
    ["c_proj", r"h\.1\.attn\.c_proj", "proj", "1.attn.c_proj", ".*", "c_(fc|proj)", "c_fc|c_proj"],
)
@pytest.mark.parametrize("name", ["h.1.attn.c_proj", "h.11.attn.c_proj", "c_proj"])
def test_patterns_match_as_in_peft(pattern, name):
    key = pytest.importorskip("peft.utils.other").get_pattern_key([pattern], name)
    assert first_match({pattern: "value"}, name, "default") == {pattern: "value"}.get(key, "default")


@pytest.mark.parametrize("saved", [["wte"], ["lm_head"], ["wte", "ln_f"]])
def test_layers_trained_whole_and_those_tied_to_them(saved):
    model = random_gpt2(CONFIGS["gpt2"])
    names = nn.add_lora(model, modules_to_save=saved, rng=0)
    factors = {f"{name}.lora_{factor}" for name in names for factor in "AB"}
    assert {*nn.adapter_modules(model)} == factors | {"wte", "lm_head", *saved}
    norm = {"ln_f.weight", "ln_f.bias"} if "ln_f" in saved else set()
    assert {name for name in trained(model) if ".lora_" not in name} == {"wte.weight"} | norm


def test_a_layer_trained_whole_gets_no_lora():
    model = random_gpt2(CONFIGS["gpt2"])
    names = nn.add_lora(model, targets=["c_attn", "lm_head"], modules_to_save=["lm_head", "h.0"], rng=0)
    assert names == ["h.1.attn.c_attn"]
    factors = {f"h.1.attn.c_attn.lora_{factor}" for factor in "AB"}
    assert {*nn.adapter_modules(model)} == factors | {"h.0", "lm_head", "wte"}  # h.0 whole, not its layers


def test_a_head_with_two_names_gets_no_lora_by_either():
    model = nn.Module()
    model.transformer, model.score = random_gpt2(CONFIGS["gpt2"]), nn.Linear(12, 2, rng=0)
    model.transformer.lm_head = model.score
    whole = dict(targets=["lm_head", "c_fc"], modules_to_save=["score"])
    for options in (dict(targets="all-linear"), whole):
        names = nn.add_lora(model, **options, rng=0)
        assert names and not [name for name in names if "lm_head" in name or "score" in name]
        nn.merge_lora(model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(targets=["nothing"]), "'nothing'"),
        (dict(targets="c_attn"), "no layer of the model matches"),
        (dict(targets=["c_attn", "c_atn"]), "the target 'c_atn' matches no layer"),
        (dict(targets="h.(", rank=2), "not a regular expression"),
        (dict(targets=["ln_1"]), "h.0.ln_1 (LayerNorm)"),
        (dict(targets=["wte"]), "wte (Embedding)"),
        (dict(modules_to_save=["score"]), "'score'"),
        (dict(modules_to_save="lm_head"), "modules_to_save is 'lm_head'"),
        (dict(targets=re.compile("c_attn")), "targets is re.compile('c_attn')"),
        (dict(targets=["c_attn", 3]), "targets is ['c_attn', 3]"),
        (dict(rank=0), "rank is 0"),
        (dict(rank_pattern={"h.1.attn.c_attn": -1}), "rank is -1"),
        (dict(alpha=0), "alpha is 0"),
        (dict(alpha=float("inf")), "alpha is inf"),
        (dict(alpha=1e308), "alpha is 1e+308"),
        (dict(alpha=10**400), "alpha is 1000"),
        (dict(dropout=1.5), "1.5"),
    ],
)
def test_wrong_requests_are_refused_and_change_nothing(options, said):
    model = random_gpt2(CONFIGS["gpt2"])
    before = repr(model)
    with pytest.raises(Error, match=re.escape(said)):
        nn.add_lora(model, rng=0, **options)
    assert repr(model) == before and trained(model) == {name for name, _ in model.named_parameters()}


def test_a_model_with_other_names_is_told_the_targets_and_what_to_choose():
    class Other(nn.Module):
        def __init__(self):
            self.block = [nn.Linear(2, 2, rng=0)]

    with pytest.raises(Error, match=r"'c_attn', 'q_proj', 'v_proj'.*such as 'all-linear'.*block\.0"):
        nn.add_lora(Other(), rng=0)


def test_lora_is_not_added_twice():
    model = with_lora(CONFIGS["gpt2"])
    with pytest.raises(Error, match="merge"):
        nn.add_lora(model, rng=0)


# --------------------------------------------------------------------------------- merging


@both_models
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_merged_equals_unmerged(config, dtype):
    model, (ids, _) = (
        with_lora(config, targets="all-linear", use_rslora=True).astype(dtype),
        batch(config, (2, 8)),
    )
    plain, before = random_model(config).astype(dtype), model(ids).data
    assert np.abs(before - plain(ids).data).max() > 0.1
    merged = nn.merge_lora(model)
    assert not nn.lora_layers(model) and {*model.state_dict()} == {*plain.state_dict()}
    bound = dict(rtol=0, atol=(1e-12 if dtype == np.float64 else 1e-4) * np.abs(before).max())
    np.testing.assert_allclose(model(ids).data, before, **bound)
    nn.unmerge_lora(model, merged)
    assert nn.lora_layers(model) == merged
    np.testing.assert_allclose(model(ids).data, before, **bound)
    for layer in merged.values():
        layer.lora_B.weight.replace(np.zeros_like(layer.lora_B.weight.data))
    np.testing.assert_allclose(model(ids).data, plain(ids).data, **bound)


def test_half_precision_is_merged_in_float32():
    import ml_dtypes

    layer = nn.Linear(40, 30, rng=0).astype("bfloat16")
    lora = nn.LoRA(layer, 20, 40, rng=1)
    rng = np.random.default_rng(0)
    lora.lora_B.weight.replace(rng.standard_normal((30, 20)).astype(ml_dtypes.bfloat16))
    W, A, B = (p.data.astype(np.float64) for p in (layer.weight, lora.lora_A.weight, lora.lora_B.weight))
    holder = nn.Module()
    holder.layer = lora
    nn.merge_lora(holder)
    expected = (W + 2 * B @ A).astype(np.float32).astype(ml_dtypes.bfloat16)
    assert holder.layer is layer and layer.weight.dtype == ml_dtypes.bfloat16
    assert (layer.weight.data == expected).mean() > 0.99


@pytest.mark.parametrize(("base", "adapter"), [(None, 0), (0, None)])
def test_lora_without_weights_is_not_merged(base, adapter):
    holder = nn.Module()
    holder.layer = nn.LoRA(nn.Linear(4, 3, rng=base), 2, rng=adapter)
    with pytest.raises(Error, match="no weights yet"):
        nn.merge_lora(holder)


def test_merging_into_a_tied_head_unties_it_and_says_so(caplog):
    model = with_lora(CONFIGS["gpt2"], targets=["lm_head"])
    ids, before = batch(CONFIGS["gpt2"], (2, 8))[0], model.wte.weight.data.copy()
    expected = model(ids).data
    with caplog.at_level(logging.WARNING, "tinyllm"):
        merged = nn.merge_lora(model)
    assert "lm_head" in caplog.text and "no longer tied" in caplog.text
    assert np.array_equal(model.wte.weight.data, before) and model.lm_head.weight is not model.wte.weight
    assert not model.lm_head.weight.requires_grad
    np.testing.assert_allclose(model(ids).data, expected, rtol=0, atol=1e-12)
    nn.unmerge_lora(model, merged)
    assert model.lm_head.base_layer.weight is model.wte.weight
    assert np.array_equal(model(ids).data, expected)


def test_a_layer_in_two_places_is_merged_once():
    model = random_model(CONFIGS["llama"])
    model.layers[1] = model.layers[0]
    model.layers[0].mlp.up_proj = model.layers[0].mlp.gate_proj  # one layer, two places in a block
    nn.add_lora(model, targets="all-linear", rng=1)
    randomize(model)
    ids = batch(CONFIGS["llama"], (2, 8))[0]
    expected = model(ids).data
    bound = dict(rtol=0, atol=1e-12 * np.abs(expected).max())
    merged = nn.merge_lora(model)
    assert not nn.lora_layers(model) and model.layers[0].mlp.up_proj is model.layers[0].mlp.gate_proj
    np.testing.assert_allclose(model(ids).data, expected, **bound)
    nn.unmerge_lora(model, merged)
    assert nn.lora_layers(model) == merged
    np.testing.assert_allclose(model(ids).data, expected, **bound)


# --------------------------------------------------------------------------------- the cost


@pytest.mark.parametrize(
    ("size", "changes", "head", "rank", "targets", "expected"),
    [
        ("124M", {}, None, 8, None, 294_912),
        ("124M", {}, 2, 16, [*LINEAR, "lm_head"], 2_371_616),
        ("355M", dict(tie_word_embeddings=False), None, 16, [*LINEAR, "lm_head"], 7_111_952),
    ],
)
def test_counts_of_gpt2_without_its_memory(size, changes, head, rank, targets, expected):
    tracemalloc.start()
    model = GPT2(GPT2Config.preset(size, **changes), rng=None)
    if head is not None:
        model.lm_head = nn.Linear(model.config.n_embd, head, rng=None)
    nn.add_lora(model, rank, targets=targets, rng=None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(parameter.size for parameter in model.parameters() if parameter.requires_grad) == expected
    assert peak < 30e6  # the biases and B
    with pytest.raises(Error, match="no weights yet"):
        model([[0]])


def test_peft_has_as_many_parameters():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = peft.get_peft_model(
            transformers.GPT2LMHeadModel(transformers.GPT2Config()), peft.LoraConfig()
        )
    ours = empty_model("124M")
    nn.add_lora(ours, rng=None)
    count = sum(parameter.size for parameter in ours.parameters() if parameter.requires_grad)
    assert theirs.get_nb_trainable_parameters()[0] == count


def test_training_changes_only_the_adapter():
    config = GPT2Config(**SMALL, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    model = random_gpt2(config).train()
    nn.add_lora(model, 2, 4, dropout=0.3, modules_to_save=["ln_f"], rng=0)
    before = {name: parameter.data.copy() for name, parameter in model.named_parameters()}
    optimizer, (ids, targets) = optim.AdamW(model, 1e-2, weight_decay=0.1), batch(config, (2, 8))
    for _ in range(3):
        model.loss(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not np.array_equal(p.data, before[name])}
    assert changed == trained(model) and len(changed) == 2 * 2 + 2
    assert optimizer.state_dict()["m"].keys() == trained(model)


def held_after_forward(layer, shape) -> int:
    """Bytes that a forward pass keeps for the backward pass, without its input and output."""
    x = Tensor(np.ones(shape, np.float32), requires_grad=True) * 1.0
    layer(x).sum().backward()  # one-time allocations
    x = Tensor(np.ones(shape, np.float32), requires_grad=True) * 1.0
    gc.collect()
    tracemalloc.start()
    y = layer(x)
    held = tracemalloc.get_traced_memory()[0] - y.data.nbytes
    tracemalloc.stop()
    return held


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_keeps_the_small_product_only(dropout):
    holder = nn.Module()
    holder.layer = nn.Linear(256, 256, rng=0)
    nn.add_lora(holder, 4, targets=["layer"], dropout=dropout, rng=0)
    rows = 512
    product = rows * 4 * 4  # s x Aᵀ in float32
    with keeping(everything=False):
        held = held_after_forward(holder.layer, (rows, 256))
    assert product <= held < 2 * product + 20_000


def test_a_frozen_linear_does_not_keep_its_input():
    layer = nn.Linear(8, 8, rng=0)
    for trains in (True, False):
        layer.weight.requires_grad = trains
        x = Tensor(np.ones((4, 8), np.float32), requires_grad=True) * 1.0
        kept, y = weakref.ref(x.data), layer(x)
        del x
        assert (kept() is not None) is trains
        y.sum().backward()

"""GPT-2 against transformers, folders exchanged in both directions, and properties of the model."""

import json
import math
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import (
    NO_DROPOUT,
    SMALL,
    assert_close,
    batch,
    configs,
    our_gradients,
    random_gpt2,
    rewrite,
)

from tinyllm import GPT2, Error, GPT2Config, load_model, manual_seed, nn, no_grad
from tinyllm.models import saving
from tinyllm.models.gpt2 import ACTIVATIONS, SIZES, Conv1D

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


# --------------------------------------------------------------- against transformers, in float64


def huggingface_twin(model):
    """``transformers.GPT2LMHeadModel`` with the weights of ``model``.

    It lacks two of our options. Without ``qkv_bias`` its bias for Q, K and V is zero; the bias of the head is
    added to its logits by ``huggingface_logits``.
    """
    ours = model.config
    names = ("vocab_size n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon "
             "tie_word_embeddings").split()  # fmt: skip
    config = transformers.GPT2Config(**{name: getattr(ours, name) for name in names}, **NO_DROPOUT)
    config._attn_implementation = "eager"
    twin = transformers.GPT2LMHeadModel(config).double().eval()
    state = {name: torch.tensor(np.array(array)) for name, array in model.state_dict().items()}
    head_bias = state.pop("lm_head.bias", None)
    if not ours.qkv_bias:
        for i in range(ours.n_layer):
            state[f"h.{i}.attn.c_attn.bias"] = torch.zeros(3 * ours.n_embd, dtype=torch.float64)
    state = {name if name.startswith("lm_head.") else f"transformer.{name}": t for name, t in state.items()}
    if ours.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    twin.load_state_dict(state, strict=True)
    twin.head_bias = None if head_bias is None else torch.nn.Parameter(head_bias)
    return twin


def huggingface_logits(twin, ids):
    logits = twin(torch.from_numpy(ids)).logits
    return logits if twin.head_bias is None else logits + twin.head_bias


def huggingface_gradients(model, twin):
    """Name -> gradient of the parameters of both models, in the checkpoint layout, by our names."""
    gradients = {"lm_head.bias": twin.head_bias.grad} if twin.head_bias is not None else {}
    for name, parameter in twin.named_parameters():
        name = name.removeprefix("transformer.")
        absent_here = name.endswith("attn.c_attn.bias") and not model.config.qkv_bias
        if name != "head_bias" and not absent_here:
            gradients[name] = parameter.grad
    return gradients


@given(config=configs(), rows=st.integers(1, 3), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_logits_loss_and_gradients_equal_transformers(config, rows, seed, data):
    time = data.draw(st.integers(1, config.n_positions), label="time")
    model = random_gpt2(config, seed)
    twin = huggingface_twin(model)
    ids, targets = batch(config, (rows, time), seed)
    num_targets = data.draw(st.none() | st.integers(1, 50), label="num_targets")

    theirs = huggingface_logits(twin, ids)
    assert_close(model(ids).data, theirs, "logits")

    # The loss of transformers is computed in float32; this one in float64.
    total = torch.nn.functional.cross_entropy(
        theirs.reshape(-1, config.vocab_size), torch.from_numpy(targets).reshape(-1), reduction="sum"
    )
    expected = total / (num_targets or int((targets != -100).sum()))
    expected.backward()
    loss = model.loss(ids, targets, num_targets=num_targets)
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)

    gradients, reference = our_gradients(model), huggingface_gradients(model, twin)
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, reference[name], name)


def test_backward_through_the_logits_equals_transformers():
    model = random_gpt2(GPT2Config(**SMALL))
    twin = huggingface_twin(model)
    ids, _ = batch(model.config, (2, 8))
    upstream = np.random.default_rng(3).standard_normal((2, 8, 13))
    model(ids).backward(upstream)
    huggingface_logits(twin, ids).backward(torch.from_numpy(upstream))
    reference = huggingface_gradients(model, twin)
    for name, gradient in our_gradients(model).items():
        assert_close(gradient, reference[name], name)


@pytest.mark.proof("GPT2")
def test_several_query_blocks_and_row_chunks_equal_transformers():
    """300 positions are three query blocks in attention; 900 rows are two chunks in the loss."""
    config = GPT2Config(**SMALL | dict(n_positions=300, vocab_size=70), **NO_DROPOUT)
    model = random_gpt2(config)
    twin = huggingface_twin(model)
    ids, targets = batch(config, (3, 300))
    theirs = huggingface_logits(twin, ids)
    assert_close(model(ids).data, theirs, "logits")
    expected = torch.nn.functional.cross_entropy(
        theirs.reshape(-1, 70), torch.from_numpy(targets).reshape(-1)
    )
    expected.backward()
    loss = model.loss(ids, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    reference = huggingface_gradients(model, twin)
    for name, gradient in our_gradients(model).items():
        assert_close(gradient, reference[name], name)


# ----------------------------------------------------------------------------- sizes and start

CLASSIC = GPT2Config(n_positions=256, qkv_bias=False, lm_head_bias=True, tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (GPT2Config(), 124_439_808),
        (GPT2Config.preset("124M"), 124_439_808),
        (GPT2Config.preset("355M"), 354_823_168),
        (GPT2Config.preset("774M"), 774_030_080),
        (GPT2Config.preset("1558M"), 1_557_611_200),
        (CLASSIC, 162_469_969),
    ],
    ids=["default", *SIZES, "classic"],
)
def test_parameter_counts_are_as_published(config, count):
    tracemalloc.start()
    try:
        model = GPT2(config, rng=None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert model.num_parameters() == count
    assert peak < count * 4 / 100  # biases and norms only


def test_preset_applies_changes_and_refuses_unknown_sizes():
    config = GPT2Config.preset("355M", n_positions=256, qkv_bias=False)
    assert (config.n_layer, config.n_head, config.n_embd) == (24, 16, 1024)
    assert config.n_positions == 256 and not config.qkv_bias and config.vocab_size == 50257
    with pytest.raises(Error, match=r"'125M'.* 124M, 355M, 774M, 1558M"):
        GPT2Config.preset("125M")


@pytest.mark.parametrize("initializer_range", [0.02, 0.05])
@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_have_the_documented_std(initializer_range, tied):
    config = GPT2Config(
        vocab_size=2000, n_positions=400, n_embd=96, n_layer=8, n_head=4, tie_word_embeddings=tied,
        lm_head_bias=True, initializer_range=initializer_range,
    )  # fmt: skip
    model = GPT2(config, rng=np.random.default_rng(0))
    assert (model.lm_head.weight is model.wte.weight) == tied
    for name, parameter in model.named_parameters():
        data = parameter.data.astype(np.float64)
        if name.endswith("bias"):
            assert not data.any(), name
        elif ".ln_" in f".{name}":
            assert (data == 1).all(), name
        else:
            std = initializer_range / (math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 1)
            assert abs(data.std() - std) < 5 * std / math.sqrt(2 * data.size), name
            assert abs(data.mean()) < 5 * std / math.sqrt(data.size), name


def test_initial_weights_are_a_function_of_the_seed():
    same, again, other = (GPT2(GPT2Config(**SMALL), rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    for (name, p), q, r in zip(same.named_parameters(), again.parameters(), other.parameters()):
        assert np.array_equal(p.data, q.data), name
        if p.ndim == 2:
            assert not np.array_equal(p.data, r.data), name


def test_untrained_model_has_a_loss_near_log_vocab_size():
    config = GPT2Config(vocab_size=1000, n_positions=64, n_embd=64, n_layer=4, n_head=4)
    model = GPT2(config, rng=np.random.default_rng(0)).eval()
    rng = np.random.default_rng(1)
    ids, targets = rng.integers(0, 1000, (2, 4, 64))
    assert model.loss(ids, targets).item() == pytest.approx(math.log(1000), abs=0.05)


# ------------------------------------------------------------------------------------ behaviour


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_do_not_depend_on_later_tokens(dtype):
    config = GPT2Config(**SMALL | dict(n_positions=140))  # more than one block of queries
    model = random_gpt2(config, dtype=dtype)
    ids, _ = batch(config, (2, 140))
    with no_grad():
        before = model(ids).data
        for t in (0, 1, 70, 127, 128, 139):
            changed = ids.copy()
            changed[0, t] = (ids[0, t] + 1) % 13
            after = model(changed).data
            assert np.array_equal(after[0, :t], before[0, :t])
            assert not np.array_equal(after[0, t], before[0, t])
            assert np.array_equal(after[1], before[1])  # nor any logit of another row


def test_gradients_do_not_flow_to_later_positions():
    model = random_gpt2(GPT2Config(**SMALL))
    ids, _ = batch(model.config, (1, 8))
    upstream = np.zeros((1, 8, 13))
    upstream[0, 4] = 1
    model(ids).backward(upstream)
    assert (np.abs(model.wpe.weight.grad[:5]).max(axis=1) > 0).all()
    assert not model.wpe.weight.grad[5:].any()


def test_rows_of_a_batch_are_independent():
    model = random_gpt2(GPT2Config(**SMALL))
    ids, _ = batch(model.config, (5, 8))
    together = model(ids).data
    order = [3, 0, 4, 1, 2]
    assert_close(model(ids[order]).data, together[order], "permuted", 1e-13)
    for i in range(5):
        assert_close(model(ids[i : i + 1]).data, together[i : i + 1], f"row {i} alone", 1e-13)


def test_prefix_has_the_logits_of_the_full_sequence():
    model = random_gpt2(GPT2Config(**SMALL))
    ids, _ = batch(model.config, (2, 8))
    whole = model(ids).data
    for time in range(1, 8):
        assert_close(model(ids[:, :time]).data, whole[:, :time], f"{time} positions", 1e-13)


def test_micro_batch_gradients_sum_to_the_batch_gradient():
    model = random_gpt2(GPT2Config(**SMALL))
    ids, targets = batch(model.config, (4, 8))
    targets[:2, 1:] = -100  # the halves have very different numbers of targets
    targets[2:] = np.abs(targets[2:]) % 13
    counts = (targets != -100).sum(axis=1)
    assert counts[:2].sum() < counts[2:].sum() / 3

    whole = model.loss(ids, targets)
    whole.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    losses = []
    for half in (slice(0, 2), slice(2, 4)):
        loss = model.loss(ids[half], targets[half], num_targets=int(counts.sum()))
        loss.backward()
        losses.append(loss.item())
    assert sum(losses) == pytest.approx(whole.item(), rel=1e-12)
    for name, p in model.named_parameters():
        assert_close(p.grad, expected[name], name, 1e-12)


def test_batch_with_all_targets_ignored_has_zero_loss():
    model = random_gpt2(GPT2Config(**SMALL))
    ids, targets = batch(model.config, (2, 8))
    nothing = np.full_like(targets, -100)
    loss = model.loss(ids, nothing, num_targets=7)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters())
    with pytest.raises(Error, match="-100"):
        model.loss(ids, nothing)


@pytest.mark.parametrize("changes", [{}, dict(activation_function="gelu"), dict(lm_head_bias=True)])
def test_float32_is_preserved(changes):
    model = random_gpt2(GPT2Config(**SMALL | changes), dtype=np.float32).train()
    ids, targets = batch(model.config, (2, 8))
    assert model(ids).dtype == np.float32
    count = (targets != -100).sum()  # a NumPy scalar widens float32, a Python number does not
    for num_targets in (None, count, np.float64(3), 3):
        loss = model.loss(ids, targets, num_targets=num_targets)
        assert loss.dtype == np.float32
        loss.backward()
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == np.float32, name

    exact = random_gpt2(GPT2Config(**SMALL | changes)).eval()
    assert_close(model.eval()(ids).data.astype(np.float64), exact(ids).data, "float32 against float64", 1e-5)


def test_dropout_is_reproducible_and_disabled_in_eval():
    config = GPT2Config(**SMALL | dict(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3))
    model = random_gpt2(config).train()
    ids, targets = batch(config, (2, 8))

    def run(seed):
        model.zero_grad()
        manual_seed(seed)
        loss = model.loss(ids, targets)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters()}

    loss, gradients = run(5)
    again, gradients_again = run(5)
    assert again == loss
    assert all(np.array_equal(gradients[name], gradients_again[name]) for name in gradients)
    assert run(6)[0] != loss
    manual_seed(5)
    model.loss(ids, targets)
    assert model.loss(ids, targets).item() != loss  # consecutive calls use different masks

    model.eval()
    plain = random_gpt2(GPT2Config(**SMALL, **NO_DROPOUT)).train()
    assert model.loss(ids, targets).item() == model.loss(ids, targets).item()
    assert model.loss(ids, targets).item() == plain.loss(ids, targets).item()


def test_every_dropout_has_the_probability_of_its_place():
    dropouts = dict(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3)
    model = GPT2(GPT2Config(**SMALL | dict(n_layer=1) | dropouts), rng=0)
    found = {name: each.p for name, each in model.named_modules() if isinstance(each, nn.Dropout)}
    assert found == {"drop": 0.1, "h.0.attn.resid_dropout": 0.3, "h.0.mlp.dropout": 0.3}
    assert model.h[0].attn.attn_pdrop == 0.2
    made = GPT2Config.of_size(13, context=8, n_layer=1, n_head=3, n_embd=12, dropout=0.4)
    assert made.embd_pdrop == made.attn_pdrop == made.resid_pdrop == 0.4


@pytest.mark.parametrize("place", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_every_dropout_has_an_effect_and_the_right_gradient(place):
    """With fixed masks the loss is smooth: compare its gradient with central differences."""
    config = GPT2Config(**SMALL, **NO_DROPOUT | {place: 0.3})
    model = random_gpt2(config).train()
    ids, targets = batch(config, (2, 8))

    def loss():
        manual_seed(11)
        return model.loss(ids, targets)

    value = loss()
    assert value.item() != model.eval().loss(ids, targets).item()
    model.train()
    value.backward()
    rng = np.random.default_rng(0)
    directions = {name: rng.standard_normal(p.shape) for name, p in model.named_parameters()}
    slope = sum((p.grad * directions[name]).sum() for name, p in model.named_parameters())

    def moved(eps):
        for name, p in model.named_parameters():
            p.data += eps * directions[name]
        result = loss().item()
        for name, p in model.named_parameters():
            p.data -= eps * directions[name]
        return result

    h = 1e-4  # five points: the error is of order h⁴
    by_differences = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    assert by_differences == pytest.approx(slope, rel=1e-7)


# ------------------------------------------------------------ folders: loading those of transformers


def their_model(seed=0, **changes):
    """A float32 ``transformers`` model with every parameter perturbed."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**SMALL | changes, bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "eager"
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def their_logits(model, ids):
    with torch.no_grad():
        return model.double()(torch.from_numpy(ids)).logits.numpy()


def assert_same_logits(ours, theirs):
    ids, _ = batch(GPT2Config(**SMALL), (2, 8))
    with no_grad():
        assert_close(ours.astype(np.float64)(ids).data, their_logits(theirs, ids), "logits")


@pytest.mark.parametrize("load", [GPT2.from_pretrained, load_model])
@pytest.mark.parametrize("tied", [True, False])
def test_folder_of_transformers_loads(tmp_path, load, tied):
    theirs = their_model(
        tie_word_embeddings=tied, n_inner=7, layer_norm_epsilon=1e-3, activation_function="gelu"
    )
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert isinstance(ours, GPT2) and not ours.training
    assert {p.dtype for p in ours.parameters()} == {np.dtype(np.float32)}
    assert (ours.config.tie_word_embeddings, ours.config.n_inner) == (tied, 7)
    assert ours.config.layer_norm_epsilon == 1e-3 and ours.config.activation_function == "gelu"
    assert_same_logits(ours, theirs)


def without_prefix(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_masks(tensors):
    masks = {}
    for i in range(2):
        masks[f"transformer.h.{i}.attn.bias"] = torch.ones(8, 8).tril().to(torch.uint8).reshape(1, 1, 8, 8)
        masks[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors | masks


def with_float_masks(tensors):
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(8, 8).tril().reshape(1, 1, 8, 8) for i in range(2)}
    return without_prefix(tensors | masks)


def with_the_head_again(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


@pytest.mark.parametrize(
    "change", [without_prefix, with_masks, with_float_masks, with_the_head_again,
               lambda tensors: with_the_head_again(with_masks(tensors))],
    ids=["without prefix", "masks", "float masks, without prefix", "tied head again", "masks and head"],
)  # fmt: skip
def test_every_published_checkpoint_layout_loads(tmp_path, change):
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    assert_same_logits(GPT2.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_checkpoints_load(tmp_path, kind):
    theirs = their_model().to(kind)
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path, dtype=np.float64)
    assert {p.dtype for p in ours.parameters()} == {np.dtype(np.float64)}
    assert_same_logits(ours, theirs)  # the same half-precision weights, computed in float64
    single = GPT2.from_pretrained(tmp_path)
    assert {p.dtype for p in single.parameters()} == {np.dtype(np.float32)}


def test_sharded_checkpoints_load(tmp_path):
    theirs = their_model(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert_same_logits(load_model(tmp_path), theirs)


# ------------------------------------------------------------- folders: loading ours in transformers


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_inner", [None, 7])
def test_saved_folder_loads_in_transformers(tmp_path, tied, n_inner):
    config = GPT2Config(**SMALL, tie_word_embeddings=tied, n_inner=n_inner, layer_norm_epsilon=1e-3)
    ours = random_gpt2(config, dtype=np.float32)
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    assert_same_logits(ours, theirs.eval())
    assert isinstance(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path), transformers.GPT2LMHeadModel
    )


OWN_CHOICES = {
    "head bias": dict(lm_head_bias=True, tie_word_embeddings=False),
    "tied head with a bias": dict(lm_head_bias=True),
    "no bias for Q, K and V": dict(qkv_bias=False),
}


@pytest.mark.parametrize("choice", OWN_CHOICES)
def test_folder_that_transformers_would_compute_differently_is_refused_by_it(tmp_path, choice):
    """But tinyllm loads it, and those of older versions, which had the model_type of GPT-2."""
    ours = random_gpt2(GPT2Config(**SMALL, **OWN_CHOICES[choice]))
    ours.save_pretrained(tmp_path)
    for auto in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError, match="tinyllm-gpt2"):
            auto.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["tinyllm-GPT2LMHeadModel"]
    ids, _ = batch(ours.config, (2, 8))
    for kind in ("tinyllm-gpt2", "gpt2"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        for load in (GPT2.from_pretrained, load_model):
            assert np.array_equal(load(tmp_path, np.float64)(ids).data, ours(ids).data)


def test_saving_what_transformers_would_compute_differently_warns_once(tmp_path, caplog):
    saving._warn_once.cache_clear()
    random_gpt2(GPT2Config(**SMALL)).save_pretrained(tmp_path / "plain")
    assert not caplog.records
    for folder in "ab":
        random_gpt2(GPT2Config(**SMALL, qkv_bias=False)).save_pretrained(tmp_path / folder)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "tinyllm-gpt2" in record.getMessage()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_equals_transformers(name, tmp_path):
    theirs = their_model(activation_function=name)
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path)
    assert ours.config.activation_function == name
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    "changes", [{}, dict(tie_word_embeddings=False), dict(qkv_bias=False), dict(lm_head_bias=True),
                dict(tie_word_embeddings=False, qkv_bias=False, lm_head_bias=True)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saved_folder_loads(tmp_path, changes, dtype):
    model = random_gpt2(GPT2Config(**SMALL, **changes), dtype=dtype)
    model.save_pretrained(tmp_path)
    for load in (GPT2.from_pretrained, load_model):
        again = load(tmp_path, dtype)
        assert again.config == model.config
        for (name, p), (other_name, q) in zip(model.named_parameters(), again.named_parameters()):
            assert name == other_name and p.dtype == q.dtype
            assert np.array_equal(p.data, q.data), name
        assert (again.lm_head.weight is again.wte.weight) == model.config.tie_word_embeddings


def test_existing_model_is_not_overwritten_by_default(tmp_path):
    model, other = (random_gpt2(GPT2Config(**SMALL), seed) for seed in (0, 1))
    model.save_pretrained(tmp_path)
    with pytest.raises(Error, match="already contains a model"):
        other.save_pretrained(tmp_path)
    assert np.array_equal(GPT2.from_pretrained(tmp_path, np.float64).wte.weight.data, model.wte.weight.data)
    other.save_pretrained(tmp_path, overwrite=True)
    assert np.array_equal(GPT2.from_pretrained(tmp_path, np.float64).wte.weight.data, other.wte.weight.data)


# --------------------------------------------------------------------------------------- configs

# Contents of config.json of models on the hub. The first is gpt2's.
HUB_GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
HUB = {
    "gpt2": HUB_GPT2,
    "gpt2-medium": HUB_GPT2 | {
        "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0, "predict_special_tokens": True},
    "gpt2-large": HUB_GPT2 | {"n_embd": 1280, "n_head": 20, "n_layer": 36},
    "gpt2-xl": HUB_GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True},
    "distilgpt2": HUB_GPT2 | {
        "n_layer": 6, "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
}  # fmt: skip
COUNTS = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_published_configs_can_be_read(name):
    config = GPT2Config.from_dict(HUB[name])
    assert GPT2(config, rng=None).num_parameters() == COUNTS[name]
    assert config.tie_word_embeddings and config.qkv_bias and not config.lm_head_bias


def test_configs_of_transformers_can_be_read(tmp_path):
    theirs = transformers.GPT2Config(
        vocab_size=17, n_positions=9, n_embd=20, n_layer=3, n_head=5, n_inner=11, activation_function="gelu",
        embd_pdrop=0.3, attn_pdrop=0.4, resid_pdrop=0.5, layer_norm_epsilon=1e-3, initializer_range=0.01,
        tie_word_embeddings=False,
    )  # fmt: skip
    expected = GPT2Config(
        vocab_size=17, n_positions=9, n_embd=20, n_layer=3, n_head=5, n_inner=11, activation_function="gelu",
        embd_pdrop=0.3, attn_pdrop=0.4, resid_pdrop=0.5, layer_norm_epsilon=1e-3, initializer_range=0.01,
        tie_word_embeddings=False,
    )  # fmt: skip
    assert GPT2Config.from_dict(theirs.to_dict()) == expected
    theirs.save_pretrained(tmp_path)
    assert GPT2Config.from_dict(json.loads((tmp_path / "config.json").read_text())) == expected
    assert GPT2Config.from_dict(transformers.GPT2Config().to_dict()) == GPT2Config()


def test_saved_config_can_be_read_by_transformers(tmp_path):
    config = GPT2Config(
        **SMALL, n_inner=5, embd_pdrop=0.3, layer_norm_epsilon=1e-3, tie_word_embeddings=False
    )
    GPT2(config, rng=np.random.default_rng(0)).save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.GPT2Config)
    assert theirs.architectures == ["GPT2LMHeadModel"]
    for name, value in SMALL.items() | {("n_inner", 5), ("embd_pdrop", 0.3), ("layer_norm_epsilon", 1e-3)}:
        assert getattr(theirs, name) == value
    assert theirs.tie_word_embeddings is False
    assert GPT2Config.from_dict(config.to_dict()) == config


BAD_CONFIGS = {
    "heads": (dict(n_embd=10, n_head=3), r"n_embd \(10\) .* n_head \(3\)"),
    "no layers": (dict(n_layer=0), "n_layer .* not 0"),
    "half a layer": (dict(n_layer=1.5), "n_layer .* not 1.5"),
    "text": (dict(vocab_size="50257"), "vocab_size .* not '50257'"),
    "negative": (dict(n_positions=-4), "n_positions .* not -4"),
    "n_inner": (dict(n_inner=0), "n_inner .* not 0"),
    "dropout": (dict(attn_pdrop=1.0), "attn_pdrop .* not 1.0"),
    "dropout of the stream": (dict(resid_pdrop=1.0), "resid_pdrop .* not 1.0"),
    "dropout of embeddings": (dict(embd_pdrop=1.0), "embd_pdrop .* not 1.0"),
    "negative dropout": (dict(attn_pdrop=-0.1), "attn_pdrop .* not -0.1"),
    "activation": (dict(activation_function="mish"), "activation_function 'mish' .* gelu_new"),
    "eps": (dict(layer_norm_epsilon=0.0), "layer_norm_epsilon .* not 0.0"),
    "unknown": (dict(n_heads=4, rotary=True), "n_heads, rotary"),
    "scaling": (
        dict(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx=False, .* True",
    ),
    "unscaled": (dict(scale_attn_weights=False), "scale_attn_weights=True, .* False"),
    "cross": (dict(add_cross_attention=True), "add_cross_attention=False"),
    "another model": (dict(model_type="llama"), "model_type='gpt2', .* 'llama'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_invalid_config_is_refused(changes, message):
    with pytest.raises(Error, match=message):
        GPT2Config.from_dict(SMALL | changes)


@pytest.mark.parametrize("kind", ["bert", ["gpt2"], None])
def test_load_model_refuses_unsupported_model_types(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(Error, match=rf"model_type {re.escape(repr(kind))} is not supported.*gpt2"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------ bad inputs

BAD_IDS = {
    "too large": (np.array([[1, 13]]), "13, but token ids run from 0 to 12"),
    "negative": (np.array([[1, -1]]), "-1, but token ids run from 0 to 12"),
    "too long": (np.zeros((1, 9), int), r"at most 8 positions, not \(1, 9\)"),
    "one axis": (np.array([1, 2]), r"shape \(batch, time\).*not \(2,\)"),
    "three axes": (np.ones((1, 2, 3), int), r"shape \(batch, time\).*not \(1, 2, 3\)"),
    "floats": (np.array([[1.0, 2.0]]), "1.0.*not an integer"),
    "booleans": (np.array([[True, False]]), "True.*not an integer"),
    "empty": (np.zeros((1, 0), int), "empty"),
    "no rows": (np.zeros((0, 4), int), "empty"),
}


@pytest.mark.parametrize(("ids", "message"), BAD_IDS.values(), ids=BAD_IDS)
def test_invalid_token_ids_are_refused(ids, message):
    with pytest.raises(Error, match=message):
        GPT2(GPT2Config(**SMALL), rng=np.random.default_rng(0))(ids)


BAD_TARGETS = {
    "another shape": (np.zeros((1, 3), int), r"targets of shape \(1, 3\).*they need shape \(1, 4\)"),
    "flat": (np.zeros(4, int), r"targets of shape \(4,\).*they need shape \(1, 4\)"),
    "too large": (np.array([[1, 2, 13, 0]]), "targets.*13, but token ids run from 0 to 12"),
    "negative, and not -100": (np.array([[1, 2, -1, 0]]), "targets.*-1, but token ids run from 0 to 12"),
    "floats": (np.ones((1, 4)), "targets.*not an integer"),
    "nothing counts": (np.full((1, 4), -100), "-100"),
}


@pytest.mark.parametrize(("targets", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_invalid_targets_are_refused(targets, message):
    model = GPT2(GPT2Config(**SMALL), rng=np.random.default_rng(0))
    with pytest.raises(Error, match=message):
        model.loss(np.array([[1, 2, 3, 4]]), targets)


@pytest.mark.parametrize("num_targets", [0, -3, math.nan])
def test_invalid_num_targets_is_refused(num_targets):
    model = GPT2(GPT2Config(**SMALL), rng=np.random.default_rng(0))
    with pytest.raises(Error, match=f"num_targets must be positive, not {num_targets}"):
        model.loss(np.array([[1, 2]]), np.array([[2, 3]]), num_targets=num_targets)


def test_ids_may_be_lists_or_arrays_of_any_integer_dtype():
    model = random_gpt2(GPT2Config(**SMALL))
    ids = [[1, 5, 12], [0, 0, 3]]
    expected, loss = model(np.array(ids)).data, model.loss(np.array(ids), np.array(ids)).item()
    assert np.array_equal(model(ids).data, expected)
    for dtype in (np.uint8, np.uint16, np.int32, np.uint64):
        array = np.array(ids, dtype)
        assert np.array_equal(model(array).data, expected)
        assert model.loss(array, array).item() == loss


def test_every_invalid_tensor_in_a_folder_is_listed(tmp_path):
    their_model().save_pretrained(tmp_path)

    def change(tensors):
        del tensors["transformer.h.0.ln_1.weight"], tensors["transformer.wpe.weight"]
        tensors["transformer.h.1.attn.c_proj.bias"] = torch.zeros(5)
        tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].T
        return tensors | {"transformer.h.7.extra": torch.zeros(1), "mystery": torch.zeros(1)}

    rewrite(tmp_path, change)
    with pytest.raises(Error) as caught:
        GPT2.from_pretrained(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    for part in ("Missing (2)", "h.0.ln_1.weight", "wpe.weight", "Unexpected (2)", "h.7.extra", "mystery",
                 "Wrong shape (2)", "h.1.attn.c_proj.bias is (5,), not (12,)",
                 "h.1.mlp.c_fc.weight is (48, 12), not (12, 48)"):  # fmt: skip
        assert part in message


def test_tied_head_that_differs_from_the_embedding_is_refused(tmp_path):
    their_model().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(Error, match=r"lm_head.weight differs.*tie_word_embeddings"):
        GPT2.from_pretrained(tmp_path)


def test_missing_untied_head_is_refused(tmp_path):
    their_model(tie_word_embeddings=False).save_pretrained(tmp_path)

    def without_head(tensors):
        return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}

    rewrite(tmp_path, without_head)
    with pytest.raises(Error, match=r"Missing \(1\): lm_head.weight"):
        GPT2.from_pretrained(tmp_path)


def test_parameter_stored_twice_is_refused(tmp_path):
    """Stored with and without ``transformer.``: choosing one silently would be a guess."""
    their_model().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"wpe.weight": tensors["transformer.wpe.weight"] + 1})
    with pytest.raises(Error, match=r"transformer\.wpe\.weight"):
        GPT2.from_pretrained(tmp_path)


def test_every_matrix_of_a_block_is_stored_transposed():
    model = GPT2(GPT2Config(**SMALL), rng=None)
    conv = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert conv == {f"h.{i}.{part}" for i in range(2) for part in parts}
    theirs = their_model()
    shapes = {name.removeprefix("transformer."): tuple(p.shape) for name, p in theirs.named_parameters()}
    assert {name: array.shape for name, array in model.state_dict().items()} == shapes

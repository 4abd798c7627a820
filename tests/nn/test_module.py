"""Modules: names, strict loading, initial values of layers, and ``observe``."""

import copy
import math
import pickle
import re
import threading
import tracemalloc
from collections import OrderedDict, deque
from dataclasses import dataclass
from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest
import torch

from tinyllm import GPT2, Error, GPT2Config, Tensor, manual_seed, nn, no_grad
from tinyllm.optim import AdamW


class Tied(nn.Module):
    """Every way an attribute can hold parameters: directly, in a module, in a list, and shared."""

    def __init__(self, rng):
        self.scale = Tensor(np.ones(3, np.float32), requires_grad=True)
        self.first = nn.Linear(4, 3, rng=rng)
        self.plain = [1, 2]
        self.layers = [nn.Linear(3, 3, bias=False, rng=rng), nn.LayerNorm(3), nn.Dropout(0.5)]
        self.last = nn.Linear(4, 3, rng=rng)
        self.last.weight = self.first.weight

    def forward(self, x):
        x = self.first(x) * self.scale
        for layer in self.layers:
            x = layer(x)
        return x @ self.last.weight + self.last.bias.sum()


def tied(seed=0):
    return Tied(np.random.default_rng(seed))


NAMES = [
    "scale", "first.weight", "first.bias", "layers.0.weight", "layers.1.weight", "layers.1.bias", "last.bias",
]  # fmt: skip


def small_gpt2(seed=0, **changes):
    sizes = dict(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2)
    return GPT2(GPT2Config(**sizes | changes), rng=np.random.default_rng(seed)).astype(np.float64)


IDS = np.array([[1, 5, 2, 10], [0, 3, 3, 7]])
TARGETS = np.array([[5, 2, 10, 4], [3, 3, 7, -100]])


# ------------------------------------------------------------------------------------- names


def test_names_are_paths_and_tied_parameters_are_listed_once():
    model = tied()
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert model.last.weight is model.first.weight
    assert len(list(model.parameters())) == len(NAMES)
    assert model.num_parameters() == 3 + 12 + 3 + 9 + 3 + 3 + 3


def test_named_modules_are_in_order_of_definition():
    names = [name for name, _ in tied().named_modules()]
    assert names == ["", "first", "layers.0", "layers.1", "layers.2", "last"]
    model = small_gpt2()
    modules = dict(model.named_modules())
    assert modules["h.1.attn.c_attn"] is model.h[1].attn.c_attn
    assert [name for name, _ in model.children()] == ["wte", "wpe", "drop", "h.0", "h.1", "ln_f", "lm_head"]


def test_parameters_are_initially_float32_leaves():
    for name, parameter in tied().named_parameters():
        assert parameter.requires_grad and parameter.dtype == np.float32 and parameter.grad is None, name


def test_train_and_eval_reach_every_module():
    model = tied()
    assert all(module.training for _, module in model.named_modules())
    assert model.eval() is model
    assert not any(module.training for _, module in model.named_modules())
    assert model.train() is model
    assert all(module.training for _, module in model.named_modules())
    model.train(False)
    assert not model.layers[2].training


def test_astype_converts_every_parameter_and_drops_gradients():
    model = tied()
    weight = model.first.weight.data.copy()
    model(Tensor(np.ones((2, 4), np.float32))).sum().backward()
    assert model.first.weight.grad is not None
    assert model.astype(np.float64) is model
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.last.weight is model.first.weight
    assert np.array_equal(model.first.weight.data, weight.astype(np.float64))


def test_zero_grad_drops_gradients_and_to_checks_the_device():
    model = tied()
    model(Tensor(np.ones((2, 4), np.float32))).sum().backward()
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert model.to("cpu") is model
    with pytest.raises(Error, match="unknown device 'tpu'"):
        model.to("tpu")


def test_module_without_forward_raises():
    with pytest.raises(TypeError, match=r"Module defines no forward\(\)"):
        nn.Module()(1)


# -------------------------------------------------------------------------------- state dicts


def test_state_dict_round_trip_copies_arrays():
    source, target = tied(0), tied(1)
    arrays = {name: array.copy() for name, array in source.state_dict().items()}
    assert list(arrays) == NAMES
    target.load_state_dict(arrays)
    for name, array in target.state_dict().items():
        assert np.array_equal(array, arrays[name]), name
        assert not np.shares_memory(array, arrays[name]), name  # copied
    assert target.last.weight is target.first.weight


def test_loading_preserves_parameter_dtypes():
    model = tied().astype(np.float64)
    model.load_state_dict({name: array.astype(np.float16) for name, array in tied(1).state_dict().items()})
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float64)}


def test_loaded_parameters_are_contiguous():
    model = small_gpt2()
    model.load_state_dict(
        {name: np.asfortranarray(array) for name, array in small_gpt2(1).state_dict().items()}
    )
    assert all(p.data.flags.c_contiguous and p.data.flags.writeable for p in model.parameters())


def test_conv1d_weight_is_stored_transposed():
    model = small_gpt2()
    stored = model.state_dict()
    assert stored["h.0.attn.c_attn.weight"].shape == (8, 24)
    assert np.array_equal(stored["h.0.attn.c_attn.weight"], model.h[0].attn.c_attn.weight.data.T)
    assert stored["wte.weight"].shape == (11, 8)


def test_failed_load_lists_every_problem_and_changes_nothing():
    model = tied()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    arrays = {name: array + 1 for name, array in before.items()}
    del arrays["scale"], arrays["layers.1.bias"]
    arrays["first.bias"] = np.zeros((3, 1), np.float32)
    arrays["layers.0.weight"] = np.zeros((3, 4), np.float32)
    arrays["mystery"] = arrays["other.mystery"] = np.zeros(1, np.float32)
    with pytest.raises(Error) as caught:
        model.load_state_dict(arrays, source="a file")
    message = str(caught.value)
    assert message.startswith("a file does not fit the model")
    assert "Missing (2): scale, layers.1.bias" in message
    assert "Unexpected (2): mystery, other.mystery" in message
    assert "Wrong shape (2): first.bias is (3, 1), not (3,), layers.0.weight is (3, 4), not (3, 3)" in message
    for name, array in model.state_dict().items():
        assert np.array_equal(array, before[name]), name


def test_layers_without_rng_take_no_memory_until_loaded():
    tracemalloc.start()
    try:
        linear = nn.Linear(30_000, 30_000, bias=False, rng=None)
        embedding = nn.Embedding(100_000, 10_000, rng=None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert linear.num_parameters() == 900_000_000 and embedding.num_parameters() == 1_000_000_000
    assert linear.weight.dtype == np.float32 and linear.weight.requires_grad
    assert not linear.weight.data.flags.writeable

    filled = nn.Linear(2, 3, rng=None)
    filled.load_state_dict({"weight": np.ones((3, 2)), "bias": np.zeros(3)})
    assert filled.weight.data.flags.writeable
    assert np.array_equal(filled(Tensor(np.ones((1, 2), np.float32))).data, [[2, 2, 2]])


def test_layers_without_weights_cannot_be_called():
    x = Tensor(np.ones((1, 2), np.float32))
    layers = {"Linear": nn.Linear(2, 3, rng=None), "Embedding": nn.Embedding(2, 3, rng=None)}
    for layer, input in ((layers["Linear"], x), (layers["Embedding"], np.array([1]))):
        with pytest.raises(Error, match=r"no weights yet \(rng=None\): load them .*rng=0"):
            layer(input)
        nn.initialize_as_torch(layer, rng=0)
        assert layer(input).data.any() and layer.weight.requires_grad


def test_an_array_as_weight_is_refused():
    layer = nn.Linear(2, 3, rng=0)
    before = layer.weight
    for value in (np.ones((3, 2), np.float32), [[1.0]], 1.0):
        with pytest.raises(Error, match=rf"Linear.weight .*{type(value).__name__}.*weight.replace\(array\)"):
            layer.weight = value
    assert layer.weight is before
    layer.weight, layer.bias = Tensor(np.ones((3, 2), np.float32), requires_grad=True), None
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_a_dtype_is_not_a_device():
    with pytest.raises(Error, match=r"float64.*astype\(\)"):
        nn.Linear(2, 3, rng=0).to(np.float64)


def test_a_layer_of_another_width_is_named_with_both_shapes():
    model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=11), rng=0)
    nn.replace(model, "h.0.mlp.c_proj", lambda name, layer: nn.Linear(64, 12, rng=0))
    with pytest.raises(Error, match=r"add of shapes \(1, 2, 16\), \(1, 2, 12\)"):
        model([[1, 2]])


def test_meta_parameters_are_converted_without_memory():
    layer = nn.Linear(30_000, 30_000, bias=False, rng=None)
    tracemalloc.start()
    try:
        layer.astype(np.float64).to("cpu")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000 and nn.is_meta(layer.weight.data) and layer.weight.dtype == np.float64


@pytest.mark.parametrize(
    "make", [lambda rng: nn.Linear(3, 4, rng=rng), lambda rng: nn.Embedding(3, 4, rng=rng)]
)
def test_layers_accept_an_integer_seed(make):
    for seed in (0, np.int64(3)):
        expected = make(np.random.default_rng(int(seed)))
        assert np.array_equal(make(seed).weight.data, expected.weight.data)
        again, expected = make(0), make(0)
        again.reset_parameters(seed)
        expected.reset_parameters(np.random.default_rng(int(seed)))
        assert np.array_equal(again.weight.data, expected.weight.data)
    with pytest.raises(Error, match="rng is 'x'"):
        make("x")


@pytest.mark.parametrize("dtype", ["float33", np.int64, object, torch.float32], ids=str)
def test_astype_refuses_dtypes_without_gradients(dtype):
    layer = nn.Linear(2, 2, rng=0)
    with pytest.raises(Error, match="choose float32, float64"):
        layer.astype(dtype)
    assert layer.weight.dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ("model.safetensors", "not a str"),
        ([np.ones(2)], "not a list"),
        (None, "not a NoneType"),
        ({"weight": Tensor(np.ones((2, 2))), "bias": Tensor(np.ones(2))}, "weight is a Tensor"),
        (torch.nn.Linear(2, 2).state_dict(), "weight is a Tensor"),
        ({"weight": np.ones((2, 2)), "bias": np.ones(2) * 1j}, "bias is an array of complex128"),
        ({"weight": np.full((2, 2), None), "bias": np.ones(2)}, "weight is an array of object"),
        ({"weight": np.ones((2, 2)), "bias": np.array(["1", "2"])}, "bias is an array of <U1"),
    ],
    ids=["a path", "a list", "nothing", "Tensors", "PyTorch's", "complex", "objects", "texts"],
)
def test_load_state_dict_refuses_anything_but_arrays_by_name(arrays, message):
    layer = nn.Linear(2, 2, rng=0)
    before = layer.weight.data.copy()
    with pytest.raises(Error, match=message):
        layer.load_state_dict(arrays)
    assert np.array_equal(layer.weight.data, before)


# ------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3.0, 4, rng=0), r"shape \(4, 3.0\): give whole numbers"),
        (lambda: nn.Linear(3.0, 4, rng=None), r"shape \(4, 3.0\)"),
        (lambda: nn.Linear(3, None, rng=0), r"shape \(None, 3\)"),
        (lambda: nn.Linear(True, 4, rng=0), r"shape \(4, True\)"),
        (lambda: nn.Embedding(10.0, 4, rng=0), r"shape \(10.0, 4\)"),
        (lambda: nn.Embedding(-1, 4, rng=0), r"shape \(-1, 4\)"),
        (lambda: nn.LayerNorm("8"), "shape '8'"),
        (lambda: nn.LayerNorm((4, 2.5)), r"shape \(4, 2.5\)"),
        (lambda: nn.RMSNorm(None), "shape None"),
        (lambda: nn.Linear(3, 4, rng=0, std="a"), "std is 'a': choose a finite number"),
        (lambda: nn.Embedding(3, 4, rng=0, std=np.nan), "std is nan"),
        (lambda: nn.LayerNorm(8, eps=-1), "eps is -1"),
        (lambda: nn.LayerNorm(8, eps=None), "eps is None"),
        (lambda: nn.RMSNorm(8, eps="a"), "eps is 'a'"),
    ],
)
def test_sizes_and_numbers_of_a_layer_are_checked(make, message):
    with pytest.raises(Error, match=message):
        make()


def test_sizes_of_a_layer_may_be_numpys_integers_lists_and_0():
    assert nn.Linear(np.int64(3), np.uint8(4), rng=0, std=np.float32(0.5)).weight.shape == (4, 3)
    assert nn.LayerNorm([2, 3], eps=0).weight.shape == nn.RMSNorm((2, 3)).weight.shape == (2, 3)
    assert nn.Embedding(0, 4, rng=0).weight.shape == (0, 4)


def test_linear_and_embedding_weights_have_the_given_std():
    rng = np.random.default_rng(0)
    for module in (nn.Linear(400, 500, rng=rng, std=0.05), nn.Embedding(500, 400, rng=rng, std=0.05)):
        weight = module.weight.data.astype(np.float64)
        n = weight.size
        assert abs(weight.std() - 0.05) < 0.05 * 5 / math.sqrt(2 * n)  # five standard errors
        assert abs(weight.mean()) < 0.05 * 5 / math.sqrt(n)
    assert not nn.Linear(2, 3, rng=rng).bias.data.any()


def test_parameters_are_sampled_anew_as_torch_does():
    linear, embedding = nn.Linear(100, 400, rng=0), nn.Embedding(500, 400, rng=0)
    nn.initialize_as_torch(linear, rng=1)
    nn.initialize_as_torch(embedding, rng=1)
    for ours, theirs in ((linear, torch.nn.Linear(100, 400)), (embedding, torch.nn.Embedding(500, 400))):
        for name, parameter in theirs.named_parameters():
            a, b = getattr(ours, name).data, parameter.detach().numpy()
            assert [a.std(), abs(a).max()] == pytest.approx([b.std(), abs(b).max()], rel=0.2)


def test_layer_norm_initially_has_no_scale_or_shift():
    norm = nn.LayerNorm(4, eps=0.0)
    assert np.array_equal(norm.weight.data, np.ones(4)) and np.array_equal(norm.bias.data, np.zeros(4))
    assert nn.LayerNorm(4, bias=False).bias is None
    x = np.array([[1.0, 2.0, 3.0, 6.0]], np.float32)
    expected = (x - 3) / math.sqrt(3.5)
    assert np.allclose(norm(Tensor(x)).data, expected, rtol=1e-6)


def test_rms_norm_initially_has_no_scale():
    norm = nn.RMSNorm(4, eps=0.0)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    assert np.array_equal(norm.weight.data, np.ones(4)) and norm.weight.dtype == np.float32
    x = np.array([[1.0, -1.0, 5.0, 3.0]], np.float32)
    assert np.allclose(norm(Tensor(x)).data, x / 3, rtol=1e-6)
    tiny = Tensor(np.full((1, 4), 1e-4, np.float32))  # the default eps is the machine epsilon of float32
    expected = 1e-4 / math.sqrt(1e-8 + np.finfo(np.float32).eps)
    assert np.allclose(nn.RMSNorm(4)(tiny).data, expected, rtol=1e-6)


def test_dropout_applies_in_training_mode_only():
    layer, x = nn.Dropout(0.25), Tensor(np.ones((100, 200)), requires_grad=True)
    manual_seed(3)
    y = layer(x)
    kept = y.data != 0
    assert np.array_equal(y.data[kept], np.full(kept.sum(), 1 / 0.75))
    assert abs(kept.mean() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / kept.size)
    y.backward(np.ones((100, 200)))
    assert np.array_equal(x.grad, y.data)  # the same mask in the backward pass
    assert layer.eval()(x) is x
    assert nn.Dropout(0.0)(x) is x


def test_dropout_masks_are_a_function_of_their_address():
    x = Tensor(np.ones((50, 50)))
    layer = nn.Dropout(0.5)

    def masks(*address):
        manual_seed(*address)
        return layer(x).data, layer(x).data

    first, second = masks(1, 2, 3)
    again = masks(1, 2, 3)
    assert np.array_equal(first, again[0]) and np.array_equal(second, again[1])
    others = [second, *(masks(*address)[0] for address in ((2, 2, 3), (1, 3, 3), (1, 2, 4)))]
    for i, mask in enumerate(others):
        assert not np.array_equal(first, mask)
        assert not any(np.array_equal(mask, other) for other in others[:i])


def test_dropout_with_probability_1_gives_zeros():
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    y = nn.Dropout(1.0)(x)
    y.sum().backward()
    assert not y.data.any() and not x.grad.any()
    assert nn.Dropout(1.0).eval()(x) is x


@pytest.mark.parametrize("layer", ["LayerNorm", "RMSNorm"])
def test_norms_over_several_axes_equal_torch(layer):
    x = np.random.default_rng(0).standard_normal((4, 2, 3))
    ours = getattr(nn, layer)((2, 3), eps=1e-5).astype(np.float64)
    theirs = getattr(torch.nn, layer)((2, 3), eps=1e-5).double()(torch.tensor(x))
    np.testing.assert_allclose(ours(Tensor(x)).data, theirs.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan, "a"])
def test_dropout_refuses_invalid_probabilities(p):
    with pytest.raises(Error, match=f"between 0 and 1, not {p!r}"):
        nn.Dropout(p)


# ------------------------------------------------------------------------------------ observe


def run_observed(model, action):
    seen = []
    with nn.observe(seen.append):
        result = action(model)
    return result, seen


FORWARD_ORDER = [
    "wte", "wpe", "drop",
    *[f"h.{i}{part}" for i in (0, 1) for part in (
        ".ln_1", ".attn.c_attn", ".attn.c_proj", ".attn.resid_dropout", ".attn",
        ".ln_2", ".mlp.c_fc", ".mlp.c_proj", ".mlp.dropout", ".mlp", "")],
    "ln_f", "lm_head", "",
]  # fmt: skip


def test_observe_reports_every_module_forward_and_backward():
    model = small_gpt2()
    logits, seen = run_observed(model, lambda model: model(IDS))
    assert [o.name for o in seen] == FORWARD_ORDER
    modules = dict(model.named_modules())
    assert all(o.module is modules[o.name] for o in seen)
    assert all(o.grad is None for o in seen)
    assert np.array_equal(seen[-1].output.data, logits.data)
    assert seen[0].inputs[0].shape == IDS.shape
    by_name = {o.name: o for o in seen}
    assert by_name["h.1"].inputs[0].data is by_name["h.0"].output.data
    assert by_name["h.0.ln_1"].inputs[0].data is by_name["drop"].output.data

    seen.clear()
    upstream = np.random.default_rng(0).standard_normal(logits.shape)
    logits.backward(upstream)  # after the block: observed modules still report
    assert [o.name for o in seen] == FORWARD_ORDER[::-1]
    assert all(o.grad.shape == by_name[o.name].output.shape for o in seen)
    assert np.array_equal(seen[0].grad, upstream)


def test_observed_gradients_are_gradients_of_the_outputs():
    """A zero leaf added to an output has the gradient of that output."""
    model = small_gpt2().eval()
    _, seen = run_observed(model, lambda model: model.loss(IDS, TARGETS).backward())
    backward = {o.name: o for o in seen if o.grad is not None}
    assert set(backward) == {"", *FORWARD_ORDER} - {"lm_head"}  # the loss includes the head
    for name, module in model.named_modules():
        if name in ("", "lm_head"):
            continue
        zero = Tensor(np.zeros(backward[name].grad.shape), requires_grad=True)
        plain = module.forward
        module.forward = lambda *args, plain=plain, zero=zero: plain(*args) + zero
        model.loss(IDS, TARGETS).backward()
        del module.forward
        assert np.abs(zero.grad).max() > 0
        assert np.allclose(zero.grad, backward[name].grad, rtol=1e-12, atol=1e-15), name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_observe_does_not_change_results(dropout):
    def step(model):
        manual_seed(7)
        loss = model.loss(IDS, TARGETS)
        loss.backward()
        return loss.data

    plain = small_gpt2(embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    watched = small_gpt2(embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    expected = step(plain)
    loss, seen = run_observed(watched, step)
    assert len(seen) > 40
    assert np.array_equal(loss, expected)
    for (name, p), (_, q) in zip(plain.named_parameters(), watched.named_parameters()):
        assert np.array_equal(p.grad, q.grad), name


def test_observe_under_no_grad_reports_the_forward_pass_only():
    with no_grad():
        logits, seen = run_observed(small_gpt2(), lambda model: model(IDS))
    assert [o.name for o in seen] == FORWARD_ORDER and not logits.requires_grad


def test_observe_names_are_relative_to_the_called_module():
    model = small_gpt2()
    x = Tensor(np.zeros((1, 2, 8)))
    _, seen = run_observed(model, lambda model: model.h[0].mlp(x))
    assert [o.name for o in seen] == ["c_fc", "c_proj", "dropout", ""]


def test_observe_names_are_relative_to_the_given_model():
    """A method other than the model's forward calls its parts one by one."""
    model, seen = small_gpt2(), []
    with nn.observe(seen.append, model):
        hidden = model.hidden_states(IDS)
        model.h[1].ln_1(hidden)
    assert [o.name for o in seen] == [*FORWARD_ORDER[:-2], "h.1.ln_1"]
    seen.clear()
    with nn.observe(seen.append):
        model(IDS)
    assert [o.name for o in seen] == FORWARD_ORDER


class Twice(nn.Module):
    def forward(self, x):
        return x, x


def test_observed_modules_have_names_relative_to_the_call_and_the_innermost_block():
    model, linear, x, seen = small_gpt2(), nn.Linear(8, 2, rng=0).astype(float), Tensor(np.ones((1, 8))), []
    with nn.observe(seen.append):
        for module in (linear, model.ln_f, Twice()):
            module(x)
    with nn.observe(seen.append, model):
        with nn.observe(seen.append):
            model.ln_f(x)
        model.ln_f(x)
        linear(x)
    assert [o.name for o in seen] == ["", "", "", "", "ln_f", "Linear"]
    assert seen[2].output == (x, x)


def test_observe_ends_with_its_block():
    model, seen = small_gpt2(), []
    with nn.observe(seen.append):
        model(IDS)
    count = len(seen)
    model(IDS)
    assert len(seen) == count


def test_observe_reports_the_arguments_of_every_op():
    model, calls, inner = small_gpt2(), [], []
    with nn.observe(lambda seen: None, on_op=lambda *call: calls.append(call)):
        with nn.observe(lambda seen: None):  # without on_op: not reported
            model(IDS)
        with nn.observe(lambda seen: None, on_op=lambda *call: inner.append(call)):
            model(IDS)
        assert calls == []
        logits = model(IDS)
    model(IDS)
    assert [name for name, _, _ in calls] == [name for name, _, _ in inner]
    names = [name for name, _, _ in calls]
    assert names.count("scaled_dot_product_attention") == 2 and names[-2:] == ["layer_norm", "linear"]
    _, arguments, out = calls[-1]
    assert arguments["weight"] is model.lm_head.weight and np.array_equal(out.data, logits.data)
    attention = next(given for name, given, _ in calls if name == "scaled_dot_product_attention")
    assert attention["is_causal"] is True and attention["query"].shape[2] == IDS.shape[1]


def test_observe_is_restored_after_exceptions():
    model, outer, inner = small_gpt2(), [], []
    with nn.observe(outer.append):
        with pytest.raises(Error), nn.observe(inner.append):
            model(IDS + 100)  # not in the vocabulary
        assert [o.name for o in inner] == []
        model(IDS)
        assert [o.name for o in outer] == FORWARD_ORDER  # names are reset after the failure
    model(IDS)
    assert len(outer) == len(FORWARD_ORDER)


def test_exceptions_in_the_callback_propagate():
    def callback(observation):
        if observation.name == "h.0.mlp.c_fc":
            raise RuntimeError("seen enough")

    model = small_gpt2()
    with pytest.raises(RuntimeError, match="seen enough"), nn.observe(callback):
        model(IDS)
    _, seen = run_observed(model, lambda model: model(IDS))
    assert [o.name for o in seen] == FORWARD_ORDER


def test_observe_is_per_thread():
    model, seen = small_gpt2(), []
    with nn.observe(seen.append):
        thread = threading.Thread(target=lambda: model(IDS))
        thread.start()
        thread.join()
    assert seen == []


@dataclass
class Held:
    layer: object


class Plain:
    """Its author forgot to derive it from nn.Module."""

    def __init__(self, value):
        self.value = value


class Scale(Tensor):
    """A subclass of Tensor is a parameter like any other."""

    __slots__ = ()


def parameter():
    return Tensor(np.ones(2, np.float32), requires_grad=True)


SEARCHED = {
    "a list of Tensors": (lambda: [parameter(), parameter()], ["parts.0", "parts.1"]),
    "a dict of Tensors": (lambda: {"a": parameter()}, ["parts.a"]),
    "a list of lists": (lambda: [[nn.RMSNorm(2)], [parameter()]], ["parts.1.0", "parts.0.0.weight"]),
    "a dict of dicts": (lambda: {"a": {"b": parameter()}}, ["parts.a.b"]),
    "a dict in a list": (lambda: [{"w": nn.RMSNorm(2)}], ["parts.0.w.weight"]),
    "an ordered dict": (lambda: OrderedDict(x=parameter()), ["parts.x"]),
    "a subclass of Tensor": (lambda: Scale(np.ones(2, np.float32), requires_grad=True), ["parts"]),
}  # fmt: skip


@pytest.mark.parametrize("held", SEARCHED)
def test_parameters_in_lists_and_dicts_are_found_at_any_depth(held):
    make, names = SEARCHED[held]
    module = nn.Module()
    module.parts = make()
    assert [name for name, _ in module.named_parameters()] == names == list(module.state_dict())
    for tensor in module.parameters():
        tensor.grad = np.ones(2, np.float32)
    AdamW(module, lr=0.1).step()
    assert all((tensor.data < 1).all() for tensor in module.parameters())
    other = nn.Module()
    other.parts = make()
    other.load_state_dict(module.state_dict())
    assert all((tensor.data < 1).all() for tensor in other.parameters())


def test_layers_in_nested_lists_are_trained_frozen_and_replaced():
    module = nn.Module()
    module.parts = [[nn.Dropout(0.5)], {"a": [nn.Linear(2, 2, rng=0)]}]
    assert nn.replace(module, "parts.1.a.0", lambda name, layer: nn.LayerNorm(2)) == ["parts.1.a.0"]
    assert isinstance(module.parts[1]["a"][0], nn.LayerNorm)
    assert not module.eval().parts[0][0].training
    assert not any(p.requires_grad for p in module.requires_grad_(False).parameters())


UNSEARCHED = {
    "a tuple": lambda layer: (layer,),
    "a tuple in a list": lambda layer: [1, (layer,)],
    "a list in a tuple": lambda layer: ([layer],),
    "a set": lambda layer: {layer},
    "a frozen set in a dict": lambda layer: {"a": frozenset([layer.weight])},
    "a deque": lambda layer: deque([layer]),
    "a read-only dict": lambda layer: MappingProxyType({"a": layer}),
    "a dataclass": Held,
    "an object that is not a Module": Plain,
    "an object with a parameter": lambda layer: Plain(layer.weight),
    "an object in a list": lambda layer: [Plain(layer)],
    "a key that is not a str": lambda layer: {0: layer},
    "a key with a dot": lambda layer: {"a.b": layer},
    "a computed tensor": lambda layer: layer.weight * 2,
}


@pytest.mark.parametrize("held", UNSEARCHED)
def test_parameters_that_would_not_be_trained_are_refused_by_name(held):
    module = nn.Module()
    module.parts = UNSEARCHED[held](nn.Linear(2, 2, rng=0))
    for use in (module.num_parameters, module.state_dict, lambda: AdamW(module)):
        with pytest.raises(Error, match="parts"):
            use()


def test_parameters_shared_by_a_class_are_refused_by_name():
    with pytest.raises(Error, match=r"Wrong\.scale"):
        type("Wrong", (nn.Module,), {"scale": parameter()})
    with pytest.raises(Error, match=r"Wrong\.__slots__"):
        type("Wrong", (nn.Module,), {"__slots__": ("scale",)})


def test_attributes_without_parameters_may_be_anything():
    module = nn.Module()
    module.config, module.pair, module.rng = Held(3), (1, {"a": {2}}), np.random.default_rng(0)
    module.kind, module.sizes, module.f = nn.Linear, {3: 4, "a.b": 5}, lambda: 1
    module.holder = Held(Tensor(np.ones(2)))  # without a gradient: a constant
    assert module.num_parameters() == 0 and list(module.modules()) == [module]


def test_copied_model_keeps_ties_and_frozen_parts_and_shares_no_memory():
    model = tied()
    model.first.bias.requires_grad = False
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.last.weight is again.first.weight is not model.first.weight
        for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert name == other and p.requires_grad == q.requires_grad
            assert np.array_equal(p.data, q.data) and not np.shares_memory(p.data, q.data)


def test_zero_grad_can_keep_gradients_as_zeros():
    model = tied()
    for drop in (model.zero_grad, AdamW(model).zero_grad):
        model(Tensor(np.ones((2, 4), np.float32))).sum().backward()
        drop(set_to_none=False)
        grads = [p.grad for p in model.parameters()]
        assert all(grad is not None and not grad.any() for grad in grads)
        for set_to_none in (True, False):  # no gradient stays none
            drop(set_to_none=set_to_none)
            assert all(p.grad is None for p in model.parameters())


def test_repr_is_a_tree_of_layers_with_their_sizes():
    lines = repr(small_gpt2()).splitlines()
    assert lines[0] == "GPT2 (1,896 parameters)"
    assert "  wte: Embedding weight[11, 8]" in lines and "  drop: Dropout p=0.1" in lines
    assert "  h.0 … h.1: Block" in lines and "      c_attn: Conv1D weight[24, 8] bias[24]" in lines
    assert len(lines) == 17
    model = small_gpt2()
    model.h[1].mlp = nn.Dropout(0.5)
    assert {"  h.0: Block", "  h.1: Block"} < set(repr(model).splitlines())


def test_integer_tables_keep_their_dtype_and_have_no_gradient():
    module = nn.Linear(2, 2, rng=np.random.default_rng(0))
    module.table = Tensor(np.arange(3))
    module.astype(np.float64).requires_grad_(False).requires_grad_(True)
    assert module.table.dtype.kind == "i" and not module.table.requires_grad
    assert module.weight.dtype == np.float64 and module.weight.requires_grad


def test_blocks_of_evaluating_in_several_threads_keep_eval_mode_until_the_last_ends():
    model, inside, go_on = nn.Linear(2, 2, rng=0), threading.Event(), threading.Event()

    def other():
        with nn.evaluating(model):
            inside.set()
            go_on.wait(10)

    thread = threading.Thread(target=other)
    with nn.evaluating(model):
        thread.start()
        assert inside.wait(10)
    assert not model.training  # the other thread is still within its block
    with nn.evaluating(model):
        go_on.set()
        thread.join()
        assert not model.training
    assert model.training
    model.eval()
    with nn.evaluating(model):
        pass
    assert not model.training


@pytest.mark.parametrize(
    "given, wanted, value",
    [
        (np.float32, np.float16, -65520.0),  # the least that is rounded to infinity
        (ml_dtypes.bfloat16, np.float16, 1e5),
        (np.float64, np.float32, 1e39),
        (np.float32, ml_dtypes.bfloat16, 3.4e38),
    ],
)
def test_a_weight_too_large_for_a_dtype_is_refused_by_name(given, wanted, value):
    for other in (np.inf, np.nan):  # these are kept
        model = tied().astype(given)
        model.first.bias.data[:2] = 1, other
        assert np.array_equal(model.astype(wanted).first.bias.data[:2], [1, other], equal_nan=True)
    model = tied().astype(given)
    model.first.bias.data[1] = value
    shown = f"{float(abs(model.first.bias.data[1])):.3g}"
    message = re.escape(f"first.bias has a weight of {shown}, too large for {np.dtype(wanted)}")
    with pytest.raises(Error, match=message):
        model.astype(wanted)
    assert {p.dtype for p in model.parameters()} == {np.dtype(given)}
    with pytest.raises(Error, match=message):
        tied().astype(wanted).load_state_dict(model.state_dict())

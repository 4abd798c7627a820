"""Muon against torch, its orthogonalisation against the SVD, groups, state, memory."""

import tracemalloc

import numpy as np
import pytest
import torch
from support.models import NO_DROPOUT

from tinyllm import GPT2, Error, GPT2Config, Llama, LlamaConfig, Tensor, nn, optim
from tinyllm.backend import threads
from tinyllm.optim.muon import orthogonalize

SHAPES = {"wide": (7, 30), "tall": (30, 7), "square": (12, 12), "row": (1, 9), "large": (260, 190)}


def on_both_sides(dtype=np.float64):
    """The same parameters here and in torch."""
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}
    ours = {name: Tensor(array.copy(), requires_grad=True) for name, array in start.items()}
    return ours, {name: torch.nn.Parameter(torch.tensor(array)) for name, array in start.items()}


def give_gradients(rng, ours, theirs):
    for name, parameter in ours.items():
        grad = rng.standard_normal(parameter.shape) * 10.0 ** rng.integers(-6, 3)
        grad[:, 0] *= 1e-3  # a direction with a small singular value
        parameter.grad = grad.astype(parameter.dtype)
        theirs[name].grad = torch.tensor(parameter.grad)


@pytest.fixture
def in_full_precision(monkeypatch):
    """torch.optim.Muon orthogonalises in bfloat16, whatever the dtype: replace its cast by a copy."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(momentum=0.8, weight_decay=0.5), dict(nesterov=False), dict(ns_steps=1), dict(momentum=0.0)],
)
def test_muon_equals_torch_for_50_steps(in_full_precision, adjust_lr_fn, options):
    ours, theirs = on_both_sides()
    mine = optim.Muon(ours.items(), 1e-2, adjust_lr_fn=adjust_lr_fn, **options)
    reference = torch.optim.Muon(theirs.values(), 1e-2, adjust_lr_fn=adjust_lr_fn, **options)
    rng = np.random.default_rng(1)
    for step in range(50):
        mine.lr = reference.param_groups[0]["lr"] = 1e-2 * (1 + step % 5)
        give_gradients(rng, ours, theirs)
        mine.step()
        reference.step()
        for name, parameter in ours.items():
            expected = theirs[name].detach().numpy()
            assert np.abs(parameter.data - expected).max() < 1e-12 * np.abs(expected).max(), (step, name)


def test_muon_in_float32_differs_from_torchs_bfloat16_by_its_rounding():
    ours, theirs = on_both_sides(np.float32)
    before = {name: parameter.data.copy() for name, parameter in ours.items()}
    mine = optim.Muon(ours.items(), 1e-2, weight_decay=0.0)
    reference = torch.optim.Muon(theirs.values(), 1e-2, 0.0, adjust_lr_fn="match_rms_adamw")
    give_gradients(np.random.default_rng(1), ours, theirs)
    mine.step()
    reference.step()
    for name, parameter in ours.items():
        assert parameter.dtype == mine.state[name][1].dtype == np.float32
        step, expected = parameter.data - before[name], theirs[name].detach().numpy() - before[name]
        assert np.linalg.norm(step - expected) < 0.05 * np.linalg.norm(expected), name


@pytest.mark.parametrize("shape", SHAPES.values())
def test_orthogonalized_matrix_has_the_singular_vectors_and_singular_values_near_1(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    U, _, Vt = np.linalg.svd(x, full_matrices=False)
    found = U.T @ orthogonalize(x.copy()) @ Vt.T
    values = np.diag(found).copy()
    assert (values > 0.68).all() and (values < 1.21).all()
    np.testing.assert_allclose(found, np.diag(values), atol=1e-12)


def test_singular_values_from_0_002_on_end_near_1_and_smaller_ones_grow_by_the_slope():
    """The numbers of Muon's docstring, on a diagonal of norm 1."""
    small = np.geomspace(1e-7, 0.99, 500)
    values = np.diag(orthogonalize(np.diag(small / np.linalg.norm(small))))
    begun = small / np.linalg.norm(small)
    assert (values[begun > 0.002] > 0.68).all() and (values < 1.21).all()
    assert values[0] / begun[0] == pytest.approx(485, rel=1e-3)


def test_a_gradient_of_zeros_only_decays():
    weight = Tensor(np.ones((3, 2)), requires_grad=True)
    optimizer = optim.Muon([weight], lr=0.1, weight_decay=0.5)
    weight.grad = np.zeros((3, 2))
    optimizer.step()
    assert (weight.data == 0.95).all()


def test_a_step_of_each_matrix_has_the_same_size_as_adamws():
    """Root mean square 0.2 lr with the default scale, whatever the shape."""
    ours, theirs = on_both_sides()
    before = {name: parameter.data.copy() for name, parameter in ours.items()}
    optimizer = optim.Muon(ours.items(), lr=1e-2, weight_decay=0.0)
    give_gradients(np.random.default_rng(1), ours, theirs)
    optimizer.step()
    for name, parameter in ours.items():
        size = np.sqrt(np.mean((parameter.data - before[name]) ** 2))
        assert 0.5 * 0.2e-2 < size < 1.3 * 0.2e-2, name


# ---- Which parameters ----


def gpt2(**changes):
    sizes = dict(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, **NO_DROPOUT)
    return GPT2(GPT2Config(**sizes | changes), rng=np.random.default_rng(0))


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_matrices_of_a_model_are_without_embeddings_and_head(tied):
    hidden = {f"h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    model = gpt2(tie_word_embeddings=tied)
    assert optim.Muon(model).hidden == hidden
    grouped = optim.Muon([{"params": model.h[0]}, {"params": [model.wte.weight], "muon": False}])
    assert grouped.hidden == {name.replace("h.0.", "0.") for name in hidden}


def test_parameters_outside_are_updated_as_by_adamw():
    model, other = gpt2(), gpt2()
    mine, reference = optim.Muon(model, 1e-2), optim.AdamW(other, 1e-2, weight_decay=0.1)
    for _ in range(3):
        for each, optimizer in ((model, mine), (other, reference)):
            rng = np.random.default_rng(1)
            for parameter in each.parameters():
                parameter.grad = rng.standard_normal(parameter.shape).astype(np.float32)
            optimizer.step()
    for (name, parameter), (_, expected) in zip(model.named_parameters(), other.named_parameters()):
        assert np.array_equal(parameter.data, expected.data) == (name not in mine.hidden), name


def test_a_group_keeps_its_ratio_to_the_rate_and_its_decay(in_full_precision):
    ours, theirs = on_both_sides()
    own = {"lr": 3e-2, "weight_decay": 0.5}
    mine = optim.Muon([{"params": [ours["wide"]]}, {"params": [ours["tall"]], **own}], lr=1e-2)
    groups = [{"params": [theirs["wide"]]}, {"params": [theirs["tall"]], **own}]
    reference = torch.optim.Muon(groups, 1e-2, adjust_lr_fn="match_rms_adamw")
    rng = np.random.default_rng(1)
    for step in range(5):
        mine.lr = 1e-2 / (1 + step)
        for group, factor in zip(reference.param_groups, (1, 3)):
            group["lr"] = factor * mine.lr
        give_gradients(rng, ours, theirs)
        mine.step()
        reference.step()
    for name in ("wide", "tall"):
        np.testing.assert_allclose(ours[name].data, theirs[name].detach().numpy(), rtol=1e-10, atol=1e-12)


def test_parameter_without_a_gradient_keeps_its_value_and_its_average():
    ours, theirs = on_both_sides()
    optimizer = optim.Muon(ours.items(), 1e-2)
    give_gradients(np.random.default_rng(1), ours, theirs)
    ours["tall"].grad = None
    before = ours["tall"].data.copy()
    optimizer.step()
    assert np.array_equal(ours["tall"].data, before) and "tall" not in optimizer.state_dict()["m"]


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_a_matrix_of_any_memory_layout_is_updated(layout):
    rng = np.random.default_rng(0)
    plain, grad = rng.standard_normal((2, 3)), rng.standard_normal((2, 3))
    data = {"transposed": plain.T.copy().T, "strided": np.hstack([plain, plain])[:, :3]}[layout]
    results = []
    for array, gradient in ((data, np.asfortranarray(grad)), (plain, grad)):
        parameter = Tensor(array, requires_grad=True)
        parameter.grad = gradient
        optim.Muon([parameter], lr=0.1).step()
        assert parameter.data is array
        results.append(array)
    np.testing.assert_allclose(*results, rtol=1e-12)


# ---- State ----


def trained(steps, optimizer=None, model=None):
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = model or Llama(config, rng=np.random.default_rng(0))
    optimizer = optimizer or optim.Muon(model, 1e-2)
    ids = np.array([[1, 5, 2, 10]])
    for _ in range(steps):
        model.loss(ids, ids[:, ::-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_state_has_one_average_of_a_matrix_and_resumes_bit_for_bit():
    whole, _ = trained(5)
    model, optimizer = trained(3)
    state = optimizer.state_dict()
    assert state["m"].keys() - state["v"].keys() == optimizer.hidden != set()
    assert optimizer.averages_nbytes == sum(a.nbytes for key in "mv" for a in state[key].values())
    resumed = optim.Muon(model, 1e-2)
    resumed.load_state_dict(state)
    trained(2, resumed, model)
    for name, array in whole.state_dict().items():
        assert array.tobytes() == model.state_dict()[name].tobytes(), name


def test_state_of_adamw_is_refused_and_by_adamw():
    model, muon = trained(1)
    adamw = optim.AdamW(model)
    with pytest.raises(Error, match="another optimizer"):
        adamw.load_state_dict(muon.state_dict())
    trained(1, adamw, model)
    with pytest.raises(Error, match="another optimizer"):
        muon.load_state_dict(adamw.state_dict())


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    results = []
    for number in (1, 3):
        monkeypatch.setattr(threads, "num_threads", lambda number=number: number)
        ours, theirs = on_both_sides(np.float32)
        optimizer = optim.Muon(ours.items(), 1e-2)
        for seed in range(2):
            give_gradients(np.random.default_rng(seed), ours, theirs)
            optimizer.step()
        results.append({name: parameter.data.tobytes() for name, parameter in ours.items()})
    assert results[0] == results[1]


def test_a_step_needs_two_matrices_and_two_small_squares_at_a_time(monkeypatch):
    """However many matrices there are, on one thread."""
    weights = [Tensor(np.ones((64, 1024), np.float32), requires_grad=True) for _ in range(6)]
    optimizer = optim.Muon(weights)
    optimizer.reserve()
    for weight in weights:
        weight.grad = np.ones((64, 1024), np.float32)
    monkeypatch.setattr(threads, "num_threads", lambda: 1)
    tracemalloc.start()
    optimizer.step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 2 * 4 * 64 * 1024 < peak < 2.6 * 4 * 64 * 1024


@pytest.mark.parametrize(
    "wrong",
    [
        dict(momentum=1.0),
        dict(momentum="a"),
        dict(ns_steps=0),
        dict(ns_steps=5.0),
        dict(adjust_lr_fn="x"),
        dict(adjust_lr_fn=[]),
    ],
)
def test_invalid_options_are_refused(wrong):
    with pytest.raises(Error, match=f"Muon needs a momentum.*{next(iter(wrong))}="):
        optim.Muon(gpt2(), **wrong)


def test_invalid_rates_and_groups_are_refused():
    with pytest.raises(Error, match="Muon needs lr"):
        optim.Muon(gpt2(), lr=-1.0)
    with pytest.raises(Error, match="may have lr, weight_decay, muon"):
        optim.Muon([{"params": gpt2(), "momentum": 0.5}])
    with pytest.raises(Error, match="muon is 'no'"):
        optim.Muon([{"params": gpt2(), "muon": "no"}])


def test_a_frozen_matrix_is_not_hidden():
    model = nn.Linear(3, 2, rng=0)
    model.weight.requires_grad = False
    assert optim.Muon(model).hidden == set()


def test_the_head_of_a_model_inside_a_module_is_not_hidden():
    class Wrapper(nn.Module):
        def __init__(self, lm):
            self.lm = lm

    config = GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_head=2, n_layer=1, tie_word_embeddings=False, **NO_DROPOUT
    )
    model = GPT2(config, rng=np.random.default_rng(0))
    hidden = optim.Muon(Wrapper(model)).hidden
    assert hidden == {f"lm.{name}" for name in optim.Muon(model).hidden}
    assert not any("lm_head" in name for name in hidden)

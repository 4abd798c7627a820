"""AdamW, parameter groups, clipping and schedules against torch; frozen parameters; errors."""

import math

import numpy as np
import pytest
import torch

from tinyllm import GPT2, Error, GPT2Config, Tensor, nn, optim
from tinyllm.optim import AdamW, LossScale, NoLossScale, clip_grad_norm

IDS = np.array([[1, 5, 2, 10], [0, 3, 3, 7]])
TARGETS = np.array([[5, 2, 10, 4], [3, 3, 7, -100]])
SMALL = {"matrix": (4, 3), "bias": (4,), "head": (3, 2)}


def small_gpt2():
    sizes = dict(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2)
    return GPT2(GPT2Config(**sizes), rng=np.random.default_rng(0)).astype(np.float64)


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape) for name, shape in SMALL.items()}
    ours = {name: Tensor(array.copy(), requires_grad=True) for name, array in arrays.items()}
    return ours, {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}


def set_gradients(ours, theirs, seed):
    rng = np.random.default_rng(seed)
    for name, parameter in ours.items():
        grad = rng.standard_normal(parameter.shape)
        if parameter.requires_grad:
            parameter.grad = grad
        theirs[name].grad = torch.tensor(grad)


def test_groups_with_their_own_lr_and_decay_equal_torch():
    """One schedule serves all groups: a group's rate keeps its ratio to the optimizer's."""
    ours, theirs = parameters()
    optimizer = AdamW(
        [
            {"params": [("matrix", ours["matrix"]), ("bias", ours["bias"])]},
            {"params": [ours["head"]], "lr": 3e-2, "weight_decay": 0.5},
        ],
        lr=1e-2,
        weight_decay=0.1,
    )
    reference = torch.optim.AdamW(
        [
            {"params": [theirs["matrix"]], "weight_decay": 0.1},
            {"params": [theirs["bias"]], "weight_decay": 0.0},  # one axis: no decay unless its group has one
            {"params": [theirs["head"]], "weight_decay": 0.5},
        ],
    )
    for step in range(20):
        optimizer.lr = 1e-2 / (1 + step)
        for group, factor in zip(reference.param_groups, (1, 1, 3)):
            group["lr"] = factor * optimizer.lr
        set_gradients(ours, theirs, step)
        optimizer.step()
        reference.step()
    for name, parameter in ours.items():
        np.testing.assert_allclose(parameter.data, theirs[name].detach().numpy(), rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("decay", [0.5, 0.0])
def test_group_decay_applies_to_all_its_parameters(decay):
    weight, bias = (Tensor(np.ones(shape), requires_grad=True) for shape in ((2, 2), (2,)))
    optimizer = AdamW([{"params": [weight, bias], "weight_decay": decay}], lr=0.1)
    for parameter in (weight, bias):
        parameter.grad = np.zeros(parameter.shape)
    optimizer.step()
    assert (weight.data == 1 - 0.1 * decay).all() and (bias.data == 1 - 0.1 * decay).all()


def test_a_rate_of_0_can_be_raised_later():
    weight = Tensor(np.ones(2), requires_grad=True)
    optimizer = AdamW([weight], lr=0.0)
    optimizer.lr, weight.grad = 0.1, np.ones(2)
    optimizer.step()
    assert weight.data == pytest.approx(0.9)


@pytest.mark.parametrize("form", ["tensors", "pairs", "a generator", "named pairs", "a model", "groups"])
def test_parameters_are_accepted_in_any_form(form):
    model = nn.Linear(3, 2, rng=np.random.default_rng(0))
    given = {
        "tensors": list(model.parameters()),
        "pairs": list(model.named_parameters()),
        "a generator": model.parameters(),
        "named pairs": model.named_parameters(),
        "a model": model,
        "groups": [{"params": model.parameters()}],
    }[form]
    optimizer = AdamW(given)
    assert optimizer.lr == torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["lr"]
    before = model.weight.data.copy()
    for parameter in model.parameters():
        parameter.grad = np.full(parameter.shape, 2.0, np.float32)
    clipped = list(model.parameters()) if form not in ("tensors", "pairs", "a model") else given
    assert clip_grad_norm(clipped, 1.0) == pytest.approx(2 * np.sqrt(8))
    optimizer.step()
    assert (model.weight.data != before).all()


def test_tensor_of_two_rows_is_one_parameter():
    weight = Tensor(np.ones((2, 3)), requires_grad=True)
    weight.grad = np.full((2, 3), 2.0)
    assert clip_grad_norm([weight], 1.0) == pytest.approx(2 * math.sqrt(6))
    assert np.linalg.norm(weight.grad) == pytest.approx(1.0)
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)
    optimizer.step()
    assert len(optimizer.parameters) == 1 and np.allclose(weight.data, 0.9)


def test_frozen_parameters_are_not_updated_and_take_no_memory():
    ours, theirs = parameters()
    ours["matrix"].requires_grad = False
    optimizer = AdamW(ours.items(), lr=0.1)
    optimizer.reserve()
    assert [name for name, _ in optimizer.parameters] == ["bias", "head"] == list(optimizer.state)
    assert not any(optimizer.state_dict().values())  # nothing was updated yet
    before = ours["matrix"].data.copy()
    set_gradients(ours, theirs, 0)
    optimizer.step()
    optimizer.zero_grad()
    np.testing.assert_array_equal(ours["matrix"].data, before)


def consumed():
    """model.parameters() after a loop over it."""
    parameters = nn.Linear(2, 2, rng=0).parameters()
    for _ in parameters:
        pass
    return parameters


ROW = Tensor(np.ones(2), requires_grad=True)
WRONG = {
    "nothing to train": (lambda: AdamW([Tensor(np.ones(2))], 0.1), "requires_grad"),
    "an empty list": (lambda: AdamW([]), "no parameter to train"),
    "a consumed generator": (lambda: AdamW(consumed()), "consumed"),
    "a consumed generator in a group": (lambda: AdamW([{"params": consumed()}]), "consumed"),
    "a consumed generator to clip": (lambda: clip_grad_norm(consumed(), 1.0), "consumed"),
    "a method not called": (lambda: AdamW(nn.Linear(2, 2, rng=0).parameters), "not a method"),
    "a method not called, to clip": (lambda: clip_grad_norm(nn.Module().parameters, 1.0), "not a method"),
    "nothing": (lambda: AdamW(None), "not a NoneType"),
    "a tensor alone": (lambda: AdamW(Tensor(np.ones((2, 2)), requires_grad=True), 0.1), "list"),
    "a state dict": (lambda: AdamW(nn.Linear(2, 2, rng=0).state_dict()), "is a str: pass the model"),
    "a parameter twice": (lambda: AdamW([ROW, ROW], 0.1), "twice"),
    "a computed tensor": (lambda: AdamW([("w", ROW * 2)], 0.1), "parameter w is the result"),
    "a list of lists": (lambda: AdamW([[ROW, ROW]], 0.1), "list"),
    "a list of layers": (lambda: AdamW([nn.Linear(2, 2, rng=0)], 0.1), "Linear"),
    "a tensor alone as a group": (lambda: AdamW([{"params": ROW}], 0.1), "list"),
    "an eps that is not a number": (lambda: AdamW([ROW], 0.1, eps=math.nan), "eps=nan"),
    "an lr that is not a number": (lambda: AdamW([ROW], math.nan), "lr=nan"),
    "one name for two": (
        lambda: AdamW([("w", ROW), ("w", Tensor(np.ones(2), requires_grad=True))], 0.1),
        "two parameters are named w",
    ),
    "a group without params": (lambda: AdamW([{"lr": 0.1}], 0.1), "params"),
    "an unknown option": (lambda: AdamW([{"params": [ROW], "betas": (0, 0)}], 0.1), "betas"),
    "a rate that is a function": (lambda: AdamW([ROW], lambda step: 0.1), "lr="),
    "one beta": (lambda: AdamW([ROW], 0.1, betas=(0.9,)), "betas"),
    "a number for betas": (lambda: AdamW([ROW], 0.1, betas=0.9), "betas=0.9"),
    "a beta that is not a number": (lambda: AdamW([ROW], 0.1, betas=("a", 0.9)), "betas="),
    "a tied parameter in two groups": (lambda: AdamW([{"params": [ROW]}, {"params": [ROW]}], 0.1), "twice"),
    "a negative rate": (lambda: AdamW([{"params": [ROW], "lr": -1.0}], 0.1), "-1.0"),
    "a rate that is not a number": (lambda: AdamW([{"params": [ROW], "lr": float("nan")}], 0.1), "nan"),
    "a group's rate with an lr of 0": (lambda: AdamW([{"params": [ROW], "lr": 0.1}], 0.0), "above 0"),
    "names alone": (lambda: AdamW(["weight"], 0.1), "str"),
    "arrays": (lambda: clip_grad_norm([np.ones(2)], 1.0), "ndarray: pass the model"),
    "a tensor alone to clip": (lambda: clip_grad_norm(ROW, 1.0), "list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_parameters_are_refused(case):
    call, message = WRONG[case]
    with pytest.raises(Error, match=message):
        call()


def test_no_loss_scale_changes_nothing():
    scale, parameter = NoLossScale(), Tensor(np.ones(2), requires_grad=True)
    loss = (parameter * 3.0).sum()
    loss.backward(scale.seed(loss))
    scale.unscale([parameter])
    scale.update(finite=False)
    np.testing.assert_array_equal(parameter.grad, [3.0, 3.0])
    assert scale.scale == 1.0 and scale.state_dict() == {}
    assert {name for name in vars(LossScale) if not name.startswith("_")} >= {
        name
        for name in vars(NoLossScale)
        if callable(getattr(NoLossScale, name)) and not name.startswith("_")
    }


# -------------------------------------------------------------------------------------- AdamW

SHAPES = {"matrix": (370, 360), "small": (5, 7), "cube": (2, 3, 4), "bias": (7,), "number": ()}


def on_both_sides(dtype=np.float64):
    """The same parameters here and in torch."""
    rng = np.random.default_rng(0)
    start = {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}
    ours = {name: Tensor(array.copy(), requires_grad=True) for name, array in start.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in start.items()}
    return ours, theirs


def torch_adamw(parameters, lr, betas, eps, weight_decay):
    """torch's AdamW with a group without decay for biases and norms."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)


@pytest.mark.parametrize(
    ("betas", "eps", "weight_decay"),
    [((0.9, 0.999), 1e-8, 0.01), ((0.9, 0.95), 1e-6, 0.1), ((0.0, 0.5), 1e-2, 0.0), ((0.8, 0.0), 1e-8, 1.0)],
)
def test_adamw_equals_torch_for_20_steps(betas, eps, weight_decay):
    ours, theirs = on_both_sides()
    mine = optim.AdamW(ours.items(), 1e-2, betas, eps, weight_decay)
    reference = torch_adamw(theirs, 1e-2, betas, eps, weight_decay)
    rng = np.random.default_rng(1)
    for step in range(20):
        lr = 1e-2 * (1 + step % 5)
        mine.lr = lr
        for group in reference.param_groups:
            group["lr"] = lr
        for name, shape in SHAPES.items():
            grad = np.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3))
            ours[name].grad = grad.copy()
            theirs[name].grad = torch.tensor(grad)
        mine.step()
        reference.step()
        for name in SHAPES:
            expected = theirs[name].detach().numpy()
            worst = np.abs(ours[name].data - expected).max() / np.abs(expected).max()
            assert worst < 1e-12, (step, name)


def test_adamw_preserves_float32():
    ours, theirs = on_both_sides(np.float32)
    mine = optim.AdamW(ours.items(), 1e-2, weight_decay=0.1)
    reference = torch_adamw(theirs, 1e-2, (0.9, 0.999), 1e-8, 0.1)
    rng = np.random.default_rng(1)
    for _ in range(20):
        for name, shape in SHAPES.items():
            grad = np.asarray(rng.standard_normal(shape), np.float32)
            ours[name].grad = grad
            theirs[name].grad = torch.tensor(grad)
        mine.step()
        reference.step()
    for name in SHAPES:
        assert ours[name].dtype == np.float32
        assert {moment.dtype for moment in mine.state[name][1:]} == {np.dtype(np.float32)}
        assert np.allclose(ours[name].data, theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("first", [1e-30, 1e19, 1e20, 5e20, 1e22])
def test_adamw_in_float32_recovers_from_a_huge_gradient_as_torch(first):
    """(1 - β₂) g² fits float32 up to g = 5.8e20, although g² alone overflows from 1.8e19."""
    ours, theirs = Tensor(np.ones(1, np.float32), requires_grad=True), torch.nn.Parameter(torch.ones(1))
    mine = optim.AdamW([ours], lr=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    for step in range(199):
        grad = first if step == 0 else 1.0
        ours.grad, theirs.grad = np.full(1, grad, np.float32), torch.full((1,), grad)
        with np.errstate(over="ignore"):
            mine.step()
        reference.step()
    assert ours.data.item() == pytest.approx(theirs.item(), rel=1e-5)
    if first in (1e19, 1e20):
        assert ours.data.item() == pytest.approx(0.3994, abs=1e-4)


def test_parameter_without_a_gradient_skips_the_step_as_in_torch():
    ours, theirs = on_both_sides()
    mine = optim.AdamW(ours.items(), 1e-2, weight_decay=0.1)
    reference = torch_adamw(theirs, 1e-2, (0.9, 0.999), 1e-8, 0.1)
    rng = np.random.default_rng(1)
    for step in range(5):
        mine.zero_grad()
        reference.zero_grad()
        for name in SHAPES:
            if name == "small" and step in (0, 3):  # such as an unused expert
                continue
            grad = np.asarray(rng.standard_normal(SHAPES[name]))
            ours[name].grad = grad
            theirs[name].grad = torch.tensor(grad)
        before = ours["small"].data.copy()
        mine.step()
        reference.step()
        if step in (0, 3):
            assert np.array_equal(ours["small"].data, before)
        for name in SHAPES:
            expected = theirs[name].detach().numpy()
            assert np.abs(ours[name].data - expected).max() <= 1e-12 * np.abs(expected).max(), (step, name)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_adamw_updates_a_parameter_of_any_memory_layout(layout):
    data = {"transposed": np.ones((3, 2)).T, "strided": np.ones((2, 4))[:, :3]}[layout]
    parameter = Tensor(data, requires_grad=True)
    optimizer = optim.AdamW([("w", parameter)], lr=0.1, weight_decay=0.0)
    parameter.grad = np.ones((2, 3))
    optimizer.step()
    assert np.allclose(parameter.data, np.full((2, 3), 0.9))


def test_adamw_names_a_parameter_without_weights():
    """The optimizer may be created before the weights are loaded, but not used."""
    layer = nn.Linear(3, 2, rng=None)
    optimizer = AdamW(layer)
    layer.weight.grad = np.ones((2, 3), np.float32)
    for use in (optimizer.step, optimizer.reserve):
        with pytest.raises(Error, match="parameter weight has no weights yet"):
            use()
    layer.load_state_dict(nn.Linear(3, 2, rng=0).state_dict())
    layer.weight.grad = np.ones((2, 3), np.float32)
    before = layer.weight.data.copy()
    optimizer.step()
    assert (layer.weight.data < before).all()


@pytest.mark.parametrize("optimizer", [optim.AdamW, optim.Muon])
@pytest.mark.parametrize("new", [np.ones((1, 2)), np.ones((5, 2)), np.ones((3, 2), np.float32)])
def test_parameter_that_was_replaced_by_another_shape_or_dtype_is_named(optimizer, new):
    """Averages of three rows would broadcast with a parameter of one."""
    w = Tensor(np.ones((3, 2)), requires_grad=True)
    updates = optimizer([("w", w)])
    w.grad = np.ones((3, 2))
    updates.step()
    w.replace(new.copy())
    w.grad = np.ones_like(new)
    with pytest.raises(Error, match=f"parameter w was replaced by {new.dtype} .{new.shape[0]}, 2"):
        updates.step()
    assert (w.data == 1).all()


def test_adamw_updates_in_place_and_drops_gradients():
    model = small_gpt2()
    arrays = [p.data for p in model.parameters()]
    optimizer = optim.AdamW(model, lr=1e-3)
    model.loss(IDS, TARGETS).backward()
    optimizer.step()
    assert all(p.data is array for p, array in zip(model.parameters(), arrays))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert [name for name, _ in optimizer.parameters] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1.0}, {"lr": 1, "eps": -1e-8}, {"lr": 1, "weight_decay": -0.1}, {"lr": 1, "betas": (0.9, 1)}],
)
def test_adamw_refuses_invalid_options(wrong):
    with pytest.raises(Error, match="AdamW needs lr"):
        optim.AdamW(small_gpt2(), **wrong)


class Momentum(AdamW):
    """v = μ v + g + λ w, w = w - lr v, as ``torch.optim.SGD``."""

    def step(self):
        for name, p in self.parameters:
            factor, decay = self.options[name]
            state = self.state.setdefault(name, [0, np.zeros_like(p.data), np.zeros_like(p.data)])
            state[0] += 1
            state[1] *= self.betas[0]
            state[1] += p.grad + decay * p.data
            p.data -= self.lr * factor * state[1]


def test_a_rule_of_ones_own_has_groups_and_can_be_resumed():
    ours = [Tensor(np.ones((2, 3)), requires_grad=True) for _ in range(2)]
    theirs = [torch.nn.Parameter(torch.ones(2, 3).double()) for _ in range(2)]
    groups = [{"lr": 0.1}, {"lr": 0.02, "weight_decay": 0.3}]

    def made():
        given = [{"params": [p], **group} for p, group in zip(ours, groups)]
        return Momentum(given, lr=0.1, betas=(0.9, 0.9), weight_decay=0.0)

    other = torch.optim.SGD([{"params": [p], **g} for p, g in zip(theirs, groups)], momentum=0.9)
    optimizer, rng = made(), np.random.default_rng(0)
    for step in range(6):
        if step == 3:
            state, optimizer = optimizer.state_dict(), made()
            optimizer.load_state_dict(state)
        for mine, p in zip(ours, theirs):
            mine.grad = rng.standard_normal((2, 3))
            p.grad = torch.from_numpy(mine.grad.copy())
        optimizer.step()
        other.step()
    for mine, p in zip(ours, theirs):
        np.testing.assert_allclose(mine.data, p.detach().numpy(), rtol=1e-14)


@pytest.mark.parametrize("state", [{}, None, {"t": {}, "m": {}}, "state"])
def test_invalid_optimizer_state_is_refused(state):
    with pytest.raises(Error, match="state_dict"):
        AdamW(small_gpt2()).load_state_dict(state)


# ----------------------------------------------------------------------- clipping and schedules


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e4])
def test_clip_grad_norm_equals_torch(max_norm):
    ours, theirs = on_both_sides()
    rng = np.random.default_rng(1)
    for name, shape in SHAPES.items():
        if name == "bias":
            continue  # no gradient: skipped on both sides
        grad = np.asarray(rng.standard_normal(shape))
        ours[name].grad = grad.copy()
        theirs[name].grad = torch.tensor(grad)
    norm = optim.clip_grad_norm(ours.items(), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
    assert norm == pytest.approx(expected.item(), rel=1e-13)
    assert isinstance(norm, float)
    assert ours["bias"].grad is None
    for name in SHAPES.keys() - {"bias"}:
        assert np.allclose(ours[name].grad, theirs[name].grad.numpy(), rtol=1e-12, atol=0), name


def test_clip_grad_norm_at_the_bound_equals_torch():
    """torch's factor is max_norm / (norm + 1e-6), already below 1 there."""
    mine, theirs = Tensor(np.zeros(2), requires_grad=True), torch.nn.Parameter(torch.zeros(2).double())
    mine.grad, theirs.grad = np.array([3.0, 4.0]), torch.tensor([3.0, 4.0]).double()
    assert optim.clip_grad_norm([("p", mine)], 5.0) == 5.0
    torch.nn.utils.clip_grad_norm_([theirs], 5.0)
    assert np.allclose(mine.grad, theirs.grad.numpy(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [1e-30, 1e18, 1e20, math.inf, math.nan])
def test_clip_grad_norm_of_extreme_gradients_equals_torch(value, dtype):
    ours = [Tensor(np.zeros(2, dtype), requires_grad=True) for _ in range(2)]
    theirs = [torch.nn.Parameter(torch.tensor(p.data)) for p in ours]
    for mine, other in zip(ours, theirs):
        mine.grad = np.array([value, 1.0], dtype)
        other.grad = torch.tensor(mine.grad)
        mine.grad, value = mine.grad.copy(), 1.0
    with np.errstate(all="ignore"):
        norm = optim.clip_grad_norm(ours, 1.0)
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 1.0).item(), rel=1e-6, nan_ok=True)
    for mine, other in zip(ours, theirs):
        np.testing.assert_allclose(mine.grad, other.grad.numpy(), rtol=1e-6)


def test_clip_grad_norm_scales_any_layout_in_place():
    parameter = Tensor(np.zeros((2, 3)), requires_grad=True)
    parameter.grad = np.ones((3, 2)).T * 2
    grad = parameter.grad
    assert optim.clip_grad_norm([("w", parameter)], 1.0) == pytest.approx(math.sqrt(24))
    assert parameter.grad is grad
    assert np.linalg.norm(parameter.grad) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan, None, "a"])
def test_clip_grad_norm_refuses_invalid_max_norm(max_norm):
    with pytest.raises(Error, match=f"max_norm must be .*, not {max_norm!r}"):
        optim.clip_grad_norm([], max_norm)


def test_warmup_cosine_has_the_documented_rates():
    lr_at = optim.warmup_cosine(peak_lr=5e-4, initial_lr=3e-5, min_lr=1e-6, warmup=10, steps=130)
    assert lr_at(0) == 3e-5
    assert lr_at(1) == pytest.approx(3e-5 + 4.7e-5, rel=1e-14)
    assert lr_at(9) == pytest.approx(4.53e-4, rel=1e-14)
    assert lr_at(10) == pytest.approx(5e-4, rel=1e-14)
    assert lr_at(40) == pytest.approx(1e-6 + 4.99e-4 * (2 + math.sqrt(2)) / 4, rel=1e-14)  # cos(π/4)
    assert lr_at(70) == pytest.approx((5e-4 + 1e-6) / 2, rel=1e-14)
    assert lr_at(130) == pytest.approx(1e-6, rel=1e-14)
    assert lr_at(1000) == pytest.approx(1e-6, rel=1e-14)
    rates = [lr_at(step) for step in range(131)]
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_warmup_cosine_without_warmup_starts_at_the_peak():
    assert optim.warmup_cosine(1.0, 0.0, 0.0, warmup=0, steps=4)(0) == 1.0


def test_warmup_linear_has_the_documented_rates():
    lr_at = optim.warmup_linear(peak_lr=1.0, initial_lr=0.2, min_lr=0.1, warmup=4, steps=14)
    assert [lr_at(step) for step in (0, 2, 4)] == pytest.approx([0.2, 0.6, 1.0], rel=1e-14)
    assert [lr_at(step) for step in (5, 9, 14, 99)] == pytest.approx([0.91, 0.55, 0.1, 0.1], rel=1e-14)
    with pytest.raises(Error, match="must be shorter than the run"):
        optim.warmup_linear(1.0, 0.0, 0.0, warmup=3, steps=3)


@pytest.mark.parametrize(("warmup", "steps"), [(10, 10), (11, 10), (-1, 10), (1, 0), (0, 0)])
def test_warmup_cosine_refuses_a_warmup_that_exceeds_the_run(warmup, steps):
    with pytest.raises(Error, match="must be shorter than the run"):
        optim.warmup_cosine(1.0, 0.0, 0.0, warmup, steps)


@pytest.mark.parametrize("form", ["tensors", "modules"])
def test_parameters_of_several_groups_have_distinct_names(form):
    model = small_gpt2()
    given = [block if form == "modules" else list(block.parameters()) for block in model.h]
    optimizer = AdamW([{"params": given[0]}, {"params": given[1], "lr": 1e-4}], lr=1e-2)
    names = [name for name, _ in optimizer.parameters]
    assert len(set(names)) == len(names) == sum(len(list(block.parameters())) for block in model.h)
    before = [block.ln_1.weight.data.copy() for block in model.h]
    model.loss(IDS, TARGETS).backward()
    optimizer.step()
    moved = [np.abs(block.ln_1.weight.data - old).max() for block, old in zip(model.h, before)]
    assert moved == pytest.approx(
        [1e-2, 1e-4], rel=1e-3
    )  # the size of AdamW's first step is the learning rate


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["t"].update(w=-1),
        lambda state: state["t"].update(w="x"),
        lambda state: state["m"].update(w=[0.0, 0.0]),
        lambda state: state["v"].update(w=1),
        lambda state: state.update(t=[1]),
        lambda state: state.update(m=5),
        lambda state: state["m"].update(w=np.zeros(3)),
        lambda state: state["v"].update(w=np.zeros(2, np.float32)),
        lambda state: [state[key].update(other=state[key]["w"]) for key in "tmv"],
    ],
)
def test_an_optimizer_state_of_the_wrong_types_is_refused(change):
    optimizer = AdamW([("w", Tensor(np.ones(2), requires_grad=True))], lr=0.1)
    state = {"t": {"w": 1}, "m": {"w": np.zeros(2)}, "v": {"w": np.zeros(2)}}
    optimizer.load_state_dict(state)
    before = optimizer.state
    change(state)
    with pytest.raises(Error, match="optimizer state"):
        optimizer.load_state_dict(state)
    assert optimizer.state is before

"""A training step and an evaluation: gradients of the whole batch, however it is split."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm import GPT2, GPT2Config, Tensor
from tinyllm.errors import Error
from tinyllm.nn import Module
from tinyllm.optim import AdamW, LossScale, NoLossScale
from tinyllm.training.step import (
    accumulate_gradients,
    count_targets,
    evaluate,
    language_model_loss,
    training_step,
)


def gradients(model, ids, targets, micro_batch, seed, step, scale=None):
    scale, batch = scale or NoLossScale(), (ids, targets)
    how = (count_targets(batch), language_model_loss, micro_batch, scale, seed, step)
    loss = accumulate_gradients(model, batch, *how)
    scale.unscale(model)
    return loss


# Micro-batches


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro_batch):
    """Rows have 0, 1 and many targets, so that a mean of the micro-batches' means would be wrong."""
    rng = np.random.default_rng(1)
    ids, targets = rng.integers(0, 11, (2, 5, 6))
    targets[0], targets[1, 1:], targets[3, ::2] = -100, -100, -100
    config = GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_head=2, n_layer=2, resid_pdrop=0.0)
    model = GPT2(config, rng=rng).astype(np.float64).eval()
    model.loss(ids, targets).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    whole = model.loss(ids, targets).item()
    model.zero_grad()
    loss = gradients(model, ids, targets, micro_batch, seed=0, step=0)
    assert loss == pytest.approx(whole, rel=1e-13)
    for name, p in model.named_parameters():
        assert np.abs(p.grad - expected[name]).max() <= 1e-13 * np.abs(expected[name]).max(), name


def test_dropout_masks_do_not_depend_on_how_the_batch_is_split():
    config = GPT2Config(vocab_size=9, n_positions=16, n_embd=16, n_head=2, n_layer=1, resid_pdrop=0.5)
    model = GPT2(config, rng=np.random.default_rng(0)).astype(np.float64).train()
    ids = np.repeat(np.arange(9)[None], 4, axis=0)
    whole = gradients(model, ids, ids, 4, seed=0, step=0)
    for micro_batch in (1, 2, 3):
        assert gradients(model, ids, ids, micro_batch, seed=0, step=0) == pytest.approx(whole, rel=1e-12)
    assert gradients(model, ids[:1], ids[:1], 1, seed=0, step=0) != whole  # each row has its own mask
    assert gradients(model, ids, ids, 4, seed=0, step=1) != whole


def test_losses_are_read_only_after_the_last_micro_batch(monkeypatch):
    """Reading a loss waits for the GPU, which otherwise computes while the host prepares the next one."""
    config = GPT2Config(vocab_size=9, n_positions=4, n_embd=8, n_head=2, n_layer=1)
    model, calls = GPT2(config, rng=np.random.default_rng(0)), []
    backward, item = Tensor.backward, Tensor.item
    monkeypatch.setattr(Tensor, "backward", lambda *args: (calls.append("backward"), backward(*args))[1])
    monkeypatch.setattr(Tensor, "item", lambda *args: (calls.append("item"), item(*args))[1])
    ids = np.arange(8).reshape(4, 2)
    gradients(model, ids, ids, 1, seed=0, step=0)
    assert calls == 4 * ["backward"] + 4 * ["item"]


# Loss scale


@settings(max_examples=20)
@given(steps=st.lists(st.sampled_from([True, False]), max_size=40), before=st.integers(0, 1999))
@example(steps=[True], before=1999)
@example(steps=[False, True], before=1999)
def test_loss_scale_is_updated_as_in_torch(steps, before):
    torch = pytest.importorskip("torch")
    ours = LossScale()
    ours.load_state_dict({"scale": 1024.0, "good_steps": before})
    scale, good_steps = torch.tensor(1024.0), torch.tensor(before, dtype=torch.int32)
    for finite in steps:
        ours.update(finite)
        torch._amp_update_scale_(scale, good_steps, torch.tensor(float(not finite)), 2.0, 0.5, 2000)
        assert ours.state_dict() == {"scale": scale.item(), "good_steps": good_steps.item()}


@pytest.mark.parametrize("micro_batch", [2, 5])
def test_unscaled_gradients_equal_those_without_a_scale(micro_batch):
    ids = np.random.default_rng(1).integers(0, 11, (5, 6))
    config = GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_head=2, n_layer=1)
    model = GPT2(config, rng=np.random.default_rng(0))
    plain = gradients(model, ids, ids, micro_batch, seed=3, step=0)
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    assert gradients(model, ids, ids, micro_batch, seed=3, step=0, scale=LossScale()) == plain
    for name, p in model.named_parameters():  # the scale is a power of two, hence exact
        assert np.array_equal(p.grad, expected[name]), name


def test_loss_scale_multiplies_and_unscale_divides():
    x = Tensor(np.array([3.0], np.float32), requires_grad=True)
    scale = LossScale(8.0)
    loss = (x * x).sum()
    loss.backward(scale.seed(loss))
    assert x.grad == 8 * 6
    unused = Tensor(np.ones(2), requires_grad=True)
    number = Tensor(np.array(2.0, np.float32), requires_grad=True)
    number.grad = np.array(4.0, np.float32)
    scale.unscale([("x", x), ("unused", unused), ("number", number)])
    assert (x.grad, unused.grad, number.grad) == (6, None, 0.5)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_invalid_loss_scale_is_refused(value):
    with pytest.raises(Error, match=f"a loss scale must be above 0 and finite, not {value}"):
        LossScale(value)


# The update


class Line(Module):
    """y = x w, with the mean squared error as its loss."""

    def __init__(self, w):
        self.w = Tensor(np.array(w), requires_grad=True)

    def forward(self, x):
        return (Tensor(x) * self.w).sum(axis=1)

    def loss(self, x, y, num_targets):
        error = self(x) - Tensor(y)
        return (error * error).sum() / num_targets


X, Y = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]]), np.array([1.0, 0.0, 2.0])


def by_hand(w, x, y, clip, lr):
    """The loss, the norm of its gradient, and w after AdamW's first step, where m / sqrt(v) = g / |g|."""
    error = x @ w - y
    g = 2 / len(x) * x.T @ error
    norm = np.linalg.norm(g)
    g = g * min(1, clip / (norm + 1e-6))
    return (error**2).mean(), norm, w - lr * g / (np.abs(g) + 1e-8)


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_a_step_equals_the_one_computed_by_hand(micro_batch, clip):
    model = Line([0.5, -0.25])
    optimizer = AdamW(model, lr=0.1)
    found = training_step(model, optimizer, (X, Y), 3, micro_batch=micro_batch, clip=clip)
    loss, norm, w = by_hand(np.array([0.5, -0.25]), X, Y, clip, 0.1)
    assert found == pytest.approx((loss, norm, True), rel=1e-12)
    assert model.w.data == pytest.approx(w, rel=1e-12)
    assert model.w.grad is None


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("broken", "halved"), [("loss", False), ("gradient", True)])
def test_a_step_that_is_not_finite_leaves_the_weights_unchanged(scaled, broken, halved):
    model, scale = Line([0.5, -0.25]), LossScale(8.0) if scaled else NoLossScale()
    optimizer = AdamW(model, lr=0.1)

    def loss_fn(model, x, y, num_targets):
        loss = model.loss(x, y, num_targets)
        if broken == "loss":
            return loss + math.nan  # its gradient is finite
        return Tensor.from_op(loss.data, [loss], lambda grad: [grad * math.inf])

    with np.errstate(all="ignore"):
        found = training_step(model, optimizer, (X, Y), 3, loss_fn, loss_scale=scale)
    assert not found.updated
    assert math.isfinite(found.loss) == (broken == "gradient")
    assert np.array_equal(model.w.data, [0.5, -0.25])
    assert model.w.grad is None
    assert optimizer.state_dict()["t"] == {}
    assert scale.scale == (4 if halved else 8) if scaled else 1


def test_a_scaled_step_equals_the_step():
    models = [Line([0.5, -0.25]) for _ in range(2)]
    for model, scale in zip(models, (NoLossScale(), LossScale(2.0**10))):
        for step in range(3):
            training_step(model, AdamW(model, lr=0.1), (X, Y), 3, loss_scale=scale, step=step)
    assert np.array_equal(models[0].w.data, models[1].w.data)


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_an_interrupted_step_leaves_no_trace(moment):
    """It is interrupted before its first and its second micro-batch, and before the update."""
    model, calls = Line([0.5, -0.25]), []

    def check():
        calls.append(1)
        if len(calls) == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training_step(model, AdamW(model, lr=0.1), (X, Y), 3, micro_batch=2, check=check)
    assert np.array_equal(model.w.data, [0.5, -0.25])
    assert model.w.grad is None
    training_step(model, AdamW(model, lr=0.1), (X, Y), 3, micro_batch=2, check=check)
    assert len(calls) == moment + 3


# An evaluation


def test_an_evaluation_is_the_mean_over_all_targets():
    model = Line([0.5, -0.25])
    batches = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    found = evaluate(model, batches, count=lambda batch: len(batch[1]))
    assert found == pytest.approx(((X @ [0.5, -0.25] - Y) ** 2).mean(), rel=1e-12)
    with pytest.raises(Error, match="no targets"):
        evaluate(model, [])

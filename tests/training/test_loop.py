"""``fit`` trains any module on any arrays, and refuses invalid arguments with one message."""

import math

import numpy as np
import pytest

from tinyllm import GPT2, GPT2Config, Tensor
from tinyllm.backend import random
from tinyllm.errors import Error
from tinyllm.nn import Dropout, Linear, Module
from tinyllm.optim import AdamW, LossScale, warmup_cosine
from tinyllm.training import fit, loop

CONFIG = GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_head=2, n_layer=1)


def gpt2():
    return GPT2(CONFIG, rng=np.random.default_rng(0))


def some_ids(step):
    ids = np.random.default_rng(step % 2).integers(0, 11, (4, 6))
    return ids, ids


class Net(Module):
    """A regression with two layers, of which the first may be frozen."""

    def __init__(self, rng, dropout=0.0, frozen=False):
        self.inner, self.dropout = Linear(3, 8, rng=rng, std=0.5), Dropout(dropout)
        self.outer = Linear(8, 1, rng=rng, std=0.5)
        self.astype(np.float64)
        if frozen:
            for layer in ("weight", "bias"):
                setattr(self.inner, layer, Tensor(getattr(self.inner, layer).data))

    def forward(self, x):
        return self.outer(self.dropout(self.inner(Tensor(x)))).reshape(-1)


def squared(model, x, y, num_targets):
    error = model(x) - Tensor(y)
    return (error * error).sum() / num_targets


def points(step):
    x = np.random.default_rng(step).standard_normal((6, 3))
    return x, x @ [1, -2, 0.5]


def test_an_optimizer_of_another_model_is_refused():
    models = [gpt2() for _ in range(2)]
    with pytest.raises(Error, match="the optimizer has no parameter of the model"):
        fit(models[0], some_ids, 1, optimizer=AdamW(models[1], 1e-3))


def test_an_optimizer_of_your_own_is_a_subclass():
    class Descent(AdamW):
        def step(self):
            for _, parameter in self.parameters:
                parameter.data -= self.lr * parameter.grad

    model = Net(np.random.default_rng(0))
    arguments = dict(loss_fn=squared, count=lambda batch: len(batch[0]))
    records = fit(model, points, 50, optimizer=Descent(model, 0.05), **arguments)
    assert records[-1]["loss"] < records[0]["loss"] / 5
    with pytest.raises(Error, match=r"optimizer is a Net: give .* or a subclass with its own step\(\)"):
        fit(model, points, optimizer=model, **arguments)


def test_fit_trains_a_language_model_on_arrays():
    model, seen = gpt2(), []
    records = fit(model, some_ids, steps=30, lr=1e-2, on_step=lambda *args: seen.append(args))
    assert [record["step"] for record in records] == list(range(1, 31))
    assert records[-1]["loss"] < records[0]["loss"] / 2
    assert all(record.keys() == {"step", "loss", "lr", "grad_norm"} for record in records)
    assert [record for _, _, record in seen] == records
    assert all(args[0] is model and isinstance(args[1], AdamW) for args in seen)


def test_fit_trains_a_module_with_a_loss_fn():
    model = Net(np.random.default_rng(0))
    records = fit(model, points, 200, 1e-2, loss_fn=squared, count=lambda batch: len(batch[0]))
    assert records[-1]["loss"] < records[0]["loss"] / 20


def test_a_batch_may_be_one_array():
    def loss_fn(model, x, num_targets):
        return (model(x) * model(x)).sum() / num_targets

    model = Net(np.random.default_rng(0))
    records = fit(model, lambda step: points(step)[0], 20, 1e-2, loss_fn=loss_fn, count=len)
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_do_not_change_the_result(micro_batch):
    found = []
    for size in (None, micro_batch):
        model = Net(np.random.default_rng(0))
        fit(model, points, 5, loss_fn=squared, count=lambda batch: len(batch[0]), micro_batch=size)
        found.append(model.outer.weight.data)
    assert found[0] == pytest.approx(found[1], rel=1e-10)


def test_frozen_parameters_do_not_change():
    model = Net(np.random.default_rng(0), frozen=True)
    before = model.inner.weight.data.copy()
    records = fit(model, lambda step: points(0), 20, 1e-2, loss_fn=squared)
    assert np.array_equal(model.inner.weight.data, before)
    assert records[-1]["loss"] < records[0]["loss"]


def test_learning_rate_of_the_argument_the_schedule_and_the_optimizer():
    rate = warmup_cosine(1e-2, 0.0, 1e-3, 2, 5)
    for lr, optimizer, expected in [
        (None, None, [3e-4] * 5),
        (1e-3, None, [1e-3] * 5),
        (rate, None, [rate(step) for step in range(5)]),
        (None, 0.5, [0.5] * 5),
        (0.25, 0.5, [0.25] * 5),
    ]:
        model = gpt2()
        made = None if optimizer is None else AdamW(model, optimizer)
        records = fit(model, some_ids, 5, lr, optimizer=made)
        assert [record["lr"] for record in records] == expected


def test_dropout_is_on_and_the_modes_are_restored():
    def is_on(model, *_):
        assert model.dropout.training and model.inner.training

    for training in (True, False):
        model = Net(np.random.default_rng(0), dropout=0.5).train(training)
        model.inner.training = not training
        fit(model, points, 2, loss_fn=squared, on_step=is_on)
        assert model.dropout.training is training
        assert model.inner.training is not training


def test_dropout_depends_on_the_seed():
    def losses(**options):
        model = Net(np.random.default_rng(0), dropout=0.5)
        return [record["loss"] for record in fit(model, points, 3, loss_fn=squared, **options)]

    random.manual_seed(99)
    first = losses()
    assert losses() == first
    assert losses(seed=1) != first


def test_a_run_resumed_at_its_first_step_is_that_run():
    """Its dropout masks and its schedule, too."""
    rate, arguments = warmup_cosine(1e-2, 0.0, 1e-3, 2, 5), dict(loss_fn=squared, count=lambda batch: 6)
    whole, begun = (Net(np.random.default_rng(0), dropout=0.5) for _ in range(2))
    records = fit(whole, points, 5, rate, **arguments)
    first = AdamW(begun, 1e-2)
    fit(begun, points, 2, rate, optimizer=first, **arguments)
    resumed = Net(np.random.default_rng(1), dropout=0.5)
    resumed.load_state_dict(begun.state_dict())
    second = AdamW(resumed, 1e-2)
    second.load_state_dict(first.state_dict())
    assert fit(resumed, points, 3, rate, optimizer=second, first_step=2, **arguments) == records[2:]
    for name, array in whole.state_dict().items():
        assert np.array_equal(resumed.state_dict()[name], array), name


def test_a_loss_that_is_not_finite_raises_before_the_update():
    model, weights = Net(np.random.default_rng(0)), []

    def broken(step):
        x, y = points(step)
        return (x, y * math.nan) if step == 2 else (x, y)

    def note(model, *_):
        weights.append(model.outer.weight.data.copy())

    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        fit(model, broken, 5, loss_fn=squared, count=lambda batch: len(batch[0]), on_step=note)
    assert len(weights) == 2
    assert np.array_equal(model.outer.weight.data, weights[1])


def test_weights_that_an_update_made_not_finite_raise():
    model = Net(np.random.default_rng(0))
    optimizer = AdamW(model, 1e308, weight_decay=10.0)
    with pytest.raises(FloatingPointError, match="the weights after step 1 are not finite: use a smaller lr"):
        fit(model, points, 1, loss_fn=squared, count=lambda batch: len(batch[0]), optimizer=optimizer)


def test_in_float16_a_step_that_overflows_is_skipped(monkeypatch):
    """The scale is halved until the gradients are finite."""
    monkeypatch.setattr(loop, "compute_dtype", lambda: np.dtype(np.float16))
    monkeypatch.setattr(LossScale, "seed", lambda scale, loss: np.full_like(loss.data, scale.scale * 1e300))
    model = Net(np.random.default_rng(0))
    before = model.outer.weight.data.copy()
    records = fit(model, points, 2, loss_fn=lambda *args, **kw: squared(*args, **kw) * 1e8)
    assert all(math.isfinite(record["loss"]) and not math.isfinite(record["grad_norm"]) for record in records)
    assert np.array_equal(model.outer.weight.data, before)


# Refusals


def ignored(step):
    ids, targets = some_ids(step)
    return ids, np.full_like(targets, -100)


REFUSED = [
    (dict(batch_at=some_ids(0)), "batch_at is a tuple"),
    (dict(seed=-1), "seed is -1"),
    (dict(clip=0.0), r"clip 0\.0"),
    (dict(clip=None), "clip None"),
    (dict(seed=2**64), "18446744073709551616"),
    (dict(optimizer="adam"), "optimizer is a str"),
    (dict(count=3), "count is a int"),
    (dict(loss_fn="mse"), "loss_fn is a str"),
    (dict(on_step=[]), "on_step is a list"),
    (dict(batch_at=lambda step: (*some_ids(step), np.ones((4, 6)))), "float64, not targets"),
    (dict(steps=0), "steps is 0"),
    (dict(steps=2.5), "steps is 2.5"),
    (dict(micro_batch=0), "micro_batch is 0"),
    (dict(micro_batch=1.5), "micro_batch is 1.5"),
    (dict(lr=-1e-3), "learning rate of step 0 is -0.001"),
    (dict(lr="fast"), "'fast'"),
    (dict(lr=lambda step: math.nan), "nan"),
    (dict(batch_at=lambda step: (np.zeros((4, 2), int), np.zeros((3, 2), int))), r"\(4, 2\), \(3, 2\)"),
    (dict(batch_at=lambda step: np.zeros((0, 2), int)), r"\(0, 2\)"),
    (dict(batch_at=lambda step: np.array(3)), r"batch_at\(0\)"),
    (dict(batch_at=lambda step: [[1, 2], [3, 4]]), "list"),
    (dict(batch_at=lambda step: None), "NoneType"),
    (dict(batch_at=lambda step: next(iter(()))), r"batch_at\(0\) has no more data"),
    (dict(first_step=-1), "first_step is -1"),
    (dict(batch_at=lambda step: ()), r"batch_at\(0\)"),
    (dict(batch_at=lambda step: np.zeros((4, 2), int)), "1 arrays"),
    (dict(batch_at=ignored), "no targets"),
    (dict(count=lambda batch: 0), "no targets"),
    (dict(count=lambda batch: -1), "-1"),
    (dict(count=lambda batch: 2.0), "2.0"),
    (dict(count=lambda batch: None), "None"),
    (dict(loss_fn=lambda model, ids, targets, num_targets: 1.0), "float"),
    (dict(loss_fn=lambda model, ids, targets, num_targets: model(ids)), r"\(4, 6, 11\)"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_invalid_arguments_batches_and_losses_are_refused(change, said):
    model = gpt2()
    before = model.state_dict()["wte.weight"].copy()
    with pytest.raises(Error, match=said) as raised:
        fit(model, **{"batch_at": some_ids, **change})
    assert "\n" not in str(raised.value)
    assert np.array_equal(model.state_dict()["wte.weight"], before)


def test_a_model_without_a_loss_or_without_parameters_is_refused():
    with pytest.raises(Error, match="Net has no method loss"):
        fit(Net(np.random.default_rng(0)), points)
    model = Net(np.random.default_rng(0), frozen=True)
    model.outer.weight, model.outer.bias = (Tensor(p.data) for p in (model.outer.weight, model.outer.bias))
    with pytest.raises(Error, match="no parameter to train"):
        fit(model, points, loss_fn=squared)


def test_other_gradients_are_cleared():
    """Those of an earlier backward pass, and of parameters that the optimizer does not have."""
    expected = fit(gpt2(), some_ids, steps=2, lr=1e-3)
    model = gpt2()
    model.loss(*some_ids(7)).backward()
    assert fit(model, some_ids, steps=2, lr=1e-3) == expected
    fit(model, some_ids, steps=2, optimizer=AdamW(model.ln_f, 1e-3))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_step_trains_whatever_on_step_does():
    def sample(model, optimizer, record):
        modes.append(model.training)
        model.eval()

    modes, model = [], gpt2()
    optimizer = AdamW(model, 1e-3)
    fit(model, some_ids, steps=3, lr=lambda step: 1e-3 * (2 - step), optimizer=optimizer, on_step=sample)
    assert modes == [True, True, True]
    assert optimizer.lr == 1e-3  # restored after the schedule

"""Freezing parameters: which ones get gradients, and that other operations are not affected."""

import numpy as np
import pytest
from support.models import EVERYTHING, GEMMA2, GEMMA3, NO_DROPOUT, SMALL, batch, random_model

from tinyllm import Error, GPT2Config, Tensor, nn, no_grad, optim

CONFIGS = {"gpt2": GPT2Config(**SMALL, **NO_DROPOUT), "llama": EVERYTHING, "gemma2": GEMMA2, "gemma3": GEMMA3}
both_models = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@both_models
def test_frozen_parameters_get_no_gradient_and_others_are_unaffected(config):
    model = random_model(config)
    ids, targets = batch(config, (2, 8))
    model.loss(ids, targets).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for kept in expected:
        assert model.requires_grad_(False) is model
        assert not any(parameter.requires_grad for parameter in model.parameters())
        parameter = dict(model.named_parameters())[kept]
        parameter.requires_grad = True
        model.zero_grad()  # frozen parameters, which have no gradient, included
        model.loss(ids, targets).backward()
        assert np.array_equal(parameter.grad, expected[kept]), kept
        assert [name for name, p in model.named_parameters() if p.grad is not None] == [kept]


@both_models
def test_frozen_model_records_no_graph(config):
    model = random_model(config).requires_grad_(False)
    ids, targets = batch(config, (2, 8))
    loss = model.loss(ids, targets)
    assert loss.node is None
    with pytest.raises(Error, match="requires_grad=True"):
        loss.backward()
    assert model.requires_grad_() is model and all(p.requires_grad for p in model.parameters())


@both_models
def test_frozen_model_is_converted_saved_and_loaded(config, tmp_path):
    model = random_model(config).requires_grad_(False)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    model.astype(np.float32).to("cpu").astype(np.float64)
    model.load_state_dict(before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(np.array_equal(array, before[name]) for name, array in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, np.float64)
    assert all(np.array_equal(array, before[name]) for name, array in again.state_dict().items())


def test_freezing_the_embedding_freezes_its_tied_head():
    model = random_model(GPT2Config(**SMALL))
    model.wte.requires_grad_(False)
    model.h[0].requires_grad_(False)
    assert not model.lm_head.weight.requires_grad  # it is tied to the embedding
    thawed = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert thawed == {n for n, _ in model.named_parameters() if not n.startswith(("wte", "h.0."))}


@both_models
def test_training_does_not_change_frozen_parameters(config):
    model = random_model(config).train()
    ids, targets = batch(config, (2, 8))
    model.requires_grad_(False)
    model.lm_head = nn.Linear(12, config.vocab_size, rng=np.random.default_rng(0)).astype(np.float64)
    before = {name: parameter.data.copy() for name, parameter in model.named_parameters()}
    optimizer = optim.AdamW(model, lr=0.1)
    for _ in range(3):
        loss = model.loss(ids, targets)
        loss.backward()
        optim.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not np.array_equal(p.data, before[n])}
    assert moved == {"lm_head.weight", "lm_head.bias"}
    assert model.loss(ids, targets).item() < loss.item()


def test_requires_grad_can_be_set_on_leaves_only():
    leaf = Tensor(np.ones(3))
    leaf.requires_grad = True
    (leaf * 2).sum().backward()
    leaf.requires_grad = True  # no change: the gradient is kept
    assert leaf.grad.tolist() == [2, 2, 2]
    computed = leaf * 2
    for wanted in (True, False):
        with pytest.raises(Error, match="requires_grad"):
            computed.requires_grad = wanted
    leaf.requires_grad = False
    assert leaf.grad is None and not leaf.requires_grad and not (leaf * 2).requires_grad
    with no_grad():
        result = Tensor(np.ones(2), requires_grad=True) * 2
    result.requires_grad = True  # under no_grad it was recorded as a leaf
    assert result.requires_grad
    with pytest.raises(Error, match="int64"):
        Tensor(np.array([1])).requires_grad = True

"""DPO against the formula in plain torch: loss, rewards, every parameter's gradient, and fifty steps."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import (
    EVERYTHING,
    NO_DROPOUT,
    ROPES,
    SMALL,
    SMALL_LLAMA,
    Wrapped,
    assert_close,
    configs,
    llama_configs,
    our_gradients,
    random_model,
)

from parity.ops import cases
from parity.twins import bridge
from tinyllm import Error, GPT2Config, LlamaConfig, nn, optim, training
from tinyllm.training.preference import answer_log_probs, dpo_loss, preferences
from tinyllm.training.step import accumulate_gradients

IGNORED, BETA = -100, 0.3
CONFIG = GPT2Config(**SMALL, **NO_DROPOUT)


def pairs(config, count, length, seed=0):
    """Ids and targets (P, 2, T): prompts of different lengths, answers, and padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (count, 2, length))
    targets = np.full_like(ids, IGNORED)
    for pair in range(count):
        first = rng.integers(0, length)
        for answer in range(2):
            last = rng.integers(first + 1, length + 1)
            targets[pair, answer, first:last] = rng.integers(0, config.vocab_size, last - first)
    return ids, targets


def torch_log_probs(twin, ids, targets, mean):
    """log π (P, 2) by log_softmax over all logits, of each answer alone: without padding."""
    found = []
    for row, target in zip(ids.reshape(-1, ids.shape[-1]), targets.reshape(-1, ids.shape[-1])):
        counted = np.flatnonzero(target != IGNORED)
        log_probs = twin(torch.from_numpy(row[None, : counted[-1] + 1])).log_softmax(-1)[0]
        of_tokens = log_probs[counted, target[counted]]
        found.append(of_tokens.sum() / (len(counted) if mean else 1))
    return torch.stack(found).view(-1, 2)


def torch_dpo(log_probs, reference, beta):
    """Losses (P,) and rewards (P, 2), as the formula stands in the paper."""
    rewards = beta * (log_probs - reference)
    return -TF.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


def check(model, ids, targets, reference, beta, mean):
    twin = bridge.to_torch(model)
    loss = dpo_loss(model, ids, targets, reference, len(ids), beta=beta, mean=mean)
    loss.backward()
    theirs = torch_log_probs(twin, ids, targets, mean)
    losses, rewards = torch_dpo(theirs, torch.from_numpy(reference), beta)
    losses.mean().backward()
    assert_close(np.array(loss.item()), losses.mean(), "loss")
    found = preferences(answer_log_probs(model, ids, targets, mean), reference, beta)
    assert_close(found.rewards, rewards, "rewards")
    assert_close(found.losses, losses, "losses")
    expected = {name: parameter.grad.numpy() for name, parameter in twin.named_parameters()}
    # The gradients of two equal answers cancel, to rounding errors.
    largest = max(beta, *(np.abs(grad).max() for grad in expected.values()))
    for name, parameter in model.named_parameters():
        assert np.abs(parameter.grad - expected[name]).max() <= 1e-10 * largest, name


def test_a_model_with_a_forward_of_its_own_is_refused():
    model = random_model(CONFIG)
    plain = type(model)

    class Scaled(plain):
        def forward(self, ids, **options):
            return super().forward(ids, **options) * 2

    model.__class__ = Scaled
    ids, targets = pairs(CONFIG, 2, 6)
    for call in (answer_log_probs, partial(dpo_loss, reference=np.zeros((2, 2)), num_targets=2)):
        with pytest.raises(Error, match=r"Scaled\.forward is overridden.*head_logits"):
            call(model, ids, targets)


def test_head_logits_of_its_own_are_used():
    model = random_model(CONFIG)
    model.head_logits = lambda h: type(model).head_logits(model, h) * 0.5
    ids, targets = pairs(CONFIG, 2, 6)
    logits = torch.from_numpy(model(ids.reshape(4, 6)).data).log_softmax(-1)
    kept = targets.reshape(4, 6) != IGNORED
    rows = [logits[i][kept[i], targets.reshape(4, 6)[i][kept[i]]].sum().item() for i in range(4)]
    assert_close(answer_log_probs(model, ids, targets), np.array(rows).reshape(2, 2), "log-probabilities")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_loss_rewards_and_gradients_equal_the_formula(data):
    config = data.draw(configs() | llama_configs())
    seed, mean = data.draw(st.integers(0, 1000)), data.draw(st.booleans())
    beta = data.draw(st.sampled_from([0.01, 0.1, 1.0]))
    ids, targets = pairs(config, data.draw(st.integers(1, 3)), config.context, seed)
    reference = np.random.default_rng(seed).normal(-9, 3, (len(ids), 2))
    check(random_model(config), ids, targets, reference, beta, mean)


@pytest.mark.parametrize("mean", [False, True])
def test_a_head_that_is_not_fused_gives_the_same(mean):
    ids, targets = pairs(CONFIG, 2, 8)
    reference = np.full((2, 2), -9.0)
    plain, wrapped = random_model(CONFIG), random_model(CONFIG)
    nn.replace(wrapped, "lm_head", lambda name, layer: Wrapped(layer))
    losses = [dpo_loss(model, ids, targets, reference, 2, mean=mean) for model in (plain, wrapped)]
    for loss in losses:
        loss.backward()
    assert abs(losses[0].item() - losses[1].item()) < 1e-12
    for (name, ours), (_, theirs) in zip(plain.named_parameters(), wrapped.named_parameters()):
        assert_close(ours.grad, theirs.grad, name)


def test_the_model_is_indifferent_before_the_first_step():
    model = random_model(CONFIG)
    ids, targets = pairs(CONFIG, 4, 8)
    reference = answer_log_probs(model, ids, targets)
    assert dpo_loss(model, ids, targets, reference, 4).item() == pytest.approx(np.log(2), rel=1e-15)
    assert not preferences(reference, reference, 0.1).rewards.any()


@pytest.mark.parametrize("margin", [0.0, 1.0, -1.0, 40.0, -40.0, 1e4, -1e4])
def test_the_loss_is_exact_for_every_margin(margin):
    found = preferences([[margin, 0.0]], np.zeros((1, 2)), 1.0)
    z = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    expected = -TF.logsigmoid(z)
    expected.backward()
    assert found.losses[0] == pytest.approx(expected.item(), rel=1e-14)
    assert found.slopes[0] == pytest.approx([z.grad.item(), -z.grad.item()], rel=1e-14)


def gradients(model, batch, micro_batch):
    loss_fn = partial(dpo_loss, beta=BETA)
    scale = optim.NoLossScale()
    model.zero_grad()
    loss = accumulate_gradients(model, batch, len(batch[0]), loss_fn, micro_batch, scale, 0, 0)
    return loss, our_gradients(model)


LONG_ROPE = LlamaConfig(**SMALL_LLAMA | dict(max_position_embeddings=8), rope_parameters=ROPES["longrope"])


@pytest.mark.parametrize("config", [CONFIG, EVERYTHING, LONG_ROPE], ids=["gpt2", "llama", "longrope"])
def test_micro_batches_order_and_padding_do_not_change_the_loss(config):
    model = random_model(config)
    ids, targets = pairs(config, 6, 6)
    reference = np.random.default_rng(1).normal(-9, 3, (6, 2))
    batch = ids, targets, reference
    loss, expected = gradients(model, batch, None)
    order = [4, 0, 5, 3, 1, 2]
    widths = ((0, 0), (0, 0), (0, 2))
    padded = np.pad(ids, widths, constant_values=7), np.pad(targets, widths, constant_values=IGNORED)
    others = {
        "micro-batches": (batch, 2),
        "another order": (tuple(array[order] for array in batch), 3),
        "padding": ((*padded, reference), None),
    }
    for what, (other, micro_batch) in others.items():
        found, grads = gradients(model, other, micro_batch)
        assert abs(found - loss) <= 1e-12 * loss, what
        for name in expected:
            assert_close(grads[name], expected[name], f"{name}, {what}", 1e-11)


STEPS, PAIRS, PEAK_LR, MIN_LR, WARMUP, DECAY, CLIP = 50, 6, 1e-3, 1e-4, 10, 0.1, 1.0


@pytest.mark.proof("GPT2")
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
def test_fifty_dpo_steps_equal_torchs(mean):
    """Micro-batches, clipping, AdamW and the schedule; the reference is that of the first weights."""
    model = random_model(CONFIG)
    twin = bridge.to_torch(model)
    data = [pairs(CONFIG, PAIRS, 8, seed) for seed in range(3)]
    ours = [answer_log_probs(model, *each, mean) for each in data]
    theirs = [torch_log_probs(twin, *each, mean).detach() for each in data]
    records = training.fit(
        model,
        lambda step: (*data[step % 3], ours[step % 3]),
        STEPS,
        optim.warmup_cosine(PEAK_LR, 0.0, MIN_LR, WARMUP, STEPS),
        partial(dpo_loss, beta=BETA, mean=mean),
        count=lambda batch: len(batch[0]),
        micro_batch=2,
        optimizer=optim.AdamW(model, PEAK_LR, weight_decay=DECAY),
        clip=CLIP,
    )

    groups = [
        {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas, eps = optim.AdamW(model, PEAK_LR).betas, optim.AdamW(model, PEAK_LR).eps
    optimizer = torch.optim.AdamW(groups, PEAK_LR, betas, eps)
    lr_at = optim.warmup_cosine(PEAK_LR, 0.0, MIN_LR, WARMUP, STEPS)
    for step, record in enumerate(records):
        ids, targets = data[step % 3]
        losses, _ = torch_dpo(torch_log_probs(twin, ids, targets, mean), theirs[step % 3], BETA)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        optimizer.step()
        found = record["loss"], losses.mean().item()
        cases.assert_close(*map(np.asarray, found), f"loss of step {step + 1}", 1e-9, 0.0)
    for name, parameter in twin.named_parameters():
        ours = dict(model.named_parameters())[name].data
        cases.assert_close(ours, parameter.detach().numpy(), f"{name} after step {STEPS}", 1e-9, 0.0)
    assert records[0]["loss"] == pytest.approx(np.log(2)) and records[-1]["loss"] < 0.5

"""Fifty steps of training a classifier, in tinyllm and in torch, from the same weights on the same texts.

Texts of different lengths, padded to the longest of the batch; AdamW with weight decay of the matrices,
clipping, warm-up, cosine decay, and micro-batches with different numbers of targets. torch's side is the
twin with torch's own loss, optimiser, clipping and schedules; ``fit`` is ours.
"""

import functools

import numpy as np
import pytest
import torch
from support.models import EVERYTHING, NO_DROPOUT, SMALL, random_model

from parity.ops.cases import assert_close
from parity.twins import bridge
from tinyllm import GPT2Config, optim
from tinyllm.models import SequenceClassifier
from tinyllm.training import fit

STEPS, WARMUP, PEAK_LR, INITIAL_LR, MIN_LR, DECAY, CLIP = 50, 10, 1e-2, 1e-4, 1e-3, 0.1, 0.5
BETAS, EPS = (0.9, 0.999), 1e-8
ROWS, LABELS = 6, ("a", "b", "c")
CONFIGS = {"gpt2": GPT2Config(**SMALL, **NO_DROPOUT), "llama": EVERYTHING}


def batch_at(step):
    """Ids (6, T), lengths and targets (6,) of one step; every third step has the same."""
    rng = np.random.default_rng(step % 3)
    lengths = rng.integers(1, 9, ROWS)
    ids = rng.integers(1, SMALL["vocab_size"], (ROWS, lengths.max()))
    ids[np.arange(lengths.max()) >= lengths[:, None]] = 0
    targets = ids[np.arange(ROWS), lengths - 1] % 3  # of the last real token
    return ids, lengths, np.where(np.arange(ROWS) == step % 3, -100, targets)


def classifier(config):
    model = SequenceClassifier(random_model(config), LABELS, np.random.default_rng(0))
    return model.astype(np.float64).train()


def tinyllm_run(model, micro_batch):
    losses, norms, parameters = [], [], []

    def keep(model, optimizer, record):
        losses.append(record["loss"])
        norms.append(record["grad_norm"])
        parameters.append({name: p.data.copy() for name, p in model.named_parameters()})

    lr_at = optim.warmup_cosine(PEAK_LR, INITIAL_LR, MIN_LR, WARMUP, STEPS)
    optimizer = optim.AdamW(model, PEAK_LR, BETAS, EPS, DECAY)
    loss = lambda model, *rows, num_targets: model.loss(*rows, num_targets=num_targets)  # noqa: E731
    fit(model, batch_at, STEPS, lr_at, loss, None, micro_batch, optimizer, keep, clip=CLIP)
    return losses, norms, parameters


@functools.cache
def torch_run(name):
    twin = bridge.to_torch(classifier(CONFIGS[name]))
    groups = [
        {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, PEAK_LR, BETAS, EPS)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, INITIAL_LR / PEAK_LR, total_iters=WARMUP)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP, MIN_LR)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [WARMUP])
    losses, norms, parameters = [], [], []
    for step in range(STEPS):
        ids, lengths, targets = map(torch.from_numpy, batch_at(step))
        loss = torch.nn.functional.cross_entropy(twin(ids, lengths), targets)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP).item())
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        parameters.append({name: p.detach().numpy().copy() for name, p in twin.named_parameters()})
    return losses, norms, parameters


@pytest.mark.proof("SequenceClassifier")
@pytest.mark.parametrize(("name", "micro_batch"), [("gpt2", None), ("gpt2", 2), ("llama", 2)])
def test_fifty_steps_of_classification_equal_torchs(name, micro_batch):
    ours, theirs = tinyllm_run(classifier(CONFIGS[name]), micro_batch), torch_run(name)
    for what, mine, other in zip(("losses", "gradient norms"), ours, theirs):
        assert_close(np.array(mine), np.array(other), what, 1e-9, 0.0)
    for step, (mine, other) in enumerate(zip(ours[2], theirs[2], strict=True), 1):
        assert mine.keys() == other.keys()
        for each in mine:
            assert_close(mine[each], other[each], f"{each} after step {step}", 1e-9, 0.0)


def test_the_run_learns_clips_and_pads():
    losses, norms, _ = torch_run("gpt2")
    assert losses[-1] < losses[0] / 2 and 0 < sum(norm > CLIP for norm in norms) < STEPS
    assert all(len({*batch_at(step)[1]}) > 2 for step in range(3))

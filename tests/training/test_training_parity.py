"""Fifty training steps of tinyllm and of torch from the same weights on the same batches.

AdamW, or Muon for the hidden matrices, with weight decay of the matrices, clipping, warm-up, cosine decay,
and steps of three micro-batches with different numbers of targets. torch's side is the model of
``transformers``, or the twin with LoRA, with torch's own loss, optimizers, clipping and schedules.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from support.models import EVERYTHING, NO_DROPOUT, random_gpt2, random_llama, random_model

from parity.ops.cases import assert_close
from parity.twins import bridge
from parity.twins.lora import add_lora
from tinyllm import GPT2Config, nn, optim

STEPS, WARMUP, PEAK_LR, INITIAL_LR, MIN_LR, DECAY, CLIP = 50, 10, 1e-2, 1e-4, 1e-3, 0.1, 1.0
BETAS, EPS = (0.9, 0.99), 1e-8
CONFIG = GPT2Config(vocab_size=17, n_positions=8, n_embd=12, n_layer=2, n_head=3, **NO_DROPOUT)
LLAMA = replace(EVERYTHING, vocab_size=CONFIG.vocab_size)
UNTIED = GPT2Config(**vars(CONFIG) | dict(tie_word_embeddings=False))


@dataclass(frozen=True)
class Step:
    loss: float
    grad_norm: float  # before clipping
    parameters: dict[str, np.ndarray]  # those trained, after the update, in the checkpoint's layout


def micro_batches(step: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and targets of one step, (2, 8) each; every third step has the same."""
    rng = np.random.default_rng(step % 3)
    batches = []
    for share in (0.1, 0.5, 1.0):  # of targets that are not -100
        ids, targets = rng.integers(0, CONFIG.vocab_size, (2, 2, 8))
        targets[rng.random(targets.shape) > share] = -100
        targets[0, 0] = 0  # at least one target
        batches.append((ids, targets))
    return batches


def counted(batches) -> int:
    return sum(int((targets != -100).sum()) for _, targets in batches)


def start(config: GPT2Config, dtype):
    """The model that both sides start from: random_gpt2's float64 weights, in ``dtype``."""
    return random_gpt2(config).astype(dtype).train()


def tinyllm_run(model, kind=optim.AdamW) -> list[Step]:
    optimizer = kind(model, PEAK_LR, BETAS, EPS, DECAY)
    lr_at = optim.warmup_cosine(PEAK_LR, INITIAL_LR, MIN_LR, WARMUP, STEPS)
    trained, steps = {name for name, p in model.named_parameters() if p.requires_grad}, []
    for step in range(STEPS):
        batches, loss = micro_batches(step), 0.0
        for ids, targets in batches:
            part = model.loss(ids, targets, num_targets=counted(batches))
            part.backward()
            loss += part.item()
        norm = optim.clip_grad_norm(model, CLIP)
        optimizer.lr = lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
        arrays = model.state_dict()
        steps.append(Step(loss, norm, {name: arrays[name].copy() for name in arrays if name in trained}))
    return steps


def torch_run(model, **how) -> list[Step]:
    """The same with the ``transformers`` model with the weights of ``model``."""
    theirs = bridge.to_transformers(model)
    return torch_steps(theirs, lambda ids: theirs(ids).logits, f"{theirs.base_model_prefix}.", **how)


def schedule_of(optimizer):
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, INITIAL_LR / PEAK_LR, total_iters=WARMUP)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP, MIN_LR)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [WARMUP])


def torch_steps(theirs, logits_of, prefix="", by_muon=()) -> list[Step]:
    """The steps of a model of torch, whose parameters' names may begin with ``prefix``.

    ``by_muon`` are the names, without the prefix, of those that Muon updates.
    """
    trained = {n.removeprefix(prefix): p for n, p in theirs.train().named_parameters() if p.requires_grad}
    others = [p for name, p in trained.items() if name not in by_muon]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, PEAK_LR, BETAS, EPS)]
    if by_muon:
        matrices = [trained[name] for name in by_muon]
        how = dict(weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
        optimizers.append(torch.optim.Muon(matrices, PEAK_LR, **how))
    schedules = [schedule_of(optimizer) for optimizer in optimizers]
    steps = []
    for step in range(STEPS):
        # Accumulation as it should be: the mean over all targets of the step that count, in one graph.
        batches = [[torch.from_numpy(array) for array in batch] for batch in micro_batches(step)]
        logits = torch.cat([logits_of(ids) for ids, _ in batches]).flatten(0, 1)
        targets = torch.cat([targets for _, targets in batches]).flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100)
        theirs.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        for each in (*optimizers, *schedules):
            each.step()
        parameters = {name: p.detach().numpy().copy() for name, p in trained.items()}
        steps.append(Step(loss.item(), norm.item(), parameters))
    return steps


@functools.cache
def reference(config: GPT2Config = CONFIG, dtype=np.float64) -> list[Step]:
    return torch_run(start(config, dtype))


def check_run(ours: list[Step], theirs: list[Step], relative: float) -> None:
    """Assert that loss, gradient norm and every parameter agree at every step."""
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for name in ("loss", "grad_norm"):
            pair = (np.array(getattr(step, name)) for step in (mine, other))
            assert_close(*pair, f"{name} of step {number}", relative, 0.0)
        assert mine.parameters.keys() == other.parameters.keys()
        for name, parameter in other.parameters.items():
            assert_close(mine.parameters[name], parameter, f"{name} after step {number}", relative, 0.0)


@pytest.mark.proof("GPT2")
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_fifty_training_steps_equal_torchs(config):
    check_run(tinyllm_run(start(config, np.float64)), reference(config), 1e-9)


@pytest.mark.proof("Llama")
def test_fifty_training_steps_of_llama_equal_torchs():
    model = random_llama(LLAMA).train()
    theirs = torch_run(model)
    check_run(tinyllm_run(model), theirs, 1e-9)
    assert theirs[-1].loss < theirs[0].loss / 2


@pytest.mark.proof("Llama")
def test_fifty_training_steps_with_muon_equal_torchs(monkeypatch):
    """torch.optim.Muon orthogonalises in bfloat16; here its cast is replaced by a copy, so in float64."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    model = random_llama(LLAMA).train()
    matrices = optim.Muon(model).hidden
    assert {name.split(".")[-2] for name in matrices} == {f"{p}_proj" for p in "q k v o gate up down".split()}
    theirs = torch_run(model, by_muon=matrices)
    check_run(tinyllm_run(model, optim.Muon), theirs, 1e-9)
    assert theirs[-1].loss < theirs[0].loss / 2


@pytest.mark.proof("LoRA")
@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])
def test_fifty_steps_of_lora_equal_torchs(config):
    model, twin = random_model(config).train(), bridge.to_torch(random_model(config))
    heads = {"modules_to_save": ["lm_head"]} if config is LLAMA else {}  # one that is not tied
    nn.add_lora(model, rank=4, alpha=12, **heads, rng=0)
    theirs = torch_steps(add_lora(twin, model), twin)
    check_run(tinyllm_run(model), theirs, 1e-9)
    assert theirs[-1].loss < 0.8 * theirs[0].loss


def test_the_curves_in_float32_equal_torchs():
    ours, theirs = tinyllm_run(start(CONFIG, np.float32)), reference(CONFIG, np.float32)
    for name in ("loss", "grad_norm"):
        mine, other = ([getattr(step, name) for step in run] for run in (ours, theirs))
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=0, err_msg=name)


def test_the_run_clips_learns_and_updates_every_parameter():
    run = reference()
    clipped = sum(step.grad_norm > CLIP for step in run)
    assert 0 < clipped < STEPS
    assert run[-1].loss < run[0].loss / 2
    counts = [[counted([batch]) for batch in micro_batches(step)] for step in range(3)]
    assert all(0 < few < half < whole for few, half, whole in counts)
    began = start(CONFIG, np.float64).state_dict()
    for name, parameter in run[-1].parameters.items():
        assert np.abs(parameter - began[name]).max() > 1e-2, name

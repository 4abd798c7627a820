"""Fine-tuning on instructions against torch: the masked loss, all gradients, and 50 steps of a run.

torch's side knows nothing of batches: it gets every conversation alone, with ids and a mask that were written
by hand (``support/instructions.py``), and divides by the number of learned tokens of the step.
"""

import numpy as np
import pytest
import torch
from support.chat_model import write_model
from support.instructions import CHATS, options, reference, render_in_process, write_parts
from support.runs import no_pictures

from parity.ops.cases import assert_close
from parity.twins import bridge, lora
from tinyllm import load_model
from tinyllm.data.batches import Batches
from tinyllm.nn import merge_lora
from tinyllm.optim import NoLossScale
from tinyllm.training.run import run_task
from tinyllm.training.step import accumulate_gradients
from tinyllm.training.tasks.instruct import InstructionTuning

STEPS, WARMUP, BATCH, DECAY, CLIP, LR = 50, 5, 4, 0.01, 1.0, 1e-2
TRAINED = CHATS[:-3]
LENGTHS = np.array([len(reference(messages)[0]) - 1 for messages in TRAINED])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folders of a random chat model and of the conversations."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "model").mkdir()
    return write_model(folder / "model"), write_parts(folder / "data")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    no_pictures(monkeypatch)
    render_in_process(monkeypatch)
    monkeypatch.setattr(InstructionTuning, "sample", lambda *_: None)


def started(files, out, **changes):
    """A task with its data and its model, without a run."""
    task = InstructionTuning(options(*files, out, **changes))
    task.check()
    task.load(out, {})
    return task, task.model()


def torch_loss(twin, chats):
    """The mean loss of the learned tokens of some conversations, each on its own."""
    total, count = 0.0, 0
    for messages in chats:
        ids, learned = reference(messages)
        losses = torch.nn.functional.cross_entropy(
            twin(torch.tensor(ids[None, :-1]))[0], torch.tensor(ids[1:]), reduction="none"
        )
        total = total + losses[torch.tensor(learned[1:])].sum()
        count += int(learned[1:].sum())
    return total / count


def same_start(files, model, train):
    """The twin of a model that a task has prepared."""
    if train != "lora":
        return bridge.to_torch(model)
    return lora.add_lora(bridge.to_torch(load_model(files[0], np.float64).train()), model)


@pytest.mark.proof("Llama")
@pytest.mark.parametrize("train", ["all", "lora"])
@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_the_masked_loss_and_all_gradients_equal_torchs(files, tmp_path, train, pack):
    whole = dict(batch=len(TRAINED), micro_batch=None, max_length=150)
    task, model = started(files, tmp_path, train=train, pack=pack, **whole)
    if train == "lora":  # B = 0 hides errors in A's gradient
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.data[...] = 0.1 * np.random.default_rng(0).standard_normal(parameter.shape)
    twin = same_start(files, model, train)
    batch = task.batch_at(0)
    assert len(batch[0]) == (len(TRAINED) if not pack else len(task.train_rows)) and len(batch) == 2 + pack
    loss = accumulate_gradients(model, batch, task.count(batch), task.loss, 3, NoLossScale(), 0, 0)
    expected = torch_loss(twin, TRAINED)
    expected.backward()
    assert_close(np.array(loss), np.array(expected.item()), "loss", 1e-10)
    theirs = {name: p.grad.numpy() for name, p in twin.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, f"gradient of {name}", 1e-10)


@pytest.mark.proof("Llama")
@pytest.mark.parametrize("train", ["all", "lora"])
def test_fifty_steps_on_instructions_equal_torchs(files, tmp_path, train):
    config = options(
        *files, tmp_path / "run", train=train, steps=STEPS, warmup=WARMUP, batch=BATCH, lr=LR,
        weight_decay=DECAY, clip=CLIP, eval_every=STEPS,
    )  # fmt: skip
    _, begun = started(files, tmp_path, train=train)
    twin = same_start(files, begun, train)
    trained = {name for name, p in begun.named_parameters() if p.requires_grad}
    parameters = {name: p for name, p in twin.named_parameters() if name in trained}
    before = {name: p.detach().numpy().copy() for name, p in twin.named_parameters()}
    records = []
    model = run_task(InstructionTuning(config), progress=False, callback=records.append)
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LR, (0.9, 0.999), 1e-8)
    batches = Batches(_Numbers(), BATCH, config.seed, LENGTHS)
    assert records[0]["val_loss"] == pytest.approx(torch_loss(twin, CHATS[-3:]).item(), rel=1e-9)
    for step, record in enumerate(records[1:]):
        for group in optimizer.param_groups:
            group["lr"] = record["lr"]
        loss = torch_loss(twin, [TRAINED[i] for i in batches.at(step)])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step()
        for key, theirs in (("train_loss", loss), ("grad_norm", norm)):
            assert_close(np.array(record[key]), np.array(theirs.item()), f"{key} of step {step}", 1e-9, 0.0)
    assert len(records) == STEPS + 1
    assert records[-1]["val_loss"] == pytest.approx(torch_loss(twin, CHATS[-3:]).item(), rel=1e-9)
    for name, parameter in model.named_parameters():
        theirs = twin.get_parameter(name).detach().numpy()
        assert_close(parameter.data, theirs, f"{name} after the last step", 1e-9, 0.0)
        assert np.array_equal(parameter.data, before[name]) == (name not in trained), name


class _Numbers:
    """The indices themselves, in place of the examples."""

    def __len__(self):
        return len(TRAINED)

    def __getitem__(self, indices):
        return indices


def test_a_fine_tuned_model_loads_from_its_run_and_merges(files, tmp_path):
    config = options(*files, tmp_path / "run", steps=3)
    model = run_task(InstructionTuning(config), progress=False).eval()
    ids = reference(CHATS[0])[0][None]
    logits = model(ids).data
    loaded = load_model(tmp_path / "run", np.float64)
    assert np.array_equal(loaded(ids).data, logits)
    merge_lora(loaded)
    assert np.abs(loaded(ids).data - logits).max() <= 1e-12 * np.abs(logits).max()

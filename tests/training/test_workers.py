"""Processes forked on one machine train exactly what one process does."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from support.device_array import DeviceArray
from support.mixtures import MIXTRAL
from support.processes import Job, batch_at, check_equal, start, trained
from support.runs import left, records, stopped_after, tiny, val_losses

from tinyllm import GPT2, GPT2Config, generate, nn
from tinyllm.backend import distributed, forked
from tinyllm.backend.threads import in_task
from tinyllm.cli import main
from tinyllm.errors import Error
from tinyllm.models import Mixtral
from tinyllm.optim import AdamW, LossScale
from tinyllm.tensor import Tensor
from tinyllm.training import fit, workers
from tinyllm.training.checkpoint import verify
from tinyllm.training.config import TrainConfig
from tinyllm.training.run import open_run_device
from tinyllm.training.run_folder import begun_config
from tinyllm.training.step import accumulate_gradients, language_model_loss
from tinyllm.training.tasks.pretrain import train
from tinyllm.training.workers import Workers, suitable_number
from tinyllm.weights.runs import last_checkpoint

pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.skipif(not forked.can_fork(), reason="processes are forked on Linux only"),
]


def children():
    """The PIDs of this process's children."""
    found = f"/proc/self/task/{os.getpid()}/children"
    with open(found, encoding="ascii") as file:
        return file.read().split()


JOBS = [Job(model, dtype) for model in ("gpt2", "llama") for dtype in ("float64", "float32")]


@pytest.mark.parametrize("number", [2, 5])
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_fifty_steps_equal_those_of_one_process(job, number):
    """With dropout and clipping, also where batches are smaller than the number of processes."""
    check_equal(job, trained(job, forked=number), trained(job))


def test_a_process_computes_its_share_of_the_rows_if_micro_batches_are_larger():
    job = Job("llama")
    whole = trained(job, micro_batch=12)
    shared = trained(job, forked=3, micro_batch=12)
    check_equal(job, shared, whole)
    same = trained(job, forked=3, micro_batch=4)
    assert list(shared["hashes"]) == list(same["hashes"])
    assert list(shared["hashes"]) != list(whole["hashes"])  # in bits, as rows were added in another order


def test_two_runs_are_bitwise_equal():
    job = Job("gpt2", "float32")
    assert list(trained(job, forked=3)["hashes"]) == list(trained(job, forked=3)["hashes"])


# ------------------------------------------------------------------------------ the gradients of a step


class Branched(nn.Module):
    """A row of zeros does not use all parameters."""

    def __init__(self, rng):
        for name in ("both", "ones", "zeros", "never", "frozen"):
            setattr(self, name, nn.Linear(3, 3, rng=rng).astype("float64"))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        branch = self.ones if x.any() else self.zeros
        return branch(self.frozen(self.both(Tensor(x))))


def sum_of(model, x, num_targets):
    return model(x).sum() / num_targets


@pytest.mark.parametrize(
    "rows", [[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
)
def test_parameters_that_only_some_processes_use_or_none_or_that_are_frozen(rows):
    """The gradients are multiplied by the loss scale, as for float16."""
    model, x = Branched(np.random.default_rng(0)), np.outer([*map(int, rows)], [0.5, -1.5, 2.0])
    optimizer, of_a_step = AdamW(model), (6, sum_of, 2, LossScale(4.0), 0, 0)
    loss = accumulate_gradients(model, (x,), *of_a_step)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with closing(Workers(3, model, optimizer, sum_of)) as replicas:
        for times in (1, 2):  # the second time this process and the workers have gradients of the first one
            shared = accumulate_gradients(model, (x,), *of_a_step, replicas=replicas)
            assert shared == pytest.approx(loss, rel=1e-12)
            found = {name: parameter.grad for name, parameter in model.named_parameters()}
            assert {name.partition(".")[0] for name in expected if found[name] is None} == {"never", "frozen"}
            for name, theirs in expected.items():
                if theirs is not None:
                    np.testing.assert_allclose(found[name], times * theirs, rtol=1e-12)


@pytest.mark.parametrize("failing", [0, 4])
def test_after_an_error_everything_is_computed_here(failing):
    """A row of this process or of a worker fails, while the others may still be computing theirs."""

    def loss_fn(model, x, num_targets):
        if x[0, 0] == failing:
            raise Error("of this row")
        return sum_of(model, x, num_targets)

    before, model, how = children(), Branched(np.random.default_rng(0)), (6, loss_fn, 2, LossScale(1.0), 0, 0)
    x = np.outer(np.arange(6), [1, 2, 3.0])
    with closing(Workers(3, model, AdamW(model), loss_fn)) as replicas:
        with pytest.raises(Error, match="of this row"):
            accumulate_gradients(model, (x,), *how, replicas=replicas)
        assert children() == before
        model.zero_grad()
        found = accumulate_gradients(model, (x + 0.5,), *how, replicas=replicas)
        gradient = model.both.weight.grad
        model.zero_grad()
        assert found == accumulate_gradients(model, (x + 0.5,), *how)
        np.testing.assert_array_equal(gradient, model.both.weight.grad)


def test_weights_that_are_replaced_between_steps_reach_the_workers():
    """As by loading a checkpoint, or by sampling, which joins the matrices of queries, keys and values."""

    def losses(processes):
        model = start(Job("llama", dropout=False))

        def on_step(model, optimizer, record):
            if record["step"] == 2:
                state = {name: 0.9 * array for name, array in model.state_dict().items()}
                model.load_state_dict(state)
            if record["step"] == 4:
                list(generate(model, [1, 2], max_new_tokens=3, temperature=0))
            if record["step"] == 6:
                weight = model.layers[0].mlp.up_proj.weight
                weight.replace(1.1 * weight.data)

        found = fit(model, batch_at, 9, lr=1e-2, on_step=on_step, processes=processes)
        return [record["loss"] for record in found], model.state_dict()

    (ours, weights), (theirs, expected) = losses(3), losses(1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    for name, array in expected.items():
        np.testing.assert_allclose(weights[name], array, rtol=1e-9)


def test_weights_of_another_shape_are_refused():
    def on_step(model, optimizer, record):
        model.wpe.weight.replace(np.zeros((3, 12)))

    with pytest.raises(Error, match=r"\(3, 12\)"):
        fit(start(Job()), batch_at, 2, on_step=on_step, processes=2)


# --------------------------------------------------------------------------------------- what goes wrong


def failing(kind):
    """A loss that fails for rows after the first two, which another process computes."""

    def loss_fn(model, ids, targets, num_targets):
        if len(ids) == 1:
            raise kind("of the last row")
        return language_model_loss(model, ids, targets, num_targets)

    return loss_fn


class Odd(Exception):
    def __init__(self, text, *, hidden=None):
        super().__init__(text)
        self.hidden = lambda: hidden  # cannot be sent to another process


@pytest.mark.parametrize(
    ("kind", "raised"), [(Error, Error), (MemoryError, MemoryError), (ZeroDivisionError,) * 2, (Odd, Error)]
)
def test_what_a_worker_raises_is_raised_here(kind, raised):
    before = children()
    with pytest.raises(raised, match="of the last row") as found:
        fit(
            start(Job()),
            lambda step: tuple(a[:3] for a in batch_at(0)),
            2,
            loss_fn=failing(kind),
            processes=2,
        )
    (note,) = found.value.__notes__
    assert "in failing" in note or "in loss_fn" in note
    assert children() == before


def test_a_worker_that_was_killed_ends_training_with_one_sentence():
    def kill(model, ids, targets, num_targets):
        if os.getpid() != this and ids[0, 0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return language_model_loss(model, ids, targets, num_targets)

    this, before, last = os.getpid(), children(), batch_at(0)[0][6, 0]
    model = start(Job())
    weights = {name: array.copy() for name, array in model.state_dict().items()}
    with pytest.raises(
        Error, match=r"process \d+, .* ended with SIGKILL, perhaps because the memory is full"
    ):
        fit(model, lambda step: batch_at(0), 3, loss_fn=kill, processes=2)
    assert children() == before
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, weights[name])


def test_a_run_that_diverges_ends_without_warnings_of_the_workers(capfd):
    with pytest.raises(FloatingPointError, match="use a smaller lr"):
        fit(start(Job("gpt2", "float32")), batch_at, 20, lr=1e30, processes=2)
    assert capfd.readouterr().err == ""


def test_a_process_that_cannot_be_started(monkeypatch):
    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(Error, match="no further process can be started"):
        fit(start(Job()), batch_at, 1, processes=2)


def test_where_processes_cannot_be_forked_or_share_arrays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    model = start(Job())
    assert suitable_number(model, 8) == 4
    for parameter in model.parameters():
        parameter.replace(DeviceArray(parameter.data))
    with pytest.raises(Error, match="only on Linux and on the CPU"):
        Workers(2, model, AdamW(model), language_model_loss)
    assert suitable_number(model, 8) == 1
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(Error, match="only on Linux and on the CPU"):
        fit(start(Job()), batch_at, 1, processes=2)
    assert suitable_number(start(Job()), 8) == 1


# ------------------------------------------------------------------------------------- runs of a folder


def test_the_number_suits_the_model_the_rows_and_the_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    small = start(Job())
    assert [suitable_number(small, rows) for rows in (1, 3, 4, 32)] == [1, 3, 4, 4]
    sizes = dict(n_layer=1, n_head=1, vocab_size=7, n_positions=8)
    numbers = {width: GPT2(GPT2Config(n_embd=width, **sizes), rng=None) for width in (584, 600)}
    for width, found in ((584, 4), (600, 1)):
        model = numbers[width]
        monkeypatch.setattr(workers, "on_host", lambda model: True)
        assert suitable_number(model, 8) == found, model.num_parameters()
    assert suitable_number(Mixtral(MIXTRAL, rng=np.random.default_rng(0)), 8) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert suitable_number(small, 8) == 1


def test_one_of_several_machines_shares_nothing_unasked(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(distributed.current(), "size", 2)
    assert suitable_number(start(Job()), 8) == 1


def test_this_process_computes_its_rows_in_one_thread():
    seen = []

    def loss_fn(model, ids, targets, num_targets):
        seen.append(in_task())
        return language_model_loss(model, ids, targets, num_targets)

    for processes in (2, 1):
        fit(start(Job()), batch_at, 1, loss_fn=loss_fn, processes=processes)
    assert seen == [True, False]
    assert not in_task()


def test_a_run_has_the_results_of_one_process(text, tmp_path, capsys):
    config = tiny(text, tmp_path / "one", dtype="float64", dropout=0.1)
    train(config, progress=False)
    assert "processes share" not in capsys.readouterr().out
    train(replace(config, out=tmp_path / "two", processes=2), progress=False)
    assert "2 processes share every step" in capsys.readouterr().out
    assert val_losses(tmp_path / "two") == pytest.approx(val_losses(tmp_path / "one"), rel=1e-9)
    one, two = (verify(last_checkpoint(tmp_path / name))["machine"] for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)


def test_the_default_is_a_process_for_each_core(text, tmp_path, capsys, monkeypatch):
    short = dict(steps=1, warmup=0, processes=None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    train(tiny(text, tmp_path / "run", **short), progress=False)
    assert "3 processes share every step" in capsys.readouterr().out
    train(tiny(text, tmp_path / "alone", **short | dict(processes=1)), progress=False)
    assert "processes share" not in capsys.readouterr().out


def test_the_memory_of_a_run_is_that_of_all_its_processes(text, tmp_path, monkeypatch):
    monkeypatch.setattr("tinyllm.training.run.peak_memory", lambda device: 10)
    monkeypatch.setattr(Workers, "memory", lambda self: 7)
    train(tiny(text, tmp_path / "run", processes=2), progress=False)
    assert [record["peak_memory"] for record in records(tmp_path / "run")[2::2]] == [17, 17, 17]


def test_a_worker_has_memory_of_its_own():
    model = start(Job())
    big = np.ones(2**22)

    def write(model, ids, targets, num_targets):
        big[:] = 2  # in a worker, a copy
        return language_model_loss(model, ids, targets, num_targets)

    with closing(Workers(2, model, AdamW(model), write)) as replicas:
        before = replicas.memory()
        accumulate_gradients(model, batch_at(0), 1, write, None, LossScale(1.0), 0, 0, replicas=replicas)
        assert replicas.memory() - before >= big.nbytes


def test_a_stopped_run_resumes_bit_for_bit_and_on_another_number_with_a_warning(text, tmp_path, capsys):
    config = tiny(text, tmp_path / "whole", processes=2)
    train(config, progress=False)
    out, before = tmp_path / "run", children()
    for step in (1, 4):
        _, said = stopped_after(replace(config, out=out) if step == 1 else begun_config(out), step)
        assert said.startswith(f"stopped after step {step}; tinyllm train --resume {out} continues")
        assert children() == before
    train(begun_config(out), progress=False)
    assert left(out) == left(tmp_path / "whole")
    other = tmp_path / "other"
    stopped_after(replace(config, out=other), 3)
    capsys.readouterr()
    train(replace(begun_config(other), processes=1), progress=False)
    assert "processes was 2 and is 1: results may differ by rounding" in capsys.readouterr().out


def test_on_another_number_of_processes_a_mixture_has_another_balancing_loss(text, tmp_path, capsys):
    out = tmp_path / "run"
    stopped_after(tiny(text, out, arch="mixtral", dropout=0.0, processes=2), 3)
    capsys.readouterr()
    train(replace(begun_config(out), processes=3), progress=False)
    said = capsys.readouterr().out
    assert "processes was 2 and is 3: results differ from here on" in said
    assert "load-balancing loss" in said


@pytest.mark.parametrize(("device", "kind"), [("cpu", "mpi"), ("cuda", "nccl"), ("cuda", None)])
def test_processes_of_other_kinds_are_refused(device, kind):
    with pytest.raises(Error, match="--processes 2 share a step only on Linux and the CPU, without"):
        open_run_device(TrainConfig(processes=2, device=device, distributed=kind))


@pytest.mark.parametrize("number", [0, -1, 1.5, "2"])
def test_fit_refuses_other_numbers(number):
    with pytest.raises(Error, match="processes"):
        fit(start(Job()), batch_at, 1, processes=number)


def test_a_run_on_another_system_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(Error, match="--processes 2 share a step only on Linux"):
        open_run_device(TrainConfig(processes=2))
    assert open_run_device(TrainConfig(processes=1)) == "cpu"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--processes", "0"], "--processes is 0: it must be at least 1"),
        (["--processes", "9", "--batch", "8"], "--processes is 9: it must be at most the batch, 8"),
    ],
)
def test_numbers_that_are_refused(text, tmp_path, capsys, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--text", str(text), "--tokenizer", "char", "--context", "8", *change]) == 2
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_smaller_micro_batch_is_smaller_than_a_share():
    assert TrainConfig(batch=32, processes=2).smaller_micro_batch == ["--micro-batch 8"]
    assert TrainConfig(batch=32).smaller_micro_batch == ["--micro-batch 16"]


SLOW = """
import sys, time
from tinyllm.cli import main
from tinyllm.training import step
loss = step.language_model_loss
def slow(*args, **kwargs):
    time.sleep(0.3)
    return loss(*args, **kwargs)
import tinyllm.training.tasks.base as base
base.language_model_loss = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_the_run_and_it_can_be_resumed_at_once(text, tmp_path, number):
    """The signals of a terminal and of a cluster reach all processes of a group; SIGKILL only the first."""
    out = tmp_path / "run"
    options = (
        "--tokenizer char --n-layer 1 --n-head 2 --n-embd 8 --context 8 --batch 8 --steps 4 --processes 3"
    )
    args = ["train", "--preset", "gpt2-small", "--text", str(text), "--out", str(out), *options.split()]
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not (out / "metrics.jsonl").exists() or len(records(out)) < 2:
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.02)
    with open(f"/proc/{run.pid}/task/{run.pid}/children", encoding="ascii") as file:
        workers = [int(pid) for pid in file.read().split()]
    assert len(workers) == 2
    os.kill(run.pid, number) if number == signal.SIGKILL else os.killpg(run.pid, number)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == (-9 if number == signal.SIGKILL else 128 + number), said
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if number != signal.SIGKILL:
        assert re.search(r"stopped after step \d", said)
    train(begun_config(out), progress=False)
    assert records(out)[-1]["step"] == 4

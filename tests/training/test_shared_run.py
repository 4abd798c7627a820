"""Runs of several processes: what they leave, refusals, failures, signals and resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.chat_model import write_model
from support.instructions import write_parts
from support.processes import environment, launched, mpiexec, tinyllm
from support.runs import RHYME, left, records, same_arrays, tiny, weights
from support.suite import ROOT

from tinyllm import cli
from tinyllm.backend import distributed
from tinyllm.cli.finetune import TASKS
from tinyllm.errors import Error
from tinyllm.training.checkpoint import verify
from tinyllm.training.config import TrainConfig
from tinyllm.training.run import run_task
from tinyllm.training.run_folder import begun_config
from tinyllm.training.tasks.pretrain import train
from tinyllm.weights.runs import checkpoints, last_checkpoint

MANY = [pytest.param(number, marks=pytest.mark.processes) for number in (3, 4)]

OPTIONS = dict(micro_batch=2, dtype="float64", checkpoint_every=1, keep=9, clip=0.1)


def several(text, out, **changes):
    """The options of ``tiny`` that suit up to four processes, as arguments."""
    return [
        "train",
        "--preset",
        "gpt2-small",
        *as_arguments(tiny(text, out, **OPTIONS | changes), TrainConfig()),
    ]


def as_arguments(config, default):
    """The options that differ from the default's."""
    options, others = config.to_json(), default.to_json()
    given = []
    for name, value in options.items():
        if value != others[name]:
            values = value if isinstance(value, tuple) else [value]
            given += [f"--{name.replace('_', '-')}", *map(str, values)]
    return given


@pytest.fixture(scope="module")
def one(quick, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    train(tiny(text, out, **OPTIONS), progress=False)
    return out


@pytest.fixture(scope="module")
def two(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "run"
    done = tinyllm(2, *several(text, out))
    assert done.returncode == 0, done.stderr
    return out, done


def check_same_run(ours, theirs):
    """The same losses and weights but for rounding."""
    mine, other = records(ours), records(theirs)
    assert [record["step"] for record in mine] == [record["step"] for record in other]
    for a, b in zip(mine, other):
        assert a["tokens"] == b["tokens"]
        for key in b.keys() & {"train_loss", "val_loss", "train_eval_loss", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-12), (key, a["step"])
    theirs = weights(theirs)
    for name, array in weights(ours).items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-9, err_msg=name)


def test_a_run_of_two_processes_is_that_of_one(one, two):
    out, done = two
    check_same_run(out, one)
    assert done.stderr == ""
    assert done.stdout.count("the run will be saved in") == 1
    assert "2 processes:" in done.stdout
    assert "threads: 1" in done.stdout
    assert (out / "samples.txt").read_text() == (one / "samples.txt").read_text()
    assert verify(last_checkpoint(out))["machine"]["processes"] == 2


def test_two_runs_are_bitwise_equal_also_sharded_and_resumed(two, text, tmp_path):
    """With ZeRO-1, stopped after step 3 and resumed, the run ends with the same bits."""
    out = tmp_path / "run"
    stop = tinyllm(2, *several(text, out, steps=6), "--shard-optimizer", cwd=tmp_path)
    assert stop.returncode == 0, stop.stderr
    assert same_arrays(weights(out), weights(two[0]))
    assert left(out) == left(two[0])
    undo(out, 3)
    again = tinyllm(2, "train", "--resume", out, "--shard-optimizer")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("resuming from") == 1
    assert left(out) == left(two[0])


def undo(out, step):
    """Remove all checkpoints after a step, as if the run had been killed then."""
    for folder in checkpoints(out):
        if folder.name > f"step-{step:06}":
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


@pytest.mark.parametrize(
    "numbers", [(1, 2), pytest.param((2, 1, 4, 2), marks=pytest.mark.processes)], ids=str
)
def test_a_run_is_resumed_on_other_numbers_of_processes(one, text, tmp_path, quick, numbers):
    out, before, steps = tmp_path / "run", None, np.linspace(0, 6, len(numbers) + 1).astype(int)
    for number, begin, end in zip(numbers, steps, steps[1:]):
        arguments = several(text, out) if begin == 0 else ["train", "--resume", out]
        sharded = ["--shard-optimizer"] if begin else []
        if number == 1:
            train(begun_config(out) if begin else tiny(text, out, **OPTIONS), progress=False)
        else:
            done = tinyllm(number, *arguments, *sharded)
            assert done.returncode == 0, done.stderr
            assert begin == 0 or f"processes was {before} and is {number}" in done.stdout
        before = number
        if end < 6:
            undo(out, end)
    check_same_run(out, one)


def examples_of(task, folder):
    """The data of a fine-tuning task, of different lengths, with a last batch that is smaller."""
    if task == "instruct":
        return write_parts(folder / "data")
    if task == "classify":
        lines = [f"{'abc' * (i % 4 + 1)} {i},{'even' if i % 2 else 'odd'}" for i in range(14)]
        (folder / "data.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
        return folder / "data.csv"
    pairs = [
        dict(instruction=f"say {i}", input="", chosen="y" * (i % 3 + 1), rejected="n") for i in range(14)
    ]
    (folder / "data.json").write_text(json.dumps(pairs), encoding="utf-8")
    return folder / "data.json"


@pytest.mark.parametrize(
    ("task", "trains"),
    [
        ("instruct", "lora"),
        pytest.param("classify", "all", marks=pytest.mark.processes),
        pytest.param("dpo", "lora", marks=pytest.mark.processes),
    ],
)
def test_fine_tuning_of_two_processes_is_that_of_one(quick, tmp_path, task, trains):
    """With dropout, ZeRO-1, and checkpoints of the adapter or of the whole model."""
    (tmp_path / "model").mkdir()
    files = dict(model=str(write_model(tmp_path / "model")), data=str(examples_of(task, tmp_path)))
    options, kind = TASKS[task]
    given = dict(train=trains, dtype="float64", dropout=0.1, batch=4, micro_batch=1, steps=5, eval_every=2)
    config = options(**files, out=tmp_path / "one", lr=1e-2, warmup=1, **given)
    run_task(kind(config), progress=False)
    arguments = as_arguments(replace(config, out=tmp_path / "two"), options(model="", data=""))
    done = tinyllm(2, "finetune", "--task", task, *arguments, "--shard-optimizer")
    assert done.returncode == 0, done.stderr
    ours, theirs = records(tmp_path / "two"), records(tmp_path / "one")
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in b.keys() & {"train_loss", "val_loss", "val_accuracy", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=1e-9), (key, a["step"])
    mine, other = (verify(last_checkpoint(tmp_path / name)) for name in ("two", "one"))
    assert mine["files"].keys() == other["files"].keys()


def test_a_profile_has_the_communication(text, tmp_path):
    done = tinyllm(2, *several(text, tmp_path / "run"), "--profile")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("A training step takes") == 1
    for name in ("reduce-scatter", "all-gather", "communication"):
        assert f"\n{name} " in done.stdout
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ refusals


def fails(capsys, arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_without_mpi4py(monkeypatch, capsys, text, tmp_path):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for kind in ("mpi", "nccl"):
        said = fails(capsys, [*several(text, tmp_path / "run"), "--distributed", kind])
        assert "needs mpi4py: pip install" in said
        assert "[mpi]" in said
    assert "choose mpi or nccl" in fails(capsys, [*several(text, tmp_path / "run"), "--distributed=gloo"])
    assert "--distributed" in fails(capsys, [*several(text, tmp_path / "run"), "--shard-optimizer"])


def test_without_a_launcher(text, tmp_path):
    mpiexec()  # or it is skipped
    command = [
        sys.executable,
        "-P",
        "-m",
        "tinyllm",
        *several(text, tmp_path / "run"),
        "--distributed",
        "mpi",
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "mpiexec -n 2" in done.stderr


@pytest.mark.parametrize(("size", "rank"), distributed.LAUNCHERS.items())
def test_several_processes_without_distributed_are_two_runs_in_one_folder(
    monkeypatch, capsys, text, tmp_path, size, rank
):
    for number in ("0", "1"):
        monkeypatch.setenv(size, "2")
        monkeypatch.setenv(rank, number)
        said = fails(capsys, several(text, tmp_path / "run"))
        assert ("add --distributed mpi" in said) == (number == "0")
    monkeypatch.setenv(size, "1")
    with pytest.raises(Error, match="add --distributed"):
        monkeypatch.setenv(size, "2")
        train(tiny(text, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class Fake(distributed.OneProcess):
    def __init__(self, size):
        self.size = size


@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        (5, dict(batch=24), "--batch 20 or 25, or a number of processes among 1, 2, 3, 4, 6, 8, 12, 24"),
        (32, dict(batch=24), "--batch 32, or"),
        (5, dict(batch=24, resume=Path("run")), "processes: choose a number of processes among 1, 2,"),
        (2, dict(batch=24, micro_batch=8), "--micro-batch is 8: it must be one of 1, 2, 3, 4, 6, 12"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(monkeypatch, size, options, said):
    monkeypatch.setattr(distributed._Opened, "now", Fake(size))
    config = TrainConfig(**options)
    with pytest.raises(Error) as raised:
        config.check_division()
    assert said in str(raised.value)
    TrainConfig(batch=2 * size).check_division()


def test_the_micro_batch_is_the_share_of_a_process(monkeypatch):
    monkeypatch.setattr(distributed._Opened, "now", Fake(4))
    config = TrainConfig(batch=32, distributed="mpi")
    assert config.at_once == 8
    assert config.smaller_micro_batch == ["--micro-batch 4"]
    assert config.resuming("runs/a") == "mpiexec -n 4 tinyllm train --resume runs/a --distributed mpi"


@pytest.mark.parametrize("what", ["option lr", "text (SHA-256)", "missing"])
def test_processes_that_would_train_something_else_are_refused(text, tmp_path, what):
    other = tmp_path / "other.txt"
    if what != "missing":
        other.write_text(RHYME.replace("cat", "dog") * 12, encoding="utf-8")
    theirs = (
        several(text, tmp_path / "run", lr=1e-3) if what == "option lr" else several(other, tmp_path / "run")
    )
    programs = [
        (1, ["-m", "tinyllm", *arguments, "--distributed", "mpi"])
        for arguments in (several(text, tmp_path / "run"), theirs)
    ]
    done = launched(*programs)
    assert done.returncode == 2
    assert ("other.txt" if what == "missing" else what) in done.stderr
    assert "process 1 on" in done.stderr
    assert done.stderr.count("tinyllm:") == 1
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ failures

FAILURES = """
import json, math, sys
from pathlib import Path
from unittest import mock
import pytest
from support.runs import no_pictures, tiny
from tinyllm import GPT2
from tinyllm.backend import distributed
from tinyllm.training import checkpoint
from tinyllm.training.run import run_task
from tinyllm.training.tasks.pretrain import train

text, place = map(Path, sys.argv[1:])
loss, calls = GPT2.loss, [0]

def failing(rank, step, fail):
    def broken(model, *args, **options):
        found = loss(model, *args, **options)
        calls[0] += model.training
        here = distributed.current().rank == rank and calls[0] == 6 * (step - 1) + 1
        return fail(found) if model.training and here else found
    return broken

def out_of_memory(_):
    raise MemoryError("no memory")

def disk(*args):
    raise OSError("the disk is full")

with pytest.MonkeyPatch.context() as patched:
    no_pictures(patched)
    for name, patch in {
        "nan": (GPT2, "loss", failing(1, 3, lambda found: found * math.nan)),
        "memory": (GPT2, "loss", failing(1, 3, out_of_memory)),
        "first": (GPT2, "loss", failing(0, 3, out_of_memory)),
        "disk": (sys.modules["tinyllm.training.run_folder"], "save_checkpoint", disk),
        "none": (GPT2, "loss", loss),
    }.items():
        calls[0] = 0
        with mock.patch.object(*patch):
            try:
                train(tiny(text, place / name, micro_batch=2, distributed="mpi"), progress=False)
                said = "nothing"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
        Path(place / f"{name}-{sys.argv[0]}{distributed._Opened.by_kind['mpi'].rank}").write_text(said)
"""


@pytest.fixture(scope="module")
def failures(text, tmp_path_factory):
    place = tmp_path_factory.mktemp("failures")
    done = launched((2, ["-c", FAILURES, str(text), str(place)]))
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize(
    ("name", "kind", "named", "saved"),
    [
        ("nan", "FloatingPointError", "the loss of process 1 on", ["step-000002"]),
        ("memory", "MemoryError", "process 1 on", ["step-000002"]),
        ("first", "MemoryError", "no memory", ["step-000002"]),
        ("disk", "OSError", "the disk is full", []),
        ("none", "nothing", "", ["step-000006"]),
    ],
)
def test_all_processes_end_with_one_sentence_and_a_checkpoint(failures, name, kind, named, saved):
    said = [(failures / f"{name}--c{rank}").read_text() for rank in range(2)]
    assert all(of_one.startswith(kind) for of_one in said)
    assert named in said[0]  # which the first process prints
    assert [folder.name for folder in checkpoints(failures / name)] == saved
    for folder in checkpoints(failures / name):
        verify(folder)


# ------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("whom", ["all", "one process"])
def test_a_signal_reaches_all_and_one_checkpoint_is_written(text, tmp_path, whom, two):
    out = tmp_path / "run"
    arguments = several(text, out, steps=10**6, eval_every=10**6, checkpoint_every=None, keep=1)
    command = [
        mpiexec(),
        "-n",
        "2",
        sys.executable,
        "-P",
        "-m",
        "tinyllm",
        *arguments,
        "--distributed",
        "mpi",
    ]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment(), **streams) as process:
        pids = None
        for line in process.stdout:
            pids = pids or [int(word.split(")")[0]) for word in line.split("(PID ")[1:]]
            if line.startswith("step "):
                break
        while len(records(out)) < 3:
            time.sleep(0.05)
        os.kill(process.pid if whom == "all" else pids[1], signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert said.count("tinyllm: stopped after step") == 1
    (saved,) = checkpoints(out)
    assert f"step-{verify(saved)['step']:06}" == saved.name
    assert verify(saved)["step"] == records(out)[-1]["step"]
    assert f"--resume {out} --distributed mpi" in said


# ------------------------------------------------------------------------------------- the page

DIES = """#!{python}
import os, signal, sys, threading, time
from pathlib import Path
sys.path[:0] = {path!r}
from tinyllm import cli

def die(after):
    while not Path("runs/book", f"step-{{after:06}}").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["PMI_RANK"] == "1":
    attempt = len(list(Path().glob("attempt-*")))
    Path(f"attempt-{{attempt}}").touch()
    if attempt < 2:
        threading.Thread(target=die, args=(2 * attempt + 1,), daemon=True).start()
sys.exit(cli.main())
"""


@pytest.mark.processes
def test_the_pages_loop_resumes_until_the_run_is_done(text, two, tmp_path):
    page = (ROOT / "tinyllm" / "training" / "README.md").read_text(encoding="utf-8")
    script = page.split("<!-- retry -->\n```sh\n")[1].split("```")[0]
    options = [word for word in several(text, "runs/book") if not word.startswith(("--text", "--out"))]
    given = " ".join(f"'{word}'" for word in options[1:] if word not in (str(text), "runs/book"))
    script = script.replace("-n 8", "-n 2").replace("sleep 5", "sleep 0")
    script = script.replace("--text book.txt --out runs/book", f"--text {text} --out runs/book {given}")
    program = tmp_path / "bin" / "tinyllm"
    program.parent.mkdir()
    program.write_text(DIES.format(python=sys.executable, path=environment()["PYTHONPATH"].split(os.pathsep)))
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.path.dirname(mpiexec()), os.environ["PATH"]])
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment() | {"PATH": path}, timeout=120)
    assert done.returncode == 0
    assert len(list(tmp_path.glob("attempt-*"))) == 3
    assert left(tmp_path / "runs" / "book") == left(two[0])

"""``tinyllm finetune`` and what other commands do with its runs."""

import dataclasses
import io
import signal

import pytest
from support.chat_model import write_model
from support.instructions import render_in_process, write_parts
from support.runs import no_pictures, records

from tinyllm.cli import main
from tinyllm.cli.finetune import TASKS, parse
from tinyllm.errors import Error
from tinyllm.files import sealed
from tinyllm.training.config import flag
from tinyllm.training.tasks import chat
from tinyllm.training.tasks.instruct import InstructionTuning, InstructOptions


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "model").mkdir()
    return ["--model", str(write_model(folder / "model")), "--data", str(write_parts(folder / "data"))]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patched:
        no_pictures(patched)
        render_in_process(patched)
        patched.setattr(chat, "ANSWER_TOKENS", 5)
        assert main(["finetune", "--task", "instruct", *files, "--steps", "3", "--out", str(out)]) == 0
    return str(out)


def test_a_run_can_be_resumed_generated_from_evaluated_and_chatted_with(run, capsys, monkeypatch, tmp_path):
    capsys.readouterr()
    assert main(["finetune", "--resume", run]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["generate", "--run", run, "--prompt", "Hi", "--chat", "--max-new-tokens", "3"]) == 0
    text = tmp_path / "text.txt"
    text.write_text("some text to evaluate " * 9, encoding="utf-8")
    assert main(["eval", "--run", run, "--text", str(text)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/quit\n"))
    assert main(["chat", "--run", run, "--max-new-tokens", "3"]) == 0
    assert main(["plot", run, "--out", str(tmp_path / "runs.png")]) == 0


def test_a_resumed_run_keeps_its_options(run):
    config = parse(["--resume", run])
    assert isinstance(config, InstructOptions) and (config.steps, config.lr) == (3, 2e-4)
    assert parse(["--resume", run, "--log", "tensorboard"]).log == ("tensorboard",)
    assert parse([f"--resume={run}", "--task", "instruct"]) == config


def test_the_task_decides_the_options(files):
    config = parse(["--task=instruct", *files, "--train", "head", "--pack", "--targets", "a", "b"])
    assert (config.train, config.lr, config.pack, config.targets) == ("head", 1e-3, True, ("a", "b"))
    assert type(config) is InstructOptions


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "--task is missing: choose one of instruct"),
        (["--task"], "--task needs a value"),
        (["--task", "instuct"], "unknown .*did you mean instruct"),
        (["--task", "instruct", "--model", "m"], "--data is missing; see tinyllm finetune --task instruct"),
        (["--task", "instruct", "--model", "m", "--data", "d", "--rnak", "3"], "did you mean --rank"),
        (["--resume", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(args, said, capsys):
    with pytest.raises(Error, match=said):
        parse(args)
    assert main(["finetune", *args]) == 2
    assert capsys.readouterr().err.startswith("tinyllm: ")


def test_a_run_of_train_is_not_resumed(run, tmp_path):
    with pytest.raises(Error, match="is a run of the task instruct, not classify"):
        parse(["--resume", run, "--task", "classify"])
    assert main(["train", "--resume", run]) == 2
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_bytes(sealed({"task": "pretrain", "train": {}, "versions": {}}))
    with pytest.raises(Error, match="tinyllm train --resume"):
        parse(["--resume", str(begun)])


@pytest.mark.parametrize("task", TASKS)
def test_help_of_a_task_lists_every_option(task, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--task", task, "--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    words = out.replace(",", " ").split()
    for field in dataclasses.fields(TASKS[task][0]):
        assert flag(field.name) in words, field.name
    assert max(map(len, out.splitlines())) <= 80


def test_an_interrupted_run_says_how_to_continue(files, tmp_path, capsys, monkeypatch):
    no_pictures(monkeypatch)
    render_in_process(monkeypatch)
    monkeypatch.setattr(chat, "ANSWER_TOKENS", 3)
    sample = InstructionTuning.sample

    def stop(task, model, step, check, final):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return sample(task, model, step, check, final)

    monkeypatch.setattr(InstructionTuning, "sample", stop)
    out = str(tmp_path / "run")
    args = ["finetune", "--task", "instruct", *files, "--steps", "4", "--eval-every", "2", "--out", out]
    assert main(args) == 128 + signal.SIGTERM
    assert f"tinyllm finetune --resume {out} continues" in capsys.readouterr().err
    monkeypatch.setattr(InstructionTuning, "sample", sample)
    assert main(["finetune", "--resume", out]) == 0
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 1, 2, 3, 4]

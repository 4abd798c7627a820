"""``tinyllm finetune``: teach a pretrained model a task, or resume such a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tinyllm.cli.options import did_you_mean, option, parse_options, readable, taken, values_of
from tinyllm.errors import Error
from tinyllm.training.begun import begun_config, begun_task
from tinyllm.training.run import run_task
from tinyllm.training.tasks.classify import Classification, ClassifyOptions
from tinyllm.training.tasks.dpo import PreferenceOptions, PreferenceTuning
from tinyllm.training.tasks.finetune import FinetuneOptions, Finetuning
from tinyllm.training.tasks.instruct import InstructionTuning, InstructOptions

TASKS: dict[str, tuple[type[FinetuneOptions], type[Finetuning]]] = {
    options.task: (options, task)
    for options, task in (
        (InstructOptions, InstructionTuning),
        (ClassifyOptions, Classification),
        (PreferenceOptions, PreferenceTuning),
    )
}


@dataclass(frozen=True, kw_only=True)
class _Task:
    task: Annotated[str, option("TASK", "", f"The task: {', '.join(TASKS)}.")]


@dataclass(frozen=True, kw_only=True)
class _Shared(FinetuneOptions, _Task):
    """Teach a pretrained model a task. These options are those of every task.

    A task has more: tinyllm finetune --task instruct --help
    """


def run(config: FinetuneOptions) -> None:
    _, task = TASKS[config.task]
    run_task(task(config))


def parse(args: list[str]) -> FinetuneOptions:
    """The options of a command line. --task, or the run of --resume, decides which there are."""
    task, args = taken("--task", args, "tinyllm finetune")
    folder, args = taken("--resume", args, "tinyllm finetune")
    if task is None and folder is None:
        if {"-h", "--help"} & {*args}:
            parse_options(_shown(_Shared), "tinyllm finetune", ["--help"])
        raise Error(f"--task is missing: choose one of {', '.join(TASKS)}")
    if folder is not None:
        begun = begun_task(Path(folder))
        if begun not in TASKS:
            raise Error(f"{folder} is a run of the task {begun}: use tinyllm train --resume {folder}")
        if task not in (None, begun):
            raise Error(f"{folder} is a run of the task {begun}, not {task}: omit --task")
        task = begun
    if task not in TASKS:
        raise Error(
            f"--task {task!r} is unknown{did_you_mean(task, TASKS)}: choose one of {', '.join(TASKS)}"
        )
    options, given = TASKS[task][0], {}
    shown = _shown(options)
    if folder is not None:
        given["default"] = shown(**values_of(begun_config(Path(folder), options)))
    return options(**values_of(parse_options(shown, f"tinyllm finetune --task {task}", args, **given)))


def _shown(options: type[FinetuneOptions]) -> type[FinetuneOptions]:
    """The class with its options as ``--help`` shows them."""
    shown = dataclass(frozen=True, kw_only=True)(
        type(options.__name__, (options,), {"__doc__": options.__doc__})
    )
    return readable(shown, gpu_memory="GB", train="WHAT", data="DATA", targets="[NAME ...]")

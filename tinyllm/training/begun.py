"""What the config.json of a run says: the options it was started with, and the hashes of its data."""

from dataclasses import replace
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.files import read_sealed
from tinyllm.training.config import RunOptions, TrainConfig
from tinyllm.training.metrics import METRICS

RUN_CONFIG = "config.json"


def begun_config(folder: Path, options: type[RunOptions] = TrainConfig) -> RunOptions:
    """The options to resume the run in a folder with: those it was started with, in one process.

    Raises ``Error`` if the folder is not a run's, if its task is not that of ``options``, or if its
    config.json is damaged.
    """
    begun = read_about(folder, options.task)["train"] | {"distributed": None, "shard_optimizer": False}
    return replace(options.from_json(begun), out=folder, resume=folder)


def begun_task(folder: Path) -> str:
    """The task of the run in a folder; raises ``Error`` as ``begun_config`` does."""
    return read_about(folder, None).get("task", TrainConfig.task)


def read_about(folder: Path, task: str | None) -> dict:
    """The config.json of the run in a folder; raises ``Error`` as ``begun_config`` does."""
    if any(folder.glob("*model.safetensors*")):  # its config.json, if it has one, is the model's
        if (folder.parent / METRICS).exists():
            raise Error(f"{folder} is a checkpoint: give its run, {folder.parent}")
        raise Error(f"{folder} is a model's folder: give a run's, as in runs/NAME-1")
    if not (folder / RUN_CONFIG).exists():
        raise Error(
            f"{folder} is not a run folder (it has no {RUN_CONFIG}): give a run's folder, as in runs/NAME-1"
        )
    match read_sealed(folder / RUN_CONFIG):
        case {"train": dict(), "versions": dict()} as about:
            if task is not None and about.get("task", task) != task:
                raise Error(f"{folder} is a run of the task {about['task']}, not {task}: use its own command")
            return about
    raise Error(f"{folder / RUN_CONFIG} was not written by this version of tinyllm: start a new run")


def data_hashes(about: dict) -> dict[str, str]:
    """The SHA-256 of everything that a config.json describes, by name, such as text and tokenizer."""
    return {name: x["sha256"] for name, x in about.items() if isinstance(x, dict) and "sha256" in x}

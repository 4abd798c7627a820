"""The checkpoint folders of a training run, by name: ``step-000135`` in the run's folder."""

import re
from pathlib import Path

from tinyllm.errors import Error

STEP = re.compile(r"step-(\d{6,})", re.ASCII)


def checkpoint_folder(run: str | Path, step: int) -> Path:
    return Path(run) / f"step-{step:06}"


def step_of(folder: Path) -> int:
    """The step number in a checkpoint folder's name."""
    return int(STEP.fullmatch(folder.name)[1])


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first. They are renamed to these names when complete."""
    found = [path for path in Path(run).glob("step-*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def last_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint folder of a run that contains a model or an adapter. No hash is checked.

    Raises ``Error`` if there is none.
    """
    with_weights = [folder for folder in checkpoints(run) if any(folder.glob("*model.safetensors*"))]
    if not with_weights:
        raise Error(f"{run} has no checkpoint (step-…/model.safetensors): give a run that saved one")
    return with_weights[-1]

"""How does a long run lose nothing?

A checkpoint is a folder ``step-000135`` in the run's folder, with all that the next step depends on:

    config.json, model.safetensors    the model, as Hugging Face lays it out
    optimizer.safetensors             AdamW's averages, ``m.NAME`` and ``v.NAME`` for every parameter
    checkpoint.json                   the step and everything else, and the SHA-256 of each file, its own too

Batches and dropout are addressed by (seed, step), so the step is also the position in the data, and no
generator's state is needed. There is no pickle.

It is written into a folder of another name, every file is flushed to the disk, then that folder's names, and
one rename makes it a checkpoint; older ones are removed after that. So at every instant the newest folder of
that name is complete, whatever is killed. What is damaged later ``verify`` finds by the hashes, and the one
before is taken.

A killed process loses nothing on any system. A power failure: on Linux neither, if the disk keeps what it
says it has. On macOS fsync hands the data to the drive, which may write it later and in another order, says
fsync(2) there (F_FULLFSYNC would wait for it): the newest checkpoint may be damaged, and the hashes find it.
On Windows os.fsync is _commit, which flushes files, and Python cannot flush a folder: the newest checkpoint
may be missing. Also on Windows a folder cannot be renamed while another program, a virus scanner say, has a
file in it open: the run stops with exit code 1 and the checkpoint before is untouched. The run's lock is
LockFileEx there and flock elsewhere; the system takes both back from a process that dies.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
from pathlib import Path, PureWindowsPath

import numpy as np

import tinyllm
from tinyllm.backend.device import describe_device
from tinyllm.backend.threads import num_threads
from tinyllm.errors import Error
from tinyllm.files import SAVING, read_sealed, sealed, sync, sync_folder
from tinyllm.nn import Module
from tinyllm.optim import AdamW
from tinyllm.weights.safetensors import CONFIG, Weights, write_safetensors

FORMAT = 1

OPTIMIZER, ABOUT = "optimizer.safetensors", "checkpoint.json"

REMOVING, DAMAGED = ".removing-", "damaged-"

STEP = re.compile(r"step-(\d{6,})", re.ASCII)

SPARE_BYTES = 32 * 2**20  # on the disk after a checkpoint, for logs and pictures


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / f"step-{step:06}"


def step_of(folder: Path) -> int:
    """The number in a checkpoint folder's name."""
    return int(STEP.fullmatch(folder.name)[1])


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first. Each of them was complete when it got its name."""
    found = [path for path in run.glob("step-*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def save_checkpoint(folder: Path, model: Module, optimizer: AdamW, about: dict) -> None:
    """Write a checkpoint into ``folder``, which is not there before and complete afterwards.

    ``about`` is what checkpoint.json shall say besides the files' hashes and the optimizer's t. Raises
    OSError, naming the folder and leaving nothing behind, if it cannot be written.
    """
    new = folder.with_name(SAVING + folder.name)
    state = optimizer.state_dict()
    try:
        new.mkdir()
        model.save_pretrained(new)
        averages = {f"{key}.{name}": array for key in "mv" for name, array in state[key].items()}
        write_safetensors(new / OPTIMIZER, averages)
        # Reading them again costs no more than hashing on the way (measured: 0.12 and 0.11 s for 200 MB).
        files = {path.name: _fingerprint(path) for path in sorted(new.iterdir())}
        with open(new / ABOUT, "wb") as file:
            file.write(sealed({"format": FORMAT, **about, "t": state["t"], "files": files}))
            sync(file)
        sync_folder(new)
        os.replace(new, folder)
        sync_folder(folder.parent)
    # A model that cannot be saved is an Error, and the OSError its cause; a GPU may have no room for a copy.
    except (OSError, MemoryError, Error) as error:
        shutil.rmtree(new, ignore_errors=True)
        reason = error.__cause__ if isinstance(error, Error) else error
        raise OSError(f"the checkpoint {folder} cannot be written ({reason})") from error


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def verify(folder: Path) -> dict:
    """What a checkpoint's checkpoint.json says, after every bit of the folder's files was checked.

    Raises ``Error``, naming the file, if one is missing or not as it was written.
    """
    about = read_sealed(folder / ABOUT)
    match about:
        case {
            "format": 1,
            "step": int(),
            "tokens": int(),
            "val_loss": None | float(),
            "samples_bytes": int(),
            "run": str(),
            "machine": dict(),
            "t": dict(),
            "files": dict(files),
        } if {CONFIG, OPTIMIZER} <= files.keys():
            pass
        case _:
            raise Error(f"{folder / ABOUT} is not of a checkpoint of this version: start the run again")
    for name, expected in files.items():
        if PureWindowsPath(name).name != name:
            raise Error(f"{folder / ABOUT} names {name!r}, which is no plain file name: start the run again")
        try:
            found = _fingerprint(folder / name)
        except OSError as error:
            raise Error(f"{folder / name} cannot be read ({error.strerror}): copy it again") from error
        if found != expected:
            raise Error(
                f"{folder / name} is damaged (its size or SHA-256 is not what {ABOUT} says): copy it again"
            )
    return about


def load_checkpoint(folder: Path, about: dict, model: Module, optimizer: AdamW, device: str = "cpu") -> None:
    """Give the model and its optimizer the numbers of a checkpoint, bit for bit, on the device.

    ``about`` is what ``verify`` returned. Raises ``Error`` if they are of another model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    model.load_state_dict(Weights(folder), source=str(folder))
    model.to(device)
    try:
        averages = load_file(folder / OPTIMIZER)
        state = {key: {name: averages[f"{key}.{name}"] for name in about["t"]} for key in "mv"}
    except (OSError, SafetensorError, KeyError) as error:
        raise Error(f"{folder / OPTIMIZER} cannot be read ({error}): copy it again") from error
    optimizer.load_state_dict({"t": about["t"], **state})


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; killed on the way, it leaves none that is half there."""
    doomed = folder.with_name(REMOVING + folder.name)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is none any more; returns its new name."""
    aside = folder.with_name(DAMAGED + folder.name)
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)
    sync_folder(folder.parent)
    return aside


def remove_left_overs(run: Path) -> None:
    """Remove what a killed process had not finished to write or to remove. Only under the run's lock."""
    for path in [*run.glob(SAVING + "*"), *run.glob(REMOVING + "*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_space(run: Path, model: Module) -> None:
    """OSError if the disk has no room for a checkpoint: noticed before it is begun, not on the way."""
    needed = 3 * sum(parameter.data.nbytes for parameter in model.parameters()) + SPARE_BYTES
    free = shutil.disk_usage(run).free
    if free < needed:
        raise OSError(
            f"the disk of {run} has {free / 1e6:,.0f} MB left and a checkpoint needs {needed / 1e6:,.0f} MB"
        )


def machine(device: str) -> dict[str, str | int]:
    """What else than the run's options decides the last bits of its numbers."""
    from threadpoolctl import threadpool_info

    found = [library for library in threadpool_info() if library["user_api"] == "blas"]
    # Others may have been loaded beside NumPy's own.
    of_numpy = [library for library in found if "numpy" in library["filepath"]] or found
    blas = [
        f"{library['internal_api']} {library['version']}, {library.get('architecture')}, "
        f"threads: {library['num_threads']}"
        for library in of_numpy
    ]
    return {
        "tinyllm": tinyllm.__version__,
        "numpy": np.__version__,
        "processor": platform.machine(),
        "blas": "; ".join(blas),
        "threads": num_threads(),
        "device": describe_device(device),
    }

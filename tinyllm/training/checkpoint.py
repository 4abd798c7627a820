"""Checkpoints: with them a long run loses nothing, however it is stopped.

A checkpoint is a folder ``step-000135`` in the run's folder, with all that the next step depends on:

    config.json, model.safetensors    the model, as Hugging Face lays it out (without config.json, if it is
                                      not a language model)
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

import hashlib
import os
import platform
import shutil
from pathlib import Path, PureWindowsPath

import numpy as np

from tinyllm.backend.device import describe_device
from tinyllm.backend.threads import num_threads
from tinyllm.errors import Error
from tinyllm.files import SAVING, read_sealed, sealed, sync_folder, write_synced
from tinyllm.nn import Module
from tinyllm.optim import AdamW
from tinyllm.version import __version__
from tinyllm.weights.safetensors import SINGLE_FILE, Weights, write_safetensors

FORMAT = 1

FIELDS = dict(
    step=int, tokens=int, val_loss=float | None, samples_bytes=int, run=str, machine=dict, t=dict, files=dict
)  # of checkpoint.json: what a resumed run relies on

OPTIMIZER, ABOUT = "optimizer.safetensors", "checkpoint.json"

REMOVING, DAMAGED = ".removing-", "damaged-"

SPARE_BYTES = 32 * 2**20  # on the disk after a checkpoint, for logs and pictures


def save_checkpoint(folder: Path, model: Module, optimizer: AdamW, about: dict) -> None:
    """Write a checkpoint into ``folder``, which is not there before and complete afterwards.

    ``about`` is what checkpoint.json shall say besides the files' hashes and the optimizer's t. Raises
    OSError, naming the folder and leaving nothing behind, if it cannot be written.
    """
    new = folder.with_name(SAVING + folder.name)
    state = optimizer.state_dict()
    try:
        new.mkdir()
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(new)
        else:  # not a language model
            write_safetensors(new / SINGLE_FILE, model.state_dict())
        averages = {f"{key}.{name}": array for key in "mv" for name, array in state[key].items()}
        write_safetensors(new / OPTIMIZER, averages)
        # Reading them again costs no more than hashing on the way (measured: 0.12 and 0.11 s for 200 MB).
        files = {path.name: _fingerprint(path) for path in sorted(new.iterdir())}
        write_synced(new / ABOUT, sealed({"format": FORMAT, **about, "t": state["t"], "files": files}))
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
    fits = all(key in about and isinstance(about[key], kind) for key, kind in FIELDS.items())
    if about.get("format") != FORMAT or not fits or OPTIMIZER not in about["files"]:
        raise Error(f"{folder / ABOUT} is not of a checkpoint of this version: start the run again")
    for name, expected in about["files"].items():
        path = folder / name
        if PureWindowsPath(name).name != name:
            raise Error(f"{folder / ABOUT} names {name!r}, which is no plain file name: start the run again")
        try:
            found = _fingerprint(path)
        except OSError as error:
            raise Error(f"{path} cannot be read ({error.strerror}): copy it again") from error
        if found != expected:
            raise Error(f"{path} is damaged (its size or SHA-256 is not what {ABOUT} says): copy it again")
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
    shutil.rmtree(aside, ignore_errors=True)  # it is not there, as a rule
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


def check_space(run: Path, model: Module, remedy: str) -> None:
    """OSError if the disk has no room for a checkpoint: noticed before it is begun, not on the way."""
    needed = 3 * sum(parameter.data.nbytes for parameter in model.parameters()) + SPARE_BYTES
    free = shutil.disk_usage(run).free
    if free < needed:
        found = f"has {free / 1e6:,.0f} MB left and a checkpoint needs {needed / 1e6:,.0f} MB"
        raise OSError(f"the disk of {run} {found}: {remedy}")


def machine(device: str) -> dict[str, str | int]:
    """What else than the run's options decides the last bits of its numbers."""
    from threadpoolctl import threadpool_info

    found = [blas for blas in threadpool_info() if blas["user_api"] == "blas"]
    # Others may have been loaded beside NumPy's own.
    of_numpy = [blas for blas in found if "numpy" in blas["filepath"]] or found
    about_it = "{internal_api} {version}, {architecture}, threads: {num_threads}"
    return {
        "tinyllm": __version__,
        "numpy": np.__version__,
        "processor": platform.machine(),
        "blas": "; ".join(about_it.format_map({"architecture": None} | blas) for blas in of_numpy),
        "threads": num_threads(),
        "device": describe_device(device),
    }

"""Checkpoints, from which a run resumes with bitwise identical results.

A checkpoint is a folder ``step-000135`` in the run's folder, with everything that the next step depends on:

    config.json, model.safetensors    the model in Hugging Face's layout (config.json only for a language
                                      model), or what the task writes instead, such as an adapter
    optimizer.safetensors             AdamW's averages, ``m.NAME`` and ``v.NAME`` for every trained parameter;
                                      of a matrix that Muon updates only ``m.NAME``
    checkpoint.json                   the step, all other state, and the SHA-256 of every file and of itself

Batches and dropout are functions of (seed, step), so the step is also the position in the data, and no
generator state is stored. Nothing is pickled.

A checkpoint is written to a folder of another name; its files and then the folder are flushed to disk, and
one rename makes it a checkpoint. Older ones are removed only afterwards. The newest folder of that name is
therefore complete at any time, even if the process is killed. ``verify`` detects later damage by the hashes,
and the run then resumes from the checkpoint before.

A killed process loses no checkpoint on any system. Neither does a power failure on Linux, if the disk stores
what it acknowledges. On macOS fsync passes data to the drive, which may write it later and in another order,
see fsync(2) (F_FULLFSYNC would wait): the newest checkpoint may be damaged, and the hashes detect it. On
Windows os.fsync flushes files, but Python cannot flush a folder: the newest checkpoint may be missing. There
a folder cannot be renamed either while another program, such as a virus scanner, has a file in it open: the
run stops with exit code 1 and the checkpoint before is unchanged. The run's lock (LockFileEx on Windows,
flock elsewhere) is released by the system when a process dies.
"""

import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PureWindowsPath

import numpy as np

from tinyllm.backend import distributed
from tinyllm.backend.device import describe_device, to_device
from tinyllm.backend.threads import num_threads
from tinyllm.errors import Error
from tinyllm.files import SAVING, read_sealed, sealed, sha256_of, sync_folder, write_synced
from tinyllm.nn import Module
from tinyllm.optim import AdamW
from tinyllm.tensor import Tensor
from tinyllm.version import __version__
from tinyllm.weights.runs import checkpoints, step_of
from tinyllm.weights.safetensors import SINGLE_FILE, Weights, write_safetensors

FORMAT = 1

# Of checkpoint.json, which a resumed run reads
FIELDS = dict(
    step=int, tokens=int, val_loss=float | None, samples_bytes=int, run=str, machine=dict, t=dict, files=dict
)

OPTIMIZER, ABOUT = "optimizer.safetensors", "checkpoint.json"

REMOVING, DAMAGED = ".removing-", "damaged-"

LOG_BYTES = 2**20  # to keep free in addition to a checkpoint, for logs and the picture


def save_weights(model: Module, folder: Path) -> None:
    """Write a whole model into a folder: the form of a checkpoint's weights unless the task has another."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:  # not a language model
        write_safetensors(folder / SINGLE_FILE, model.state_dict())


def load_weights(model: Module, folder: Path) -> None:
    """Load what ``save_weights`` wrote; raises ``Error`` if it belongs to another model."""
    model.load_state_dict(Weights(folder), source=str(folder))


def save_checkpoint(
    folder: Path,
    model: Module,
    optimizer: AdamW,
    about: dict,
    save_weights: Callable[[Module, Path], None] = save_weights,
) -> None:
    """Write a checkpoint to ``folder``, which must not exist, atomically.

    ``about`` has the entries of checkpoint.json other than the files' hashes and the optimizer's t. Raises
    OSError, naming the folder and leaving no files, if it cannot be written.
    """
    new = folder.with_name(SAVING + folder.name)
    state = optimizer.state_dict()
    try:
        new.mkdir()
        save_weights(model, new)
        averages = {f"{key}.{name}": array for key in "mv" for name, array in state[key].items()}
        write_safetensors(new / OPTIMIZER, averages)
        # Reading the files again is as fast as hashing while writing (0.12 and 0.11 s for 200 MB).
        files = {path.name: _fingerprint(path) for path in sorted(new.iterdir())}
        write_synced(new / ABOUT, sealed({"format": FORMAT, **about, "t": state["t"], "files": files}))
        sync_folder(new)
        os.replace(new, folder)
        sync_folder(folder.parent)
    # save_weights raises Error with the OSError as its cause; a GPU may have no memory for a copy.
    except (OSError, MemoryError, Error) as error:
        shutil.rmtree(new, ignore_errors=True)
        reason = error.__cause__ if isinstance(error, Error) else error
        raise OSError(f"the checkpoint {folder} cannot be written ({reason})") from error


def _fingerprint(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def verify(folder: Path) -> dict:
    """Check the hashes of all files of a checkpoint; returns the content of its checkpoint.json.

    Raises ``Error``, naming the file, if one is missing or damaged.
    """
    about = read_sealed(folder / ABOUT)
    fits = all(key in about and isinstance(about[key], kind) for key, kind in FIELDS.items())
    if about.get("format") != FORMAT or not fits or OPTIMIZER not in about["files"]:
        raise Error(f"{folder / ABOUT} was not written by this version of tinyllm: start the run again")
    for name, expected in about["files"].items():
        path = folder / name
        if PureWindowsPath(name).name != name:
            raise Error(f"{folder / ABOUT} names {name!r}, not a plain file name: start the run again")
        try:
            found = _fingerprint(path)
        except OSError as error:
            raise Error(f"{path} cannot be read ({error.strerror}): copy it again") from error
        if found != expected:
            raise Error(f"{path} is damaged (its size or SHA-256 differs from {ABOUT}): copy it again")
    return about


def lost_evaluations(run: Path, history: list[dict], before: int) -> list[dict]:
    """Records of the checkpoints after ``history`` and before the step ``before`` that were evaluated.

    A checkpoint has the step, the tokens and the val_loss of its record. A damaged one is skipped.
    """
    found, first = [], history[-1]["step"] + 1 if history else 0
    for folder in checkpoints(run):
        if first <= step_of(folder) < before:
            with suppress(Error):
                about = verify(folder)
                found.append({key: about[key] for key in ("step", "tokens", "val_loss")})
    return [record for record in found if record["val_loss"] is not None]


def load_checkpoint(
    folder: Path,
    about: dict,
    model: Module,
    optimizer: AdamW,
    device: str = "cpu",
    load_weights: Callable[[Module, Path], None] = load_weights,
) -> None:
    """Load a checkpoint into the model and its optimizer, bit-exact, on the device.

    ``about`` is what ``verify`` returned. Raises ``Error`` if it is a checkpoint of another model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    load_weights(model, folder)
    model.to(device)
    try:
        state = {"m": {}, "v": {}}
        for full_name, array in load_file(folder / OPTIMIZER).items():
            key, _, name = full_name.partition(".")
            state[key][name] = array
    except (OSError, SafetensorError, KeyError) as error:
        raise Error(f"{folder / OPTIMIZER} cannot be read ({error}): copy it again") from error
    optimizer.load_state_dict({"t": about["t"], **state})


def hash_weights(model: Module) -> str:
    """The SHA-256 of all parameters, with their names."""
    digest = hashlib.sha256()
    for name, array in model.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(to_device(array, "cpu")))
    return digest.hexdigest()


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that none is incomplete if the process is killed."""
    doomed = folder.with_name(REMOVING + folder.name)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is not used again; returns its new name."""
    aside = folder.with_name(DAMAGED + folder.name)
    shutil.rmtree(aside, ignore_errors=True)  # usually there is none
    os.replace(folder, aside)
    sync_folder(folder.parent)
    return aside


def remove_left_overs(run: Path) -> None:
    """Remove what a killed process left half-written or half-removed. The caller holds the run's lock."""
    for path in [*run.glob(SAVING + "*"), *run.glob(REMOVING + "*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_space(run: Path, saved: Iterable[Tensor], optimizer: AdamW) -> None:
    """Raise OSError if the disk has no space for a checkpoint: the ``saved`` weights and all averages."""
    needed = sum(tensor.data.nbytes for tensor in saved) + optimizer.averages_nbytes
    free = shutil.disk_usage(run).free
    if free < needed + LOG_BYTES:
        sizes = f"{free / 1e6:,.1f} MB left; a checkpoint needs {needed / 1e6:,.1f} MB, and the logs 1 MB"
        raise OSError(f"the disk of {run} has {sizes}")


def machine(device: str) -> dict[str, str | int]:
    """The properties of the machine that affect rounding, and with it a run's results."""
    from threadpoolctl import threadpool_info

    found = [blas for blas in threadpool_info() if blas["user_api"] == "blas"]
    # Other packages may have loaded a BLAS of their own.
    of_numpy = [blas for blas in found if "numpy" in blas["filepath"]] or found
    simd = np.show_config(mode="dicts")["SIMD Extensions"]  # of this process, not of the build
    about_it = "{internal_api} {version}, {architecture}, threads: {num_threads}"
    return {
        "tinyllm": __version__,
        "numpy": np.__version__,
        "processor": platform.machine(),
        "simd": " ".join(simd.get("baseline", []) + simd.get("found", [])),
        "libc": " ".join(platform.libc_ver()),
        "blas": "; ".join(about_it.format_map({"architecture": None} | blas) for blas in of_numpy),
        "processes": distributed.current().size,
        "threads": num_threads(),
        "device": describe_device(device),
    }

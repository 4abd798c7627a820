"""Disk faults: errors while a checkpoint is written, and bits that flip afterwards."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

import tinyllm.training.run_folder
from parity.durability.faults import raising, writing
from parity.durability.runs import (
    NEWEST,
    Figures,
    count,
    damage,
    difference,
    progress_bar,
    trained,
    whole_and_interrupted,
)
from tinyllm.errors import Error
from tinyllm.training import checkpoint
from tinyllm.training.begun import begun_config
from tinyllm.training.checkpoint import ABOUT, OPTIMIZER, verify
from tinyllm.weights.runs import checkpoint_folder
from tinyllm.weights.safetensors import CONFIG, SINGLE_FILE

# ---------------------------------------------------------------------------- disk errors


def failing_disk(every: int = 1) -> Iterator[tuple[str, Figures]]:
    """Fail one call that writes, flushes or renames for a checkpoint in each try, every ``every``-th in turn.

    ENOSPC is a full disk, EIO a broken one. The run must stop, the earlier checkpoints must be intact, and
    the run resumed from them must end like the uninterrupted one.
    """
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        place = Path(folder)
        whole, begun = whole_and_interrupted(place)
        with _disk(None, None) as saves:
            trained(begun_config(shutil.copytree(begun, place / "counted")))
        calls = list(enumerate(saves[0]))[::every]
        for code in (errno.ENOSPC, errno.EIO):
            figures, name = Figures(), f"{errno.errorcode[code]} while saving a checkpoint"
            with progress_bar(name, len(calls)) as bar:
                for number, call in calls:
                    run = shutil.copytree(begun, place / "run")
                    problem = _after_failing(run, whole, number, call, code)
                    shutil.rmtree(run)
                    count(figures, "recovered", f"call {number} ({call})", problem)
                    bar.update()
            yield name, figures


@contextmanager
def _disk(fail_at: int | None, fail: Callable[[], None] | None) -> Iterator[list[list[str]]]:
    """Yield the calls made for each checkpoint; call ``fail_at`` of the first checkpoint fails."""
    saves = []

    def save(*args) -> None:
        with writing(None if saves else fail_at, fail) as calls:
            saves.append(calls)
            checkpoint.save_checkpoint(*args)

    with mock.patch.object(tinyllm.training.run_folder, "save_checkpoint", save):
        yield saves


def _after_failing(run: Path, whole: dict, number: int, call: str, code: int) -> str:
    """Let a call fail and resume the run; return what is wrong afterwards, or ""."""
    failed = False
    try:
        with _disk(number, raising(OSError(code, os.strerror(code)))):
            trained(begun_config(run))
    except OSError as error:
        failed = os.strerror(code) in str(error)
    if not failed and call != "mkdir":  # a folder that already exists need not be created
        return "the error was not reported"
    if failed and not checkpoint_folder(run, NEWEST).exists():
        return "the previous checkpoint is gone"
    if problem := damage(run):
        return problem
    try:
        trained(begun_config(run))
    except (Error, OSError) as error:
        return str(error)
    return difference(run, whole)


# ---------------------------------------------------------------------------- flipped bits


def bit_flips(positions: int = 2000, seed: int = 0) -> Iterator[tuple[str, Figures]]:
    """Flip one random bit of a run's newest checkpoint per try; the tries are divided among its parts.

    ``verify`` must name the file, the resumed run must print the same message and use the previous
    checkpoint, and it must end like the uninterrupted one.
    """
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        place = Path(folder)
        whole, begun = whole_and_interrupted(place)
        parts = _parts(checkpoint_folder(begun, NEWEST))
        for number, (name, (file, where)) in enumerate(parts.items()):
            share = positions * (number + 1) // len(parts) - positions * number // len(parts)
            figures = Figures()
            with progress_bar(name, share) as bar:
                for _ in range(share):
                    byte, bit = int(rng.choice(where)), int(rng.integers(8))
                    run = shutil.copytree(begun, place / "run")
                    problem = _after_flip(run, whole, file, byte, bit)
                    shutil.rmtree(run)
                    count(figures, "detected", f"bit {bit} of byte {byte} of {file}", problem)
                    bar.update()
            yield f"a bit of {name}", figures


def _parts(folder: Path) -> dict[str, tuple[str, range]]:
    """The parts of a checkpoint: description -> (file, range of bytes)."""
    parts = {}
    for file in (SINGLE_FILE, OPTIMIZER):
        size = (folder / file).stat().st_size
        with open(folder / file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
        parts[f"{file}: length of the header"] = file, range(8)
        parts[f"{file}: header"] = file, range(8, 8 + length)
        parts[f"{file}: numbers"] = file, range(8 + length, size)
    return parts | {file: (file, range((folder / file).stat().st_size)) for file in (CONFIG, ABOUT)}


def _after_flip(run: Path, whole: dict, file: str, byte: int, bit: int) -> str:
    """Flip a bit and resume the run; return what is wrong afterwards, or ""."""
    damaged = checkpoint_folder(run, NEWEST)
    data = bytearray((damaged / file).read_bytes())
    data[byte] ^= 1 << bit
    (damaged / file).write_bytes(data)
    try:
        verify(damaged)
    except Error as error:
        found = str(error)
    else:
        return "verify did not detect it"
    if not found.startswith(f"{damaged / file} is damaged"):
        return f"verify printed something else: {found}"
    try:
        output = trained(begun_config(run))
    except (Error, OSError) as error:
        return str(error)
    if found not in output or f"after step {NEWEST - 1} of" not in output:
        return f"the resumed run printed something else: {output}"
    return difference(run, whole)

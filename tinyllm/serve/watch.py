"""Runs in progress: what the page shows of them, read from their logs and from nothing else.

A run appends a line to ``metrics.jsonl`` at every step and a text to ``samples.txt`` at every evaluation.
Both are only read, a little at a time: a run is not disturbed and need not know that it is watched. It may be
writing a line, may have been resumed from an earlier step, be damaged, or be gone: what could be read is
shown, with a note.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tinyllm.errors import Error
from tinyllm.files import open_regular, parse_json, printable, read_file
from tinyllm.training.metrics import CONFIG, METRICS, UNITS, RecordedRun, best_record, parse_records
from tinyllm.training.picture import COLORS
from tinyllm.training.run_log import SAMPLES

CURVES = ("train_loss", "train_eval_loss", "val_loss", "tokens_per_s", "lr", "grad_norm")
LAST = ("step", "tokens", "tokens_per_s", "train_loss", "val_loss")  # of the last record that has each

MOST_POINTS = 600  # of a curve, as many as a screen can show
MOST_SAMPLES = 30
TAIL = 2**18  # bytes at the end of samples.txt that are read

SAMPLE = re.compile(rb"^--- step (\d+)\n", re.MULTILINE)


class WatchedRun:
    """A run folder whose metrics are read as they are written; ``records`` has those so far."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self._forget()

    def _forget(self) -> None:
        self.records: list[dict] = []
        self._file, self._read, self._damage = None, 0, None

    def update(self) -> list[str]:
        """Read what was written since the last call; returns notes on what could not be."""
        path = self.folder / METRICS
        try:
            with open_regular(path) as file:
                self._update(file)
        except FileNotFoundError:
            if self.records:
                return [f"{path} is gone: these are the steps read before"]
            return ["no step is recorded yet" if self.folder.is_dir() else f"{self.folder} is gone"]
        except OSError as error:
            return [f"{path} cannot be read ({error.strerror or error})"]
        if self._damage is not None:
            number = len(self.records) + 1
            return [f"line {number} of {METRICS} is damaged ({self._damage}): later steps are not shown"]
        return [] if self.records else ["no step is recorded yet"]

    def _update(self, file) -> None:
        state = _status(file)
        # A resumed run replaces the file, without the steps after its checkpoint.
        if self._file != state[0] or state[1] < self._read or self._damage is not None:
            self._forget()
            self._file = state[0]
        file.seek(self._read)
        whole, newline, _ = file.read().rpartition(b"\n")  # the rest is still being written
        if newline:
            self._read += len(whole) + 1
            last = self.records[-1] if self.records else None
            found, self._damage = parse_records(whole.split(b"\n"), last)
            self.records += found

    def report(self) -> dict:
        """Everything that the page shows of the run, as JSON values.

        ``curves`` maps names to points [step, tokens, seconds of training, value]; of a long one, the means
        of groups of neighbours. ``age`` is in seconds since the last record. ``unit`` is what a loss is a
        mean over.
        """
        notes = [printable(note) for note in self.update()]
        run = RecordedRun(self.name, {}, {}, self.records, notes)
        seconds = run.along("time")
        try:
            bytes_per_token = run.bytes_per_token()
        except Error:
            bytes_per_token = None
        last = {key: next((r[key] for r in reversed(self.records) if key in r), None) for key in LAST}
        return {
            "name": self.name,
            "notes": notes,
            "age": self._age(),
            "last": last | {"seconds": seconds[-1]} if self.records else None,
            "best": _numbers(best_record(self.records, "val_loss"), ("step", "val_loss")),
            "bytes_per_token": bytes_per_token,
            "unit": self._unit(),
            "curves": {key: self._curve(key, seconds) for key in CURVES},
            "samples": self.samples(),
        }

    def _curve(self, key: str, seconds: list[float]) -> list[list[float]]:
        points = [
            [record["step"], record["tokens"], at, record[key]]
            for record, at in zip(self.records, seconds)
            if _is_drawn(record.get(key))
        ]
        group = -(-len(points) // MOST_POINTS)
        return points if group <= 1 else [_mean(points[i : i + group]) for i in range(0, len(points), group)]

    def _unit(self) -> str:
        try:
            return UNITS.get(str(parse_json(read_file(self.folder / CONFIG))["task"]), "token")
        except (Error, ValueError, TypeError, KeyError):  # it is damaged, or none was written
            return "token"

    def _age(self) -> float | None:
        try:
            return max(0.0, round(time.time() - (self.folder / METRICS).stat().st_mtime))
        except OSError:
            return None

    def samples(self) -> list[dict]:
        """The newest samples, oldest first: step and text."""
        try:
            with open_regular(self.folder / SAMPLES) as file:
                file.seek(max(0, _status(file)[1] - TAIL))
                # The text before the first heading belongs to a sample of which the beginning was not read.
                _, *parts = SAMPLE.split(file.read())
        except OSError:
            return []
        found = [
            {"step": int(step), "text": text.decode("utf-8", errors="replace").rstrip("\n")}
            for step, text in zip(parts[::2], parts[1::2])
        ]
        return found[-MOST_SAMPLES:]


def _status(file) -> tuple[tuple[int, int], int]:
    """What identifies an open file, and its size."""
    found = os.fstat(file.fileno())
    return (found.st_dev, found.st_ino), found.st_size


def _is_drawn(value) -> bool:
    """Whether a value is a number that JSON can express, and a sum of many: not an infinite norm."""
    return isinstance(value, int | float) and abs(value) < 1e300


def _mean(points: list[list[float]]) -> list[float]:
    return [sum(column) / len(points) for column in zip(*points)]


def _numbers(record: dict | None, keys: Sequence[str]) -> dict | None:
    return record and {key: record[key] for key in keys}


def watched(folders: Sequence[str | Path]) -> list[WatchedRun]:
    """The runs in these folders, by the folder's name, or its whole path where two names are equal.

    Raises ``Error`` for a folder that is not a run's, and for more runs than there are distinct colours.
    """
    places = [Path(folder).expanduser() for folder in folders]
    for place in places:
        if not place.is_dir():
            raise Error(f"there is no run {place}: check the path")
        if not any((place / file).exists() for file in (METRICS, CONFIG)):
            raise Error(f"{place} is not a run folder (it has no {METRICS}): give the folder of a run")
    names = [printable(place.resolve().name) for place in places]
    if len({place.resolve() for place in places}) < len(places):
        raise Error(f"a run is given more than once in {', '.join(map(str, places))}: give each run once")
    if len(places) > len(COLORS):
        raise Error(f"there are {len(places)} runs to watch, and colours for {len(COLORS)}: give fewer")
    return [
        WatchedRun(place, name if names.count(name) == 1 else printable(place))
        for place, name in zip(places, names)
    ]


def watch_routes(runs: Sequence[WatchedRun]) -> list[Route]:
    """``GET /tinyllm/runs``: a report of every run."""
    lock = threading.Lock()  # two pages may ask at once

    def reports(_: Request) -> JSONResponse:
        with lock:
            return JSONResponse(
                {"runs": [run.report() for run in runs]}, headers={"Cache-Control": "no-store"}
            )

    return [Route("/tinyllm/runs", reports, methods=["GET"])]

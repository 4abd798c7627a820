"""The records of a run: one JSON object per step."""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.files import parse_json, read_file
from tinyllm.tokenizers.base import FILE_NAME as TOKENIZER
from tinyllm.weights.runs import checkpoints, last_checkpoint, step_of

CONFIG, METRICS = "config.json", "metrics.jsonl"  # of a run folder

TINY = 1e-9  # tokens per second or bytes per token; anything less is an error, and its inverse may be inf

# Options that affect where and how often a run is saved, but not its curves
BOOKKEEPING = ("out", "resume", "checkpoint_every", "checkpoint_minutes", "keep", "skip_nonfinite", "log")

NUMBERS = ("step", "tokens", "train_loss", "tokens_per_s", "train_eval_loss", "val_loss", "val_bits_per_byte")
NUMBERS += ("val_final_bits_per_byte", "val_second_bits_per_byte")

UNITS = {"classify": "text", "dpo": "pair"}  # task -> what its loss is a mean over; otherwise tokens


@dataclass(frozen=True)
class RecordedRun:
    """The content of a run folder: ``records`` are the lines of metrics.jsonl, ``notes`` its defects."""

    name: str
    options: dict
    tokenizer: dict
    records: list[dict]
    notes: list[str]
    unit: str = "token"  # a loss is a mean over these

    def bytes_per_token(self) -> float:
        """Of the validation text: the ratio of its loss to its bits per byte."""
        for record in self.records:
            if "val_loss" in record and record.get("val_bits_per_byte", 0) > 0:
                ratio = record["val_loss"] / math.log(2) / record["val_bits_per_byte"]
                if TINY < ratio < 1 / TINY:
                    return ratio
        wrong = "has no val_bits_per_byte that matches its val_loss"
        raise Error(f"run {self.name} {wrong}: plot its loss instead")

    def along(self, x: str) -> list[float]:
        """Steps, tokens, or seconds of training (without the evaluations) at each record."""
        if x != "time":
            return [record[x] for record in self.records]
        seconds, tokens, times = 0.0, 0, []
        for record in self.records:
            if record["tokens"] > tokens and "tokens_per_s" in record:
                seconds += (record["tokens"] - tokens) / record["tokens_per_s"]
                tokens = record["tokens"]
            times.append(seconds)
        return times

    def curve(self, key: str, x: str, y: str) -> tuple[list[float], list[float]]:
        """The points at which ``key`` was measured."""
        unit = 1.0 if y == "loss" else math.log(2) * self.bytes_per_token()
        points = [(at, r[key] / unit) for at, r in zip(self.along(x), self.records) if key in r]
        return [at for at, _ in points], [value for _, value in points]


def best_record(records: Iterable[dict], key: str) -> dict | None:
    """The first record in which ``key`` is lowest; None if no record has it."""
    found = (record for record in records if key in record)
    return min(found, key=lambda record: record[key], default=None)


def read_run(folder: str | Path) -> RecordedRun:
    """Read and check a run folder.

    A half-written last line of ``metrics.jsonl``, from a run that was killed, is skipped with a note. Raises
    ``Error`` if the folder is not a run's, if it has no evaluation yet, or if a line is damaged.
    """
    folder = Path(folder)
    about = _read_json(folder, CONFIG)
    name = folder.resolve().name
    try:
        options = {key: value for key, value in about["train"].items() if key not in BOOKKEEPING}
        if "text" in about:
            options["text_sha256"] = about["text"]["sha256"][:8]
    except (TypeError, KeyError, AttributeError):
        raise _not_a_run(folder, f"its {CONFIG} was not written by tinyllm train") from None
    # A published tokenizer is identified by its hash; some tasks have none.
    tokenizer = _read_json(folder, TOKENIZER) if (folder / TOKENIZER).exists() else about.get("tokenizer", {})
    records, notes = _read_metrics(folder / METRICS)
    if not any("val_loss" in record for record in records):
        raise Error(f"{folder} has no evaluation in {METRICS} yet: wait for the first one")
    return RecordedRun(name, options, tokenizer, records, notes, UNITS.get(str(about.get("task")), "token"))


def _not_a_run(folder: Path, why: str) -> Error:
    return Error(f"{folder} is not a run folder ({why}): give the folder of a run of tinyllm train")


def _read_json(folder: Path, file: str) -> dict:
    try:
        return parse_json(read_file(folder / file))
    except Error:
        raise _not_a_run(folder, f"it has no readable {file}") from None
    except ValueError:
        raise _not_a_run(folder, f"its {file} is damaged") from None


def _read_metrics(path: Path) -> tuple[list[dict], list[str]]:
    """The records, and a note if the last line is half-written."""
    if not path.exists():  # it is written at the first evaluation
        return [], []
    *lines, rest = read_file(path).split(b"\n")  # the rest is empty unless the run was killed
    is_whole = _parse_record(rest) is not None
    records, wrong = parse_records([*lines, rest] if is_whole else lines)
    if wrong:
        raise Error(f"{path}, line {len(records) + 1}, is damaged ({wrong}): repair or remove it")
    note = f"the last line of {path.name}, number {len(lines) + 1}, is half-written and was skipped"
    return records, [note] if rest and not is_whole else []


def parse_records(lines: Iterable[bytes], before: dict | None = None) -> tuple[list[dict], str | None]:
    """The records in the lines before the first damaged one, and what is wrong with that, or None.

    The lines follow those of which ``before`` is the last record.
    """
    records = []
    for line in lines:
        record = _parse_record(line)
        if wrong := _what_is_wrong(record, before):
            return records, wrong
        records.append(record)
        before = record
    return records, None


def _parse_record(line: bytes) -> dict | None:
    """The record in a line of metrics.jsonl, or None if it is not a JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _what_is_wrong(record: dict | None, before: dict | None) -> str | None:
    """What is wrong with a record that follows the one before it, or None."""
    if record is None:
        return "it is not a JSON object"
    for key in NUMBERS:
        value = record.get(key, 0)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            return f"{key} is {json.dumps(value)}, not a finite number"
    for key in ("step", "tokens"):
        if key not in record:
            return f"it has no {key}"
    tokens = before["tokens"] if before else 0
    if before and record["step"] <= before["step"]:
        return f"step {record['step']} follows step {before['step']}"
    if record["tokens"] < tokens:
        return f"{record['tokens']} tokens follow {tokens}"
    # A step whose record was lost is evaluated again when the run is resumed, without a speed.
    speed = record.get("tokens_per_s", math.inf if "val_loss" in record and "train_loss" not in record else 0)
    if record["tokens"] > tokens and not speed > TINY:
        return "its tokens_per_s is missing or not above 0"
    return None


def same_tokenizer(runs: list[RecordedRun]) -> bool:
    return all(run.tokenizer == runs[0].tokenizer for run in runs)


def best_checkpoint(run: Path) -> Path:
    """The checkpoint of a run with the lowest val_loss; the newest if none was evaluated."""
    saved = {step_of(folder): folder for folder in checkpoints(run)}
    records, _ = parse_records(read_file(run / METRICS).splitlines())
    best = best_record((record for record in records if record["step"] in saved), "val_loss")
    return last_checkpoint(run) if best is None else saved[best["step"]]

"""Judging a test set row by row: every answer and every reply is kept at once, so that a stop loses nothing.

A folder has

config.json      the options, and the SHA-256 of the data and of each model with its prompts; a stopped
                 judgement continues only with the same
answers.jsonl    {"model", "row", "prompt", "reference", "answer"} of every row, and of both models, and
                 "cut" true if the context ended the answer
judged.jsonl     {"row", …}: the judge's ``replies`` and what was read from them, or the numbers
summary.json     the means, their intervals, and how many rows have no value
lock             held by the one process that writes here
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tinyllm.errors import Error
from tinyllm.files import append_whole, lock, read_file, read_sealed, sealed, write_whole
from tinyllm.inference.judge import PAIR, SCORE, exact_match, parse_score, parse_verdict, token_f1, win

CONFIG, ANSWERS, JUDGED, SUMMARY, LOCK = (
    "config.json",
    "answers.jsonl",
    "judged.jsonl",
    "summary.json",
    "lock",
)


class Item(NamedTuple):
    """A row of a test set: what the model is asked, and the answer that is known to be good."""

    prompt: str
    reference: str


class Records:
    """The objects of a JSON lines file by their ``key``; they are appended one at a time.

    A last line that was half-written when a process was killed is removed. Raises ``Error`` for another
    damaged line, naming it.
    """

    def __init__(self, path: Path, *key: str):
        self.path, self.key, self.found = path, key, {}
        if not path.exists():
            return
        data = read_file(path)
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.found[self._key(record)] = record
            except (ValueError, KeyError, TypeError):
                raise Error(f"line {number} of {path} is damaged: remove the folder, or that line") from None
        if whole != data:
            write_whole(path, whole)

    def _key(self, record: dict) -> tuple:
        return tuple(record[name] for name in self.key)

    def __contains__(self, key: tuple) -> bool:
        return key in self.found

    def __getitem__(self, key: tuple) -> dict:
        return self.found[key]

    def add(self, record: dict) -> None:
        append_whole(self.path, json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.found[self._key(record)] = record


class JudgedFolder:
    """The folder of a judgement, new or continued; locked until ``close``.

    Raises ``Error`` if it holds something else, or a judgement with other options, which are named.
    """

    def __init__(self, folder: Path, options: dict):
        self.folder = folder
        if os.path.lexists(folder) and not _may_be_ours(folder):
            raise Error(f"--out {folder} exists and is not the folder of a judgement: choose another")
        folder.mkdir(parents=True, exist_ok=True)
        busy = f"another process is judging in {folder}: wait for it, or choose another --out"
        self._lock = lock(folder / LOCK, busy)
        try:
            self._begin(options)
        except BaseException:
            self.close()
            raise

    def _begin(self, options: dict) -> None:
        path = self.folder / CONFIG
        if path.exists():
            self._check_same(read_sealed(path), options)
        else:
            write_whole(path, sealed(options))
        self.answers = Records(self.folder / ANSWERS, "model", "row")
        self.judged = Records(self.folder / JUDGED, "model", "row")

    def _check_same(self, begun: dict, options: dict) -> None:
        changed = [name for name in options if begun.get(name) != options[name]]
        if changed:
            listed = ", ".join(f"{name} {begun.get(name)!r}, not {options[name]!r}" for name in changed)
            raise Error(f"the judgement in {self.folder} has {listed}: choose another --out")

    def check_model(self, model: str, sha256: str) -> None:
        """Keep the SHA-256 of a model when it is loaded first; later, raise ``Error`` if it is another."""
        path, entry = self.folder / CONFIG, {f"SHA-256 of {model}": sha256}
        begun = read_sealed(path)
        del begun["sha256"]  # of the file
        if entry.keys() <= begun.keys():
            self._check_same(begun, entry)
        else:
            write_whole(path, sealed(begun | entry))

    def close(self) -> None:
        self._lock.release()

    def write_summary(self, summary: dict) -> None:
        write_whole(self.folder / SUMMARY, json.dumps(summary, indent=2).encode() + b"\n")


def _may_be_ours(folder: Path) -> bool:
    """Whether the path is a folder of a judgement, or of one that has not begun."""
    if not folder.is_dir():
        return False
    if not (folder / CONFIG).exists():
        return all(path.name == LOCK for path in folder.iterdir())
    try:
        found = json.loads(read_file(folder / CONFIG))
    except (ValueError, RecursionError):
        return True  # damaged, which read_sealed says
    return isinstance(found, dict) and "by" in found  # a model's and a run's have no such option


def answer_items(
    folder: JudgedFolder,
    model: str,
    items: list[Item],
    answer: Callable[[int], dict],
    progress: bool = True,
) -> list[str]:
    """The answers of a model to all items; ``answer(row)`` is called for those that are not kept yet.

    It returns a record with the key "answer".
    """
    for row in _missing(folder.answers, model, len(items), f"answers of {model}", progress):
        folder.answers.add({"model": model, "row": row, **items[row]._asdict(), **answer(row)})
    return [folder.answers[model, row]["answer"] for row in range(len(items))]


def judge_items(
    folder: JudgedFolder, model: str, count: int, judge: Callable[[int], dict], progress: bool = True
) -> list[dict]:
    """The records of rows 0 to ``count - 1``; ``judge(row)`` is called for those that are not kept yet."""
    for row in _missing(folder.judged, model, count, f"judgement of {model}", progress):
        folder.judged.add({"model": model, "row": row, **judge(row)})
    return [folder.judged[model, row] for row in range(count)]


def _missing(records: Records, model: str, count: int, what: str, progress: bool) -> Iterator[int]:
    missing: Iterable[int] = [row for row in range(count) if (model, row) not in records]
    options = dict(desc=what, unit="row", dynamic_ncols=True, disable=None if progress else True)
    return iter(tqdm(missing, initial=count - len(missing), total=count, **options))


# --------------------------------------------------------------------- the judgement of one row


def score(chat: Callable[[str], str], item: Item, answer: str) -> dict:
    """The judge's reply and the score in it; None if it is no score."""
    reply = chat(SCORE.format(prompt=item.prompt, reference=item.reference, answer=answer))
    return {"replies": [reply], "score": parse_score(reply)}


def compare(chat: Callable[[str], str], item: Item, first: str, second: str) -> dict:
    """The judge's replies to the pair in both orders; ``win`` is 1 or 0 if both prefer the same, else ½."""
    orders = ((first, second), (second, first))
    replies = [chat(PAIR.format(prompt=item.prompt, first=a, second=b)) for a, b in orders]
    verdicts = [parse_verdict(reply) for reply in replies]
    return {"replies": replies, "verdicts": verdicts, "win": win(*verdicts)}


def match(item: Item, answer: str) -> dict:
    """Exact match and token F1 of an answer and its reference."""
    return {"exact_match": exact_match(answer, item.reference), "f1": token_f1(answer, item.reference)}

"""Examples for fine-tuning: rows from a file, a folder or a known name, in three parts.

A row is a JSON object, such as ``{"instruction": …, "input": …, "output": …}``; the task knows its keys. A
file holds a list of rows, or one row a line, or it is a table (``tables.py``), whose columns are the keys.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllm.data.named import DATA_SETS
from tinyllm.data.tables import read_table
from tinyllm.errors import Error
from tinyllm.files import parse_json, read_file

# Percent of a single file's rows, as in Raschka's chapter 7: 1,100 rows become 935, 55 and 110.
VALIDATION, TEST = 5, 10

# The files of a folder, by their names without the suffix
PARTS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}


class Row(NamedTuple):
    """One example, and where it stands, for messages: ``row 3 of data.json``."""

    values: dict
    where: str


@dataclass(frozen=True)
class Examples:
    """The rows of a data set in three parts; ``split`` says how they came about."""

    name: str
    sha256: str  # of the files
    train: list[Row]
    valid: list[Row]
    test: list[Row]
    split: str

    def describe(self) -> str:
        """The counts, in one line, also of rows that would be evaluated after they were learned."""
        parts = f"{len(self.train):,} training, {len(self.valid):,} validation and {len(self.test):,} test"
        learned = {_content(row) for row in self.train}
        seen = sum(_content(row) in learned for row in [*self.valid, *self.test])
        again = f"; {seen:,} of the latter two are training examples too" if seen else ""
        return f"{self.name}: {parts} examples ({self.split}){again}"


def open_examples(
    name: str | Path,
    seed: int = 0,
    label: Callable[[Row], object] | None = None,
    validation: int = VALIDATION,
) -> Examples:
    """The examples in a file, a folder or a data set known by ``name``, in three parts.

    A folder has train.json and optionally valid.json and test.json (or .jsonl, …). Parts that are missing are
    split off with ``seed``: from a single file ``validation`` percent and 10% for the test, from a folder
    without validation rows ``validation`` percent. With ``label``, every part gets its share of the rows of
    each label. Raises ``Error`` if there are no such files, and if one is damaged or has too few rows.
    """
    files = _find(name)
    parts = {part: read_rows(path) for part, path in files.items()}
    for part, rows in parts.items():
        if not rows:
            raise Error(f"{files[part]} has no rows: give a file with at least one")
    split = "as given" if "valid" in parts else f"split with seed {seed}"
    if "all" in parts:
        parts = dict(zip(PARTS, divide(parts["all"], seed, label, validation=validation)))
    elif "valid" not in parts:
        parts["train"], parts["valid"], _ = divide(parts["train"], seed, label, 0, validation)
    if not parts["train"] or not parts["valid"]:
        raise Error(f"{name} has too few rows to train and to validate: give at least two")
    digests = "".join(hashlib.sha256(read_file(path)).hexdigest() for path in files.values())
    sha256 = digests if len(files) == 1 else hashlib.sha256(digests.encode()).hexdigest()
    found = [parts.get(part, []) for part in PARTS]
    return Examples(str(name), sha256, *found, split)


def divide(
    rows: Sequence[Row],
    seed: int,
    label: Callable[[Row], object] | None = None,
    test: int = TEST,
    validation: int = VALIDATION,
) -> tuple[list[Row], list[Row], list[Row]]:
    """Split rows, shuffled with ``seed``, into a training, a validation and a test part.

    The test part has ``test`` percent of the rows and the training part what ``validation`` percent leave,
    both rounded down, the validation part the rest; with ``label`` this holds for the rows of each label. The
    rows of a part keep their order.
    """
    if not 0 <= seed < 2**128:
        raise Error(f"split_seed is {seed}: choose one from 0 to 2**128 - 1")
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(rows)).tolist()
    labels = [label(row) if label else None for row in rows]
    groups: dict[object, list[int]] = {}
    for i in order:
        groups.setdefault(labels[i], []).append(i)
    train, valid, tested = [], [], []
    for group in groups.values():
        kept, trained = (len(group) * percent // 100 for percent in (test, 100 - validation - test))
        tested += group[:kept]
        train += group[kept : kept + trained]
        valid += group[kept + trained :]
    return tuple([rows[i] for i in sorted(part)] for part in (train, valid, tested))


def _find(name: str | Path) -> dict[str, Path]:
    """The files of a data set by part; a single file is "all"."""
    path = Path(name).expanduser()
    if name in DATA_SETS and not path.exists():
        return {"all": DATA_SETS[name].find(name)}
    if path.is_file():
        return {"all": path}
    if not path.is_dir():
        known = ", ".join(DATA_SETS)
        raise Error(f"there is no data {str(name)!r}: give a file, a folder, or one of {known}")
    found = {}
    for part, names in PARTS.items():
        files = sorted(
            file for file in path.iterdir() if file.stem in names and file.suffix.lower() in READERS
        )
        if len(files) > 1:
            raise Error(f"{path} has {' and '.join(file.name for file in files)}: keep one of them")
        if files:
            found[part] = files[0]
    if "train" not in found:
        raise Error(
            f"{path} has no training part: put train{', train'.join(READERS)} into it, or give one file"
        )
    return found


def _content(row: Row) -> str:
    return json.dumps(row.values, sort_keys=True)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, numbered from 1; blank lines do not count. Raises ``Error``, naming the row."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise Error(f"{path} ends in {path.suffix or 'no suffix'}: give a file that ends in {_suffixes()}")
    rows = []
    for number, values in enumerate(reader(path), 1):
        where = f"row {number} of {path}"
        if not isinstance(values, dict):
            raise Error(f"{where} is {json.dumps(values)[:40]}, not an object with keys: correct it")
        rows.append(Row(values, where))
    return rows


def _suffixes() -> str:
    *first, last = READERS
    return f"{', '.join(first)} or {last}"


def _read_json(path: Path) -> Iterator[object]:
    """The items of a JSON list, or the values of JSON lines, whatever the file's suffix."""
    data = read_file(path).removeprefix(codecs.BOM_UTF8)  # as some editors write it
    if data.lstrip()[:1] == b"[":
        try:
            yield from parse_json(data)
        except ValueError as error:
            raise Error(f"{path} is not JSON ({error}): correct it") from None
        return
    number = 0
    for line in data.splitlines():
        if not line.isspace() and line:
            number += 1
            try:
                yield parse_json(line)
            except ValueError as error:
                raise Error(f"row {number} of {path} is not JSON ({error}): correct it") from None


READERS: dict[str, Callable[[Path], Iterator[object]]] = {
    **dict.fromkeys((".json", ".jsonl"), _read_json),
    **dict.fromkeys((".csv", ".tsv"), read_table),
}

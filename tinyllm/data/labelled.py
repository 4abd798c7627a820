"""Texts with labels, for a classifier: which columns they are in, which classes there are, and who has them.

The rows are those of ``examples.py``. A label is a string or an integer, and the classes are the labels of
the training part. What would spoil the result is an error that names the row: a text or label that is
missing, a single class, a label that the training part lacks. A text that is also in a later part is removed
from the earlier one: otherwise the test would ask for what was learned by heart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tinyllm.data.examples import Examples, Row, open_examples
from tinyllm.errors import Error

# Usual names of the columns, in the order in which they are tried; case is ignored.
TEXT_COLUMNS = ("text", "sentence", "review", "content", "message", "comment", "document", "body")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment", "topic")

# Percent of a single file: a classifier is chosen by its validation part and judged by few numbers of its
# test part, so both need more rows than the text that a language model predicts token by token.
VALIDATION = 10


@dataclass(frozen=True)
class Part:
    """The texts of a part, and the numbers of their classes."""

    texts: list[str]
    targets: list[int]


@dataclass(frozen=True)
class Labelled:
    """A data set of labelled texts. ``removed`` counts the texts of ``train`` and ``valid`` left out."""

    examples: Examples
    text_column: str
    label_column: str
    labels: tuple[str, ...]
    train: Part
    valid: Part
    test: Part
    removed: int

    def describe(self) -> list[str]:
        """The columns, the classes and their balance, in lines."""
        columns = f"text in {self.text_column!r}, label in {self.label_column!r}"
        parts = {"training": self.train, "validation": self.valid, "test": self.test}
        counts = {name: Counter(part.targets) for name, part in parts.items() if part.texts}
        sizes = ", ".join(f"{count.total():,} {name}" for name, count in counts.items())
        lines = [f"{self.examples.name}: {sizes} texts ({self.examples.split}; {columns})"]
        if self.removed:
            lines.append(f"{self.removed:,} texts were removed because they occur again, or in a later part")
        for number, label in enumerate(self.labels):
            shares = (f"{count[number] / count.total():.1%} of {name}" for name, count in counts.items())
            lines.append(f"class {label!r}: {', '.join(shares)}")
        return lines


def open_labelled(
    name: str | Path, seed: int = 0, text_column: str | None = None, label_column: str | None = None
) -> Labelled:
    """The labelled texts in a file, a folder or a known data set; see ``open_examples``.

    Columns that are not named are guessed by their usual names. A split keeps the shares of the classes.
    Raises ``Error``, naming the row, for what the module's docstring lists.
    """
    columns = _Columns(text_column, label_column)
    found = open_examples(name, seed, columns.label, VALIDATION)
    removed, later, kept = 0, set(), {}
    for part in ("test", "valid", "train"):
        rows, first = getattr(found, part), {}
        for row in rows:
            first.setdefault(columns.text(row), row)
        if part != "test":  # what is measured at the end is not changed
            rows = [row for text, row in first.items() if text not in later]
            removed += len(getattr(found, part)) - len(rows)
        later |= first.keys()
        kept[part] = rows
    found = replace(found, **kept)
    for part in ("train", "valid"):
        if not kept[part]:
            raise Error(f"{name} has no {part} texts that are not in a later part too: give other files")
    labels = _classes(name, (columns.label(row) for row in found.train))
    numbers = {label: number for number, label in enumerate(labels)}
    parts = {}
    for part, rows in kept.items():
        for row in rows:
            if columns.label(row) not in numbers:
                raise Error(
                    f"{row.where} has the label {columns.label(row)!r}, which no training row has (they have "
                    f"{_listed(labels)}): correct it, or add training rows with it"
                )
        parts[part] = Part([columns.text(row) for row in rows], [numbers[columns.label(row)] for row in rows])
    names = {"text_column": columns.text_column, "label_column": columns.label_column}
    return Labelled(found, **names, labels=labels, **parts, removed=removed)


class _Columns:
    """The columns of text and label, guessed from the first row if they are not named."""

    def __init__(self, text_column: str | None, label_column: str | None):
        self.text_column, self.label_column = text_column, label_column

    def text(self, row: Row) -> str:
        if self.text_column is None:
            self.text_column = _guess(row, TEXT_COLUMNS, "text", "--text-column")
        return text_of(row, self.text_column)

    def label(self, row: Row) -> str:
        if self.label_column is None:
            self.label_column = _guess(row, LABEL_COLUMNS, "label", "--label-column")
        label = _value(row, self.label_column, "label", "--label-column")
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        if not isinstance(label, str) or not label.strip():
            raise Error(
                f"{row.where} has the label {label!r} in {self.label_column!r}: give a string or an integer"
            )
        return label.strip()


def text_of(row: Row, column: str | None = None) -> str:
    """The text of a row, by default in a column with a usual name. Raises ``Error``, naming the row."""
    if column is None:
        column = _guess(row, TEXT_COLUMNS, "text", "--text-column")
    text = _value(row, column, "text", "--text-column")
    if not isinstance(text, str) or not text.strip():
        raise Error(f"{row.where} has the text {text!r} in {column!r}: give words, or remove the row")
    return text


def _guess(row: Row, usual: tuple[str, ...], what: str, option: str) -> str:
    columns = {str(name).strip().lower(): name for name in row.values}
    for name in usual:
        if name in columns:
            return columns[name]
    raise Error(
        f"{row.where} has no column with a usual name for the {what} ({', '.join(usual)}), only "
        f"{_listed(row.values)}: name it with {option}"
    )


def _value(row: Row, column: str, what: str, option: str):
    if column not in row.values:
        raise Error(
            f"{row.where} has no column {column!r} for the {what}, only {_listed(row.values)}: correct it, "
            f"or name another column with {option}"
        )
    return row.values[column]


def _classes(name: str | Path, labels: Iterable[str]) -> tuple[str, ...]:
    """The different labels, integers by value, others by name."""
    found = {*labels}
    if len(found) < 2:
        raise Error(
            f"{name} has only the label {found.pop()!r} in its training part: give at least two classes"
        )
    try:
        return tuple(sorted(found, key=lambda label: (int(label), label)))  # of "1" and "01" too
    except ValueError:
        return tuple(sorted(found))


def _listed(names: Iterable) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")

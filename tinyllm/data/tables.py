"""Reading tables of text: CSV (RFC 4180) and tab-separated values, whose first line names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.files import read_text

LONGEST_FIELD = 2**27  # characters; the default of the csv module is 2**17


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a .csv or .tsv file, column name -> text; lines without any field are skipped.

    In a .csv file a field may be quoted, and then contain commas, line ends and doubled quotes. In a .tsv
    file quotes are ordinary characters. Raises ``Error``, naming the row (from 1, below the header), for a
    missing or repeated column name, and for a row with more or fewer fields than columns.
    """
    text = read_text(path).removeprefix("\ufeff")  # a byte order mark, as spreadsheets write it
    tabs = path.suffix.lower() == ".tsv"
    style = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else dict(strict=True)
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        rows = csv.reader(_lines(text), **style)
        yield from _named(path, filter(None, rows), "tabs" if tabs else "commas")
    finally:
        csv.field_size_limit(before)


def _lines(text: str) -> Iterator[str]:
    """The lines of a text with their ends; only \\n ends one, unlike in ``str.splitlines``."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _named(path: Path, rows: Iterator[list[str]], separator: str) -> Iterator[dict[str, str]]:
    number = 0
    try:
        names = next(rows, [])
        for name in names:
            if not name.strip() or names.count(name) > 1:
                raise Error(
                    f"the first line of {path} names a column {name!r}"
                    f"{' twice' if name.strip() else ''}: give every column a name of its own"
                )
        for number, fields in enumerate(rows, 1):
            if len(fields) != len(names):
                raise Error(
                    f"row {number} of {path} has {len(fields)} fields separated by {separator}, and the "
                    f"first line names {len(names)} columns: correct it"
                )
            yield dict(zip(names, fields))
    except csv.Error as error:
        raise Error(f"row {number + 1} of {path} cannot be read ({error}): correct it") from None

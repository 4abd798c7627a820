"""The published tables: Markdown that the commands of ``python -m parity`` write into this folder's pages.

A page marks the place of each table with two comment lines, ``<!-- proof -->`` and ``<!-- /proof -->``. With
``--write`` a command replaces what is between them, so that no figure is ever copied by hand.

At its top this module imports the standard library only, for the processes of ``parity.bench``.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).with_name("README.md")


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    return "\n".join(line(cells) for cells in (head, ["---"] * len(head), *rows))


def line(cells: Iterable[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def measured(command: str, *facts: str) -> str:
    """The sentence above a table: which command measured it, when, and on what."""
    return f"`python -m parity {command}`, {datetime.date.today()}: {', '.join(facts)}."


def read(page: Path, name: str) -> str:
    """The text between the markers ``name`` of a page."""
    return _split(page, name)[1]


def cells(text: str) -> list[list[list[str]]]:
    """For each Markdown table in a text, the cells of every row below the head, without backquotes."""
    tables = re.findall(r"^\|[ :|-]+\|\n((?:\|.*(?:\n|\Z))*)", text, re.MULTILINE)
    rows = (table.splitlines() for table in tables)
    return [[[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table] for table in rows]


def first_cells(text: str) -> list[list[str]]:
    """The first cell of every row of ``cells``."""
    return [[row[0] for row in table] for table in cells(text)]


def write(page: Path, name: str, text: str) -> None:
    """Replace the text between the markers ``name`` of a page, atomically."""
    from tinyllm.files import write_whole

    before, _, after = _split(page, name)
    write_whole(page, f"{before}\n{text.strip()}\n\n{after}".encode())


def check_page(page: Path, name: str) -> None:
    """Raise ``Error`` if ``--write`` could not write this table: before hours of measuring, not after."""
    _split(page, name)


def _split(page: Path, name: str) -> tuple[str, str, str]:
    """What is before, between and after the markers; the markers belong to the first and the last part."""
    from tinyllm.errors import Error
    from tinyllm.files import read_text

    if not page.is_file():  # an installed package has no pages
        raise Error(f"--write needs {page}, which does not exist: run the command in a checkout")
    opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = read_text(page).partition(opening)
    text, closed, after = rest.partition(closing)
    if not (found and closed):
        raise Error(
            f"{page} lacks the markers {opening.strip()} and {closing}: add each on a line of its own"
        )
    return before + found, text, closed + after

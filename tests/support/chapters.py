"""The chapters in ``examples/``: percent-format scripts, whose printed lines stand below each cell."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

EXPECTED = "# > "  # begins a comment line with what a cell prints


def cells(path: Path) -> list[tuple[int, str, list[str]]]:
    """(first line, code, expected lines) of each code cell; an empty line is expected as ``# >``."""
    found = []
    for match in re.finditer(
        r"^# %%(?! \[markdown\])[^\n]*\n(.*?)(?=^# %%|\Z)", path.read_text("utf-8"), re.M | re.S
    ):
        lines = match[1].splitlines()
        expected = [
            line.removeprefix(EXPECTED.rstrip()).removeprefix(" ") for line in lines if _is_output(line)
        ]
        first = match.string.count("\n", 0, match.start(1)) + 1
        found.append((first, match[1], expected))
    return found


def _is_output(line: str) -> bool:
    return line.startswith(EXPECTED) or line == EXPECTED.rstrip()


def run(path: Path):
    """Run a chapter cell by cell; yields (first line, printed lines, expected lines) of each."""
    names = {"__name__": "__main__", "__file__": str(path)}
    for first, code, expected in cells(path):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (first - 1) + code, str(path), "exec"), names)
        yield first, [line.rstrip() for line in printed.getvalue().splitlines()], expected

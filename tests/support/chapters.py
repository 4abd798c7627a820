"""The chapters in ``examples/``: percent-format scripts, whose printed lines stand below each cell.

    # > 3.14          what the cell prints
    # > 1.2 s … GB    … is any text: times, and the last digits of rounding errors
    # > …             any lines, none included
    # small> 3.1      in place of all of these, what it prints with TINYLLM_EXAMPLES=small

A cell without such lines is run and not compared.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHAPTERS = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))

CELL = re.compile(r"^# %%(?P<kind>[^\n]*)\n(?P<text>.*?)(?=^# %%|\Z)", re.M | re.S)

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")


def cells(path: Path, small: bool) -> list[tuple[int, str, list[str]]]:
    """(first line, code, expected lines) of each code cell."""
    found = []
    for match in CELL.finditer(path.read_text("utf-8")):
        if "[markdown]" in match["kind"]:
            continue
        marked = {kind: _marked(match["text"], kind) for kind in (">", "small>")}
        expected = marked["small>"] if small and marked["small>"] else marked[">"]
        found.append((match.string.count("\n", 0, match.start("text")) + 1, match["text"], expected))
    return found


def _marked(code: str, mark: str) -> list[str]:
    return re.findall(rf"^# {mark}(?: (.*))?$", code, re.M)


def prose(path: Path) -> str:
    """The text of the markdown cells."""
    cells = CELL.finditer(path.read_text("utf-8"))
    parts = [re.sub(r"^# ?", "", cell["text"], flags=re.M) for cell in cells if "[markdown]" in cell["kind"]]
    return "\n".join(parts)


def run(path: Path, small: bool) -> Iterator[tuple[int, list[str], list[str]]]:
    """Run a chapter cell by cell; yields (first line, printed lines, expected lines) of each."""
    names = {"__name__": "__main__", "__file__": str(path)}
    for first, code, expected in cells(path, small):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (first - 1) + code, str(path), "exec"), names)
        yield first, [line.rstrip() for line in printed.getvalue().splitlines()], expected


def agrees(printed: list[str], expected: list[str], rounding: bool = False) -> bool:
    """Is this what is expected? With ``rounding``, numbers may differ by one unit of their last digit."""
    pattern, numbers = "", []
    for line in expected:
        if line == "…":
            pattern += r"(?:.*\n)*?"
            continue
        for part in re.split(f"(…|{NUMBER.pattern})", line):
            number = rounding and NUMBER.fullmatch(part)
            numbers += [part] if number else []
            pattern += ".*?" if part == "…" else f"({NUMBER.pattern})" if number else re.escape(part)
        pattern += r"\n"
    found = re.fullmatch(pattern, "".join(f"{line}\n" for line in printed))
    return found is not None and all(map(_close, found.groups(), numbers))


def _close(printed: str, expected: str) -> bool:
    one, other = (Decimal(number.replace(",", "")) for number in (printed, expected))
    return abs(one - other) <= Decimal((0, (1,), other.as_tuple().exponent))

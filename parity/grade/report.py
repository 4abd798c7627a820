"""The verdicts of ``grading.py`` in words, and the table of all exercises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from parity.grade import course
from parity.grade.exercise import Exercise, Inputs
from parity.grade.grading import DONE, OPEN, WRONG, Verdict, grade
from tinyllm.errors import Error

NUMBERED = "[0-9][0-9]_*.py"

PRINTED = 10  # lines of a function's output that are shown


def grade_files(paths: Iterable[Path]) -> int:
    """Print the verdict on each function of each file; return 0 if all are done, else 1."""
    exercises = [(path, exercise_of(path)) for path in paths]  # all names are checked first
    all_done = True
    for path, exercise in exercises:
        verdicts = grade(exercise, path)
        print("\n".join([f"{path}:", *(line for verdict in verdicts for line in describe(verdict))]))
        all_done &= all(verdict.status == DONE for verdict in verdicts)
    return 0 if all_done else 1


def exercise_of(path: Path) -> Exercise:
    """The exercise that a file is named after, with or without its number."""
    name = path.stem.lstrip("0123456789").lstrip("_")
    if not path.is_file():
        raise Error(f"{path} is not a file: give a file of examples/exercises")
    if name not in course.COURSE:
        raise Error(
            f"{path} is not named after an exercise: keep the file's name; the exercises are "
            f"{', '.join(course.COURSE)}"
        )
    return course.COURSE[name]


def describe(verdict: Verdict) -> list[str]:
    """One verdict: what is wrong, the smallest input that shows it, and the hint."""
    lines = [f"  {verdict.function}: {verdict.status}"]
    if verdict.failure is not None:
        lines += [f"    {line}" for line in verdict.failure.problem.splitlines()]
        if verdict.failure.inputs is not None:
            which = "an" if verdict.failure.slow else "smallest"
            lines += [f"    {which} input that fails: {call(verdict.function, verdict.failure.inputs)}"]
        printed = verdict.failure.printed.splitlines()
        lines += [f"    it printed: {line}" for line in printed[:PRINTED]]
        lines += [f"    … and {len(printed) - PRINTED} lines more"] if len(printed) > PRINTED else []
    if verdict.hint is not None:
        lines += [f"    hint: {verdict.hint}"]
    return lines


def call(function: str, inputs: Inputs) -> str:
    """The call as a line of Python."""
    shown = (f"{name}={_literal(argument)}" for name, argument in inputs.items())
    return f"{function}({', '.join(shown)})"


def _literal(argument) -> str:
    if isinstance(argument, list):
        return f"[{', '.join(map(_literal, argument))}]"
    if isinstance(argument, np.ndarray) and not argument.size:
        return f"np.zeros({argument.shape})"
    if isinstance(argument, np.ndarray):
        digits = np.array2string(argument, separator=", ", threshold=10**6, max_line_width=10**6)
        return f"np.array({' '.join(digits.split())})"
    return repr(argument)


def grade_folder(folder: Path) -> int:
    """Print a table of all exercises in a folder; return 0, whatever is still open."""
    files = sorted(folder.glob(NUMBERED))
    if not files:
        raise Error(f"{folder} has no exercises: give the examples/exercises of a checkout")
    rows, total = [], Counter()
    for path in files:
        try:
            verdicts = grade(exercise_of(path), path)
        except Error as error:
            rows.append((path.stem, WRONG, str(error)))
            total[WRONG] += 1
            continue
        names = {status: [v.function for v in verdicts if v.status == status] for status in (WRONG, OPEN)}
        status = next((status for status in (WRONG, OPEN) if names[status]), DONE)
        rows.append((path.stem, status, ", ".join(names.get(status, []))))
        total[status] += 1
    print(_table(rows))
    counts = ", ".join(f"{total[status]} {status}" for status in (DONE, WRONG, OPEN))
    print(f"\n{counts}; details: python -m parity grade FILE")
    return 0


def _table(rows: list[tuple[str, ...]]) -> str:
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(
        f"{name:<{width}}  {status:<5}  {functions}".rstrip() for name, status, functions in rows
    )

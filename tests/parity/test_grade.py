"""Grading of exercises: solutions pass, every usual mistake gets its own hint, and a report is readable."""

import re
from pathlib import Path

import numpy as np
import pytest
from support import mistakes

from parity.grade.course import COURSE
from parity.grade.grading import DONE, OPEN, _trials, grade, grade_function, hint_of
from parity.grade.report import exercise_of

ROOT = Path(__file__).parents[2]
EXERCISES = sorted((ROOT / "examples/exercises").glob("[0-9][0-9]_*.py"))
SOLUTIONS = sorted((ROOT / "examples/exercises/solutions").glob("[0-9][0-9]_*.py"))

KNOWN = [
    (exercise.name, part.function, mistake.name)
    for exercise in COURSE.values()
    for part in exercise.parts
    for mistake in part.mistakes
]


def test_every_exercise_has_a_file_and_a_solution():
    assert [path.name for path in EXERCISES] == [path.name for path in SOLUTIONS]
    assert {exercise_of(path).name for path in EXERCISES} == {*COURSE}


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
def test_what_an_exercise_names_is_there(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"``(.*?\.py.*?)``", text)
    assert named and [name for name in named if not (ROOT / name).is_file()] == []
    assert f"Grade it: python -m parity grade examples/exercises/{path.name}\n" in text


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_a_solution_is_done(path):
    assert {v.function: v.status for v in grade(exercise_of(path), path)} == {
        part.function: DONE for part in exercise_of(path).parts
    }


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
def test_an_exercise_is_open(path):
    assert {verdict.status for verdict in grade(exercise_of(path), path)} == {OPEN}


def test_every_mistake_is_planted_in_three_ways():
    planted = mistakes.planted()
    assert sorted(planted) == sorted(KNOWN)
    assert {key: len(variants) for key, variants in planted.items() if len(variants) < 3} == {}


@pytest.mark.parametrize("variants", mistakes.VARIANTS, ids=lambda each: each.function)
def test_what_a_mistake_is_planted_in_is_right_without_it(variants):
    for solution in variants.solutions():
        assert grade_function(part_of(variants.exercise, variants.function), solution).status == DONE


@pytest.mark.parametrize("key", KNOWN, ids=": ".join)
def test_a_planted_mistake_gets_its_own_hint(key):
    name, function, mistake = key
    part = part_of(name, function)
    hint = next(each.hint for each in part.mistakes if each.name == mistake)
    for variant in mistakes.planted()[key]:
        assert hint_of(part, variant) == hint, variant.__code__.co_filename


@pytest.mark.parametrize("name", COURSE)
def test_every_argument_varies(name):
    for part in COURSE[name].parts:
        inputs = [inputs for inputs, _ in _trials(part)]
        assert [name for name in inputs[0] if len({repr(each[name]) for each in inputs}) == 1] == []


@pytest.mark.parametrize(
    "key, most",
    [
        (("lora", "lora_gradient", "no scale"), 10),
        (("causal_attention", "causal_attention_gradient", "the softmax's sum missing"), 10),
        (("cross_entropy", "cross_entropy", "ignored targets counted"), 6),
    ],
    ids=str,
)
def test_the_input_that_is_shown_is_small(key, most):
    failure = grade_function(part_of(*key[:2]), mistakes.planted()[key][0]).failure
    assert sum(map(np.size, failure.inputs.values())) <= most


def part_of(name, function):
    return next(part for part in COURSE[name].parts if part.function == function)

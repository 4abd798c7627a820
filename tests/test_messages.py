"""What a message or a docstring names exists: every dotted name of the package can be imported."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import tinyllm

ROOT = Path(tinyllm.__file__).parent

DOTTED = re.compile(r"\btinyllm(?:\.[A-Za-z_]\w*)+")


def names_in_strings() -> dict[str, str]:
    """Every ``tinyllm.x.y`` in a string literal, with the file it is in."""
    found = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= dict.fromkeys(DOTTED.findall(node.value), str(path.relative_to(ROOT)))
    return found


def resolves(name: str) -> bool:
    """Whether the name is a module, or an attribute of one, or of a class there."""
    first, *parts = name.split(".")
    thing = importlib.import_module(first)
    for number, part in enumerate(parts):
        if not hasattr(thing, part):
            try:
                importlib.import_module(".".join([first, *parts[: number + 1]]))
            except ImportError:
                return False
        thing = getattr(thing, part)
    return True


@pytest.mark.parametrize(("name", "path"), names_in_strings().items())
def test_every_name_in_a_message_exists(name, path):
    assert resolves(name), f"{path} names {name}"


def test_a_name_that_does_not_exist_is_found():
    assert not resolves("tinyllm.generate.probabilities")
    assert resolves("tinyllm.inference.sampling.probabilities")

"""Names in messages and docstrings: dotted names can be imported, and pip commands name our distribution."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import tinyllm

ROOT = Path(tinyllm.__file__).parent

DOTTED = re.compile(r"\btinyllm(?:\.[A-Za-z_]\w*)+")


def names_in_strings() -> dict[str, str]:
    """Every ``tinyllm.x.y`` in a string literal -> the file that contains it."""
    found = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= dict.fromkeys(DOTTED.findall(node.value), str(path.relative_to(ROOT)))
    return found


def resolves(name: str) -> bool:
    """Whether the name is a module, or an attribute of a module or of a class in it."""
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


def test_resolves_rejects_a_name_that_does_not_exist():
    assert not resolves("tinyllm.generate.probabilities")
    assert resolves("tinyllm.inference.sampling.probabilities")


def foreign_installs(text: str) -> list[str]:
    """Requirements such as ``tinyllm[models]``: ``tinyllm`` on PyPI is another project's package."""
    return re.findall(r"\btinyllm\[[^]]*\]|\bpip install [^&;|`\n]*\btinyllm(?![\w-])", text)


def test_no_file_tells_anyone_to_install_another_projects_package():
    files = [ROOT.parent / name for name in ("README.md", "pyproject.toml")]
    for folder in ("tinyllm", "parity", "examples", ".ci", ".github"):
        for kind in ("*.py", "*.md", "*.txt", "*.yml", "run"):
            files += (ROOT.parent / folder).rglob(kind)
    found = {str(path): foreign_installs(path.read_text(encoding="utf-8")) for path in files}
    assert len(found) > 100 and not {path: names for path, names in found.items() if names}


def test_foreign_installs_finds_planted_ones():
    assert foreign_installs("needs jinja2: pip install 'tinyllm[models]'")
    assert foreign_installs('test = ["tinyllm[parity,plot]"]')
    assert foreign_installs("pip install -U tinyllm && tinyllm train")
    assert not foreign_installs("pip install 'tinyllm-numpy[models]' && tinyllm train")
    assert not foreign_installs("pip install 'tinyllm-numpy' or pip install '.[plot]'")

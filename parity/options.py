"""Checks of command-line options, made before a command begins its work."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from tinyllm.checks import pip_install
from tinyllm.errors import Error
from tinyllm.files import write_whole


def check_at_least(least: int, name: str, value: int) -> None:
    """Raise ``Error`` if the value of ``--name`` is below ``least``."""
    if value < least:
        raise Error(f"--{name} {value} is too small; give at least {least}")


def check_names(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``Error`` unless ``given`` is one or more of the ``known`` names, each at most once."""
    given, known = list(given), list(known)
    choices = ", ".join(known)
    if unknown := [name for name in given if name not in known]:
        raise Error(f"--{option} {unknown[0]} is unknown; choose from {choices}")
    if not given:
        raise Error(f"--{option} is empty; choose one or more of {choices}")
    if len(set(given)) < len(given):
        raise Error(f"--{option} {' '.join(given)} repeats a name; give each of them once")


def check_writable(name: str, path: Path | None) -> None:
    """Raise ``Error`` if the file of ``--name`` cannot be written; None means that the option was omitted."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise Error(f"--{name} {path} cannot be written; name a file in a folder that exists")


def check_installed(command: str, modules: Iterable[str]) -> None:
    """Raise ``Error`` if one of the packages that a command needs is not installed."""
    for module in modules:
        if not importlib.util.find_spec(module):
            raise Error(f"{command} needs {module}: {pip_install('test')}")


def write_json(path: Path | None, result: dict) -> None:
    """Write the complete result to the file of ``--json``, if one was given."""
    if path:
        write_whole(path, f"{json.dumps(result, indent=1)}\n".encode())

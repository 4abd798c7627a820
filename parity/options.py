"""What the commands of ``python -m parity`` check of their options before they begin."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from tinyllm.errors import Error


def check_at_least(least: int, name: str, value: int) -> None:
    """Refuse a number that is too small."""
    if value < least:
        raise Error(f"--{name} {value} is too small; give at least {least}")


def check_writable(name: str, path: Path | None) -> None:
    """Refuse a file whose folder does not exist; an option that was not given is fine."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise Error(f"--{name} {path} cannot be written; name a file in a folder that exists")


def check_installed(command: str, modules: Iterable[str], extra: str) -> None:
    """Refuse a command that needs a package which is not installed; ``extra`` brings it."""
    for module in modules:
        if not importlib.util.find_spec(module):
            raise Error(f"{command} needs {module}: pip install 'tinyllm-numpy[{extra}]'")


def write_json(path: Path | None, result: dict) -> None:
    """Write all that was measured, if a file was asked for."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

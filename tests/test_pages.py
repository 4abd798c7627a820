"""The pages (README.md of the repository and of folders): links, commands and Python code work as written."""

import re
from dataclasses import fields

import numpy as np
import pytest
from support.suite import ROOT

from parity.__main__ import COMMANDS as PARITY
from tinyllm.cli import COMMANDS
from tinyllm.cli.finetune import TASKS

PAGES = [
    page
    for page in sorted(path.relative_to(ROOT) for path in ROOT.glob("**/README.md"))
    if not any(part.startswith(".") or part == "build" for part in page.parts)
]
LINK = re.compile(r"\]\(([^)#]+)")


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """Inline code, and the lines of code blocks without a language, up to a comment."""
    lines = "".join(code_blocks(text, "")).splitlines()
    return [part.partition(" #")[0] for part in [*re.findall(r"`([^`\n]+)`", text), *lines]]


def options_of(program: str, words: list[str]) -> set[str]:
    """The options of the command that ``words`` begin with; KeyError if there is none."""
    if program == "tinyllm":
        known = [COMMANDS[words[0]][0]]
    else:
        known = [PARITY[next(name for name in (" ".join(words[:2]), words[0]) if name in PARITY)]]
    if words[0] == "finetune":
        known += [options for options, _ in TASKS.values()]
    names = [field.name.replace("_", "-") for options in known for field in fields(options)]
    return {"help", "preset", "from", "task", *names, *(f"no-{name}" for name in names)}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_that_exist(page):
    targets = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (ROOT / page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_and_options_exist(page):
    parts = [
        part.strip() for line in code((ROOT / page).read_text(encoding="utf-8")) for part in line.split("&&")
    ]
    every_option = set().union(
        *(options_of("tinyllm", [name]) for name in COMMANDS),
        *(options_of("parity", name.split()) for name in PARITY),
    )
    for part in parts:
        used = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", part))
        command = re.match(r"(?:python -m )?(tinyllm|parity) ([a-z].*)", part)
        known = options_of(command[1], command[2].split()) if command else every_option
        assert used <= known, part


def test_front_page_is_short_and_its_python_runs(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    (program,) = code_blocks(text, "python")
    values = {}
    exec(program, values)
    assert capsys.readouterr().out.strip()
    assert values["loss"].item() < np.log(50257)

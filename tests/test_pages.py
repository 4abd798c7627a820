"""The pages (front page, folders, measurements): links, commands and Python code work as written."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from support.chapters import CHAPTERS
from support.suite import ROOT

from parity.__main__ import COMMANDS as PARITY
from tinyllm.cli import COMMANDS
from tinyllm.cli import options_of as class_of
from tinyllm.cli.finetune import TASKS

PAGES = [
    page
    for page in sorted(path.relative_to(ROOT) for path in ROOT.glob("**/*.md"))
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
        known = [class_of(words[0])]
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
        if part.startswith("jupytext "):
            known = {"to"}
        assert used <= known, part


def test_front_page_is_short_and_its_python_runs(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    (program,) = code_blocks(text, "python")
    values = {}
    exec(program, values)
    assert capsys.readouterr().out.strip()
    assert values["loss"].item() < np.log(50257)


def definitions(text: str) -> set[str]:
    """The names that a module defines: ``function``, ``Class``, ``Class.method``, ``Class.attribute``."""
    found, nodes = set(), [("", node) for node in ast.parse(text).body]
    for prefix, node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            nodes += [(f"{prefix}{node.name}.", inner) for inner in node.body]
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return found


def wrong_names(page: Path, text: str) -> list[str]:
    """Links such as [`Class.method`](file.py) whose file does not define the name."""
    links = re.findall(r"\[`([A-Za-z_][\w.]*)`\]\(([^)#]+\.py)\)", text)
    named = [(name, page.parent / file) for name, file in links if not name.endswith(".py")]
    return [
        f"{file}: {name}" for name, file in named if name not in definitions(file.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_names_in_links_are_defined_in_their_files(page):
    assert wrong_names(ROOT / page, (ROOT / page).read_text(encoding="utf-8")) == []


def test_a_wrong_name_in_a_link_is_found():
    text = "[`Tensor.backward`](tinyllm/tensor.py) [`Tensor.forward`](tinyllm/tensor.py)"
    (found,) = wrong_names(ROOT / "README.md", text)
    assert found.endswith("tensor.py: Tensor.forward")


@pytest.mark.parametrize("page", [p for p in PAGES if p.parts[0] == "tinyllm"], ids=str)
def test_the_page_of_a_folder_names_all_its_modules(page):
    folder, text = ROOT / page.parent, (ROOT / page).read_text(encoding="utf-8")
    modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert [name for name in modules if f"`{name}`" not in text] == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_the_path_names_the_exercises_and_a_file_of_the_chapter(chapter):
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| \[\d\d [^]]*\]\({chapter.name}\).*$", page, re.M)
    head = " ".join(chapter.read_text(encoding="utf-8").partition("\n# %%\n")[0].split("\n# "))
    assert between(r"\[(\d\d)\]\(exercises/\S*\)( …)?", row) == between(r"(\d\d)_\w+\.py`( to)?", head)
    (file,) = re.findall(r"`\]\(\.\./(.*?)\)", row)
    assert f"`{file}`" in head or (file.startswith("tinyllm/models/") and f"`{Path(file).name}`" in head)


def between(pattern: str, text: str) -> set[int]:
    """The numbers that a pattern finds, and those up to the next one if it says so."""
    found = [(int(number), more) for number, more in re.findall(pattern, text)]
    ends = [*found[1:], (0, "")]
    return {
        n
        for (first, more), (last, _) in zip(found, ends)
        for n in range(first, (last if more else first) + 1)
    }


def test_the_path_and_the_glossary_are_complete():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    path, _, glossary = text.partition("## Glossary\n")
    assert re.findall(r"^\| \[\d\d [^]]*\]\((.*?)\)", path, re.M) == [chapter.name for chapter in CHAPTERS]
    terms = re.findall(r"^\| (.*?) \| (.*?) \| \[`.*?`\]\(.*\) \|$", glossary, re.M)
    assert len(terms) >= 60 and len(terms) == len(re.findall(r"^\| ", glossary, re.M)) - 1
    names = [term.lower() for term, _ in terms]
    assert names == sorted(set(names))

"""No process that we start runs code from the folder in which the user happens to work."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

START = {"run", "Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput"}
STARTERS = {f"subprocess.{name}" for name in START} | {"os.system", "os.popen", "os.startfile"}

# Where processes are started, and how many calls start one
KNOWN = {
    "parity/bench/cuda/report.py": 1,
    "parity/bench/process.py": 2,
    "parity/bench/serve.py": 1,
    "parity/durability/kill.py": 1,
    "parity/durability/processes.py": 1,
    "tinyllm/tokenizers/chat_template.py": 1,
    "tinyllm/weights/wheels.py": 1,
}


def starts(text: str) -> list[ast.Call]:
    """The calls that start a process."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in STARTERS or name.startswith(("os.exec", "os.spawn", "os.posix_spawn")):
                found.append(node)
    return found


def unsafe_commands(text: str) -> list[str]:
    """The commands, written as lists, of other programs, or of Python without -P or -I."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.List) and len(node.elts) > 1:
            program, flag = (ast.unparse(element) for element in node.elts[:2])
            if program == "sys.executable" and flag not in ("'-P'", "'-I'"):
                found.append(ast.unparse(node))
    return found


def sources() -> dict[str, str]:
    files = [file for folder in ("tinyllm", "parity") for file in (ROOT / folder).rglob("*.py")]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_every_place_that_starts_a_process_is_known():
    found = {name: len(starts(text)) for name, text in sources().items()}
    assert {name: number for name, number in found.items() if number} == KNOWN


def test_no_python_is_started_that_searches_the_working_folder():
    assert [command for text in sources().values() for command in unsafe_commands(text)] == []


@pytest.mark.parametrize("name", [name for name in KNOWN if name.startswith("tinyllm/")])
def test_processes_of_the_package_start_in_another_folder_without_a_shell(name):
    for call in starts((ROOT / name).read_text(encoding="utf-8")):
        options = {option.arg for option in call.keywords}
        assert {"cwd", "env"} <= options and "shell" not in options


def test_a_planted_call_is_seen():
    assert len(starts("import os, subprocess\nos.execv(a, b)\nsubprocess.run(c)\nos.system(d)")) == 3
    assert unsafe_commands("x = [sys.executable, '-m', 'pip']\ny = [sys.executable, '-P', '-m', 'pip']") == [
        "[sys.executable, '-m', 'pip']"
    ]


def test_no_host_of_a_package_index_is_named():
    """A message names the command: pip knows which index it uses, and many have their own."""
    hosts = ("pypi" + ".org", "python" + "hosted")
    folders = ("tinyllm", "parity", "tests", "examples", ".ci", ".github")
    for folder in folders:
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".yml", ".md", "") and file.is_file():
                text = file.read_text(encoding="utf-8", errors="replace")
                assert not any(host in text for host in hosts), file

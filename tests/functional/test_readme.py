"""The example in tinyllm/functional/README.md, followed word for word in a copy of the checkout."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from support.suite import ROOT

PAGE = (ROOT / "tinyllm" / "functional" / "README.md").read_text(encoding="utf-8")

# Each code block, with the file that the text before it names last: (file or None, language, code)
BLOCKS = [
    (re.findall(r"`((?:tinyllm|parity)/\S+\.py)`", PAGE[: block.start()])[-1:], *block.groups())
    for block in re.finditer(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
]
CODE = {file[0]: code for file, language, code in BLOCKS if language == "python"}
CASES = "parity/ops/functional.py"

CHECKS = """
test_output_and_gradients_match_torch test_gradient_matches_directional_derivative
test_fused_op_matches_plain_form test_float32_results_are_float32_and_close_to_float64
test_one_and_four_threads_are_bitwise_identical test_public_op_has_cases_and_plain_form
""".split()


@pytest.fixture
def follow(tmp_path):
    """Add the page's code to a copy of the checkout, and return a function that runs a command there."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("tinyllm", "parity", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def run(code, command):
        for name, added in code.items():
            file = tmp_path / name
            text = file.read_text(encoding="utf-8")
            if name.endswith("__init__.py"):
                text = text.replace("\n# The names of these lines", f"{added}\n# The names of these lines")
                assert added in text
            else:
                text += f"\n\n{added}"
            file.write_text(text, encoding="utf-8")
        command = command.replace("ruff", "python -m ruff").replace("python", shlex.quote(sys.executable))
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


def test_example_has_under_40_lines_in_one_place_each():
    assert len(CODE) == sum(language == "python" for _, language, _ in BLOCKS) == 4
    assert sum(line.strip() != "" for code in CODE.values() for line in code.splitlines()) < 40


def test_example_passes_the_proof_and_the_linter(follow):
    test, lint, proof = BLOCKS[-1][2].splitlines()
    done = follow(CODE, f"{test} -rp")
    assert done.returncode == 0, done.stdout
    passed = re.findall(r"^PASSED \S+::(\S+)\[relu2\]", done.stdout, re.MULTILINE)
    assert {*CHECKS} <= {*passed}, done.stdout
    assert "test_device_discipline.py" in done.stdout
    done = follow({}, lint.replace("format .", "format --check ."))
    assert done.returncode == 0, done.stdout + done.stderr
    done = follow({}, "python -m pytest tests/functional -q --collect-only -m proof")
    assert "[relu2]" in done.stdout and proof == "python -m parity proof"


def test_public_op_without_cases_is_named(follow):
    code = {file: text for file, text in CODE.items() if file != CASES}
    done = follow(code, "python -m pytest tests/functional -q -k test_public_op_has_cases_and_plain_form")
    assert done.returncode == 1
    assert "relu2 is not proven" in done.stdout and "1 failed" in done.stdout

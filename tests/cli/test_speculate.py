"""``--speculate`` of ``tinyllm generate`` and ``tinyllm chat``: the same text, and wrong requests."""

import io
import sys

import numpy as np
import pytest
from support.chat_model import write_model

from tinyllm import GPT2, GPT2Config
from tinyllm.cli import main
from tinyllm.inference.speculative import DraftModel, PromptLookup

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def drafted(monkeypatch):
    """The types of the drafters that were asked for candidates, which cost nothing."""
    asked = []
    for drafter in (PromptLookup, DraftModel):

        def candidates(self, text, most, correct=drafter.candidates):
            asked.append(type(self))
            return correct(self, text, most)

        monkeypatch.setattr(drafter, "candidates", candidates)
    monkeypatch.setattr("tinyllm.inference.speculative.pass_cost", lambda tokens: 0.5)
    return asked


@pytest.mark.parametrize("command", ["generate", "generate --chat", "chat"])
def test_text_is_that_of_plain_generation(command, folder, drafted, capsys, monkeypatch):
    texts = []
    prompt = [] if command == "chat" else ["--prompt", "abcabcabc"]
    for draft in ([], ["--speculate", "prompt"], ["--speculate", str(folder)]):
        drafted.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO("abcabcabc\nabcabc\n"))
        assert (
            main([*command.split(), "--model", str(folder), "--max-new-tokens", "30", *prompt, *draft]) == 0
        )
        texts.append(capsys.readouterr().out)
        expected = {"prompt": {PromptLookup}, str(folder): {DraftModel}}
        assert set(drafted) == (expected[draft[1]] if draft else set())
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--speculate", "promt"], "there is no model 'promt' (did you mean prompt?)"),
        (["--speculate", "prompt", "--show-probabilities"], "omit it, or --speculate"),
    ],
)
def test_wrong_request(options, said, folder, capsys):
    assert main(["generate", "--model", str(folder), "--prompt", "a", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_draft_with_another_vocabulary(folder, tmp_path, capsys, monkeypatch, command):
    """One line and exit code 2, also of a chat: before its first line is read."""
    sizes = dict(vocab_size=20, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    GPT2(GPT2Config(**sizes), rng=np.random.default_rng(0)).save_pretrained(tmp_path / "draft")
    options = ["--model", str(folder), "--speculate", str(tmp_path / "draft")]
    lines = io.StringIO("Hi\nthere\n")
    monkeypatch.setattr(sys, "stdin", lines)
    assert main([command, *options, *(["--prompt", "a" * 250] if command == "generate" else [])]) == 2
    out, err = capsys.readouterr()
    assert "vocabulary of 20 tokens and the model of 258" in err and err.count("\n") == 1
    assert out == "" and lines.tell() == 0

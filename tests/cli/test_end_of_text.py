"""Generation stops at the tokens that end a text or a turn."""

import io
import json
import sys

import pytest
from support.chat_model import CHATML, END, Script, write_model

from tinyllm import generate
from tinyllm.cli import main
from tinyllm.inference.chat import load_model_and_tokenizer

pytest.importorskip("jinja2")


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path)


def test_grid_stops_at_the_end_of_the_text(folder, capsys):
    model, tokenizer = load_model_and_tokenizer(str(folder))
    steps = generate(model, [tokenizer.encode("hello")], 8, temperature=0)
    tokens = [int(step[0]) for step in steps]
    assert tokens.index(tokens[4]) == 4
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[4]}))
    args = ["generate", "--model", str(folder), "--prompt", "hello", "--grid", "--max-new-tokens", "8"]
    assert main(args) == 0
    line = capsys.readouterr().out.splitlines()[0]
    text = " ".join(tokenizer.decode(tokens[:4]).split())
    assert line == f"top-k   1  temperature 0.0  {text}".splitlines()[0]


def test_chat_stops_at_the_token_that_the_template_writes_after_an_answer(folder, capsys, monkeypatch):
    """<|im_end|>, though the config names another token, and under a name that is not known."""
    for name in ("<|im_end|>", "<|turn|>"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            content = (folder / file).read_text(encoding="utf-8").replace("<|im_end|>", name)
            (folder / file).write_text(content, encoding="utf-8")
        config = {"eos_token": "<|im_start|>", "chat_template": CHATML.replace("<|im_end|>", name)}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        script = Script([[*b"Rome", END, *b"and so on"]])
        monkeypatch.setattr("tinyllm.inference.chat.generate", script.generate)
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        assert main(["chat", "--model", str(folder)]) == 0
        assert capsys.readouterr().out == "Rome\n"
        script.append([*b"Rome", END, *b"and so on"])
        monkeypatch.setattr("tinyllm.cli.generate.generate", script.generate)
        assert main(["generate", "--chat", "--model", str(folder), "--prompt", "hello"]) == 0
        assert capsys.readouterr().out == "Rome\n"

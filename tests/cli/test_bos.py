"""The BOS token of a Llama in ``generate``, ``eval`` and ``chat``: fed once, as transformers feeds it."""

import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
from support.chat_model import BYTE_ID, START, Script, write_model

from tinyllm.cli import main
from tinyllm.cli.options import TextModelOptions
from tinyllm.inference.chat import Conversation, load_model_and_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

TEXT = "The cat sat on the mat."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose tokenizer.json puts <|im_start|> before a text; read-only."""
    path = write_model(tmp_path_factory.mktemp("models") / "llama")
    library = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", START)]
    )
    library.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def reference(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def greedy(reference, ids):
    model, tokenizer = reference
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=START)
    settings["attention_mask"] = torch.ones(1, len(ids), dtype=torch.int64)  # START is not padding
    return tokenizer.decode(model.generate(torch.tensor([ids]), **settings)[0], skip_special_tokens=True)


def test_greedy_text_equals_transformers(folder, reference, capsys):
    args = ["generate", "--model", str(folder), "--prompt", TEXT, "--temperature", "0"]
    args += ["--max-new-tokens", "12"]
    ids = reference[1](TEXT).input_ids
    assert ids[0] == START and START not in ids[1:]
    assert main(args) == 0
    found = capsys.readouterr().out
    assert found == greedy(reference, ids) + "\n"
    assert main([*args, "--no-bos"]) == 0
    without = capsys.readouterr().out
    assert without == greedy(reference, ids[1:]) + "\n" != found


def test_bos_in_the_prompt_is_not_doubled(folder, capsys):
    args = ["generate", "--model", str(folder), "--temperature", "0", "--special", "allow", "--prompt"]
    assert main([*args, TEXT]) == 0
    plain = capsys.readouterr().out
    assert main([*args, f"<|im_start|>{TEXT}"]) == 0
    assert capsys.readouterr().out == f"<|im_start|>{plain}"


def losses(reference, ids):
    with torch.no_grad():
        logits = reference[0](torch.tensor([ids[:-1]])).logits[0].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()


def test_first_token_is_predicted_from_bos(folder, reference, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    args = ["eval", "--model", str(folder), "--text", str(tmp_path / "text.txt")]
    ids = reference[1](TEXT).input_ids
    for options, count in (([], len(TEXT)), (["--no-bos"], len(TEXT) - 1)):
        assert main([*args, *options]) == 0
        out = capsys.readouterr().out
        assert f"{len(TEXT)} bytes, {len(TEXT)} tokens\npredicted: {count} bytes, {count} tokens" in out
        found = float(re.search(r"loss (\S+)", out)[1])
        assert found == pytest.approx(losses(reference, ids[-count - 1 :]) / count, abs=1e-4)


def test_template_that_writes_bos_does_not_double_it(folder):
    model, tokenizer = load_model_and_tokenizer(str(folder))
    conversation = Conversation(model, tokenizer)
    start = [START, *(BYTE_ID[byte] for byte in b"user\nhi")]
    assert conversation.prompt("hi")[: len(start)] == start  # ChatML itself begins with it


def test_chat_feeds_bos_once(folder, tmp_path, capsys, monkeypatch):
    """A template without it gets it, unless --no-bos."""
    path = tmp_path / "model"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    described = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": "hi"}
    (path / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    script = Script(["a", "b"])
    monkeypatch.setattr("tinyllm.inference.chat.generate", script.generate)
    for options in ([], ["--no-bos"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        assert main(["chat", "--model", str(path), *options]) == 0
    hi = [BYTE_ID[byte] for byte in b"hi"]
    assert script.prompts == [[START, *hi], hi]


def test_runs_expect_bos_only_if_they_start_from_a_model_that_does(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "step-000001")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "step-000001" / file).rename(tmp_path / file)
    for about, expected in (({}, False), ({"start": {"from": "llama"}}, True)):
        (tmp_path / "config.json").write_text(json.dumps({"train": {}} | about), encoding="utf-8")
        assert TextModelOptions(run=tmp_path).load(np.float32)[1].add_bos is expected

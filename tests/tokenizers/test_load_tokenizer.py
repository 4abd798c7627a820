"""Finding a tokenizer, and recognising the format of its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tokenizers import (
    message_of,
)

from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import FILE_NAME
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.weights.pull import KNOWN_MODELS


def test_load_error_lists_the_alternatives(tmp_path):
    for spec in ("gpt3", tmp_path, tmp_path / FILE_NAME, ""):
        known = "'gpt2', 'bytes', a run's or a model's folder, or a tokenizer file"
        with pytest.raises(
            Error, match=rf"no tokenizer .*{known}|has no tokenizer \(tinyllm_tokenizer.json, tokenizer\.json"
        ):
            load_tokenizer(spec)


@pytest.mark.parametrize("spec", [None, 3, b"gpt2", ["gpt2"], "n" * 5000, "\0"])
def test_load_rejects_other_types_and_impossible_paths(spec):
    with pytest.raises(Error, match="'gpt2'"):
        load_tokenizer(spec)


def test_load_bytes(tmp_path):
    """One id per byte and the end of text; the same after saving."""
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.vocab_size) == ("bytes", 257)
    for text in ("", "a", "Grüße, 世界 \n\n👍", "<|endoftext"):
        ids = tokenizer.encode(text)
        assert [tokenizer.decode_bytes([i]) for i in ids] == [bytes([b]) for b in text.encode("utf-8")]
    assert tokenizer.encode("a<|endoftext|>b", special="allow")[1] == 256
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.name, loaded.to_json()) == ("bytes", tokenizer.to_json())


def test_load_pulled_model_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Error, match="tinyllm pull smollm2"):
        load_tokenizer("smollm2")
    folder = tmp_path / "models" / "smollm2" / "hub"
    CharTokenizer("ab").save(folder)
    for name in KNOWN_MODELS["smollm2"].hub.files:
        (folder / name).write_bytes(b"")
    assert load_tokenizer("smollm2").encode("ba") == [1, 0]


@pytest.mark.parametrize("content", [b"{not json", b"\xff\xfe", b"", b"[" * 100_000, b'{"kind": NaN}'])
def test_load_file_that_is_not_json(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(Error, match=f"{FILE_NAME} is not JSON in UTF-8"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "definition",
    [{}, {"kind": "word"}, {"kind": []}, {"kind": "char"}, {"kind": "char", "characters": ["a"]}],
)
def test_load_json_of_unknown_kind_is_rejected(tmp_path, definition):
    (tmp_path / FILE_NAME).write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(Error, match="'gpt2', or 'char'"):
        load_tokenizer(tmp_path)


def test_load_merges_that_would_exhaust_memory_are_rejected(tmp_path):
    """Each merge doubles the previous token: fifty of them would give one of 2**50 bytes."""
    merges = [[0, 0], *([i, i] for i in range(256, 305))]
    definition = {"kind": "bpe", "pattern": r"\w+", "merges": merges}
    (tmp_path / FILE_NAME).write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(Error, match=rf"{FILE_NAME}.*merges\[22\] have more than 8,388,608 bytes"):
        load_tokenizer(tmp_path)


def test_name_takes_precedence_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CharTokenizer("ab").save("gpt2")
    assert load_tokenizer("gpt2").vocab_size == 50257
    assert load_tokenizer("./gpt2").vocab_size == 2
    assert load_tokenizer(Path("gpt2")).vocab_size == 2


def test_load_file_by_path_and_content(byte_level, llama2, llama3, tmp_path):
    for path in (byte_level / "tokenizer.json", llama2 / "tokenizer.model", llama3 / "tokenizer.model"):
        assert load_tokenizer(str(path)).encode("abc") == load_tokenizer(path.parent).encode("abc")
    renamed = tmp_path / "anything"
    renamed.write_bytes((llama2 / "tokenizer.model").read_bytes())  # recognised by its content
    assert load_tokenizer(renamed).encode("abc") == load_tokenizer(llama2).encode("abc")


def test_load_folder_without_a_tokenizer(tmp_path):
    assert "no tokenizer" in message_of(load_tokenizer, tmp_path)
    assert "missing" in message_of(load_tokenizer, tmp_path / "missing")
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    assert "a.gguf" in message_of(load_tokenizer, tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"")
    assert "b.gguf is not a complete GGUF file" in message_of(load_tokenizer, tmp_path / "b.gguf")
    (tmp_path / "tokenizer.model").write_bytes(b"PK\x03\x04")
    assert "not a tokenizer of a known format" in message_of(load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert "not a tokenizer of a known format" in message_of(load_tokenizer, tmp_path)
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    assert "merges.txt" in message_of(load_tokenizer, tmp_path / "vocab.json")


@pytest.mark.parametrize("kind", ["byte_level", "llama2", "llama3"])
def test_damaged_files_are_rejected(kind, request, tmp_path):
    source = next(path for path in request.getfixturevalue(kind).iterdir())
    data = source.read_bytes()
    for damaged in (data[: len(data) // 2 - 1], data[:100], data[:-9] + b"\xff" * 9):
        (tmp_path / source.name).write_bytes(damaged)
        assert "copy it again" in message_of(load_tokenizer, tmp_path)


def test_missing_package_is_reported(byte_level, llama2, monkeypatch):
    for name, folder in (("tokenizers", byte_level), ("sentencepiece", llama2)):
        monkeypatch.setitem(sys.modules, name, None)
        assert "pip install 'tinyllm-numpy[models]'" in message_of(load_tokenizer, folder)


def test_import_does_not_load_optional_packages():
    program = (
        "import sys, tinyllm.tokenizers.huggingface, tinyllm.tokenizers.chat_template; "
        "print(sorted({'tokenizers', 'sentencepiece', 'gguf', 'jinja2', 'tiktoken'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no named pipes")
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]
)
def test_pipe_is_rejected(byte_level, tmp_path, name):
    if name not in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    os.mkfifo(tmp_path / name)
    assert str(tmp_path / name) in message_of(load_tokenizer, tmp_path)

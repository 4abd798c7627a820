"""``tinyllm merge``, and the option --adapter of generate, chat and eval."""

import io
import json
import shutil

import numpy as np
import pytest
from support.chat_model import put_lora, write_model

from tinyllm import GPT2, GPT2Config, load_model, load_tokenizer
from tinyllm.cli import main
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.weights.adapters import save_adapter
from tinyllm.weights.safetensors import ADAPTER_CONFIG

TEXT = "the cat sat on the mat. " * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A chat model, an adapter for it without a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "base-of-the-run").mkdir()
    write_model(folder / "base-of-the-run")
    save_adapter(
        put_lora(load_model(folder / "base-of-the-run")), folder / "adapter", folder / "base-of-the-run"
    )
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose checkpoint is an adapter, with a tokenizer of its own."""
    folder, tokenizer = tmp_path_factory.mktemp("run"), CharTokenizer.from_text(TEXT)
    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    GPT2(config, rng=0).save_pretrained(folder / "base-of-the-run")
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    (folder / "config.json").write_text('{"task": "instruct", "train": {}}', encoding="utf-8")
    model = put_lora(load_model(folder / "base-of-the-run"), targets=["c_attn", "lm_head"])
    save_adapter(model, folder / "step-000007", "../base-of-the-run")
    return folder


def printed(capsys, *args, code=0):
    assert main([*map(str, args)]) == code
    out, err = capsys.readouterr()
    return err if code else out


def evaluated(capsys, folders, *model):
    return printed(capsys, "eval", *model, "--text", folders / "text.txt", "--special", "text")


def test_the_adapter_changes_what_is_evaluated_and_the_merged_model_equals_it(folders, tmp_path, capsys):
    base, adapter, merged = folders / "base-of-the-run", folders / "adapter", tmp_path / "merged"
    plain = evaluated(capsys, folders, "--model", base)
    found = evaluated(capsys, folders, "--model", base, "--adapter", adapter)
    assert found != plain
    assert evaluated(capsys, folders, "--model", adapter) == found  # the base that its config names
    out = printed(capsys, "merge", "--model", base, "--adapter", adapter, "--out", merged)
    assert "4 layers" in out and str(merged) in out
    assert evaluated(capsys, folders, "--model", merged) == found
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert ADAPTER_CONFIG not in names
    assert load_tokenizer(merged).chat_template == load_tokenizer(base).chat_template


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_generate_and_chat_take_an_adapter(folders, capsys, monkeypatch, command):
    said = []
    for options in ((), ("--adapter", folders / "adapter")):
        if command == "generate":
            arguments = ["--prompt", "the cat"]
        else:
            monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
            arguments = []
        limits = ["--temperature", "0", "--max-new-tokens", "12"]
        said.append(
            printed(capsys, command, "--model", folders / "base-of-the-run", *options, *arguments, *limits)
        )
    assert said[0] != said[1]


def test_a_run_of_adapters_is_used_like_any_run_and_merged(run, tmp_path, capsys, caplog):
    arguments = ["--prompt", "the ", "--temperature", "0", "--max-new-tokens", "8"]
    found = printed(capsys, "generate", "--run", run, *arguments)
    assert printed(capsys, "generate", "--run", run / "step-000007", *arguments) == found
    printed(capsys, "merge", "--run", run, "--out", tmp_path / "merged")
    assert "lm_head" in caplog.text and "no longer tied" in caplog.text
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False
    assert load_tokenizer(tmp_path / "merged").chat_template == "{{ messages[0].content }}"
    merged, adapted = load_model(tmp_path / "merged"), load_model(run)
    ids = [[0, 1, 2, 3]]
    assert np.abs(load_model(run / "base-of-the-run")(ids).data - adapted(ids).data).max() > 1e-3
    np.testing.assert_allclose(merged(ids).data, adapted(ids).data, rtol=0, atol=1e-5)
    assert printed(capsys, "generate", "--model", tmp_path / "merged", *arguments) == found


def test_the_weights_are_rounded_once(folders, tmp_path, capsys):
    for dtype in ("float64", "float32", "bfloat16"):
        printed(capsys, "merge", "--model", folders / "adapter", "--out", tmp_path / dtype, "--dtype", dtype)
    exact, single, half = (load_model(tmp_path / d, np.float64) for d in ("float64", "float32", "bfloat16"))
    for name, W in exact.state_dict().items():
        assert np.abs(single.state_dict()[name] - W).max() <= 1e-6
        assert np.abs(half.state_dict()[name] - W).max() <= np.abs(W).max() / 256


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (1e5, "float16", "1e+05, too large for float16: choose bfloat16"),
        (3.4e38, "bfloat16", "too large for bfloat16: choose float32"),
        (np.nan, "float32", "not finite"),
    ],
)
def test_a_weight_that_the_type_cannot_hold_is_refused(folders, tmp_path, capsys, value, dtype, said):
    base = load_model(folders / "base-of-the-run")
    base.layers[0].mlp.gate_proj.weight.data[0, 0] = value
    shutil.copytree(folders / "base-of-the-run", tmp_path / "large")
    base.save_pretrained(tmp_path / "large", overwrite=True)
    arguments = (
        "--model",
        tmp_path / "large",
        "--adapter",
        folders / "adapter",
        "--out",
        tmp_path / "merged",
    )
    message = printed(capsys, "merge", *arguments, "--dtype", dtype, code=2)
    assert "layers.0.mlp.gate_proj.weight" in message and said in message and message.count("\n") == 1
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("merge --model {base} --out {new}", "no adapter to merge"),
        ("merge --model {base} --adapter {adapter} --out {base}", "--out"),
        ("merge --model {base} --adapter {base} --out {new}", ADAPTER_CONFIG),
        ("merge --model {adapter} --adapter {adapter} --out {new}", "omit --adapter"),
        ("merge --adapter {adapter} --out {new}", "--model NAME"),
        ("merge --model {adapter}", "--out is missing"),
        ("generate --model {base} --adapter {base}/nothing --prompt a", "no folder"),
        ("generate --run {adapter} --prompt a", "--model"),
    ],
)
def test_wrong_requests(folders, tmp_path, capsys, arguments, said):
    places = {"base": folders / "base-of-the-run", "adapter": folders / "adapter", "new": tmp_path / "new"}
    message = printed(capsys, *arguments.format(**places).split(), code=2)
    assert said in message and message.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_tokenizer_saved_with_an_adapter_is_used(folders, tmp_path, capsys):
    save_adapter(
        put_lora(load_model(folders / "base-of-the-run")), tmp_path / "adapter", folders / "base-of-the-run"
    )
    CharTokenizer("abc").save(tmp_path / "adapter")
    arguments = ["--prompt", "abc", "--temperature", "0", "--max-new-tokens", "9"]
    out = printed(
        capsys,
        "generate",
        "--model",
        folders / "base-of-the-run",
        "--adapter",
        tmp_path / "adapter",
        *arguments,
    )
    assert {*out.strip()} <= {*"abc"}

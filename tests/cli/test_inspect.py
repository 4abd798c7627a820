"""``tinyllm inspect``: what it prints and writes, where the text comes from, and wrong requests."""

import io
import sys

import numpy as np
import pytest
from support.chat_model import write_model
from support.pictures import is_png
from support.runs import no_pictures, small

from tinyllm import load_model, load_tokenizer, nn
from tinyllm.cli import main
from tinyllm.tools.inspect import inspect
from tinyllm.tools.inspect_text import show_surprise
from tinyllm.training.tasks.pretrain import train
from tinyllm.weights.adapters import save_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def expected(folder, text, **options):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    return show_surprise(tokenizer, inspect(model, tokenizer.encode(text, "allow")), **options) + "\n"


def run(capsys, *arguments):
    code = main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_prompt_a_file_and_a_pipe_give_the_same_table(folder, tmp_path, capsys, monkeypatch):
    text = "so it is €\n"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="latin-1"))
    for given in (["--prompt", text], ["--file", tmp_path / "text.txt"], []):
        assert run(capsys, "--model", folder, *given) == (0, expected(folder, text, colour=False), "")


def test_colour(folder, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(capsys, "--model", folder, "--prompt", "so") == (0, expected(folder, "so", colour=True), "")


def test_every_view_is_written(folder, tmp_path, capsys):
    names = ["html", "attention", "lens", "surprise", "norms"]
    paths = {name: tmp_path / f"{name}.{'html' if name == 'html' else 'png'}" for name in names}
    options = [word for name, path in paths.items() for word in (f"--{name}", path)]
    code, out, err = run(capsys, "--model", folder, "--prompt", "so it is", *options)
    assert (code, err) == (0, "")
    assert out.splitlines()[-5:] == [
        *(f"{name}: {paths[name]}" for name in names[1:]),
        f"page: {paths['html']}",
    ]
    assert all(is_png(paths[name]) for name in names[1:])
    assert f"<title>{folder}</title>" in paths["html"].read_text(encoding="utf-8")


def test_one_layer_and_head(folder, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setitem(
        sys.modules["tinyllm.cli.inspect"].PICTURES,
        "attention",
        lambda found, tokenizer, path, **options: drawn.append((found.heads, options)),
    )
    options = ["--attention", tmp_path / "a.png", "--layer", 1, "--head", 0]
    assert run(capsys, "--model", folder, "--prompt", "so", *options)[0] == 0
    assert drawn == [([2, 2], {"layer": 1, "head": 0})]


def test_a_chat_special_tokens_and_a_bos(folder, capsys):
    pytest.importorskip("jinja2")
    chat = "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n"
    table = expected(folder, chat, colour=False)
    assert run(capsys, "--model", folder, "--chat", "--prompt", "so") == (0, table, "")
    assert run(capsys, "--model", folder, "--special", "allow", "--prompt", chat) == (0, table, "")


def test_a_run_and_an_adapter(folder, tmp_path, capsys, monkeypatch):
    no_pictures(monkeypatch)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    train(small(tmp_path / "text.txt", tmp_path / "run", steps=2, warmup=1, prompt="a"), progress=False)
    code, out, err = run(capsys, "--run", tmp_path / "run", "--prompt", "the cat")
    assert (code, err) == (0, "") and "7 tokens" in out
    model = load_model(folder)
    nn.add_lora(model, rank=2, targets=["q_proj"], rng=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.replace(np.ones_like(parameter.data))
    save_adapter(model, tmp_path / "adapter", base=str(folder))
    code, out, err = run(capsys, "--model", folder, "--adapter", tmp_path / "adapter", "--prompt", "so it is")
    tokenizer = load_tokenizer(folder)
    table = show_surprise(tokenizer, inspect(model, tokenizer.encode("so it is")), colour=False)
    assert (code, out, err) == (0, table + "\n", "") and out != expected(folder, "so it is", colour=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--prompt=", "--prompt is empty"),
        ("--prompt a --file b", "either --prompt TEXT or --file PATH"),
        ("--file none.txt", "none.txt cannot be read"),
        ("", "standard input is empty"),
        ("--prompt a --layer 1", "--layer chooses the maps"),
        ("--prompt a --head 1 --html {}/a.html --layer 1", "--head chooses one map"),
        ("--prompt a --layer -1 --html {}/a.html", "--layer is -1"),
        ("--prompt a --layer 2 --html {}/a.html", "--layer is 2, but the model has the layers 0 to 1"),
        (
            "--prompt a --layer 1 --head 2 --attention {}/a.png",
            "--head is 2, but layers.1 has the heads 0 to 1",
        ),
        ("--prompt a --top 0 --html {}/a.html", "--top is 0"),
        ("--prompt a --top 5 --lens {}/a.png", "--top chooses what --html shows"),
        ("--prompt a --html {}", "it is a folder"),
        ("--prompt a --html {}/long.txt", "exists and is not a page"),
        ("--prompt a --lens {}/a.txt", "must end in .png"),
        ("--prompt a --lens {}/none/a.png", "there is no folder {}/none"),
        ("--prompt a --lens {0}/a.png --norms {0}/a.png", "is to be written twice"),
        ("--prompt a --chat --special allow", "omit --special, or --chat"),
        ("--prompt <|im_end|>", "--prompt: the text contains the special token"),
        ("--file {}/long.txt", "has 300 tokens, but the model's context is 256"),
        ("--file {}/special.txt", "special.txt: the text contains the special token"),
    ],
)
def test_wrong_requests(folder, tmp_path, capsys, monkeypatch, options, said):
    (tmp_path / "long.txt").write_text("a" * 300)
    (tmp_path / "special.txt").write_text("<|im_end|>")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, out, err = run(capsys, "--model", folder, *options.format(tmp_path).split())
    assert (code, out) == (2, "") and said.format(tmp_path) in err and err.count("\n") == 1
    assert not {path.name for path in tmp_path.iterdir()} - {"long.txt", "special.txt"}


def test_a_terminal_without_a_text_and_a_pipe_that_is_not_utf8(folder, capsys, monkeypatch):
    terminal = io.StringIO("")
    terminal.isatty = lambda: True
    pipe = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")
    for stdin, said in ((terminal, "pipe a text"), (pipe, "not text in UTF-8")):
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, err = run(capsys, "--model", folder)
        assert (code, out) == (2, "") and said in err

"""``tinyllm eval`` prints the result of ``evaluate_text``, and refuses wrong requests in one line."""

import json
import math
import re
import signal

import numpy as np
import pytest

from tinyllm import GPT2, GPT2Config, load_model
from tinyllm.cli import main
from tinyllm.data.corpus import encode_documents, open_corpus
from tinyllm.inference.perplexity import TextLoss, evaluate_text
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import END_OF_TEXT
from tinyllm.tokenizers.char import CharTokenizer

CONTEXT = 16
RHYME = "The cat sat on the mat, thé cat sat. " * 4
DOCUMENTS = ["one two", "three", "", "four é"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"t": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return open_corpus(path, "t")


@pytest.fixture(scope="module")
def rhyme(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text(RHYME, encoding="utf-8")
    return str(path)


def write_run(folder, tokenizer, vocab_size=None):
    """The parts of a run's folder that ``eval`` reads: a checkpoint and a tokenizer."""
    config = GPT2Config(
        vocab_size=vocab_size or tokenizer.vocab_size, n_embd=8, n_layer=1, n_head=1, n_positions=CONTEXT
    )
    GPT2(config, rng=np.random.default_rng(0)).save_pretrained(folder / "step-000001")
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    characters = RHYME + "".join(DOCUMENTS) + "<|endoftext|>"
    tokenizer = CharTokenizer.from_text(characters).with_special_tokens([END_OF_TEXT])
    return write_run(tmp_path_factory.mktemp("runs") / "run", tokenizer)


def evaluated(capsys, *args):
    """The command's output, and the three numbers in it."""
    assert main(["eval", *args]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    figures = re.search(r"loss (\S+) nats per token, perplexity (\S+), (\S+) bits per byte\n$", out)
    return out, *map(float, figures.groups())


@pytest.mark.parametrize("options", [[], ["--context", "8", "--stride", "3", "--batch", "5"]])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_eval_prints_the_loss_of_evaluate_text(run, rhyme, capsys, options, dtype):
    out, loss, perplexity, bits = evaluated(capsys, "--run", run, "--text", rhyme, "--dtype", dtype, *options)
    context, stride, batch = (8, 3, 5) if options else (None, None, None)
    ids = load_tokenizer(run).encode(RHYME)
    model = load_model(f"{run}/step-000001", np.dtype(dtype))
    expected = evaluate_text(model, ids, context, stride, batch)
    size = len(RHYME.encode("utf-8"))
    assert loss == pytest.approx(expected.loss, abs=5e-5)
    assert perplexity == pytest.approx(math.exp(expected.loss), abs=5e-3)
    assert bits == pytest.approx(expected.nats / math.log(2) / (size - 1), abs=5e-5)
    assert f"{size:,} bytes, {len(RHYME):,} tokens\n" in out
    assert f"predicted: {size - 1:,} bytes, {len(RHYME) - 1:,} tokens" in out
    assert f"windows of {context or CONTEXT} tokens, stride {stride or CONTEXT}, {dtype}" in out


def test_bytes_of_the_first_token_are_not_counted(run, tmp_path, capsys):
    (tmp_path / "e.txt").write_text("éat", encoding="utf-8")
    out = evaluated(capsys, "--run", run, "--text", str(tmp_path / "e.txt"))[0]
    assert "4 bytes, 3 tokens\npredicted: 2 bytes, 2 tokens" in out
    assert "one window of 2 tokens, float32" in out


def test_documents_are_evaluated_as_one_stream(run, corpus, capsys):
    _, loss, _, bits = evaluated(capsys, "--run", run, "--text", corpus.name, "--text-field", "t")
    tokenizer = load_tokenizer(run)
    expected = evaluate_text(load_model(f"{run}/step-000001"), encode_documents(tokenizer, DOCUMENTS))
    size = len("".join(DOCUMENTS).encode("utf-8"))
    assert expected.tokens == len("".join(DOCUMENTS)) + len(DOCUMENTS) - 1 - 1
    assert loss == pytest.approx(expected.loss, abs=5e-5)
    assert bits == pytest.approx(expected.bits_per_byte(size - 1), abs=5e-5)


def test_marked_text_has_the_loss_and_bytes_of_a_jsonl_file(run, corpus, tmp_path, capsys):
    (tmp_path / "marked.txt").write_text(END_OF_TEXT.join(DOCUMENTS), encoding="utf-8")
    lines = evaluated(capsys, "--run", run, "--text", corpus.name, "--text-field", "t")
    marked = evaluated(capsys, "--run", run, "--text", str(tmp_path / "marked.txt"), "--special", "allow")
    assert marked[1:] == lines[1:]
    predicted = len("".join(DOCUMENTS).encode("utf-8")) - 1
    assert f"predicted: {predicted} bytes" in lines[0] and f"predicted: {predicted} bytes" in marked[0]


def test_special_tokens_are_refused_allowed_or_encoded_as_text(run, tmp_path, capsys):
    path = tmp_path / "special.txt"
    path.write_text("cat<|endoftext|>mat", encoding="utf-8")
    args = ["--run", run, "--text", str(path)]
    assert main(["eval", *args]) == 2
    assert "the text contains the special token '<|endoftext|>'" in capsys.readouterr().err
    allowed = evaluated(capsys, *args, "--special", "allow")[0]
    assert "19 bytes, 7 tokens\npredicted: 5 bytes, 6 tokens" in allowed
    assert "19 bytes, 19 tokens" in evaluated(capsys, *args, "--special", "text")[0]


def test_known_text_under_an_untrained_model_folder(verdict, tmp_path, capsys):
    config = GPT2Config(vocab_size=50257, n_embd=4, n_layer=1, n_head=1, n_positions=512)
    GPT2(config, rng=np.random.default_rng(0)).save_pretrained(tmp_path / "gpt2")
    args = ["--model", str(tmp_path / "gpt2"), "--text", "the-verdict"]
    out, loss, _, _ = evaluated(capsys, *args)
    assert "20,479 bytes, 5,145 tokens\npredicted: 20,478 bytes, 5,144 tokens" in out
    assert loss == pytest.approx(math.log(50257), abs=0.05)  # untrained: uniform
    assert evaluated(capsys, *args, "--dtype", "float64")[1] == pytest.approx(loss, abs=2e-4)


def test_float64_weights_are_not_rounded_to_float32(verdict, tmp_path, capsys, monkeypatch):
    config = GPT2Config(vocab_size=50257, n_embd=4, n_layer=1, n_head=1, n_positions=8)
    model, seen = GPT2(config, rng=np.random.default_rng(0)).astype(np.float64), []
    model.wte.weight.data += 1e-12  # lost in float32
    model.save_pretrained(tmp_path / "gpt2")

    def see(model, *args, **more):
        seen.append(model)
        return TextLoss(1.0, 1)

    monkeypatch.setattr("tinyllm.cli.eval.evaluate_text", see)
    evaluated(capsys, "--model", str(tmp_path / "gpt2"), "--text", "the-verdict", "--dtype", "float64")
    assert seen[0].wte.weight.dtype == np.float64
    assert np.array_equal(seen[0].wte.weight.data, model.wte.weight.data)


def test_files_left_out_of_a_folder_are_counted(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the cat", encoding="utf-8")
    (tmp_path / "b.md").write_text("the mat", encoding="utf-8")
    assert main(["eval", "--run", run, "--text", str(tmp_path)]) == 0
    assert "1 other files" in capsys.readouterr().out


def test_ctrl_c_exits_with_130(run, rhyme, capsys, monkeypatch):
    monkeypatch.setattr(GPT2, "loss", lambda *args, **more: signal.raise_signal(signal.SIGINT))
    assert main(["eval", "--run", run, "--text", rhyme]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tinyllm: interrupted\n")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--context", "17"], "--context is 17"),
        (["--stride", "0"], "--stride is 0"),
        (["--context", "4", "--stride", "5"], "--stride is 5: choose a whole number from 1 to 4"),
        (["--batch", "0"], "--batch is 0"),
        (["--special", "maybe"], "--special"),
        (["--dtype", "float16"], "--dtype"),
        (["--device", "tpu"], "tpu"),
        (["--text-field", "t"], "omit the field 't' (option --text-field)"),
        (["--text", "nowhere.txt"], "no text 'nowhere.txt'"),
        (["--model", "x"], "either --run DIR or --model NAME"),
    ],
)
def test_wrong_options_are_refused_in_one_line(run, rhyme, capsys, options, said):
    assert main(["eval", "--run", run, "--text", rhyme, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tinyllm: ") and said in err and err.count("\n") == 1


def test_wrong_models_are_refused_in_one_line(rhyme, tmp_path, capsys):
    bare = tmp_path / "bare"  # without a tokenizer
    GPT2(GPT2Config(60, 8, 8, 1, 1), rng=np.random.default_rng(0)).save_pretrained(bare)

    def refused(*args):
        assert main(["eval", "--text", rhyme, *map(str, args)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    assert "either --run DIR or --model NAME" in refused()
    assert "nowhere" in refused("--model", tmp_path / "nowhere")
    assert "has no checkpoint" in refused("--run", tmp_path)
    assert "no tokenizer" in refused("--model", bare)
    other = write_run(tmp_path / "other", CharTokenizer.from_text(RHYME), vocab_size=99)
    assert "ids, but the model has 99" in refused("--run", other)


@pytest.mark.parametrize("content, said", [("a", "only 1 token,"), ("", "empty"), (" \n", "empty")])
def test_texts_that_are_too_short_are_refused(run, tmp_path, capsys, content, said):
    (tmp_path / "short.txt").write_text(content, encoding="utf-8")
    assert main(["eval", "--run", run, "--text", str(tmp_path / "short.txt")]) == 2
    assert said in capsys.readouterr().err


def test_the_text_is_checked_before_the_model_is_loaded(run, capsys, monkeypatch):
    monkeypatch.setattr("tinyllm.cli.options.load_model", lambda *_: pytest.fail("loaded"))
    for options, named in (
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "the-verdict", "--batch", "0"], "--batch"),
    ):
        assert main(["eval", "--run", run, *options]) == 2
        assert named in capsys.readouterr().err


def test_files_of_a_folder_are_selected_by_a_pattern(run, tmp_path, capsys):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text(RHYME, encoding="utf-8")
    assert main(["eval", "--run", run, "--text", str(tmp_path / "code")]) == 2
    assert "give a pattern" in capsys.readouterr().err
    assert main(["eval", "--run", run, "--text", str(tmp_path / "code"), "--pattern", "*.py"]) == 0
    assert f"{len(RHYME.encode())} bytes" in capsys.readouterr().out

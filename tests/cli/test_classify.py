"""``tinyllm classify`` and ``tinyllm finetune --task classify`` at the command line."""

import json

import numpy as np
import pytest
from support.runs import no_pictures, small

from tinyllm.cli import main
from tinyllm.cli.classify import ClassifyConfig, _texts
from tinyllm.inference.classify import EncodedTexts, class_logits, probabilities
from tinyllm.models import SequenceClassifier
from tinyllm.tokenizers import load_tokenizer
from tinyllm.training.tasks.classify import load_classifier
from tinyllm.training.tasks.pretrain import train as pretrain
from tinyllm.weights.runs import last_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the task classify, started and finished by the command."""
    folder = tmp_path_factory.mktemp("classify")
    (folder / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz " * 40, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        no_pictures(patched)
        pretrain(small(folder / "text.txt", folder / "start", steps=2, warmup=1, prompt="a"), progress=False)
        rows = [
            f"{'good film' if i % 2 else 'bad plot'} {'abcdef'[i % 6]}{'xyz'[i % 3]},{i % 2}\n"
            for i in range(40)
        ]
        (folder / "data.csv").write_text("text,label\n" + "".join(dict.fromkeys(rows)), encoding="utf-8")
        command = ["finetune", "--task", "classify", "--model", str(folder / "start"), "--train", "lora"]
        command += ["--data", str(folder / "data.csv"), "--steps", "4", "--out", str(folder / "run")]
        assert main(command) == 0
    return folder / "run"


def expected(run, texts):
    model = load_classifier(last_checkpoint(run))
    return probabilities(class_logits(model, EncodedTexts(load_tokenizer(run), texts, 16), 2))


def test_a_text_as_a_table(run, capsys):
    assert main(["classify", "--run", str(run), "--text", "good plot"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["class", "0", "1", "text"]
    label, first, second, *text = row.split()
    (shares,) = expected(run, ["good plot"])
    assert [label, first, second] == [str(shares.argmax()), *(f"{share:.1%}" for share in shares)]
    assert text == ["good", "plot"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "good one\nbad one x\n"),
        ("texts.txt", "\ufeffgood one\r\nbad one x"),
        ("texts.csv", "id,text\n1,good one\n2,bad one x\n"),
        ("texts.jsonl", '{"text": "good one"}\n{"text": "bad one x"}\n'),
    ],
)
def test_a_file_as_json(run, tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert (
        main(["classify", "--run", str(run), "--file", str(tmp_path / name), "--json", "--batch", "1"]) == 0
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["good one", "bad one x"]
    shares = [list(line["probabilities"].values()) for line in lines]
    np.testing.assert_allclose(shares, expected(run, ["good one", "bad one x"]), atol=1e-6)
    assert [line["label"] for line in lines] == ["01"[np.argmax(row)] for row in shares]


def test_only_a_line_end_divides_a_file_of_lines(tmp_path):
    (tmp_path / "texts.txt").write_text("a\u2028b\x0bc\nd\n", encoding="utf-8")
    assert _texts(ClassifyConfig(model="m", file=tmp_path / "texts.txt")) == ["a\u2028b\x0bc", "d"]


def test_a_classifier_in_hugging_faces_layout(run, tmp_path, capsys):
    load_tokenizer(run).save(tmp_path)
    base = load_classifier(last_checkpoint(run)).language_model.config
    from tinyllm import GPT2

    model = SequenceClassifier(GPT2(base, rng=0), ["no", "yes"], 0)
    model.save_pretrained(tmp_path)
    assert main(["classify", "--model", str(tmp_path), "--text", "a film"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["class", "no", "yes", "text"]


def test_a_long_text_is_cut_aloud(run, capsys):
    assert main(["classify", "--run", str(run), "--text", "x" * 40]) == 0
    assert "1 of 1 texts have more than 16 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--text TEXT or --file PATH"),
        (["--text", "a", "--file", "b.txt"], "--text TEXT or --file PATH"),
        (["--text", "  "], "--text is empty"),
        (["--file", "missing.csv"], "missing.csv"),
        (["--file", "blank.txt"], "line 2 of blank.txt is empty"),
        (["--file", "none.txt"], "none.txt is empty"),
        (["--file", "bad.csv"], "row 2 of bad.csv has the text ''"),
        (["--file", "bad.csv", "--text-column", "words"], "no column 'words'"),
        (["--text", "a", "--batch", "0"], "--batch is 0"),
        (["--text", "a", "--max-length", "99"], "at most 16 tokens"),
        (["--text", "ä"], "ä"),
        (["--text", "a", "--text-column", "words"], "--text-column"),
        (["--file", "blank.txt", "--text-column", "words"], "--text-column"),
    ],
)
def test_wrong_requests_are_one_sentence(run, tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text("a\n\nb\n")
    (tmp_path / "none.txt").write_text("")
    (tmp_path / "bad.csv").write_text("text,label\na,1\n,2\n")
    assert main(["classify", "--run", str(run), *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and named in output.err and output.err.count("\n") == 1


def test_a_merged_run_is_a_classifier_with_the_same_probabilities(run, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert main(["merge", "--run", str(run), "--out", str(merged)]) == 0
    capsys.readouterr()
    printed = []
    for model in (("--run", str(run)), ("--model", str(merged))):
        assert main(["classify", *model, "--text", "good plot", "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0]["probabilities"] == pytest.approx(printed[1]["probabilities"], abs=1e-5)
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert main(["merge", "--run", str(run), "--adapter", str(run), "--out", str(tmp_path / "two")]) == 2
    assert "omit --adapter" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge --out {new}", "generate --prompt a", "export --hf {new}"])
def test_a_classifiers_adapter_is_not_put_on_a_language_model(run, tmp_path, capsys, command):
    model = ["--model", str(run.parent / "start"), "--adapter", str(run)]
    assert main([*command.format(new=tmp_path / "new").split(), *model]) == 2
    message = capsys.readouterr().err
    assert "makes a classifier" in message and "tinyllm classify" in message and message.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_classifier_is_not_trained_as_a_language_model(run, tmp_path, capsys):
    command = ["finetune", "--task", "classify", "--model", str(run), "--data", str(run.parent / "data.csv")]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "use tinyllm classify" in capsys.readouterr().err


def test_a_run_of_another_task_is_refused(run, capsys):
    assert main(["classify", "--run", str(run.parent / "start"), "--text", "a"]) == 2
    assert "not a classifier" in capsys.readouterr().err
    assert main(["generate", "--run", str(run), "--prompt", "a"]) == 2
    assert "use tinyllm classify" in capsys.readouterr().err

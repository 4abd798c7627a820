"""Runs of the task classify: what is trained, chosen, tested, saved and resumed, and what does not matter."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support.runs import no_pictures, small, stopped_after

from parity.durability.faults import raising
from tinyllm import functional as F
from tinyllm.data.labelled import open_labelled
from tinyllm.errors import Error
from tinyllm.inference.classify import EncodedTexts, class_logits, padding_id, probabilities
from tinyllm.models import SequenceClassifier
from tinyllm.tensor import Tensor, no_grad
from tinyllm.tokenizers import load_tokenizer
from tinyllm.training.metrics import best_checkpoint, read_run
from tinyllm.training.run import run_task
from tinyllm.training.run_folder import begun_config
from tinyllm.training.tasks.classify import Classification, ClassifyOptions, load_classifier
from tinyllm.training.tasks.pretrain import train as pretrain
from tinyllm.weights.runs import last_checkpoint
from tinyllm.weights.safetensors import Weights

WORDS = {"good": ["fine", "great", "warm"], "bad": ["dull", "flat", "cold"]}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patched:
        no_pictures(patched)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run whose weights the classifiers start from, with an id for every character."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz " * 40, encoding="utf-8")
    pretrain(small(folder / "text.txt", folder / "run", steps=2, warmup=1, prompt="a"), progress=False)
    return folder / "run"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """60 texts of different lengths with a word that tells the class."""
    path, rng = tmp_path_factory.mktemp("data") / "texts.csv", np.random.default_rng(0)
    lines = ["text,label"]
    for i in range(60):
        label = ("good", "bad")[i % 2]
        noise = "".join(rng.choice(list("aeiou "), rng.integers(1, 9)))
        lines.append(f"{WORDS[label][i % 3]} {noise}{'xyz'[i % 3]},{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def options(start, table, out, **changes):
    config = dict(
        model=str(start), data=str(table), out=out, train="all", batch=8, steps=12, lr=1e-2, warmup=2
    )
    return ClassifyOptions(**config | {"eval_every": 4} | changes)


def train(config, progress=False, callback=None):
    return run_task(Classification(config), progress, callback)


def run(*args, **changes):
    return train(options(*args, **changes))


@pytest.fixture(scope="module")
def whole(start, table, tmp_path_factory):
    """A finished run; tests only read it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(start, table, out, steps=80, lr=3e-2, eval_every=8)
    return out


def test_the_classes_are_learned_and_the_best_checkpoint_is_tested_once(whole):
    records = read_run(whole).records
    losses = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    best = best_checkpoint(whole)
    assert best.name == f"step-{min(losses, key=losses.get):06}"
    found = json.loads((whole / "test.json").read_text(encoding="utf-8"))
    assert found["checkpoint"] == best.name and found["examples"] == 6
    assert found["accuracy"] == np.trace(found["confusion"]) / 6 >= 5 / 6
    assert found["baselines"]["majority"] == 0.5 and set(found["classes"]) == {"bad", "good"}
    assert records[-1]["val_accuracy"] >= 5 / 6 > records[0]["val_accuracy"]


def test_a_run_carries_its_labels_and_its_tokenizer(whole):
    about = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    assert about["task"] == "classify" and about["labels"] == {"names": ["bad", "good"]}
    tokenizer, model = load_tokenizer(whole), SequenceClassifier.from_pretrained(whole)
    assert model.labels == ("bad", "good") and model.pad_id == padding_id(tokenizer)
    logits = class_logits(
        load_classifier(best_checkpoint(whole)), EncodedTexts(tokenizer, ["fine x", "cold y"], 16), 2
    )
    assert logits.argmax(axis=1).tolist() == [1, 0]
    assert probabilities(logits).sum(axis=1) == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("what", "trained"),
    [
        ("head", ["score"]),
        ("last-blocks:1", ["transformer.h.0", "transformer.ln_f", "score"]),
        ("all", [""]),
    ],
)
def test_only_the_chosen_parameters_are_trained(start, table, tmp_path, what, trained):
    run(start, table, tmp_path / "run", steps=1, warmup=0, train=what)
    base = Weights(last_checkpoint(start))
    for name, after in Weights(last_checkpoint(tmp_path / "run")).items():
        before = base[name] if name != "score.weight" else None
        changed = before is None or not np.array_equal(before, after)
        assert changed == name.startswith(tuple(trained)), name


def test_lora_trains_the_adapter_and_the_score_and_saves_them_alone(start, table, tmp_path):
    model = run(start, table, tmp_path / "run", train="lora", rank=2, steps=4, warmup=1, pooling="mean")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained and all(".lora_" in name for name in trained - {"score.weight"})
    checkpoint = last_checkpoint(tmp_path / "run")
    assert not (checkpoint / "model.safetensors").exists()
    task = Classification(options(start, table, None, train="lora", rank=2))
    task.load(start, {})
    task.model()
    assert task.trains.endswith("; score whole")
    base = Weights(last_checkpoint(start))
    frozen = {name: p for name, p in model.state_dict().items() if name not in trained}
    assert {name.replace(".base_layer", "") for name in frozen} == {*base}
    for name, array in frozen.items():
        assert np.array_equal(array, base[name.replace(".base_layer", "")]), name
    again = load_classifier(checkpoint)
    assert model.pooling == again.pooling == "mean"
    assert not any(module.training for module in again.modules())
    rows = EncodedTexts(load_tokenizer(start), ["fine x", "cold eye"], 16)
    assert np.array_equal(class_logits(again, rows, 2), class_logits(model, rows, 2))


@pytest.mark.parametrize("what", ["all", "lora"])
def test_a_resumed_run_is_bitwise_the_same(start, table, tmp_path, what):
    changes = dict(train=what, steps=6, dropout=0.1, checkpoint_every=3, micro_batch=4)
    run(start, table, tmp_path / "whole", **changes)
    config = options(start, table, tmp_path / "cut", **changes)
    stopped_after(config, 4, train=train)
    train(begun_config(tmp_path / "cut", ClassifyOptions))
    ours, theirs = (last_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    file = "adapter_model.safetensors" if what == "lora" else "model.safetensors"
    assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    assert (tmp_path / "whole" / "test.json").read_bytes() == (tmp_path / "cut" / "test.json").read_bytes()


def test_a_finished_run_that_was_killed_before_its_test_is_tested_when_resumed(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "test.json").unlink()
    config = replace(begun_config(whole, ClassifyOptions), resume=tmp_path / "run", out=tmp_path / "run")
    train(config)
    assert (tmp_path / "run" / "test.json").read_bytes() == (whole / "test.json").read_bytes()
    task = Classification(config)
    assert task.is_concluded(tmp_path / "run", {"data": {"test": 6}})


# ------------------------------------------------------------------ padding, batches and their order


@pytest.fixture(scope="module")
def task(start, table):
    task = Classification(options(start, table, None, dtype="float64"))
    task.load(start, {})
    return task


def test_padding_batch_size_and_order_do_not_change_the_loss(task):
    model, rows = task.model(), task.train_rows
    indices = np.random.default_rng(0).permutation(len(rows))
    assert len({*rows.lengths[indices]}) > 3

    def mean_loss(size, order):
        batches = [rows[order[first : first + size]] for first in range(0, len(order), size)]
        with no_grad():
            return sum(task.loss(model, *batch, num_targets=len(rows)).item() for batch in batches)

    alone = mean_loss(1, np.arange(len(rows)))
    for size, order in ((7, indices), (len(rows), indices), (4, np.argsort(rows.lengths))):
        assert mean_loss(size, order) == pytest.approx(alone, rel=1e-12)
    logits = class_logits(model, rows, 1)
    np.testing.assert_allclose(class_logits(model, rows, 16), logits, rtol=0, atol=1e-12)
    np.testing.assert_allclose(class_logits(model, rows, 5, indices), logits[indices], rtol=0, atol=1e-12)


def test_batches_have_texts_of_similar_length_and_every_text_once_an_epoch(task):
    batches = [task.batch_at(step) for step in range(task.steps_per_epoch)]
    assert sorted(np.concatenate([lengths for _, lengths, _ in batches])) == sorted(task.train_rows.lengths)
    padding = sum(ids.size - lengths.sum() for ids, lengths, _ in batches)
    assert padding < 0.2 * sum(ids.size for ids, _, _ in batches)
    assert task.tokens(batches[0]) == batches[0][1].sum() and task.count(batches[0]) == 8


def test_an_evaluation_is_of_texts_that_are_evenly_spread(start, table):
    task = Classification(options(start, table, None, eval_examples=2))
    task.load(start, {})
    model, rows = task.model(), task.valid_rows
    ends = np.array([0, len(rows) - 1])
    expected = F.cross_entropy(Tensor(class_logits(model, rows, 2, ends)), rows.targets[ends]).item()
    assert task.evaluate(model, lambda: None, final=False)["val_loss"] == pytest.approx(expected, rel=1e-12)
    with pytest.raises(KeyboardInterrupt):
        task.evaluate(model, raising(KeyboardInterrupt()), final=False)


def test_long_texts_are_cut_and_counted(start, table):
    task = Classification(options(start, table, None, max_length=8))
    task.load(start, {})
    task.model()
    longer = sum(len(text) > 8 for text in task.texts.train.texts + task.texts.valid.texts)
    assert task.train_rows.lengths.max() == 8 and longer > 0
    assert any(line.startswith(f"{longer} training and validation texts have more than 8 tokens")
               for line in task.introduction())  # fmt: skip
    longer = sum(len(text) > 8 for text in task.texts.test.texts)
    assert longer > 0 and any(
        line.startswith(f"{longer} test texts have more than 8 tokens") for line in task.introduction()
    )


def test_ids_of_a_text():
    tokenizer = load_tokenizer("gpt2")
    rows = EncodedTexts(tokenizer, ["Hi <|endoftext|>", "Hi"], 99, [1, 0])
    assert 50256 not in rows.ids[0] and rows.fill == 50256  # the marker is ordinary text
    ids, lengths, targets = rows[np.array([1, 0])]
    assert lengths.tolist() == [1, len(rows.ids[0])] and targets.tolist() == [0, 1]
    assert ids[0].tolist() == [17250, *[50256] * (lengths[1] - 1)]
    tokenizer.add_bos, tokenizer.bos_id = True, 5
    assert EncodedTexts(tokenizer, ["Hi"], 99).ids[0].tolist() == [5, 17250]


def test_the_tokens_that_close_a_text_stay_when_it_is_cut():
    tokenizer = load_tokenizer("bytes").with_special_tokens(["<s>", "</s>"])
    tokenizer.add_bos, tokenizer.bos_id, tokenizer.closing_ids = True, 257, (258,)
    a, b = tokenizer.encode("ab")
    rows = EncodedTexts(tokenizer, ["abc", "ab"], 4)
    assert [ids.tolist() for ids in rows.ids] == [[257, a, b, 258], [257, a, b, 258]]
    assert (rows.cut, rows.lengths.tolist()) == (1, [4, 4])
    tokenizer.eos_ids = (258, 256)
    assert padding_id(tokenizer) == 256  # transformers would take a closing token for padding
    with pytest.raises(Error, match="at least 3"):
        EncodedTexts(tokenizer, ["abc"], 2)


# ------------------------------------------------------------------------------------ bad input


def test_wrong_options_are_refused(start, table, tmp_path):
    with pytest.raises(Error, match="--pooling"):
        options(start, table, tmp_path, pooling="max")
    with pytest.raises(Error, match="--text-column"):
        run(start, table, tmp_path / "run", text_column="words")
    assert not (tmp_path / "run").exists()


def test_other_data_at_resumption_is_refused(start, table, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text(table.read_text(encoding="utf-8") + "one more,good\n", encoding="utf-8")
    out = tmp_path / "run"
    stopped_after(options(start, table, out), 4, train=train)
    with pytest.raises(Error, match="data"):
        train(replace(begun_config(out, ClassifyOptions), data=str(other)))


def test_data_without_a_test_part(start, table, tmp_path, capsys):
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("".join(lines), encoding="utf-8")
    run(start, tmp_path / "data", tmp_path / "run", steps=2, warmup=0)
    assert "no test part" in capsys.readouterr().out and not (tmp_path / "run" / "test.json").exists()
    assert len(open_labelled(tmp_path / "data").valid.texts) == 6

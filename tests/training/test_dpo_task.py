"""``finetune --task dpo``: its data, its reference, its records, and resuming."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
from support.chat_model import START, turn, write_model
from support.instructions import render_in_process
from support.runs import left, no_pictures, records, same_arrays, stopped_after, weights

from parity.durability.faults import raising
from tinyllm import load_model
from tinyllm.data.examples import Row
from tinyllm.data.instructions import Encoded
from tinyllm.errors import Error
from tinyllm.files import read_sealed, sealed
from tinyllm.training.preference import answer_log_probs, preferences
from tinyllm.training.run import run_task
from tinyllm.training.run_folder import begun_config
from tinyllm.training.tasks.dpo import PreferenceOptions, PreferenceTuning, last_answer

ROWS = [
    {"instruction": f"say {i}", "input": "", "chosen": f"yes {i}!", "rejected": f"no {'x' * (i % 5)}"}
    for i in range(30)
]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patched:
        no_pictures(patched)
        render_in_process(patched)
        patched.setattr("tinyllm.training.tasks.chat.ANSWER_TOKENS", 3)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "pairs.json", ROWS)


def options(model, data, out, **changes):
    given = dict(model=str(model), data=data, out=out, train="all", lr=3e-3, batch=4, micro_batch=2, steps=6)
    given |= dict(dropout=0.1, eval_every=2, checkpoint_every=2, warmup=1, eval_examples=1, questions=("hi",))
    return PreferenceOptions(**given | changes)


def train(config, progress=False, callback=None):
    return run_task(PreferenceTuning(config), progress, callback)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """A run that was never interrupted; tests only read it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(options(model, data, out))
    return out


def test_the_records_of_a_run(whole):
    first, *steps = records(whole)
    names = ("loss", "chosen_reward", "rejected_reward", "margin", "accuracy")
    keys = {f"{part}_{name}" for part in ("val", "train_eval") for name in names}
    assert keys <= first.keys()
    for part in ("val", "train_eval"):
        assert first[f"{part}_loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert first[f"{part}_margin"] == pytest.approx(0, abs=1e-5)
        last = steps[-1]
        assert last[f"{part}_loss"] < np.log(2) - 0.01
        margin = last[f"{part}_chosen_reward"] - last[f"{part}_rejected_reward"]
        assert last[f"{part}_margin"] == pytest.approx(margin) and margin > 0
        assert 0 <= last[f"{part}_accuracy"] <= 1
    assert [step["step"] for step in steps if "val_loss" in step] == [2, 4, 6]
    assert "Q: hi" in (whole / "samples.txt").read_text(encoding="utf-8")


def test_the_reference_is_that_of_the_model_as_loaded(whole, model, data, tmp_path):
    task = PreferenceTuning(options(model, data, tmp_path))
    task.load(tmp_path, {})
    ids, targets, _ = task.train_rows[np.arange(len(task.train_rows))]
    kept = json.loads((whole / "reference.json").read_text(encoding="utf-8"))
    expected = answer_log_probs(load_model(model), ids, targets)
    np.testing.assert_allclose(np.array(kept["train"]), expected, rtol=1e-5)
    assert len(kept["valid"]) == len(task.valid_rows)


def test_a_system_is_in_the_prompt_and_unused_keys_are_named(model, tmp_path):
    rows = [row | {"system": "Be brief.", "score": 3} for row in ROWS]
    task = PreferenceTuning(options(model, write(tmp_path / "pairs.json", rows), tmp_path, questions=()))
    task.load(tmp_path, {})
    assert "(score not used)" in task.notes[0]
    ids, _, _ = task.train_rows[np.arange(1)]
    for answer in ids[0]:
        assert task.tokenizer.decode(answer).startswith(turn("system", "Be brief.") + "<|im_start|>user")


@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_stopped_run_resumes_bit_for_bit(whole, model, data, tmp_path, step):
    out = tmp_path / "run"
    stopped_after(options(model, data, out), step, signal.SIGTERM, train)
    before = (out / "reference.json").read_bytes()
    train(begun_config(out, PreferenceOptions))
    assert left(out) == left(whole)
    assert (out / "reference.json").read_bytes() == before == (whole / "reference.json").read_bytes()


def test_a_changed_reference_and_changed_options_are_refused(model, data, tmp_path):
    out = tmp_path / "run"
    stopped_after(options(model, data, out), 2, train=train)
    begun, file = begun_config(out, PreferenceOptions), out / "reference.json"
    for change in ({"beta": 0.2}, {"logps": "mean"}):
        with pytest.raises(Error, match=f"--{next(iter(change))}"):
            train(replace(begun, **change))
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"-", b"-1", 1))
    with pytest.raises(Error, match=r"reference\.json is damaged"):
        train(begun)
    file.write_bytes(whole)
    another = read_sealed(file)
    del another["sha256"]
    another["valid"][0][0] -= 1.0
    file.write_bytes(sealed(another))
    with pytest.raises(Error, match="the reference of the run"):
        train(begun)
    file.unlink()
    with pytest.raises(Error, match=r"reference\.json cannot be read"):
        train(begun)


def test_beta_and_logps_are_those_of_the_loss_and_of_the_evaluation(model, data, tmp_path):
    task = PreferenceTuning(
        options(model, data, tmp_path, beta=0.7, logps="mean", dropout=0.0, eval_examples=9)
    )
    task.load(tmp_path, {})
    changed = task.model()
    changed.norm.weight.data *= 1.5

    def expected(ids, targets, reference):
        return preferences(answer_log_probs(changed, ids, targets, mean=True), reference, beta=0.7)

    batch, valid = task.batch_at(0), expected(*task.valid_rows[np.arange(len(task.valid_rows))])
    loss = task.loss(changed, *batch, num_targets=1).item()
    assert loss == pytest.approx(expected(*batch).losses.sum(), rel=1e-5)
    found = task.evaluate(changed, lambda: None, final=False)
    assert found["val_loss"] == pytest.approx(valid.losses.mean(), rel=1e-5)
    assert found["val_rejected_reward"] == pytest.approx(valid.rewards[:, 1].mean(), rel=1e-4)
    with pytest.raises(KeyboardInterrupt):
        task.evaluate(changed, raising(KeyboardInterrupt()), final=False)


def test_micro_batches_do_not_change_a_run(model, data, tmp_path):
    """In float64 and without dropout, to rounding."""
    found = []
    for micro_batch in (4, 2):
        out = tmp_path / str(micro_batch)
        train(options(model, data, out, micro_batch=micro_batch, dtype="float64", dropout=0.0))
        found.append([record["train_loss"] for record in records(out)[1:]])
    np.testing.assert_allclose(*found, rtol=1e-10)


@pytest.mark.parametrize("logps", ["sum", "mean"])
def test_lora_trains_the_adapter_only_and_continues_from_it(model, data, tmp_path, logps):
    first = tmp_path / "first"
    changes = dict(train="lora", rank=2, steps=2, logps=logps)
    train(options(model, data, first, **changes))
    assert all("lora_" in name for name in weights(first, "adapter_model.safetensors"))
    second = tmp_path / "second"
    train(options(first, data, second, **changes))  # the reference includes the adapter
    assert records(second)[0]["val_loss"] == pytest.approx(np.log(2), abs=1e-6)
    kept = [(run / "reference.json").read_bytes() for run in (first, second)]
    assert kept[0] != kept[1]
    assert not same_arrays(*(weights(run, "adapter_model.safetensors") for run in (first, second)))


def test_pairs_that_are_left_out_are_counted(model, tmp_path, capsys):
    equal, long = {"chosen": "same", "rejected": "same"}, {"rejected": "x" * 90}
    rows = [row | ({2: equal, 5: long}.get(i, {})) for i, row in enumerate(ROWS)]
    for part, some in (("train", rows), ("valid", ROWS)):
        write(tmp_path / f"{part}.json", some)
    train(options(model, str(tmp_path), tmp_path / "run", max_length=100, steps=1, warmup=0))
    said = " ".join(capsys.readouterr().out.split())
    assert "train: 1 of 30 pairs whose answers are equal are left out" in said
    assert "train: 1 of 30 pairs of more than 100 tokens are left out" in said
    assert "valid:" not in said


def test_the_longest_pair_that_is_kept_has_max_length_tokens(model, data, tmp_path):
    task = PreferenceTuning(options(model, data, tmp_path))
    task.load(tmp_path, {})
    longest = max(int(rows.lengths.max()) for rows in (task.train_rows, task.valid_rows))
    for most, left_out in ((longest, 0), (longest - 1, 1)):
        task = PreferenceTuning(options(model, data, tmp_path, max_length=most))
        task.load(tmp_path, {})
        assert any("of more than" in note for note in task.notes) == left_out


def test_answers_after_different_prompts_are_refused(model, data, tmp_path):
    task, learned = PreferenceTuning(options(model, data, tmp_path)), np.array([False, False, True])
    task.load(tmp_path, {})
    pair = [Encoded(np.array(ids), learned) for ids in ([1, 2, 3], [1, 9, 4])]
    with pytest.raises(Error, match=r"row 3: .* another prompt"):
        task._pairs("train", [(Row({}, "row 3"), *pair)])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rows"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 4, "no pairs to compare"),
        ([{"prompt": "a", "chosen": "b" * 400, "rejected": "b"}] * 4, "no pairs to compare"),
        ([*ROWS, {"prompt": "a"}], "row 31 of"),
        ([*ROWS, {"prompt": "a", "chosen": "b", "rejected": "c"}], "row 31 of"),  # another form
        ([{"chosen": [{"role": "user", "content": "a"}] * 2, "rejected": "c"}] * 4, "row 1 of"),
    ],
)
def test_bad_data_is_one_sentence(model, tmp_path, rows, said):
    with pytest.raises(Error, match=said):
        train(options(model, write(tmp_path / "bad.json", rows), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"beta": 0.0}, {"beta": np.inf}, {"logps": "max"}])
def test_bad_options_are_refused(change):
    with pytest.raises(Error, match=f"--{next(iter(change))}"):
        PreferenceOptions(model="m", data="d", **change)


def test_only_the_last_answer_is_compared():
    learned = np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 0], bool)
    found = last_answer(Encoded(np.arange(10), learned))
    assert found.ids.tolist() == list(range(9))
    assert np.flatnonzero(found.learned).tolist() == [6, 7, 8]


def test_the_prompt_and_padding_are_not_targets(model, tmp_path):
    rows = [{"prompt": "hi", "chosen": "yes", "rejected": "no way"}] * 4
    task = PreferenceTuning(options(model, write(tmp_path / "d.json", rows), tmp_path / "run"))
    task.load(tmp_path / "run", {})
    ids, targets, reference = task.batch_at(0)
    assert ids.shape == targets.shape and ids.shape[1] == 2 and reference.shape == (len(ids), 2)
    for answer, words in enumerate(("yes", "no way")):
        learned = targets[0, answer][targets[0, answer] != -100]
        assert task.tokenizer.decode(learned) == f"{words}<|im_end|>"
    assert ids[0, 0, 0] == START
    assert task.tokenizer.decode(ids[0, 1]) == turn("user", "hi") + "<|im_start|>assistant\nno way"


def test_a_batch_that_is_not_finite_is_described_with_its_texts(model, data, tmp_path):
    task = PreferenceTuning(options(model, data, tmp_path / "run"))
    task.load(tmp_path / "run", {})
    batch = task.batch_at(0)
    found = task.describe_batch(batch)
    assert len(found["text"]) == 2 * len(batch[0]) and all("say" in text for text in found["text"])
    json.dumps(found)

"""The task of pretraining: its data, its evaluation, and the same run in torch."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support.runs import (
    CONTEXT,
    RHYME,
    left,
    records,
    rhyme,
    same_arrays,
    small,
    stopped_after,
    tiny,
    val_losses,
    weights,
)

from tinyllm import GPT2, load_tokenizer
from tinyllm.data.batches import Batches, Windows
from tinyllm.errors import Error
from tinyllm.tokenizers.base import END_OF_TEXT
from tinyllm.training.config import TrainConfig
from tinyllm.training.run_folder import begun_config
from tinyllm.training.tasks.pretrain import Pretraining, mean_loss, parts_of_a_step, train
from tinyllm.training.tasks.text import load_data
from tinyllm.weights.runs import last_checkpoint


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return rhyme(tmp_path_factory.mktemp("text"), 40)


def test_training_windows_overlap_by_default(text, tmp_path):
    data = load_data(small(text, tmp_path, stride=None))
    assert (data.train.stride, data.validation.stride) == (CONTEXT // 4, CONTEXT)
    assert load_data(small(text, tmp_path, stride=None, context=2, prompt="t")).train.stride == 1


def test_loss_starts_near_guessing_and_falls(text, tmp_path):
    config = small(text, tmp_path / "run", steps=120, eval_every=120)
    train(config, progress=False)
    first, *_, last = records(config.out)
    assert first["val_loss"] == pytest.approx(math.log(len(set(RHYME))), abs=0.05)
    assert first["train_eval_loss"] == pytest.approx(math.log(len(set(RHYME))), abs=0.05)
    assert last["val_loss"] < first["val_loss"] / 3
    # Characters of RHYME are one byte each, and the char tokenizer's tokens are characters.
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2), rel=1e-12)
    assert last["train_loss"] < first["val_loss"] / 3


# Texts and tokenizers


def test_a_large_text_is_encoded_into_a_token_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tinyllm.data.token_file.PIECE_CHARACTERS", 1000
    )  # of a chunk, so that there are many
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(30):
        (corpus / f"{n:02}.txt").write_text(RHYME * 60 + str(n), encoding="utf-8")
    out = tmp_path / "run"
    config = small(corpus, out, tokenizer="bpe:265", in_memory=0, steps=150, eval_every=150)
    train(config, progress=False)
    (folder,) = tmp_path.glob("*.tokens")
    assert folder.name == "corpus.bpe-265.tokens"
    written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    last = records(out)[-1]
    assert last["val_loss"] < 1
    # One token of this rhyme is several bytes, so the two units differ by more than ln 2.
    assert last["val_bits_per_byte"] < last["val_loss"]
    ids = load_tokenizer(out).encode((corpus / "00.txt").read_text(encoding="utf-8"))
    data = load_data(config)
    assert list(data.train.tokens[: len(ids)]) == ids
    assert data.train.tokens[len(ids)] == load_tokenizer(out).special_tokens["<|endoftext|>"]
    train(replace(config, out=tmp_path / "again"), progress=False)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == written  # tokenised once
    assert same_arrays(weights(out), weights(tmp_path / "again"))
    (corpus / "07.txt").write_text("something else", encoding="utf-8")
    with pytest.raises(Error, match=r"corpus"):
        train(replace(config, out=tmp_path / "changed", tokens=folder), progress=False)
    assert not (tmp_path / "changed").exists()


@pytest.mark.parametrize(
    "tokenizer, in_memory",
    [("char", 100), ("bpe:270", 100), ("gpt2", 100), ("bpe:270", 0), ("gpt2", 0)],
)
def test_a_marked_text_gives_the_windows_and_bytes_of_a_jsonl_file(
    tmp_path, monkeypatch, tokenizer, in_memory
):
    monkeypatch.setattr("tinyllm.data.token_file.PIECE_CHARACTERS", 1000)
    monkeypatch.setattr("tinyllm.data.corpus.PIECE_CHARACTERS", 1000)
    documents = [f"the {n} mice saw {n * n} cats. " * (n % 7) for n in range(400)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in documents)
    )
    (tmp_path / "a.txt").write_text(END_OF_TEXT.join(documents))
    options = dict(tokenizer=tokenizer, in_memory=in_memory, special="allow")
    lines = load_data(small(tmp_path / "a.jsonl", tmp_path, text_field="text", **options))
    marked = load_data(small(tmp_path / "a.txt", tmp_path, **options))
    assert marked.tokenizer.to_json() == lines.tokenizer.to_json()
    for ours, theirs in ((marked.train, lines.train), (marked.validation, lines.validation)):
        assert np.array_equal(ours.tokens, theirs.tokens)
    assert (marked.bytes_per_token, marked.prompt) == (lines.bytes_per_token, lines.prompt)
    assert marked.texts == lines.texts
    assert lines.tokenizer.special_tokens[END_OF_TEXT] in lines.validation.tokens


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:265"])
def test_a_text_too_short_for_a_token_file_has_a_remedy_and_leaves_none(text, tmp_path, tokenizer):
    config = small(text, None, tokenizer=tokenizer, in_memory=0, tokens=tmp_path / "tokens")
    for existed in (False, True):
        with pytest.raises(Error, match="choose --in-memory 1 or more"):
            load_data(config)
        assert (tmp_path / "tokens").exists() == existed
        (tmp_path / "tokens").mkdir(exist_ok=True)
    load_data(replace(config, in_memory=1))


def test_a_tokenizer_is_learned_from_the_training_part_only(tmp_path):
    (tmp_path / "text.txt").write_text(RHYME * 40 + "q" * 100, encoding="utf-8")
    tokenizer = load_data(small(tmp_path / "text.txt", None, tokenizer="bpe:264")).tokenizer
    assert not any(b"qq" in tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size))


def test_a_large_text_with_a_character_tokenizer_is_refused(text, tmp_path):
    with pytest.raises(Error, match="too much for the tokenizer char"):
        load_data(small(text, tmp_path / "run", in_memory=0))


def test_noise_replaces_a_share_of_the_inputs_and_no_target(text, tmp_path):
    plain, noisy = (Pretraining(small(text, tmp_path, batch=32, token_noise=p)) for p in (0.0, 0.4))
    changed = []
    for task in (plain, noisy):
        task.load(tmp_path, {})
    for step in range(20):
        (ids, targets), (found, same) = plain.batch_at(step), noisy.batch_at(step)
        np.testing.assert_array_equal(targets, same)
        np.testing.assert_array_equal(found, noisy.batch_at(step)[0])
        assert found.min() >= 0 and found.max() < noisy.text.tokenizer.vocab_size
        changed.append((found != ids).mean())
    kept_by_chance = 1 / noisy.text.tokenizer.vocab_size
    assert np.mean(changed) == pytest.approx(0.4 * (1 - kept_by_chance), abs=0.05)
    assert len(set(changed)) > 1


@pytest.mark.parametrize("option", ["token_noise", "token_splits"])
def test_noise_is_another_in_every_step_and_with_every_seed(text, tmp_path, option):
    options, found = {"tokenizer": "bpe:266", option: 0.4}, set()
    for seed in (0, 1):
        task = Pretraining(small(text, tmp_path, seed=seed, **options))
        task.load(tmp_path, {})
        same = task.text.train[np.arange(4)]  # the same windows in every step
        task.batches = SimpleNamespace(at=lambda step, same=same: same)
        found |= {task.batch_at(step)[0].tobytes() for step in (0, 1)}
    assert len(found) == 4


def test_splits_change_the_tokens_of_a_window_and_not_its_text(text, tmp_path):
    options = dict(tokenizer="bpe:266", batch=8)
    plain, split = (Pretraining(small(text, tmp_path, token_splits=p, **options)) for p in (0.0, 0.4))
    for task in (plain, split):
        task.load(tmp_path, {})
    decode = plain.text.tokenizer.decode_bytes
    for step in range(5):
        (ids, targets), (found, following) = plain.batch_at(step), split.batch_at(step)
        assert found.shape == ids.shape and not np.array_equal(found, ids)
        np.testing.assert_array_equal(found[:, 1:], following[:, :-1])
        np.testing.assert_array_equal(found, split.batch_at(step)[0])
        for row, target, whole in zip(found, following, np.hstack([ids, targets[:, -1:]])):
            assert decode(whole.tolist()).startswith(decode([*row.tolist(), int(target[-1])]))


@pytest.mark.parametrize(("tokenizer", "told"), [("char", True), ("bytes", True), ("bpe:266", False)])
def test_tokens_that_were_not_merged_are_not_divided_and_a_line_says_so(text, tmp_path, tokenizer, told):
    plain, task = (
        Pretraining(small(text, tmp_path, token_splits=p, tokenizer=tokenizer, tokens=tmp_path / "x"))
        for p in (0.0, 0.1)
    )
    for each in (plain, task):
        each.load(tmp_path, {})
        each.steps_per_epoch = 1
    assert any("--token-splits" in line for line in task.introduction()) == told
    assert any("--tokens is not used" in line for line in task.introduction())  # the text is in memory
    same = [np.array_equal(*pair) for pair in zip(plain.batch_at(0), task.batch_at(0))]
    assert same == [told, told]


def test_a_run_on_bytes_has_their_loss_in_bits(text, tmp_path):
    model = train(tiny(text, tmp_path / "run", tokenizer="bytes"), progress=False)
    assert model.config.vocab_size == 257
    last = records(tmp_path / "run")[-1]
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2), rel=1e-15)
    assert load_tokenizer(tmp_path / "run").name == "bytes"


def test_a_second_text_is_evaluated_at_the_end_without_the_shared_paragraphs(tmp_path, capsys):
    own = "\n\n".join(f"{i} the cat sat on the mat" for i in range(60))
    second = "\n\n".join(f"a cat {i} sat on the\nmat" for i in range(9))
    (tmp_path / "own.txt").write_text(own)
    (tmp_path / "second.txt").write_text(
        f"3 the cat\nsat on the mat\n\n{second}\n\n59 the cat sat on the mat"
    )
    options = dict(second_text=str(tmp_path / "second.txt"), tokenizer="bpe:264", batch=1)
    config = small(tmp_path / "own.txt", tmp_path / "run", **options)
    data = load_data(config)
    assert data.second.text.decode() == second
    assert data.second.bytes_per_token != data.bytes_per_token
    stopped_after(config, 3)
    config = begun_config(config.out)
    model = train(config, progress=False)
    first, *_, last = records(config.out)
    loss = mean_loss(model, data.second.windows, 10**6, 2)
    expected = loss / math.log(2) * len(data.second.windows.tokens) / len(second)
    assert last["val_second_bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert "val_second_bits_per_byte" not in first
    assert f"  {expected:.2f}\n" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_documents_with_nothing_new_do_not_count_in_a_second_text(tmp_path, ending):
    """Each would add an <|endoftext|>, which stands for no byte."""
    own, new = [RHYME * 20 + str(n) for n in range(9)], [f"a cat {n} sat on the mat" for n in range(3)]

    def load(name, documents):
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        content = {"jsonl": lines, "txt": END_OF_TEXT.join(documents)}[ending]
        (tmp_path / f"{name}.{ending}").write_text(content)
        options = dict(text_field="text" if ending == "jsonl" else None, tokenizer="bytes", special="allow")
        second = str(tmp_path / f"{name}.{ending}")
        return load_data(small(tmp_path / f"own.{ending}", None, second_text=second, **options))

    with pytest.raises(Error, match=r"--second-text .*no paragraph"):
        load("own", own)
    plain, padded = (load("second", documents).second for documents in (new, own[:1] + new + own + new))
    assert plain.text == padded.text == "".join(new).encode()
    np.testing.assert_array_equal(padded.windows.tokens, plain.windows.tokens)
    assert padded.bytes_per_token == plain.bytes_per_token


@pytest.mark.parametrize(
    ("own", "second", "options"),
    [
        ("own.txt", "second.jsonl", dict(text_field="text")),
        ("own.txt", "SECOND.JSONL", dict(text_field="text")),
        ("own.txt", "folder", dict(text_field="text")),
        ("own.jsonl", "second.txt", dict(text_field="text")),
        ("own.jsonl", "second.jsonl", dict(text_field="text")),
        ("own.txt", "code", dict(pattern="*.py")),
        ("code", "second.txt", dict(pattern="*.py")),
        ("code", "second.jsonl", dict(pattern="*.py", text_field="text")),
        ("own.txt", "folder", dict(pattern="*.jsonl", text_field="text")),
    ],
)
def test_options_of_files_are_for_the_text_that_can_have_them(tmp_path, monkeypatch, own, second, options):
    monkeypatch.chdir(tmp_path)
    line = json.dumps({"text": "a cat sat on the mat, and the mat sat on the cat"})
    for folder, name in (("folder", "a.jsonl"), ("code", "a.py")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(line)
    for name in ("second.jsonl", "SECOND.JSONL", "second.txt"):
        (tmp_path / name).write_text(line)
    (tmp_path / "own.txt").write_text(RHYME * 20)
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": RHYME * 20}))
    if own == "code":
        (tmp_path / "code" / "a.py").write_text(RHYME * 20)
    data = load_data(small(own, None, second_text=second, tokenizer="bytes", **options))
    assert data.second.text.decode() in (line, json.loads(line)["text"])
    assert (data.second.text.decode() == line) == (second in ("second.txt", "code"))


@pytest.mark.parametrize(
    ("second", "options", "said"),
    [
        ("second.jsonl", {}, "--second-text second.jsonl: .*--text-field"),
        ("code", {}, "--second-text code: .*--pattern"),
        ("second.txt", dict(text_field="text"), "omit the field 'text' .*--text-field"),
        ("second.txt", dict(pattern="*.py"), r"omit the pattern '\*.py' .*--pattern"),
    ],
)
def test_options_of_files_that_lack_or_suit_no_text_are_named(tmp_path, monkeypatch, second, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    for name in ("own.txt", "second.txt", "second.jsonl", "code/a.py"):
        (tmp_path / name).write_text(RHYME * 20)
    with pytest.raises(Error, match=said):
        load_data(small("own.txt", None, second_text=second, tokenizer="bytes", **options))


@pytest.mark.parametrize("in_memory", [0, 100])
def test_a_validation_text_of_special_tokens_is_refused(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr("tinyllm.data.token_file.PIECE_CHARACTERS", 100)
    monkeypatch.setattr("tinyllm.data.corpus.PIECE_CHARACTERS", 100)
    text = ["the " * 20 + "b" * 50, *["<|x|>"] * 44]  # its last tenth begins with one of these
    (tmp_path / "own.txt").write_text(END_OF_TEXT.join(text))
    options = dict(
        tokenizer="bytes", special_tokens=("<|x|>",), special="allow", in_memory=in_memory, context=8
    )
    with pytest.raises(Error, match="nothing but special tokens"):
        load_data(small(tmp_path / "own.txt", None, **options))


def test_a_run_whose_second_text_changed_is_refused(text, tmp_path):
    second = tmp_path / "second.txt"
    second.write_text("the cat the cat the cat the cat")
    config = small(text, tmp_path / "run", second_text=str(second))
    stopped_after(config, 3)
    second.write_text("the mat the mat the mat the mat")
    with pytest.raises(Error, match=r"the second_text of the run in .* changed"):
        train(begun_config(config.out), progress=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(second_text="nowhere"), "--second-text nowhere: no text 'nowhere'"),
        (dict(tokenizer="char"), "--second-text second.txt: character 'ü'"),
        (dict(second_text="own.txt"), "--second-text own.txt: no paragraph of it"),
        (dict(in_memory=0, tokenizer="bytes"), "--second-text second.txt: .* larger than 0 MB"),
    ],
)
def test_a_second_text_that_cannot_be_evaluated_is_refused(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text(RHYME * 9)
    (tmp_path / "second.txt").write_text("the cat ü")
    with pytest.raises(Error, match=said):
        load_data(small("own.txt", None, **{"second_text": "second.txt"} | options))


def test_the_default_second_text_is_omitted_if_the_tokenizer_lacks_its_characters(capsys, monkeypatch):
    assert load_data(TrainConfig(context=16, tokenizer="bytes")).second.name == "python-docstrings"
    monkeypatch.setattr("tinyllm.data.corpus.python_docstrings", lambda half: "für Ψ")
    assert load_data(TrainConfig(context=16, tokenizer="char")).second is None
    assert "no second text is evaluated: character" in capsys.readouterr().out


def test_new_special_tokens_have_new_ids(text, tmp_path):
    config = small(text, tmp_path / "run", special_tokens=("<|user|>", "<|bot|>"), steps=2, warmup=0)
    model = train(config, progress=False)
    tokenizer = load_tokenizer(config.out)
    assert tokenizer.encode("the <|bot|>", special="allow")[-1] == tokenizer.vocab_size - 1
    assert model.config.vocab_size == tokenizer.vocab_size == len(set(RHYME)) + 2


def test_files_of_a_folder_are_selected_by_a_pattern(tmp_path, capsys):
    (tmp_path / "code").mkdir()
    for name in ("a.py", "b.py", "c.txt"):
        (tmp_path / "code" / name).write_text(RHYME * 20 + name, encoding="utf-8")
    data = load_data(small(tmp_path / "code", tmp_path / "run", pattern="*.py"))
    assert [path.name for path in data.corpus.files] == ["a.py", "b.py"]
    assert "1 other files" in capsys.readouterr().out
    with pytest.raises(Error, match="--pattern"):
        load_data(small(tmp_path / "code" / "c.txt", tmp_path / "run", pattern="*.py"))


@pytest.mark.parametrize(
    ("content", "tokenizer", "prompt"),
    [
        (RHYME, "char", "the"),
        (f"The end. {RHYME}", "char", "The"),
        ("天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往", "char", "天地玄黃宇宙洪荒日月"),
        ("天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往", "bpe:300", "天地玄黃宇宙洪荒日月"),
    ],
)
def test_the_default_prompt_is_part_of_the_text(tmp_path, content, tokenizer, prompt):
    (tmp_path / "text.txt").write_text(content * 20, encoding="utf-8")
    config = small(tmp_path / "text.txt", tmp_path / "run", prompt=None, tokenizer=tokenizer)
    data = load_data(config)
    assert data.prompt == prompt
    assert 0 < len(data.prompt_ids) <= CONTEXT
    assert prompt.startswith(data.tokenizer.decode(data.prompt_ids).rstrip("\ufffd"))


def test_a_prompt_that_cannot_be_encoded_is_refused_before_the_text_is_read(text, tmp_path, monkeypatch):
    train(small(text, tmp_path / "run", steps=1, warmup=0), progress=False)
    monkeypatch.setattr("tinyllm.training.tasks.text.open_corpus", None)  # a call would fail
    for prompt, said in (("X", "--prompt: .*'X'"), ("", "--prompt is empty"), ("t" * 17, "17 tokens")):
        with pytest.raises(Error, match=said):
            train(small(text, tmp_path / "new", tokenizer=str(tmp_path / "run"), prompt=prompt))
    with pytest.raises(Error, match="bpe:many"):
        train(small(text, tmp_path / "new", tokenizer="bpe:many"))


def test_a_text_too_short_for_the_context_is_refused_before_a_tokenizer_is_learned(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a few words" * 10, encoding="utf-8")
    monkeypatch.setattr("tinyllm.training.tasks.text.train_bpe", None)  # a call would fail
    with pytest.raises(Error, match=r"text\.txt is too short.* 11 bytes.*--context 16 needs 17"):
        load_data(small(tmp_path / "text.txt", tmp_path / "run", tokenizer="bpe:300"))


# Evaluation


@pytest.mark.parametrize("eval_windows", [2, 128])
def test_all_losses_of_a_run_are_of_the_same_windows(text, tmp_path, monkeypatch, capsys, eval_windows):
    """No more than are trained on in between; only the table at the end has more."""
    calls = []

    def count(model, windows, most, *args):
        calls.append(min(most, len(windows)))
        return mean_loss(model, windows, most, *args)

    monkeypatch.setattr("tinyllm.training.tasks.pretrain.mean_loss", count)
    config = small(text, tmp_path / "run", eval_every=1, steps=3, warmup=0, eval_windows=eval_windows)
    model = train(config, progress=False)
    now, end = min(eval_windows, 4), min(eval_windows, 5)  # the rows of a step, of 5 for validation
    assert calls == [now, now] * 4 + [end] * (end > now)
    said = " ".join(capsys.readouterr().out.split())
    assert f"every 1 steps: {now} training and {now} validation windows" in said
    assert (f"for the table, {end} validation windows" in said) == (end > now)
    last, validation = records(config.out)[-1], load_data(config).validation
    assert last["val_loss"] == mean_loss(model, validation, now, 4)
    if end > now:
        bits = mean_loss(model, validation, end, 4) / math.log(2)  # a token is a byte
        assert last["val_final_bits_per_byte"] == pytest.approx(bits, rel=1e-12)
        monkeypatch.setattr("tinyllm.training.baselines.describe", lambda train, measured: measured)
        task = Pretraining(config)
        task.load(tmp_path, {})
        assert task.conclusion(last)["validation text"][0] == last["val_final_bits_per_byte"]
    else:
        assert "val_final_bits_per_byte" not in last


def test_a_resumed_run_is_evaluated_on_the_same_windows(text, tmp_path):
    config = small(text, tmp_path / "whole", eval_every=1, eval_windows=128)
    train(config, progress=False)
    stopped_after(replace(config, out=tmp_path / "run"), 3)
    train(replace(begun_config(tmp_path / "run"), eval_every=3), progress=False)
    found, expected = (val_losses(tmp_path / name) for name in ("run", "whole"))
    assert found == {step: expected[step] for step in (0, 1, 2, 3, 6, 9, 12)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("most", [3, 10**6])
def test_mean_loss_is_the_mean_over_its_windows_without_dropout(text, tmp_path, training, most):
    data = load_data(small(text, tmp_path))
    config = small(text, tmp_path, dropout=0.5).model_config(data.tokenizer.vocab_size)
    model = GPT2(config, rng=np.random.default_rng(0)).astype(np.float64).train(training)
    model.wte.weight.data *= 10  # otherwise all windows would have about the same loss
    found = mean_loss(model, data.train, most, batch=5)
    assert all(module.training == training for _, module in model.named_modules())

    model.eval()
    chosen = [0, 26, 52] if most == 3 else range(53)
    assert len(data.train) == 53
    losses = []
    for i in chosen:
        ids, targets = data.train[[i]]
        logits = model(ids).data[0]
        log_sums = np.log(np.exp(logits).sum(axis=-1))
        losses += [log_sums[t] - logits[t, target] for t, target in enumerate(targets[0])]
    assert found == pytest.approx(np.mean(losses), rel=1e-12)
    assert np.std(losses) > 0.1


def test_mean_loss_computes_no_gradients_and_restores_the_mode_after_an_error(text, tmp_path):
    data = load_data(small(text, tmp_path))
    model = GPT2(small(text, tmp_path).model_config(data.tokenizer.vocab_size), rng=np.random.default_rng(0))
    mean_loss(model, data.validation, 2, 2)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(Error, match="token ids run from 0"):
        mean_loss(model, Windows(np.full(40, 999), CONTEXT), 2, 2)
    assert model.training


def test_the_parts_of_a_step_equal_a_step_of_the_run(text, tmp_path):
    config = small(text, tmp_path / "run", steps=1, warmup=0, dropout=0.2, micro_batch=2)
    model, parts = parts_of_a_step(config)
    optimizer = parts["AdamW"].__self__
    optimizer.lr = config.lr
    for part in parts.values():
        part()
    assert not config.out.exists()
    assert same_arrays(model.state_dict(), train(config, progress=False).state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("tie_head", [True, False])
def test_a_run_equals_the_same_run_in_torch(text, tmp_path, tie_head):
    """20 steps of train() against transformers' GPT-2 with torch's loss, AdamW, clipping and schedules.

    In float64, from the same weights, on the same batches. GPT2LMHeadModel computes its own loss in
    float32, so torch's cross-entropy takes its logits.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = small(
        text,
        tmp_path / "run",
        n_layer=2,
        steps=20,
        eval_every=20,
        dtype="float64",
        clip=1.4,
        tie_head=tie_head,
    )
    data = load_data(config)
    start = GPT2(config.model_config(data.tokenizer.vocab_size), rng=np.random.default_rng(config.seed))
    start.astype(np.float64).save_pretrained(tmp_path / "start")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "start", dtype=torch.float64, attn_implementation="eager"
    ).train()
    assert all(p.dtype == torch.float64 for p in theirs.parameters())

    ours = train(config, progress=False)

    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=config.lr
    )
    rise = torch.optim.lr_scheduler.LinearLR(
        optimizer, config.initial_lr / config.lr, total_iters=config.warmup
    )
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps - config.warmup, config.min_lr)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [config.warmup])
    batches = Batches(data.train, config.batch, config.seed)
    clipped = 0
    for step, record in enumerate(records(config.out)[1:]):
        ids, targets = (torch.from_numpy(array) for array in batches.at(step))
        loss = torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.clip)
        clipped += norm.item() > config.clip
        assert record["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()
        assert abs(record["train_loss"] - loss.item()) < 1e-9
        assert abs(record["grad_norm"] - norm.item()) < 1e-9
    assert 0 < clipped < 20  # some steps are clipped and some are not

    expected = {name.removeprefix("transformer."): p for name, p in theirs.named_parameters()}
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    began = start.state_dict()
    for name, parameter in expected.items():
        parameter = parameter.detach().numpy()
        assert np.abs(found[name] - parameter).max() < 1e-9, name
        assert np.abs(found[name] - began[name]).max() > 1e-4, name  # it was trained


def test_a_run_of_a_token_file_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyllm.data.token_file.PIECE_CHARACTERS", 100)
    monkeypatch.setattr("tinyllm.data.corpus.PIECE_CHARACTERS", 100)
    (tmp_path / "text.txt").write_text(RHYME * 60, encoding="utf-8")
    config = tiny(tmp_path / "text.txt", tmp_path / "whole", tokenizer="bpe:262", in_memory=0)
    train(config, progress=False)
    stopped_after(replace(config, out=tmp_path / "run"), 4)
    monkeypatch.setattr("tinyllm.training.tasks.text.train_bpe", None)  # the tokenizer is not learned again
    train(begun_config(tmp_path / "run"), progress=False)
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def test_resuming_with_another_text_or_tokenizer_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(RHYME * 12, encoding="utf-8")
    out = tmp_path / "run"
    stopped_after(tiny(path, out), 2)
    tokenizer = (out / "tinyllm_tokenizer.json").read_bytes()
    (out / "tinyllm_tokenizer.json").write_bytes(tokenizer.replace(b"ce", b"ec"))
    with pytest.raises(Error, match="changed since the run was started"):
        train(begun_config(out), progress=False)
    (out / "tinyllm_tokenizer.json").write_bytes(tokenizer)
    path.write_text(RHYME * 12 + "!", encoding="utf-8")
    with pytest.raises(Error, match=r"text\.txt is not the one that the run was started with") as raised:
        train(begun_config(out), progress=False)
    assert begun_config(out).text in str(raised.value)
    (tmp_path / "moved").mkdir()
    train(replace(begun_config(out), text=str(rhyme(tmp_path / "moved", 12))), progress=False)
    assert last_checkpoint(out).name == "step-000006"


def test_large_losses_are_shown_with_four_digits():
    record = dict(train_eval_loss=1.5e18, val_loss=1e300, val_bits_per_byte=2.5)
    line = Pretraining(TrainConfig()).describe_evaluation(record)
    assert line == "train 1.5e+18  val 1e+300 = perplexity inf = 2.500 bits/byte"

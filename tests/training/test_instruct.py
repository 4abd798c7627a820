"""Runs of fine-tuning on instructions: what is trained, written, resumed and refused."""

import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from support.chat_model import CHATML, write_model
from support.instructions import CHATS, options, render_in_process, turns, write_chats, write_parts
from support.models import NO_DROPOUT
from support.runs import left, no_pictures, records, stopped_after

from parity.durability.faults import raising
from tinyllm import GPT2, GPT2Config, load_model, load_tokenizer
from tinyllm.errors import Error
from tinyllm.nn import lora_layers
from tinyllm.optim import NoLossScale
from tinyllm.tokenizers.chat_template import encode_chat
from tinyllm.training.begun import begun_config, begun_task
from tinyllm.training.run import run_task
from tinyllm.training.step import accumulate_gradients, evaluate
from tinyllm.training.tasks import chat, finetune
from tinyllm.training.tasks.instruct import InstructionTuning, InstructOptions
from tinyllm.weights.runs import last_checkpoint
from tinyllm.weights.safetensors import Weights


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patched:
        no_pictures(patched)
        render_in_process(patched)
        patched.setattr(chat, "ANSWER_TOKENS", 5)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folders of a random chat model and of the conversations."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "model").mkdir()
    return write_model(folder / "model"), write_parts(folder / "data")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A random GPT-2 with GPT-2's vocabulary and without a tokenizer or a chat template."""
    folder = tmp_path_factory.mktemp("plain") / "gpt2"
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=128, **NO_DROPOUT)
    GPT2(config, rng=np.random.default_rng(0)).save_pretrained(folder)
    return folder


def tune(config, progress=False, callback=None):
    return run_task(InstructionTuning(config), progress, callback)


def begun(out):
    return begun_config(out, InstructOptions)


def loaded(files, out, **changes):
    """A task whose data and model are loaded, without a run."""
    task = InstructionTuning(options(*files, out, **changes))
    task.check()
    task.load(out, {})
    return task, task.model()


# ------------------------------------------------------------------------------- the files of a run


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A LoRA run that was never interrupted; tests only read it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    tune(options(*files, out, lora_dropout=0.2, dropout=0.1))
    return out


def test_a_checkpoint_of_lora_holds_the_adapter_only(whole, files):
    checkpoint = last_checkpoint(whole)
    assert {path.name for path in checkpoint.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "checkpoint.json")
    }
    names = Weights(checkpoint / "optimizer.safetensors").shapes
    assert len(names) == 2 * 2 * 14 and all(".lora_" in name for name in names)
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (2, 4.0)
    assert config["base_model_name_or_path"] == str(files[0].absolute())


def test_the_run_records_its_data_start_and_template(whole, files):
    about = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    assert (about["task"], begun_task(whole)) == ("instruct", "instruct")
    assert {"train": 7, "valid": 3, "test": 0}.items() <= about["data"].items()
    for part in ("data", "tokenizer", "start", "template"):
        assert len(about[part]["sha256"]) == 64
    assert about["format"] == {"name": "messages"}
    assert (whole / "chat_template.jinja").read_text(encoding="utf-8") == CHATML
    first, *steps = records(whole)
    assert (first["step"], len(steps)) == (0, 5) and "val_loss" in first
    samples = (whole / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("Q: Hi\nA: ") == 4  # at steps 0, 2, 4 and 5


def test_the_output_says_what_is_done(files, tmp_path, capsys):
    tune(options(*files, tmp_path / "run", questions=()))
    said = " ".join(capsys.readouterr().out.split())
    for line in (
        "trains 1,024 of 13,968 parameters: LoRA of rank 2 on 14 layers",
        "7 training, 3 validation and 0 test examples (as given)",
        "format messages: {messages, system}; chat template: that of the model; learned: the answers",
        "5 steps of 4 examples, 2 an epoch",
        "Q: line break A:",
        "tinyllm chat --run",
    ):
        assert line in said, line


@pytest.mark.parametrize("step", [0, 1, 3, 4])
def test_a_stopped_run_resumes_bit_for_bit(whole, files, tmp_path, step):
    out = tmp_path / "run"
    stopped_after(options(*files, out, lora_dropout=0.2, dropout=0.1), step, signal.SIGTERM, tune)
    tune(begun(out))
    assert adapter_left(out) == adapter_left(whole)


def adapter_left(out):
    last = last_checkpoint(out)
    names = ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors")
    of_the_machine = ("tokens_per_s", "mean_tokens_per_s", "peak_memory")
    values = [{key: x for key, x in record.items() if key not in of_the_machine} for record in records(out)]
    samples = (out / "samples.txt").read_bytes()
    return last.name, values, samples, [(last / name).read_bytes() for name in names]


def test_a_whole_model_resumes_bit_for_bit(files, tmp_path):
    runs = [tmp_path / name for name in "ab"]
    for out in runs:
        template = tmp_path / "own.jinja"
        template.write_text(CHATML, encoding="utf-8")
        changes = dict(special_tokens=("<|new|>",), template=str(template), pack=True, max_length=200)
        config = options(*files, out, train="all", **changes)
        if out == runs[0]:
            tune(config)
        else:
            stopped_after(config, 3, train=tune)
            template.unlink()
            tune(begun(out))
    assert left(runs[0]) == left(runs[1])


def test_a_finished_run_says_so_and_returns_its_model(whole, capsys):
    model = tune(begun(whole))
    assert "is finished" in capsys.readouterr().out
    assert len(lora_layers(model)) == 14


@pytest.mark.parametrize(
    "what", ["data", "form of the data", "weights", "tokenizer", "template", "--eval-examples", "--epochs"]
)
def test_a_run_does_not_resume_with_something_else(files, tmp_path, what):
    model, out = write_model((tmp_path / "model").mkdir() or tmp_path / "model"), tmp_path / "run"
    data = write_parts(tmp_path / "data")
    stopped_after(options(model, data, out), 2, train=tune)
    if what == "data":
        write_chats(data / "train.jsonl", CHATS[1:-3])
    elif what == "form of the data":
        (data / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    elif what == "weights":
        other = load_model(model)
        other.norm.weight.data[0] += 1
        other.save_pretrained(model, overwrite=True)
    elif what == "tokenizer":
        content = (out / "tokenizer.json").read_text(encoding="utf-8")
        (out / "tokenizer.json").write_text(content + "\n", encoding="utf-8")
    elif what == "template":
        (out / "chat_template.jinja").write_text(CHATML + " ", encoding="utf-8")
    named = {
        "weights": "the weights in .* are not those",
        "form of the data": "the data .* is not that of the run",
        "--epochs": "was started with .*, not --epochs 2",
    }.get(what, what)
    # The lowest loss is kept, so the examples that it is measured on stay the same.
    changes = {"--eval-examples": {"eval_examples": 1}, "--epochs": {"epochs": 2.0}}.get(what, {})
    with pytest.raises(Error, match=named):
        tune(replace(begun(out), **changes))


# ------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ("all", ("",)),
        ("head", ("lm_head.",)),
        ("last-blocks:1", ("layers.1.", "norm.")),
        ("last-blocks:2", ("layers.", "norm.")),
    ],
)
def test_train_chooses_the_layers_and_the_others_keep_their_bits(files, tmp_path, train, trained):
    before = load_model(files[0], np.float64).state_dict()
    model = tune(options(*files, tmp_path / "run", train=train))
    assert {path.name for path in last_checkpoint(tmp_path / "run").iterdir()} >= {"model.safetensors"}
    for name, array in model.state_dict().items():
        assert np.array_equal(array, before[name]) != name.startswith(trained), name
    saved = load_model(tmp_path / "run", np.float64)
    assert all(np.array_equal(array, model.state_dict()[name]) for name, array in saved.state_dict().items())


def test_before_the_first_step_lora_is_the_base_model(files, tmp_path):
    _, model = loaded(files, tmp_path)
    ids = np.arange(20)[None]
    assert np.array_equal(model(ids).data, load_model(files[0], np.float64)(ids).data)
    base = load_model(files[0], np.float64)
    run = tune(options(*files, tmp_path / "run"))
    after = {name.replace(".base_layer", ""): array for name, array in run.state_dict().items()}
    for name, array in base.state_dict().items():
        assert np.array_equal(after[name], array), name


def test_an_adapter_is_trained_further_or_merged(whole, files, tmp_path):
    task, model = loaded((whole, files[1]), tmp_path / "a")
    assert "of the adapter" in task.trains
    assert {layer.dropout.p for layer in lora_layers(model).values()} == {0.0}  # it was trained with 0.2
    start = load_model(whole, np.float64)
    ids = np.arange(20)[None]
    assert np.array_equal(model.eval()(ids).data, start(ids).data)
    out = tmp_path / "further"
    tune(options(whole, files[1], out))
    config = json.loads((last_checkpoint(out) / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(files[0].absolute())
    task, model = loaded((whole, files[1]), tmp_path / "b", train="all")
    assert not lora_layers(model)
    assert np.abs(model.eval()(ids).data - start(ids).data).max() < 1e-12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(rank=3), "omit --rank"),
        (dict(alpha=9.0, targets=("q_proj",)), "omit --alpha and --targets"),
        (dict(special_tokens=("<|new|>",)), "cannot train embed_tokens and lm_head"),
    ],
)
def test_an_adapter_keeps_its_rank_alpha_and_layers(whole, files, tmp_path, changes, said):
    with pytest.raises(Error, match=said):
        tune(options(whole, files[1], tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_a_published_tokenizer_has_its_own(files, tmp_path, monkeypatch):
    shutil.copytree(files[0], tmp_path / "gpt2")
    data = files[1].absolute()
    monkeypatch.chdir(tmp_path)
    task, _ = loaded(("gpt2", data), tmp_path / "run")
    assert task.tokenizer.vocab_size == load_tokenizer(tmp_path / "gpt2").vocab_size != 50257
    task.save(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()


def test_the_default_learning_rate_follows_what_is_trained():
    def rate(**changes):
        return InstructOptions(model="m", data="d", **changes).lr

    assert (rate(), rate(train="all"), rate(train="head")) == (2e-4, 5e-5, 1e-3)
    assert rate(train="last-blocks:3") == 5e-5
    assert rate(train="all", lr=0.5) == 0.5


def test_the_longest_example_is_the_models_context_and_at_most_1024_tokens(files, tmp_path, monkeypatch):
    assert (loaded(files, tmp_path)[0].max_length, finetune.LONGEST) == (256, 1024)
    monkeypatch.setattr(finetune, "LONGEST", 100)
    assert loaded(files, tmp_path)[0].max_length == 100


def test_dropout_is_that_asked_for(files, tmp_path):
    _, model = loaded(files, tmp_path, dropout=0.1, lora_dropout=0.2)
    assert model.config.attention_dropout == 0.1
    assert {layer.dropout.p for layer in lora_layers(model).values()} == {0.2}


def test_a_padded_vocabulary_stays(files, tmp_path):
    folder = shutil.copytree(files[0], tmp_path / "model")
    model = load_model(folder)
    model.resize_token_embeddings(264, np.random.default_rng(0))
    model.save_pretrained(folder, overwrite=True)
    assert loaded((folder, files[1]), tmp_path / "run")[1].config.vocab_size == 264


def test_epochs_become_steps(files, tmp_path):
    task, _ = loaded(files, tmp_path, steps=None, epochs=2.3, warmup=None)
    assert (task.config.steps, task.config.epochs, task.config.warmup_steps) == (5, None, 0)
    assert loaded(files, tmp_path, steps=None, warmup=None)[0].config.steps == 2
    with pytest.raises(Error, match="--epochs and --steps"):
        options(*files, tmp_path, epochs=1)
    for steps in (dict(warmup=0), dict(steps=5, warmup=None)):
        with pytest.raises(Error, match=r"--initial-lr is 1e-05.* warm-up"):
            options(*files, tmp_path, initial_lr=1e-5, **steps)


# ------------------------------------------------------------- batches change no number


def losses(task, model, micro_batch=None):
    """The sum of the losses of an epoch and of its gradients, both divided by the number of targets."""
    batches = [task.batch_at(step) for step in range(task.steps_per_epoch)]
    count = sum(task.count(batch) for batch in batches)
    model.zero_grad()
    loss = sum(
        accumulate_gradients(model, batch, count, task.loss, micro_batch, NoLossScale(), 0, 0)
        for batch in batches
    )
    return loss, {name: p.grad.copy() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "changes",
    [
        dict(batch=1, micro_batch=None),
        dict(batch=7, micro_batch=1),
        dict(batch=3, micro_batch=None, seed=5),
        dict(batch=2, pack=True, max_length=120),
        dict(batch=7, micro_batch=1, pack=True, max_length=250),
    ],
)
def test_padding_packing_batch_size_and_order_change_no_number(files, tmp_path, changes):
    task, model = loaded(files, tmp_path, train="all", batch=7, micro_batch=None)
    expected, gradients = losses(task, model)
    other, _ = loaded(files, tmp_path, train="all", **changes)
    assert other.steps_per_epoch == -(-len(other.train_rows) // changes["batch"])
    assert other.rows == ("packed rows" if changes.get("pack") else "examples")  # what --batch counts
    found, others = losses(other, model, changes.get("micro_batch"))
    assert found == pytest.approx(expected, rel=1e-12)
    for name, gradient in gradients.items():
        assert np.abs(others[name] - gradient).max() <= 1e-12 * np.abs(gradient).max(), name


def test_the_evaluation_is_that_of_all_examples_whatever_the_batch(files, tmp_path):
    found = [
        task.evaluate(model, lambda: None, final=True)["val_loss"]
        for batch in (1, 2, 3)
        for task, model in [loaded(files, tmp_path, batch=batch, micro_batch=None)]
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-12)
    task, model = loaded(files, tmp_path)
    rows = [task.valid_rows[np.array([i])] for i in range(len(task.valid_rows))]
    assert evaluate(model, rows, task.loss, task.count) == pytest.approx(found[0], rel=1e-12)
    assert sorted(np.concatenate(task.spread(task.train_rows, 3))) == [0, 3, 6]  # evenly spread
    interrupt = raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        task.evaluate(model, interrupt, final=True)
    with pytest.raises(KeyboardInterrupt):
        task.sample(model, 0, interrupt, final=True)


def test_the_prompt_is_learned_on_request(files, tmp_path):
    (_, some), (_, every) = (
        loaded(files, tmp_path, train_on_prompt=flag)[0].train_rows[np.arange(7)] for flag in (False, True)
    )
    lengths = loaded(files, tmp_path)[0].train_rows.lengths
    assert (every != -100).sum() == lengths.sum() > 3 * (some != -100).sum()


# --------------------------------------------------------------------- templates and special tokens


def alpaca_rows(path):
    rows = [{"instruction": f"Say {n}", "input": "", "output": str(n)} for n in range(8)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_a_model_without_a_template_gets_alpaca_and_can_chat_afterwards(plain, tmp_path, capsys):
    data, out = alpaca_rows(tmp_path / "data.json"), tmp_path / "run"
    tune(options(plain, data, out, dtype="float32", questions=(), targets=("c_attn",)))
    said = " ".join(capsys.readouterr().out.split())
    assert "chat template: alpaca" in said and "A: (the question fills" not in said
    tokenizer = load_tokenizer(out)
    prompt = encode_chat(tokenizer, tokenizer.chat_template, turns("Hi"))
    assert tokenizer.decode(prompt).endswith("### Instruction:\nHi\n\n### Response:\n")


@pytest.mark.parametrize("train", ["lora", "head", "all"])
def test_special_tokens_extend_tokenizer_and_embeddings_together(files, tmp_path, capsys, train):
    out = tmp_path / "run"
    names = ("<|end|>", "<|call|>")
    template = tmp_path / "own.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "<|end|>"), encoding="utf-8")
    config = options(*files, out, train=train, special_tokens=names, template=str(template))
    model = tune(config)
    assert model.config.vocab_size == 260
    assert ("embed_tokens and lm_head whole" in " ".join(capsys.readouterr().out.split())) == (train != "all")
    tokenizer, saved = load_tokenizer(out), load_model(out, np.float64)
    assert tokenizer.special_tokens | {"<|end|>": 258, "<|call|>": 259} == tokenizer.special_tokens
    assert saved.config.vocab_size == 260
    ids = encode_chat(tokenizer, tokenizer.chat_template, turns("Hi"))
    assert 258 in ids
    assert np.array_equal(saved(np.array([ids])).data, model.eval()(np.array([ids])).data)
    old = load_model(files[0], np.float64)
    for name in ("embed_tokens", "lm_head"):
        before = getattr(old, name).weight.data
        assert not np.array_equal(getattr(saved, name).weight.data[:258], before), name
    tune(replace(begun(out), keep=3))  # finished: it loads


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(model="nowhere"), "--model: no folder 'nowhere'"),
        (dict(data="nowhere"), "there is no data 'nowhere'"),
        (dict(train="some"), "--train is some: it must be lora, all, head or last-blocks:N"),
        (dict(train="last-blocks:0"), "--train is last-blocks:0"),
        (dict(train="last-blocks:3"), "has 2 blocks"),
        (dict(rank=0), "--rank is 0"),
        (dict(alpha=0.0), "--alpha is 0.0"),
        (dict(lora_dropout=1.0), "--lora-dropout is 1.0"),
        (dict(targets=("nothing",)), "the target .* matches no layer of the model"),
        (dict(max_length=300), "--max-length is 300.* at most 256"),
        (dict(max_length=5), "no example has an answer within the first 5 tokens"),
        (dict(template="alpaca.txt"), "alpaca.txt cannot be read"),
        (dict(special_tokens=("<|im_end|>",)), "is already a token"),
        (dict(epochs=-1.0, steps=None), "--epochs is -1.0"),
        (dict(train="head", rank=4), "--rank is for --train lora, not head: omit it"),
        (dict(train="all", targets=("c_fc",), lora_dropout=0.1), "--lora-dropout and --targets are for"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(files, tmp_path, changes, said):
    given = dict(zip(("model", "data"), files)) | changes
    with pytest.raises(Error, match=said):
        tune(options(given.pop("model"), given.pop("data"), tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


def test_a_template_whose_tokens_are_missing_is_refused(plain, tmp_path):
    data = alpaca_rows(tmp_path / "data.json")
    with pytest.raises(Error, match=r"--special-tokens '<\|im_start\|>' '<\|im_end\|>'"):
        tune(options(plain, data, tmp_path / "run", template="chatml", dtype="float32"))
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    for name, changes in (("questions", {}), ("template", dict(questions=(), template="alpaca"))):
        with pytest.raises(Error, match=f"--{name} is for conversations"):
            tune(options(plain, texts, tmp_path / "run", **changes))


def test_long_answers_are_cut_with_a_count(files, tmp_path):
    task, _ = loaded(files, tmp_path, max_length=45)
    (note,) = [note for note in task.notes if "training" in note]
    assert "training examples are longer than 45 tokens (--max-length) and are cut" in note
    assert task.train_rows.lengths.max() == 45 and len(task.train_rows) < 7

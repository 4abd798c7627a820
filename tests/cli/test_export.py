"""``tinyllm export``: GGUF files and Hugging Face folders from models, runs and adapters; wrong requests."""

import errno
import json

import numpy as np
import pytest
from support.chat_model import CHATML, put_lora
from support.tokenizers import nasty_strings

from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig, load_model, load_tokenizer
from tinyllm.cli import main
from tinyllm.errors import Error
from tinyllm.tokenizers import BPETokenizer, CharTokenizer, train_bpe
from tinyllm.tokenizers.export import save_for_transformers
from tinyllm.tools.export import export_folder, export_gguf
from tinyllm.weights import gguf_writer
from tinyllm.weights.adapters import save_adapter

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

TEXT = "the cat sat on the mat and the dog lay on the rug. " * 20


def printed(capsys, *args, code=0):
    assert main([*map(str, args)]) == code
    out, err = capsys.readouterr()
    return err if code else out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A chat model with an adapter, runs of both architectures, and runs that cannot be exported."""
    folder = tmp_path_factory.mktemp("models")
    bpe = BPETokenizer(train_bpe(TEXT, 280))
    sizes = dict(vocab_size=bpe.vocab_size)
    chat = bpe.with_special_tokens(["<|im_start|>", "<|im_end|>"])
    chat.eos_ids, chat.chat_template = (281,), CHATML
    narrow = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    Llama(LlamaConfig(282, **narrow, initializer_range=0.3), rng=0).save_pretrained(folder / "chat")
    save_for_transformers(chat, folder / "chat", 2048)
    save_adapter(put_lora(load_model(folder / "chat")), folder / "adapter", folder / "chat")
    small = sizes | dict(n_embd=32, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    wide = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    wide |= dict(max_position_embeddings=32, initializer_range=0.3)
    runs = {
        "gpt2": (GPT2(GPT2Config(**small), rng=0), bpe),
        "llama": (Llama(LlamaConfig(**sizes, **wide), rng=0), bpe),
        "bias": (GPT2(GPT2Config(**small, lm_head_bias=True), rng=0), bpe),
        "own": (GPT2(GPT2Config(**small, qkv_bias=False), rng=0), bpe),
        "char": (
            GPT2(GPT2Config(**small | {"vocab_size": 26}), rng=0),
            CharTokenizer("abcdefghijklmnopqrstuvwxyz"),
        ),
    }
    for name, (model, tokenizer) in runs.items():
        model.save_pretrained(folder / name / "step-000003")
        tokenizer.save(folder / name)
        (folder / name / "config.json").write_text('{"train": {}}', encoding="utf-8")
    runs["llama"][0].save_pretrained(folder / "bare")
    (folder / "file").write_text("mine")
    return folder


IDS = np.random.default_rng(0).integers(0, 280, (2, 32))


@pytest.mark.parametrize("name", ["gpt2", "llama", "own"])
def test_a_run_as_gguf_is_the_same_model_and_tokenizer(models, tmp_path, capsys, name):
    path = tmp_path / "new" / "folder" / "model.gguf"
    out = printed(capsys, "export", "--run", models / name, "--gguf", path)
    assert out == f"{path}: {load_model(models / name).num_parameters():,} parameters in f32\n"
    np.testing.assert_array_equal(load_model(path)(IDS).data, load_model(models / name)(IDS).data)
    tokenizer, again = load_tokenizer(models / name), load_tokenizer(path)
    assert again.encode("the cat<|endoftext|>", "allow") == tokenizer.encode("the cat<|endoftext|>", "allow")
    arguments = ["--prompt", "the cat", "--temperature", "0", "--max-new-tokens", "8"]
    ours, theirs = (
        printed(capsys, "generate", *model, *arguments)
        for model in (("--run", models / name), ("--model", path))
    )
    assert ours == theirs


def test_an_adapter_is_merged(models, tmp_path, capsys):
    model = ["--model", models / "chat", "--adapter", models / "adapter"]
    out = printed(capsys, "export", *model, "--gguf", tmp_path / "m.gguf")
    assert "with LoRA of 4 layers merged" in out
    printed(capsys, "export", "--model", models / "adapter", "--hf", tmp_path / "folder")
    adapted = load_model(models / "adapter")
    ids = IDS % adapted.config.vocab_size
    for place in ("m.gguf", "folder"):
        found = load_model(tmp_path / place)(ids).data
        np.testing.assert_allclose(found, adapted(ids).data, rtol=0, atol=1e-4)
        assert load_tokenizer(tmp_path / place).chat_template == load_tokenizer(models / "chat").chat_template


def test_rows_that_do_not_divide_are_counted(models, tmp_path, capsys):
    out = printed(
        capsys, "export", "--model", models / "chat", "--gguf", tmp_path / "m.gguf", "--type", "q8_0"
    )
    # Only down_proj of the two layers has rows of 32, the others have rows of 16.
    assert "in q8_0\n" in out and "14 of 21 tensors are float16: their rows do not divide by 32" in out


@pytest.mark.parametrize(("name", "type"), [("gpt2", "f32"), ("llama", "f32"), ("llama", "bf16")])
def test_transformers_loads_the_folder(models, tmp_path, capsys, name, type):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tmp_path / "deep" / "folder"
    printed(capsys, "export", "--run", models / name, "--hf", folder, "--type", type)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    ours = load_model(folder, np.float64)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(IDS)).logits.numpy()
    bound = 1e-12 if name == "gpt2" else 1e-5  # the class of Llama computes in float32 inside
    np.testing.assert_allclose(logits, ours(IDS).data, rtol=0, atol=bound)
    if type == "f32":
        np.testing.assert_array_equal(load_model(folder)(IDS).data, load_model(models / name)(IDS).data)
    config = json.loads((folder / "config.json").read_text())
    tokenizer, reference = load_tokenizer(models / name), transformers.AutoTokenizer.from_pretrained(folder)
    end = tokenizer.special_tokens["<|endoftext|>"]  # 50256, the default of their GPT-2, is no id here
    assert (config["model_type"], config["bos_token_id"], config["eos_token_id"]) == (name, None, end)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (None, end)
    for text in nasty_strings(200, seed=5):
        assert reference.encode(text) == tokenizer.encode(text, "allow")
    assert not list(folder.parent.glob(".*"))


WRONG = [
    ("--run {gpt2}", "either --gguf FILE or --hf DIR"),
    ("--run {gpt2} --gguf {gguf} --hf {new}", "either --gguf FILE or --hf DIR"),
    ("--gguf {gguf}", "--model NAME"),
    ("--run {gpt2} --hf {new} --type q8_0", "--type is q8_0"),
    ("--run {gpt2} --gguf {gguf} --type q4_0", "choose f32, f16, bf16, q8_0"),
    ("--run {gpt2} --gguf {file}", "exists: choose another --gguf"),
    ("--run {gpt2} --hf {chat}", "exists: choose another --hf"),
    ("--run {gpt2} --gguf {file}/x.gguf", "is not a folder"),
    ("--run {gpt2} --gguf {new}", "new must end in .gguf"),
    ("--run {char} --gguf {gguf}", "the tokenizer char"),
    ("--run {char} --hf {new}", "the tokenizer char"),
    ("--run {bias} --gguf {gguf}", "neither llama.cpp nor transformers has lm_head.bias"),
    ("--run {bias} --hf {new}", "no model with lm_head_bias=True: only tinyllm can run it"),
    ("--run {own} --hf {new}", "no model with qkv_bias=False: export a GGUF file instead"),
    ("--model {bare} --gguf {gguf}", "has no tokenizer"),
    ("--model {bare} --hf {new}", "has no tokenizer"),
    ("--model {nothing} --gguf {gguf}", "there is no model"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_wrong_requests(models, tmp_path, capsys, arguments, said):
    names = "gpt2 char bias own chat bare file nothing".split()
    places = {name: models / name for name in names} | {"new": tmp_path / "new", "gguf": tmp_path / "m.gguf"}
    message = printed(capsys, "export", *arguments.format(**places).split(), code=2)
    assert said in message and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert (models / "file").read_text() == "mine"


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(models, tmp_path, wrong, type):
    model, tokenizer = load_model(models / "llama"), load_tokenizer(models / "llama")
    model.layers[1].mlp.down_proj.weight.data[3, 5] = wrong
    with pytest.raises(Error, match=r"blk\.1\.ffn_down\.weight has a weight that is not finite"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", type)
    if type != "q8_0":
        with pytest.raises(Error, match=r"layers\.1\.mlp\.down_proj\.weight has a weight that is not finite"):
            export_folder(model, tokenizer, tmp_path / "folder", type)
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_file_without_a_tokenizer_says_so(models, tmp_path, capsys):
    from tinyllm.weights.gguf_writer import write_gguf

    model = load_model(models / "llama")
    tensors = {model.prefix * (name != "lm_head.weight") + name: a for name, a in model.state_dict().items()}
    write_gguf(tmp_path / "m.gguf", model.config.to_dict(), tensors)
    message = printed(capsys, "export", "--model", tmp_path / "m.gguf", "--hf", tmp_path / "new", code=2)
    assert "m.gguf has no key tokenizer.ggml.tokens" in message
    np.testing.assert_array_equal(load_model(tmp_path / "m.gguf")(IDS).data, model(IDS).data)


def test_a_classifier_is_refused(models, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    load_model(models / "gpt2").save_pretrained(tmp_path / "run" / "step-000001")
    (tmp_path / "run" / "config.json").write_text('{"train": {}, "task": "classify"}', encoding="utf-8")
    assert "is a classifier" in printed(
        capsys, "export", "--run", tmp_path / "run", "--gguf", tmp_path / "m.gguf", code=2
    )


@pytest.mark.parametrize("kind", ["--gguf", "--hf"])
def test_a_full_disk_is_reported_and_leaves_nothing(models, tmp_path, capsys, monkeypatch, kind):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_writer, "_encoded", full)
    monkeypatch.setattr("tinyllm.weights.safetensors._write_weights", full)
    message = printed(capsys, "export", "--run", models / "gpt2", kind, tmp_path / "new.gguf", code=1)
    assert (
        f"{tmp_path / 'new.gguf'} cannot be written" in message
        and "No space left" in message
        and message.count("\n") == 1
    )
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(models, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_writer, "_encoded", interrupt)
    printed(capsys, "export", "--run", models / "gpt2", "--gguf", tmp_path / "m.gguf", code=130)
    assert list(tmp_path.iterdir()) == []

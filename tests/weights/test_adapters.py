"""LoRA adapters in PEFT's layout: round trips with ``peft``, runs of them, and folders that do not fit."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.adapters import CONFIGS, load_in_peft, randomize, with_lora, with_peft
from support.models import batch, random_gpt2, random_llama, random_model

from tinyllm import GPT2, Error, GPT2Config, load_model, nn, optim
from tinyllm.models import empty_model
from tinyllm.weights.adapter_config import find_adapter
from tinyllm.weights.adapters import load_adapter, save_adapter
from tinyllm.weights.safetensors import ADAPTER_CONFIG, ADAPTER_WEIGHTS

torch, bridge = pytest.importorskip("torch"), pytest.importorskip("parity.twins.bridge")

GPT, LLAMA = CONFIGS["gpt2"], CONFIGS["llama"]
TIED_LLAMA = replace(LLAMA, tie_word_embeddings=True)
PATTERNS = dict(
    target_modules=["c_attn", "c_proj"],
    rank_pattern={"h.1.attn.c_proj": 3},
    alpha_pattern={"attn.c_proj": 5, "c_attn": 2},
)
ADAPTERS = {  # of peft: the base model's config, and the options of LoraConfig
    "gpt2": (GPT, {}),
    "gpt2, patterns": (GPT, PATTERNS),
    "gpt2, patterns, rank-stabilized": (GPT, PATTERNS | dict(use_rslora=True)),
    "gpt2, one block": (GPT, dict(target_modules=["c_attn", "c_fc"], layers_to_transform=[1])),
    "gpt2, excluded": (GPT, dict(target_modules=["c_attn", "c_proj"], exclude_modules=["attn.c_proj"])),
    "gpt2, expression": (GPT, dict(target_modules=r".*h\.1\.(attn\.c_attn|mlp\.c_fc)")),
    "gpt2, norm and embedding": (GPT, dict(modules_to_save=["ln_f", "wte"])),
    "gpt2, a block whole": (GPT, dict(modules_to_save=["h.1"])),
    "gpt2, head whole": (GPT, dict(modules_to_save=["lm_head"])),
    "gpt2, tied matrix in two": (GPT, dict(modules_to_save=["wte", "lm_head"])),
    "gpt2, tied matrix": (GPT, dict(modules_to_save=["wte", "lm_head"], ensure_weight_tying=True)),
    "gpt2, head": (GPT, dict(target_modules=["c_attn", "lm_head"], modules_to_save=["wte"])),
    "llama": (LLAMA, {}),
    "llama, all linear": (LLAMA, dict(target_modules="all-linear", r=2, lora_alpha=7)),
    "llama, one block and the head": (
        LLAMA,
        dict(target_modules=["q_proj", "lm_head", "model.layers.1.mlp.up_proj"], layers_to_transform=0),
    ),
    "llama, norms": (LLAMA, dict(modules_to_save=["norm"], use_rslora=True)),
    "llama, tied head": (TIED_LLAMA, dict(target_modules=["q_proj", "lm_head"])),
}


def logits(model, ids):
    if isinstance(model, nn.Module):
        return model(ids).data
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def assert_equal(ours, theirs):
    # The Llama of transformers computes norm and RoPE in float32.
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


# --------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("whole", [[], ["norm", "input_layernorm"]])
def test_an_adapter_of_a_layer_in_two_places_loads_again(tmp_path, whole):
    def shared():
        model = random_model(LLAMA)
        model.layers[1] = model.layers[0]
        model.layers[0].mlp.up_proj = model.layers[0].mlp.gate_proj
        return model

    model, again = shared(), shared()
    nn.add_lora(model, targets="all-linear", modules_to_save=whole, rng=1)
    randomize(model)
    save_adapter(model, tmp_path / "adapter", None)
    load_adapter(again, tmp_path / "adapter")
    assert {*nn.lora_layers(again)} == {*nn.lora_layers(model)}
    ids = batch(LLAMA, (2, 8))[0]
    assert np.array_equal(again(ids).data, model(ids).data)


ALONE = "gpt2, tied matrix"


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_peft_loads_here_and_back(kind, tmp_path):
    if kind == ALONE and "TINYLLM_TEST_ALONE" not in os.environ:
        # In a process of its own: what peft ties has depended on tests that ran before in the same process.
        test = f"{__file__}::{test_an_adapter_of_peft_loads_here_and_back.__name__}[{kind}]"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
        found = subprocess.run(command, env=os.environ | {"TINYLLM_TEST_ALONE": "1"}, capture_output=True)
        assert found.returncode == 0 and b"1 passed" in found.stdout, found.stdout.decode()
        return
    config, options = ADAPTERS[kind]
    theirs, ids = with_peft(config, **options), batch(config, (2, 8))[0]
    theirs.save_pretrained(tmp_path / "theirs")
    model = random_model(config)
    plain = logits(model, ids)
    load_adapter(model, tmp_path / "theirs")
    expected = logits(theirs, ids)
    assert np.abs(expected - plain).max() > 0.01
    assert_equal(logits(model, ids), expected)
    save_adapter(model, tmp_path / "ours", None)
    again = logits(load_in_peft(config, tmp_path / "ours"), ids)
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    nn.merge_lora(model)
    assert_equal(logits(model, ids), expected)
    if kind != "llama, tied head":  # peft would add B A to the embedding, too
        assert_equal(logits(model, ids), logits(theirs.merge_and_unload(), ids))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (GPT, {}),
        (GPT, dict(rank=3, alpha=5, targets="all-linear", use_rslora=True, dropout=0.25)),
        (GPT, dict(targets=r"h\.1\..*c_(fc|attn)", rank_pattern={"c_fc": 2}, alpha_pattern={"c_attn": 3})),
        (GPT, dict(modules_to_save=["wte", "ln_f"])),
        (LLAMA, dict(targets=["q_proj", "down_proj"], modules_to_save=["lm_head", "norm"])),
        (TIED_LLAMA, dict(modules_to_save=["embed_tokens"])),
    ],
    ids=["gpt2", "all linear", "patterns", "whole layers", "llama", "tied llama"],
)
def test_an_adapter_made_here_loads_in_peft_and_here(config, options, tmp_path):
    model, ids = with_lora(config, **options), batch(config, (2, 8))[0]
    save_adapter(model, tmp_path, "the/base")
    assert_equal(logits(model, ids), logits(load_in_peft(config, tmp_path), ids))
    again = random_model(config)
    load_adapter(again, tmp_path)
    assert np.array_equal(logits(again, ids), logits(model, ids))
    assert again._is_tied() is model._is_tied()
    dropouts = {layer.dropout.p for layer in nn.lora_layers(again).values()}
    assert repr(again) == repr(model) and dropouts == {options.get("dropout", 0.0)}
    written = json.loads((tmp_path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    assert written["fan_in_fan_out"] is isinstance(config, GPT2Config)
    assert written["base_model_name_or_path"] == "the/base" and written["task_type"] == "CAUSAL_LM"
    assert {*load_file(tmp_path / ADAPTER_WEIGHTS)} == {
        f"base_model.model.{'' if name.startswith('lm_head') else model.prefix}{name}.{inner}"
        for name, module in nn.adapter_modules(model).items()
        for inner in module.state_dict()
    }


def test_the_config_is_as_short_as_pefts(tmp_path):
    save_adapter(with_lora(GPT, rank=4, alpha=8, targets=["c_fc", "c_attn"]), tmp_path, None)
    written = json.loads((tmp_path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    assert written["target_modules"] == ["c_attn", "c_fc"]
    assert (written["rank_pattern"], written["alpha_pattern"], written["modules_to_save"]) == ({}, {}, None)


def test_a_classifier_and_its_score(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    published = bridge.to_transformers(random_gpt2(GPT))

    def classifier():
        config = transformers.GPT2Config(**vars(published.config) | dict(num_labels=3, pad_token_id=0))
        model = transformers.GPT2ForSequenceClassification(config).double().eval()
        model.transformer.load_state_dict(published.transformer.state_dict())
        return model

    model, ids = nn.Module(), torch.tensor([[1, 2, 3, 4]])
    model.score = nn.Linear(GPT.n_embd, 3, bias=False, rng=0).astype(np.float64)
    model.transformer = random_gpt2(GPT)
    model.transformer.lm_head = model.score
    options = dict(task_type="SEQ_CLS", fan_in_fan_out=True)
    theirs = peft.get_peft_model(classifier(), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.requires_grad)
        expected = theirs(ids).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    found = model.transformer(ids.numpy(), last_only=True).data[:, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    save_adapter(model, tmp_path / "ours", None, task_type="SEQ_CLS")
    again = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours").eval()
    assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_dtypes_follow_the_model(tmp_path):
    save_adapter(with_lora(GPT), tmp_path, None)
    model = random_gpt2(GPT, dtype=np.float32)
    load_adapter(model, tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {np.dtype(np.float32)}


def test_a_weight_too_large_for_the_models_dtype_is_refused(tmp_path):
    large = with_lora(GPT)
    next(iter(nn.lora_layers(large).values())).lora_B.weight.data[0, 0] = 1e5
    save_adapter(large, tmp_path, None)
    with pytest.raises(Error, match=r"lora_B.weight has a weight of 1e\+05, too large for float16"):
        load_adapter(random_gpt2(GPT, dtype=np.float32).astype(np.float16), tmp_path)


# ------------------------------------------------------------------------- training goes on


def test_only_the_adapter_is_saved_and_training_continues_from_it_bit_for_bit(tmp_path):
    def start():
        model = random_gpt2(GPT).train()
        nn.add_lora(model, 2, dropout=0.2, modules_to_save=["ln_f"], rng=0)
        return model, optim.AdamW(model, 1e-2)

    def steps(model, optimizer):
        for _ in range(3):
            model.loss(*batch(GPT, (2, 8))).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = start()
    steps(model, optimizer)
    save_adapter(model, tmp_path, "base")
    state = {key: dict(value) for key, value in optimizer.state_dict().items()}
    stored = {key.rpartition(".h.")[2] for key in load_file(tmp_path / ADAPTER_WEIGHTS)}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(stored) == len(trained) == 2 * 2 + 2 and {*state["t"]} == trained
    copies = {key: {n: np.copy(array) for n, array in state[key].items()} for key in "mv"}

    resumed, optimizer_again = start()
    load_adapter(resumed, tmp_path)
    optimizer_again.load_state_dict({"t": state["t"], **copies})
    assert resumed.h[0].attn.c_attn.dropout.p == 0.2
    model.eval()
    resumed.eval()
    steps(model, optimizer)
    steps(resumed, optimizer_again)
    for (name, ours), theirs in zip(resumed.named_parameters(), model.parameters()):
        assert np.array_equal(ours.data, theirs.data), name


def test_a_parameter_that_would_be_lost_is_refused(tmp_path):
    model = with_lora(GPT)
    model.h[1].ln_1.requires_grad_()
    with pytest.raises(Error, match=r"h\.1\.ln_1\.weight is trained"):
        save_adapter(model, tmp_path, None)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(Error, match="no LoRA"):
        save_adapter(random_gpt2(GPT), tmp_path, None)


def test_an_existing_model_is_not_replaced(tmp_path):
    model = with_lora(GPT)
    save_adapter(model, tmp_path / "adapter", None)
    random_gpt2(GPT).save_pretrained(tmp_path / "model")
    for name in ("adapter", "model"):
        with pytest.raises(Error, match="already contains"):
            save_adapter(model, tmp_path / name, None)
    save_adapter(randomize(model, 5), tmp_path / "adapter", None, overwrite=True)
    again = random_gpt2(GPT)
    load_adapter(again, tmp_path / "adapter")
    ids = batch(GPT, (1, 4))[0]
    assert np.array_equal(logits(again, ids), logits(model, ids))


def test_a_full_disk_leaves_no_config_with_other_weights(tmp_path, monkeypatch):
    model = with_lora(GPT)
    save_adapter(model, tmp_path, None)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinyllm.weights.adapters.write_safetensors", full)
    with pytest.raises(Error, match="No space left"):
        save_adapter(model, tmp_path, None, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [ADAPTER_WEIGHTS]


# --------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["tied", "untied"])
def test_an_extended_vocabulary_is_extended_again(config, tmp_path):
    model = random_model(config)
    model.resize_token_embeddings(config.vocab_size + 3, rng=0)
    nn.add_lora(model, modules_to_save=[model.token_embedding, "lm_head"], rng=0)
    randomize(model)
    save_adapter(model, tmp_path, None)
    again = random_model(config)
    load_adapter(again, tmp_path)
    assert again.config.vocab_size == config.vocab_size + 3
    ids = np.arange(config.vocab_size - 4, config.vocab_size + 3)[None]
    assert np.array_equal(logits(again, ids), logits(model, ids))


def test_an_extended_embedding_without_its_head_is_refused(tmp_path):
    model = random_llama(LLAMA)
    model.resize_token_embeddings(LLAMA.vocab_size + 3, rng=0)
    nn.add_lora(model, modules_to_save=["embed_tokens"], rng=0)
    save_adapter(model, tmp_path, None)
    with pytest.raises(Error, match=r"embed_tokens\.weight is \(16, 12\), not \(13, 12\)"):
        load_adapter(random_llama(LLAMA), tmp_path)


# ------------------------------------------------------------------------- models by name


@pytest.fixture
def adapter(tmp_path):
    """A base model, an adapter that names it, and the model with the adapter."""
    random_gpt2(GPT, dtype=np.float32).save_pretrained(tmp_path / "base")
    model = with_lora(GPT).astype(np.float32)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    return tmp_path / "adapter", model


def edit(folder, **changes):
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("name", [None, "../base"])
def test_load_model_loads_the_base_and_the_adapter(adapter, name):
    folder, model = adapter
    if name is not None:
        edit(folder, base_model_name_or_path=name)  # relative to the folder
    loaded, ids = load_model(folder), batch(GPT, (2, 8))[0]
    assert isinstance(loaded, GPT2) and not loaded.training and loaded._is_tied()
    assert np.array_equal(logits(loaded, ids), logits(model, ids))
    assert load_model(folder, np.float64).h[0].attn.c_attn.lora_A.weight.dtype == np.float64
    assert empty_model(folder).config == model.config


def test_the_newest_checkpoint_of_a_run_may_be_an_adapter(adapter, tmp_path):
    _, model = adapter
    run, ids = tmp_path / "run", batch(GPT, (2, 8))[0]
    for step in (3, 20):
        save_adapter(randomize(model, step), run / f"step-{step:06}", tmp_path / "base")
    assert np.array_equal(logits(load_model(run), ids), logits(model, ids))
    assert find_adapter(run) == run / "step-000020"


def test_a_whole_model_takes_precedence_over_an_adapter(adapter):
    folder, _ = adapter
    random_gpt2(GPT).save_pretrained(folder)
    assert not nn.lora_layers(load_model(folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(base_model_name_or_path=None), "names no base model"),
        (dict(base_model_name_or_path="../nothing"), "the base model of the adapter"),
        (dict(base_model_name_or_path="."), "is an adapter"),
        (dict(task_type="SEQ_CLS"), "SEQ_CLS"),
    ],
)
def test_a_base_that_cannot_be_loaded_is_one_sentence(adapter, changes, said):
    folder, _ = adapter
    edit(folder, **changes)
    with pytest.raises(Error, match=said):
        load_model(folder)


def test_an_adapter_is_not_taken_for_a_whole_model(adapter, tmp_path):
    folder, _ = adapter
    with pytest.raises(Error, match="tinyllm merge"):
        GPT2.from_pretrained(folder)
    with pytest.raises(Error, match=re.escape(f"no {ADAPTER_CONFIG}")):
        find_adapter(tmp_path / "base")


# ------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(use_dora=True), "use_dora"),
        (dict(bias="all"), "bias 'all'"),
        (dict(bias="lora_only"), "bias 'lora_only'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
        (dict(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
        (dict(peft_type="IA3"), "peft_type 'IA3'"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(target_parameters=["w"]), "target_parameters"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(layers_pattern="h"), "layers_pattern"),
        (dict(invented=3), "invented"),
        (dict(r="8"), "r cannot be '8'"),
        (dict(r=0), "has rank 8 for h.0.attn.c_attn, but 0 in its config"),
        (dict(lora_alpha=None), "lora_alpha cannot be None"),
        (dict(lora_dropout=7), "between 0 and 1"),
        (dict(target_modules=None), "target_modules cannot be None"),
        (dict(target_modules=["q_proj"]), "q_proj"),
        (dict(target_modules=["c_attn", "c_fc"]), "it has no h.0.mlp.c_fc.lora_A.weight, and 3 more"),
        (dict(target_modules=["c_attn", "ln_1"]), "ln_1 (LayerNorm)"),
        (dict(target_modules="h.("), "not a regular expression"),
        (dict(r=4), "has rank 8 for h.0.attn.c_attn, but 4 in its config"),
        (dict(rank_pattern={"h.1.attn.c_attn": 5}), "has rank 8 for h.1.attn.c_attn, but 5"),
        (dict(modules_to_save=["ln_f"]), "it has no ln_f.weight"),
    ],
)
def test_configs_that_are_not_supported_or_do_not_fit(adapter, changes, said):
    folder, _ = adapter
    edit(folder, **changes)
    model = random_gpt2(GPT)
    before = repr(model)
    with pytest.raises(Error, match=re.escape(said)) as caught:
        load_adapter(model, folder)
    assert repr(model) == before and "\n" not in str(caught.value)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(GPT, n_embd=24), "lora_A.weight is (8, 12), not (8, 24), and 3 more"),
        (replace(GPT, n_layer=3), "it has no h.2.attn.c_attn.lora_A.weight"),
        (replace(GPT, n_layer=1), "the model has no h.1.attn.c_attn.lora_A.weight"),
        (LLAMA, "no layer is named ['c_attn']"),
    ],
    ids=["wider", "deeper", "shallower", "another architecture"],
)
def test_an_adapter_of_another_base_model_names_its_own(adapter, config, said):
    folder, _ = adapter
    with pytest.raises(Error, match=re.escape(said)) as caught:
        load_adapter(random_model(config), folder)
    assert str(folder.parent / "base") in str(caught.value)


@pytest.mark.parametrize(
    "other", [dict(rank=4), dict(alpha=3), dict(use_rslora=True), dict(targets=["c_fc"])]
)
def test_the_lora_layers_of_a_model_must_be_the_adapters(adapter, other):
    folder, _ = adapter
    with pytest.raises(Error, match=r"LoRA layers|does not fit"):
        load_adapter(with_lora(GPT, **other), folder)


def rewrite(folder, change):
    path = folder / ADAPTER_WEIGHTS
    save_file(change(load_file(path)), path)


WTE = np.zeros((13, 12), np.float32)


def without_the_first(arrays):
    arrays.pop(sorted(arrays)[0])
    return arrays


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_the_first, "it has no h.0.attn.c_attn.lora_A.weight"),
        (lambda arrays: arrays | {"extra": np.zeros(2, np.float32)}, "the model has no extra"),
        (lambda arrays: arrays | {"lm_head.base_layer.weight": WTE}, "no lm_head.base_layer.weight"),
        (lambda arrays: arrays | {"h.0.attn.c_attn.weight": WTE}, "no h.0.attn.c_attn.weight"),
        (lambda arrays: arrays | {"wpe.weight": np.zeros((9, 12), np.float32)}, "wpe.weight is (9, 12)"),
        (
            lambda arrays: arrays | {key.removeprefix("base_model.model."): arrays[key] for key in arrays},
            "two arrays",
        ),
    ],
)
def test_weights_that_do_not_fit(adapter, change, said):
    folder, _ = adapter
    rewrite(folder, change)
    with pytest.raises(Error, match=re.escape(said)):
        load_adapter(random_gpt2(GPT), folder)


def test_damaged_and_missing_files(adapter):
    folder, _ = adapter
    (folder / ADAPTER_WEIGHTS).write_bytes(b"1234")
    with pytest.raises(Error, match="not a complete safetensors file"):
        load_adapter(random_gpt2(GPT), folder)
    (folder / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(Error, match="pickle"):
        load_adapter(random_gpt2(GPT), folder)
    (folder / ADAPTER_CONFIG).write_text("[]", encoding="utf-8")
    with pytest.raises(Error, match="not an object"):
        load_adapter(random_gpt2(GPT), folder)

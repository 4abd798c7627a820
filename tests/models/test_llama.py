"""Llama against transformers and the twin, folders exchanged in both directions, and its properties."""

import json
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm import Error, Llama, LlamaConfig, load_model, manual_seed, no_grad

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.models import (  # noqa: E402
    EVERYTHING,
    ROPES,
    SMALL_LLAMA,
    assert_close,
    batch,
    llama_configs,
    random_llama,
    rewrite,
)
from support.references import check_against_both  # noqa: E402

from parity.__main__ import main  # noqa: E402
from parity.twins import bridge  # noqa: E402

# ------------------------------------------------------------ against the twin and transformers


@settings(max_examples=25)
@example(config=EVERYTHING, rows=2, seed=0, num_targets=None)
@example(
    config=replace(EVERYTHING, num_key_value_heads=1, tie_word_embeddings=True), rows=1, seed=1, num_targets=7
)
@given(config=llama_configs(), rows=st.integers(1, 3), seed=st.integers(0, 2**32 - 1),
       num_targets=st.none() | st.integers(1, 50))  # fmt: skip
def test_logits_loss_and_gradients_equal_transformers_and_the_twin(config, rows, seed, num_targets):
    model = random_llama(config, seed)
    ids, targets = batch(config, (rows, 1 + seed % config.context), seed)
    check_against_both(model, ids, targets, num_targets)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [True, False])
def test_unmodified_transformers_differs_by_its_float32_rounding(rope, tied):
    config = LlamaConfig(
        **SMALL_LLAMA, rope_parameters=ROPES[rope], tie_word_embeddings=tied, rms_norm_eps=1e-3
    )
    model = random_llama(config)
    theirs = as_it_stands(model)
    ids, _ = batch(config, (3, 8))
    assert_close(model(ids).data, theirs(torch.from_numpy(ids)).logits, "logits", 1e-6)
    with pytest.raises(AssertionError):  # otherwise the test above would not need its changes
        assert_close(model(ids).data, theirs(torch.from_numpy(ids)).logits, "logits", 1e-10)


def as_it_stands(model):
    """``transformers.LlamaForCausalLM`` with eager attention, unmodified."""
    patched = bridge.to_transformers(model)
    config = transformers.LlamaConfig.from_dict(patched.config.to_dict())
    config._attn_implementation = "eager"
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    theirs.load_state_dict(patched.state_dict(), strict=True)
    return theirs


@pytest.mark.proof("Llama")
def test_several_query_blocks_and_row_chunks_equal_transformers():
    """300 positions are several query blocks in attention; 900 rows are two chunks in the loss."""
    config = replace(EVERYTHING, max_position_embeddings=300, vocab_size=70)
    model = random_llama(config)
    theirs = bridge.to_transformers(model)
    ids, targets = batch(config, (3, 300))
    logits = theirs(torch.from_numpy(ids)).logits
    assert_close(model(ids).data, logits, "logits")
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten()).backward()
    model.loss(ids, targets).backward()
    reference = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, reference[name], name)


# --------------------------------------------------------------------------------- RoPE


def test_attention_depends_on_distances_only():
    """Attention over positions 5 … 12 equals attention over positions 0 … 7."""
    model = random_llama(EVERYTHING)
    attention = model.layers[0].self_attn
    x = model.embed_tokens(np.arange(8)[None])

    def angles(positions):
        return model.rope(positions, like=x.data)

    here, there = (attention(x, angles(np.arange(8) + start)) for start in (0, 5))
    assert_close(here.data, there.data, "attention further on", 1e-13)
    other = attention(x, angles(2 * np.arange(8)))
    assert np.abs(here.data - other.data).max() > 1e-3


# ----------------------------------------------------------------------------- sizes and start

COUNTS = {
    "toy": 1_820_352, "Llama-2-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-8B": 8_030_261_248, "Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824,
}  # fmt: skip


@pytest.mark.parametrize("size", LlamaConfig.sizes)
def test_parameter_counts_are_as_published(size):
    tracemalloc.start()
    try:
        model = Llama(LlamaConfig.preset(size), rng=None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert model.num_parameters() == COUNTS[size]
    assert peak < 2_000_000  # norms only


def test_preset_applies_changes_and_refuses_unknown_sizes():
    config = LlamaConfig.preset("Llama-3.2-1B", max_position_embeddings=256)
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (16, 2048, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 8)
    assert config.max_position_embeddings == 256 and config.tie_word_embeddings
    with pytest.raises(Error, match=r"'Llama-3\.2-2B'.* toy, .*Llama-3\.2-3B"):
        LlamaConfig.preset("Llama-3.2-2B")


@pytest.mark.parametrize("initializer_range", [0.02, 0.05])
@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_have_the_documented_std(initializer_range, tied):
    config = LlamaConfig(
        vocab_size=2000, hidden_size=96, intermediate_size=200, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True,
        initializer_range=initializer_range,
    )  # fmt: skip
    model = Llama(config, rng=np.random.default_rng(0))
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    for name, parameter in model.named_parameters():
        data = parameter.data.astype(np.float64)
        if name.endswith("bias"):
            assert not data.any(), name
        elif "norm" in name:
            assert (data == 1).all(), name
        else:
            assert abs(data.std() - initializer_range) < 5 * initializer_range / math.sqrt(2 * data.size), (
                name
            )
            assert abs(data.mean()) < 5 * initializer_range / math.sqrt(data.size), name


def test_untrained_model_has_a_loss_near_log_vocab_size():
    model = Llama(LlamaConfig.preset("toy"), rng=np.random.default_rng(0)).eval()
    ids, targets = np.random.default_rng(1).integers(0, 1024, (2, 4, 64))
    assert model.loss(ids, targets).item() == pytest.approx(math.log(1024), abs=0.1)


# ------------------------------------------------------------------------------------ behaviour


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_do_not_depend_on_later_tokens(dtype):
    config = replace(EVERYTHING, max_position_embeddings=140)  # more than one block of queries
    model = random_llama(config, dtype=dtype)
    ids, _ = batch(config, (2, 140))
    with no_grad():
        before = model(ids).data
        for t in (0, 1, 41, 42, 70, 139):
            changed = ids.copy()
            changed[0, t] = (ids[0, t] + 1) % 13
            after = model(changed).data
            assert np.array_equal(after[0, :t], before[0, :t])
            assert not np.array_equal(after[0, t], before[0, t])
            assert np.array_equal(after[1], before[1])  # nor any logit of another row


def test_prefixes_and_rows_have_the_logits_of_the_full_batch():
    model = random_llama(EVERYTHING)
    ids, _ = batch(EVERYTHING, (5, 8))
    whole = model(ids).data
    for time in range(1, 8):
        assert_close(model(ids[:, :time]).data, whole[:, :time], f"{time} positions", 1e-13)
    for i in range(5):
        assert_close(model(ids[i : i + 1]).data, whole[i : i + 1], f"row {i} alone", 1e-13)


def test_last_only_returns_the_last_logits():
    model = random_llama(EVERYTHING)
    ids, _ = batch(EVERYTHING, (2, 8))
    assert_close(model(ids, last_only=True).data, model(ids).data[:, -1:], "the last position", 1e-13)
    assert model.context == 8


def test_float32_is_preserved():
    model = random_llama(EVERYTHING, dtype=np.float32).train()
    ids, targets = batch(EVERYTHING, (2, 8))
    assert model(ids).dtype == np.float32
    for num_targets in (None, (targets != -100).sum(), np.float64(3), 3):
        loss = model.loss(ids, targets, num_targets=num_targets)
        assert loss.dtype == np.float32
        loss.backward()
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == np.float32, name
    exact = random_llama(EVERYTHING)
    assert_close(model.eval()(ids).data.astype(np.float64), exact(ids).data, "float32 against float64", 1e-5)


def test_attention_dropout_is_reproducible_and_disabled_in_eval():
    model = random_llama(replace(EVERYTHING, attention_dropout=0.3)).train()
    ids, targets = batch(EVERYTHING, (2, 8))

    def loss(seed):
        manual_seed(seed)
        return model.loss(ids, targets).item()

    assert loss(5) == loss(5) != loss(6)
    plain = random_llama(EVERYTHING).loss(ids, targets).item()
    assert loss(5) != plain
    model.eval()
    assert loss(5) == loss(6) == plain


# ------------------------------------------------------------ folders: loading those of transformers


def their_model(seed=0, **changes):
    """A float32 ``transformers`` model with every parameter perturbed."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SMALL_LLAMA | changes, bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "sdpa"
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def assert_same_logits(ours, theirs):
    ids, _ = batch(EVERYTHING, (2, 8))
    theirs = bridge.twin_of(ours).exact(theirs.double())
    with no_grad():
        logits = theirs(torch.from_numpy(ids)).logits
        assert_close(ours.astype(np.float64)(ids).data, logits, "logits")


@pytest.mark.parametrize("load", [Llama.from_pretrained, load_model])
@pytest.mark.parametrize("tied", [True, False])
def test_folder_of_transformers_loads(tmp_path, load, tied):
    theirs = their_model(
        tie_word_embeddings=tied, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3,
        rope_parameters=dict(ROPES["llama3"]),
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert isinstance(ours, Llama) and not ours.training
    assert {p.dtype for p in ours.parameters()} == {np.dtype(np.float32)}
    assert ours.config == replace(EVERYTHING, tie_word_embeddings=tied, rms_norm_eps=1e-3)
    assert_same_logits(ours, theirs)


def old_spelling(config, type_key):
    """A config.json as transformers 4 wrote it."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {**rope, **dict.fromkeys(type_key, kind)}
    config["torch_dtype"] = config.pop("dtype")
    return config


@pytest.mark.parametrize("type_key", [["type"], ["rope_type"], ["type", "rope_type"]], ids=" and ".join)
@pytest.mark.parametrize("rope", ROPES)
def test_older_config_format_equals_the_current_one(tmp_path, rope, type_key):
    theirs = their_model(rope_parameters=dict(ROPES[rope]))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(old_spelling(json.loads(file.read_text()), type_key)))
    assert "rope_scaling" in json.loads(file.read_text())
    ours = Llama.from_pretrained(tmp_path)
    assert ours.config.rope_parameters == ROPES[rope]
    assert_same_logits(ours, theirs)
    assert_same_logits(ours, transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval())


def without_prefix(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_frequencies(tensors):
    return tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}


def with_the_head_again(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize("change", [without_prefix, with_frequencies, with_the_head_again])
def test_every_published_checkpoint_layout_loads(tmp_path, change):
    theirs = their_model(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    assert_same_logits(Llama.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_checkpoints_load(tmp_path, kind):
    theirs = their_model().to(kind)
    theirs.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path, dtype=np.float64)
    assert {p.dtype for p in ours.parameters()} == {np.dtype(np.float64)}
    assert_same_logits(ours, theirs)  # the same half-precision weights, computed in float64
    assert {p.dtype for p in Llama.from_pretrained(tmp_path).parameters()} == {np.dtype(np.float32)}


def test_sharded_checkpoints_load(tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert_same_logits(load_model(tmp_path), theirs)


def test_invalid_tensors_in_a_folder_are_refused(tmp_path):
    their_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    key = "model.layers.1.self_attn.k_proj.weight"
    file = tmp_path / "model.safetensors"
    good = file.read_bytes()
    for change, message in [
        (lambda t: {n: x for n, x in t.items() if n != key}, r"Missing \(1\): layers.1.self_attn.k_proj"),
        (lambda t: t | {key: t[key].T}, r"k_proj.weight is \(12, 8\), not \(8, 12\)"),
        (lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}, "lm_head.weight differs"),
        (
            lambda t: t | {"norm.weight": t["model.norm.weight"] + 1},
            "are the same parameter: keep one of them",
        ),
    ]:
        file.write_bytes(good)
        rewrite(tmp_path, change)
        with pytest.raises(Error, match=message):
            Llama.from_pretrained(tmp_path)


# ------------------------------------------------------------- folders: loading ours in transformers


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)])
def test_saved_folder_loads_here_and_in_transformers(tmp_path, rope, changes):
    ours = random_llama(
        LlamaConfig(**SMALL_LLAMA | changes, rope_parameters=ROPES[rope], rms_norm_eps=1e-3), dtype=np.float32
    )
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32 and theirs.config.rope_parameters == ROPES[rope]
    again = load_model(tmp_path)
    assert again.config == ours.config
    for (name, p), (other_name, q) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name and np.array_equal(p.data, q.data), name
    assert (again.lm_head.weight is again.embed_tokens.weight) == ours.config.tie_word_embeddings
    assert_same_logits(ours, theirs.eval())
    with pytest.raises(Error, match="already contains a model"):
        again.save_pretrained(tmp_path)
    again.save_pretrained(tmp_path, overwrite=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_report_compares_a_folder_and_a_random_llama(tmp_path, capsys, dtype):
    random_llama(EVERYTHING, dtype=np.float32).save_pretrained(tmp_path / "model")
    names = {name for name, _ in random_llama(EVERYTHING).named_modules() if name}
    for what in ([str(tmp_path / "model"), "--tokens", "8"], ["--random", "--arch", "llama"]):
        code = main(["report", *what, "--dtype", dtype, "--out", str(tmp_path / "page.html")])
        out = capsys.readouterr().out
        assert code == 0 and "comparisons are within their bounds" in out
        assert "its own norm, angles and eager softmax are float32" in out.replace("\n", " ")
        assert all(f"\n{name} " in out for name in names)
        assert "num_key_value_heads 2" in out


# --------------------------------------------------------------------------------------- configs

# Contents of config.json of models on the hub, in the formats of their time.
HUB_LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
HUB_LLAMA_3_1 = HUB_LLAMA_2 | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "intermediate_size": 14336, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
HUB_SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "use_cache": True,
    "vocab_size": 49152,
}  # fmt: skip


def test_published_configs_can_be_read():
    assert LlamaConfig.from_dict(HUB_LLAMA_2) == LlamaConfig.preset("Llama-2-7B")
    assert LlamaConfig.from_dict(HUB_LLAMA_3_1) == LlamaConfig.preset("Llama-3.1-8B")
    smollm2 = LlamaConfig.from_dict(HUB_SMOLLM2)
    assert Llama(smollm2, rng=None).num_parameters() == 134_515_008
    assert smollm2.head_dim == 64 and smollm2.rope_parameters["rope_theta"] == 100000


def test_configs_of_transformers_can_be_read(tmp_path):
    changes = SMALL_LLAMA | dict(
        rms_norm_eps=1e-3, initializer_range=0.01, attention_dropout=0.2, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=True, rope_parameters=ROPES["linear"],
    )  # fmt: skip
    theirs = transformers.LlamaConfig(**changes)
    assert LlamaConfig.from_dict(theirs.to_dict()) == LlamaConfig(**changes)
    theirs.save_pretrained(tmp_path)
    assert LlamaConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == LlamaConfig(**changes)
    assert LlamaConfig.from_dict(transformers.LlamaConfig().to_dict()) == LlamaConfig()


@settings(max_examples=20)
@given(config=llama_configs())
def test_saved_config_can_be_read_by_transformers(config):
    theirs = transformers.LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert theirs.architectures == ["LlamaForCausalLM"] and theirs.model_type == "llama"
    for name, value in vars(config).items():
        assert getattr(theirs, name) == value, name
    assert LlamaConfig.from_dict(config.to_dict()) == config == LlamaConfig.from_dict(theirs.to_dict())


@pytest.mark.parametrize("rope", ROPES)
def test_saved_config_has_the_keys_of_transformers_4(rope):
    """Which reads nothing but these two; it computes with θ = 10,000, unscaled, if they are missing."""
    found = LlamaConfig(**SMALL_LLAMA, rope_parameters=ROPES[rope]).to_dict()
    assert found["rope_theta"] == ROPES[rope]["rope_theta"]
    scaling = found["rope_scaling"] or {"rope_type": "default"}
    assert scaling | {"rope_theta": found["rope_theta"]} == ROPES[rope]
    alone = {name: value for name, value in found.items() if name != "rope_parameters"}
    assert LlamaConfig.from_dict(alone).rope_parameters == ROPES[rope]


def test_config_does_not_modify_its_arguments():
    given = dict(rope_theta=7.0)
    config = LlamaConfig(**SMALL_LLAMA, rope_parameters=given)
    assert given == dict(rope_theta=7.0)
    assert config.rope_parameters == dict(rope_type="default", rope_theta=7.0)
    assert LlamaConfig().rope_parameters == dict(rope_type="default", rope_theta=10000.0)
    scaling = dict(type="linear", factor=2.0)
    LlamaConfig.from_dict(SMALL_LLAMA | dict(rope_scaling=scaling))
    assert scaling == dict(type="linear", factor=2.0)


LLAMA3 = ROPES["llama3"]
BAD_CONFIGS = {
    "heads": (dict(hidden_size=10), r"hidden_size \(10\) .* num_attention_heads \(6\)"),
    "groups": (dict(num_key_value_heads=4), r"num_attention_heads \(6\) .* num_key_value_heads \(4\)"),
    "odd head": (dict(head_dim=5), "head_dim .* not 5"),
    "odd share": (dict(head_dim=None, hidden_size=18), "head_dim .* not 3"),
    "no layers": (dict(num_hidden_layers=0), "num_hidden_layers .* not 0"),
    "half a head": (dict(head_dim=4.5), "head_dim .* not 4.5"),
    "no groups": (dict(num_key_value_heads=0), "num_key_value_heads .* not 0"),
    "text": (dict(vocab_size="13"), "vocab_size .* not '13'"),
    "activation": (dict(hidden_act="gelu"), "hidden_act 'gelu' .* silu"),
    "dropout": (dict(attention_dropout=1.0), "attention_dropout .* not 1.0"),
    "eps": (dict(rms_norm_eps=0.0), "rms_norm_eps .* not 0.0"),
    "unknown": (dict(n_head=4, sliding=True), "n_head, sliding"),
    "another model": (dict(model_type="gpt2"), "model_type='llama', .* 'gpt2'"),
    "interleaved": (dict(rope_interleaved=True), "rope_interleaved=False, .* True"),
    "quantised": (dict(quantization_config={}), "quantization_config"),
    "no factor": (dict(rope_scaling=dict(type="linear")),
                  "of rope_type 'linear' must be factor, rope_theta, rope_type, not rope_theta, rope_type"),
    "a part of llama3": (dict(rope_parameters=dict(rope_type="llama3", factor=8.0)), "low_freq_factor"),
    "too much": (dict(rope_parameters=dict(factor=8.0)), "'default' must be rope_theta, rope_type, not"),
    "bad factor": (dict(rope_scaling=dict(type="linear", factor=-1)),
                   "factor in rope_parameters must be a positive number, not -1"),
    "text theta": (dict(rope_theta="big"), "rope_theta in rope_parameters must be a positive number"),
    "no object": (dict(rope_scaling="linear"), "rope_scaling must be an object of parameters, not 'linear'"),
    "two thetas": (dict(rope_theta=1.0, rope_parameters=dict(rope_theta=2.0)),
                   "gives rope_theta as 2.0 and as 1.0: keep one of them"),
    "two types": (dict(rope_scaling=dict(type="linear", rope_type="llama3", factor=2.0)),
                  "gives rope_type as 'linear' and as 'llama3'"),
    "low above high": (dict(rope_parameters=LLAMA3 | dict(low_freq_factor=5.0)),
                       r"low_freq_factor \(5.0\) in rope_parameters must be below high_freq_factor \(4.0\)"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_invalid_config_is_refused(changes, message):
    with pytest.raises(Error, match=message):
        LlamaConfig.from_dict(SMALL_LLAMA | changes)


BAD_IDS = {
    "too large": (np.array([[1, 13]]), "13, but token ids run from 0 to 12"),
    "negative": (np.array([[1, -1]]), "-1, but token ids run from 0 to 12"),
    "too long": (np.zeros((1, 9), int), r"at most 8 positions, not \(1, 9\)"),
    "one axis": (np.array([1, 2]), r"shape \(batch, time\).*not \(2,\)"),
    "floats": (np.array([[1.0, 2.0]]), "1.0.*not an integer"),
    "empty": (np.zeros((1, 0), int), "empty"),
}


@pytest.mark.parametrize(("ids", "message"), BAD_IDS.values(), ids=BAD_IDS)
def test_invalid_token_ids_are_refused(ids, message):
    with pytest.raises(Error, match=message):
        random_llama(EVERYTHING)(ids)

"""Llama's relatives against transformers and their twins, and what each of them changes."""

import json
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm import Error, generate, load_model, nn, no_grad
from tinyllm.inference.decoding import DecodingSteps
from tinyllm.models import ARCHITECTURES, SequenceClassifier, empty_model
from tinyllm.models.windows import FULL, SLIDING
from tinyllm.training.config import ModelOptions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.models import (  # noqa: E402
    RELATIVES,
    ROPES,
    SMALL_LLAMA,
    assert_close,
    batch,
    llama_configs,
    random_llama,
    rewrite,
)
from support.references import check_against, check_against_both  # noqa: E402

from parity.twins import bridge  # noqa: E402

NAMES = {kind: ARCHITECTURES[kind].__name__ for kind in RELATIVES}
every_kind = pytest.mark.parametrize("kind", RELATIVES)
proven_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.proof(name)) for kind, name in NAMES.items()]
)

SIZES = SMALL_LLAMA | dict(hidden_size=13, num_hidden_layers=3)  # 13 is not divisible by the heads
WINDOWS = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1, no_rope_layer_interval=2)
# The windows of three layers: in all of a Mistral, the last two of a Qwen, the unrotated one of a SmolLM3
EXPECTED = {"mistral": [4, 4, 4], "smollm3": [None, 4, None], "olmo2": [None] * 3}


def config_of(kind, **changes):
    """A small config, with windows if the architecture has them."""
    values = SIZES | WINDOWS | changes
    known = {field.name for field in fields(RELATIVES[kind])}
    return RELATIVES[kind](**{name: value for name, value in values.items() if name in known})


# ----------------------------------------------------------------- against the twin and transformers


@every_kind
@settings(max_examples=20)
@given(data=st.data(), rows=st.integers(1, 3), seed=st.integers(0, 2**32 - 1),
       num_targets=st.none() | st.integers(1, 50))  # fmt: skip
def test_logits_loss_and_gradients_equal_transformers_and_the_twin(kind, data, rows, seed, num_targets):
    config = data.draw(llama_configs(RELATIVES[kind]))
    model = random_llama(config, seed)
    ids, targets = batch(config, (rows, 1 + seed % min(config.context, 40)), seed)
    check_against_both(model, ids, targets, num_targets)


@proven_kind
def test_several_query_blocks_and_row_chunks_equal_transformers(kind):
    """300 positions are several query blocks, of which those outside the window of 70 are skipped."""
    config = config_of(kind, max_position_embeddings=300, vocab_size=70, sliding_window=70)
    model = random_llama(config)
    check_against(bridge.to_transformers(model), model, *batch(config, (3, 300)))


@every_kind
def test_unmodified_transformers_differs_by_its_float32_rounding(kind):
    """Its norms, angles and eager softmax are float32 even in a float64 model."""
    model = random_llama(config_of(kind, rms_norm_eps=1e-3))
    patched = bridge.to_transformers(model)
    config = type(patched.config).from_dict(patched.config.to_dict())
    config._attn_implementation = "eager"
    theirs = type(patched)(config).double().eval()
    theirs.load_state_dict(patched.state_dict(), strict=True)
    ids, _ = batch(model.config, (3, 8))
    logits = theirs(torch.from_numpy(ids)).logits
    assert_close(model(ids).data, logits, "logits", 1e-6)
    with pytest.raises(AssertionError):
        assert_close(model(ids).data, logits, "logits", 1e-10)


@every_kind
def test_padded_rows_equal_transformers_with_an_attention_mask(kind):
    model = random_llama(config_of(kind, max_position_embeddings=16))
    theirs, (ids, _) = bridge.to_transformers(model), batch(model.config, (3, 12))
    for row, length in enumerate((12, 7, 3)):
        ids[row, length:] = 0
        mask = torch.ones(1, 12, dtype=torch.long)
        mask[:, length:] = 0
        logits = theirs(torch.from_numpy(ids[row : row + 1]), attention_mask=mask).logits
        assert_close(model(ids[row : row + 1]).data[:, :length], logits[:, :length], f"{length} tokens")


# ------------------------------------------------------------------------------- windows and caches


@pytest.mark.parametrize("kind", [kind for kind in RELATIVES if kind != "olmo2"])
def test_a_query_sees_its_window_only(kind):
    """In one block, a token changes the next positions within the window, and none after it."""
    config = config_of(kind, num_hidden_layers=1, max_window_layers=0, no_rope_layer_interval=1)
    assert config.window_of(0) == 4
    model = random_llama(config)
    ids, _ = batch(config, (1, 8))
    before = model(ids).data
    ids[0, 2] = (ids[0, 2] + 1) % 13
    changed = (model(ids).data != before).any(axis=-1)[0]
    assert changed.tolist() == [False, False, True, True, True, True, False, False]


@every_kind
@settings(max_examples=20)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_a_cache_gives_the_logits_of_the_whole_text(kind, data, seed):
    """Rows of different lengths, extended by different numbers of tokens, past the window."""
    config = data.draw(llama_configs(RELATIVES[kind]).filter(constant_angles))
    model, context = random_llama(config, seed), min(config.context, 24)
    ids, _ = batch(config, (2, context), seed)
    whole, cache = model(ids).data, model.new_cache(2)
    with no_grad():
        done = [0, data.draw(st.integers(0, context // 2))]
        if done[1]:
            found = model(ids[1:, : done[1]], cache=cache[1:]).data
            assert_close(found, whole[1:, : done[1]], "the first tokens of a row")
        while max(done) < context:
            count = data.draw(st.integers(1, context - max(done)))
            new = np.array([ids[row, n : n + count] for row, n in enumerate(done)])
            found = model(new, cache=cache).data
            for row, n in enumerate(done):
                expected = whole[row, n : n + count]
                assert np.abs(found[row] - expected).max() <= 1e-10 * np.abs(whole).max()
            done = [n + count for n in done]


def constant_angles(config) -> bool:
    """Whether the frequencies do not depend on the length of the text (``test_rope.py`` has the others)."""
    return config.rope_parameters["rope_type"] not in ("dynamic", "longrope")


@every_kind
def test_a_text_longer_than_the_memory_of_a_window_equals_one_without_a_cache(kind):
    """Layers with a window of 4 hold at most 132 entries of the 200."""
    config = config_of(kind, max_position_embeddings=200, num_hidden_layers=2)
    model = random_llama(config)
    ids, _ = batch(config, (2, 200))
    whole, cache, start = model(ids).data, model.new_cache(2), 0
    assert [keys.shape[2] for keys in cache.keys] == [132 if w else 200 for w in model.windows()]
    with no_grad():
        for count in (50, 1, 1, 90, *[1] * 58):
            found = model(ids[:, start : start + count], cache=cache).data
            assert_close(found, whole[:, start : start + count], f"position {start}")
            start += count
    assert start == 200


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decoding_steps_are_repeated(kind, dtype):
    """Also where the windows move on, at every step."""
    model = random_llama(config_of(kind, max_position_embeddings=64), dtype=dtype)
    ids, _ = batch(model.config, (1, 40))
    whole, cache, run = model(ids).data, model.new_cache(1), DecodingSteps(model, 38)
    with no_grad():
        model(ids[:, :2], cache=cache)
        logits = [run(ids[:, t : t + 1], cache).data[:, 0] for t in range(2, 40)]
    assert [recording.is_checked for recording in run.recordings.values()] == [True]
    tolerance = 1e-10 if dtype == np.float64 else 1e-4
    assert np.abs(np.array(logits)[:, 0] - whole[0, 2:]).max() <= tolerance * np.abs(whole).max()


@every_kind
def test_speculative_decoding_and_generation_without_a_cache_give_the_same_text(kind):
    model = random_llama(config_of(kind, max_position_embeddings=64))
    prompt = [1, 2, 3, 1, 2, 3, 1, 2]
    texts = [
        [int(token[0]) for token in generate(model, prompt, 40, temperature=0, **options)]
        for options in ({}, {"use_cache": False}, {"speculate": "prompt"})
    ]
    assert len(texts[0]) == 40 and texts[0] == texts[1] == texts[2]


@every_kind
def test_layers_keep_their_windows_when_others_are_removed(kind, tmp_path):
    model = random_llama(config_of(kind), dtype=np.float32)
    windows = model.windows()
    assert windows == EXPECTED.get(kind, [None, 4, 4])
    del model.layers[0]
    assert model.windows() == windows[1:]
    ids, _ = batch(model.config, (1, 8))
    with no_grad():
        assert_close(model(ids, cache=model.new_cache(1)).data, model(ids).data, "cached", 1e-5)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.windows() == windows[1:] and np.array_equal(again(ids).data, model(ids).data)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(again(ids).data, theirs(torch.from_numpy(ids)).logits, "logits", 1e-5)


@every_kind
def test_layers_are_those_of_the_config_if_one_has_no_attention(kind):
    model = random_llama(config_of(kind))
    windows = model.windows()
    model.layers[0].self_attn = nn.Dropout(0.0)
    assert model.windows() == windows and model.current_config() == model.config


# -------------------------------------------------------------------------------- other changes


def test_the_biases_of_qwen2_are_of_queries_keys_and_values():
    model = random_llama(config_of("qwen2"))
    biases = {name.split(".", 2)[2] for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biases == {f"self_attn.{name}_proj.bias" for name in "qkv"}


def test_queries_and_keys_of_qwen3_are_normalized_head_by_head():
    model = random_llama(config_of("qwen3"))
    attention = model.layers[0].self_attn
    attention.q_norm.weight.replace(np.ones(4))
    x = model.embed_tokens(np.arange(8)[None])
    before, k, _ = (heads.data for heads in attention.heads(x))
    assert before.shape == (1, 6, 8, 4) and k.shape == (1, 2, 8, 4)
    np.testing.assert_allclose((before**2).mean(axis=-1), 1, rtol=1e-3)
    weight = attention.q_proj.weight.data.copy()
    weight[:4] *= 1000  # the first head's; the others are the same
    attention.q_proj.weight.replace(weight)
    after = next(iter(attention.heads(x))).data
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)
    assert np.array_equal(after[:, 1:], before[:, 1:])


def test_unrotated_layers_of_smollm3_know_no_distances():
    model = random_llama(config_of("smollm3", use_sliding_window=False))
    assert [layer.self_attn.rotates for layer in model.layers] == [True, False, True]
    x = model.embed_tokens(np.arange(8)[None])
    near, far = (model.rope(step * np.arange(8), x.data) for step in (1, 3))
    same = [np.array_equal(m.self_attn(x, near).data, m.self_attn(x, far).data) for m in model.layers]
    assert same == [False, True, False]
    del model.layers[0]
    assert model.current_config().no_rope_layers == [0, 1]


def test_queries_of_olmo2_are_normalized_together_and_outputs_too():
    model = random_llama(config_of("olmo2"))
    block, attention = model.layers[0], model.layers[0].self_attn
    attention.q_norm.weight.replace(np.ones(24))
    x = model.embed_tokens(np.arange(8)[None])
    q, *_ = (heads.data for heads in attention.heads(x))
    np.testing.assert_allclose((q**2).mean(axis=(1, 3)), 1, rtol=1e-3)
    assert not np.allclose((q**2).mean(axis=3), 1, rtol=0.1)
    added = block(x, model.rope(np.arange(8), x.data)).data - x.data
    for layer in (attention.o_proj, block.mlp.down_proj):
        layer.weight.replace(1000 * layer.weight.data)
    again = block(x, model.rope(np.arange(8), x.data)).data - x.data
    np.testing.assert_allclose(again, added, rtol=1e-2, atol=1e-2)


# --------------------------------------------------------------------- sizes, training, fine-tuning

# Contents of config.json as published, in the format of their time, and the number of parameters
HUB = {
    "Qwen2.5-0.5B": ({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
        "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    }, 494_032_768),
    "Qwen3-0.6B": ({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    }, 596_049_920),
    "Mistral-7B-v0.1": ({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    }, 7_241_732_096),
}  # fmt: skip

COUNTS = {name: count for name, (_, count) in HUB.items()} | {
    "Qwen2.5-1.5B": 1_543_714_304, "Qwen2.5-3B": 3_085_938_688, "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-1.7B": 1_720_574_976, "Qwen3-4B": 4_022_468_096, "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200, "Qwen3-32B": 32_762_123_264, "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Nemo-12B": 12_247_782_400, "SmolLM3-3B": 3_075_098_624, "OLMo-2-1B": 1_484_916_736,
    "OLMo-2-7B": 7_298_617_344,
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_a_published_config_is_the_preset_and_has_the_parameters_of_transformers(name):
    contents, count = HUB[name]
    config_class = RELATIVES[contents["model_type"]]
    config = config_class.from_dict(contents)
    preset = config_class.preset(name)
    unused = {name: getattr(config, name) for name in ("max_window_layers",) if name in contents}
    assert config == replace(preset, **unused)
    theirs = transformers.AutoConfig.for_model(**contents)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    assert model.num_parameters() == count
    shapes = {name.removeprefix("model."): tuple(p.shape) for name, p in model.named_parameters()}
    ours = ARCHITECTURES[contents["model_type"]](config, rng=None)
    assert {name: p.shape for name, p in ours.named_parameters()} == shapes


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_are_as_published(size):
    tracemalloc.start()
    try:
        model = empty_model(size)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert model.num_parameters() == COUNTS[size]
    assert peak < 6_000_000  # norms only


def test_every_published_size_has_a_count():
    assert COUNTS.keys() == {size for config_class in RELATIVES.values() for size in config_class.sizes}


@every_kind
def test_train_makes_a_model_of_the_options_sizes(kind):
    options = ModelOptions(arch=kind, n_layer=2, n_head=4, n_kv_head=2, n_embd=24, context=18, dropout=0.0)
    model = options.model(50, np.random.default_rng(0))
    assert type(model) is ARCHITECTURES[kind] and model.context == 18
    assert model.windows() == [5 if kind == "mistral" else None] * 2
    assert model.config.kv_shape == (2, 6) and model.config.tie_word_embeddings
    ids, targets = batch(model.config, (2, 18))
    assert model.loss(ids, targets).item() == pytest.approx(np.log(50), abs=0.2)
    with pytest.raises(Error, match=r"hidden_size \(25\) .* num_attention_heads \(4\)"):
        ModelOptions(arch=kind, n_embd=25, n_head=4).model_config(50)
    with pytest.raises(Error, match=f"head_bias is True, but a {kind} has no"):
        ModelOptions(arch=kind, head_bias=True).model_config(50)


@every_kind
def test_lora_is_on_queries_and_values_by_default(kind):
    model = random_llama(config_of(kind))
    expected = {f"layers.{i}.self_attn.{name}_proj" for i in range(3) for name in "qv"}
    assert set(nn.add_lora(model, rank=2, rng=0)) == expected


# ------------------------------------------------------------------------------------- folders


def their_model(kind, **changes):
    """A model of transformers in eval mode with perturbed weights."""
    torch.manual_seed(0)
    known = {field.name for field in fields(RELATIVES[kind])}
    values = {name: x for name, x in (SIZES | WINDOWS | changes).items() if name in known}
    model_class = getattr(transformers, RELATIVES[kind].hub_class)
    theirs = model_class(model_class.config_class(**values, pad_token_id=None)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return theirs


def assert_same_logits(ours, theirs):
    ids, _ = batch(ours.config, (2, 8))
    with torch.no_grad():
        theirs = bridge.twin_of(ours).exact(theirs.double())
        logits = theirs(torch.from_numpy(ids)).logits
    assert_close(ours.astype(np.float64)(ids).data, logits, "logits")


def as_transformers_4(config):
    """Without layer_types, and with rope_theta and rope_scaling."""
    rope = config.pop("rope_parameters")
    config.pop("layer_types", None)
    kind = rope.pop("rope_type")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    return config


@every_kind
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("version", [4, 5])
def test_folder_of_transformers_loads(tmp_path, kind, rope, version):
    theirs = their_model(kind, rope_parameters=dict(ROPES[rope]), tie_word_embeddings=version == 4)
    theirs.save_pretrained(tmp_path)
    if version == 4:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(as_transformers_4(json.loads(file.read_text()))))
        rewrite(tmp_path, lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()})
    ours = load_model(tmp_path)
    assert type(ours) is ARCHITECTURES[kind] and not ours.training
    expected = config_of(kind, rope_parameters=ROPES[rope], tie_word_embeddings=version == 4)
    assert ours.config == expected
    assert_same_logits(ours, theirs)


@every_kind
@pytest.mark.parametrize("rope", ROPES)
def test_saved_folder_loads_here_and_in_transformers(tmp_path, kind, rope):
    ours = random_llama(config_of(kind, rope_parameters=ROPES[rope]), dtype=np.float32)
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == ours.config.hub_class
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = load_model(tmp_path)
    assert again.config == ours.config
    assert all(np.array_equal(p.data, q.data) for p, q in zip(ours.parameters(), again.parameters()))
    assert_same_logits(ours, theirs.eval())


@every_kind
def test_a_classifier_is_exchanged_with_transformers(tmp_path, kind):
    model = SequenceClassifier(
        random_llama(config_of(kind), dtype=np.float32), ["a", "b", "c"], rng=0, pad_id=0
    )
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == f"{NAMES[kind]}ForSequenceClassification"
    ids = np.array([[1, 2, 3, 4, 5, 6, 7], [3, 1, 2, 0, 0, 0, 0]])
    mask = torch.from_numpy((ids != 0).astype(np.int64))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids), attention_mask=mask).logits
    assert_close(model.eval()(ids, [7, 3]).data, logits, "logits", 1e-5)
    again = SequenceClassifier.from_pretrained(tmp_path)
    assert np.array_equal(again(ids, [7, 3]).data, model(ids, [7, 3]).data)


@every_kind
@settings(max_examples=20)
@given(data=st.data())
def test_saved_config_can_be_read_by_transformers(kind, data):
    config = data.draw(llama_configs(RELATIVES[kind]))
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(config.to_dict())))
    assert type(theirs).__name__ == type(config).__name__ and theirs.model_type == kind
    for name, value in vars(config).items():
        if name == "layer_types":
            kinds = [
                FULL if config.window_of(i) is None else SLIDING for i in range(config.num_hidden_layers)
            ]
            assert theirs.layer_types == kinds
        else:
            assert getattr(theirs, name) == value, name
    assert (
        RELATIVES[kind].from_dict(config.to_dict()) == config == RELATIVES[kind].from_dict(theirs.to_dict())
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_default_configs_are_those_of_transformers(kind):
    ours, theirs = ARCHITECTURES[kind].config_class, transformers.AutoConfig.for_model(kind)
    assert ours.from_dict(theirs.to_dict()) == ours()


def test_explicit_layer_types_are_those_of_transformers():
    kinds = [SLIDING, FULL, SLIDING]
    config = config_of("qwen3", layer_types=kinds)
    model = random_llama(config)
    assert model.windows() == [4, None, 4] and config.to_dict()["layer_types"] == kinds
    ids, targets = batch(config, (2, 8))
    check_against(bridge.to_transformers(model), model, ids, targets)
    assert config_of("qwen3", layer_types=[FULL, SLIDING, SLIDING]) == config_of("qwen3")
    kinds[1] = SLIDING  # the config has a list of its own
    assert config.layer_types == [SLIDING, FULL, SLIDING]


BAD = {
    "too few kinds": ("qwen3", dict(layer_types=[FULL]), r"for each of 3 layers, not \['full_attention'\]"),
    "another kind": ("qwen2", dict(layer_types=[FULL, FULL, "chunked_attention"]), "layer_types must have"),
    "no window": ("qwen2", dict(sliding_window=None, layer_types=[FULL, FULL, SLIDING]), "window is missing"),
    "switched off": ("qwen3", dict(use_sliding_window=False, layer_types=[SLIDING] * 3), "window is missing"),
    "empty window": ("qwen2", dict(sliding_window=0), "sliding_window .* at least 1, not 0"),
    "negative": ("qwen3", dict(max_window_layers=-1), "max_window_layers .* at least 0, not -1"),
    "truth": ("qwen3", dict(use_sliding_window=1), "use_sliding_window must be a bool, not 1"),
    "no list": ("qwen3", dict(layer_types="full_attention"), "layer_types must be a list"),
    "odd head": ("qwen3", dict(head_dim=5), "head_dim must be even, not 5"),
    "no head": ("qwen3", dict(head_dim=None), r"hidden_size \(13\) must be divisible"),
    "bias": ("mistral", dict(attention_bias=True), "attention_bias"),
    "no kinds": ("mistral", dict(layer_types=1), "layer_types 1 and sliding_window 4 are not supported"),
    "two kinds": ("mistral", dict(layer_types=[SLIDING, FULL, SLIDING]), "all layers of a Mistral"),
    "rotation": ("smollm3", dict(no_rope_layers=[1, 0]), r"for each of 3 layers, not \[1, 0\]"),
    "rotations": ("smollm3", dict(no_rope_layers=[1, 0, 2]), "no_rope_layers must have 0 or 1"),
    "interval": ("smollm3", dict(no_rope_layer_interval=0), "interval must be .* at least 1, not 0"),
    "no interval": ("smollm3", dict(no_rope_layer_interval="4"), "interval must be .* at least 1, not '4'"),
    "no depth": ("smollm3", dict(num_hidden_layers="3"), "num_hidden_layers must be .* not '3'"),
    "multimodal": ("qwen2", dict(use_mrope=True), "use_mrope=False, but the config has True"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), BAD.values(), ids=BAD)
def test_invalid_config_is_refused(kind, changes, message):
    known = {field.name for field in fields(RELATIVES[kind])}
    given = {name: value for name, value in (SIZES | WINDOWS).items() if name in known}
    with pytest.raises(Error, match=message):
        RELATIVES[kind].from_dict(given | {"model_type": kind} | changes)


def test_smollm3_may_have_qwens_key_that_has_no_effect_on_it():
    config = config_of("smollm3")
    assert RELATIVES["smollm3"].from_dict(config.to_dict() | {"max_window_layers": 28}) == config


def test_mistral_may_say_twice_which_layers_slide():
    for window, kind in ((4, SLIDING), (None, FULL)):
        given = config_of("mistral", sliding_window=window).to_dict() | {"layer_types": [kind] * 3}
        assert RELATIVES["mistral"].from_dict(given).window_of(0) == window
        assert given["layer_types"] == [kind] * 3  # the caller's dict is not changed
    usual = RELATIVES["mistral"].from_dict({"layer_types": [SLIDING] * 32})
    assert usual.window_of(0) == 4096

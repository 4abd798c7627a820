"""Gemma 2 and 3 against transformers and their twins, folders in both directions, and their properties."""

import json
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm import Error, Tensor, generate, load_model, nn, no_grad, optim
from tinyllm import functional as F
from tinyllm.functional import composed
from tinyllm.inference.decoding import DecodingSteps
from tinyllm.models import ARCHITECTURES, Gemma2, Gemma2Config, Gemma3, Gemma3Config
from tinyllm.models import cache as cache_module
from tinyllm.models.sizes import GEMMA_2, GEMMA_3
from tinyllm.models.windows import FULL, SLIDING

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.models import (  # noqa: E402
    GEMMA2,
    GEMMA3,
    SMALL_GEMMA,
    assert_close,
    batch,
    gemma_configs,
    random_model,
)
from support.references import check_against_both  # noqa: E402

from parity.__main__ import main  # noqa: E402
from parity.compare import report  # noqa: E402
from parity.compare.command import RANDOM_SIZES  # noqa: E402
from parity.twins import bridge  # noqa: E402

KINDS = {"gemma2": GEMMA2, "gemma3": GEMMA3}
every_gemma = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def their_config(config, **changes):
    """The same config in ``transformers``, with eager attention and without a token that pads."""
    kind = getattr(transformers, config.hub_class).config_class
    theirs = kind(**vars(config) | changes, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    theirs._attn_implementation = "eager"
    return theirs


# ------------------------------------------------------------ against the twin and transformers


def check(config, rows, seed, num_targets):
    ids, targets = batch(config, (rows, 1 + seed % config.max_position_embeddings), seed)
    check_against_both(random_model(config), ids, targets, num_targets)


sizes = dict(
    rows=st.integers(1, 3), seed=st.integers(0, 2**32 - 1), num_targets=st.none() | st.integers(1, 9)
)


@settings(max_examples=20)
@example(config=GEMMA2, rows=2, seed=7, num_targets=None)
@given(config=gemma_configs(Gemma2Config), **sizes)
def test_gemma2_equals_transformers_and_the_twin(config, rows, seed, num_targets):
    check(config, rows, seed, num_targets)


@settings(max_examples=20)
@example(config=GEMMA3, rows=2, seed=7, num_targets=None)
@given(config=gemma_configs(Gemma3Config), **sizes)
def test_gemma3_equals_transformers_and_the_twin(config, rows, seed, num_targets):
    check(config, rows, seed, num_targets)


def as_it_stands(model):
    """The model of ``transformers``, unmodified."""
    theirs = getattr(transformers, model.config.hub_class)(their_config(model.config)).double().eval()
    theirs.load_state_dict(bridge.to_transformers(model).state_dict(), strict=True)
    return theirs


@every_gemma
@pytest.mark.parametrize("tied", [True, False])
def test_unmodified_transformers_differs_by_its_float32_rounding(config, tied):
    """In three times as many norms as in Llama, in the angles and the softmax, and in √C."""
    model = random_model(replace(config, tie_word_embeddings=tied, rms_norm_eps=1e-3))
    theirs = as_it_stands(model)
    ids, _ = batch(config, (3, 8))
    assert_close(model(ids).data, theirs(torch.from_numpy(ids)).logits, "logits", 3e-6)
    with pytest.raises(AssertionError):  # otherwise the tests above would not need their changes
        assert_close(model(ids).data, theirs(torch.from_numpy(ids)).logits, "logits", 1e-10)


def several_query_blocks(config):
    """300 positions are several query blocks in attention, of which a window of 70 skips some; 900 rows are
    several chunks in the loss. In ``transformers`` half of the rows are padding on the right.
    """
    config = replace(config, max_position_embeddings=300, vocab_size=70, sliding_window=70)
    model = random_model(config)
    theirs = bridge.to_transformers(model)
    ids, targets = batch(config, (3, 300))
    real = np.arange(300) < np.array([[300], [150], [71]])
    targets = np.where(real, targets, -100)
    logits = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(real.astype(int))).logits
    assert_close(model(ids).data[real], logits.detach().numpy()[real], "logits")
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten()).backward()
    model.loss(ids, targets).backward()
    reference = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, reference[name], name)


@pytest.mark.proof("Gemma2")
def test_several_query_blocks_of_gemma2_equal_transformers():
    several_query_blocks(GEMMA2)


@pytest.mark.proof("Gemma3")
def test_several_query_blocks_of_gemma3_equal_transformers():
    several_query_blocks(GEMMA3)


# ------------------------------------------------------------------------------ what is new


@every_gemma
def test_caps_windows_and_angles_have_an_effect(config):
    """Each alone: otherwise the comparisons above would prove nothing about it."""
    ids, _ = batch(config, (2, 8))
    before = random_model(config)(ids).data
    changes = [dict(sliding_window=8), dict(query_pre_attn_scalar=4), dict(layer_types=[FULL, FULL])]
    if config is GEMMA2:
        changes += [dict(attn_logit_softcapping=None), dict(final_logit_softcapping=None)]
    else:
        changes += [dict(rope_parameters={**config.rope_parameters, kind: {}}) for kind in (SLIDING, FULL)]
        changes += [dict(final_logit_softcapping=2.0)]
    for change in changes:
        after = random_model(replace(config, **change))(ids).data
        assert np.abs(after - before).max() > 1e-3, change


def test_capped_logits_are_the_same_in_logits_loss_and_generation():
    model = random_model(GEMMA2)
    ids, targets = batch(GEMMA2, (2, 8))
    logits = model(ids)
    uncapped = model.lm_head(model.hidden_states(ids)).data
    assert np.abs(uncapped).max() > 4 and np.abs(logits.data).max() < 3
    assert_close(logits.data, 3 * np.tanh(uncapped / 3), "capped", 1e-14)
    expected = composed.cross_entropy(logits, targets)
    assert model.loss(ids, targets).item() == pytest.approx(expected.item(), rel=1e-13)
    p = np.exp(logits.data[0, -1]) / np.exp(logits.data[0, -1]).sum()
    drawn = [next(iter(generate(model, ids[:1], 1, rng=np.random.default_rng(i))))[0] for i in range(300)]
    shares = np.bincount(drawn, minlength=13) / 300
    assert np.abs(shares - p).max() < 0.1
    assert np.abs(np.exp(uncapped[0, -1]) / np.exp(uncapped[0, -1]).sum() - p).max() > 0.2


def test_the_capped_loss_never_holds_all_logits():
    """Those of 512 positions and 20,000 ids would be 41 MB in float32, and their gradient as much again."""
    config = replace(GEMMA2, vocab_size=20_000, max_position_embeddings=512)
    model = Gemma2(config, rng=0)
    ids = np.zeros((1, 512), int)
    model.loss(ids, ids)
    tracemalloc.start()
    try:
        model.loss(ids, ids)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * 256 * 20_000 * 4  # one chunk of 256 rows


@every_gemma
def test_embeddings_are_scaled_but_not_the_head_that_shares_them(config):
    model = random_model(config)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert_close(model.embed_tokens([3]).data, model.lm_head.weight.data[[3]] * math.sqrt(12), "row 3", 1e-15)
    h = Tensor(np.eye(12))
    assert np.array_equal(model.lm_head(h).data, model.lm_head.weight.data.T)


@every_gemma
def test_a_weight_of_zero_is_a_scale_of_one_and_is_not_decayed(config):
    model = ARCHITECTURES[config.model_type](config, rng=0)
    norms = {name: p for name, p in model.named_parameters() if "norm" in name}
    assert len(norms) == 2 * (4 if config is GEMMA2 else 6) + 1
    assert not any(p.data.any() for p in norms.values())
    x = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
    assert np.array_equal(model.norm(Tensor(x)).data, F.rms_norm(Tensor(x), 12, eps=1e-6).data)
    for p in model.parameters():
        p.data[...] = 1
        p.grad = np.zeros_like(p.data)
    optim.AdamW(model, lr=0.1, weight_decay=0.5).step()
    for name, p in model.named_parameters():
        decayed = p.ndim == 2
        assert np.allclose(p.data, 0.95 if decayed else 1.0), name


# ------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("chunks", [[1] * 40, [17, 3, 1, 1, 18], [40], [2, 38]], ids=str)
@every_gemma
def test_a_cache_gives_the_logits_of_the_whole_text(config, chunks, monkeypatch):
    """Far past the window of 3, whose layer holds 3 + 2 · 2 entries; rows are cached one after the other."""
    monkeypatch.setattr(cache_module, "SLACK", 2)
    config = replace(config, max_position_embeddings=40)
    model = random_model(config)
    ids, _ = batch(config, (3, 40))
    with no_grad():
        whole = model(ids).data
        cache, parts = model.new_cache(3), []
        assert [keys.shape[2] for keys in cache.keys] == [7, 40]
        for part in np.split(ids, np.cumsum(chunks)[:-1], axis=1):
            parts.append(model(part, cache=cache).data)
        assert_close(np.concatenate(parts, axis=1), whole, "all at once", 1e-10)
        cache, lengths = model.new_cache(3), [25, 1, 4]  # rows of different lengths
        for row, length in enumerate(lengths):
            model(ids[row : row + 1, :length], cache=cache[row : row + 1])
        for step in range(10):
            new = np.array([[ids[row, length + step]] for row, length in enumerate(lengths)])
            logits = model(new, cache=cache).data[:, 0]
            expected = [whole[row, length + step] for row, length in enumerate(lengths)]
            assert_close(logits, np.array(expected), f"step {step}", 1e-10)


@every_gemma
def test_padded_prompts_are_continued_as_if_alone(config):
    model = random_model(replace(config, max_position_embeddings=40))
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10]]
    together = np.array(list(generate(model, prompts, 20, temperature=0)))
    assert np.array_equal(
        together, np.array(list(generate(model, prompts, 20, temperature=0, use_cache=False)))
    )
    for row, prompt in enumerate(prompts):
        alone = np.array(list(generate(model, [prompt], 20, temperature=0)))
        assert np.array_equal(together[:, row], alone[:, 0])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@every_gemma
def test_recorded_decoding_repeats_the_model(config, dtype):
    """Steps take the fast path again as soon as the window moves and when its entries move."""
    config = replace(config, max_position_embeddings=100, sliding_window=7)
    model = random_model(config, dtype=dtype)
    ids = np.random.default_rng(0).integers(0, 13, (81, 1, 1))
    run, cache, repeated = DecodingSteps(model, 100), model.new_cache(1), 0
    with no_grad():
        whole = model(ids[:, 0].T).data[0]
        for t in range(81):
            repeated += any(recording.is_checked for recording in run.recordings.values())
            logits = run(ids[t], cache).data[0, 0]
            assert_close(logits, whole[t], f"step {t}", 1e-10 if dtype == np.float64 else 1e-4)
    assert repeated > 60


# ----------------------------------------------------------------------- other properties


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@every_gemma
def test_logits_depend_neither_on_later_tokens_nor_on_those_before_the_windows(config, dtype):
    config = replace(config, max_position_embeddings=140, sliding_window=20, layer_types=[SLIDING, SLIDING])
    model = random_model(config, dtype=dtype)
    ids, _ = batch(config, (2, 140))
    with no_grad():
        before = model(ids).data
        for t in (0, 1, 41, 70, 139):
            changed = ids.copy()
            changed[0, t] = (ids[0, t] + 1) % 13
            after = model(changed).data
            assert np.array_equal(after[0, :t], before[0, :t])
            assert not np.array_equal(after[0, t], before[0, t])
            beyond = t + 2 * 19 + 1  # each of the two layers passes information on by at most 19 positions
            assert np.array_equal(after[0, beyond:], before[0, beyond:])
            assert beyond > 140 or not np.array_equal(after[0, beyond - 1], before[0, beyond - 1])
            assert np.array_equal(after[1], before[1])


@every_gemma
def test_float32_is_preserved(config):
    model = random_model(config, dtype=np.float32).train()
    ids, targets = batch(config, (2, 8))
    assert model(ids).dtype == np.float32
    loss = model.loss(ids, targets)
    assert loss.dtype == np.float32
    loss.backward()
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == np.float32, name
    exact = random_model(config)
    assert_close(model.eval()(ids).data.astype(np.float64), exact(ids).data, "float32 against float64", 1e-5)


@every_gemma
def test_lora_has_the_default_targets_of_peft(config):
    model = random_model(config)
    names = nn.add_lora(model, rank=2, rng=0)
    assert names == [f"layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]


# ----------------------------------------------------------------------------- sizes and start

COUNTS = {"Gemma-2-2B": 2_614_341_888, "Gemma-3-270M": 268_098_176, "Gemma-3-1B": 999_885_952}


@pytest.mark.parametrize("size", [*GEMMA_2, *GEMMA_3])
def test_parameter_counts_are_those_of_transformers(size):
    kind, config = (Gemma2, Gemma2Config) if size in GEMMA_2 else (Gemma3, Gemma3Config)
    tracemalloc.start()
    try:
        model = kind(config.preset(size), rng=None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    with torch.device("meta"):
        theirs = getattr(transformers, config.hub_class)(their_config(model.config))
    assert model.num_parameters() == theirs.num_parameters() == COUNTS[size]
    assert peak < 3_000_000  # norms only


@every_gemma
def test_of_size_maps_options_to_config_fields(config):
    sizes = dict(context=30, n_layer=4, n_head=4, n_embd=24, n_kv_head=2, dropout=0.2, tie_head=False)
    found = type(config).of_size(50, **sizes)
    kinds = {"gemma2": [SLIDING, FULL] * 2, "gemma3_text": [SLIDING] * 3 + [FULL]}
    assert found == type(config)(
        vocab_size=50, hidden_size=24, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=30, query_pre_attn_scalar=6,
        attention_dropout=0.2, tie_word_embeddings=False, sliding_window=8,
        layer_types=kinds[config.model_type],
    )  # fmt: skip
    with pytest.raises(Error, match="head_bias"):
        type(config).of_size(50, **sizes, head_bias=True)


@every_gemma
def test_untrained_model_has_a_loss_near_log_vocab_size(config):
    sizes = dict(context=64, n_layer=4, n_head=4, n_embd=64)
    model = ARCHITECTURES[config.model_type](type(config).of_size(1024, **sizes), rng=0).eval()
    ids, targets = np.random.default_rng(1).integers(0, 1024, (2, 4, 64))
    assert model.loss(ids, targets).item() == pytest.approx(math.log(1024), abs=0.1)


# ------------------------------------------------------------ folders: loading those of transformers


def their_model(config, seed=0):
    """A float32 ``transformers`` model with every parameter perturbed."""
    torch.manual_seed(seed)
    model = getattr(transformers, config.hub_class)(their_config(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def assert_same_logits(ours, theirs):
    ids, _ = batch(ours.config, (2, 8))
    theirs = bridge.twin_of(ours).exact(theirs.double())
    with no_grad():
        logits = theirs(torch.from_numpy(ids)).logits
        assert_close(ours.astype(np.float64)(ids).data, logits, "logits")


@pytest.mark.parametrize("tied", [True, False])
@every_gemma
def test_folder_of_transformers_loads(tmp_path, config, tied):
    config = replace(config, tie_word_embeddings=tied)
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert type(ours) is ARCHITECTURES[config.model_type] and not ours.training
    assert {p.dtype for p in ours.parameters()} == {np.dtype(np.float32)}
    assert ours.config == config
    assert_same_logits(ours, theirs)


def older_format(config: dict) -> dict:
    """A ``config.json`` as transformers 4 wrote it."""
    rope = config.pop("rope_parameters")
    if SLIDING in rope:
        config["rope_local_base_freq"] = rope[SLIDING]["rope_theta"]
        rope = rope[FULL]
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    return config | {"cache_implementation": "hybrid"}


@every_gemma
def test_older_config_format_equals_the_current_one(tmp_path, config):
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(older_format(json.loads(file.read_text()))))
    ours = load_model(tmp_path)
    assert ours.config == config
    assert_same_logits(ours, theirs)
    again = getattr(transformers, config.hub_class).from_pretrained(tmp_path, attn_implementation="eager")
    assert_same_logits(ours, again.eval())


@every_gemma
def test_saved_folder_loads_here_and_in_transformers(tmp_path, config):
    ours = random_model(config, dtype=np.float32)
    ours.save_pretrained(tmp_path)
    kind = getattr(transformers, config.hub_class)
    theirs, keys = kind.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(keys[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.rope_parameters == config.rope_parameters
    again = load_model(tmp_path)
    assert again.config == config and again.lm_head.weight is again.embed_tokens.weight
    for (name, p), (other_name, q) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name and np.array_equal(p.data, q.data), name
    assert_same_logits(ours, theirs.eval())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_gemma
def test_report_compares_a_folder_and_a_random_model(tmp_path, capsys, config, dtype):
    model, *_ = report.random_models(config.model_type, RANDOM_SIZES, "float32", 1)
    model.save_pretrained(tmp_path / "model")
    names = {name for name, _ in model.named_modules() if name}
    short = config.short_name or config.model_type
    for what in ([str(tmp_path / "model"), "--tokens", "8"], ["--random", "--arch", short]):
        code = main(["report", *what, "--dtype", dtype, "--out", str(tmp_path / "page.html")])
        out = capsys.readouterr().out
        assert code == 0 and "comparisons are within their bounds" in out
        assert all(f"\n{name} " in out for name in names)
        assert "sliding_window" in out


# --------------------------------------------------------------------------------------- configs

# Contents of config.json of models on the hub, in the formats of their time.
HUB_GEMMA_2_2B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
    "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
    "torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
HUB_GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
HUB_GEMMA_3_270M = HUB_GEMMA_3_1B | {
    "_sliding_window_pattern": 6, "eos_token_id": 1, "hidden_size": 640, "intermediate_size": 2048,
    "layer_types": ([SLIDING] * 5 + [FULL]) * 3, "num_hidden_layers": 18, "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0, "use_bidirectional_attention": False,
}  # fmt: skip
del HUB_GEMMA_3_270M["sliding_window_pattern"]


def test_published_configs_can_be_read():
    assert Gemma2Config.from_dict(HUB_GEMMA_2_2B) == Gemma2Config.preset("Gemma-2-2B")
    twice = HUB_GEMMA_2_2B | {"sliding_window_size": 4096}  # as the first files of the 9B have it
    assert Gemma2Config.from_dict(twice) == Gemma2Config.preset("Gemma-2-2B")
    assert Gemma3Config.from_dict(HUB_GEMMA_3_1B) == Gemma3Config.preset("Gemma-3-1B")
    assert Gemma3Config.from_dict(HUB_GEMMA_3_270M) == Gemma3Config.preset("Gemma-3-270M")
    for patterns in ({"sliding_window_pattern": 4}, {"_sliding_window_pattern": 4}):
        config = Gemma3Config.from_dict(HUB_GEMMA_3_1B | {"sliding_window_pattern": None} | patterns)
        assert config.layer_types[:5] == [SLIDING, SLIDING, SLIDING, FULL, SLIDING]
    linear = {"factor": 8.0, "rope_type": "linear"}  # of the larger models, for full layers only
    rope = Gemma3Config.from_dict(HUB_GEMMA_3_1B | {"rope_scaling": linear}).rope_parameters
    assert rope == {SLIDING: dict(rope_type="default", rope_theta=10000), FULL: linear | dict(rope_theta=1e6)}


@every_gemma
def test_configs_of_transformers_can_be_read(tmp_path, config):
    theirs = their_config(config)
    assert type(config).from_dict(theirs.to_dict()) == config
    theirs.save_pretrained(tmp_path)
    assert type(config).from_dict(json.loads((tmp_path / "config.json").read_text())) == config
    assert type(config).from_dict(type(theirs)().to_dict()) == type(config)()


@settings(max_examples=20)
@given(config=gemma_configs(Gemma2Config) | gemma_configs(Gemma3Config))
def test_saved_config_can_be_read_by_transformers(config):
    kind = getattr(transformers, config.hub_class).config_class
    theirs = kind.from_dict(json.loads(json.dumps(config.to_dict())))
    assert theirs.architectures == [config.hub_class] and theirs.model_type == config.model_type
    for name, value in vars(config).items():
        assert getattr(theirs, name) == value, name
    assert type(config).from_dict(config.to_dict()) == config == type(config).from_dict(theirs.to_dict())


def test_saved_config_has_the_keys_of_transformers_4():
    found = GEMMA3.to_dict()
    assert found["rope_theta"] == 1e4 and found["rope_local_base_freq"] == 50.0
    assert found["rope_scaling"] == dict(rope_type="linear", factor=3.0)
    alone = {name: value for name, value in found.items() if name != "rope_parameters"}
    assert Gemma3Config.from_dict(alone).rope_parameters == GEMMA3.rope_parameters
    assert not {"hidden_act", "mlp_bias"} & found.keys()


def test_a_model_of_images_and_text_is_refused_by_name(tmp_path):
    theirs = transformers.Gemma3Config(text_config=their_config(GEMMA3).to_dict())
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(Error, match=r"'gemma3' \(a model of images and text\).*gemma3_text"):
        load_model(tmp_path)


BAD_CONFIGS = {
    "kinds of too few layers": (dict(layer_types=[FULL]), "each of 2 layers, not"),
    "an unknown kind": (dict(layer_types=[FULL, "chunked_attention"]), "layer_types .*chunked_attention"),
    "kinds as text": (dict(layer_types=SLIDING), "layer_types must be a list"),
    "no window": (dict(sliding_window=None), "sliding_window is missing"),
    "a window of 0": (dict(sliding_window=0), "sliding_window .* not 0"),
    "a scalar of 0": (dict(query_pre_attn_scalar=0), "query_pre_attn_scalar .* not 0"),
    "a cap of 0": (dict(final_logit_softcapping=0.0), "final_logit_softcapping must be positive, not 0.0"),
    "a cap as text": (dict(final_logit_softcapping="30"), "final_logit_softcapping .* not '30'"),
    "activation": (dict(hidden_activation="gelu"), "hidden_activation 'gelu' .* gelu_pytorch_tanh"),
    "two activations": (
        dict(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh"), "hidden_act is 'gelu'"
    ),
    "two windows": (dict(sliding_window_size=4), "sliding_window_size is 4, and sliding_window 3"),
    "both directions": (dict(use_bidirectional_attention=True), "use_bidirectional_attention=False"),
    "a bias of a Llama": (dict(mlp_bias=True), "mlp_bias"),
}  # fmt: skip
BAD_ROPES = {
    "of one kind": (dict(rope_parameters=dict(rope_theta=1.0)), "sliding_attention and .* full_attention"),
    "of another kind": (dict(rope_parameters=dict(chunked_attention={})), "chunked_attention"),
    "a number": (dict(rope_parameters=3), "rope_parameters .* not 3"),
    "a number in it": (dict(rope_parameters={FULL: 3}), "rope_parameters .* 3"),
    "two thetas": (
        dict(rope_local_base_freq=1.0, rope_parameters={SLIDING: dict(rope_theta=2.0)}),
        "gives rope_theta as 2.0 and as 1.0",
    ),
    "a pattern of 0.5": (dict(layer_types=None, sliding_window_pattern=0.5), "sliding_window_pattern"),
    "an unknown type": (dict(rope_parameters={FULL: dict(rope_type="spiral")}), "'spiral' is not supported"),
    "a cap on scores": (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
@every_gemma
def test_invalid_config_is_refused(config, changes, message):
    with pytest.raises(Error, match=message):
        type(config).from_dict(SMALL_GEMMA | changes)


@pytest.mark.parametrize(("changes", "message"), BAD_ROPES.values(), ids=BAD_ROPES)
def test_invalid_config_of_gemma3_is_refused(changes, message):
    with pytest.raises(Error, match=message):
        Gemma3Config.from_dict(SMALL_GEMMA | changes)

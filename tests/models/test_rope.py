"""RoPE's frequencies and factors against transformers, texts longer than in training, and its parameters."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tinyllm import Error, Llama, LlamaConfig, generate, no_grad
from tinyllm.inference import speculative
from tinyllm.inference.decoding import DecodingSteps
from tinyllm.models import Gemma3Config, MixtralConfig
from tinyllm.models.packed import Packed, padded
from tinyllm.models.rope import (
    OPTIONAL,
    ROPE_TYPES,
    Rope,
    attention_factor,
    checked_rope,
    rope_frequencies,
    rotation,
)
from tinyllm.models.windows import FULL

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.models import ROPES, SMALL_LLAMA, assert_close, batch, random_llama  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from parity.twins import bridge  # noqa: E402
from parity.twins import rope as twin  # noqa: E402

# ----------------------------------------------------------------------------- against transformers


def their_frequencies(config, length=None):
    """(frequencies, scaling of cos and sin) as transformers computes them, in float32."""
    theirs = transformers.LlamaConfig(**vars(config))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    compute = ROPE_INIT_FUNCTIONS.get(
        config.rope_parameters["rope_type"], rotary.compute_default_rope_parameters
    )
    return compute(theirs, seq_len=length)


PLAIN = dict(length=1, given_too=set(), numbers=[1] * 4, truncate=True)
TURNS = PLAIN | dict(given_too={"beta_fast", "beta_slow"})
DEEPSEEK = PLAIN | dict(given_too={"mscale", "mscale_all_dim"}, numbers=[1, 0.707, 1.5, 1], truncate=False)


@given(
    kind=st.sampled_from(sorted(ROPE_TYPES)),
    half=st.integers(2, 64),
    theta=st.floats(2, 1e6),
    factor=st.floats(1, 64),
    low=st.floats(0.5, 4),
    more=st.floats(0.1, 8),
    trained=st.integers(16, 8192),
    length=st.integers(1, 20000),
    given_too=st.sets(st.sampled_from(sorted({*OPTIONAL["yarn"], *OPTIONAL["longrope"]}))),
    numbers=st.lists(st.floats(0.5, 2), min_size=4, max_size=4),
    truncate=st.booleans(),
)
@example(kind="llama3", half=64, theta=5e5, factor=8, low=1, more=3, trained=8192, **PLAIN)  # Llama 3.1 8B
@example(kind="llama3", half=32, theta=5e5, factor=32, low=1, more=3, trained=8192, **PLAIN)  # Llama 3.2 1B
@example(kind="default", half=64, theta=1e4, factor=1, low=1, more=1, trained=16, **PLAIN)  # Llama 2
@example(
    kind="yarn", half=64, theta=1e6, factor=4, low=1, more=31, trained=32768, **PLAIN
)  # Qwen2.5 at 131,072
@example(kind="yarn", half=32, theta=1e4, factor=40, low=1, more=31, trained=4096, **DEEPSEEK)
@example(
    kind="yarn", half=2, theta=1e4, factor=4, low=3, more=1, trained=16, **TURNS
)  # no pair turns 3 times
def test_frequencies_of_every_rope_type_equal_transformers(
    kind, half, theta, factor, low, more, trained, length, given_too, numbers, truncate
):
    rng = np.random.default_rng(half)
    values = dict(
        factor=factor, low_freq_factor=low, high_freq_factor=low + more,
        original_max_position_embeddings=trained, beta_slow=low, beta_fast=low + more, truncate=truncate,
        short_factor=rng.uniform(1, 2, half).tolist(), long_factor=rng.uniform(1, 60, half).tolist(),
        attention_factor=numbers[0], mscale=numbers[1], mscale_all_dim=numbers[2],
    )  # fmt: skip
    names = {*ROPE_TYPES[kind], *(given_too & {*OPTIONAL.get(kind, ())})}
    if len(names & {"beta_slow", "beta_fast"}) == 1:
        assume(low < 32 and low + more > 1)  # the other one's default
    rope = dict(rope_type=kind, rope_theta=theta) | {name: values[name] for name in names}
    config = LlamaConfig(
        **SMALL_LLAMA | dict(head_dim=2 * half, max_position_embeddings=math.ceil(4.5 * trained)),
        rope_parameters=rope,
    )
    ours, factor = rope_frequencies(config, length=length), attention_factor(config)
    assert ours.shape == (half,) and ours.dtype == np.float64
    # The interpolation factor of a short wave, (thousands - low) / more, has that relative error in float32.
    single, scaling = their_frequencies(config, length)
    np.testing.assert_allclose(ours, single.numpy(), rtol=1e-4)
    with twin.in_float64():
        double, scaling = their_frequencies(config, length)
    assert double.dtype == torch.float64
    np.testing.assert_allclose(ours, double.numpy(), rtol=1e-13)
    assert factor == pytest.approx(scaling, rel=1e-15)
    # The interpolated numbers of the twin are differences of other numbers.
    np.testing.assert_allclose(twin.rope_frequencies(config, length=length).numpy(), ours, rtol=1e-11)
    assert twin.attention_factor(config) == pytest.approx(factor, rel=1e-14)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("length", [3, 5, 6, 8])
def test_cos_and_sin_equal_their_rotary_embedding(kind, length):
    """Below and above the lengths at which "longrope" changes: in float32, within the angles' rounding."""
    config = LlamaConfig(**SMALL_LLAMA, rope_parameters=ROPES[kind])
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**vars(config))).model.rotary_emb
    positions = np.arange(length)
    found = Rope(config)(positions, like=np.zeros(1))
    for ours, expected in zip(found, theirs(torch.zeros(1), torch.from_numpy(positions)[None])):
        np.testing.assert_allclose(ours, expected[0, :, :2].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_a_shorter_context_does_not_change_the_scores(kind):
    given = {name: x for name, x in ROPES[kind].items() if name != "attention_factor"} | {"factor": 0.5}
    assert attention_factor(LlamaConfig(**SMALL_LLAMA, rope_parameters=given)) == 1


@pytest.mark.parametrize("size", ["Llama-3.1-8B", "Llama-3.2-1B"])
def test_published_rope_scaling_has_an_effect(size):
    """Llama 3.1 keeps high frequencies, divides low ones by the factor, and interpolates in between."""
    config = LlamaConfig.preset(size)
    plain = replace(config, rope_parameters=dict(rope_theta=500000.0))
    ratio = rope_frequencies(plain) / rope_frequencies(config)
    factor = config.rope_parameters["factor"]
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(factor)
    assert (np.diff(ratio) >= -1e-12).all() and ((ratio > 1.01) & (ratio < factor - 0.01)).sum() >= 3
    small = LlamaConfig(**SMALL_LLAMA, rope_parameters=ROPES["llama3"])
    scaled, unscaled = random_llama(small), random_llama(replace(small, rope_parameters={"rope_theta": 50.0}))
    ids, _ = batch(small, (1, 8))
    assert np.abs(scaled(ids).data - unscaled(ids).data).max() > 1e-2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_angles_of_late_positions_are_accurate(dtype):
    """Angles in float32 would have errors of up to 0.005 near position 100,000."""
    frequencies = rope_frequencies(LlamaConfig.preset("Llama-3.1-8B"))
    positions = np.array([0, 1, 99_999, 131_071])
    cos, sin = rotation(frequencies, positions, like=np.zeros(1, dtype))
    assert cos.shape == sin.shape == (4, 64) and cos.dtype == sin.dtype == dtype
    exact = [[math.cos(int(t) * f) for f in frequencies] for t in positions]
    np.testing.assert_allclose(cos, exact, rtol=0, atol=1.5 * np.finfo(dtype).eps)
    np.testing.assert_allclose(cos**2 + sin**2, 1, rtol=0, atol=4 * np.finfo(dtype).eps)


# ------------------------------------------------------------------ texts longer than in training


def llama(kind, **changes):
    return random_llama(LlamaConfig(**SMALL_LLAMA | changes, rope_parameters=ROPES[kind]))


@pytest.mark.parametrize(
    ("kind", "positions", "context"),
    [("default", 8, 8), ("linear", 8, 8), ("llama3", 8, 8), ("dynamic", 8, 16), ("yarn", 8, 256),
     ("yarn", 300, 300), ("longrope", 8, 8)],
)  # fmt: skip
def test_the_context_is_what_the_frequencies_are_made_for(kind, positions, context):
    """Files with "dynamic" and "yarn" have the context in training as max_position_embeddings."""
    model = llama(kind, max_position_embeddings=positions)
    assert model.context == model.new_cache(1).capacity == context


@pytest.mark.parametrize(("kind", "trained"), [("dynamic", 8), ("longrope", 5)])
def test_a_longer_text_has_the_logits_of_transformers(kind, trained):
    model, plain = llama(kind, max_position_embeddings=8), llama("default", max_position_embeddings=16)
    theirs = bridge.to_transformers(model)
    ids, _ = batch(model.config, (2, model.context))
    for length in (trained, trained + 1, model.context, trained):
        logits = theirs(torch.from_numpy(ids[:, :length])).logits
        assert_close(model(ids[:, :length]).data, logits, f"{length} tokens")
    start = model(ids[:, :trained]).data
    assert np.abs(model(ids[:, : trained + 1]).data[:, :trained] - start).max() > 1e-3  # all are rotated anew
    if kind == "dynamic":  # up to there it has no effect
        plain = random_llama(replace(model.config, rope_parameters={"rope_theta": 50.0}))
        assert_close(start, plain(ids[:, :trained]).data, "no scaling", 1e-13)


def test_rows_of_a_cache_are_rotated_by_their_own_lengths():
    model = llama("longrope", max_position_embeddings=12)
    ids, _ = batch(model.config, (2, 9))
    with no_grad():
        cache = model.new_cache(2)
        model(ids[:1, :3], cache=cache[:1])
        model(ids[1:, :7], cache=cache[1:])  # at once longer than 5: the frequencies of a long text
        found = model(np.array([ids[0, 3:5], ids[1, 7:9]]), cache=cache).data
    assert_close(found[0], model(ids[:1, :5]).data[0, 3:], "a short row", 1e-12)
    assert_close(found[1], model(ids[1:]).data[0, 7:], "a long row", 1e-12)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("speculate", [None, "prompt", "itself"])
def test_a_text_becomes_longer_than_in_training_with_a_cache(kind, speculate, monkeypatch):
    """Its keys are rotated anew, so it is processed again: the tokens are those without a cache."""
    monkeypatch.setattr(speculative, "pass_cost", lambda tokens: 0.5)  # as many candidates as there may be
    model = llama(kind, max_position_embeddings=12)
    prompts = [[1, 2, 1, 2, 1]] if speculate else [[1, 2, 3, 4, 5, 6, 7], [5], [3, 1]]
    options = dict(max_new_tokens=model.context, rng=0, slide=True)
    again = [step.tolist() for step in generate(model, prompts, **options, use_cache=False)]
    candidates = model if speculate == "itself" else speculate
    kept = [step.tolist() for step in generate(model, prompts, **options, speculate=candidates)]
    before_sliding = model.context - max(map(len, prompts)) + 1
    assert kept[:before_sliding] == again[:before_sliding]
    assert len(kept) == len(again) == model.context


@pytest.mark.parametrize(("kind", "trained"), [("dynamic", 8), ("longrope", 5)])
def test_a_pass_cannot_make_a_cached_text_longer_than_in_training(kind, trained):
    model = llama(kind, max_position_embeddings=8)
    with (
        no_grad(),
        pytest.raises(Error, match=rf"longer than {trained} tokens, .*'{kind}'.* use_cache=False"),
    ):
        cache = model.new_cache(1)
        model(np.ones((1, trained), int), cache=cache)
        model([[1]], cache=cache)


@pytest.mark.parametrize(("kept", "length"), [(2, 4), (4, 5), (5, 6), (6, 7)])
def test_a_cache_of_a_longer_text_is_none_of_a_short_one(kept, length):
    """Its keys have the angles of a text of more than 5 tokens, which one of up to 5 must not have."""
    model = llama("longrope", max_position_embeddings=12)
    first, second = [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7][:kept] + [8] * (length - kept)
    options = dict(max_new_tokens=8, temperature=0)
    alone = [step.tolist() for step in generate(model, second, **options, use_cache=False)]
    cache = model.new_cache(1, 9).with_capacity(12)
    list(generate(model, first, 2, rng=0, cache=cache))
    cache.keep_prefix([second])  # as a conversation does
    assert [step.tolist() for step in generate(model, second, **options, cache=cache)] == alone
    cache = model.new_cache(1)
    with no_grad():
        model([first], cache=cache)
    cache.rollback(1)
    for count in (1, 2):
        with pytest.raises(Error, match=f"cannot roll back {count} tokens"):
            cache.rollback(count)
    cache.rollback(6)
    assert cache.texts == [[]]
    with no_grad():
        model([first[:5]], cache=cache)
    cache.rollback(1)  # of a short text
    assert cache.texts == [first[:4]]


def test_a_draft_model_proposes_no_more_tokens_than_it_was_trained_for(monkeypatch):
    monkeypatch.setattr(
        speculative, "worthwhile", lambda rates, most, cost: len([*itertools.islice(rates, most)])
    )
    model, draft = llama("default", max_position_embeddings=40), llama("dynamic", max_position_embeddings=8)
    plain = [int(token[0]) for token in generate(model, [1, 2, 3], 30, rng=0)]
    assert [int(token[0]) for token in generate(model, [1, 2, 3], 30, rng=0, speculate=draft)] == plain


def test_steps_of_a_length_that_matters_are_not_repeated():
    """Their recorded NumPy calls would be those of short texts. Those of the other types are repeated."""
    for kind, repeated in (("yarn", True), ("longrope", False), ("dynamic", False)):
        model = llama(kind, max_position_embeddings=64)
        cache, run = model.new_cache(1), DecodingSteps(model, 30)
        with no_grad():
            model([[1, 2, 3, 4, 5, 6]], cache=cache)
            for token in range(5):
                run(np.array([[token]]), cache)
        checked = any(recording.is_checked for recording in run.recordings.values())
        assert run.enabled == checked == repeated, kind


def test_a_packed_sequence_longer_than_in_training_needs_a_row_of_its_own():
    model = llama("longrope")
    ids, targets = batch(model.config, (1, 8))
    packed = Packed([[0, 0, 0, 1, 1, 1, 1, 1]], model)
    expected = [model.hidden_states(part).data for part in (ids[:, :3], ids[:, 3:])]
    assert_close(model.hidden_states(ids, packed).data, np.concatenate(expected, axis=1), "packed", 1e-12)
    with pytest.raises(Error, match=r"has 6 tokens, more than the 5 .*'longrope'.* a row of its own"):
        model.loss(ids, targets, cache=Packed([[0, 0, 1, 1, 1, 1, 1, 1]], model))


@pytest.mark.parametrize("lengths", [(3, 8), (6, 8), (5, 4)])
def test_padding_does_not_count_as_a_part_of_the_text(lengths):
    """Below and above the length in training, 5 tokens."""
    model = llama("longrope")
    ids, _ = batch(model.config, (2, 8))
    found = model.hidden_states(ids, padded(np.array(lengths), 8, model)).data
    for row, length in enumerate(lengths):
        alone = model.hidden_states(ids[row : row + 1, :length]).data[0]
        assert_close(found[row, :length], alone, f"{length} tokens", 1e-12)


# ------------------------------------------------------------------------------------- configs

# rope_scaling as published, and what it means for a model whose heads have 128 channels
PUBLISHED = {
    "Qwen2.5": (dict(type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
    "Qwen3": (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
    "DeepSeek": (dict(type="yarn", factor=16, original_max_position_embeddings=4096, beta_fast=32,
                      beta_slow=1, mscale=1.0, mscale_all_dim=1.0), 65536),
    "InternLM2": (dict(type="dynamic", factor=2.0), 65536),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_long_contexts_load(name):
    scaling, context = PUBLISHED[name]
    config = LlamaConfig.from_dict(
        dict(max_position_embeddings=32768, rope_theta=1e6, rope_scaling=scaling, model_type="llama")
    )
    assert config.context == context
    theirs = transformers.LlamaConfig(max_position_embeddings=32768, rope_theta=1e6, rope_scaling=scaling)
    assert {key: x for key, x in theirs.rope_parameters.items() if key != "type"} == config.rope_parameters


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_the_length_in_training_is_the_context_if_omitted_as_in_transformers(kind):
    given = {name: x for name, x in ROPES[kind].items() if name != "original_max_position_embeddings"}
    given |= {"attention_factor": None}  # null: not given
    config = LlamaConfig(**SMALL_LLAMA, rope_parameters=given)
    assert config.rope_parameters["original_max_position_embeddings"] == 8
    assert "attention_factor" not in config.rope_parameters
    theirs = transformers.LlamaConfig(**SMALL_LLAMA, rope_parameters=given)
    assert theirs.rope_parameters["original_max_position_embeddings"] == 8
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


YARN, LONG, NULL = ROPES["yarn"], ROPES["longrope"], {"rope_theta": None}
BAD = {
    "unknown": (dict(rope_type="ntk"), "rope_type 'ntk' is not supported; .*yarn, longrope"),
    "no factor": (dict(rope_type="yarn", rope_theta=50.0), "'yarn' must be factor, .* and may be atten"),
    "another type's": (YARN | dict(low_freq_factor=1.0), "may be .*truncate, not .*low_freq_factor"),
    "truth": (YARN | dict(truncate=1), "truncate .* must be true or false, not 1"),
    "text": (YARN | dict(mscale="1"), "mscale .* must be a positive number, not '1'"),
    "true": (YARN | dict(mscale=True), "mscale .* must be a positive number, not True"),
    "huge": (YARN | dict(factor=10**400), "factor .* must be a positive number, not 1000"),
    "a list": (dict(rope_type=["yarn"]), r"rope_type \['yarn'\] is not supported"),
    "betas": (YARN | dict(beta_slow=8.0), r"beta_slow \(8.0\) .* must be below beta_fast \(8.0\)"),
    "beta": (YARN | dict(beta_fast=0.5), r"beta_slow \(1\) .* must be below beta_fast \(0.5\)"),
    "theta": (YARN | dict(rope_theta=1.0), "rope_theta .* must be above 1, not 1.0"),
    "thetas": (dict(rope_theta=[50.0, 9.0]), r"rope_theta .* must be a positive number, not \[50.0, 9.0\]"),
    "too few": (LONG | dict(long_factor=[1.0]), r"long_factor .* list of 2 numbers, not \[1.0\]"),
    "no list": (LONG | dict(short_factor=2.0), "short_factor .* list of 2 numbers, not 2.0"),
    "zero": (LONG | dict(short_factor=[1.0, 0.0]), "short_factor .* a positive number, not 0.0"),
    "one position": (LONG | dict(original_max_position_embeddings=1), "embeddings .* above 1, not 1"),
}


@pytest.mark.parametrize(("parameters", "message"), BAD.values(), ids=BAD)
def test_invalid_parameters_are_refused(parameters, message):
    with pytest.raises(Error, match=message):
        LlamaConfig(**SMALL_LLAMA, rope_parameters=parameters)
    with pytest.raises(Error):
        checked_rope(parameters, 8, 2)


@pytest.mark.parametrize(("config", "null"), [(MixtralConfig, NULL), (Gemma3Config, {FULL: NULL})])
def test_theta_of_null_is_the_default(config, null):
    assert config(rope_parameters=null) == config()


def test_dynamic_needs_two_pairs_of_channels():
    with pytest.raises(Error, match="'dynamic' needs a head_dim above 2"):
        LlamaConfig(**SMALL_LLAMA | dict(head_dim=2), rope_parameters=ROPES["dynamic"])
    assert Llama(LlamaConfig(**SMALL_LLAMA, rope_parameters=ROPES["dynamic"]), rng=None).context == 16

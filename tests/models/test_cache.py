"""The key-value cache: equal tokens with and without it, prompts of any length, the end of the context.

Tokens are compared in float64, where rounding does not change a sampled token.
"""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig, Tensor, generate, no_grad
from tinyllm import functional as F
from tinyllm.backend import autocast, threads
from tinyllm.errors import Error
from tinyllm.inference.sampling import choose_tokens
from tinyllm.models import Mistral, MistralConfig

GPT2_SIZES = dict(vocab_size=13, n_positions=8, n_embd=12, n_layer=2, n_head=3)
DROPOUTS = dict(embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)  # disabled in generation
LLAMA_SIZES = dict(
    vocab_size=13, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=8, attention_dropout=0.2,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=50.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=12,
)  # fmt: skip


def build(config, dtype=np.float64, put=np.asarray):
    """A model whose next-token distribution is far from uniform and depends on the whole text."""
    rng = np.random.default_rng(5)
    model = (GPT2 if isinstance(config, GPT2Config) else Llama)(config, rng=rng)
    for parameter in model.parameters():
        parameter.replace(put((parameter.data + 0.4 * rng.standard_normal(parameter.shape)).astype(dtype)))
    return model


GPT2_CONFIG = GPT2Config(**GPT2_SIZES, **DROPOUTS)
LLAMA_CONFIG = LlamaConfig(**LLAMA_SIZES, rope_parameters=LLAMA3_ROPE, attention_bias=True)
CONFIGS = {"gpt2": GPT2_CONFIG, "llama": LLAMA_CONFIG}
both_models = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@st.composite
def gpt2_configs(draw):
    heads = draw(st.integers(1, 3))
    return GPT2Config(
        vocab_size=draw(st.integers(2, 20)),
        n_positions=draw(st.integers(1, 10)),
        n_embd=heads * draw(st.integers(1, 5)),
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        tie_word_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        **DROPOUTS,
    )


@st.composite
def llama_configs(draw):
    G, R = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return LlamaConfig(
        vocab_size=draw(st.integers(2, 20)),
        hidden_size=G * R * draw(st.integers(1, 4)),
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=G * R,
        num_key_value_heads=G,
        head_dim=2 * draw(st.integers(1, 3)),
        max_position_embeddings=draw(st.integers(1, 10)),
        rope_parameters=draw(st.sampled_from([{}, LLAMA3_ROPE])),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
    )


def prompts_for(config, rows, seed):
    """Prompts of different length, from one token to the context."""
    rng = np.random.default_rng(seed)
    context = config.n_positions if isinstance(config, GPT2Config) else config.max_position_embeddings
    lengths = rng.integers(1, context + 1, rows)
    return [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]


class Uniforms(np.random.Generator):
    """A generator with known numbers: step t gets row t of the table."""

    def __init__(self, table):
        super().__init__(np.random.PCG64(0))
        self.rows = iter(table)

    def random(self, size):
        return next(self.rows)


def text(*args, **options):
    """(steps, B) ids."""
    return np.array(list(generate(*args, **options)))


def logits_of(model, ids, **options):
    with no_grad():
        return model.eval()(np.asarray(ids), **options).data


# --------------------------------------------------------------------- the same with and without


@settings(max_examples=60)
@example(config=GPT2_CONFIG, rows=3, temperature=1.0, stops=False, seed=0)
@example(config=LLAMA_CONFIG, rows=3, temperature=1.0, stops=False, seed=0)
@example(config=LLAMA_CONFIG, rows=2, temperature=0, stops=True, seed=3)
@given(
    config=gpt2_configs() | llama_configs(),
    rows=st.integers(1, 4),
    temperature=st.sampled_from([0, 1.0, 1.7]),
    stops=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_tokens_are_equal_with_and_without_the_cache(config, rows, temperature, stops, seed):
    model, prompts = build(config), prompts_for(config, rows, seed)
    options = dict(temperature=temperature, stop_ids=[seed % config.vocab_size] if stops else ())

    def tokens(**more):
        return text(model, prompts, 14, rng=np.random.default_rng(seed), **options, **more).tolist()

    assert tokens() == tokens(use_cache=False)


@settings(max_examples=60)
@example(config=GPT2_CONFIG, rows=3, temperature=1.0, seed=1)
@example(config=LLAMA_CONFIG, rows=3, temperature=1.0, seed=1)
@given(
    config=gpt2_configs() | llama_configs(),
    rows=st.integers(2, 4),
    temperature=st.sampled_from([0, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_of_a_padded_batch_are_independent(config, rows, temperature, seed):
    model, prompts = build(config), prompts_for(config, rows, seed)
    table = np.random.default_rng(seed).random((14, rows))
    together = text(model, prompts, 14, temperature, rng=Uniforms(table))
    for i, prompt in enumerate(prompts):
        alone = text(model, [prompt], 14, temperature, rng=Uniforms(table[:, [i]]))[:, 0]
        # A batch of Llama ends when its longest row fills the context.
        assert alone[: len(together)].tolist() == together[:, i].tolist()


@both_models
@pytest.mark.parametrize("chunks", [[8], [1] * 8, [5, 1, 1, 1], [3, 4, 1], [1, 7]])
@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-13), (np.float32, 1e-5)])
def test_logits_do_not_depend_on_how_the_text_is_split(config, chunks, dtype, bound):
    """Within ``bound`` of the largest logit."""
    model = build(config, dtype)
    ids = np.random.default_rng(0).integers(0, 13, (2, 8))
    whole = logits_of(model, ids)  # (B, T, V)
    cache, parts = model.new_cache(2), []
    for part in np.split(ids, np.cumsum(chunks)[:-1], axis=1):
        parts.append(logits_of(model, part, cache=cache))
    assert cache.texts == ids.tolist()
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() <= bound * np.abs(whole).max()


@both_models
def test_rows_of_different_length_are_independent(config):
    """Filled one by one, then extended together, by one and by two tokens."""
    model = build(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 13, length).tolist() for length in (3, 5, 1)]
    cache = model.new_cache(3)
    for i, prompt in enumerate(prompts):
        logits_of(model, [prompt], cache=cache[i : i + 1])
    assert cache.texts == prompts and cache.lengths.tolist() == [3, 5, 1]
    one = logits_of(model, [[1], [2], [3]], cache=cache)
    two = logits_of(model, [[4, 5], [6, 7], [8, 9]], cache=cache)
    for row, prompt in enumerate(prompts):
        text = [*prompt, 1 + row, 4 + 2 * row, 5 + 2 * row]
        alone = logits_of(model, [text])[0, -3:]
        result = np.concatenate([one[row], two[row]])
        assert np.abs(result - alone).max() <= 1e-13 * np.abs(alone).max()


@both_models
def test_prompt_is_prefilled_once_and_decoding_computes_one_token(config):
    model = build(config)
    with mock.patch.object(type(model), "forward", autospec=True, side_effect=type(model).forward) as forward:
        text(model, [[1, 2, 3], [4]], 5)
        seen = [call.args[1].shape for call in forward.call_args_list]
    assert seen == [(1, 3), (1, 1)] + [(2, 1)] * 4


# ----------------------------------------------------------------------- the end of the context


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("prompts", "tokens"), [([[1]], 8), ([[1] * 8], 1), ([[1], [2] * 5], 4)])
def test_llama_stops_when_the_longest_row_fills_the_context(prompts, tokens, use_cache):
    model = build(LLAMA_CONFIG)
    assert len(text(model, prompts, 20, use_cache=use_cache)) == tokens
    assert len(text(model, prompts, tokens - 1, use_cache=use_cache)) == tokens - 1


def sliding_logits(model, ids):
    """Logits of the last of ``ids`` (T,), from one pass without a cache of a model with a larger context.

    A mask excludes dropped tokens: when eight entries are cached, the two oldest are dropped before the next.
    """
    oldest, allowed = 0, np.zeros((len(ids), len(ids)), bool)
    for t in range(len(ids)):
        oldest += 2 if t - oldest == 8 else 0
        allowed[t, oldest : t + 1] = True
    attention = F.scaled_dot_product_attention

    def masked(q, k, v, mask, dropout_p, is_causal, **options):
        return attention(q, k, v, allowed, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", masked):
        return logits_of(model, [ids], last_only=True)[:, 0]  # (1, V)


@pytest.mark.parametrize("prompt", [[1, 2, 3], [5, 3, 8, 1, 2, 9, 4, 7]])
def test_sliding_llama_drops_the_oldest_quarter_of_the_cache(prompt):
    model, table = build(LLAMA_CONFIG), np.random.default_rng(0).random((30, 1))
    larger = Llama(replace(LLAMA_CONFIG, max_position_embeddings=64), rng=None).astype(np.float64)
    larger.load_state_dict(model.state_dict())
    logits = []

    def recording(scores, *args):
        logits.append(scores)
        return choose_tokens(scores, *args)

    with mock.patch.dict(generate.__globals__, choose_tokens=recording):
        tokens = text(model, [prompt], 30, rng=Uniforms(table), slide=True)[:, 0].tolist()
    assert len(tokens) == len(logits) == 30
    for step, scores in enumerate(logits):
        expected = sliding_logits(larger, prompt + tokens[:step])
        assert np.abs(scores - expected).max() <= 1e-12 * np.abs(expected).max(), step


def test_sliding_llama_differs_from_recomputing_the_window():
    model, prompt = build(LLAMA_CONFIG), [[1, 2, 3]]
    kept, again = (text(model, prompt, 30, 0, slide=True, use_cache=cached) for cached in (True, False))
    assert len(kept) == len(again) == 30
    assert np.array_equal(kept[:6], again[:6])  # until the context is full nothing is dropped
    assert not np.array_equal(kept, again)


def test_sliding_batch_continues_every_row():
    model = build(LLAMA_CONFIG)
    prompts, table = [[1, 2, 3, 4, 5, 6, 7], [8]], np.random.default_rng(0).random((40, 2))
    tokens = text(model, prompts, 40, slide=True, rng=Uniforms(table))
    assert tokens.shape == (40, 2)
    for i, prompt in enumerate(prompts):
        alone = text(model, [prompt], 40, slide=True, rng=Uniforms(table[:, [i]]))[:, 0]
        assert tokens[:, i].tolist() == alone.tolist()


def test_slide_has_no_effect_on_gpt2():
    model = build(GPT2_CONFIG)
    slid, plain = (
        text(model, [[1, 2]], 20, slide=slide, rng=np.random.default_rng(0)) for slide in (True, False)
    )
    assert len(slid) == 20 and np.array_equal(slid, plain)


def test_context_of_one_token_slides():
    model = build(replace(LLAMA_CONFIG, max_position_embeddings=1))
    tokens = text(model, [[3]], 5, temperature=0, slide=True)[:, 0].tolist()
    expected = [3]
    for _ in range(5):
        expected.append(int(logits_of(model, [[expected[-1]]])[0, 0].argmax()))
    assert tokens == expected[1:]


@pytest.mark.parametrize("window", [3, 5, 20])
def test_a_model_with_windows_only_slides(window):
    """Rotations depend on distances only, so the text is that of a longer context, with the same window."""
    sizes = {name: value for name, value in LLAMA_SIZES.items() if name != "max_position_embeddings"}
    config = MistralConfig(**sizes, max_position_embeddings=8, sliding_window=window)
    model = Mistral(config, rng=3).astype(np.float64).eval()
    larger = Mistral(replace(config, max_position_embeddings=64), rng=None).astype(np.float64)
    larger.load_state_dict(model.state_dict())
    slid = text(model, [[1, 2, 3], [4]], 40, rng=np.random.default_rng(0), slide=True)
    assert len(slid) == 40
    if window < 8:
        plain = text(larger, [[1, 2, 3], [4]], 40, rng=np.random.default_rng(0))
        np.testing.assert_array_equal(slid, plain)


# ------------------------------------------------------------------------------- the cache itself


@both_models
def test_cache_size_is_that_of_keys_and_values(config):
    model = build(config, np.float32)
    cache = model.new_cache(3, 5)
    heads = 3 if isinstance(config, GPT2Config) else 2  # six query heads of Llama share two key-value heads
    for entries in cache.keys + cache.values:
        assert (entries.shape, entries.dtype) == ((3, heads, 5, 4), np.float32)
    assert len(cache.keys) == len(cache.values) == 2  # layers
    assert (cache.texts, cache.capacity) == ([[], [], []], 5)
    assert model.new_cache(1).capacity == model.new_cache(1, 10**9).capacity == 8  # the context


@both_models
def test_autocast_does_not_change_the_cache_on_a_cpu(config):
    model = build(config)
    with autocast("bfloat16"):
        cache = model.new_cache(1)
        logits = logits_of(model, [[1, 2, 3]], cache=cache)
    assert cache.keys[0].dtype == np.float64
    assert np.array_equal(logits, logits_of(model, [[1, 2, 3]]))


def watched_caches(model):
    """A list to which (capacity, weak reference) of every cache the model creates is appended."""
    caches = []

    def new_cache(*args):
        cache = type(model).new_cache(model, *args)
        caches.append((cache.capacity, weakref.ref(cache)))
        return cache

    model.new_cache = new_cache
    return caches


@both_models
def test_generate_allocates_capacity_for_prompt_and_new_tokens_only(config):
    model = build(config)
    caches = watched_caches(model)
    for tokens in (3, 1000):
        next(generate(model, [[1, 2], [3]], tokens))
    assert [capacity for capacity, _ in caches] == [5, 8]


def test_attention_reads_cached_keys_without_a_copy():
    cache = build(LLAMA_CONFIG).new_cache(2, 6)
    layer = cache.layers(2, 4)[1]
    new = [Tensor(np.random.default_rng(i).standard_normal((2, 2, 4, 4))) for i in range(2)]
    for kept, whole, given_now in zip((cache.keys[1], cache.values[1]), layer.extend(*new), new):
        assert np.shares_memory(whole.data, kept) and np.array_equal(whole.data, given_now.data)
    assert cache.texts == [[], []]  # until the forward pass is complete


@both_models
def test_failed_forward_pass_leaves_the_cache_unchanged(config):
    model = build(config)
    ids = np.array([[1, 2, 3]])
    cache = model.new_cache(1)
    logits_of(model, ids, cache=cache)
    failing = mock.patch.object(F, "scaled_dot_product_attention", side_effect=ZeroDivisionError)
    with failing, pytest.raises(ZeroDivisionError):
        logits_of(model, [[4]], cache=cache)
    assert cache.texts == [[1, 2, 3]]
    expected = logits_of(model, [[1, 2, 3, 5]])[:, -1]
    result = logits_of(model, [[5]], cache=cache)[:, 0]
    assert np.abs(result - expected).max() <= 1e-13 * np.abs(expected).max()


@pytest.mark.parametrize("count", [4, -1, np.array([3, 0]), np.array([0, -1])])
def test_dropping_more_than_a_row_holds_is_refused(count):
    model = build(LLAMA_CONFIG)
    cache = model.new_cache(2)
    with no_grad():
        model([[1, 2, 3]], cache=cache[:1])
        model([[4, 5]], cache=cache[1:])
    with pytest.raises(Error, match=r"cannot drop .*\[3, 2\]"):
        cache.drop_oldest(count if np.ndim(count) == 0 else count + np.array([1, 0]))
    assert cache.free.tolist() == [5, 6]
    cache.drop_oldest(1)
    with pytest.raises(Error, match=r"cannot drop .*\[2, 1\]"):
        cache.drop_oldest(2)
    assert cache.free.tolist() == [6, 7]


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_a_row_whose_entries_were_being_moved_is_cleared(moved):
    """An interrupt, or memory that is full, must not leave some layers moved and others not."""
    model = build(LLAMA_CONFIG)
    cache = model.new_cache(2)

    class Interrupted(np.ndarray):
        left = moved

        def copy(self):
            if Interrupted.left == 0:
                raise KeyboardInterrupt
            Interrupted.left -= 1
            return super().copy()

    with no_grad():
        model([[1, 2, 3], [4, 5, 6]], cache=cache)
    cache.keys = [keys.view(Interrupted) for keys in cache.keys]
    cache.values = [values.view(Interrupted) for values in cache.values]
    with pytest.raises(KeyboardInterrupt):
        cache.drop_oldest(np.array([0, 2]))
    assert cache.texts == [[1, 2, 3], []]
    assert cache.dropped[None].tolist() == [0, 0]


def test_a_smaller_capacity_must_hold_what_every_layer_holds():
    config = MistralConfig(**LLAMA_SIZES | dict(max_position_embeddings=300), sliding_window=100)
    cache = Mistral(config, rng=3).new_cache(1, 250)
    cache.texts[0][:] = [1] * 220
    cache.dropped[None] += 120
    with pytest.raises(Error, match="holds 220 tokens, more than a capacity of 210"):
        cache.with_capacity(210)
    assert cache.with_capacity(230).texts == cache.texts


@pytest.mark.parametrize("cache", ["a cache", 3, build(LLAMA_CONFIG)], ids=["a text", "a number", "a model"])
def test_what_is_not_a_cache_is_refused(cache):
    with pytest.raises(Error, match=r"cache has 0 layers and the model 2: create one with new_cache"):
        build(LLAMA_CONFIG)([[1]], cache=cache)


@pytest.mark.parametrize("arguments", [(0,), (-1,), (1, 0), (1, -5), (1, 2.5)])
def test_a_cache_needs_a_row_and_a_column(arguments):
    with pytest.raises(Error, match="at least 1"):
        build(LLAMA_CONFIG).new_cache(*arguments)


@both_models
def test_ids_that_exceed_the_cache_are_refused(config):
    model = build(config)
    cache = model.new_cache(2, 5)
    logits_of(model, [[1, 2, 3], [4, 5, 6]], cache=cache)
    for ids in ([[1, 2, 3], [4, 5, 6]], [[1]]):
        with pytest.raises(Error, match="cache of 2 rows that hold 3 of at most 5 tokens"):
            logits_of(model, ids, cache=cache)
    with pytest.raises(Error, match=r"under no_grad\(\)"):
        model(np.array([[1], [2]]), cache=cache)
    assert cache.texts == [[1, 2, 3], [4, 5, 6]]


def test_ids_that_exceed_one_of_the_rows_are_refused():
    model = build(LLAMA_CONFIG)
    cache = model.new_cache(2, 4)
    logits_of(model, [[1, 2, 3]], cache=cache[:1])
    logits_of(model, [[1]], cache=cache[1:])
    with pytest.raises(Error, match="cache of 2 rows that hold 3, 1 of at most 4 tokens"):
        logits_of(model, [[1, 2], [3, 4]], cache=cache)


@pytest.mark.parametrize("trained", ["k_proj", "v_proj"])
def test_a_cache_refuses_keys_or_values_with_a_graph(trained):
    model = build(LLAMA_CONFIG)
    model.requires_grad_(False)
    getattr(model.layers[0].self_attn, trained).weight.requires_grad = True
    with pytest.raises(Error, match=r"under no_grad\(\)"):
        model([[1, 2]], cache=model.new_cache(1))


def test_drop_oldest_preserves_positions():
    model = build(LLAMA_CONFIG)
    cache = model.new_cache(2, 6)
    logits_of(model, np.ones((2, 4), int), cache=cache)
    logits_of(model, [[2, 3]], cache=cache[:1])
    for entries in cache.keys + cache.values:
        entries[...] = np.arange(6)[:, None]
    assert cache.positions(2).tolist() == [[6, 7], [4, 5]] and cache.free.tolist() == [0, 2]
    cache.drop_oldest([2, 0])
    assert cache.positions(1).tolist() == [[6], [4]] and cache.free.tolist() == [2, 2]
    for entries in cache.keys + cache.values:
        assert (entries[0, :, :4] == np.arange(2, 6)[:, None]).all()
        assert (entries[1, :, :4] == np.arange(4)[:, None]).all()
    assert cache.layers(2, 1)[0].place.mask is None  # both rows hold four entries


@both_models
def test_abandoned_iterator_frees_its_cache(config):
    model = build(config)
    caches = watched_caches(model)
    gc.collect()
    gc.disable()  # reference counting must suffice
    try:
        steps = generate(model, [[1, 2]], 5)
        next(steps), next(steps)
        assert [cache() is not None for _, cache in caches] == [True]
        del steps
        assert [cache() for _, cache in caches] == [None]
        list(generate(model, [[1, 2]], 2))
        assert [cache() for _, cache in caches] == [None, None]
    finally:
        gc.enable()


def test_gpt2_frees_its_cache_when_the_window_slides():
    model = build(GPT2_CONFIG)
    caches = watched_caches(model)
    freed = [caches[0][1]() is None for _ in generate(model, [[1] * 6], 6)]
    assert freed == [False] * 3 + [True] * 3  # it is used for 6, 7 and 8 tokens


@both_models
def test_recording_and_training_mode_are_restored_between_steps(config):
    model = build(config).train()
    x = Tensor(np.array([3.0]), requires_grad=True)
    for _ in generate(model, [[1]], 3):
        assert all(module.training for _, module in model.named_modules())
        (x * x).sum().backward()
    assert x.grad.tolist() == [18.0]


@both_models
@pytest.mark.parametrize("slide", [False, True])
def test_generation_on_the_device(config, slide, put):
    """Only ids are copied to the device and logits back: the device array refuses implicit copies."""
    host, there = build(config), build(config, put=put)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert isinstance(there.new_cache(1).keys[0], type(put(np.zeros(1))))
    expected, tokens = (
        text(model, prompts, 20, slide=slide, rng=np.random.default_rng(0)) for model in (host, there)
    )
    assert np.array_equal(tokens, expected)


@both_models
@pytest.mark.parametrize("threads_sleep", [True, False])
def test_decoding_step_uses_one_blas_thread_unless_idle_threads_sleep(monkeypatch, config, threads_sleep):
    limits_set = []

    library = SimpleNamespace(get_num_threads=lambda: 2, set_num_threads=limits_set.append)
    monkeypatch.setattr(threads, "_BLAS_THREADS_SLEEP", threads_sleep)
    monkeypatch.setattr(threads._Workers, "blas", [library])
    list(generate(build(config), [[1]], 3))
    assert limits_set == ([] if threads_sleep else [1, 2] * 3)

"""Rows of a cache that join, leave, go back and lose their oldest tokens: always equal to no cache at all.

In float64, within 1e-10 of the largest logit.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig, generate, nn, no_grad
from tinyllm.errors import Error
from tinyllm.models import cache as cache_module
from tinyllm.models.cache import Cache

CONTEXT = 24


class Window(nn.Module):
    """The same as a mask, for a forward pass without a cache."""

    def __init__(self, window):
        self.window = window

    def forward(self, distances):  # (T, S)
        return np.where(distances < self.window, 0.0, -np.inf)


def build(windows, masked=False):
    """A model with one layer for each item of ``windows``: with "gpt2" a GPT-2, else a Llama.

    With ``masked`` its windows hold without a cache, too.
    """
    rng = np.random.default_rng(5)
    if windows == "gpt2":
        sizes = dict(vocab_size=13, n_positions=CONTEXT, n_embd=8, n_layer=2, n_head=2)
        model = GPT2(GPT2Config(**sizes), rng=rng)
    else:
        own = {"windows": windows, "window_of": lambda self, layer: windows[layer]}
        model = Llama(
            type("WindowedConfig", (LlamaConfig,), own)(
                vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=len(windows),
                num_attention_heads=4, num_key_value_heads=2, head_dim=2, max_position_embeddings=CONTEXT,
            ),
            rng=rng,
        )  # fmt: skip
        for layer, window in zip(model.layers, windows):
            layer.self_attn.score_bias = Window(window) if masked and window else None
    for parameter in model.parameters():
        parameter.replace(parameter.data + 0.5 * rng.standard_normal(parameter.shape))
    return model.astype(np.float64).eval()


MODELS = ["gpt2", (None, None), (3, None), (3, 5), (1, 30)]
models = {windows: build(windows) for windows in MODELS}
references = {models[windows]: build(windows, masked=True) for windows in MODELS}


def logits_of(model, ids, cache=None):
    with no_grad():
        return model(np.asarray(ids), cache=cache).data


def expect_logits(model, cache: Cache, logits):
    """Compare the logits (B, T, V) of a pass with those of every row's whole text without a cache."""
    for text, found in zip(cache.texts, logits):
        expected = logits_of(references[model], [text])[0, -len(found) :]
        assert np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max(), text


@pytest.fixture
def small_slack(monkeypatch):
    """Windows whose entries move often."""
    monkeypatch.setattr(cache_module, "SLACK", 2)


actions = st.lists(
    st.tuples(
        st.sampled_from([*3 * ["extend"], "rollback", "clear", "copy", "swap", "grow", "prefix"]),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(1, 8),
    ),
    max_size=16,
)


def apply(model, cache, action, i, j, n, rng):
    """One action on a cache of three rows; returns the cache, which "grow" replaces."""
    before = [list(text) for text in cache.texts]
    if action == "extend":
        rows = slice(min(i, j), max(i, j) + 1)
        n = min(n, cache.free[rows].min())
        if n:
            ids = rng.integers(0, 13, (len(before[rows]), n))
            expect_logits(model, cache[rows], logits_of(model, ids, cache[rows]))
            assert cache.texts[rows] == [[*old, *new] for old, new in zip(before[rows], ids.tolist())]
    elif action == "rollback":
        counts = np.zeros(3, int)
        counts[i] = n
        try:
            cache.rollback(counts)
        except Error:
            windows = getattr(model.config, "windows", ())
            assert n > len(before[i]) or any(windows)
            assert cache.texts == before
        else:
            assert cache.texts[i] == before[i][:-n]
    elif action == "clear":
        cache[i : i + 1].clear()
        assert cache.texts[i] == []
    elif action == "copy":
        view, length = cache[j : j + 1], None if any(getattr(model.config, "windows", ())) else n
        cache.copy_row(i, j, length)
        assert cache.texts[j] == before[i][:length] and (i == j or cache.texts[j] is not cache.texts[i])
        assert view.texts == [cache.texts[j]]
    elif action == "swap":
        views = cache[i : i + 1], cache[j : j + 1]
        cache.swap_rows(i, j)
        assert (cache.texts[i], cache.texts[j]) == (before[j], before[i])
        assert [view.texts for view in views] == [[before[j]], [before[i]]]
    elif action == "grow":
        grown = cache.with_capacity(min(CONTEXT, cache.capacity + n))
        cache.clear()  # it is another one
        assert grown.texts == before
        return grown
    else:  # go on from a part of each text
        texts = [[*text[: rng.integers(len(text) + 1)], 12] for text in before]
        cache.keep_prefix(texts)
        for old, text, new in zip(cache.texts, texts, before):
            assert old == text[: len(old)] == new[: len(old)] and len(old) < len(text)
            assert (
                len(old) == len(text) - 1 or any(getattr(model.config, "windows", ())) or new[len(old)] == 12
            )
    return cache


@pytest.mark.usefixtures("small_slack")
@settings(max_examples=150)
@given(windows=st.sampled_from(MODELS), actions=actions, seed=st.integers(0, 2**32 - 1))
def test_rows_that_join_leave_and_go_back_equal_no_cache(windows, actions, seed):
    model, rng = models[windows], np.random.default_rng(seed)
    cache = model.new_cache(3, 16)
    for action in actions:
        cache = apply(model, cache, *action, rng)
    n = min(2, cache.free.min())
    if n:
        expect_logits(model, cache, logits_of(model, rng.integers(0, 13, (3, n)), cache))


@pytest.mark.parametrize("windows", [(3, None), (1, 30)])
def test_layer_with_a_window_stores_little_more_and_goes_back_by_the_slack(windows, small_slack):
    model, ids = models[windows], np.random.default_rng(0).integers(0, 13, CONTEXT).tolist()
    assert {keys.shape[2] for keys in model.new_cache(1).keys} == {windows[0] + 4, CONTEXT}
    for chunk in (1, 2, 5, 20):
        cache = model.new_cache(1)
        for start in range(0, 20, chunk):
            logits_of(model, [ids[start : start + chunk]], cache)
            back = min(2, chunk + start)
            cache.rollback(back)
            expect_logits(model, cache, logits_of(model, [ids[start + chunk - back : start + chunk]], cache))
        assert cache.texts == [ids[:20]]
        with pytest.raises(Error, match="cannot roll back 12 tokens"):
            cache.rollback(12)
        assert cache.texts == [ids[:20]]


@pytest.mark.usefixtures("small_slack")
@pytest.mark.parametrize("count", range(1, 9))
def test_rollback_goes_as_far_as_the_window_of_the_next_token_is_held(count):
    model, ids = models[3, None], [5, 3, 8, 1, 2, 9, 4, 7]
    cache = model.new_cache(1)
    for token in ids:
        logits_of(model, [[token]], cache)
    assert cache.dropped[3].tolist() == [3]  # so the next token is in position 5, 3 and 4 before it, or later
    if count <= 3:
        cache.rollback(count)
        expect_logits(model, cache, logits_of(model, [[6]], cache))
    else:
        with pytest.raises(Error, match=f"cannot roll back {count} tokens"):
            cache.rollback(count)
    assert cache.texts == [[*ids[: 8 - count], 6] if count <= 3 else ids]


@pytest.mark.usefixtures("small_slack")
def test_a_prompt_longer_than_a_window_holds_is_processed_in_its_dtype():
    model = build((3, 5)).astype(np.float32)
    cache = model.new_cache(2)
    assert cache.keys[0].shape[2] < 20 and cache.keys[0].dtype == np.float32
    assert logits_of(model, np.ones((2, 20), int), cache).dtype == np.float32


@pytest.mark.usefixtures("small_slack")
@pytest.mark.parametrize("windows", MODELS)
def test_failed_pass_changes_nothing(windows, monkeypatch):
    """Also if the entries of a window were moved, and if the pass was longer than the window."""
    model, rng = models[windows], np.random.default_rng(0)
    for count in (1, 3, 9):
        cache = model.new_cache(2)
        expect_logits(model, cache, logits_of(model, rng.integers(0, 13, (2, 7)), cache))
        with monkeypatch.context() as patch:
            last = getattr(model, model.blocks)[-1]
            patch.setattr(type(last.mlp), "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                logits_of(model, rng.integers(0, 13, (2, count)), cache)
        assert cache.lengths.tolist() == [7, 7]
        expect_logits(model, cache, logits_of(model, rng.integers(0, 13, (2, 3)), cache))


@pytest.mark.parametrize("count", [-1, 4, [1, 4]])
def test_rollback_by_more_than_there_is(count):
    model = models[None, None]
    cache = model.new_cache(2)
    logits_of(model, [[1, 2, 3], [4, 5, 6]], cache)
    with pytest.raises(Error, match="cannot roll back"):
        cache.rollback(np.array(count))
    assert cache.texts == [[1, 2, 3], [4, 5, 6]]


def test_capacity_below_the_content_is_refused():
    cache = models["gpt2"].new_cache(2)
    logits_of(models["gpt2"], [[1, 2, 3], [4, 5, 6]], cache)
    with pytest.raises(Error, match="holds 3 tokens"):
        cache.with_capacity(2)
    assert cache.with_capacity(3).texts == cache.texts


# ------------------------------------------------------------------------- generate with a cache


def tokens_of(model, prompts, count, **options):
    return np.array(list(generate(model, prompts, count, rng=0, **options))).T.tolist()


@pytest.mark.parametrize("windows", MODELS)
def test_second_turn_processes_new_tokens_only(windows, monkeypatch):
    model = models[windows]
    cache, seen = model.new_cache(2), []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, ids, **more: seen.append(ids.shape) or forward(self, ids, **more)
    )
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    answers = tokens_of(model, prompts, 4, cache=cache)
    assert seen == [(1, 3), (1, 4), (2, 1), (2, 1), (2, 1)]
    turns = [[*p, *a, 8, 9] for p, a in zip(prompts, answers)]
    seen.clear()
    again = tokens_of(model, turns, 3, cache=cache)
    assert seen == [(2, 3), (2, 1), (2, 1)]  # the last sampled token was not processed before
    assert again == tokens_of(model, turns, 3) == tokens_of(references[model], turns, 3, use_cache=False)
    seen.clear()
    other = [[*turns[0][:5], 11], [10, 11]]
    assert tokens_of(model, other, 2, cache=cache) == tokens_of(model, other, 2)
    assert seen[0] in ((1, 1), (1, 6)) and seen[1] == (1, 2)


def test_row_whose_oldest_tokens_were_dropped_is_processed_again():
    model = models[None, None]
    cache = model.new_cache(1)
    first = tokens_of(model, [[1, 2, 3]], 30, cache=cache, slide=True)[0]
    prompt = [1, 2, 3, *first[:10]]
    assert cache.texts[0][: len(prompt)] == prompt and cache.dropped[None][0] > 0
    assert tokens_of(model, [prompt], 5, cache=cache) == tokens_of(model, [prompt], 5)


def test_cache_that_does_not_fit_is_refused():
    model = models["gpt2"]
    for cache, words in [
        (model.new_cache(2), "2 rows of up to 24 tokens, but 1 of up to 12"),
        (model.new_cache(1, 11), "1 rows of up to 11 tokens, but 1 of up to 12"),
        ([], "cache is a list"),
    ]:
        with pytest.raises(Error, match=words):
            generate(model, [1, 2], 10, cache=cache)
    assert len(list(generate(model, [1, 2], 10, cache=model.new_cache(1, 12)))) == 10


# -------------------------------------------------------------------------------- planted faults


def a_day_of_a_server(model):
    """Rows join, continue together, go back, leave and are replaced; every text and its logits are known."""
    cache, rng, expected = model.new_cache(3), np.random.default_rng(1), [[], [], []]

    def extend(first, stop, n):
        ids = rng.integers(0, 13, (stop - first, n))
        for text, new in zip(expected[first:stop], ids.tolist()):
            text += new
        logits = logits_of(model, ids, cache[first:stop])
        assert cache.texts == expected
        expect_logits(model, cache[first:stop], logits)

    for row, n in enumerate((5, 7, 2)):
        extend(row, row + 1, n)
    extend(0, 3, 2)
    cache.rollback(np.array([1, 2, 0]))
    del expected[0][-1:], expected[1][-2:]
    extend(0, 3, 2)
    cache[0:1].clear()
    expected[0].clear()
    extend(0, 1, 3)
    cache.copy_row(2, 1)
    expected[1][:] = expected[2]
    extend(0, 3, 1)
    extend(0, 2, 1)


def too_few(cache, count):
    for text, n in zip(cache.texts, np.broadcast_to(count, len(cache.texts))):
        del text[len(text) - max(n - 1, 0) :]


FAULTS = {
    "rollback by one too few": ("rollback", too_few),
    "every row at the position of the first": (
        "positions",
        lambda cache, count: len(cache.texts[0]) + np.arange(count),
    ),
    "a row's dropped tokens kept by its successor": (
        "clear",
        lambda cache: [text.clear() for text in cache.texts],
    ),
    "a text copied without its entries": (
        "copy_row",
        lambda cache, i, j: cache.texts[j].__setitem__(slice(None), cache.texts[i]),
    ),
}


@pytest.mark.usefixtures("small_slack")
@pytest.mark.parametrize("windows", MODELS)
def test_rows_of_a_server(windows):
    a_day_of_a_server(models[windows])


@pytest.mark.usefixtures("small_slack")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault, monkeypatch):
    monkeypatch.setattr(Cache, *FAULTS[fault])
    with pytest.raises((AssertionError, Error, ValueError, IndexError)):
        a_day_of_a_server(models[1, 30] if "dropped" in fault else models[3, None])


@pytest.mark.usefixtures("small_slack")
@pytest.mark.parametrize("change", [-1, 1])
def test_window_off_by_one_is_caught(change, monkeypatch):
    place = cache_module.Place

    def off(held, count, window, capacity):
        return place(held, count, window and window + change, capacity)

    monkeypatch.setattr(cache_module, "Place", off)
    with pytest.raises(AssertionError):
        a_day_of_a_server(models[3, 5] if change < 0 else models[3, None])

"""Batched rows equal rows alone, and a kept prefix equals none, however requests come and go."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import GEMMA2, GEMMA3, RELATIVES, ROPES, SMALL_LLAMA, random_gpt2, random_llama

from tinyllm import Error, GPT2Config, LlamaConfig, generate, nn, no_grad
from tinyllm.inference.generate import logits_of
from tinyllm.serve import scheduler as module
from tinyllm.serve.scheduler import Busy, Request, Scheduler

VOCABULARY, CONTEXT = 13, 24
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=CONTEXT,
)  # fmt: skip
GPT = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=12, n_layer=2, n_head=3,
                 embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)  # fmt: skip
WINDOW = dict(max_position_embeddings=CONTEXT, sliding_window=3)
MODELS = {
    "llama": random_llama(LLAMA),
    "gpt2": random_gpt2(GPT),
    # Windows of 3 tokens, shorter than most prompts, in every layer or in every second one
    "gemma2": random_llama(replace(GEMMA2, max_position_embeddings=CONTEXT)),
    "mistral": random_llama(RELATIVES["mistral"](**SMALL_LLAMA | WINDOW)),
    "gemma3": random_llama(replace(GEMMA3, max_position_embeddings=CONTEXT)),
}


class Listener:
    """A request that records its tokens and its end."""

    def __init__(self, ids, stop_after=None, **options):
        self.sampled, self.ends, self.stop_after = [], [], stop_after
        options = dict(max_new_tokens=6, temperature=0.0) | options
        self.request = Request(ids=ids, on_token=self.on_token, on_end=self.ends.append, **options)

    def on_token(self, sampled):
        self.sampled.append(sampled)
        return len(self.sampled) == self.stop_after

    @property
    def tokens(self):
        return [sampled.id for sampled in self.sampled]


class Nothing(nn.Module):
    def forward(self, x, *_):
        return x * 0.0


def run(scheduler, most=1000):
    for _ in range(most):
        if not scheduler.has_work:
            return
        scheduler.step()
    raise AssertionError("the requests do not end")


def submitted(scheduler, *args, **options):
    listener = Listener(*args, **options)
    scheduler.submit(listener.request)
    return listener


def log_probabilities(model, ids):
    """After ids (T,), computed anew: (V,)."""
    with no_grad():
        logits = model([ids]).data[0, -1].astype(np.float64)
    logits -= logits.max()
    return logits - np.log(np.exp(logits).sum())


def assert_as_alone(model, listener):
    """The tokens are those of ``generate``, and so are the logits they were sampled from."""
    request = listener.request
    options = dict(temperature=request.temperature, top_k=request.top_k, top_p=request.top_p)
    count = len(listener.sampled)
    alone = generate(model, [request.ids], max(count, 1), rng=request.seed, use_cache=False, **options)
    assert listener.tokens == [int(step[0]) for step, _ in zip(alone, listener.sampled)]
    text = list(request.ids)
    for sampled in listener.sampled:
        expected = log_probabilities(model, text)
        found = dict(sampled.top)
        assert sorted(found) == list(range(VOCABULARY))
        worst = max(abs(found[i] - expected[i]) for i in found)
        assert worst <= 1e-10 * np.abs(expected).max()
        assert sampled.logprob == found[sampled.id]
        text.append(sampled.id)


# Prompts share beginnings, so that prefixes are found, and some continue an earlier answer.
prompts = st.builds(
    lambda shared, own: [1, 2, 3, 4, 5, 6, 7, 8][:shared] + own,
    st.integers(0, 8), st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8),
)  # fmt: skip
actions = st.one_of(
    st.tuples(st.just("submit"), prompts, st.integers(1, 9), st.integers(0, 3), st.sampled_from([0.0, 0.8])),
    st.tuples(st.just("turn"), st.integers(0, 9), st.integers(1, 5)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
)


@pytest.mark.parametrize("name", MODELS)
@given(
    st.lists(actions, min_size=3, max_size=16), st.integers(1, 4), st.integers(1, 5),
    st.sampled_from([4, CONTEXT]), st.sampled_from([0, 8]),
)  # fmt: skip
def test_rows_are_as_alone_whatever_others_do(name, script, slots, chunk, start, steady):
    """Also if the cache grows from ``start`` tokens on, and if steps are recorded at once."""
    model = MODELS[name]
    listeners = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        patch.setattr(module, "LONG_CHUNK", 2 * chunk)
        patch.setattr(module, "START", start)
        patch.setattr(module, "STEADY", steady)
        scheduler = Scheduler(model, slots, queue=100)
        for action, *values in script:
            if action == "submit":
                ids, new, seed, temperature = values
                options = dict(max_new_tokens=new, seed=seed, temperature=temperature, top=VOCABULARY)
                listeners.append(submitted(scheduler, ids, **options))
            elif action == "turn" and listeners:  # of a conversation, perhaps before its answer is complete
                before = listeners[values[0] % len(listeners)]
                ids = [*before.request.ids, *before.tokens, 9, 10][:CONTEXT]
                listeners.append(submitted(scheduler, ids, max_new_tokens=values[1], top=VOCABULARY))
            elif action == "cancel" and listeners:
                listeners[values[0] % len(listeners)].request.cancelled = True
            elif action == "step":
                for _ in range(values[0]):
                    scheduler.step()
        run(scheduler)
    for listener in listeners:
        full = len(listener.request.ids) + len(listener.tokens) == CONTEXT + 1
        complete = len(listener.tokens) == listener.request.max_new_tokens or full
        assert listener.ends == ["length"] if complete else listener.ends == ["cancelled"]
        assert_as_alone(model, listener)
    assert scheduler.rows == [None] * slots


@pytest.mark.parametrize(("kind", "most"), [("longrope", 5), ("dynamic", 8)])
def test_texts_end_where_the_frequencies_of_positions_change(kind, most):
    """Beyond that all keys of a text would have to be rotated anew; a cache has them rotated."""
    model = random_llama(LlamaConfig(**SMALL_LLAMA, rope_parameters=ROPES[kind]))
    scheduler = Scheduler(model, 2)
    assert scheduler.capacity == most
    full = submitted(scheduler, [1, 2, 3], max_new_tokens=20, top=VOCABULARY)
    longest = submitted(scheduler, [1] * most, max_new_tokens=20, top=VOCABULARY)
    run(scheduler)
    assert (full.ends, len(full.tokens)) == (["length"], most - 2)
    assert (longest.ends, len(longest.tokens)) == (["length"], 1)
    for listener in (full, longest):
        assert_as_alone(model, listener)
    with pytest.raises(Error, match=f"a row holds {most}"):
        submitted(scheduler, [1] * (most + 1))


def test_float32_tokens_agree_except_at_near_ties():
    model = random_llama(LLAMA, dtype=np.float32)
    scheduler, rng = Scheduler(model, 4, queue=100), np.random.default_rng(0)
    listeners = []
    for _ in range(40):
        ids = rng.integers(0, VOCABULARY, rng.integers(1, 12)).tolist()
        listeners.append(submitted(scheduler, ids, max_new_tokens=int(rng.integers(1, 12))))
        for _ in range(rng.integers(0, 4)):
            scheduler.step()
    run(scheduler)
    for listener in listeners:
        text = list(listener.request.ids)
        for token in listener.tokens:
            expected = log_probabilities(model, text)
            assert expected[token] > expected.max() - 1e-4
            text.append(token)


def test_rows_that_come_and_go_repeat_recorded_calls():
    """Recorded for one row and for two, the steps serve the rows that come after them, too."""
    model = random_llama(LlamaConfig(**vars(LLAMA) | {"max_position_embeddings": 100}))
    scheduler = Scheduler(model, 2)
    listeners = [submitted(scheduler, [1, 2, 3], max_new_tokens=90)]
    for ids in ([1, 2, 4, 5], [7, 6], [8, 9, 1]):
        for _ in range(20):
            scheduler.step()
        listeners.append(submitted(scheduler, ids, max_new_tokens=16))
        if len(listeners) == 3:
            recordings = set(scheduler._run.recordings.values())
    run(scheduler)
    assert [recording.is_checked for recording in recordings] == [True, True]
    assert set(scheduler._run.recordings.values()) == recordings
    for listener in listeners:
        count = listener.request.max_new_tokens
        alone = generate(model, [listener.request.ids], count, temperature=0)
        assert listener.tokens == [int(step[0]) for step in alone]


def test_the_cache_grows_with_the_longest_text_only(monkeypatch):
    monkeypatch.setattr(module, "START", 4)
    scheduler = Scheduler(MODELS["llama"], 2)
    submitted(scheduler, [1, 2], max_new_tokens=3)
    run(scheduler)
    assert scheduler.cache.capacity == 4  # the last token is not processed
    short, long = submitted(scheduler, [1], max_new_tokens=2), submitted(scheduler, [3] * 9, max_new_tokens=2)
    run(scheduler)
    assert scheduler.cache.capacity == 18  # 4, then 9, doubled for the tenth
    monkeypatch.setattr(scheduler.cache, "with_capacity", lambda capacity: 1 / 0)  # no memory
    failed, short = submitted(scheduler, [4] * 20), submitted(scheduler, [5], max_new_tokens=5)
    run(scheduler)
    assert isinstance(failed.ends[0], ZeroDivisionError) and short.ends == long.ends == ["length"]


def test_the_cache_grows_to_the_context_at_most(monkeypatch):
    monkeypatch.setattr(module, "START", 18)
    scheduler = Scheduler(MODELS["llama"], 2)
    submitted(scheduler, [1] * 20)
    run(scheduler)
    assert scheduler.cache.capacity == CONTEXT


# ------------------------------------------------------------------------------------ prefixes


def test_cached_tokens_are_none_where_a_window_has_forgotten_them():
    model = random_llama(RELATIVES["mistral"](**SMALL_LLAMA | WINDOW | {"max_position_embeddings": 200}))
    scheduler, text = Scheduler(model, 1), [1, 2, 3, 4] * 40
    for ids in (text, [*text[:40], 9]):
        listener = submitted(scheduler, ids, max_new_tokens=1, top=VOCABULARY)
        run(scheduler)
        assert listener.request.cached_tokens == 0
        assert_as_alone(model, listener)


def test_the_next_turn_goes_to_the_row_of_its_conversation():
    scheduler = Scheduler(MODELS["llama"], 3)
    first = [submitted(scheduler, ids) for ids in ([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12])]
    run(scheduler)
    turn = submitted(scheduler, [*first[1].request.ids, *first[1].tokens, 3])
    run(scheduler)
    # All that was processed is kept: the last token of the answer was not.
    assert turn.request.cached_tokens == 4 + len(first[1].tokens) - 1


def test_a_new_conversation_takes_the_row_that_was_idle_for_longest():
    scheduler = Scheduler(MODELS["llama"], 3)
    for ids in ([1, 2], [3, 4], [5, 6], [1, 2]):  # the first conversation is used again
        submitted(scheduler, ids, max_new_tokens=1)
        run(scheduler)
    submitted(scheduler, [7, 8], max_new_tokens=1)
    run(scheduler)
    assert sorted(scheduler.cache.texts) == [[1, 2], [5, 6], [7, 8]]


def test_a_row_that_is_moved_keeps_the_time_of_its_last_use():
    scheduler = Scheduler(MODELS["llama"], 4)
    for ids, count in (([1, 2], 3), ([3, 4], 12), ([5, 6], 1)):  # [5, 6] is complete before [1, 2]
        submitted(scheduler, ids, max_new_tokens=count)
    while len(scheduler.ends) < 2:
        scheduler.step()
    submitted(scheduler, [7, 8], max_new_tokens=3)  # decodes next to [3, 4], in the place of [1, 2]
    run(scheduler)
    submitted(scheduler, [9, 10], max_new_tokens=1)
    run(scheduler)
    assert sorted(text[:2] for text in scheduler.cache.texts) == [[1, 2], [3, 4], [7, 8], [9, 10]]


def test_shared_instructions_are_copied_and_do_not_cost_a_conversation():
    scheduler, shared = Scheduler(MODELS["llama"], 2), [1, 2, 3, 4]
    submitted(scheduler, [*shared, 5, 6, 7, 8, 9, 10], max_new_tokens=1)
    run(scheduler)
    other = submitted(scheduler, [*shared, 11], max_new_tokens=1, top=VOCABULARY)
    run(scheduler)
    assert other.request.cached_tokens == 4
    assert sorted(map(len, scheduler.cache.texts)) == [5, 10]
    assert_as_alone(MODELS["llama"], other)


@pytest.mark.parametrize(("shared", "kept"), [(4, 0), (3, 8)])
def test_a_row_is_taken_for_half_of_its_text(shared, kept):
    """Although another row was idle for longer; less than half is copied to that one."""
    scheduler = Scheduler(MODELS["llama"], 2)
    submitted(scheduler, [12, 12], max_new_tokens=1)
    run(scheduler)
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    submitted(scheduler, text, max_new_tokens=1)
    run(scheduler)
    turn = submitted(scheduler, [*text[:shared], 11], max_new_tokens=1)
    run(scheduler)
    assert turn.request.cached_tokens == shared
    assert sorted(map(len, scheduler.cache.texts)) == sorted([kept or 2, shared + 1])


def test_several_answers_to_one_prompt_process_it_once(monkeypatch):
    processed = []

    def counted(run, ids, *args):
        processed.append(ids.size)
        return logits_of(run, ids, *args)

    monkeypatch.setattr(module, "logits_of", counted)
    scheduler, ids = Scheduler(MODELS["llama"], 3), [1, 2, 3, 4, 5, 6, 7]
    listeners = [Listener(ids, seed=i, temperature=1.0, top=VOCABULARY) for i in range(3)]
    scheduler.submit(*(listener.request for listener in listeners))
    run(scheduler)
    assert sum(processed) == 7 + 1 + 1 + 3 * 5  # the last token again, for its logits
    assert [listener.request.cached_tokens for listener in listeners] == [0, 0, 0]
    for listener in listeners:
        assert_as_alone(MODELS["llama"], listener)


def test_cached_tokens_are_those_of_earlier_requests():
    """Not what others that are submitted together share, whichever row holds it."""
    scheduler = Scheduler(MODELS["llama"], 6)
    submitted(scheduler, [1, 2, 3, 4], max_new_tokens=1)
    run(scheduler)
    prompts = [1, 2, 3, 9, 9, 9], [5, 6], [1, 2, 3, 9, 9, 8], [1, 2, 3, 9, 9, 9], [5, 6, 7]
    for cached in ([3, 0, 3, 3, 0], [5, 1, 5, 5, 2]):
        listeners = [Listener(ids, max_new_tokens=2) for ids in prompts]
        scheduler.submit(*(listener.request for listener in listeners))
        run(scheduler)
        assert [listener.request.cached_tokens for listener in listeners] == cached


# ------------------------------------------------------------------------------------- fairness


def test_a_long_prompt_does_not_stall_the_others(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    scheduler = Scheduler(MODELS["llama"], 2)
    quick = submitted(scheduler, [1], max_new_tokens=20)
    scheduler.step()
    slow = submitted(scheduler, list(range(12)), max_new_tokens=1)
    counts = []
    while not slow.tokens:
        scheduler.step()
        counts.append(len(quick.tokens))
    assert counts == [2, 3, 4, 5, 6, 7]  # 12 tokens in chunks of 2, and a token of the other in each step


def test_prompts_are_processed_in_the_order_of_their_requests(monkeypatch):
    """Not in that of their rows: the third request takes the row of the first one."""
    monkeypatch.setattr(module, "LONG_CHUNK", 2)
    scheduler = Scheduler(MODELS["llama"], 2)
    first, second = submitted(scheduler, [9], max_new_tokens=1), submitted(scheduler, [*range(8)])
    scheduler.step()
    third = submitted(scheduler, [5, 6], max_new_tokens=1)
    assert first.ends == ["length"]
    while not third.tokens:
        scheduler.step()
    assert second.tokens


@pytest.mark.parametrize("steps", range(6))
def test_a_cancelled_request_is_gone_after_one_step(steps, monkeypatch):
    """Waiting, in the middle of its prompt, and decoding."""
    monkeypatch.setattr(module, "LONG_CHUNK", 2)
    scheduler = Scheduler(MODELS["llama"], 1, queue=2)
    listener = submitted(scheduler, [1, 2, 3, 4, 5], max_new_tokens=10)
    waiting = [submitted(scheduler, [6, i], max_new_tokens=2) for i in range(2)]
    for _ in range(steps):
        scheduler.step()
    listener.request.cancelled = waiting[0].request.cancelled = True
    tokens = len(listener.tokens)
    scheduler.step()
    assert listener.ends == waiting[0].ends == ["cancelled"]
    assert len(listener.tokens) == tokens
    assert scheduler.rows[0].request is waiting[1].request
    run(scheduler)
    assert waiting[1].ends == ["length"]


def test_the_queue_is_bounded_and_takes_all_or_none():
    scheduler = Scheduler(MODELS["llama"], 1, queue=2)
    kept = [submitted(scheduler, [1, i]) for i in range(3)]  # one for the row, two that wait
    with pytest.raises(Busy):
        submitted(scheduler, [5])
    scheduler.step()
    scheduler.step()
    kept[0].request.cancelled = True
    scheduler.step()  # one waits
    with pytest.raises(Busy):
        scheduler.submit(Listener([5]).request, Listener([6]).request)
    assert len(scheduler.waiting) == 1
    submitted(scheduler, [5])
    run(scheduler)


def test_places_in_the_queue_are_held_for_requests_that_are_prepared():
    scheduler = Scheduler(MODELS["llama"], 1, queue=2)
    with scheduler.held(2):
        submitted(scheduler, [1])
        with pytest.raises(Busy):
            submitted(scheduler, [2])
        with pytest.raises(Busy), scheduler.held(1):
            pass
    submitted(scheduler, [2])
    run(scheduler)


@pytest.mark.parametrize(
    ("ids", "options", "problem"),
    [
        ([], {}, "empty"),
        ([VOCABULARY], {}, "13"),
        ([1] * (CONTEXT + 1), {}, "25"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"temperature": -1.0}, "temperature"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_at_once(ids, options, problem):
    scheduler = Scheduler(MODELS["llama"], 1)
    with pytest.raises(Error, match=problem):
        submitted(scheduler, ids, **options)
    assert not scheduler.has_work


def test_the_end_of_a_text():
    model = MODELS["llama"]
    free = [int(step[0]) for step in generate(model, [[1, 2]], 30, temperature=0)]
    scheduler = Scheduler(model, 3)
    full = submitted(scheduler, [1, 2], max_new_tokens=1000)
    stopped = submitted(scheduler, [1, 2], stop_ids=free[2:3], max_new_tokens=1000)
    told = submitted(scheduler, [1, 2], stop_after=2, max_new_tokens=1000)
    run(scheduler)
    assert (full.tokens, full.ends) == (free, ["length"]) and len(free) == CONTEXT - 1
    assert (stopped.tokens, stopped.ends) == (free[: free.index(free[2]) + 1], ["stop"])
    assert (told.tokens, told.ends) == (free[:2], ["stop"])


def test_suppressed_ids_are_never_sampled():
    model, options = MODELS["llama"], dict(max_new_tokens=8, temperature=0)
    usual = {int(step[0]) for step in generate(model, [[1, 2]], **options)}
    scheduler = Scheduler(model, 1, suppress_ids=sorted(usual))
    listener = submitted(scheduler, [1, 2], **options)
    run(scheduler)
    assert len(listener.tokens) == 8 and usual.isdisjoint(listener.tokens)


@pytest.mark.parametrize("top", [0, 1, 3, 300])
def test_alternatives_of_equal_logits_are_in_order_of_id(top):
    model = random_llama(replace(LLAMA, vocab_size=300))
    model.norm.weight.data[...] = 0  # all logits are 0
    scheduler = Scheduler(model, 1)
    listener = submitted(scheduler, [1, 2], top=top, max_new_tokens=1)
    run(scheduler)
    (sampled,) = listener.sampled
    assert (sampled.id, [i for i, _ in sampled.top]) == (0, list(range(top)))


# -------------------------------------------------------------------------------------- errors


class Poison(nn.Module):
    """A layer that fails, or gives NaN, when a text contains a certain token."""

    def __init__(self, layer, token, nan):
        self.layer, self.token, self.nan = layer, token, nan

    def forward(self, ids):
        x = self.layer(ids)
        poisoned = (np.asarray(ids) == self.token).any(axis=1)
        if self.nan:
            x.data[poisoned] = np.nan
        elif poisoned.any():
            raise RuntimeError("poison")
        return x


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_error_of_one_row_ends_only_that_row(nan, place, monkeypatch):
    """The token 12 is poison: in a prompt, and among the tokens that a batch of rows decodes."""
    model = random_llama(LLAMA)
    bad = [1, 2, 3, 4]
    bad[place] = 12
    poisoned = random_llama(LLAMA)
    poisoned.embed_tokens = Poison(poisoned.embed_tokens, 12, nan)
    scheduler = Scheduler(poisoned, 3, suppress_ids=[12])
    if place == 3:  # the other rows decode when it comes
        monkeypatch.setattr(module, "LONG_CHUNK", 3)
        monkeypatch.setattr(module, "CHUNK", 3)
    good = [submitted(scheduler, [5, i], max_new_tokens=12) for i in (6, 7)]
    for _ in range(4):
        scheduler.step()
    listener = submitted(scheduler, bad)
    run(scheduler)
    (error,) = listener.ends
    assert isinstance(error, Error if nan else RuntimeError) and listener.tokens == []
    for each in good:
        expected = generate(model, [each.request.ids], 12, temperature=0, suppress_ids=[12])
        assert (each.tokens, each.ends) == ([int(step[0]) for step in expected], ["length"])
    again = submitted(scheduler, [1, 2])  # the row can be used again, but not what it held
    run(scheduler)
    assert again.ends == ["length"] and again.request.cached_tokens == 0


def test_an_error_of_a_listener_ends_only_its_row():
    scheduler = Scheduler(MODELS["llama"], 2)
    good, bad = Listener([1, 2]), Listener([3])
    bad.request.on_token = lambda sampled: 1 / 0
    scheduler.submit(bad.request, good.request)
    run(scheduler)
    assert isinstance(bad.ends[0], ZeroDivisionError) and len(bad.ends) == 1
    assert good.ends == ["length"]


def test_end_all_tells_everyone_once_and_forgets_the_texts():
    scheduler = Scheduler(MODELS["llama"], 1)
    listeners = [submitted(scheduler, [1, 2, i]) for i in range(3)]
    scheduler.step()
    error = RuntimeError("end")
    scheduler.end_all(error)
    assert [listener.ends for listener in listeners] == [[error]] * 3
    assert scheduler.cache.texts == [[]] and not scheduler.has_work


def test_a_model_that_ignores_the_cache_is_not_served():
    model = random_gpt2(GPT)
    nn.replace(model, "h.*.attn", lambda *_: Nothing())
    scheduler = Scheduler(model, 2)
    listener = submitted(scheduler, [1, 2, 3])
    run(scheduler)
    (error,) = listener.ends
    assert isinstance(error, Error) and "does not use the cache" in str(error) and not listener.tokens

"""Speculation gives the text of plain generation: the same tokens from the same random numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig, generate, nn
from tinyllm.errors import Error
from tinyllm.inference import speculative
from tinyllm.inference.decoding import DecodingSteps
from tinyllm.inference.sampling import probabilities
from tinyllm.inference.speculative import DraftModel, PromptLookup, Speculation, pass_cost, worthwhile
from tinyllm.models.cache import Cache

CONTEXT, V = 16, 7


def gpt2(seed=0, vocab_size=V, context=CONTEXT):
    sizes = dict(vocab_size=vocab_size, n_positions=context, n_embd=8, n_layer=1, n_head=2)
    return GPT2(GPT2Config(**sizes, initializer_range=0.4), rng=seed).astype(np.float64).eval()


def llama(seed=0, windows=(None,), context=CONTEXT):
    own = {"windows": windows, "window_of": lambda self, layer: windows[layer]}
    sizes = dict(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=len(windows),
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=context, initializer_range=0.6,
    )  # fmt: skip
    return Llama(type("WindowedConfig", (LlamaConfig,), own)(**sizes), rng=seed).astype(np.float64).eval()


MODELS = {"gpt2": gpt2(), "llama": llama(), "windows": llama(windows=(3, None))}
DRAFTS = {"prompt": "prompt", "itself": None, "similar": gpt2(context=10), "other": llama(5)}


@pytest.fixture
def eager(monkeypatch):
    """Candidates cost nothing, so that there are many, right and wrong."""
    monkeypatch.setattr(speculative, "pass_cost", lambda tokens: 0.5 + 0.01 * tokens)


def run(model, prompt, count, seed, **options):
    """The tokens, and the next random number."""
    rng = np.random.default_rng(seed)
    tokens = [tuple(step) for step in generate(model, prompt, count, rng=rng, **options)]
    return [token for (token,) in tokens], rng.random()


class Table(np.random.Generator):
    """A generator of known numbers (steps, rows): those of the next step at each call."""

    def __init__(self, numbers):
        super().__init__(np.random.PCG64(0))
        self.numbers = iter(numbers)

    def random(self, size):
        numbers = next(self.numbers)
        assert size == len(numbers)
        return numbers


options = st.fixed_dictionaries(
    dict(
        temperature=st.sampled_from([0, 0.3, 1.0, 1.5]),
        top_k=st.sampled_from([None, 1, 3]),
        top_p=st.sampled_from([None, 0.7]),
        stop_ids=st.sampled_from([(), (), (2,), (1, 4)]),
        suppress_ids=st.sampled_from([(), (0, 3)]),
        slide=st.booleans(),
    )
)


@pytest.mark.usefixtures("eager")
@settings(max_examples=250)
@given(
    name=st.sampled_from(sorted(MODELS)),
    draft=st.sampled_from(sorted(DRAFTS)),
    options=options,
    pattern=st.lists(st.integers(0, V - 1), min_size=1, max_size=6),
    repeats=st.integers(1, 4),
    count=st.integers(0, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_speculation_equals_plain_generation(name, draft, options, pattern, repeats, count, seed):
    """Four prompts each: 1,000. Plain generation writes the four in one batch, which takes less time.

    Also right are the number of random numbers that are used, and what a given cache holds.
    """
    model, rng = MODELS[name], np.random.default_rng(seed)
    repeating = (pattern * repeats)[:CONTEXT]
    prompts = [repeating, *rng.integers(0, V, (3, len(repeating))).tolist()]
    numbers = rng.random((count + 1, 4))
    steps = [step.tolist() for step in generate(model, prompts, count, rng=Table(numbers), **options)]
    for row, prompt in enumerate(prompts):
        expected = [step[row] for step in steps]
        ends = [i for i, token in enumerate(expected, 1) if token in options["stop_ids"]]
        expected = expected[: ends[0] if ends else None]  # the batch repeats the stop id
        kept, table = model.new_cache(1), Table(numbers[:, row : row + 1])
        more = dict(rng=table, cache=kept, speculate=DRAFTS[draft] or model)
        assert [token for (token,) in generate(model, [prompt], count, **more, **options)] == expected
        assert table.random(1) == numbers[len(expected), row]
        if expected and not (model.learned_positions and len(prompt) + count > CONTEXT):
            assert kept.texts == [(prompt + expected)[:-1]]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_first_difference_in_float32_is_at_a_near_tie(temperature):
    """Of two logits, or of the uniform number and a step of the cumulative distribution."""
    model, same = llama(2, context=40).astype(np.float32), 0
    for seed in range(12):
        prompt = np.random.default_rng(seed).integers(0, V, 4).tolist() * 2
        plain, found = (
            run(model, prompt, 24, seed, temperature=temperature, speculate=draft)[0]
            for draft in (None, "prompt")
        )
        same += plain == found
        if plain == found:
            continue
        i = next(i for i, (a, b) in enumerate(zip(plain, found)) if a != b)
        logits = model([prompt + plain[:i]]).data[:, -1]
        if temperature == 0:
            largest, second = np.sort(logits[0])[::-1][:2]
            assert largest - second <= 1e-4
        else:
            steps = np.cumsum(np.sort(probabilities(logits)[0])[::-1])
            assert np.abs(steps - np.random.default_rng(seed).random(24)[i]).min() <= 1e-4
    assert same >= 10


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("speculate", ["prompt", MODELS["gpt2"], DRAFTS["other"]])
def test_probabilities_of_all_texts_are_those_of_the_model(speculate):
    """Uniform numbers in the middle of equal intervals: each text of three tokens gets its share."""
    model, prompt, length, parts = gpt2(3, vocab_size=3), [0, 1, 0, 1], 3, 6
    speculate = gpt2(4, vocab_size=3) if speculate != "prompt" else speculate
    counts, grid = {}, (np.arange(parts) + 0.5) / parts
    for uniforms in itertools.product(grid, repeat=length):
        rng = Table(np.array(uniforms)[:, None])
        text = tuple(int(t[0]) for t in generate(model, prompt, length, rng=rng, speculate=speculate))
        counts[text] = counts.get(text, 0) + 1
    expected = {}
    for text in itertools.product(range(3), repeat=length):
        shares = []
        for i, token in enumerate(text):
            p = probabilities(model([[*prompt, *text[:i]]]).data[:, -1])[0]
            order = np.argsort(-p, kind="stable")
            stop = np.cumsum(p[order])[order.tolist().index(token)]
            shares.append(((grid >= stop - p[token]) & (grid < stop)).sum())
        expected[text] = int(np.prod(shares))
    assert counts == {text: n for text, n in expected.items() if n} and len(counts) > 5


def shapes_of(monkeypatch):
    """The number of tokens of every pass of the model from now on."""
    shapes, correct = [], DecodingSteps.__call__

    def call(self, ids, *args):
        shapes.append(len(ids[0]))
        return correct(self, ids, *args)

    monkeypatch.setattr(DecodingSteps, "__call__", call)
    return shapes


def repeating(context=200):
    """A Llama whose greedy text repeats itself, which random weights make it do after a few tokens."""
    return llama(1, context=context)


def test_text_that_repeats_itself_takes_fewer_passes(monkeypatch):
    model = repeating()
    shapes = shapes_of(monkeypatch)
    plain = run(model, [1, 2], 150, 0, temperature=0)
    assert shapes == [2] + [1] * 149
    shapes.clear()
    assert run(model, [1, 2], 150, 0, temperature=0, speculate="prompt") == plain
    assert len(shapes) <= 50 and sum(map(pass_cost, shapes[1:])) < 0.6 * 149 and max(shapes[1:]) == 16


def test_random_text_is_decoded_in_plain_steps(monkeypatch):
    """At most 3% of the time is lost to candidates that were wrong."""
    model = gpt2(vocab_size=97, context=600)
    shapes = shapes_of(monkeypatch)
    run(model, [1, 2], 500, 0, temperature=50.0, speculate="prompt")
    assert sum(map(pass_cost, shapes[1:])) < 500 * 1.03


def test_speculation_comes_back_when_the_text_repeats_itself_again():
    rng, phrase = np.random.default_rng(0), list(range(40, 60))
    drafter, text = PromptLookup([]), []
    noise = rng.integers(0, 6, 300).tolist()  # 6 ids: many short matches, nearly all wrong
    for token in noise + phrase:
        text.append(token)
        last = drafter.candidates(text, 15)
    assert max(drafter.rates[1:5]) < 0.4 and last == []
    proposed = []
    for token in phrase:
        text.append(token)
        proposed.append(len(drafter.candidates(text, 15)))
    assert max(proposed) > 8 and proposed[0] == 0


def test_candidates_follow_the_latest_longest_match():
    drafter = PromptLookup([])
    drafter.rates = [0.0] + [0.99] * 5
    assert drafter.candidates([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 4) == [4, 9, 2, 3]
    assert PromptLookup([]).candidates([1, 2, 3], 4) == []
    drafter = PromptLookup([])
    drafter.rates = [0.0] + [0.99] * 5
    assert drafter.candidates([7, 8, 7, 8, 7, 8], 5) == [7, 8, 7, 8, 7]  # past the end, the period goes on
    assert drafter.candidates([7, 8, 7, 8, 7, 8, 3], 5) == []


def test_draft_that_is_never_right_pauses():
    model = llama(5, context=400)
    drafter, text, drafted = DraftModel(model, model, 400), [1], []
    drafter.cost = 0.05
    while len(text) < 300:
        found = drafter.candidates(text, 15)
        drafted += [len(text)] * bool(found)
        text.append((found[0] + 1) % V if found else 0)
    assert drafted == [1, 66, 195]


@pytest.mark.parametrize(
    ("rates", "most", "cost", "expected"),
    [([1.0] * 20, 15, 0.0, 15), ([1.0] * 20, 3, 0.0, 3), ([0.2] * 20, 15, 0.0, 0), ([1.0], 15, 0.0, 0),
     ([1.0] * 20, 15, 0.95, 0), ([0.9] * 20, 0, 0.0, 0)],
)  # fmt: skip
def test_number_of_candidates(rates, most, cost, expected):
    assert worthwhile(rates, most, cost) == expected


def test_abandoned_iterator_leaves_the_text_in_the_cache(eager):
    model = repeating()
    for count in (1, 5, 20):
        cache = model.new_cache(1)
        steps = generate(model, [1, 2], 100, temperature=0, cache=cache, speculate="prompt")
        tokens = [int(next(steps)[0]) for _ in range(count)]
        held = len(cache.texts[0])
        steps.close()
        assert cache.texts[0] == [1, 2, *tokens][: len(cache.texts[0])]
        assert 1 + count <= len(cache.texts[0]) <= min(held, 2 + count)
        again = [1, 2, *tokens, 3, 4]
        plain = run(model, again, 9, 0)
        assert run(model, again, 9, 0, cache=cache, speculate="prompt") == plain
    old = generate(model, [1, 2], 100, temperature=0, cache=cache, speculate="prompt")
    for _ in range(30):
        next(old)
    run(model, [5, 6], 9, 0, cache=cache)
    texts = [list(text) for text in cache.texts]
    old.close()  # the cache has another text now, which stays
    assert cache.texts == texts


def test_modes_are_restored_between_steps():
    model, draft = repeating().train(), llama(5, context=200).train()
    for _ in generate(model, [1, 2, 1, 2], 10, temperature=0, speculate=draft):
        assert all(module.training for each in (model, draft) for _, module in each.named_modules())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(speculate="promt"), "speculate is 'promt': give \"prompt\" or a smaller language model"),
        (dict(speculate=nn.Linear(2, 2, rng=0)), "speculate is .*smaller language model"),
        (dict(speculate=gpt2(vocab_size=9)), "vocabulary of 9 tokens and the model of 7"),
        (dict(speculate=gpt2(vocab_size=5)), "vocabulary of 5 tokens and the model of 7"),
        (dict(speculate="prompt", use_cache=False), "speculate needs a cache"),
    ],
)
def test_request_that_cannot_be_met(given, words):
    with pytest.raises(Error, match=words):
        generate(MODELS["llama"], [1, 2], **given)


def test_several_prompts_are_refused():
    with pytest.raises(Error, match="speculate needs one prompt at a time, not 2"):
        generate(MODELS["llama"], [[1, 2], [3, 4]], speculate="prompt")


# -------------------------------------------------------------------------------- planted faults


def compare_texts():
    for name, seed in itertools.product(MODELS, range(3)):
        model, prompt = MODELS[name], [1, 2, 3, 1, 2, 3, 1]
        expected = run(model, prompt, 24, seed)
        for draft in ("prompt", DRAFTS["other"]):
            assert run(model, prompt, 24, seed, speculate=draft) == expected


def one_too_few(patch):
    correct = Cache.rollback
    patch.setattr(Cache, "rollback", lambda cache, count: correct(cache, count - 1))


def accepted_when_unequal(patch):
    correct = Speculation.accepted

    def accepted(self, text, cache):
        self.candidates[:1] = text[-1:] if self.candidates else []
        return correct(self, text, cache)

    patch.setattr(Speculation, "accepted", accepted)


def uniform_numbers_per_candidate(patch):
    from tinyllm.inference import generate as module

    correct = module.choose_tokens

    def choose(logits, uniforms, *sampling):
        extra = rngs[-1].random(1) if rngs and drafted else None
        return correct(logits, uniforms if extra is None else extra, *sampling)

    rngs, drafted = [], []
    seeded, keep = module.as_generator, Speculation.keep
    patch.setattr(module, "as_generator", lambda rng: rngs.append(seeded(rng)) or rngs[-1])
    patch.setattr(module, "choose_tokens", choose)
    patch.setattr(Speculation, "keep", lambda self, *given: drafted.append(1) or keep(self, *given))


@pytest.mark.usefixtures("eager")
def test_texts_without_a_fault():
    compare_texts()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("plant", [one_too_few, accepted_when_unequal, uniform_numbers_per_candidate])
def test_planted_fault_is_caught(plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises((AssertionError, Error)):
        compare_texts()

"""Sampling and generation: comparison with plain torch, with expected frequencies and with plain loops."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm import GPT2, GPT2Config, Tensor, nn
from tinyllm.errors import Error
from tinyllm.inference import sampling
from tinyllm.inference.generate import generate
from tinyllm.inference.perplexity import evaluate_text
from tinyllm.inference.sampling import choose_tokens, most_likely, probabilities, suppress

ALMOST_ONE = 1 - 2.0**-53  # the largest number that a generator's random() returns


def grid(count):
    """The midpoints of ``count`` equal parts of [0, 1)."""
    return (np.arange(count) + 0.5) / count


def sampled(logits, uniforms, **options):
    """The token sampled by each uniform number from one row of logits."""
    rows = np.repeat(np.atleast_2d(logits), len(uniforms), axis=0)
    return choose_tokens(rows, np.asarray(uniforms), **options)


# Sampling


def reference_candidates(row, temperature, top_k, top_p):
    """The tokens kept and their probabilities, in plain torch, following the papers step by step."""
    torch = pytest.importorskip("torch")
    row = torch.from_numpy(row)
    ranked = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))
    if temperature == 0:
        return ranked[:1], torch.ones(1, dtype=torch.float64)
    if top_k is not None:
        ranked = ranked[:top_k]
    p = torch.softmax(row[ranked] / temperature, dim=0)
    if top_p is not None:
        n = 1
        while n < len(p) and p[:n].sum() < top_p:
            n += 1
        ranked, p = ranked[:n], p[:n] / p[:n].sum()
    return ranked, p


def reference_probabilities(row, temperature, top_k, top_p):
    ranked, p = reference_candidates(row, temperature, top_k, top_p)
    everywhere = np.zeros(len(row))
    everywhere[ranked] = p.numpy()
    return everywhere


def reference(row, uniform, temperature, top_k, top_p):
    """The token sampled by a uniform number from one row of logits."""
    ranked, p = reference_candidates(row, temperature, top_k, top_p)
    below = 0.0
    for token, probability in zip(ranked, p):
        below += probability.item()
        if uniform < below:
            return token
    return ranked[-1]


@settings(max_examples=25)
@given(
    count=st.integers(1, 50_000) | st.integers(1, 60),
    levels=st.sampled_from([1, 2, 5, 300, 10**6]),
    dtype=st.sampled_from([np.float32, np.float64]),
    excluded=st.sampled_from([0.0, 0.5, 0.99999]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_largest_of_many_are_those_of_a_stable_sort(count, levels, dtype, excluded, seed):
    """With few levels nearly all logits are tied; those that are excluded are -inf, all but a few at most."""
    rng = np.random.default_rng(seed)
    logits = (rng.integers(0, levels, (2, 50_000)) / levels).astype(dtype)
    logits[rng.random(logits.shape) < excluded] = -np.inf
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(most_likely(logits, count), expected)


tied = st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.0, 0.25, 2.0, 2.0]), min_size=1, max_size=12)
untied = st.lists(st.floats(-8, 8), min_size=1, max_size=12)


# Twelve equal logits of which two are kept: always tested, in addition to Hypothesis's examples.
@pytest.mark.parametrize("few", [1, 4, 256])  # tokens that are sorted at first, if top_k is None
@example(row=[0.0] * 12, temperature=1.0, top_k=2, nucleus=False, seed=0)
@given(
    row=tied | untied,
    temperature=st.sampled_from([0, 0.3, 1.0, 1.7]) | st.floats(0.05, 20),
    top_k=st.none() | st.integers(1, 14),
    nucleus=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_sampled_tokens_equal_those_of_plain_torch(few, row, temperature, top_k, nucleus, seed):
    rng = np.random.default_rng(seed)
    # Random numbers, so that no uniform number or top_p falls on the boundary between two tokens.
    top_p = rng.random() if nucleus else None
    logits = np.stack([rng.permutation(row) for _ in range(5)])
    uniforms = rng.random(5)
    expected = [reference(r, u, temperature, top_k, top_p) for r, u in zip(logits, uniforms)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "FEW", few)
        assert choose_tokens(logits, uniforms, temperature, top_k, top_p).tolist() == expected


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=10))
def test_temperature_zero_is_greedy_and_breaks_ties_by_id(row):
    tokens = sampled(np.array(row, float), [0.0, 0.5, ALMOST_ONE], temperature=0)
    assert tokens.tolist() == [row.index(max(row))] * 3
    assert sampled(np.array(row, float), [0.0, ALMOST_ONE], top_k=1).tolist() == [row.index(max(row))] * 2


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(1, {1}), (2, {1, 3}), (3, {1, 3, 0}), (4, {1, 3, 0, 2}), (6, {0, 1, 2, 3, 4, 5}), (99, set(range(6)))],
)
def test_top_k_keeps_exactly_k_and_breaks_ties_by_id(top_k, expected):
    logits = np.array([1.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    assert set(sampled(logits, grid(1000), top_k=top_k).tolist()) == expected


@pytest.mark.parametrize("top_k", [1, 7, 40, 200])
def test_top_k_keeps_exactly_k_of_equal_logits(top_k):
    assert set(sampled(np.zeros(200), grid(4000), top_k=top_k).tolist()) == set(range(top_k))


@pytest.mark.parametrize("few", [1, 3, 256])
@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-300, {2}),
        (0.25, {2}),
        (0.5, {2}),  # reached exactly
        (0.5 + 1e-12, {2, 0}),
        (0.75, {2, 0}),
        (0.75 + 1e-12, {2, 0, 1}),
        (0.875, {2, 0, 1}),
        (0.9, {2, 0, 1, 3}),
        (1.0, {2, 0, 1, 3}),
    ],
)
def test_top_p_keeps_the_shortest_prefix_that_reaches_it(few, top_p, expected, monkeypatch):
    monkeypatch.setattr(sampling, "FEW", few)
    logits = np.log2(
        [0.25, 0.125, 0.5, 0.125]
    )  # at temperature 1/log(2) these are the probabilities, exactly
    tokens = sampled(logits, grid(1000), temperature=1 / math.log(2), top_p=top_p)
    assert set(tokens.tolist()) == expected


@pytest.mark.parametrize("top_p", [None, 0.75, 1.0])
def test_sorting_a_few_tokens_first_samples_the_same(top_p, monkeypatch):
    logits, uniforms = np.log2([[0.25, 0.125, 0.5, 0.125]] * 8), np.arange(8) / 8  # also at the boundaries
    options = dict(temperature=1 / math.log(2), top_p=top_p)
    expected = choose_tokens(logits, uniforms, **options)
    monkeypatch.setattr(sampling, "FEW", 3)
    assert np.array_equal(choose_tokens(logits, uniforms, **options), expected)


def test_top_p_is_applied_after_top_k():
    probabilities = np.array([0.4, 0.3, 0.2, 0.1])
    # Of the first two, renormalised, the first has probability 4/7 = 0.571.
    assert set(sampled(np.log(probabilities), grid(1000), top_k=2, top_p=0.57).tolist()) == {0}
    assert set(sampled(np.log(probabilities), grid(1000), top_k=2, top_p=0.58).tolist()) == {0, 1}
    assert set(sampled(np.log(probabilities), grid(1000), top_p=0.57).tolist()) == {0, 1}
    assert set(sampled(np.log(probabilities), grid(1000), top_k=3, top_p=1.0).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [1e-8, 1.0, 1e4])
def test_extreme_logits_and_temperatures(temperature, dtype):
    logits = np.array([-1e4, 1e4, 0.0, 1e4 - 8, -np.inf], dtype)
    exact = [math.exp((float(logit) - 1e4) / temperature) for logit in logits]
    tokens = sampled(logits, grid(10_000), temperature=temperature, top_p=1.0)
    counts = np.bincount(tokens, minlength=5)
    assert np.abs(counts / 10_000 - np.array(exact) / sum(exact)).max() <= 1e-4


@pytest.mark.parametrize("temperature", [5e-324, 1e-300])
def test_smallest_temperatures_are_greedy(temperature):
    assert sampled(np.array([1.0, 3.0, 2.0]), [0.0, ALMOST_ONE], temperature=temperature).tolist() == [1, 1]


@given(
    row=tied | untied,
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    temperature=st.floats(1e-8, 1e4),
)
@example(row=[0.1] * 10, top_k=None, top_p=0.3, temperature=1.0)
def test_uniform_numbers_at_the_ends_of_the_interval(row, top_k, top_p, temperature):
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
    first, last = sampled(np.array(row), [0.0, ALMOST_ONE], **options)
    assert first == ranked[0]
    assert last in ranked
    assert ranked.index(last) >= ranked.index(sampled(np.array(row), [0.999], **options)[0])


def test_token_of_probability_zero_is_never_sampled():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    tokens = sampled(logits, [0.0, 0.25, 0.5, 0.75, ALMOST_ONE])
    assert tokens.tolist() == [1, 1, 3, 3, 3]


def test_equally_spaced_uniforms_sample_in_proportion():
    logits = np.random.default_rng(0).standard_normal(30) * 2
    count = 20_000
    expected = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    counts = np.bincount(sampled(logits, grid(count), temperature=0.8), minlength=30)
    assert np.abs(counts - count * expected).max() <= 1  # a token corresponds to one interval of [0, 1)


@given(
    row=tied | untied,
    temperature=st.sampled_from([0, 0.3, 1.0, 1.7]) | st.floats(0.05, 20),
    top_k=st.none() | st.integers(1, 14),
    nucleus=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(row=[2.0, 2.0, 0.0], temperature=0, top_k=None, nucleus=False, seed=0)
@example(row=[0.0] * 12, temperature=1.0, top_k=5, nucleus=True, seed=0)
def test_probabilities_equal_plain_torch_and_the_sampled_frequencies(row, temperature, top_k, nucleus, seed):
    rng = np.random.default_rng(seed)
    top_p = rng.random() if nucleus else None
    logits = np.stack([rng.permutation(row) for _ in range(3)]).astype(np.float32)
    p = probabilities(logits, temperature, top_k, top_p)
    assert p.shape == logits.shape
    assert p.dtype == np.float64
    count = 500
    for i, one in enumerate(logits):
        expected = reference_probabilities(one.astype(np.float64), temperature, top_k, top_p)
        assert np.abs(p[i] - expected).max() <= 1e-14
        assert np.array_equal(p[i] > 0, expected > 0)
        counts = np.bincount(sampled(one, grid(count), temperature=temperature, top_k=top_k, top_p=top_p))
        assert np.abs(np.pad(counts, (0, len(row) - len(counts))) - count * p[i]).max() <= 1 + 1e-9


def test_probabilities_at_temperature_zero_are_one_hot():
    assert probabilities(np.array([[1.0, 3.0, 3.0], [5.0, -np.inf, 2.0]]), 0).tolist() == [
        [0, 1, 0],
        [1, 0, 0],
    ]


@pytest.mark.parametrize(("bad", "temperature"), [(np.nan, 0), (np.nan, 1.0), (np.inf, 1.0)])
def test_logits_that_are_not_finite_are_rejected(bad, temperature):
    logits = np.zeros((2, 4), np.float32)
    logits[1, 2] = bad
    with pytest.raises(Error, match=r"logits .*weights are damaged or training diverged"):
        choose_tokens(logits, np.array([0.5, 0.5]), temperature)
    with pytest.raises(Error, match=r"logits .*weights are damaged or training diverged"):
        probabilities(logits, temperature)


def test_logits_that_are_all_minus_infinity_are_rejected():
    with pytest.raises(Error, match=r"logits .*weights are damaged or training diverged"):
        choose_tokens(np.full((1, 4), -np.inf), np.array([0.5]))


# Generation


class Uniforms(np.random.Generator):
    """A generator with known numbers: step t gets row t of the table."""

    def __init__(self, table):
        super().__init__(np.random.PCG64(0))
        self.rows = iter(table)

    def random(self, size):
        row = next(self.rows)
        assert len(row) == size
        return row


class Counting(nn.Module):
    """Predicts i + 1 after token i, and 0 after the last one, with near certainty; has no cache."""

    context = 4
    learned_positions = True

    def __init__(self, vocab_size):
        self.config = SimpleNamespace(vocab_size=vocab_size)

    def forward(self, ids, last_only=False, cache=None):
        return Tensor(100 * np.eye(self.config.vocab_size)[(ids[:, -1:] + 1) % self.config.vocab_size])


def small_gpt2(**changes):
    """Without dropout; its weights are large enough for a clearly non-uniform distribution."""
    sizes = dict(vocab_size=13, n_positions=8, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    dropouts = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    return GPT2(GPT2Config(**sizes | dropouts | changes), rng=np.random.default_rng(3))


@pytest.fixture(scope="module")
def model():
    return small_gpt2().astype(np.float64)


def generated(steps):
    """The ids of all steps, (B, steps)."""
    return np.stack(list(steps), axis=1)


def test_step_yields_one_token_per_row(model):
    steps = list(generate(model, [[1, 2], [3, 4], [5, 6]], 4, rng=np.random.default_rng(0)))
    assert len(steps) == 4
    for tokens in steps:
        assert tokens.shape == (3,)
        assert tokens.dtype.kind == "i"
        assert ((tokens >= 0) & (tokens < 13)).all()


def test_one_prompt_needs_no_batch_axis(model):
    one = generated(generate(model, [1, 2, 3], 5, rng=np.random.default_rng(0)))
    assert np.array_equal(one, generated(generate(model, [[1, 2, 3]], 5, rng=np.random.default_rng(0))))


def test_zero_new_tokens_yield_nothing(model):
    assert list(generate(model, [[1]], max_new_tokens=0)) == []


@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, top_k=5, top_p=0.9), dict(temperature=0)])
@pytest.mark.parametrize("length", [1, 6, 8])
def test_tokens_equal_a_plain_loop_with_a_sliding_window(model, length, options):
    """Prompts shorter than the context or as long; 12 new tokens always exceed it."""
    rng = np.random.default_rng(length)
    ids = rng.integers(13, size=(3, length))
    table = rng.random((12, 3))
    expected = ids
    for uniforms in table:
        logits = model(expected[:, -8:]).data[:, -1]
        expected = np.column_stack([expected, choose_tokens(logits, uniforms, **options)])
    tokens = generated(generate(model, ids, 12, rng=Uniforms(table), **options))
    assert np.array_equal(tokens, expected[:, length:])


@pytest.mark.parametrize("options", [{}, dict(temperature=1.5, top_k=4), dict(top_p=0.8)])
def test_rows_are_independent(model, options):
    rng = np.random.default_rng(1)
    ids, table = rng.integers(13, size=(5, 4)), rng.random((10, 5))
    together = generated(generate(model, ids, 10, rng=Uniforms(table), **options))
    for i in range(5):
        alone = generated(generate(model, ids[[i]], 10, rng=Uniforms(table[:, [i]]), **options))
        assert np.array_equal(alone, together[[i]])


def test_row_is_unaffected_by_a_finished_row(model):
    rng = np.random.default_rng(2)
    ids, table = rng.integers(13, size=(2, 3)), rng.random((12, 2))
    free = generated(generate(model, ids, 12, rng=Uniforms(table)))
    stop = next(token for token in free[0, :6] if token not in free[1])
    stopped = generated(generate(model, ids, 12, rng=Uniforms(table), stop_ids=[stop]))
    assert np.array_equal(stopped[1], free[1])
    cut = free[0].tolist().index(stop)
    assert stopped[0].tolist() == free[0, :cut].tolist() + [stop] * (12 - cut)


def test_generation_ends_at_stop_ids():
    counting = Counting(10)

    def tokens(prompts, stop_ids):
        return generated(generate(counting, prompts, 8, stop_ids=stop_ids, use_cache=False)).tolist()

    assert tokens([[0], [3]], []) == [[1, 2, 3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9, 0, 1]]
    assert tokens([[0], [3]], [5]) == [[1, 2, 3, 4, 5], [4, 5, 5, 5, 5]]
    assert tokens([[0], [3], [7]], (5, 9)) == [[1, 2, 3, 4, 5], [4, 5, 5, 5, 5], [8, 9, 9, 9, 9]]
    assert tokens([[4]], np.array([5])) == [[5]]
    assert tokens([[5]], [5]) == [[6, 7, 8, 9, 0, 1, 2, 3]]  # a stop id in the prompt is ignored
    assert tokens([[1], [2]], [5, 1]) == [[2, 3, 4, 5], [3, 4, 5, 5]]


def test_prompt_and_yielded_arrays_are_not_modified(model):
    ids = np.array([[1, 2, 3]])
    steps = generate(model, ids, 6, rng=np.random.default_rng(0))
    first = next(steps)
    kept = first.copy()
    list(steps)
    assert np.array_equal(first, kept)
    assert ids.tolist() == [[1, 2, 3]]


def test_modifying_a_yielded_array_has_no_effect(model):
    def tokens(spoil):
        out = []
        for step in generate(model, [[1, 2]], 8, rng=np.random.default_rng(0)):
            out.append(step.tolist())
            if spoil:
                step[:] = 0
        return out

    assert tokens(spoil=True) == tokens(spoil=False)


def test_same_seed_gives_the_same_text(model):
    def text(seed):
        return generated(generate(model, [[1], [2]], 20, rng=np.random.default_rng(seed))).tolist()

    assert text(0) == text(0)
    assert text(0) != text(1)


def test_every_call_without_a_generator_samples_another_text(model):
    first, second = (generated(generate(model, [[1], [2]], 20)).tolist() for _ in range(2))
    assert first != second


def test_frequencies_match_the_models_probabilities(model):
    """One step of 20,000 identical rows: chi-square within six standard deviations of its mean."""
    rows = 20_000
    logits = model([[1, 2]]).data[0, -1] / 0.9
    probabilities = np.exp(logits) / np.exp(logits).sum()
    ids = np.repeat([[1, 2]], rows, axis=0)
    (tokens,) = generate(model, ids, 1, temperature=0.9, rng=np.random.default_rng(0))
    expected = rows * probabilities
    assert expected.min() > 5
    chi_square = ((np.bincount(tokens, minlength=13) - expected) ** 2 / expected).sum()
    assert chi_square < 12 + 6 * math.sqrt(2 * 12)


def test_dropout_is_off_only_during_steps():
    model = small_gpt2(embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)

    def tokens():
        return generated(generate(model, [[1, 2]], 10, rng=np.random.default_rng(0))).tolist()

    model.eval()
    in_eval_mode = tokens()
    assert not any(module.training for _, module in model.named_modules())
    model.train()
    assert tokens() == in_eval_mode
    for _ in generate(model, [[1, 2]], 3):
        assert all(module.training for _, module in model.named_modules())


def test_submodule_in_eval_mode_keeps_its_mode():
    model = small_gpt2().train()
    model.h[0].eval()
    list(generate(model, [[1]], 2))
    assert model.training
    assert not model.h[0].training
    assert not model.h[0].attn.resid_dropout.training


def test_gradients_are_recorded_between_steps(model):
    x = Tensor(np.array([3.0]), requires_grad=True)
    for _ in generate(model, [[1]], 3):
        y = (x * x).sum()
        y.backward()
    assert x.grad.tolist() == [18.0]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_error_in_the_model_restores_modes():
    class Broken(Counting):
        def forward(self, ids, last_only=False, cache=None):
            raise ZeroDivisionError

    broken = Broken(5)
    with pytest.raises(ZeroDivisionError):
        next(generate(broken, [[1]], use_cache=False))
    assert broken.training
    x = Tensor(np.array([3.0]), requires_grad=True)
    (x * x).sum().backward()
    assert x.grad.tolist() == [6.0]


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        ([[1] * 9], {}, r"\(1, 9\): .*at most 8 tokens"),
        ([[[1]]], {}, r"\(1, 1, 1\): .*batch, time"),
        (3, {}, r"shape \(1,\): .*batch, time"),
        ("Hello", {}, "prompt ids is 'Hello', not an integer"),
        ([[]], {}, "prompt ids is empty"),
        ([], {}, "prompt ids is empty"),
        ([[1, 13]], {}, r"prompt ids\[0, 1\] is 13, .* 0 to 12"),
        ([[-1]], {}, r"prompt ids\[0, 0\] is -1, .* 0 to 12"),
        ([[1.0]], {}, r"prompt ids\[0, 0\] is 1.0, not an integer"),
        ([[1, True]], {}, r"prompt ids\[0, 1\] is True, not an integer"),
        ([[1], [2, 13]], {}, r"prompt ids\[1\]\[1\] is 13, .* 0 to 12"),
        ([[1, 2], [1] * 9], {}, r"\(2, 9\): .*at most 8 tokens"),
        ([[1], []], {}, r"prompt ids\[1\] is empty"),
        ([[1], 2], {}, "prompt ids"),
        ([[1], [2, 3], 4], {}, r"\(3, 2\): .*batch, time"),
        ([[1], [[2], [3]]], {}, r"\(2, 2\): .*batch, time"),
        ((np.array([1]), [2, 2.5]), {}, r"prompt ids\[1\]\[1\] is 2.5, not an integer"),
        ([[1]], dict(stop_ids=[13]), r"stop_ids\[0\] is 13, .* 0 to 12"),
        ([[1]], dict(stop_ids=[0, -1]), r"stop_ids\[1\] is -1"),
        ([[1]], dict(max_new_tokens=-1), "max_new_tokens is -1: .* at least 0"),
        ([[1]], dict(max_new_tokens=2.0), "max_new_tokens is 2.0: .* at least 0"),
        ([[1]], dict(max_new_tokens=True), "max_new_tokens is True: .* at least 0"),
        ([[1]], dict(temperature=-1), "temperature is -1: .* at least 0"),
        ([[1]], dict(temperature=math.nan), "temperature is nan: .* at least 0"),
        ([[1]], dict(temperature=math.inf), "temperature is inf"),
        ([[1]], dict(temperature=10**400), "temperature is 10{400}: choose a finite"),
        ([[1]], dict(top_k=0), "top_k is 0: .* at least 1"),
        ([[1]], dict(top_k=2.5), "top_k is 2.5: .* at least 1"),
        ([[1]], dict(top_p=0), "top_p is 0: .* above 0"),
        ([[1]], dict(top_p=1.01), "top_p is 1.01: .* at most 1"),
        ([[1]], dict(top_p=math.nan), "top_p is nan: .* above 0"),
        ([[1]], dict(temperature="a"), "temperature is 'a'"),
        ([[1]], dict(stop_ids=3), "stop_ids is 3"),
        ([[1]], dict(stop_ids=np.array(3)), r"stop_ids is array\(3\)"),
        ([[1]], dict(suppress_ids=[[1, 2]]), r"suppress_ids is \[\[1, 2\]\]"),
        ([[1]], dict(rng=-1), "rng is -1"),
        ([[1]], dict(rng=np.random), "rng is a module"),
    ],
)
def test_arguments_are_checked_at_the_call(model, ids, options, said):
    with pytest.raises(Error, match=said) as raised:
        generate(model, ids, **options)  # no step is executed
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("smollm2", "'smollm2'"),
        (Path("runs/a"), r"PosixPath\('runs/a'\)"),
        (None, "None"),
        (GPT2, "the class GPT2"),
        (GPT2Config(), "a GPT2Config"),
        ([[1]], "a list"),
        (nn.Linear(2, 3, rng=0), "a Linear"),
    ],
    ids=["a name", "a path", "None", "a class", "a config", "ids", "a layer"],
)
def test_what_is_not_a_model_is_refused(given, found):
    for call in (lambda: generate(given, [[1]]), lambda: evaluate_text(given, [1, 2])):
        with pytest.raises(Error, match=f"^model is {found}: pass a model, such as load_model"):
            call()


def test_suppressing_copies_the_logits_and_ignores_ids_beyond_them():
    logits = np.zeros((1, 3))
    assert suppress(logits, [1, 7, 8]).tolist() == [[0, -np.inf, 0]] and not logits.any()
    with pytest.raises(Error, match="suppress_ids has all 3 ids"):
        suppress(logits, [2, 1, 0])


def test_all_ids_suppressed_is_not_called_damage(model):
    every = [*range(model.config.vocab_size), 0]
    with pytest.raises(Error, match="suppress_ids has all 13 ids"):
        generated(generate(model, [[1]], 1, suppress_ids=every))
    assert generated(generate(model, [[1]], 3, suppress_ids=every[1:-1])).tolist() == [[0, 0, 0]]


def test_damaged_weights_are_reported(model):
    damaged = small_gpt2()
    damaged.ln_f.bias.data[0] = np.nan
    with pytest.raises(Error, match="not finite"):
        next(generate(damaged, [[1]]))

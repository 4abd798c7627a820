"""Steps that repeat recorded NumPy calls give the model's logits, and stop when anything changes."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import GEMMA3, NO_DROPOUT, RELATIVES, SMALL_LLAMA, Wrapped, random_llama
from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig, Tensor, generate, nn, no_grad, optim
from tinyllm.errors import Error
from tinyllm.inference.decoding import DecodingSteps, _Recording, adjacent
from tinyllm.models import Gemma3, Qwen2Config
from tinyllm.models import cache as cache_module
from tinyllm.models.cache import Cache, RepeatedPlace
from tinyllm.models.rope import Rope
from tinyllm.nn import hooks
from tinyllm.nn.hooks import observe

SIZES = dict(vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4)
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=4, max_position_embeddings=64)
# A window in all layers but the first
WINDOWED = Qwen2Config(
    **SIZES, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
    use_sliding_window=True, sliding_window=7, max_window_layers=1,
)  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(23, 64, 12, n_layer=2, n_head=3, **NO_DROPOUT),
    "gpt2, erf": GPT2Config(23, 64, 12, n_layer=1, n_head=3, activation_function="gelu", **NO_DROPOUT),
    "llama": LLAMA,
    "llama with biases": replace(LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
}


def build(config, dtype=np.float64, seed=0):
    """A model with perturbed parameters, because biases of 0 and norm weights of 1 hide mistakes."""
    rng = np.random.default_rng(seed)
    model = (GPT2 if isinstance(config, GPT2Config) else Llama)(config, rng=rng).astype(dtype).eval()
    for parameter in model.parameters():
        parameter.data += (0.3 * rng.standard_normal(parameter.shape)).astype(dtype)
    return model


def decode(model, steps=20, rows=1, between=lambda step, cache: None):
    """Logits of every step, with ``between`` called before it, and the last recording."""
    cache, run = model.new_cache(rows, 60), DecodingSteps(model, 100)
    ids = np.random.default_rng(rows).integers(0, 23, (steps + 1, rows, 1))
    logits = []
    with no_grad():
        model(np.tile([[1, 2, 3]], (rows, 1)), cache=cache)
        for step in range(steps):
            between(step, cache)
            logits.append(run(ids[step], cache).data)
    return np.array(logits), next(reversed(run.recordings.values()), None)


def plainly(*args, **kwargs):
    """``decode`` by the model alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodingSteps, "_places", lambda *args: None)
        return decode(*args, **kwargs)[0]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_repeated_steps_give_the_logits_of_the_model(name, dtype, rows):
    model = build(CONFIGS[name], dtype)
    expected = plainly(model, rows=rows)
    logits, run = decode(model, rows=rows)
    assert run.is_checked
    assert logits.dtype == dtype
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()


def test_repeated_steps_run_no_module(monkeypatch):
    model, seen = build(LLAMA), []
    call = hooks.call

    def counted(module, *args, **kwargs):
        seen.append("model" if isinstance(module, Llama) else "layer")
        return call(module, *args, **kwargs)

    monkeypatch.setattr("tinyllm.nn.module.call", counted)
    decode(model, between=lambda step, cache: seen.append(step))
    assert seen.count("model") == 4  # the prompt, two steps that are recorded and one for comparison
    assert seen[-17:] == list(range(3, 20))


def test_lora_is_repeated():
    model = build(LLAMA)
    nn.add_lora(model, rank=2, targets="all-linear", rng=0)
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 if "lora_B" in name else 0
    expected = plainly(model)
    logits, run = decode(model)
    assert run.is_checked
    np.testing.assert_allclose(logits, expected, rtol=1e-11, atol=1e-12)


# ----------------------------------------------------------------- the model itself must run


def test_a_module_of_somebody_else_always_runs():
    """Its Python code may do more than call NumPy."""
    model = build(LLAMA)
    expected, calls = plainly(model), []

    class Adapter(Wrapped):
        def forward(self, x):
            calls.append(x)
            return super().forward(x)

    nn.replace(model, "layers.1.mlp.up_proj", lambda name, layer: Adapter(layer))
    logits, run = decode(model)
    assert run.plan is None
    assert len(calls) == 21  # the prompt and every step
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("name", ["forward", "hidden_states"])
def test_a_method_of_somebody_else_always_runs(name):
    model, calls = build(LLAMA), []
    method = getattr(model, name)
    setattr(model, name, lambda *args, **kwargs: calls.append(1) or method(*args, **kwargs))
    assert decode(model)[1].plan is None
    assert len(calls) == 21  # the prompt and every step


@pytest.mark.parametrize("step", [0, 1, 9])
@pytest.mark.parametrize(("kind", "name", "calls"), [(nn.RMSNorm, "forward", 5), (Llama, "hidden_states", 1)])
def test_a_method_that_is_patched_between_steps_runs(kind, name, calls, step, monkeypatch):
    model, seen, method = build(LLAMA), [], getattr(kind, name)

    def between(n, cache):
        if n == step:
            monkeypatch.setattr(kind, name, lambda *args: seen.append(1) or method(*args))

    decode(model, between=between)
    assert len(seen) == calls * (20 - step)


class Stretched(Rope):
    """Python code that decides by the position."""

    def __call__(self, positions, like):
        self.frequencies = self.frequencies / (4 if np.max(np.asarray(positions)) >= 12 else 1)
        return super().__call__(positions, like)


def test_a_rope_of_somebody_else_always_runs():
    model = build(LLAMA)
    model.rope = Stretched(model.config)
    expected = plainly(model)
    model.rope = Stretched(model.config)
    logits, run = decode(model)
    assert run.plan is None
    np.testing.assert_array_equal(logits, expected)


def test_a_model_may_hold_objects_without_attributes():
    model = build(LLAMA)
    expected = plainly(model)
    model.source = Path("a file")
    np.testing.assert_array_equal(decode(model)[0], expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_values_of_an_object_that_a_model_holds_may_be_replaced(name):
    """Such as the frequencies of RoPE, in a dict of objects, too."""

    def with_other_frequencies():
        config = replace(GEMMA3, vocab_size=23, max_position_embeddings=64)
        model = build(LLAMA) if name == "llama" else Gemma3(config, rng=0).astype(np.float64).eval()
        ropes = [model.rope] if name == "llama" else list(model.rope.ropes.values())

        def between(step, cache):
            if step == 9:
                for rope in ropes:
                    rope.frequencies = rope.frequencies / 4

        return model, between

    model, between = with_other_frequencies()
    expected = plainly(model, between=between)
    model, between = with_other_frequencies()
    logits, run = decode(model, between=between)
    assert run.is_checked
    np.testing.assert_allclose(logits, expected, rtol=1e-11, atol=1e-12)


def test_values_that_a_model_carries_may_be_replaced():
    """A list or dict of arrays has no truth value."""
    model = build(LLAMA)
    model.notes, model.means = {"seen": np.zeros(3)}, [np.zeros(3)]

    def between(step, cache):
        model.notes["seen"], model.means[0] = np.ones(3), np.ones(3)

    decode(model, between=between)


def test_an_observer_sees_every_step():
    model = build(LLAMA)
    expected, seen = plainly(model), []
    with observe(lambda observation: seen.append(observation.name)):
        logits, _ = decode(model)
    assert seen.count("norm") == 21
    np.testing.assert_array_equal(logits, expected)


def test_an_observer_may_come_and_go():
    model = build(LLAMA)
    expected, seen, blocks = plainly(model), [], []

    def between(step, cache):
        if step == 8:
            blocks.append(observe(lambda observation: seen.append(observation.name)))
            blocks[0].__enter__()
        if step == 11:
            blocks[0].__exit__(None, None, None)

    logits, run = decode(model, between=between)
    assert run.is_checked
    assert seen.count("norm") == 3
    np.testing.assert_allclose(logits, expected, rtol=1e-12)


def change_weight(model):
    weight = model.layers[1].self_attn.k_proj.weight
    weight.replace(weight.data * 2)


def change_in_place(model):
    model.layers[1].mlp.up_proj.weight.data[3] *= 2
    model.layers[1].self_attn.v_proj.weight.data -= 0.5


def change_layer(model):
    model.layers[0].mlp = build(LLAMA, seed=1).layers[0].mlp


def change_list(model):
    model.layers[0] = build(LLAMA, seed=1).layers[0]


def change_number(model):
    model.norm.eps = 0.5


def change_to_somebody_elses(model):
    model.layers[0].mlp = Wrapped(build(LLAMA, seed=1).layers[0].mlp)


def add_bias(model):
    model.layers[0].mlp.up_proj.bias = Tensor(np.full(20, 0.5))


def load_weights(model):
    model.load_state_dict(build(LLAMA, seed=1).state_dict())


def add_and_merge_adapters(model):
    nn.add_lora(model, rank=2, dropout=0.9, rng=0)
    for lora in nn.lora_layers(model).values():
        lora.lora_B.weight.data += 0.5
    nn.merge_lora(model)
    nn.add_lora(model, rank=2, dropout=0.9, targets=["up_proj"], rng=1)
    for lora in nn.lora_layers(model).values():
        lora.lora_B.weight.data -= 0.5


def start_to_train(model):
    model.train().layers[0].self_attn.attention_dropout = 0.9
    model.layers[1].mlp = nn.Dropout(0.9)


CHANGES = [
    change_weight, change_in_place, change_layer, change_list, change_number, change_to_somebody_elses,
    add_bias, load_weights, add_and_merge_adapters, start_to_train,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("step", [1, 2, 3, 9])
def test_a_change_takes_effect_at_the_next_step(change, step):
    models = build(LLAMA), build(LLAMA)
    expected = plainly(models[0], between=lambda n, cache: change(models[0]) if n == step else None)
    logits, _ = decode(models[1], between=lambda n, cache: change(models[1]) if n == step else None)
    np.testing.assert_allclose(logits, expected, rtol=1e-10)
    assert not np.array_equal(expected, plainly(build(LLAMA)))


@pytest.mark.parametrize("same", [lambda weight: weight, lambda weight: Tensor(weight.data)])
def test_a_matrix_that_two_layers_share_changes_in_both(same):
    def change(model):
        for layer in model.layers:
            layer.mlp.gate_proj.weight.data *= -1.5

    models = build(LLAMA), build(LLAMA)
    for model in models:
        for layer in model.layers:
            layer.mlp.up_proj.weight = same(layer.mlp.gate_proj.weight)
    expected = plainly(models[0], between=lambda n, cache: change(models[0]) if n == 9 else None)
    logits, run = decode(models[1], between=lambda n, cache: change(models[1]) if n == 9 else None)
    assert run.is_checked
    np.testing.assert_allclose(logits, expected, rtol=1e-10)


def test_rows_may_come_to_hold_equally_many_tokens_at_different_positions():
    def shift(step, cache):
        if step == 9:
            model([[5]], cache=cache[:1])
            cache.drop_oldest(np.array([1, 0]))

    model = build(LLAMA)
    expected = plainly(model, rows=2, between=shift)
    np.testing.assert_allclose(decode(model, rows=2, between=shift)[0], expected, rtol=1e-10)


LENGTHS = (3, 5, 1)
RAGGED = CONFIGS | {
    "a window": WINDOWED,
    "gemma3": replace(GEMMA3, max_position_embeddings=64),  # a window of 3 tokens in every layer but one
    "mistral": RELATIVES["mistral"](**SMALL_LLAMA | dict(max_position_embeddings=64, sliding_window=3)),
}


def decode_ragged(model, steps=25, kept=2):
    """Three rows of different lengths step together, and each alone; the newest recording."""
    rng, run = np.random.default_rng(0), DecodingSteps(model, 100, kept)
    together, alone = model.new_cache(3, 60), [model.new_cache(1, 60) for _ in LENGTHS]
    with no_grad():
        for row, length in enumerate(LENGTHS):
            prompt = rng.integers(0, 13, (1, length))
            for cache in (together[row : row + 1], alone[row]):
                model(prompt, cache=cache)
        for step in range(steps):
            if step == 15:  # a longer text leaves, and a new one comes
                for cache in (together[1:2], alone[1]):
                    cache.clear()
                    model([[1, 2]], cache=cache)
            ids = rng.integers(0, 13, (3, 1))
            logits = run(ids, together).data
            for row, cache in enumerate(alone):
                expected = model(ids[row : row + 1], cache=cache).data[0]
                assert np.abs(logits[row] - expected).max() <= 1e-10 * np.abs(expected).max(), (step, row)
            assert together.texts == [cache.texts[0] for cache in alone]
    return next(reversed(run.recordings.values()))


@pytest.mark.parametrize("slack", [2, 64])
@pytest.mark.parametrize("name", RAGGED)
def test_rows_of_different_lengths_are_repeated_and_are_as_alone(name, slack, monkeypatch):
    """With little slack the entries of layers with a window move often."""
    monkeypatch.setattr(cache_module, "SLACK", slack)
    config = RAGGED[name]
    model = build(config) if name in CONFIGS or name == "a window" else random_llama(config)
    assert decode_ragged(model, kept=6).is_checked or slack == 2


def change_place(self, place, correct=RepeatedPlace.follow, **changes):
    faulty = copy.copy(place)
    for name, change in changes.items():
        setattr(faulty, name, change(getattr(place, name)))
    correct(self, faulty)


def change_positions(self, ids, positions, places, correct=_Recording._fill):
    correct(self, ids, positions[:1], places)


FAULTS = {
    "a mask off by one": (
        RepeatedPlace,
        "follow",
        partial(change_place, mask=lambda mask: np.roll(mask, 1, -1)),
    ),
    "entries written over": (
        RepeatedPlace,
        "follow",
        partial(change_place, held=lambda held: held.clip(max=7)),
    ),
    "every row at the position of the first": (_Recording, "_fill", change_positions),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_in_rows_of_different_lengths_is_caught(fault, monkeypatch):
    """By the comparison of a recorded step with the model's, or by that with each row alone."""
    kind, name, function = FAULTS[fault]
    monkeypatch.setattr(kind, name, lambda self, *args: function(self, *args))
    try:
        is_checked = decode_ragged(build(LLAMA)).is_checked
    except AssertionError:
        is_checked = False
    assert not is_checked


USES = ["step"] * 12 + ["rollback", "several tokens", "clear a row", "drop"]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(USES), max_size=40),
    st.sampled_from(["full", "windowed"]),
    st.sampled_from([1, 2]),
)
def test_any_use_of_the_cache_gives_the_logits_of_the_model(uses, kind, rows):
    """Rollbacks, more tokens at once, cleared rows and dropped tokens between the steps."""
    model = build(WINDOWED if kind == "windowed" else LLAMA)

    def apply(step, cache):
        use = uses[step]
        if use == "rollback" and cache.lengths.min() > 3:
            cache.rollback(2)
        if use == "several tokens" and cache.free.min() > 8:
            model(np.full((rows, 3), 7), cache=cache)
        if use == "clear a row":
            cache[:1].clear()
        if use == "drop" and (cache.lengths - cache.dropped[None]).min() > 3:
            cache.drop_oldest(2)

    expected = plainly(model, len(uses), rows, apply)
    logits, _ = decode(model, len(uses), rows, apply)
    np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-10)


def steps_of(model, order, **options):
    """The recordings after one step of each of these caches, and how many steps the last one has recorded."""
    run, caches = DecodingSteps(model, 100, **options), [model.new_cache(1, 60) for _ in range(3)]
    with no_grad():
        for cache in caches:
            model([[1, 2]], cache=cache)
        counts = []
        for number in order:
            run(np.array([[3]]), caches[number])
            counts.append(len(next(reversed(run.recordings.values())).columns))
    return [caches.index(cache) for cache, *_ in run.recordings], counts


def test_the_recordings_used_last_are_kept():
    model = build(LLAMA)
    assert steps_of(model, [0, 1, 0, 2], kept=2)[0] == [0, 2]
    assert steps_of(model, [0, 1, 0])[0] == [0]


def test_patient_steps_are_recorded_later():
    assert steps_of(build(LLAMA), [0, 0, 0, 1, 0], kept=2, patience=2)[1] == [0, 0, 1, 0, 2]


# ------------------------------------------------------------------------------ the parameters


def test_parameters_become_neighbours_and_keep_their_values():
    model = build(LLAMA)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    decode(model)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
        assert array.flags.c_contiguous, name
    attention = model.layers[0].self_attn
    arrays = [layer.weight.data for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert len({id(array.base) for array in arrays}) == 1
    joined = adjacent(model)(arrays)
    assert np.shares_memory(joined, arrays[1])  # a second text copies nothing
    np.testing.assert_array_equal(joined, np.concatenate(arrays))
    assert [id(layer.weight.data) for layer in (attention.q_proj, attention.k_proj)] == list(
        map(id, arrays[:2])
    )


def test_generate_repeats_steps_and_writes_the_same_text():
    model = build(LLAMA, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodingSteps, "_places", lambda *args: None)
        expected = [tokens.tolist() for tokens in generate(model, [[1, 2, 3]], 50, temperature=0)]
    assert [tokens.tolist() for tokens in generate(model, [[1, 2, 3]], 50, temperature=0)] == expected


def text_of(model, *args, **kwargs):
    return [tokens.tolist() for tokens in generate(model, *args, temperature=0, **kwargs)]


def test_a_model_without_blocks_writes():
    model = build(LLAMA)
    model.layers = []
    assert text_of(model, [1, 2], 30) == text_of(model, [1, 2], 30, use_cache=False)


def test_a_layer_set_between_steps_is_in_eval_mode_too():
    texts = []
    for p in (0.0, 1.0):
        model, steps = build(LLAMA), []
        for step, tokens in enumerate(generate(model, [1, 2, 3], 30, temperature=0)):
            steps.append(int(tokens[0]))
            if step == 9:
                model.layers[0].mlp = nn.Dropout(p)
        texts.append(steps)
    assert texts[0] == texts[1]


def test_threads_share_a_model():
    """While one records or joins matrices, the others see the model as it is."""
    model = build(LLAMA, np.float32)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    prompts = [[1 + i, 2, 3] for i in range(6)]
    expected = [text_of(build(LLAMA, np.float32), prompt, 30) for prompt in prompts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(lambda prompt: text_of(model, prompt, 30), prompts)) == expected
    finally:
        sys.setswitchinterval(interval)
    for name, parameter in model.named_parameters():
        assert type(parameter.data) is np.ndarray
        np.testing.assert_array_equal(parameter.data, before[name])


@pytest.mark.parametrize("step", range(6))
def test_an_interrupted_step_leaves_the_model_and_the_cache(step, monkeypatch):
    model, cache, advance, count = build(LLAMA), build(LLAMA).new_cache(1, 60), Cache.advance, iter(range(99))
    expected = text_of(build(LLAMA), [1, 2, 3], 30)

    def interrupted(self, ids):
        if next(count) == step:
            raise KeyboardInterrupt
        advance(self, ids)

    monkeypatch.setattr(Cache, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text_of(model, [1, 2, 3], 30, cache=cache)
    assert {type(parameter.data) for parameter in model.parameters()} == {np.ndarray}
    assert {type(array) for array in cache.keys + cache.values} == {np.ndarray}
    text = [1, 2, 3] + [token for (token,) in expected]
    assert cache.texts[0] == text[: 2 + step if step else 0]
    assert text_of(model, [1, 2, 3], 30, cache=cache) == expected


@pytest.mark.parametrize("speculate", [None, "prompt"])
@pytest.mark.parametrize(("other", "count"), [([4, 5, 6], 1), ([1, 2, 3], 2), ([1, 2, 3, 7], 20)])
def test_a_cache_serves_one_text_at_a_time(other, count, speculate):
    model = build(LLAMA)
    cache = model.new_cache(1, 60)
    first = generate(model, [1, 2, 3], 30, temperature=0, cache=cache, speculate=speculate)
    next(first)
    assert text_of(model, other, count, cache=cache) == text_of(model, other, count)
    with pytest.raises(Error, match="another text meanwhile"):
        list(first)


def test_sampling_while_training_changes_no_bit():
    """Afterwards the parameters are views of joined matrices; their values and the optimizer's are equal."""
    states, ids = [], np.random.default_rng(0).integers(0, 23, (4, 9))
    for sample in (False, True):
        model = build(LLAMA, np.float32).train()
        optimizer = optim.AdamW(model, lr=0.01)
        for step in range(6):
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            if sample and step % 2:
                assert len(text_of(model, [1, 2], 20)) == 20
            optimizer.step()
            optimizer.zero_grad()
        states.append((model.state_dict(), optimizer.state_dict()))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert text_of(other, [1, 2], 20) == text_of(model, [1, 2], 20)
    for ours, theirs in zip(*states):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_equal(ours[name], theirs[name])

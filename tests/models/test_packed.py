"""Packed sequences: each is what it is alone, at 1e-12 in float64."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import (
    EVERYTHING,
    GEMMA3,
    NO_DROPOUT,
    SMALL_LLAMA,
    our_gradients,
    random_gpt2,
    random_llama,
)

from tinyllm import GPT2Config, nn
from tinyllm.errors import Error
from tinyllm.models import Qwen3Config
from tinyllm.models.packed import Packed

MODELS = {
    "gpt2": random_gpt2(
        GPT2Config(vocab_size=13, n_positions=24, n_embd=12, n_layer=2, n_head=3, **NO_DROPOUT)
    ),
    "qwen3, a window of 3 in one of two layers": random_llama(
        Qwen3Config(
            **SMALL_LLAMA | dict(max_position_embeddings=24),
            use_sliding_window=True,
            sliding_window=3,
            max_window_layers=1,
        )
    ),
    "llama": random_llama(replace(EVERYTHING, vocab_size=13, max_position_embeddings=24)),
    "gemma3": random_llama(replace(GEMMA3, max_position_embeddings=24)),
}


def sequences(lengths, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for n in lengths:
        targets = np.where(rng.random(n) < 0.3, -100, rng.integers(0, 13, n))
        targets[0] = 1
        found.append((rng.integers(0, 13, n), targets))
    return found


def packed(parts):
    ids, targets = (np.concatenate([part[i] for part in parts])[None] for i in (0, 1))
    return ids, targets, np.repeat(np.arange(len(parts)), [len(ids) for ids, _ in parts])[None]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([*MODELS]), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 9))
def test_loss_and_gradients_are_those_of_the_sequences_alone(name, lengths, seed):
    lengths = [n for i, n in enumerate(lengths) if sum(lengths[: i + 1]) <= 24]
    model, parts = MODELS[name], sequences(lengths, seed)
    count = sum(int((targets != -100).sum()) for _, targets in parts)
    model.zero_grad()
    alone = 0.0
    for ids, targets in parts:
        loss = model.loss(ids[None], targets[None], num_targets=count)
        loss.backward()
        alone += loss.item()
    expected = our_gradients(model)
    model.zero_grad()
    ids, targets, segments = packed(parts)
    loss = model.loss(ids, targets, num_targets=count, cache=Packed(segments, model))
    loss.backward()
    assert loss.item() == pytest.approx(alone, rel=1e-12)
    for key, gradient in our_gradients(model).items():
        assert np.abs(gradient - expected[key]).max() <= 1e-12 * max(np.abs(expected[key]).max(), 1), key


def test_rows_may_be_packed_differently_and_a_head_may_be_any_module():
    model, rows = MODELS["llama"], [sequences([3, 5]), sequences([6, 2], 1)]
    arrays = [np.concatenate(each) for each in zip(*map(packed, rows))]
    cache = Packed(arrays[2], model)
    states = model.hidden_states(arrays[0], cache).data
    for row, parts in enumerate(rows):
        alone = np.concatenate([model.hidden_states(ids[None]).data[0] for ids, _ in parts])
        assert np.abs(states[row] - alone).max() <= 1e-12 * np.abs(alone).max()
    fused = model.loss(*arrays[:2], cache=cache).item()

    class Same(nn.Module):
        def __init__(self, layer):
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    head, model.lm_head = model.lm_head, Same(model.lm_head)
    try:
        assert model.loss(*arrays[:2], cache=cache).item() == pytest.approx(fused, rel=1e-12)
    finally:
        model.lm_head = head


def test_a_sequence_number_may_come_again_and_a_window_holds_within_a_sequence(monkeypatch):
    model = MODELS["llama"]
    again = Packed(np.array([[0, 0, 1, 0]], np.uint8), model)
    assert again.positions(4).tolist() == [[0, 1, 0, 0]]
    assert again.keys[0][0, 0].tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]
    monkeypatch.setattr(model.layers[1].self_attn, "window", 2)
    windows = Packed(np.array([[0, 0, 0, 1]]), model).keys
    assert windows[0][0, 0, 2].tolist() == [True, True, True, False]
    assert windows[1][0, 0, 2].tolist() == [False, True, True, False]


@pytest.mark.parametrize("segments", [[0, 1], [[0.0, 1.0]]])
def test_segments_are_integers_with_two_axes(segments):
    with pytest.raises(Error, match=r"give integers of shape \(batch, time\)"):
        Packed(segments, MODELS["gpt2"])


def test_segments_have_the_shape_of_the_ids():
    model = MODELS["gpt2"]
    with pytest.raises(Error, match="one per id"):
        model.hidden_states([[1, 2, 3]], Packed(np.zeros((1, 2), int), model))

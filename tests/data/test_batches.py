"""Windows and batches: comparison with plain loops, and bad arguments."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.data.batches import Batches, Windows
from tinyllm.errors import Error

# Windows


@given(st.integers(2, 60), st.integers(1, 12), st.none() | st.integers(1, 20))
def test_windows_equal_plain_loops(length, context, stride):
    tokens = [100 + i for i in range(length)]  # all different, so that a token identifies its position
    if length < context + 1:
        with pytest.raises(Error, match=f"{length} tokens, .* context {context} .* need {context + 1}"):
            Windows(tokens, context, stride)
        return
    windows = Windows(tokens, context, stride)
    inputs, targets, seen = [], [], set()
    start = 0
    while start + context + 1 <= length:
        inputs.append(tokens[start : start + context])
        targets.append(tokens[start + 1 : start + context + 1])
        seen.update(tokens[start : start + context + 1])
        start += stride or context
    assert len(windows) == len(inputs)
    x, y = windows[np.arange(len(windows))]
    assert x.dtype == y.dtype == np.int64
    assert x.tolist() == inputs
    assert y.tolist() == targets
    assert windows.unused_tokens == length - len(seen)


def test_windows_index_as_numpy_does():
    windows = Windows(range(10), context=3)  # starts 0, 3, 6
    assert windows[[2, 0]][0].tolist() == [[6, 7, 8], [0, 1, 2]]
    assert windows[-1][1].tolist() == [7, 8, 9]
    assert windows[:2][0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [x[0] for x, _ in windows] == [0, 3, 6]
    with pytest.raises(IndexError):
        windows[[3]]


def test_windows_copy_the_tokens():
    tokens = np.arange(5)
    windows = Windows(tokens, context=4)
    tokens[:] = 0
    assert windows[0][0].tolist() == [0, 1, 2, 3]


def test_windows_of_a_memory_map_stay_on_disk(tmp_path):
    length = 4_000_000
    np.arange(length).astype("<u2").tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", dtype="<u2", mode="r")
    tracemalloc.start()
    windows = Windows(tokens, context=8, stride=1)
    inputs, targets = windows[[-1, 70_000]]
    assert len(windows) == length - 8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # an array of all tokens or windows would need millions
    assert np.shares_memory(windows.tokens, tokens)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.tolist() == [[(length - 9 + i) % 2**16 for i in range(8)], list(range(4464, 4472))]
    assert np.array_equal(targets[:, :-1], inputs[:, 1:])
    part = Windows(tokens[10:60], context=5)  # a slice, such as the split of a token file
    assert np.shares_memory(part.tokens, tokens)
    assert part[0][0].tolist() == [10, 11, 12, 13, 14]


def test_windows_reject_a_memory_map_of_floats(tmp_path):
    np.zeros(9).tofile(tmp_path / "floats.bin")
    floats = np.memmap(tmp_path / "floats.bin", dtype=np.float64, mode="r")
    with pytest.raises(Error, match=r"tokens\[0\] is 0.0, not an integer"):
        Windows(floats, context=2)


def test_windows_return_new_arrays():
    windows = Windows(range(10), context=3)
    for chosen in (0, slice(0, 2), [0, 1]):
        inputs, targets = windows[chosen]
        inputs[...], targets[...] = -1, -1
        assert inputs.flags.c_contiguous and targets.flags.c_contiguous
    assert windows[0][0].tolist() == [0, 1, 2]
    assert windows[0][1].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "said"),
    [
        (range(9), 0, None, "context is 0"),
        (range(9), -1, None, "context is -1"),
        (range(9), 2.0, None, "context is 2.0"),
        (range(9), 2, 0, "stride is 0"),
        ([], 4, None, "0 tokens, .* context 4 .*need 5"),
        (range(4), 4, None, "4 tokens, .* context 4 .*need 5"),
        (np.zeros((3, 3), int), 1, None, r"shape \(3, 3\)"),
        (np.zeros(9), 2, None, r"tokens\[0\] is 0.0, not an integer"),
        ("some text", 2, None, "tokens is 'some text', not an integer"),
    ],
)
def test_windows_reject_bad_arguments(tokens, context, stride, said):
    with pytest.raises(Error, match=said):
        Windows(tokens, context, stride)


def test_windows_error_names_the_text_that_is_too_short():
    with pytest.raises(
        Error, match=r"the validation part has only 3 tokens, .* need 5: .* longer .* smaller"
    ):
        Windows(range(3), context=4, name="the validation part")


# Batches


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**64 - 1), st.integers(0, 10**6))
def test_epoch_contains_every_window_once(count, batch_size, seed, epoch):
    batches = Batches(Windows(range(count + 1), context=1), batch_size, seed)
    assert batches.steps_per_epoch == len(range(0, count, batch_size))
    first = epoch * batches.steps_per_epoch
    sizes, seen = [], []
    for step in range(first, first + batches.steps_per_epoch):
        inputs, targets = batches.at(step)
        assert inputs.shape == targets.shape == (len(inputs), 1)
        assert np.array_equal(inputs + 1, targets)
        sizes.append(len(inputs))
        seen += inputs[:, 0].tolist()
    assert sorted(seen) == list(range(count))
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 100), min_size=1, max_size=20))
def test_any_step_can_be_reached_directly(seed, steps):
    windows = Windows(range(24), context=2)  # 11 windows, 4 steps an epoch
    visited = Batches(windows, 3, seed)
    for step in steps:
        expected = Batches(windows, 3, seed).at(step)
        assert np.array_equal(visited.at(step), expected)


def test_order_depends_on_seed_and_epoch():
    windows = Windows(range(101), context=1)

    def order(seed, epoch):
        return Batches(windows, 100, seed).at(epoch)[0][:, 0].tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1), order(2**63, 0), order(2**63 + 1, 0)]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert all(sorted(o) == list(range(100)) and o != list(range(100)) for o in orders)


def test_order_is_the_documented_one():
    batches = Batches(Windows(range(8), context=1), 3, seed=5)
    order = np.random.Generator(np.random.Philox(key=[5, 2])).permutation(7)
    for i in range(3):
        assert batches.at(2 * 3 + i)[0][:, 0].tolist() == order[3 * i : 3 * i + 3].tolist()


@pytest.mark.parametrize(
    ("batch_size", "seed", "said"),
    [
        (0, 0, "batch_size is 0"),
        (2.5, 0, "batch_size is 2.5"),
        (2, -1, "seed is -1"),
        (2, 2**64, "seed is 18446744073709551616"),
    ],
)
def test_batches_reject_bad_arguments(batch_size, seed, said):
    with pytest.raises(Error, match=said):
        Batches(Windows(range(9), context=2), batch_size, seed)


def test_batches_reject_a_negative_step():
    with pytest.raises(Error, match="step is -1"):
        Batches(Windows(range(9), context=2), 2, 0).at(-1)

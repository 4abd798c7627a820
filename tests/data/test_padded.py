"""Examples of different lengths as rows: padded, packed, and grouped by length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.data.batches import Batches
from tinyllm.data.padded import PackedExamples, PaddedExamples


def examples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, 50, n), rng.random(n) < 0.5) for n in lengths]


def pairs(ids, targets):
    return [(a, b) for a, b in zip(ids.tolist(), targets.tolist()) if b != -100]


def test_the_target_of_an_id_is_the_next_one_if_that_is_learned():
    rows = PaddedExamples(
        [(np.array([5, 6, 7]), np.array([0, 1, 0])), (np.array([1, 2, 3, 4]), np.array([1, 0, 1, 1]))]
    )
    ids, targets = rows[np.array([1, 0])]
    assert ids.tolist() == [[1, 2, 3], [5, 6, 0]]
    assert targets.tolist() == [[-100, 3, 4], [6, -100, -100]]
    assert rows.lengths.tolist() == [2, 3] and len(rows) == 2


lengths = st.lists(st.integers(2, 20), min_size=1, max_size=30)


@given(lengths, st.integers(1, 24))
def test_packing_keeps_every_example_whole(sizes, most):
    padded = PaddedExamples(examples(sizes))
    packed = PackedExamples(padded, most)
    assert sorted(i for row in packed.rows for i in row) == list(range(len(sizes)))
    assert all(n <= most for row, n in zip(packed.rows, packed.lengths) if len(row) > 1)
    ids, segments, targets = packed[np.arange(len(packed))]
    assert ids.shape == segments.shape == targets.shape == (len(packed), packed.lengths.max())
    for row, numbers in enumerate(packed.rows):
        for segment, i in enumerate(numbers):
            here = segments[row] == segment
            assert ids[row][here].tolist() == padded.inputs[i].tolist()
            assert targets[row][here].tolist() == padded.targets[i].tolist()
    assert (targets[segments == -1] == -100).all()


@given(lengths, st.integers(2, 20))
def test_first_fit_leaves_no_two_rows_that_fit_into_one(sizes, most):
    packed = PackedExamples(PaddedExamples(examples([min(n, most + 1) for n in sizes])), most)
    smallest = np.sort(packed.lengths)[:2]
    assert len(packed) == 1 or smallest.sum() > most


@given(lengths, st.integers(1, 7), st.integers(0, 3))
def test_batches_of_similar_length_contain_every_example_once_an_epoch(sizes, batch, seed):
    rows = PaddedExamples(examples(sizes))
    batches = Batches(rows, batch, seed, rows.lengths)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        seen = [pairs(*row) for step in steps for row in zip(*batches.at(step))]
        every = [pairs(*row) for row in zip(rows.inputs, rows.targets)]
        assert sorted(seen) == sorted(every)


def test_grouping_saves_padding_and_shuffles():
    rows = PaddedExamples(examples(np.random.default_rng(1).integers(2, 100, 400)))
    grouped, plain = (Batches(rows, 8, 0, lengths) for lengths in (rows.lengths, None))
    sizes = [sum(b.at(step)[0].size for step in range(b.steps_per_epoch)) for b in (grouped, plain)]
    assert sizes[0] < 1.05 * rows.lengths.sum() < sizes[1] / 1.5
    widths = [grouped.at(step)[0].shape[1] for step in range(grouped.steps_per_epoch)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)
    again = Batches(rows, 8, 0, rows.lengths)
    for step in (60, 3, 49):  # a pure function of the step
        assert np.array_equal(again.at(step)[0], grouped.at(step)[0])


def test_the_order_of_batches_of_similar_length_is_the_documented_one():
    lengths = np.random.default_rng(0).integers(1, 5, 700)  # many are equal
    batches = Batches(np.arange(700), 3, 5, lengths)
    rng = np.random.Generator(np.random.Philox(key=[5, 1]))
    order, expected = rng.permutation(700).tolist(), []
    for first in range(0, 700, 150):
        group = sorted(order[first : first + 150], key=lengths.__getitem__)
        expected += [group[i : i + 3] for i in range(0, len(group), 3)]
    shuffled = [expected[i] for i in rng.permutation(len(expected))]
    epoch = range(batches.steps_per_epoch, 2 * batches.steps_per_epoch)
    assert [batches.at(step).tolist() for step in epoch] == shuffled


def test_examples_of_equal_length_are_packed_in_their_order():
    packed = PackedExamples(PaddedExamples(examples([4, 5] * 50)), 4)
    assert packed.rows == [[i] for i in (*range(1, 100, 2), *range(0, 100, 2))]


def test_a_batch_may_be_any_number_of_arrays():
    packed = PackedExamples(PaddedExamples(examples([5, 6, 7])), 12)
    assert [array.shape for array in Batches(packed, 2, 0, packed.lengths).at(0)] == [(2, 11)] * 3


@pytest.mark.parametrize("batch", [1, 3])
def test_the_last_batch_may_be_smaller(batch):
    rows = PaddedExamples(examples([4] * 7))
    sizes = sorted(len(Batches(rows, batch, 0, rows.lengths).at(step)[0]) for step in range(-(-7 // batch)))
    assert sum(sizes) == 7 and sizes[-1] == batch

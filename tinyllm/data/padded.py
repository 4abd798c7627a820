"""Examples of different lengths as the rows of a batch: padded, or packed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

IGNORED = -100  # a target that does not count
PADDING = 0  # any id: in causal attention nothing before it depends on it


def pad(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Arrays (n,) of different lengths as one (B, T), filled on the right to the longest."""
    padded = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for target, row in zip(padded, rows):
        target[: len(row)] = row
    return padded


class PaddedExamples:
    """Examples of ids and of targets: what follows an id if it is learned, else -100.

    ``examples`` are pairs of ids (n,) and ``learned`` (n,), which says of every id whether the model shall
    predict it from those before it. An index gives ids and targets (B, T), T the longest of the batch.
    """

    def __init__(self, examples: Sequence[tuple[np.ndarray, np.ndarray]]):
        self.inputs = [ids[:-1] for ids, _ in examples]
        self.targets = [np.where(learned[1:], ids[1:], IGNORED) for ids, learned in examples]
        self.lengths = np.array([len(ids) for ids in self.inputs])

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, indices) -> tuple[np.ndarray, ...]:
        return pad([self.inputs[i] for i in indices], PADDING), pad(
            [self.targets[i] for i in indices], IGNORED
        )


class PackedExamples:
    """The same examples, several in a row of at most ``length`` tokens.

    An index gives ids, segments and targets (B, T); ``segments`` number the examples in each row, from 0, and
    go to ``models/packed.py``. Rows are filled by first fit, the longest examples first, which leaves few
    rows more than the fewest possible; an example is never divided.
    """

    def __init__(self, examples: PaddedExamples, length: int):
        self.examples, self.rows = examples, []
        free: list[int] = []
        for i in np.argsort(-examples.lengths, kind="stable").tolist():
            size = int(examples.lengths[i])
            row = next((row for row, left in enumerate(free) if size <= left), len(free))
            if row == len(free):
                free.append(length)
                self.rows.append([])
            free[row] -= size
            self.rows[row].append(i)
        self.lengths = np.array([examples.lengths[row].sum() for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices) -> tuple[np.ndarray, ...]:
        inputs, segments, targets = [], [], []
        for row in (self.rows[i] for i in indices):
            inputs.append(np.concatenate([self.examples.inputs[i] for i in row]))
            segments.append(np.repeat(np.arange(len(row)), self.examples.lengths[row]))
            targets.append(np.concatenate([self.examples.targets[i] for i in row]))
        return pad(inputs, PADDING), pad(segments, -1), pad(targets, IGNORED)

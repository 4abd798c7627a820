"""How do several sequences share a row without seeing each other?

A batch of sequences of different lengths is padded to the longest, and the padding costs as much as text.
Packed, short sequences follow each other in one row instead. Two things keep each of them what it is alone: a
query sees only keys of its own sequence (a block-diagonal mask, in addition to the causal one), and positions
start at 0 with every sequence. Krell et al., "Efficient Sequence Packing without Cross-contamination"
(arXiv 2107.02027), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllm.errors import Error
from tinyllm.models.rope import changes_with_length


@dataclass(frozen=True)
class PackedLayer:
    """What one layer needs of ``Packed``, in the form of a ``LayerCache`` that holds nothing."""

    mask: Any  # (B, 1, T, T), True where a query may attend
    offsets = np.zeros(1, np.int64)  # the first query is in the column of the first key

    @property
    def place(self) -> PackedLayer:
        return self

    def extend(self, key, value):
        return key, value


class Packed:
    """The sequences in each row of ids (B, T), for ``model.loss`` and ``model.hidden_states`` as their cache.

    ``segments`` (B, T) has the number of the sequence to which each token belongs; where the number changes,
    another sequence begins. Negative numbers are padding, which has the position of the last token before
    it, so that a row's angles depend on its own length (``rope.py``). Raises ``Error`` unless it is such an
    array.
    """

    def __init__(self, segments, model):
        segments = np.asarray(segments)
        if segments.ndim != 2 or segments.dtype.kind not in "iu":
            raise Error(
                f"segments are {segments.dtype} {segments.shape}: give integers of shape (batch, time)"
            )
        self.segments, column = segments, np.arange(segments.shape[1])
        begins = np.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        positions = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
        last = np.maximum.accumulate(np.where(segments >= 0, column, 0), axis=1)  # that is no padding
        self._positions = np.take_along_axis(positions, last, axis=1)
        sequence = begins.cumsum(axis=1)
        same = (sequence[:, :, None] == sequence[:, None, :])[:, None]  # (B, 1, T, T)
        windows = model.windows()
        like = next(model.parameters()).data
        masks = {
            window: same if window is None else same & (column > column[:, None] - window)
            for window in windows
        }
        masks = {window: np.asarray(mask, like=like) for window, mask in masks.items()}
        self.keys = [masks[window] for window in windows]  # one per layer

    def positions(self, count: int) -> np.ndarray:
        """Positions (B, T), each counted from the beginning of its sequence."""
        return self._positions

    def layers(self, rows: int, count: int) -> list[PackedLayer]:
        if (rows, count) != self.segments.shape:
            raise Error(f"ids are {(rows, count)}, and segments {self.segments.shape}: give one per id")
        return [PackedLayer(mask) for mask in self.keys]

    def advance(self, ids: np.ndarray) -> None:
        """Nothing is kept."""


def padded(lengths: np.ndarray, time: int, model) -> Packed | None:
    """The cache for rows of one text each, of ``lengths`` (B,), padded on the right to ``time`` tokens.

    It is None unless the angles of RoPE depend on a text's length: otherwise padding changes nothing.
    """
    if not changes_with_length(model.config):
        return None
    return Packed(np.where(np.arange(time) < lengths[:, None], 0, -1), model)

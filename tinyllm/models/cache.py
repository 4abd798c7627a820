"""How does a model decode a token without computing the whole text again?

A position depends on earlier positions only through their keys and values, and because attention is causal
(Vaswani et al., arXiv 1706.03762) these do not change when a token is appended. So they are computed once and
cached, and a decoding step computes one position instead of all.

The cost is memory: 2 · layers · G · D numbers per token and row. In float32 that is 46 KB per token for
SmolLM2-135M, 1 MB for Llama 2 7B, and 262 KB for Llama 3 8B, where 32 query heads share 8 key-value heads.
Pope et al., "Efficiently Scaling Transformer Inference" (arXiv 2211.05102), section 3.3, analyses this cost.

Rows have texts of different lengths. Each begins in column 0 and is extended at its own end, and a mask hides
the columns beyond it:

    row 0   The  cat  sat  on    |            the next token goes to column 4
    row 1   Hello |                           to column 1: columns 1 to 4 are masked

Shapes: B rows, T new tokens, S columns, G key-value heads of size D.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyllm import nn
from tinyllm.errors import Error
from tinyllm.tensor import Tensor
from tinyllm.tensor_ops import where

# A layer with a window keeps this many entries more than the window, so that as many tokens can be rolled
# back, and twice as many in memory, so that the entries move to column 0 only once in so many tokens.
SLACK = 64


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values during one forward pass, created by ``Cache.layers``."""

    keys: Any  # (B, G, capacity, D)
    values: Any
    place: Place

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values, (B, G, T, D); returns those to attend to, (B, G, S, D).

        Raises ``Error`` if they require a gradient, because the cache stores arrays without a graph.
        """
        if key.needs_grad or value.needs_grad:
            raise Error("a cache does not support gradients: use it under no_grad()")
        expected, *found = (x.shape[1::2] for x in (self.keys, key, value))
        if found != [expected, expected]:
            raise Error(
                f"the cache has keys and values of (heads, head size) {expected}, from the config, but the "
                f"layers compute {found[0]} and {found[1]}: generate with use_cache=False"
            )
        append = self.place.append
        return Tensor(append(self.keys, key.data)), Tensor(append(self.values, value.data))


@dataclass
class Place:
    """Where the T new tokens of one forward pass go, the same in all layers with the same window.

    Query t of a row that holds n entries is in column n + t. It sees the columns up to its own, with a window
    of W only the last W of them: n + t - W < column ≤ n + t.
    """

    held: np.ndarray  # (B,): the number of entries of each row before the pass
    count: int  # T
    window: int | None
    capacity: int
    mask: Any = None  # (B or 1, 1, T, S), True where a query may attend; None if being causal is enough
    tails: list = field(default_factory=list)  # arrays, and their new contents when the pass is complete
    used: bool = False  # whether a layer stored its entries

    def __post_init__(self):
        self.same = (self.held == self.held[0]).all()
        self.stop = int(self.held.max()) + self.count
        # Columns that no query sees are not returned: ``first`` to ``end`` are.
        self.first = 0 if self.window is None else max(0, int(self.held.min()) + 1 - self.window)
        self.end = self.stop
        if self.window is not None and not self.same and self.count == 1 and self.stop <= self.capacity:
            # Which ones are seen is decided by the mask, so that few of the steps read different columns.
            self.first, self.end = 0, min(self.capacity, -(-self.stop // SLACK) * SLACK)
        cut = self.window is not None and self.end - self.first > self.window
        if not self.same or cut:
            column, query = (
                np.arange(self.first, self.end),
                self.held[:, None, None] + np.arange(self.count)[:, None],
            )
            mask = column <= query
            if cut:
                mask &= column > query - self.window
            self.mask = mask[:, None]

    @property
    def offsets(self) -> np.ndarray:
        """Of each row, or once if all are equal: the first query's column minus the first key's."""
        return (self.held[:1] if self.same else self.held) - self.first

    def append(self, entries, new):
        """Write ``new`` (B, G, T, D) into ``entries`` (B, G, capacity, D); returns the columns that are seen.

        A pass with more tokens than a window holds is attended to in an array of its own, of which
        ``Cache.advance`` keeps the end.
        """
        self.used = True
        if self.stop > self.capacity:
            B, G, _, D = entries.shape
            longer = np.zeros((B, G, self.stop, D), entries.dtype, like=entries)
            held = self.stop - self.count
            longer[:, :, :held] = entries[:, :, :held]
            self.tails.append((entries, longer))
            entries = longer
        if self.same:
            entries[:, :, self.stop - self.count : self.stop] = new
        else:
            for row, start in enumerate(self.held.tolist()):
                entries[row, :, start : start + self.count] = new[row]
        return entries[:, :, self.first : self.end]


class RepeatedPlace:
    """The place of one new token in each row, in arrays that stay the same from step to step.

    NumPy calls on these arrays, once recorded, can be repeated for rows of other lengths: ``follow`` changes
    the contents only. What a step reads depends on the columns ``first`` to ``end`` of the ``Place``.
    """

    def __init__(self, place: Place, heads: int):
        rows = len(place.held)
        self.starts = np.arange(rows * heads) * place.capacity  # of each row's heads, in columns of all
        self.index = np.empty(rows * heads, np.int64)  # where the new entries go
        self.masks = np.empty((rows, 1, 1, place.capacity), bool)
        self.follow(place)

    def follow(self, place: Place) -> None:
        np.add(self.starts, np.repeat(place.held, len(self.starts) // len(place.held)), out=self.index)
        self.first, self.end, self.offsets = place.first, place.end, place.offsets
        self.mask = self.masks[..., self.first : self.end]
        self.mask[...] = place.mask

    def append(self, entries, new):
        """``Place.append`` for ``new`` (B, G, 1, D)."""
        D = entries.shape[3]
        entries.reshape(-1, D)[self.index] = new.reshape(-1, D)
        return entries[:, :, self.first : self.end]


class Cache:
    """Keys and values of all layers for ``batch`` rows of up to ``capacity`` tokens, initially empty.

    Its arrays have the type, and unless ``dtype`` is given the dtype, of the model's array ``like``.
    ``windows`` has an item for each layer: how many positions a query sees, its own included, or None for
    all. A layer with a window stores little more than the window.

    ``model(ids, cache=cache)`` treats ids (B, T) as the continuation of the cached texts and appends them. If
    it raises, the cached texts are unchanged. ``cache[2:5]`` is a cache of these rows in the same memory:
    rows may be filled, extended and cleared independently of the others.
    """

    def __init__(self, windows: Sequence, batch: int, heads: int, capacity: int, size: int, like, dtype=None):
        dtype = dtype or like.dtype
        self.capacity = capacity  # in tokens, of the layers without a window
        self.changes: Sequence[int] = ()  # the keys of a text of more tokens have other angles
        self.texts: list[list[int]] = [[] for _ in range(batch)]  # the cached ids, dropped ones included
        self.windows = tuple(windows)
        # By window: the number of oldest tokens of each row (B,) that its layers no longer hold. For None,
        # also if all layers have a window, how many no longer count as part of ``capacity``.
        self.dropped = {window: np.zeros(batch, np.int64) for window in (None, *self.windows)}
        shapes = [(batch, heads, self._capacity(window), size) for window in self.windows]
        self.keys = [np.zeros(shape, dtype, like=like) for shape in shapes]
        self.values = [np.zeros(shape, dtype, like=like) for shape in shapes]
        self._places: Sequence[Place] = ()  # of the last forward pass

    def _capacity(self, window: int | None) -> int:
        return self.capacity if window is None else min(self.capacity, window + 2 * SLACK)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each row (B,), dropped ones included: the position of its next token."""
        return np.array([len(text) for text in self.texts], np.int64)

    @property
    def free(self) -> np.ndarray:
        """How many more tokens each row (B,) can hold."""
        return self.capacity - (self.lengths - self.dropped[None])

    def positions(self, count: int) -> np.ndarray:
        """Positions of the next ``count`` tokens: (T,), or (B, T) if rows differ."""
        lengths = self.lengths
        same = (lengths == lengths[0]).all()
        return lengths[0] + np.arange(count) if same else lengths[:, None] + np.arange(count)

    # -------------------------------------------------------------------------- a forward pass

    def layers(self, rows: int, count: int) -> list[LayerCache]:
        """Each layer's part of the cache, for appending ``count`` tokens (T) to each of ``rows`` rows (B)."""
        places = self.places(rows, count)
        parts = zip(self.keys, self.values, self.windows)
        return [LayerCache(keys, values, places[window]) for keys, values, window in parts]

    def places(self, rows: int, count: int) -> dict[int | None, Place]:
        """By window: where ``layers`` appends the tokens, for which this makes room."""
        if rows != len(self.texts) or (count > self.free).any():
            held = ", ".join(map(str, dict.fromkeys((self.capacity - self.free).tolist())))
            raise Error(
                f"ids of shape {(rows, count)} do not fit a cache of {len(self.texts)} rows that hold {held} "
                f"of at most {self.capacity} tokens: create a larger one with new_cache()"
            )
        places = {}
        for window in dict.fromkeys(self.windows):
            dropped = self.dropped[window]
            capacity, kept = self._capacity(window), self.lengths - dropped
            if window is not None and kept.max() + count > capacity:
                self._drop(window, np.maximum(kept - self._kept(window), 0))
            place = Place(self.lengths - dropped, count, window, capacity)
            place.mask = None if place.mask is None else np.asarray(place.mask, like=self.keys[0])
            places[window] = place
        self._places = list(places.values())
        return places

    def _kept(self, window: int) -> int:
        """How many entries a layer keeps when others make room."""
        return min(window - 1 + SLACK, self._capacity(window))

    def advance(self, ids: np.ndarray) -> None:
        """End a forward pass: its ``ids`` (B, T) are now part of the cached texts."""
        for place in self._places:
            if place.tails:
                ends = place.held + place.count
                kept = np.minimum(ends, self._kept(place.window))
                for entries, longer in place.tails:
                    for row, (end, n) in enumerate(zip(ends.tolist(), kept.tolist())):
                        entries[row, :, :n] = longer[row, :, end - n : end]
                self.dropped[place.window] += ends - kept
        for text, new in zip(self.texts, ids.tolist()):
            text += new

    @property
    def is_ignored(self) -> bool:
        """Whether no layer stored keys and values in the last pass, so that the next cannot continue it."""
        return bool(self._places) and not any(place.used for place in self._places)

    # ------------------------------------------------------------------------------------- rows

    def __getitem__(self, rows: slice) -> Cache:
        part = copy.copy(self)
        part.texts = self.texts[rows]
        part.dropped = {window: dropped[rows] for window, dropped in self.dropped.items()}
        part.keys, part.values = ([entries[rows] for entries in all] for all in (self.keys, self.values))
        return part

    def clear(self) -> None:
        """Empty all rows."""
        for text in self.texts:
            text.clear()
        for dropped in self.dropped.values():
            dropped[:] = 0

    def copy_row(self, source: int, target: int, length: int | None = None) -> None:
        """Replace the row ``target`` by a copy of the row ``source``, or of its first ``length`` tokens."""
        self.texts[target][:] = self.texts[source][:length]
        for dropped in self.dropped.values():
            dropped[target] = dropped[source]
        for window, keys, values in zip(self.windows, self.keys, self.values):
            held = max(0, len(self.texts[target]) - self.dropped[window][source])
            for entries in (keys, values):
                entries[target, :, :held] = entries[source, :, :held]

    def swap_rows(self, a: int, b: int) -> None:
        """Exchange two rows."""
        held = {window: (self.lengths - dropped)[[a, b]].max() for window, dropped in self.dropped.items()}
        self.texts[a][:], self.texts[b][:] = self.texts[b][:], self.texts[a][:]
        for dropped in self.dropped.values():
            dropped[[a, b]] = dropped[[b, a]]
        for window, keys, values in zip(self.windows, self.keys, self.values):
            for entries in (keys, values):
                entries[[a, b], :, : held[window]] = entries[[b, a], :, : held[window]]

    def with_capacity(self, capacity: int) -> Cache:
        """A copy with another capacity. Raises ``Error`` if a row holds more tokens, in any layer."""
        held = max(int((self.lengths - dropped).max()) for dropped in self.dropped.values())
        if held > capacity:
            raise Error(f"the cache holds {held} tokens, more than a capacity of {capacity}")
        B, G, _, D = self.keys[0].shape
        new = Cache(self.windows, B, G, capacity, D, self.keys[0])
        new.texts, new.changes = [list(text) for text in self.texts], self.changes
        new.dropped = {window: dropped.copy() for window, dropped in self.dropped.items()}
        for old_entries, entries in zip(self.keys + self.values, new.keys + new.values):
            columns = min(old_entries.shape[2], entries.shape[2])
            entries[:, :, :columns] = old_entries[:, :, :columns]
        return new

    # ----------------------------------------------------------------------- the ends of a text

    def rollback(self, count: int | np.ndarray) -> None:
        """Remove the newest ``count`` tokens, or as many of each row as ``count`` (B,) says.

        Raises ``Error``, and changes nothing, if a row has fewer, or if the tokens that would be seen next
        are no longer held: a layer with a window can go back by at most ``SLACK`` tokens. Nor can a text with
        the angles of a long one ("longrope") become a short one.
        """
        lengths = self.lengths - count
        if not (lengths <= self.lengths).all() or not self._holds(lengths).all():
            raise Error(f"the cache cannot roll back {count} tokens: its rows have {self.lengths.tolist()}")
        for text, length in zip(self.texts, lengths):
            del text[length:]

    def _holds(self, lengths: np.ndarray) -> np.ndarray:
        """(B,): whether each row, shortened to its item of ``lengths``, would hold what it sees next."""
        held = lengths >= 0
        for window, dropped in self.dropped.items():
            held &= dropped <= (lengths if window is None else np.maximum(lengths + 1 - window, 0))
        for most in self.changes:
            held &= (self.lengths <= most) | (lengths > most) | (lengths == 0)
        return held

    def keep_prefix(self, texts: Sequence[Sequence[int]]) -> None:
        """Keep of each row what it has in common with its item of ``texts``, except the last token.

        The model then continues with the others: its logits are those of a new cache. So a row of which
        tokens were dropped, or whose keys would have other angles, is cleared.
        """
        lengths = np.array([common_prefix(old, new) for old, new in zip(self.texts, texts, strict=True)])
        complete = self._holds(lengths) & (self.dropped[None] == 0)
        for i, keep in enumerate(complete):
            if keep:
                del self.texts[i][lengths[i] :]
            else:
                self[i : i + 1].clear()

    def drop_oldest(self, count: int | np.ndarray) -> None:
        """Remove the oldest ``count`` tokens, or as many of each row as ``count`` (B,) says, from the layers
        without a window. The others keep their positions. Raises ``Error`` if a row holds fewer.
        """
        count, held = np.broadcast_to(count, len(self.texts)), self.capacity - self.free
        if (count < 0).any() or (count > held).any():
            raise Error(f"the cache cannot drop {count.tolist()} tokens: its rows hold {held.tolist()}")
        self._drop(None, count)

    def _drop(self, window: int | None, count: np.ndarray) -> None:
        """Move the entries of each row over its oldest ones. If that is interrupted, the row is cleared."""
        held = self.lengths - self.dropped[window]
        layers = [i for i, each in enumerate(self.windows) if each == window]
        for row, (n, end) in enumerate(zip(count.tolist(), held.tolist())):
            try:
                for i in layers if n else ():
                    for entries in (self.keys[i], self.values[i]):
                        # Copied first, because source and destination overlap.
                        entries[row, :, : end - n] = entries[row, :, n:end].copy()
                self.dropped[window][row] += n
            except BaseException:
                self[row : row + 1].clear()
                raise


def common_prefix(cached: Sequence[int], text: Sequence[int]) -> int:
    """The length of the common prefix, less than that of ``text``."""
    most = min(len(cached), len(text) - 1)
    return next((i for i in range(most) if cached[i] != text[i]), most)


def look_back(query: Tensor, key: Tensor, value: Tensor, cache: LayerCache | None, score_bias=None):
    """The keys and values (B, G, S, D) for the queries (B, H, T, D), and a mask or None.

    With a cache, the cached keys and values precede the new ones, and the mask hides what is not seen.

    ``score_bias``, a module, is called with the distances (T, S), query position minus key position (negative
    for future keys). It returns the term to add to the attention scores: an array or, to be trained, a Tensor
    that broadcasts to (B, H, T, S). ALiBi (arXiv 2108.12409) returns -slopes * distances with slopes
    (H, 1, 1). With a cache whose rows have different lengths it is called for each row, with B = 1.
    """
    visible, offsets = None, np.zeros(1, np.int64)  # the distance of the first query from the first key
    if cache is not None:
        (key, value), visible, offsets = cache.extend(key, value), cache.place.mask, cache.place.offsets
    if score_bias is None:
        return key, value, visible
    if not isinstance(score_bias, nn.Module):  # a function would not be saved with the model
        raise Error(f"score_bias is a {type(score_bias).__name__}: use a tinyllm.nn.Module")
    H, T, S = *query.shape[1:3], key.shape[2]
    apart = np.arange(T)[:, None] - np.arange(S)  # (T, S)
    terms = [_score_term(score_bias(offset + apart), query) for offset in offsets]
    mask = terms[0]
    if len(terms) > 1:  # decoding: without a graph
        shapes = [np.broadcast_to(term.data, (1, H, T, S)) for term in terms]
        mask = Tensor(np.concatenate(shapes))  # (B, H, T, S)
    return key, value, mask if visible is None else where(visible, mask, -np.inf)


def _score_term(added, query: Tensor) -> Tensor:
    if not isinstance(added, Tensor):
        added = Tensor(np.asarray(added, like=query.data))
    if added.dtype.kind not in "fiu":
        raise Error(f"score_bias returned {added.dtype}: return numbers to add to the scores")
    return added.astype(query.dtype)

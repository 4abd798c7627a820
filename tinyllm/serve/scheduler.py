"""How do several conversations share one model?

Decoding one token reads every weight, and decoding one token for each of eight texts reads them no more
often. So texts are decoded together, as rows of one cache. They do not begin and end together: after every
step a row whose text is complete leaves, and a waiting request takes its place. This is continuous batching
(Yu et al., "Orca", OSDI 2022: iteration-level scheduling).

    step     1  2  3  4  5  6  7  8  9
    row 0    P  P  a  a  a  a  .  P  c      P a chunk of a prompt, a b c tokens of an answer,
    row 1       P  .  P  b  b  b  b  b      . the row waits or is idle

A step processes a chunk of at most one prompt, so that a long prompt does not keep the others waiting, and
then one token of every row that is decoding. An idle row keeps its text: the next turn of a conversation goes
to the row with the longest common prefix, and only what is new is processed.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tinyllm.checks import check_at_least, check_ids
from tinyllm.errors import Error
from tinyllm.inference.decoding import DecodingSteps
from tinyllm.inference.generate import logits_of
from tinyllm.inference.sampling import check_sampling, choose_tokens, most_likely, suppress
from tinyllm.models.cache import Cache, common_prefix
from tinyllm.models.rope import longest_cached

CHUNK = 64  # tokens of a prompt in a step while others decode: about the time of one more step
LONG_CHUNK = 512  # while none does
START = 1024  # tokens that a row holds at first
STEADY = 16  # steps of some rows, after which they are recorded, which costs what 14 steps gain
RECORDINGS = 20  # kept: of every number of rows that decode together now and then
NEAR = 1024  # tokens that may be moved so that the rows of a step are the first ones


class Busy(Exception):
    """The queue is full."""


class Sampled(NamedTuple):
    """A token, and if asked for, natural logarithms of probabilities at temperature 1."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens, in decreasing order, ties by id


@dataclass(eq=False, kw_only=True)
class Request:
    """A text to continue, and whom to tell.

    ``on_token`` is called with every token and returns whether the text ends with it. ``on_end`` is called
    once, with "stop", "length", "cancelled" or the exception that ended this row. Both are called in the
    thread that steps. ``seed`` None stands for a random one. Any thread may set ``cancelled``: the row is
    free before the next step. ``top`` is the number of alternatives to report with each token, None for no
    log-probabilities at all.
    """

    ids: Sequence[int]
    on_token: Callable[[Sampled], bool]
    on_end: Callable[[str | Exception], None]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | Sequence[int] | None = None
    stop_ids: Sequence[int] = ()
    top: int | None = None
    cancelled: bool = False
    cached_tokens: int = 0  # of the prompt, from before its batch was submitted; known with the first token
    batch: object = None  # what was submitted together


class _Row:
    """A request in its row of the cache: the text so far, and its own random numbers."""

    def __init__(self, request: Request, number: int):
        self.request, self.number, self.text = request, number, list(request.ids)
        self.rng = np.random.default_rng(request.seed)
        self.left, self.begun = request.max_new_tokens, False


class Scheduler:
    """Requests that share ``slots`` rows of a cache of ``capacity`` tokens each, and a queue of ``queue``.

    ``submit`` may be called by any thread, everything else by one thread at a time. The tokens of a request
    are those that ``generate`` samples for it alone, with ``rng=seed``: up to rounding, because products of
    more rows are summed in another order. ``suppress_ids`` have probability 0.
    """

    def __init__(self, model, slots: int = 4, capacity: int | None = None, queue: int = 32, suppress_ids=()):
        slots, queue = check_at_least(slots, 1, "slots"), check_at_least(queue, 1, "queue")
        most = longest_cached(model.config)  # a text is read in chunks, and goes on in later turns
        self.model = model
        self.capacity = most if capacity is None else check_at_least(capacity, 1, "capacity")
        if self.capacity > most:
            raise Error(
                f"a context of {capacity:,} tokens is more than this model's: choose at most {most:,}"
            )
        self.cache = model.new_cache(slots, min(START, self.capacity))
        self.queue, self.suppress_ids = queue, suppress_ids
        self.waiting: collections.deque[Request] = collections.deque()
        self.rows: list[_Row | None] = [None] * slots  # by row of the cache
        self.used = [0] * slots  # when each row was last in use: a time that counts requests
        # The batch that filled each row, and how many tokens of earlier ones it found there
        self.filled = [(None, 0)] * slots
        self._lock, self._clock, self._held = threading.Lock(), itertools.count(1), 0
        self._views: dict[tuple[int, int], Cache] = {}
        self._run = DecodingSteps(model, self.capacity, RECORDINGS, STEADY)
        self.ends: collections.deque[float] = collections.deque(maxlen=9)  # times at which rows became free

    def submit(self, *requests: Request) -> None:
        """Append requests to the queue, all or none. Raises ``Busy``, and ``Error`` for a request that can
        never be served.
        """
        for request in requests:
            check_ids(request.ids, self.model.config.vocab_size, "prompt")
            if len(request.ids) > self.capacity:
                held, most = len(request.ids), self.capacity
                raise Error(f"the prompt has {held} tokens, but a row holds {most}: shorten it")
            check_at_least(request.max_new_tokens, 1, "max_new_tokens")
            check_sampling(request.temperature, request.top_k, request.top_p)
        batch = object()
        for request in requests:
            request.batch = batch
        with self._lock:
            self._check_free(len(requests))
            self.waiting.extend(requests)

    @contextlib.contextmanager
    def held(self, count: int):
        """Hold ``count`` places of the queue within the block, for requests that are being prepared.

        Raises ``Busy`` if there are not as many.
        """
        with self._lock:
            self._check_free(count)
            self._held += count
        try:
            yield
        finally:
            with self._lock:
                self._held -= count

    def _check_free(self, count: int) -> None:
        if len(self.waiting) + self._held + count > self.queue + self.rows.count(None):
            raise Busy

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or any(self.rows)

    def step(self) -> None:
        """Free the rows of cancelled requests, admit others, process a chunk of a prompt, decode a token."""
        self._drop_cancelled()
        self._admit()
        active = sorted(filter(None, self.rows), key=lambda row: row.number)
        decoding = [row for row in active if row.begun and len(self._pending(row)) == 1]
        prompt = next((row for row in active if row not in decoding), None)
        if prompt is not None:
            self._prefill(prompt, CHUNK if decoding else LONG_CHUNK)
        if decoding:
            self._decode(decoding)

    def end_waiting(self, error: Exception) -> None:
        """End the requests that have no row yet with this exception."""
        with self._lock:
            waiting = list(self.waiting)
            self.waiting.clear()
        for request in waiting:
            request.on_end(error)

    def end_all(self, error: Exception) -> None:
        """End every request with this exception, and forget all texts."""
        self.end_waiting(error)
        for row in filter(None, list(self.rows)):
            self._end(row, error)
        self.cache.clear()

    # ---------------------------------------------------------------------------- rows come and go

    def _drop_cancelled(self) -> None:
        with self._lock:
            cancelled = [request for request in self.waiting if request.cancelled]
            for request in cancelled:
                self.waiting.remove(request)
        for request in cancelled:
            request.on_end("cancelled")
        for row in filter(None, list(self.rows)):
            if row.request.cancelled:
                self._end(row, "cancelled")

    def _admit(self) -> None:
        while None in self.rows:
            with self._lock:
                if not self.waiting:
                    return
                request = self.waiting.popleft()
                number = next(self._clock)
                self.rows[self._place_for(request.ids)] = _Row(request, number)

    def _place_for(self, ids: Sequence[int]) -> int:
        """The idle row that holds the beginning of this text; else the one that was idle for longest.

        A row is not chosen for a prefix that is less than half of its text, such as instructions that all
        conversations share, because the rest would be lost; ``_begin`` copies the prefix.
        """
        idle = [place for place, row in enumerate(self.rows) if row is None]
        common = {place: common_prefix(self.cache.texts[place], ids) for place in idle}
        best = max(idle, key=common.get)
        if common[best] and 2 * common[best] >= len(self.cache.texts[best]):
            return best
        return min(idle, key=self.used.__getitem__)

    def _end(self, row: _Row, reason: str | Exception) -> None:
        place = self.rows.index(row)
        self.rows[place], self.used[place] = None, next(self._clock)
        self.ends.append(time.monotonic())
        if isinstance(reason, Exception):
            self._view(place, place + 1).clear()  # whatever it holds, it is not trusted
        row.request.on_end(reason)

    # ------------------------------------------------------------------------------------- a step

    def _pending(self, row: _Row) -> list[int]:
        """The tokens of a row's text that the model has not processed."""
        return row.text[len(self.cache.texts[self.rows.index(row)]) :]

    def _begin(self, row: _Row) -> None:
        """Keep what the row's place, or another one, has in common with its prompt."""
        place, texts = self.rows.index(row), self.cache.texts
        common = [common_prefix(text, row.text) for text in texts]
        best = max(range(len(texts)), key=common.__getitem__)
        earlier = max(
            min(count, before) if batch is row.request.batch else count
            for count, (batch, before) in zip(common, self.filled)
        )
        if common[best] > common[place]:
            self.cache.copy_row(best, place, common[best])
        self._view(place, place + 1).keep_prefix([row.text])
        row.request.cached_tokens, row.begun = min(earlier, len(texts[place])), True
        self.filled[place] = row.request.batch, row.request.cached_tokens

    def _prefill(self, row: _Row, chunk: int) -> None:
        if not row.begun:
            self._begin(row)
        place, pending = self.rows.index(row), self._pending(row)
        try:
            self._make_room(len(row.text))
            view, ids = self._view(place, place + 1), np.array([pending[:chunk]])
            logits = logits_of(self._run, ids, view)[0]
            if self._run.ignores_cache:
                raise Error("the model does not use the cache that served texts share: use generate()")
        except Exception as error:
            self._end(row, error)
            return
        if len(pending) <= chunk:
            self._sample(row, logits)

    def _decode(self, rows: list[_Row]) -> None:
        first = self._make_neighbours(rows)
        rows = self.rows[first : first + len(rows)]
        try:
            self._make_room(max(len(row.text) for row in rows))
            ids = np.array([row.text[-1:] for row in rows])
            logits = logits_of(self._run, ids, self._view(first, first + len(rows)))
        except Exception as error:
            if len(rows) == 1:
                self._end(rows[0], error)
                return
            for row in rows:  # one of them may be the reason: the others go on without it
                self._decode([row])
            return
        for row, each in zip(rows, logits):
            self._sample(row, each)

    def _make_room(self, tokens: int) -> None:
        """Enlarge the cache, at least twofold, if a row needs more.

        So its memory depends on the longest text, not on the longest possible one, which few texts reach. (An
        array of zeros costs nothing before it is used, but only where the system's pages are small.)
        """
        if tokens > self.cache.capacity:
            larger = min(max(tokens, 2 * self.cache.capacity), self.capacity)
            self.cache = self.cache.with_capacity(larger)
            self._views.clear()
            self._run.forget()  # what refers to the old cache

    def _make_neighbours(self, rows: list[_Row]) -> int:
        """Exchange rows of the cache so that these are neighbours, and return the place of the first.

        A batch is a slice of the cache: a copy of scattered rows at every step would cost more than moving
        one of them now and then. The slice is the first one for which few tokens are moved, because recorded
        steps belong to it, or else the one for which the fewest are.
        """
        places = {self.rows.index(row) for row in rows}
        lengths = list(map(len, self.cache.texts))

        def moves(first: int) -> list[tuple[int, int]]:
            inside = range(first, first + len(rows))
            return list(zip(sorted(places - set(inside)), sorted(set(inside) - places)))

        def cost(first: int) -> int:
            return max(NEAR, sum(max(lengths[a], lengths[b]) for a, b in moves(first)))

        best = min(range(len(self.rows) - len(rows) + 1), key=cost)
        for a, b in moves(best):
            self.cache.swap_rows(a, b)
            for items in (self.rows, self.used, self.filled):
                items[a], items[b] = items[b], items[a]
        return best

    def _view(self, first: int, stop: int) -> Cache:
        """These rows of the cache, always as the same object: recorded steps belong to it."""
        if (first, stop) not in self._views:
            self._views[first, stop] = self.cache[first:stop]
        return self._views[first, stop]

    def _sample(self, row: _Row, logits: np.ndarray) -> None:
        """Choose a row's next token from its logits (1, V), and end the row if it is the last one."""
        request = row.request
        try:
            logits = suppress(logits, self.suppress_ids)
            sampling = request.temperature, request.top_k, request.top_p
            token = int(choose_tokens(logits, row.rng.random(1), *sampling)[0])
            row.text.append(token)
            row.left -= 1
            ended = request.on_token(_described(token, logits[0], request.top)) or token in request.stop_ids
        except Exception as error:
            self._end(row, error)
            return
        if ended:
            self._end(row, "stop")
        elif not row.left or len(row.text) > self.capacity:
            self._end(row, "length")


def _described(token: int, logits: np.ndarray, top: int | None) -> Sampled:
    """The token with log-probabilities log softmax(logits)_i = z_i - log Σ_j exp(z_j), for logits z (V,)."""
    if top is None:
        return Sampled(token)
    z = logits.astype(np.float64)
    z -= z.max()
    z -= np.log(np.exp(z).sum())
    best = most_likely(z[None], top)[0].tolist() if top else []
    return Sampled(token, float(z[token]), tuple((i, float(z[i])) for i in best))

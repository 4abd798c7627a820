"""The thread in which the model runs, and the answers that it hands to the event loop.

Only this thread touches the model. Requests, and functions that look into the model, wait until the step in
progress is complete, so that an endpoint may replace or observe layers without a lock. The event loop never
waits for the model.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tinyllm.serve.scheduler import Busy, Request, Sampled, Scheduler
from tinyllm.serve.text import AnswerText
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tokenizers.chat_template import end_of_answer

log = logging.getLogger("tinyllm.serve")


class Stopped(Exception):
    """The server is shutting down."""


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text, and the tokens it consists of. The last piece has the reason ``end``."""

    text: str
    tokens: tuple[tuple[Sampled, int], ...] = ()  # each with the position of its first character in the text
    end: str | None = None  # "stop" or "length"


class Answers:
    """The answers to one request of the API, in progress: an asynchronous iterator of (number, piece).

    It ends when every answer has; the exception that ended a row is raised. ``cancel`` frees the rows before
    the next step, and the iterator then raises ``Cancelled``.
    """

    def __init__(self, texts: Sequence[AnswerText], requests: Sequence[dict]):
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue()
        self.each = [Answer(*pair, partial(self._put, i)) for i, pair in enumerate(zip(texts, requests))]

    async def __aiter__(self):
        left = len(self.each)
        while left:
            number, piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.end is not None
            yield number, piece

    def cancel(self) -> None:
        for answer in self.each:
            answer.request.cancelled = True

    def _put(self, number: int, piece: Piece | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (number, piece))
        except RuntimeError:  # the event loop is closed: nobody reads any more
            self.cancel()


class Answer:
    """One text: its tokens as they come, in the model's thread, and the pieces that it ``put``s."""

    def __init__(self, text: AnswerText, arguments: dict, put: Callable[[Piece | Exception], None]):
        self.request = Request(on_token=self._on_token, on_end=self._on_end, **arguments)
        self.text, self.put, self.started = text, put, time.monotonic()
        self.tokens = 0  # sampled so far, a stop token included
        self.seconds = None  # from request to end
        self._held: list[tuple[Sampled, int]] = []  # tokens whose text is held back

    def _on_token(self, sampled: Sampled) -> bool:
        self.tokens += 1
        if sampled.id in self.request.stop_ids:
            return True
        self._held.append((sampled, self.text.end))
        self._put_text(self.text.push(sampled.id))
        return self.text.is_complete

    def _on_end(self, reason: str | Exception) -> None:
        self.seconds = time.monotonic() - self.started
        if isinstance(reason, Exception):
            self.put(reason)
        elif reason == "cancelled":
            self.put(Cancelled())
        else:
            self._put_text(self.text.finish(), reason)

    def _put_text(self, text: str, end: str | None = None) -> None:
        if text or end:
            released = tuple(pair for pair in self._held if pair[1] < self.text.length)
            self._held = [pair for pair in self._held if pair[1] >= self.text.length]
            self.put(Piece(text, released, end))


class Engine:
    """A model and its tokenizer in a thread of their own, for the endpoints of ``app.py``.

    ``slots``, ``capacity`` and ``queue`` are those of ``Scheduler``; ``name`` is the model's in the API.
    ``start`` starts the thread, in a copy of the calling context.
    """

    def __init__(
        self,
        model,
        tokenizer: Tokenizer,
        name: str,
        slots: int = 4,
        capacity: int | None = None,
        queue: int = 32,
    ):
        self.model, self.tokenizer, self.name, self.created = model, tokenizer, name, int(time.time())
        unused = tokenizer.unused_ids(model.config.vocab_size)
        self.scheduler = Scheduler(model, slots, capacity, queue, unused)
        ends = () if tokenizer.chat_template is None else end_of_answer(tokenizer)
        self.stop_ids = tuple(dict.fromkeys((*tokenizer.eos_ids, *ends)))
        self._changed, self._functions = threading.Condition(), []
        self._closing = self._draining = False
        self._thread = None

    @property
    def capacity(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self.scheduler.capacity

    def start(self) -> None:
        run = contextvars.copy_context().run  # of half precision, say
        self._thread = threading.Thread(target=run, args=(self._work,), name="tinyllm model", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[dict], stops: Sequence[str] = ()) -> Answers:
        """Queue requests (the arguments of ``Request``), all or none, and return their answers.

        Must be called in the event loop. Raises ``Busy``, ``Stopped``, and ``Error`` as ``Scheduler.submit``.
        """
        if self._draining:
            raise Stopped
        texts = [AnswerText(self.tokenizer, stops) for _ in requests]
        answers = Answers(texts, [{"stop_ids": self.stop_ids} | arguments for arguments in requests])
        self.scheduler.submit(*(answer.request for answer in answers.each))
        self._notify()
        return answers

    async def run(self, function: Callable):
        """``function(model)`` in the model's thread, between two steps; returns its result.

        One function at a time runs between two steps. It never runs if this is cancelled before. Raises
        ``Busy`` if as many functions wait as there are places in the queue, and ``Stopped``.
        """
        if self._draining:
            raise Stopped
        future = concurrent.futures.Future()
        with self._changed:
            self._functions = [pair for pair in self._functions if not pair[1].cancelled()]
            if len(self._functions) >= self.scheduler.queue:
                raise Busy
            self._functions.append((function, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    @property
    def retry_after(self) -> int:
        """In how many seconds a row becomes free: as often as lately, at least 1 and at most 60."""
        ends = list(self.scheduler.ends)
        seconds = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 1
        return min(60, max(1, math.ceil(seconds)))

    def drain(self) -> None:
        """Refuse new requests, and end those that wait; those in rows go on."""
        self._draining = True
        self._notify()

    def close(self) -> None:
        """End all requests with ``Stopped`` and stop the thread after the step in progress."""
        self._draining = self._closing = True
        self._notify()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify()

    # In the model's thread:

    def _work(self) -> None:
        while self._wait():
            self._call_next()
            try:
                if self._draining:
                    self.scheduler.end_waiting(Stopped())
                self.scheduler.step()
            except Exception as error:  # a defect of the scheduler ends the requests, not the server
                log.exception("a step failed")
                self.scheduler.end_all(error)
        self.scheduler.end_all(Stopped())
        while future := self._next()[1]:
            future.set_exception(Stopped())

    def _call_next(self) -> None:
        function, future = self._next()
        if future is None:
            return
        try:
            future.set_result(function(self.model))
        except Exception as error:
            future.set_exception(error)

    def _next(self) -> tuple[Callable | None, concurrent.futures.Future | None]:
        """The first function that waits and is not cancelled, which is no longer in the list."""
        with self._changed:
            while self._functions:
                function, future = self._functions.pop(0)
                if future.set_running_or_notify_cancel():
                    return function, future
        return None, None

    def _wait(self) -> bool:
        """Wait for something to do; False when the thread is to stop."""
        with self._changed:
            while not (self._closing or self._functions or self.scheduler.has_work):
                self._changed.wait()
        return not self._closing

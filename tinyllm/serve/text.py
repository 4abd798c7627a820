"""The text of an answer as its tokens come, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tinyllm.tokenizers.base import Tokenizer


class AnswerText:
    """Decodes tokens one by one, and ends before the first of the ``stops`` (strings).

    ``push`` returns the text that is certain: incomplete UTF-8 is held back until its character is complete,
    and what could become a stop string, which may begin and end within tokens, until it cannot any more.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.is_complete = "", False
        self.length = 0  # in characters, of all that ``push`` and ``finish`` returned

    def push(self, token: int) -> str:
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        return self._release(final=False)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if not self.is_complete:
            self.held += self.decoder.decode(b"", final=True)
        return self._release(final=True)

    @property
    def end(self) -> int:
        """The number of characters decoded so far, those held back included."""
        return self.length + len(self.held)

    def _release(self, final: bool) -> str:
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            self.is_complete = True
            piece, self.held = self.held[: min(found)], ""
        else:
            keep = 0 if final else max((_overlap(self.held, stop) for stop in self.stops), default=0)
            piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.length += len(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)

"""An answer of a model that thinks first: thoughts, between ``<think>`` and ``</think>``, and the rest."""

from __future__ import annotations

from collections.abc import Callable

from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer

BEGIN, END = "<think>", "</think>"


class ThoughtFilter:
    """Divides the text of an answer, which comes in pieces of any length, into thoughts and the rest.

    Call it with the pieces, and ``finish`` at the end. It calls ``write(text, is_thought)``, with a text as
    soon as it is known what it is, and without the tags and the blank lines around them. An answer has
    thoughts only if it begins with ``<think>``, or if they have begun in the prompt (``inside``).
    """

    def __init__(self, write: Callable[[str, bool], None], inside: bool = False):
        self._write = write
        self._step = self._begin_thoughts if inside else self._begin
        self._held = ""  # not yet written

    def __call__(self, piece: str) -> None:
        self._held, step = self._held + piece, None
        while self._step != step:  # a step that is over has set the next one
            step = self._step
            step()

    def finish(self) -> None:
        """Write what was held back because it could have been the beginning of a tag."""
        self._send(self._held, self._step == self._think)
        self._held = ""

    def _begin(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(BEGIN):
            self._held, self._step = begun[len(BEGIN) :], self._begin_thoughts
        elif not BEGIN.startswith(begun):
            self._step = self._answer

    def _begin_thoughts(self) -> None:
        self._held = self._held.lstrip("\n")
        if self._held:
            self._step = self._think

    def _think(self) -> None:
        thought, ended, rest = self._held.partition(END)
        if ended:
            self._send(thought.rstrip("\n"), True)
            self._held, self._step = rest, self._begin_answer
            return
        # Line breaks and what may be the beginning of the tag wait for what follows.
        begun = max((n for n in range(1, len(END)) if thought.endswith(END[:n])), default=0)
        certain = thought[: len(thought) - begun].rstrip("\n")
        self._send(certain, True)
        self._held = thought[len(certain) :]

    def _begin_answer(self) -> None:
        self._held = self._held.lstrip("\n")
        if self._held:
            self._step = self._answer

    def _answer(self) -> None:
        self._send(self._held, False)
        self._held = ""

    def _send(self, text: str, is_thought: bool) -> None:
        if text:
            self._write(text, is_thought)


def begins_inside(tokenizer: Tokenizer, prompt: list[int]) -> bool:
    """Whether a prompt ends where thoughts have begun: some templates write the ``<think>`` themselves."""
    return tokenizer.decode(prompt[-8:]).rstrip().endswith(BEGIN)


def check_can_skip_thinking(template: str, name: str) -> None:
    """Raise ``Error`` if a chat template has no variable ``enable_thinking``."""
    if "enable_thinking" not in template:
        raise Error(f"the chat template of {name} cannot switch thinking off: omit --no-think")

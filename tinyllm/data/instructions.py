"""How does a conversation become ids and targets, of which only the answers are learned?

Messages of ``role`` and ``content`` (``conversations.py``) → the text of a chat template → ids, and a mask of
those that the model shall learn to write: every answer, and the special token that ends it. The target of
every other position is -100.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tinyllm.data.conversations import Message, is_learned, text_of, without_weights
from tinyllm.data.examples import Row
from tinyllm.errors import Error
from tinyllm.tokenizers.base import END_OF_TEXT, Tokenizer
from tinyllm.tokenizers.chat_template import PROBE, RenderedChat, RenderError, end_of_probe, render_chats

# The template of Stanford's Alpaca, without its second preamble for rows with an input, as in Raschka's
# chapter 7. END stands for the tokenizer's token that ends a text.
ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\n### Instruction:\n' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\n\n### Response:\n' + message['content'] + 'END' }}"
    "{% elif not loop.first or message['role'] != 'system' %}"
    "{{ raise_exception('the alpaca template knows the roles user and assistant, and system at first') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TOKEN_LIKE = re.compile(r"<\|[\w./-]+\|>|<(?:start|end)_of_turn>")  # in a template, meant as special tokens

RENDERED_AT_ONCE = 1000  # conversations in one process


# ----------------------------------------------------------------------------------------- templates


def check_template(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer: that of the chat template, and those that end a text.

    Raises ``Error`` if the tokenizer lacks special tokens that the template writes, or if none ends answers.
    """
    (rendered,) = render_chats(tokenizer, tokenizer.chat_template, [(PROBE, False)])
    written = dict.fromkeys(TOKEN_LIKE.findall(rendered.text))
    missing = [name for name in written if name not in tokenizer.special_tokens]
    if missing:
        names = " ".join(f"'{name}'" for name in missing)
        raise Error(
            f"the chat template writes {', '.join(missing)}, which {tokenizer.name} does not have as special "
            f"tokens: add them with --special-tokens {names}, or choose --template alpaca"
        )
    ends = end_of_probe(tokenizer, rendered.text)
    if not ends:
        raise Error(
            "the chat template ends an answer without a special token, so the model would not learn to stop: "
            "choose --template alpaca or chatml"
        )
    return (*ends, *tokenizer.eos_ids)


def alpaca(tokenizer: Tokenizer) -> str:
    """The template ``ALPACA`` with the token that ends a text. Raises ``Error`` if there is none."""
    return ALPACA.replace("END", end_of_text(tokenizer)[0])


def end_of_text(tokenizer: Tokenizer) -> tuple[str, int]:
    """The special token that ends a text, its name and id; raises ``Error`` if the tokenizer has none."""
    by_id = {i: name for name, i in tokenizer.special_tokens.items()}
    ids = [*tokenizer.eos_ids, tokenizer.special_tokens.get(END_OF_TEXT)]
    for i in ids:
        if i in by_id:
            return by_id[i], i
    raise Error(
        f"{tokenizer.name} has no token that ends a text: add one with --special-tokens '{END_OF_TEXT}'"
    )


# ------------------------------------------------------------------------------------ ids and targets


class Encoded(NamedTuple):
    """An example: its ids (n,) and which of them are learned (n,), and whether a token was divided."""

    ids: np.ndarray
    learned: np.ndarray
    divided: bool = False


def encode_text(tokenizer: Tokenizer, row: Row) -> Encoded:
    """A text and the token that ends it, all of them learned; special tokens in it are encoded as such."""
    try:
        text = text_of(row.values, "text")
        if not text:
            raise Error("'text' is empty: give a text, or remove the row")
        ids = tokenizer.encode(text, special="allow")
    except Error as error:
        raise Error(f"{row.where}: {error}") from None
    end = end_of_text(tokenizer)[1]
    ids = tokenizer.with_bos(ids if ids[-1:] == [end] else [*ids, end])
    return Encoded(np.array(ids), np.ones(len(ids), bool))


def encode_conversations(
    tokenizer: Tokenizer, rows: Sequence[Row], chats: Sequence[list[Message]], prompts: bool = False
) -> list[Encoded]:
    """The ids of conversations, of which every answer is learned, up to the special token that ends it.

    An answer of ``weight`` 0 is not learned; with ``prompts``, everything but such an answer is.

    An answer is what follows the prompt that ``generate`` would get, the conversation before it and
    ``add_generation_prompt``. So the template is rendered with and without every answer, and the ids of a
    prompt must begin those of the whole conversation. If a token would cross the border between a prompt and
    an answer, as a tokenizer may merge the end of one with the beginning of the other, both are encoded on
    their own, as in generation, and the example is marked as ``divided``.

    Raises ``Error``, naming the row, if the template renders an earlier part differently once a later one
    follows, because then no position in the whole text is the answer's.
    """
    wanted = [[*_parts(messages)] for messages in chats]
    where = [row.where for row, parts in zip(rows, wanted) for _ in parts]
    rendered = iter(render_all(tokenizer, [part for parts in wanted for part in parts], where))
    found = []
    for row, messages, parts in zip(rows, chats, wanted):
        weights = [is_learned(each) for each in messages[1:] if each["role"] == "assistant"]
        try:
            found.append(_encode(tokenizer, [next(rendered) for _ in parts], weights, prompts))
        except Error as error:
            raise Error(f"{row.where}: {error}") from None
    return found


def _parts(messages: list[Message]) -> Iterable[tuple[list[Message], bool]]:
    """What is rendered of a conversation: every answer's prompt, and the text that the answer ends.

    The last of these is the example: what follows the last answer teaches nothing.
    """
    for i, message in enumerate(messages):
        if i and message["role"] == "assistant":  # a first one would have no prompt
            yield without_weights(messages[:i]), True
            yield without_weights(messages[: i + 1]), False


def render_all(
    tokenizer: Tokenizer, chats: Sequence[tuple[list[Message], bool]], where: Sequence[str]
) -> list[RenderedChat]:
    """Render conversations, each with its ``add_generation_prompt``, a thousand at a time.

    Raises ``Error``, naming ``where`` it is from, for one that cannot be rendered.
    """
    rendered = []
    for first in range(0, len(chats), RENDERED_AT_ONCE):
        part = chats[first : first + RENDERED_AT_ONCE]
        try:
            rendered += render_chats(tokenizer, tokenizer.chat_template, part)
        except RenderError as error:
            raise Error(f"{where[first + error.number]}: {error}") from None
    return rendered


def _encode(tokenizer: Tokenizer, parts: list[RenderedChat], weights: list[bool], prompts: bool) -> Encoded:
    """An example from the results of ``_parts``, rendered; ``weights``: whether each answer is learned."""
    whole, borders = parts[-1], [len(part.text) for part in parts]  # where prompts and answers end
    if not all(whole.text.startswith(part.text) for part in parts):
        raise Error(
            "the chat template renders a turn differently when another follows, so the answers cannot be "
            "found in the text: choose --template, or give every answer a row of its own"
        )
    prefixes = [part.encode(tokenizer) for part in parts]
    ids = prefixes[-1]
    divided = any(ids[: len(prefix)] != prefix for prefix in prefixes)
    if divided:
        prefixes = []
        for start, end in zip([0, *borders], borders):
            before = (prefixes or [[]])[-1]
            prefixes.append([*before, *_encode_piece(tokenizer, whole, start, end, before)])
        ids = prefixes[-1]
    ends = [len(prefix) for prefix in prefixes]
    offset = len(tokenizer.with_bos(ids)) - len(ids)
    special, learned = {*tokenizer.special_tokens.values()}, np.full(offset + len(ids), prompts)
    for start, end, weight in zip(ends[::2], ends[1::2], weights, strict=True):
        # Only the template writes special tokens: the last of them ends the answer.
        while end > start and ids[end - 1] not in special:
            end -= 1
        if end == start:
            raise Error("the chat template does not end an answer with a special token: choose --template")
        learned[offset + start : offset + end] = weight
    return Encoded(np.array(tokenizer.with_bos(ids)), learned, divided)


def _encode_piece(
    tokenizer: Tokenizer, whole: RenderedChat, start: int, end: int, before: list[int]
) -> list[int]:
    """The ids of a part of the text, which continues the part with the ids ``before``."""
    text = whole.text[start:end]
    found = tokenizer.find_special(text)
    if whole.special is not None:
        own = {each.start() for each in whole.special}
        found = [each for each in found if start + each.start() in own]
    return tokenizer.encode_around(text, found, before).tolist()


class Shortened(NamedTuple):
    """The examples that are used, as pairs of ids and ``learned``, and what was done to them."""

    examples: list[tuple[np.ndarray, np.ndarray]]
    cut: int
    left_out: int
    divided: int

    def notes(self, part: str, option: str, length: int) -> list[str]:
        """A sentence for each of them, if there are any."""
        said = []
        if self.cut:
            said.append(
                f"{self.cut:,} {part} examples are longer than {length:,} tokens ({option}) and are cut; "
                f"{self.left_out:,} of them have no answer left and are left out"
            )
        if self.divided:
            said.append(
                f"in {self.divided:,} {part} examples a token would cross the border between a prompt and an "
                "answer: they are encoded on their own, as in generation"
            )
        return said


def shorten(examples: Sequence[Encoded], most: int, rows: Sequence[Row]) -> Shortened:
    """Cut the examples to ``most`` ids, and leave out those in which then nothing is learned.

    Raises ``Error`` if none is left.
    """
    cut = [Encoded(each.ids[:most], each.learned[:most], each.divided) for each in examples]
    kept = [each for each in cut if each.learned[1:].any()]
    if not kept:
        raise Error(
            f"no example has an answer within the first {most - 1:,} tokens, not even {rows[0].where}: "
            "choose a larger --max-length, or shorter examples"
        )
    longer = sum(len(each.ids) > most for each in examples)
    return Shortened(
        [(each.ids, each.learned) for each in kept],
        longer,
        len(cut) - len(kept),
        sum(each.divided for each in kept),
    )

"""Conversations for fine-tuning: rows in one of five formats, recognised by their keys, as messages.

    {messages: [{role, content}, …]}                      also with ``weight`` 0 for an answer not to learn
    {conversations: [{from, value}, …]}                   ShareGPT's
    {instruction, input, output}                          Alpaca's
    {prompt, completion}                                  two texts, or two lists of {role, content}
    {text}                                                a text, which has no roles

A ``system`` in a row with messages is their first one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tinyllm.data.examples import Row
from tinyllm.errors import Error

Message = dict[str, str]  # role and content, and ``weight`` of an answer that has one

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _of_messages(values: dict) -> list[Message]:
    return [_message(turn, "role", "content") for turn in _list(values, "messages")]


def _of_sharegpt(values: dict) -> list[Message]:
    turns = [_message(turn, "from", "value") for turn in _list(values, "conversations")]
    for turn in turns:
        if turn["role"] not in ROLES:
            raise Error(f"a turn is from {turn['role']!r}: use one of {', '.join(ROLES)}")
        turn["role"] = ROLES[turn["role"]]
    return turns


def _of_alpaca(values: dict) -> list[Message]:
    instruction, given, output = (text_of(values, key) for key in ("instruction", "input", "output"))
    question = f"{instruction}\n\n### Input:\n{given}" if given else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _of_completion(values: dict) -> list[Message]:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational form
        return [_message(turn, "role", "content") for turn in [*prompt, *completion]]
    return [
        {"role": "user", "content": text_of(values, "prompt")},
        {"role": "assistant", "content": text_of(values, "completion")},
    ]


class Format(NamedTuple):
    """How rows with these keys become messages; None for a text, which has no roles."""

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...]
    messages: Callable[[dict], list[Message]] | None


FORMATS = (
    Format("messages", ("messages",), ("system",), _of_messages),
    Format("sharegpt", ("conversations",), ("system",), _of_sharegpt),
    Format("alpaca", ("instruction", "output"), ("input", "system"), _of_alpaca),
    Format("prompt-completion", ("prompt", "completion"), ("system",), _of_completion),
    Format("text", ("text",), (), None),
)


def recognise(rows: Sequence[Row]) -> Format:
    """The format of the rows, by the keys of the first. Raises ``Error``, naming a row without them."""
    known = " or ".join("{" + ", ".join(form.keys) + "}" for form in FORMATS)
    found = next((form for form in FORMATS if rows[0].values.keys() >= {*form.keys}), None)
    if found is None:
        raise Error(f"{rows[0].where} has the keys {_keys(rows[0])}: its format must have {known}")
    for row in rows:
        missing = [key for key in found.keys if key not in row.values]
        if missing:
            raise Error(
                f"{row.where} has no {missing[0]!r}, which the format {found.name} of the first row needs; "
                f"its keys are {_keys(row)}: correct the row"
            )
    return found


def conversations(rows: Sequence[Row], form: Format) -> list[list[Message]]:
    """The messages of every row, the first of them its ``system`` if it has one.

    Raises ``Error``, naming the row, for one without an answer to learn.
    """
    found = []
    for row in rows:
        try:
            messages, system = form.messages(row.values), row.values.get("system")
            if system not in (None, ""):
                if any(message["role"] == "system" for message in messages[:1]):
                    raise Error("'system' is given, and a first turn of that role: keep one of them")
                messages = [{"role": "system", "content": text_of(row.values, "system")}, *messages]
            if not any(is_learned(message) for message in messages[1:]):
                raise Error("there is no answer, a turn of the role assistant after a first one: add it")
        except Error as error:
            raise Error(f"{row.where}: {error}") from None
        found.append(messages)
    return found


def is_learned(message: Message) -> bool:
    """Whether a message is an answer whose ``weight``, as in OpenAI's format, is not 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def unused_keys(rows: Sequence[Row], form: Format) -> list[str]:
    """The keys of the rows, and those of their turns, that are not read."""
    used = {*form.keys, *form.optional}
    of_turns = {"weight", *(("from", "value") if form.name == "sharegpt" else ("role", "content"))}
    values = [row.values[key] for row in rows for key in form.keys if form.messages]
    turns = [turn for each in values if isinstance(each, list) for turn in each]
    found = [key for row in rows for key in row.values if key not in used]
    # A table of turns has null for a key that others have.
    found += [
        f"{key} of turns"
        for turn in turns
        for key, value in turn.items()
        if key not in of_turns and value is not None
    ]
    return [*dict.fromkeys(found)]


def not_used(keys: Sequence[str]) -> str:
    """What a message about the data says of its ``unused_keys``."""
    return f" ({', '.join(keys)} not used)" if keys else ""


def prompt_of(messages: list[Message]) -> list[Message]:
    """The messages before the first answer."""
    end = next(i for i, turn in enumerate(messages) if i and turn["role"] == "assistant")
    return without_weights(messages[:end])


def without_weights(messages: list[Message]) -> list[Message]:
    """The messages for a template, which knows role and content only."""
    return [{key: each[key] for key in ("role", "content")} for each in messages]


def _keys(row: Row) -> str:
    return ", ".join(map(repr, row.values)) or "none"


def _list(values: dict, key: str) -> list:
    if not isinstance(values[key], list) or not values[key]:
        raise Error(f"{key!r} is {str(values[key])[:40]!r}: give a list of turns")
    return values[key]


def _message(turn, role: str, content: str) -> Message:
    match turn:
        case {**keys} if isinstance(keys.get(role), str) and isinstance(keys.get(content), str):
            message = {"role": keys[role], "content": keys[content]}
        case _:
            shown = str(turn)[:60]
            raise Error(f"a turn is {shown}: give an object with {role!r} and {content!r}, both texts")
    weight = turn.get("weight")
    if weight is None:
        return message
    if ROLES.get(message["role"]) != "assistant" or isinstance(weight, bool) or weight not in (0, 1):
        raise Error(
            f"a turn of {message['role']!r} has the weight {weight!r}: give one to answers only, 1, or 0 "
            "for one that is not learned"
        )
    return message | {"weight": weight}


def text_of(values: dict, key: str) -> str:
    text = values.get(key, "")
    if not isinstance(text, str):
        raise Error(f"{key!r} is {str(text)[:40]}: give a text")
    return text

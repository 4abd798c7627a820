"""Pairs of answers, of which one is preferred, in the forms in which they are published.

    {instruction, input, chosen, rejected}        alpaca's keys, with two outputs
    {prompt, chosen, rejected}                    texts
    {prompt, chosen, rejected}                    lists of messages ({role, content}): the answers may repeat
                                                  the prompt, and the prompt may be a text or omitted

A pair is read as two examples of instruction tuning with the same prompt, one for each answer, so that it is
rendered and encoded as those are. A ``system`` is that of both.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinyllm.data.examples import Row
from tinyllm.errors import Error

FORMS = (
    "{instruction, input, chosen, rejected}, {prompt, chosen, rejected} or messages in chosen and rejected"
)


def two_examples(row: Row) -> tuple[Row, Row]:
    """The example with the preferred answer, and that with the other one.

    Raises ``Error``, naming the row, for other keys, and for conversations that differ before their last
    message or do not begin with the prompt.
    """
    system = {key: x for key, x in row.values.items() if key == "system"}
    match row.values:
        case {"instruction": _, "chosen": str(), "rejected": str()}:
            rest = {key: x for key, x in row.values.items() if key in ("instruction", "input")}
            pair = [rest | {"output": row.values[key]} for key in ("chosen", "rejected")]
        case {"prompt": str(prompt), "chosen": str(), "rejected": str()}:
            pair = [{"prompt": prompt, "completion": row.values[key]} for key in ("chosen", "rejected")]
        case {"prompt": list(prompt), "chosen": str(), "rejected": str()}:
            answers = (row.values[key] for key in ("chosen", "rejected"))
            pair = [{"messages": [*prompt, _message("assistant", answer)]} for answer in answers]
        case {"chosen": [_, *_], "rejected": [_, *_]}:
            pair = [{"messages": _conversation(row, key)} for key in ("chosen", "rejected")]
            if pair[0]["messages"][:-1] != pair[1]["messages"][:-1]:
                raise Error(f"{row.where}: chosen and rejected differ before their last message: correct it")
        case _:
            keys = ", ".join(row.values) or "no keys"
            raise Error(f"{row.where} has {keys}: give {FORMS}")
    for values in pair:
        match values:
            case {"messages": [*_, {"weight": 0}]}:
                raise Error(f"{row.where}: an answer of the pair has weight 0, but both are used: omit it")
    return Row(pair[0] | system, row.where), Row(pair[1] | system, row.where)


def unused_of_pairs(rows: Sequence[Row]) -> list[str]:
    """The keys of pairs that ``two_examples`` does not read."""
    found = {}
    for row in rows:
        texts = "instruction" in row.values and isinstance(row.values["chosen"], str)
        used = {"system", "chosen", "rejected", *(("instruction", "input") if texts else ("prompt",))}
        found |= dict.fromkeys(key for key in row.values if key not in used)
    return [*found]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _conversation(row: Row, key: str) -> list:
    """All messages of the conversation that ends with the answer."""
    prompt, answer = row.values.get("prompt", []), row.values[key]
    if isinstance(prompt, str):
        prompt = [_message("user", prompt)]
    if not isinstance(prompt, list):
        raise Error(f"{row.where}: its prompt is {prompt!r}: give a text or a list of messages")
    if answer[: len(prompt)] == prompt and len(answer) > max(1, len(prompt)):
        return answer
    if len(answer) > 1 or not prompt:
        raise Error(f"{row.where}: {key} does not begin with a prompt: repeat it, or give one message")
    return prompt + answer

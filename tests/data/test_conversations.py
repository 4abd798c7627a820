"""Formats of conversations: what is read of a row, and what is said of the rest."""

import pytest
from support.instructions import SYSTEM, turns

from tinyllm.data.conversations import conversations, not_used, prompt_of, recognise, unused_keys
from tinyllm.data.examples import Row
from tinyllm.errors import Error


def rows(*values):
    return [Row(each, f"row {number} of data.json") for number, each in enumerate(values, 1)]


ANSWER = {"role": "assistant", "content": "4"}
FORMS = {
    "messages": ({"messages": turns("2+2?", "4")}, "2+2?"),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        "2+2?",
    ),
    "alpaca": ({"instruction": "Add", "input": "2+2", "output": "4"}, "Add\n\n### Input:\n2+2"),
    "prompt-completion": ({"prompt": "2+2?", "completion": "4"}, "2+2?"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_format_is_recognised_by_its_keys(name):
    values, question = FORMS[name]
    form = recognise(rows(values, {**values, "id": 7}))
    assert form.name == name
    (found,) = conversations(rows(values), form)
    assert found == [{"role": "user", "content": question}, ANSWER]


def test_an_alpaca_row_needs_no_input_and_a_conversational_completion_is_a_list_of_turns():
    for values in ({"instruction": "Hi", "output": "4"}, {"instruction": "Hi", "input": "", "output": "4"}):
        (found,) = conversations(rows(values), recognise(rows(values)))
        assert found == turns("Hi", "4")
    values = {"prompt": turns("2+2?"), "completion": [ANSWER]}
    assert conversations(rows(values), recognise(rows(values))) == [turns("2+2?", "4")]
    assert recognise(rows({"text": "once"})).messages is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([{"question": "2+2?"}], r"row 1 of data.json has the keys 'question'.*\{messages\}"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "row 2 of data.json has no 'completion'"),
        ([{"instruction": "a", "output": 4}], "row 1 of data.json: 'output' is 4"),
        ([{"messages": []}], "row 1 of data.json: 'messages' is .*list of turns"),
        ([{"messages": [{"role": "user"}]}], "row 1 of data.json: a turn is .*'content'"),
        ([{"messages": turns("a")}], "row 1 of data.json: there is no answer"),
        ([{"messages": [ANSWER]}], "row 1 of data.json: there is no answer"),
        (
            [{"conversations": [{"from": "alien", "value": "x"}]}],
            "row 1 of data.json: a turn is from 'alien'",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(values, said):
    with pytest.raises(Error, match=said):
        conversations(rows(*values), recognise(rows(*values)))


@pytest.mark.parametrize("name", FORMS)
def test_a_system_in_a_row_is_the_first_message(name):
    values, question = FORMS[name]
    many = rows(values | {"system": "Be brief."}, values | {"system": ""}, values | {"system": None})
    form = recognise(many)
    chat = [{"role": "user", "content": question}, ANSWER]
    assert conversations(many, form) == [[SYSTEM, *chat], chat, chat]
    assert unused_keys(many, form) == []
    with pytest.raises(Error, match=r"row 1 of data\.json: 'system' is 3"):
        conversations(rows(values | {"system": 3}), form)


def test_two_systems_are_refused():
    many = rows({"messages": [SYSTEM, *turns("a", "b")], "system": "Be brief."})
    with pytest.raises(Error, match=r"row 1 of data\.json: 'system' is given"):
        conversations(many, recognise(many))


@pytest.mark.parametrize("shape", ["messages", "sharegpt"])
def test_the_weight_of_an_answer_is_kept(shape):
    names = ("role", "content", "messages") if shape == "messages" else ("from", "value", "conversations")

    def row(*weights):
        chat = turns("a", "b", "c", "d")
        for answer, weight in zip(chat[1::2], weights):
            answer |= {"weight": weight}
        return {names[2]: [{names[i]: turn[k] for i, k in enumerate(("role", "content"))} | {
            k: x for k, x in turn.items() if k == "weight"} for turn in chat]}  # fmt: skip

    many = rows(row(0, 1), row(None, 1.0))
    found = conversations(many, recognise(many))
    assert [[turn.get("weight") for turn in chat[1::2]] for chat in found] == [[0, 1], [None, 1]]
    assert prompt_of(found[0]) == turns("a") and unused_keys(many, recognise(many)) == []
    assert prompt_of([ANSWER, *turns("a", "b")]) == [ANSWER, *turns("a")]  # a first one has no prompt
    for weight in (2, -1, 0.5, True, "0"):
        with pytest.raises(Error, match=r"row 1 of data\.json: a turn of .* has the weight"):
            conversations(rows(row(weight)), recognise(many))
    with pytest.raises(Error, match=r"row 2 of data\.json: there is no answer"):
        conversations(rows(row(1, 0), row(0, 0)), recognise(many))


def test_only_an_answer_has_a_weight():
    chat = turns("a", "b")
    chat[0]["weight"] = 1
    with pytest.raises(Error, match="'user' has the weight 1"):
        conversations(rows({"messages": chat}), recognise(rows({"messages": chat})))


def test_keys_that_are_not_read_are_named():
    chat = [turns("a")[0] | {"name": "Ann", "tool_calls": None}, ANSWER | {"tool_calls": [{}]}]
    many = rows({"messages": chat, "id": 1}, {"messages": turns("a", "b"), "source": "x"})
    keys = unused_keys(many, recognise(many))
    assert keys == ["id", "source", "name of turns", "tool_calls of turns"]
    assert not_used(keys) == " (id, source, name of turns, tool_calls of turns not used)"
    assert not_used(unused_keys(rows({"text": "a"}), recognise(rows({"text": "a"})))) == ""

"""The published forms of pairs of answers."""

import pytest

from tinyllm.data.examples import Row
from tinyllm.data.preferences import two_examples, unused_of_pairs
from tinyllm.errors import Error


def user(words):
    return {"role": "user", "content": words}


def assistant(words):
    return {"role": "assistant", "content": words}


def read(values):
    return tuple(row.values for row in two_examples(Row(values, "row 3 of data.json")))


HELLO, BYE = assistant("Hello"), assistant("Bye")
MESSAGES = {"messages": [user("Hi"), HELLO]}, {"messages": [user("Hi"), BYE]}


def test_alpacas_keys():
    row = {"instruction": "Greet", "input": "Ann", "output": "not used", "chosen": "Hello", "rejected": "Bye"}
    expected = {"instruction": "Greet", "input": "Ann"}
    assert read(row) == (expected | {"output": "Hello"}, expected | {"output": "Bye"})


def test_texts():
    row = {"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"}
    assert read(row) == ({"prompt": "Hi", "completion": "Hello"}, {"prompt": "Hi", "completion": "Bye"})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("Hi")], "chosen": [HELLO], "rejected": [BYE]},
        {"prompt": [user("Hi")], "chosen": "Hello", "rejected": "Bye"},
        {"prompt": "Hi", "chosen": [HELLO], "rejected": [BYE]},
        {"prompt": "Hi", "chosen": [user("Hi"), HELLO], "rejected": [user("Hi"), BYE]},
        {"prompt": [user("Hi")], "chosen": [user("Hi"), HELLO], "rejected": [BYE]},
        {"chosen": [user("Hi"), HELLO], "rejected": [user("Hi"), BYE]},
    ],
    ids=["messages", "texts after messages", "messages after a text", "repeated", "once", "implicit"],
)
def test_messages(row):
    assert read(row) == MESSAGES


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "chosen": "Hello", "rejected": "Bye"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"},
        {"prompt": "Hi", "chosen": [HELLO], "rejected": [BYE]},
    ],
)
def test_a_system_is_that_of_both_answers_and_other_keys_are_named(row):
    assert [each["system"] for each in read(row | {"system": "Be brief."})] == ["Be brief."] * 2
    more = row | {"system": "Be brief.", "output": "no", "score": 3}
    assert unused_of_pairs([Row(row, ""), Row(more, "")]) == ["output", "score"]


def test_several_turns():
    turns = [user("Hi"), HELLO, user("And?")]
    row = {"chosen": [*turns, HELLO], "rejected": [*turns, BYE]}
    expected = {"messages": [*turns, HELLO]}, {"messages": [*turns, BYE]}
    assert read(row) == expected
    assert read({"prompt": turns, "chosen": [HELLO], "rejected": [BYE]}) == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "no keys"),
        ({"prompt": "Hi", "chosen": "Hello"}, "prompt, chosen"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": 3}, "prompt, chosen, rejected"),
        ({"chosen": "Hello", "rejected": "Bye"}, "chosen, rejected"),
        ({"prompt": "Hi", "chosen": [], "rejected": []}, "prompt, chosen, rejected"),
        ({"prompt": 3, "chosen": [HELLO], "rejected": [BYE]}, "its prompt is 3"),
        ({"prompt": "Hi", "chosen": [user("Ho"), HELLO], "rejected": [BYE]}, "chosen does not begin"),
        ({"prompt": "Hi", "chosen": [HELLO], "rejected": [user("Ho"), BYE]}, "rejected does not begin"),
        ({"chosen": [HELLO], "rejected": [BYE]}, "chosen does not begin"),
        ({"chosen": [user("Hi"), HELLO], "rejected": [user("Ho"), BYE]}, "differ before their last"),
        ({"prompt": "Hi", "chosen": [HELLO], "rejected": [BYE | {"weight": 0}]}, "has weight 0"),
    ],
)
def test_a_malformed_pair_is_named(row, said):
    with pytest.raises(Error, match=r"row 3 of data\.json") as raised:
        read(row)
    assert said in str(raised.value)

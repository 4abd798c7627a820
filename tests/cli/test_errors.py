"""The message of an Error is fit for a terminal, whatever it quotes from a file."""

from tinyllm.errors import LONGEST, Error


def test_control_characters_are_escaped():
    message = str(Error("the key '\x1b[2J\n\x00' of é漢👍 is unknown: remove it"))
    assert message == r"the key '\x1b[2J\n\x00' of é漢👍 is unknown: remove it"


def test_a_long_message_keeps_its_beginning_and_its_end():
    message = str(Error(f"the value {'x' * 10**6} is wrong: correct it"))
    assert message.startswith("the value xxx") and message.endswith("xxx is wrong: correct it")
    assert "(990,031 characters left out)" in message and len(message) < LONGEST + 50
    assert str(Error("y" * LONGEST)) == "y" * LONGEST

"""The sentence of an Error: fit for a terminal, whatever a file makes it quote."""

from tinyllm.errors import LONGEST, Error


def test_control_characters_are_written_as_escapes():
    said = str(Error("the key '\x1b[2J\n\x00' of é漢👍 is unknown: remove it"))
    assert said == r"the key '\x1b[2J\n\x00' of é漢👍 is unknown: remove it"


def test_a_long_sentence_keeps_its_beginning_and_its_end():
    said = str(Error(f"the value {'x' * 10**6} is wrong: correct it"))
    assert said.startswith("the value xxx") and said.endswith("xxx is wrong: correct it")
    assert "(990,031 characters left out)" in said and len(said) < LONGEST + 50
    assert str(Error("y" * LONGEST)) == "y" * LONGEST

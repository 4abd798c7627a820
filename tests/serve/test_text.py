"""The text of an answer in pieces: characters of several tokens, and stop strings across tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.serve.text import AnswerText


class Bytes:
    """A tokenizer with one token per byte."""

    def decode_bytes(self, ids):
        return bytes(ids)


def pieces(data, stops=()):
    """The pieces of a text, one for each byte and one for the end."""
    text, found = AnswerText(Bytes(), stops), []
    for byte in data:
        found.append(text.push(byte))
        if text.is_complete:
            return found
    return [*found, text.finish()]


def test_a_character_is_complete_before_it_is_released():
    assert pieces("aé€".encode()) == ["a", "", "é", "", "", "€", ""]
    assert pieces(b"a\xe2\x82") == ["a", "", "", "\ufffd"]


def test_what_could_become_a_stop_string_is_held_back():
    assert pieces(b"abaX", ["abc"]) == ["", "", "ab", "aX", ""]
    assert pieces(b"ab", ["abc"]) == ["", "", "ab"]


def test_a_text_ends_before_the_stop_string():
    assert pieces(b"xyabcde", ["abc"]) == ["x", "y", "", "", ""]
    assert pieces("naïve€".encode(), ["ïve"]) == ["n", "a", "", "", "", ""]


texts = st.text(st.sampled_from("ab€"), max_size=12)


@given(texts, st.lists(st.text(st.sampled_from("ab€"), min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop_string(whole, stops):
    # Bytes come one by one, so the stop string that ends first ends the text.
    ends = [(place + len(stop), place) for stop in stops if (place := whole.find(stop)) >= 0]
    expected = whole[: min(place for end, place in ends if end == min(ends)[0])] if ends else whole
    assert "".join(pieces(whole.encode(), stops)) == expected


@pytest.mark.parametrize("stop", ["aab", "aaab"])
def test_a_stop_string_that_overlaps_itself(stop):
    assert "".join(pieces(b"xaaaab!", [stop])) == "x" + "aaaa"[: 4 - stop.count("a")]

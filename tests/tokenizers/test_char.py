"""The character tokenizer."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.errors import Error
from tinyllm.tokenizers.char import CharTokenizer

END = "<|endoftext|>"


def test_char_ids_follow_the_sorted_characters():
    tokenizer = CharTokenizer.from_text("hello")
    assert tokenizer.characters == "ehlo"
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("hole") == [1, 3, 2, 0]
    assert CharTokenizer("ba").encode("ab") == [1, 0]


@given(st.text(min_size=1))
def test_char_round_trip(text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert set(ids) == set(range(tokenizer.vocab_size))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(np.array(ids)) == text.encode("utf-8")


@pytest.mark.parametrize("special", ["refuse", "allow", "text"])
def test_char_has_no_special_tokens(special):
    tokenizer = CharTokenizer.from_text(END)
    assert tokenizer.decode(tokenizer.encode(END, special=special)) == END
    assert len(tokenizer.encode(END, special=special)) == len(END)


def test_char_encode_rejects_unseen_character():
    with pytest.raises(Error, match=r"'é' \(U\+00E9, at position 3\).* 5 .*create the tokenizer from a text"):
        CharTokenizer.from_text("a cafe").encode("cafés"[:4])


@pytest.mark.parametrize(("characters", "said"), [("", "at least"), ("abca", "'a' is repeated")])
def test_char_rejects_bad_characters(characters, said):
    with pytest.raises(Error, match=said):
        CharTokenizer(characters)


@pytest.mark.parametrize("text", [None, b"abc", ""])
def test_char_from_text_rejects_anything_but_a_text(text):
    with pytest.raises(Error, match="the text is"):
        CharTokenizer.from_text(text)


@given(text=st.text(min_size=1))
def test_char_json_round_trip(text):
    tokenizer = CharTokenizer.from_text(text)
    assert json.loads(json.dumps(tokenizer.to_json()))["characters"] == tokenizer.characters

"""Llama 2's tokenizer: comparison with the library sentencepiece."""

import pytest
from hypothesis import example, given
from support.tokenizers import (
    COUNT,
    nasty_strings,
    texts,
)

from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.sentencepiece import proto_field

sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")


def check_llama2(ours, reference, text):
    """Ids equal those of the hub's tokenizer.json and, without special tokens, those of sentencepiece."""
    assert ours.encode(text, "allow") == reference.encode(text, add_special_tokens=False).ids
    ids = ours.encode(text, "text")
    assert ids == ours.processor.encode(text)
    assert ours.decode(ids) == ours.processor.decode(ids)


def test_llama2_equals_sentencepiece_and_tokenizers(llama2_pair):
    for text in nasty_strings(COUNT):
        check_llama2(*llama2_pair, text)


@given(texts)
@example("  a")
@example("▁a")
@example("<s>a <s> a")
@example("<0x41>")
@example("\x00")
def test_llama2_equals_sentencepiece_and_tokenizers_property(llama2_pair, text):
    check_llama2(*llama2_pair, text)


def test_decode_removes_the_leading_space(llama2, llama2_json):
    for folder in (llama2, llama2_json):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("the the")
        assert tokenizer.decode(ids) == "the the"
        assert tokenizer.decode_bytes(ids) == b" the the"
        assert tokenizer.decode_bytes(ids[-1:]) == b" the"
        assert tokenizer.decode(ids[-1:]) == "the"


def test_a_text_that_continues_another_gets_no_space(llama2):
    ours = load_tokenizer(llama2)
    before = ours.encode("the ")
    rest = ours.encode_around("cat", [], before).tolist()
    assert ours.decode([*before, *rest]) == "the cat" and rest != ours.encode("cat")
    end = ours.special_tokens["</s>"]
    assert ours.encode_around("cat", [], [*before, end]).tolist() == ours.encode("cat")  # as in encode


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "00"), (127, "7f"), (128, "8001"), (150, "9601"), (2**14, "808001")]
)
def test_numbers_of_a_protocol_buffer(value, expected):
    """150 is the example of its documentation."""
    assert proto_field(1, value).hex() == "08" + expected

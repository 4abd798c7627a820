"""The interface of all tokenizers: tinyllm's own, then published ones."""

import codecs
import re
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.runs import full_disk
from support.tokenizers import (
    message_of,
    texts,
)

from tinyllm.errors import Error
from tinyllm.models import GPT2, GPT2Config
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import FILE_NAME, check_fits, find_names
from tinyllm.tokenizers.char import CharTokenizer

OURS = load_tokenizer("gpt2")
END = "<|endoftext|>"


@pytest.fixture(params=["gpt2", "char"])
def tokenizer(request):
    return OURS if request.param == "gpt2" else CharTokenizer.from_text("Hello, I am\n")


def test_decode_of_no_ids_is_empty(tokenizer):
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(np.array([], dtype=np.int64)) == ""


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_decode_takes_lists_and_arrays(tokenizer, kind):
    assert tokenizer.decode(kind(tokenizer.encode("Hello"))) == "Hello"


def test_decode_rejects_ids_outside_the_vocabulary(tokenizer):
    last = tokenizer.vocab_size - 1
    for wrong in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(Error, match=rf"ids\[1\] is {wrong}\b.* 0 to {last}\b"):
            tokenizer.decode([0, wrong])
        with pytest.raises(Error, match=rf"ids\[1\] is {wrong}\b.* 0 to {last}\b"):
            tokenizer.decode_bytes(np.array([0, wrong]))
    assert isinstance(tokenizer.decode([0, last]), str)


@pytest.mark.parametrize("ids", [[0.0], [True], ["a"], [None], 3, np.zeros((1, 2), int), [[1], [2, 3]]])
def test_decode_rejects_anything_but_a_sequence_of_integers(tokenizer, ids):
    with pytest.raises(Error, match="ids"):
        tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "special", "said"),
    [
        ("Hello", "ignore", "'ignore': choose 'refuse', 'allow' or 'text'"),
        (b"Hello", "refuse", "bytes"),
        (None, "refuse", "NoneType"),
        ("He\ud800llo", "refuse", "surrogate.* at position 2"),
    ],
)
def test_encode_rejects_bad_arguments(tokenizer, text, special, said):
    with pytest.raises(Error, match=said):
        tokenizer.encode(text, special=special)


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    folder = tmp_path / "new" / "run"
    tokenizer.save(folder)
    text = "Hello, I am\n"
    for spec in (folder, str(folder), folder / FILE_NAME):
        loaded = load_tokenizer(spec)
        assert type(loaded) is type(tokenizer)
        assert loaded.to_json() == tokenizer.to_json()
        assert loaded.encode(text) == tokenizer.encode(text)


@given(text=texts, cut=st.integers(0, 20))
@example(text="👍 a", cut=1)
@example(text=" It is", cut=1)
def test_decoding_token_by_token_gives_the_same_bytes(any_tokenizer, text, cut):
    ids = any_tokenizer.encode(text, "text")
    one_by_one = b"".join(any_tokenizer.decode_bytes([i]) for i in ids)
    assert one_by_one == any_tokenizer.decode_bytes(ids)
    assert one_by_one == any_tokenizer.decode_bytes(ids[:cut]) + any_tokenizer.decode_bytes(
        np.array(ids[cut:])
    )
    stream = codecs.getincrementaldecoder("utf-8")("replace")
    streamed = "".join(stream.decode(any_tokenizer.decode_bytes([i])) for i in ids)
    space = " " if streamed != any_tokenizer.decode(ids) else ""  # SentencePiece's leading space
    assert streamed == space + any_tokenizer.decode(ids)
    if "▁" not in text:  # SentencePiece cannot tell it from a space
        assert any_tokenizer.decode(ids) == text


def test_incomplete_character_decodes_to_replacement_character(any_tokenizer):
    ids = any_tokenizer.encode("\U0001f9ff")
    assert any_tokenizer.decode_bytes(ids).endswith("\U0001f9ff".encode())
    assert "\ufffd" in any_tokenizer.decode(ids[:-1])


def test_ids_outside_the_vocabulary_are_rejected(any_tokenizer):
    for decode in (any_tokenizer.decode, any_tokenizer.decode_bytes):
        assert str(any_tokenizer.vocab_size) in message_of(decode, [0, any_tokenizer.vocab_size])
        assert decode([]) in ("", b"")
    assert len(any_tokenizer.decode_bytes(range(any_tokenizer.vocab_size))) > any_tokenizer.vocab_size


def test_lone_surrogates_are_rejected(any_tokenizer):
    for special in ("refuse", "allow", "text"):
        assert "lone surrogate" in message_of(any_tokenizer.encode, "a\ud800", special)


def test_special_tokens_in_each_mode(any_tokenizer):
    name, i = next((name, i) for name, i in any_tokenizer.special_tokens.items() if name != "<unk>")
    assert repr(name) in message_of(any_tokenizer.encode, f"a{name}")
    assert any_tokenizer.encode(f"a{name}", "allow")[-1] == i
    as_text = any_tokenizer.encode(f"a{name}", "text")
    assert i not in as_text
    assert (
        any_tokenizer.decode(as_text) == any_tokenizer.decode([*any_tokenizer.encode("a"), i]) == f"a{name}"
    )


def test_added_special_tokens(any_tokenizer):
    extended = any_tokenizer.with_special_tokens(["<|user|>"])
    new = any_tokenizer.vocab_size
    assert extended.vocab_size == new + 1
    assert extended.encode("a<|user|>", "allow") == [*any_tokenizer.encode("a"), new]
    assert extended.decode([*extended.encode("a"), new]) == "a<|user|>"
    assert extended.decode_bytes([new]) == b"<|user|>"
    assert new not in extended.encode("<|user|>", "text")
    assert any_tokenizer.encode("<|user|>") == extended.encode("<|user|>", "text")
    assert "already" in message_of(extended.with_special_tokens, ["<|user|>"])
    ordinary = any_tokenizer.decode(any_tokenizer.encode("e")[-1:])
    assert "already" in message_of(any_tokenizer.with_special_tokens, [ordinary])


def test_a_full_disk_keeps_the_file_of_before(tmp_path):
    CharTokenizer("ab").save(tmp_path)
    with full_disk(10), pytest.raises(OSError, match="File too large"):
        CharTokenizer("abc").save(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 2
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_published_tokenizer_cannot_be_saved(any_tokenizer, tmp_path):
    assert "sav" in message_of(any_tokenizer.save, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_check_fits_compares_vocabulary_sizes():
    def model(vocab_size):
        return GPT2(GPT2Config(n_layer=1, vocab_size=vocab_size), rng=None)

    gpt2 = load_tokenizer("gpt2")
    check_fits(gpt2, model(50257))
    check_fits(gpt2, model(50304), padded=True)
    for vocab_size, padded in ((50304, False), (50256, False), (50256, True)):
        said = message_of(check_fits, gpt2, model(vocab_size), padded)
        assert "50257" in said and f"the model has {vocab_size}" in said
    images = gpt2.with_special_tokens(["<image_soft_token>"])
    check_fits(images, model(50257), padded=True)
    for tokenizer in (gpt2.with_special_tokens(["<x>"]), images.with_special_tokens(["<x>"])):
        message_of(check_fits, tokenizer, model(50257), True)
    message_of(check_fits, images, model(50257))


def test_names_are_found_as_by_a_pattern_of_all_of_them():
    rng = np.random.default_rng(0)
    names = ["<a>", "<a", "ab", "b", "\n", "\n\n", "|<", "é", "<a><", ".*"]
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    for _ in range(300):
        text = "".join(rng.choice(list("<a>b|\né.*"), rng.integers(0, 12)))
        expected = [(found.span(), found[0]) for found in re.finditer(pattern, text)]
        assert [(found.span(), found[0]) for found in find_names(names, text)] == expected
    assert find_names([], "a") == find_names([""], "a") == []


def test_thousands_of_names_are_found_in_little_time():
    """One pattern of all of them takes 5 seconds here."""
    names = [f"<unused{i}>" for i in range(6000)]
    started = time.process_time()
    assert find_names(names, "<unused" * 10_000) == []
    assert [found[0] for found in find_names(names, "<" * 60_000 + "<unused5999>")] == ["<unused5999>"]
    assert time.process_time() - started < 2  # 0.2

"""Noise among the tokens of a training text: which ones are replaced, and how they are divided."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm import load_tokenizer
from tinyllm.data.noise import replace_tokens, split_tokens
from tinyllm.tokenizers import BPETokenizer, train_bpe

TEXT = "the cat sat on the mat, and the other cat sat on the other mat. " * 3
BPE = BPETokenizer(train_bpe(TEXT, 274)).with_special_tokens(["<|x|>"])
PAIRS = BPE.merged_pairs()


def text_of(row):
    return BPE.decode_bytes(row.tolist())


@given(rate=st.floats(0, 1), rows=st.integers(1, 4), time=st.integers(1, 40), seed=st.integers(0, 99))
def test_split_rows_spell_the_same_text(rate, rows, time, seed):
    rng = np.random.default_rng(seed)
    whole = rng.integers(0, BPE.vocab_size, (rows, time))
    found = split_tokens(whole, PAIRS, rate, rng)
    assert found.shape == whole.shape
    for before, after in zip(whole, found):
        assert text_of(before).startswith(text_of(after))


def test_rates_of_0_and_1():
    whole = np.array(BPE.encode(TEXT))[None]
    np.testing.assert_array_equal(split_tokens(whole, PAIRS, 0.0, np.random.default_rng(0)), whole)
    (spelled,) = split_tokens(whole, PAIRS, 1.0, np.random.default_rng(0))
    assert spelled.max() < 256
    assert text_of(spelled) == TEXT.encode()[: whole.size]
    marks = BPETokenizer([(0, 0)])  # "!!", of the byte with the id 0
    divided = split_tokens(np.array([[256, 256]]), marks.merged_pairs(), 1.0, np.random.default_rng(0))
    assert divided.tolist() == [[0, 0]]


def test_the_share_of_divided_tokens_and_of_their_parts():
    """An id of two bytes is divided with probability p; one of more parts, at each level again."""
    rng, rate = np.random.default_rng(0), 0.3
    two = next(i for i in range(256, BPE.vocab_size) if 0 <= PAIRS[i].max() < 256)
    found = split_tokens(np.full((1, 20000), two), PAIRS, rate, rng)[0]
    # Of n tokens n (1 - p) stay whole and n p become two.
    assert (found == two).mean() == pytest.approx((1 - rate) / (1 + rate), abs=0.01)
    outer = next(i for i in range(256, BPE.vocab_size) if two in PAIRS[i])
    found = split_tokens(np.full((1, 20000), outer), PAIRS, rate, rng)[0]
    whole = np.count_nonzero(found == outer) / (1 - rate)  # n
    assert np.count_nonzero(found == two) / whole == pytest.approx(rate * (1 - rate), abs=0.02)


def test_special_tokens_and_bytes_are_never_divided():
    single = np.array([[*range(256), *BPE.special_tokens.values()]])
    np.testing.assert_array_equal(split_tokens(single, PAIRS, 1.0, np.random.default_rng(0)), single)


def test_pairs_are_those_that_were_merged():
    assert PAIRS[256 : 256 + len(BPE.merges)].tolist() == [list(pair) for pair in BPE.merges]
    gpt2 = load_tokenizer("gpt2")
    pairs = gpt2.merged_pairs()
    assert pairs.shape == (50257, 2) and (pairs[256:50256] >= 0).all()
    assert (pairs[:256] == -1).all() and (pairs[50256] == -1).all()
    for i in (256, 1000, 50255):
        assert gpt2.decode_bytes(pairs[i].tolist()) == gpt2.decode_bytes([i])
    assert (load_tokenizer("bytes").merged_pairs() == -1).all()


def test_replaced_tokens_are_any_id():
    ids = np.zeros((50, 40), np.int64)
    found = replace_tokens(ids, 0.5, 10, np.random.default_rng(0))
    assert (found != ids).mean() == pytest.approx(0.5 * 0.9, abs=0.05)
    assert {*found.reshape(-1)} == {*range(10)}

"""Labels of tokens, and the surprise of a text for a terminal."""

import re

import numpy as np
import pytest
from support.models import EVERYTHING, GPT2_SIZES, random_gpt2, random_model

from tinyllm import Error, GPT2Config
from tinyllm.tokenizers.bpe import BYTE_ORDER, BPETokenizer
from tinyllm.tools.inspect import inspect
from tinyllm.tools.inspect_text import (
    LEVELS,
    bits,
    show_surprise,
    summary,
    token_label,
    whole_characters,
)

BYTES = BPETokenizer([])  # one token per byte
CONFIG = GPT2Config(**GPT2_SIZES | dict(vocab_size=300))


def labels(text, tokenizer=BYTES):
    return [token_label(tokenizer, i) for i in tokenizer.encode(text, "allow")]


def read(text):
    return inspect(random_gpt2(CONFIG), BYTES.encode(text, "allow"), suppress_ids=BYTES.unused_ids(300))


def test_labels():
    assert labels("a \n\t€") == ["a", "␣", "⏎", "\\t", "\\xe2", "\\x82", "\\xac"]
    assert labels("<|endoftext|>") == ["<|endoftext|>"] and token_label(BYTES, 299) == "[299]"
    spaced = BPETokenizer([(BYTE_ORDER.index(ord(" ")), BYTE_ORDER.index(ord("a")))])
    assert token_label(spaced, 256) == "·a"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("a€b".encode(), [(0, 1, "a"), (1, 4, "€"), (4, 5, "b")]),
        ("你好".encode(), [(0, 3, "你"), (3, 6, "好")]),
        ("€".encode()[:2], [(0, 2, "\udce2\udc82")]),  # the text ends within a character
        (b"\x82a", [(0, 1, "\udc82"), (1, 2, "a")]),  # not UTF-8
        (b"\xe2a", [(0, 2, "\udce2a")]),
    ],
)
def test_tokens_that_share_a_character_are_one_piece(data, expected):
    found = whole_characters(BYTES, [BYTE_ORDER.index(byte) for byte in data])
    assert [(part.start, part.stop, text) for part, text in found] == expected


def test_a_token_may_end_one_character_and_begin_the_next():
    ends = BYTE_ORDER.index(0xAC), BYTE_ORDER.index(0xE2)  # of "€€": e2 82, ac e2, 82 ac
    tokenizer = BPETokenizer([ends])
    ids = [*(BYTE_ORDER.index(byte) for byte in b"\xe2\x82"), 256, *map(BYTE_ORDER.index, b"\x82\xac")]
    assert [(list(part), text) for part, text in whole_characters(tokenizer, ids)] == [
        ([0, 1, 2, 3, 4], "€€")
    ]


def test_the_table_has_every_token_with_its_probability_and_rank():
    found = read("a€ b")
    head, *rows = show_surprise(BYTES, found, colour=False).split("\n\n")[0].splitlines()
    assert head.split() == ["#", "token", "p", "rank", "most", "likely"]
    assert len(rows) == len(found.ids) == 6
    assert rows[0].split() == ["0", "'a'", "–", "–"]
    for t, row in enumerate(rows[1:], 1):
        number, token, p, rank, *other = re.split(r"\s{2,}", row.strip())
        assert (int(number), int(rank)) == (t, found.rank[t]) and p == f"{found.probability[t]:.2%}"
        assert eval(token) in ("€".encode()[t - 1 : t], " ", "b")
        if found.rank[t] == 1:
            assert not other
        else:
            name, best = other[0].rsplit(" ", 1)
            expected = BYTES.decode_bytes([found.expected[t]])
            assert eval(name) in (expected, expected.decode("utf-8", "replace"))
            assert best == f"{found.expected_probability[t]:.2%}"


def test_of_a_long_text_the_most_surprising_tokens_are_listed():
    found = read("abcdefgh" * 10)
    title, _, *rows = show_surprise(BYTES, found, colour=False).split("\n\n")[0].splitlines()
    assert title == "The 40 most surprising of 80 tokens:" and len(rows) == 40
    shown = [int(row.split()[0]) for row in rows]
    each = bits(found.probability)
    assert shown == sorted(shown) and 0 not in shown
    assert each[shown].min() >= np.delete(each, [0, *shown]).max()


def test_colours_are_those_of_the_bits_and_bytes_of_a_character_are_added():
    found = read("ab€\n<|endoftext|>\x1b")
    text = show_surprise(BYTES, found, colour=True).split("\n\n")[0]
    each, pieces = bits(found.probability), ["a", "b", "€", "⏎", "<|endoftext|>", "\\x1b"]
    amounts = [each[0], each[1], each[2:5].sum(), *each[5:8]]
    expected = ""
    for piece, amount in zip(pieces, amounts):
        colour = [shade for least, shade in LEVELS if amount >= least][-1:]
        expected += f"\x1b[38;5;16;48;5;{colour[0]}m{piece}\x1b[0m" if colour else piece
        expected += "\n" * (piece == "⏎")
    assert text == expected and len({a >= 12 for a in amounts[1:]}) == 2


def test_summary():
    found = read("abc")
    mean = -np.log2(found.probability[1:]).mean()
    first = (found.rank[1:] == 1).sum()
    assert (
        summary(found) == f"3 tokens, {mean:.2f} bits each after the first; {first} of 2 were the most likely"
    )
    assert summary(read("a")) == "1 token, which was not predicted"


def test_without_probabilities_it_is_an_error():
    with pytest.raises(Error, match="surprise=True"):
        show_surprise(BYTES, inspect(random_model(EVERYTHING), [1, 2], surprise=False), colour=False)

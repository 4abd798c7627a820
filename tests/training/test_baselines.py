"""Baselines against the formula in plain Python, and on texts with known results."""

import math
import random
import sys
from collections import Counter, defaultdict

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tinyllm.training.baselines
from tinyllm.errors import Error
from tinyllm.training.baselines import describe, ngram_bits_per_byte, xz_bits_per_byte

WORDS = b"the cat sat on the mat and the dog sat on the log, "


def plain_ngram_bits(train, validation, order):
    """Witten-Bell smoothing by its formula, byte by byte."""
    following = defaultdict(Counter)  # context -> how often each byte followed it
    for i in range(len(train)):
        for k in range(min(order - 1, i) + 1):
            following[train[i - k : i]][train[i]] += 1

    def probability(byte, context):
        counts = following[context]
        shorter = probability(byte, context[1:]) if context else 1 / 256
        if not counts:
            return shorter
        return (counts[byte] + len(counts) * shorter) / (counts.total() + len(counts))

    bits = 0.0
    for i, byte in enumerate(validation):
        bits -= math.log2(probability(byte, validation[max(0, i - order + 1) : i]))
    return bits / len(validation)


@st.composite
def texts(draw):
    alphabet = draw(st.sampled_from([b"a", b"ab", b"abc", bytes([0, 1, 255]), bytes(range(256))]))
    parts = st.lists(st.sampled_from(alphabet), min_size=1, max_size=60).map(bytes)
    return draw(parts), draw(parts)


@given(texts(), st.integers(1, 8))
@example((b"abracadabra", b"cadabra"), 5)
@example((b"a", b"aaaa"), 8)  # a training text shorter than a context
@example((b"aaaa", b"b"), 8)  # a validation text shorter than a context
@example((b"ab" * 20, b"xbxbabab"), 3)  # unseen bytes and contexts
@example((b"\x00" * 9, b"\x00\x00\x01"), 8)  # contexts whose number is 0
@example((b"\xff" * 9, b"\xff" * 9), 8)  # the largest number of 64 bits
@example((b"aab", b"\xff\xff\xff"), 2)  # larger than every number in the training text
def test_ngram_equals_its_formula(parts, order):
    train, validation = parts
    found = ngram_bits_per_byte(train, validation, order)
    assert found == pytest.approx(plain_ngram_bits(train, validation, order), rel=1e-12)


@pytest.mark.parametrize("context", [b"", b"t", b"at ", b"the ", b"zzzz", b"\xffat o"])
@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_ngram_probabilities_sum_to_one(order, context):
    train = WORDS * 3
    before = ngram_bits_per_byte(train, context, order) * len(context) if context else 0.0
    total = 0.0
    for byte in range(256):
        text = context + bytes([byte])
        total += 2 ** (before - ngram_bits_per_byte(train, text, order) * len(text))
    assert total == pytest.approx(1, rel=1e-12)


def test_ngram_equals_a_hand_computed_value():
    # c(a) = 2, c(b) = 1, T = 2 of 3 bytes: P(b) = (1 + 2/256) / 5. After a: b once, a once, T = 2, so
    # P(b | a) = (1 + 2 P(b)) / 4. Of the text "ab" the first byte has no context: P(a) = (2 + 2/256) / 5.
    p_a, p_b = (2 + 2 / 256) / 5, (1 + 2 / 256) / 5
    expected = -(math.log2(p_a) + math.log2((1 + 2 * p_b) / 4)) / 2
    assert ngram_bits_per_byte(b"aab", b"ab", order=2) == pytest.approx(expected, rel=1e-14)


def test_uniform_text_needs_eight_bits():
    every_byte = bytes(range(256))
    validation = random.Random(0).randbytes(1000)
    assert ngram_bits_per_byte(every_byte * 10, validation, order=1) == 8
    # A de Bruijn sequence (Lyndon words in order): every byte follows every byte once,
    # and only the byte that closes the cycle occurs once more than the others.
    cycle = b"".join(bytes([a]) + b"".join(bytes([a, b]) for b in range(a + 1, 256)) for a in range(256))
    assert len(cycle) == 256**2
    assert ngram_bits_per_byte(cycle + cycle[:1], validation, order=2) == pytest.approx(8, abs=1e-5)
    noise = random.Random(1).randbytes(100_000)
    assert ngram_bits_per_byte(noise, validation, order=1) == pytest.approx(8, abs=0.02)
    assert 8 <= xz_bits_per_byte(noise, validation) < 8.1  # xz stores what it cannot compress


def test_repetitions_need_few_bits():
    letters = bytes(random.Random(2).choices(b"abcdefghijklmnop", k=70_000))  # 4 bits each if unseen
    assert 0 <= xz_bits_per_byte(letters[:50_000], letters[20_000:40_000]) < 0.05
    assert 4 <= xz_bits_per_byte(letters[:50_000], letters[50_000:]) < 4.6
    assert ngram_bits_per_byte(WORDS * 100, WORDS) < 0.5
    assert ngram_bits_per_byte(WORDS * 100, WORDS, order=1) > 3


def python_docs() -> tuple[bytes, bytes]:
    """The default text of a run, split 90/10 by characters."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    cut = int(len(text) * 0.9)
    return text[:cut].encode("utf-8"), text[cut:].encode("utf-8")


def test_baselines_of_the_python_docs():
    train, validation = python_docs()
    size = len(train) + len(validation)
    orders = [ngram_bits_per_byte(train, validation, order) for order in (1, 2, 3, 4, 5)]
    assert orders == sorted(
        orders, reverse=True
    )  # in any release of the text, a longer context is better, up to 4
    if abs(size / 466_273 - 1) > 0.03:
        pytest.skip(f"the expected values are for CPython 3.11's text, 466,273 bytes; this one has {size:,}")
    assert orders[-1] == pytest.approx(1.90, abs=0.03)
    assert xz_bits_per_byte(train, validation) == pytest.approx(1.41, abs=0.03)


def test_describe_is_a_table_of_three_numbers_for_each_text():
    train, texts = WORDS * 50, {"one": (1.234, WORDS * 2), "another": (5.678, WORDS[::-1] * 30)}
    lines = describe(train, texts).splitlines()
    assert lines[0].split()[-2:] == ["one", "another"]
    figures = {line[:44].partition(",")[0].strip(): line[44:].split() for line in lines[1:]}
    each = [text for _, text in texts.values()]
    assert figures == {
        "bytes of text": [f"{len(text):,}" for text in each],
        "this model": ["1.23", "5.68"],
        "byte 5-gram": [f"{ngram_bits_per_byte(train, text):.2f}" for text in each],
        "xz -9": [f"{xz_bits_per_byte(train, text):.2f}" for text in each],
    }
    assert len({line.rindex(".") for line in lines[2:]}) == 1  # decimal points in one column
    assert max(len(line) for line in lines) <= 88


def test_describe_omits_the_baselines_of_a_large_text(monkeypatch):
    monkeypatch.setattr(tinyllm.training.baselines, "LARGEST", 3_000_000)
    monkeypatch.setattr(tinyllm.training.baselines, "ngram_bits_per_byte", None)  # a call would fail
    said = describe(b"a" * 2_000_000, {"x": (1.5, b"b" * 1_000_001)})
    assert "1.50" in said
    assert said.count("more than 3 MB") == 2
    monkeypatch.undo()
    assert tinyllm.training.baselines.LARGEST == 20_000_000
    monkeypatch.setattr(tinyllm.training.baselines, "LARGEST", len(WORDS * 2))
    assert "omitted" not in describe(WORDS, {"x": (1.5, WORDS)})


def test_without_lzma_only_xz_is_omitted(monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(Error, match="built without lzma"):
        xz_bits_per_byte(b"a", b"b")
    said = describe(WORDS, {"x": (1.5, WORDS)})
    assert "xz -9 is omitted: this Python was built without lzma" in said
    assert f"{ngram_bits_per_byte(WORDS, WORDS):.2f}" in said


@pytest.mark.parametrize("order", [0, 9, -1, 2.0, True, None])
def test_an_order_out_of_range_is_refused(order):
    with pytest.raises(Error, match=rf"order is {order!r}: .*1 to 8"):
        ngram_bits_per_byte(b"a", b"a", order)


@pytest.mark.parametrize(
    "measure", [ngram_bits_per_byte, xz_bits_per_byte, lambda t, v: describe(t, {"x": (1.0, v)})]
)
@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((b"", b"a"), "train is empty"),
        ((b"a", b""), "validation is empty"),
        (("a", b"a"), "train is a str: give bytes"),
        ((b"a", None), "validation is a NoneType: give bytes"),
    ],
)
def test_empty_texts_and_texts_that_are_not_bytes_are_refused(measure, parts, said):
    with pytest.raises(Error, match=said):
        measure(*parts)

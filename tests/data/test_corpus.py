"""Training texts: hashes, pieces, samples, splits and ids."""

import gzip
import hashlib
import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllm.data import corpus as corpus_module
from tinyllm.data import documents as documents_module
from tinyllm.data.corpus import (
    Piece,
    count_bytes,
    encode_documents,
    open_corpus,
    train_validation_split,
)
from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import END_OF_TEXT
from tinyllm.tokenizers.bpe import BPETokenizer, train_bpe
from tinyllm.tokenizers.char import CharTokenizer

GPT2 = load_tokenizer("gpt2")
OWN = BPETokenizer(train_bpe("it's 12 12  12\n\n  it's..   漢字 漢字!\x1c !\x1c", 268))


def sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode("utf-8") if isinstance(content, str) else content).hexdigest()


def jsonl(records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode("utf-8")


# Hashes


def test_hash_of_one_document_and_of_several(tmp_path):
    one, two = "first é", "second"
    (tmp_path / "a.txt").write_text(one, encoding="utf-8")
    assert open_corpus(tmp_path).sha256 == open_corpus(tmp_path / "a.txt").sha256 == sha256(one)
    (tmp_path / "b.txt").write_text(two, encoding="utf-8")
    digests = bytes.fromhex(sha256(one)) + bytes.fromhex(sha256(two))
    assert open_corpus(tmp_path).sha256 == sha256(digests)


def test_hash_depends_on_document_boundaries(tmp_path):
    seen = set()
    for documents in (
        ["ab", "c"],
        ["a", "bc"],
        ["abc"],
        ["abc", ""],
        ["", "abc"],
        ["c", "ab"],
        ["a", "b", "c"],
    ):
        (tmp_path / "some.jsonl").write_bytes(jsonl({"t": document} for document in documents))
        seen.add(open_corpus(tmp_path / "some.jsonl", field="t").sha256)
    assert len(seen) == 7


def test_changed_text_is_detected(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"before")
    corpus = open_corpus(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"behind")
    for read in (corpus.pieces, corpus.documents):
        with pytest.raises(Error, match=r"a.txt' changed while it was in use"):
            list(read())


# Pieces

# Special cases of GPT-2's pattern: contractions, leading spaces, runs of whitespace, digits, and characters
# that are whitespace only in Python (U+001C) or only in the pattern.
NASTY = st.text(
    st.sampled_from(
        " \n\t\r\x1c\x1f\x85\xa0\u2028\u3000\u200b'sdmtlvreLA19é漢字²٣.,!-_🙂\U0001f1e6\u0301\ud7ff"
    ),
    max_size=60,
)


@given(NASTY | st.text(max_size=60), st.integers(1, 9), st.integers(1, 5))
@example("don't  stop\n\n  now 12 34", 1, 1)
@example("a \x1c b\x1c c", 1, 3)
@example("x\x1c\x1f y", 2, 1)
@example("!\x1c!\x1c!\x1c", 1, 1)
@example("a\u3000\u3000b\x85c\xa0 d\u2028", 1, 1)
@example("'s 's\n'll   ", 1, 2)
@example("", 1, 1)
def test_pieces_have_the_tokens_of_the_whole_text(tmp_path_factory, content, size, block_bytes):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(b"." + content.encode("utf-8"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(corpus_module, "PIECE_CHARACTERS", size)
        patched.setattr(documents_module, "BLOCK_BYTES", block_bytes)
        pieces = list(open_corpus(path).pieces())
    assert "".join(piece.text for piece in pieces) == "." + content
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    ids = [i for piece in pieces for i in GPT2.encode(piece.text)]
    assert ids == GPT2.encode("." + content)
    own = [i for piece in pieces for i in OWN.encode(piece.text)]
    assert own == OWN.encode("." + content)
    for left, right in pairwise(pieces):
        assert len(left.text) >= size
        assert not left.text[-1].isspace() and right.text[0].isspace()
        first = corpus_module.CUT.search(left.text + right.text[0], size - 1)
        assert first.end() == len(left.text)


def test_pieces_of_many_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "PIECE_CHARACTERS", 4)
    documents = ["ab cd efgh ij", "", "short", "abcd e"]
    (tmp_path / "some.jsonl").write_bytes(jsonl({"t": document} for document in documents))
    assert list(open_corpus(tmp_path / "some.jsonl", field="t").pieces()) == [
        Piece("ab cd", False),
        Piece(" efgh", False),
        Piece(" ij", True),
        Piece("", True),
        Piece("short", True),
        Piece("abcd", False),
        Piece(" e", True),
    ]


@pytest.mark.parametrize("character", [" ", "a", "\x1c"])
def test_text_without_a_place_to_cut_is_rejected(tmp_path, monkeypatch, character):
    monkeypatch.setattr(corpus_module, "PIECE_CHARACTERS", 10)
    monkeypatch.setattr(corpus_module, "LONGEST_PIECE", 100)
    (tmp_path / "a.txt").write_text("words " + character * 100, encoding="utf-8")
    assert len(list(open_corpus(tmp_path / "a.txt").documents())) == 1
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 64)
    with pytest.raises(Error, match=r"a.txt' has 10[0-9] characters without a place to cut"):
        list(open_corpus(tmp_path / "a.txt").pieces())


def test_memory_use_does_not_grow_with_the_text(tmp_path):
    """60 MB in one line of compressed text are read with the memory of a few pieces."""
    with gzip.open(tmp_path / "large.txt.gz", "wb", compresslevel=1) as file:
        for i in range(60):
            file.write(f"the {i} quick brown foxes ".encode() * 40_000)
    program = """
import sys, tracemalloc
from tinyllm.data.corpus import open_corpus
tracemalloc.start()
corpus = open_corpus(sys.argv[1])
total = sum(len(piece.text) for piece in corpus.pieces())
assert total == corpus.num_characters == corpus.num_bytes > 58_000_000, total
print(len(corpus.sample(1)), tracemalloc.get_traced_memory()[1])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "large.txt.gz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sampled, peak = map(int, done.stdout.split())
    assert sampled == 1
    assert peak < 16e6


# Samples


def numbered(tmp_path, count: int) -> str:
    """A file whose words, of five characters each, are their own indices."""
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f" {i:04}" for i in range(count)), encoding="utf-8")
    return str(path)


def test_sample_is_spread_over_the_training_part(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "PIECE_CHARACTERS", 50)
    corpus = open_corpus(numbered(tmp_path, 5000))
    chosen = corpus.sample(2000)
    assert 2000 <= sum(map(len, chosen)) <= 2050
    starts = [int(piece.split()[0]) for piece in chosen]
    assert starts == sorted(set(starts))
    assert starts[0] == 0 and 4300 < starts[-1] < 4500  # nothing from the last tenth
    assert all(90 < b - a < 130 for a, b in pairwise(starts))
    assert all(int(piece.split()[-1]) < 2500 for piece in corpus.sample(2000, validation_fraction=0.5))


def test_sample_larger_than_the_text_is_the_training_part(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "PIECE_CHARACTERS", 50)
    corpus = open_corpus(numbered(tmp_path, 1000))
    assert "".join(corpus.sample(10**9)) == next(corpus.documents())[:4500]


def test_sample_of_a_short_text_is_rejected(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"some words")
    with pytest.raises(Error, match="has only 10 bytes, too few"):
        open_corpus(tmp_path / "a.txt").sample(5)
    with pytest.raises(Error, match="validation_fraction is 1"):
        open_corpus(tmp_path / "a.txt").sample(5, validation_fraction=1)


# Splits


@given(st.text(min_size=2), st.floats(0.01, 0.99))
def test_split_parts_add_up_to_the_text(content, fraction):
    try:
        train, validation = train_validation_split(content, fraction)
    except Error:
        assert int(len(content) * (1 - fraction)) in (0, len(content))
    else:
        assert train and validation
        assert train + validation == content
        assert len(train) == int(len(content) * (1 - fraction))


def test_split_default_is_nine_to_one():
    assert train_validation_split("abcdefghij") == ("abcdefghi", "j")
    assert train_validation_split("abcd", validation_fraction=0.5) == ("ab", "cd")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_rejects_a_fraction_outside_0_1(fraction):
    with pytest.raises(Error, match="validation_fraction"):
        train_validation_split("some text", fraction)


@pytest.mark.parametrize("content", ["", "a"])
def test_split_of_too_little(content):
    with pytest.raises(Error, match=f"{len(content)} characters"):
        train_validation_split(content)


@given(st.lists(st.text(max_size=9), min_size=1), st.floats(0.01, 0.99))
@example(["ab", "", "cd"], 0.5)
@example(["", "abcd", ""], 0.5)
def test_split_of_documents_equals_the_split_of_their_text(documents, fraction):
    joined = "".join(documents)
    try:
        expected = train_validation_split(joined, fraction)
    except Error:
        with pytest.raises(Error, match=f"{len(joined)} characters"):
            train_validation_split(documents, fraction)
        return
    train, validation = train_validation_split(iter(documents), fraction)
    assert ("".join(train), "".join(validation)) == expected
    # At most one document is cut in two, and then neither half is empty.
    if len(train) + len(validation) > len(documents):
        assert train[-1] and validation[0]
        train, validation = (*train[:-1], train[-1] + validation[0]), validation[1:]
    assert [*train, *validation] == documents


# Documents to ids


def test_documents_are_joined_by_end_of_text():
    end = GPT2.special_tokens[END_OF_TEXT]
    documents = ["one two", "", " three", "four"]
    ids = encode_documents(GPT2, documents)
    assert ids.dtype == np.uint32
    expected = GPT2.encode("one two"), [], GPT2.encode(" three"), GPT2.encode("four")
    assert ids.tolist() == [*expected[0], end, end, *expected[2], end, *expected[3]]
    assert ids.tolist() == GPT2.encode(END_OF_TEXT.join(documents), special="allow")
    assert encode_documents(GPT2, ["one two"]).tolist() == expected[0]
    assert encode_documents(GPT2, []).tolist() == []
    with pytest.raises(Error, match=r"are a str: .*tokenizer\.encode"):
        encode_documents(GPT2, "one two")


def test_special_applies_to_documents_not_separators():
    documents = ["one", f"two{END_OF_TEXT}three"]
    with pytest.raises(Error, match="contains the special token"):
        encode_documents(GPT2, documents)
    allowed, as_text = (encode_documents(GPT2, documents, special).tolist() for special in ("allow", "text"))
    assert allowed.count(GPT2.special_tokens[END_OF_TEXT]) == 2
    assert as_text.count(GPT2.special_tokens[END_OF_TEXT]) == 1
    assert GPT2.decode(as_text) == f"one{END_OF_TEXT}two{END_OF_TEXT}three"


def test_documents_without_an_end_of_text_token_are_rejected():
    characters = CharTokenizer("abc")
    assert encode_documents(characters, ["abc"]).tolist() == [0, 1, 2]
    with pytest.raises(Error, match=r"'char' has no <\|endoftext\|> .*with_special_tokens"):
        encode_documents(characters, ["a", "b"])
    extended = characters.with_special_tokens([END_OF_TEXT])
    assert encode_documents(extended, ["a", "b"]).tolist() == [0, 3, 1]


# Markers in the text


@given(st.lists(NASTY, min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 9))
@example(["a", "<|endoftext", "|>"], 1, 1)
@example(["", ""], 3, 1)
def test_marked_text_has_the_documents_of_a_jsonl_file(tmp_path_factory, documents, block_bytes, size):
    folder = tmp_path_factory.mktemp("marked")
    documents = [*"ab ab ab ab ab".split(), *documents]
    (folder / "a.txt").write_bytes(END_OF_TEXT.join(documents).encode("utf-8"))
    (folder / "a.jsonl").write_bytes(jsonl({"t": document} for document in documents))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(corpus_module, "PIECE_CHARACTERS", size)
        patched.setattr(documents_module, "BLOCK_BYTES", block_bytes)
        plain, lines = open_corpus(folder / "a.txt"), open_corpus(folder / "a.jsonl", "t")
        assert list(plain.documents(split=True)) == list(lines.documents()) == documents
        assert list(plain.pieces(split=True)) == list(lines.pieces())
        assert plain.sample(9, 0.01, split=True) == lines.sample(9, 0.01)
        assert list(plain.documents()) == [END_OF_TEXT.join(documents)]


def test_special_tokens_stand_for_no_byte():
    tokenizer = GPT2.with_special_tokens(["<|üser|>"])
    documents = ["<|üser|>é", f"a{END_OF_TEXT}b", ""]
    assert count_bytes(tokenizer, documents, "allow") == 4
    assert count_bytes(tokenizer, documents) == count_bytes(tokenizer, documents, "text") == 4 + 9 + 13
    with pytest.raises(Error, match="give a list"):
        count_bytes(tokenizer, "a")

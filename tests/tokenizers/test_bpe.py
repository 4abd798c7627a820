"""The BPE trainer: worked examples, and comparison with naive recounting and the tokenizers package."""

import json
import re
from collections import Counter
from itertools import pairwise

import pytest
import regex
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from tinyllm.data.corpus import load_text
from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import END_OF_TEXT, FILE_NAME
from tinyllm.tokenizers.bpe import BPETokenizer, merge_pair, parse_bpe, train_bpe
from tinyllm.tokenizers.tiktoken import BYTE_ORDER, GPT2_PATTERN, GPT2_VOCABULARY

PYTHON_DOCS = load_text("python-docs").text
BYTE_OF_SYMBOL = dict(zip(sorted(ByteLevel.alphabet()), BYTE_ORDER))  # the symbols sort like the ids

# Strings of few characters repeat pairs and have many ties; the other characters have two to four bytes.
# Which characters are letters depends on a library's Unicode version, so only old characters are used.
few = st.text("ab", max_size=40)
mixed = st.text("aab b.\n\t'1é字👍s", max_size=60)
words = st.lists(
    st.sampled_from(["the", " the", " then", "aaaa", "\n", " ", "12", "don't", "日本", "!!"])
).map("".join)
texts = few | mixed | words


def ids_of(text):
    return [BYTE_ORDER.index(byte) for byte in text.encode("utf-8")]


def plain_merge(ids, pair, new_id):
    merged = []
    for token in ids:
        # The new token is never half of the pair: new_id is above both.
        if merged and (merged[-1], token) == pair:
            merged[-1] = new_id
        else:
            merged.append(token)
    return merged


def train_plainly(text, pattern):
    """All merges of a text, recounting all pairs each time."""
    pieces = [ids_of(piece) for piece in regex.findall(pattern, text)]
    merges = []
    while True:
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        if not counts or max(counts.values()) < 2:
            return merges
        most = max(counts.values())
        merges.append(min(pair for pair, count in counts.items() if count == most))
        pieces = [plain_merge(piece, merges[-1], 255 + len(merges)) for piece in pieces]


def encode_plainly(text, merges, pattern):
    """Apply the merges one after the other, each to all pieces of the text."""
    pieces = [ids_of(piece) for piece in regex.findall(pattern, text)]
    for i, pair in enumerate(merges):
        pieces = [plain_merge(piece, tuple(pair), 256 + i) for piece in pieces]
    return [token for piece in pieces for token in piece]


def train_with_tokenizers(text, merges):
    """Hugging Face's trainer: at most ``merges`` pairs of symbols, and the id of each symbol."""
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    reference.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges,
        min_frequency=2,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    reference.train_from_iterator([text] if isinstance(text, str) else text, trainer)
    pairs = json.loads(reference.to_str())["model"]["merges"]
    return [tuple(pair) for pair in pairs], reference.get_vocab()


def as_bytes(symbols):
    """The bytes of a token in byte symbols, as in the tokenizers package and GPT-2's file."""
    return bytes(BYTE_OF_SYMBOL[symbol] for symbol in symbols)


def bytes_of_merges(merges):
    token = BPETokenizer(merges).encoding.decode_single_token_bytes
    return [(token(left), token(right)) for left, right in merges]


@pytest.fixture(scope="module")
def docs():
    return BPETokenizer(train_bpe(PYTHON_DOCS, 2048))


# The merges


def test_merges_of_the_papers_example():
    text = "low " * 5 + "lower " * 2 + "newest " * 6 + "widest " * 3
    merges = train_bpe(text, 257 + 7, pattern=r"\S+|\s")
    token = BPETokenizer(merges).decode
    # es and st both occur 9 times, e comes before s; ew, ne and w·est 6 times, e before n before w.
    assert [token([256 + i]) for i in range(7)] == ["es", "est", "lo", "low", "ew", "new", "newest"]
    assert merges[0] == tuple(ids_of("es"))
    assert merges[1] == (256, *ids_of("t"))


def test_ids_are_bytes_then_merges_then_end_of_text():
    tokenizer = BPETokenizer(train_bpe("abab abab", 259))
    assert tokenizer.vocab_size == 259
    assert tokenizer.name == "bpe:259"
    assert tokenizer.decode_bytes(range(256)) == BYTE_ORDER
    assert sorted(BYTE_ORDER) == list(range(256))
    assert [tokenizer.decode([i]) for i in (256, 257, 258)] == ["ab", "abab", END_OF_TEXT]


def test_a_tokenizer_has_merges_of_its_own():
    given = [[64, 65]]  # as in JSON
    tokenizer = BPETokenizer(given)
    given[0][0] = 0
    assert tokenizer.merges == [(64, 65)]


def test_tie_is_broken_by_smaller_ids():
    # As bytes, \n is 10 and ! is 33; in GPT-2's order ! is the first id and \n comes late.
    assert train_bpe("\nx\nx!x!x", 258, pattern=r"\nx|!x") == [tuple(ids_of("!x"))]
    assert train_bpe("ba ba ab ab", 258, pattern=r"\S+|\s") == [tuple(ids_of("ab"))]


def test_overlapping_pairs_in_a_run_are_counted():
    # aa counts 4 (twice in each aaa) and bc 3, although merging gives only 2 tokens aa.
    assert train_bpe("aaa bc aaa bc bc", 258, pattern=r"\S+|\s") == [tuple(ids_of("aa"))]


def test_merges_stay_inside_pieces():
    assert train_bpe("a.a.a.a.", 257) == []
    with pytest.raises(Error, match="at most 257"):
        train_bpe("a.a.a.a.", 258)
    assert train_bpe("a.a.a.a.", 258, pattern=r"a\.") == [tuple(ids_of("a."))]


def test_end_of_text_separates_documents():
    text = END_OF_TEXT.join(["xy", "xy", "", "x"])
    assert train_bpe(text, 258) == [tuple(ids_of("xy"))]
    with pytest.raises(Error, match="at most 258"):
        train_bpe(text, 259)


@given(text=texts, pattern=st.sampled_from([GPT2_PATTERN, r"[\s\S]+", r"\S+|\s", r"[ab]+|[^ab]"]))
def test_merges_equal_those_of_naive_recounting(text, pattern):
    expected = train_plainly(text, pattern)
    assert train_bpe(text, 257 + len(expected), pattern) == expected


@given(text=texts)
def test_merges_equal_those_of_tokenizers(text):
    pairs, _ = train_with_tokenizers(text, merges=1000)
    merges = train_bpe(text, 257 + len(pairs))
    assert bytes_of_merges(merges) == [(as_bytes(left), as_bytes(right)) for left, right in pairs]
    with pytest.raises(
        Error, match=f"has only {len(pairs)} merges.* vocab_size of at most {257 + len(pairs)},"
    ):
        train_bpe(text, 257 + len(pairs) + 1)


def test_merges_and_ids_equal_those_of_tokenizers_on_python_docs(docs):
    pairs, ids = train_with_tokenizers(PYTHON_DOCS, merges=1791)
    assert len(docs.merges) == 1791
    assert bytes_of_merges(docs.merges) == [(as_bytes(left), as_bytes(right)) for left, right in pairs]
    assert {as_bytes(symbols): i for symbols, i in ids.items()} == docs.encoding._mergeable_ranks
    assert docs.vocab_size == 2048
    assert docs.decode([2047]) == END_OF_TEXT


def test_fewer_merges_are_a_prefix_of_more_merges(docs):
    assert train_bpe(PYTHON_DOCS, 400) == docs.merges[: 400 - 257]


@given(ids=st.lists(st.integers(0, 2)), pair=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_merge_pair_merges_from_left_to_right(ids, pair):
    assert merge_pair(ids, pair, 9) == plain_merge(ids, pair, 9)
    assert merge_pair([1, 1, 1], (1, 1), 9) == [9, 1]


# Text to ids and back


@settings(max_examples=50)
@given(text=texts | st.text("abcdefghi \n", max_size=80))
def test_tiktoken_applies_the_merges_in_order(docs, text):
    assert docs.encode(text) == encode_plainly(text, docs.merges, GPT2_PATTERN)


@given(text=texts, other=texts, pattern=st.sampled_from([GPT2_PATTERN, r"[\s\S]+"]))
def test_tiktoken_applies_merges_of_any_text_in_order(text, other, pattern):
    merges = train_plainly(text, pattern)
    tokenizer = BPETokenizer(merges, pattern)
    for each in (text, other, text + other):
        assert tokenizer.encode(each) == encode_plainly(each, merges, pattern)


def test_python_docs_encoding_equals_naive_encoding(docs):
    text = PYTHON_DOCS[100_000:103_000]
    assert docs.encode(text) == encode_plainly(text, docs.merges, GPT2_PATTERN)


def test_gpt2_equals_a_bpe_tokenizer_of_its_merges():
    lines = GPT2_VOCABULARY.read_text(encoding="utf-8").split("\n")[1:-1]
    gpt2 = load_tokenizer("gpt2")
    ranks = gpt2.encoding._mergeable_ranks
    merges = [tuple(ranks[as_bytes(symbols)] for symbols in line.split(" ")) for line in lines]
    tokenizer = BPETokenizer(merges)
    assert tokenizer.vocab_size == gpt2.vocab_size
    assert tokenizer.encode(PYTHON_DOCS) == gpt2.encode(PYTHON_DOCS)


@given(documents=st.lists(texts, max_size=6))
@example(documents=["ab", "ab", "a", "b"])
@example(documents=["a" + "b" * 3, " b", "", "b"])
def test_merges_of_documents_equal_those_of_tokenizers(documents):
    pairs, _ = train_with_tokenizers(documents, merges=1000)
    size = 257 + len(pairs)
    merges = train_bpe(documents, size)
    assert bytes_of_merges(merges) == [(as_bytes(left), as_bytes(right)) for left, right in pairs]
    assert train_bpe((document for document in documents), size) == merges  # an iterator can be consumed once
    assert train_bpe(END_OF_TEXT.join(documents), size) == merges
    with pytest.raises(Error, match=f"vocab_size of at most {size},"):
        train_bpe(documents, size + 1)


def test_no_piece_spans_two_documents():
    assert train_bpe(["x", "y"] * 9, 257) == []
    with pytest.raises(Error, match="at most 257"):
        train_bpe(["x", "y"] * 9, 258)
    assert train_bpe("xy" * 9, 258) == [tuple(ids_of("xy"))]


@given(text=st.text())
def test_decoding_inverts_encoding(docs, text):
    ids = docs.encode(text, special="text")
    assert docs.decode(ids) == text
    assert docs.decode_bytes(ids) == text.encode("utf-8")
    assert all(0 <= i < 2047 for i in ids)


def test_python_docs_round_trip_in_fewer_ids(docs):
    ids = docs.encode(PYTHON_DOCS)
    assert docs.decode(ids) == PYTHON_DOCS
    assert len(ids) < len(PYTHON_DOCS.encode("utf-8")) / 3


def test_special_token_in_text_is_refused_by_default(docs):
    text = f"the{END_OF_TEXT}the"
    with pytest.raises(Error, match=r"<\|endoftext\|>.*'allow'.*'text'"):
        docs.encode(text)
    assert docs.encode(text, special="allow") == [*docs.encode("the"), 2047, *docs.encode("the")]
    as_text = docs.encode(text, special="text")
    assert 2047 not in as_text
    assert docs.decode(as_text) == docs.decode(docs.encode(text, special="allow")) == text


def test_decode_rejects_ids_outside_the_vocabulary(docs):
    with pytest.raises(Error, match=r"ids\[1\] is 2048\b.* 0 to 2047"):
        docs.decode([0, 2048])


# Saving and loading


def test_save_and_load_give_the_same_tokenizer(docs, tmp_path):
    docs.save(tmp_path)
    saved = json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))
    merges = [list(pair) for pair in docs.merges]
    assert saved == {"kind": "bpe", "pattern": GPT2_PATTERN, "merges": merges, "added_tokens": []}
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is BPETokenizer
    assert (loaded.name, loaded.vocab_size) == ("bpe:2048", 2048)
    assert loaded.to_json() == docs.to_json()
    assert loaded.encode(PYTHON_DOCS) == docs.encode(PYTHON_DOCS)


def test_pattern_is_saved_with_the_merges(tmp_path):
    text = "a.a. a.a."
    BPETokenizer(train_bpe(text, 259, r"\S+|\s"), r"\S+|\s").save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pattern == r"\S+|\s"
    assert [loaded.decode([i]) for i in loaded.encode(text)] == ["a.a.", " ", "a.a."]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"merges": [[64, 65], [257, 64]]}, r"merges\[1\] is \[257, 64\]: .* 0 to 256"),
        ({"merges": [[256, 65], [64, 65]]}, r"merges\[0\] is \[256, 65\]: .* 0 to 255"),
        ({"merges": [[-1, 65]]}, r"merges\[0\] is \[-1, 65\]"),
        ({"merges": [[64, 65, 66]]}, r"merges\[0\] is \[64, 65, 66\]"),
        ({"merges": [[64]]}, r"merges\[0\] is \[64\]"),
        ({"merges": [64]}, r"merges\[0\] is 64"),
        ({"merges": ["ab"]}, r"merges\[0\] is 'ab'"),
        ({"merges": [None]}, r"merges\[0\] is None"),
        ({"merges": [[64.0, 65]]}, r"merges\[0\] is \[64.0, 65\]"),
        ({"merges": [[64, True]]}, r"merges\[0\] is \[64, True\]"),
        ({"merges": [["a", "b"]]}, r"merges\[0\] is \['a', 'b'\]"),
        ({"merges": [[64, 65], [64, 65]]}, r"merges\[1\] gives b'ab', which is already id 256"),
        (
            {"merges": [[64, 65], [65, 66], [256, 66], [64, 257]]},
            r"merges\[3\] gives b'abc', which is already id 258",
        ),
        ({"merges": {}}, "'gpt2', or 'char'"),
        ({"merges": None}, "'gpt2', or 'char'"),
        ({"pattern": None}, "'gpt2', or 'char'"),
        ({"pattern": "("}, "pattern '\\(' is not a regular expression"),
        ({"pattern": "a*"}, "pattern 'a\\*' matches the empty string"),
        ({"pattern": r"(?<n>a)(?&n)"}, "is not valid in tiktoken"),
    ],
)
def test_load_error_names_the_file_and_the_problem(tmp_path, change, said):
    definition = {"kind": "bpe", "pattern": GPT2_PATTERN, "merges": [[64, 65]]}
    (tmp_path / FILE_NAME).write_text(json.dumps(definition), encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("ab") == [256]
    (tmp_path / FILE_NAME).write_text(json.dumps(definition | change), encoding="utf-8")
    with pytest.raises(Error, match=said) as raised:
        load_tokenizer(tmp_path)
    assert repr(str(tmp_path / FILE_NAME)) in str(raised.value)


def test_tokenizer_without_merges_encodes_bytes(tmp_path):
    tokenizer = BPETokenizer(train_bpe("", 257))
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("aé") == ids_of("aé")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).decode(ids_of("aé")) == "aé"


# Bad input


@pytest.mark.parametrize("vocab_size", [256, 0, -1, True, 2048.0, "2048", None])
def test_bad_vocab_size_is_rejected(vocab_size):
    with pytest.raises(Error, match=rf"vocab_size is {vocab_size!r}: choose at least 257"):
        train_bpe("some text, some text", vocab_size)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"abc", "bytes"),
        (None, "NoneType"),
        ("a\ud800", "surrogate"),
        (["abc", b"abc"], "bytes"),
        (["abc", "a\ud800"], "surrogate"),
    ],
)
def test_text_of_the_wrong_type_is_rejected(text, said):
    with pytest.raises(Error, match=said):
        train_bpe(text, 300)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "not a regular expression"),
        ("b*", "matches the empty string"),
        (r"\w+", "skips '! ab'"),
        (r"\w+|!", "skips ' ab'"),
        (r"[ab]+! ", "skips 'ab'"),
        (r"(?=a)|[\s\S]", "skips 'ab! ab'"),  # an empty match before an a
    ],
)
def test_bad_pattern_is_rejected(pattern, said):
    with pytest.raises(Error, match=re.escape(said)):
        train_bpe("ab! ab", 257, pattern)


def test_encode_rejects_text_that_the_pattern_skips():
    tokenizer = BPETokenizer(train_bpe("abab abab", 259, r"\w+|\s+"), r"\w+|\s+")
    assert tokenizer.decode(tokenizer.encode("ab abab")) == "ab abab"
    with pytest.raises(Error, match="skips a part of the text"):
        tokenizer.encode("ab! abab")


# The command line's bpe:VOCAB


def test_parse_bpe():
    assert parse_bpe("bpe:2048") == 2048
    assert parse_bpe(BPETokenizer([(64, 65)]).name) == 258


@pytest.mark.parametrize(
    "spec",
    ["bpe:abc", "bpe:", "bpe", "bpe:-5", "bpe: 300", "bpe:2_048", "bpe:300\n", "bpe:٣٠٠", "BPE:300", ""],
)
def test_parse_bpe_rejects_other_specs(spec):
    with pytest.raises(Error, match=re.escape(f"{spec!r} is not of the form bpe:VOCAB")):
        parse_bpe(spec)


def test_load_error_explains_how_bpe_is_trained():
    with pytest.raises(Error, match=r"no tokenizer 'bpe:2048'.*'bpe:VOCAB' are trained on a text"):
        load_tokenizer("bpe:2048")

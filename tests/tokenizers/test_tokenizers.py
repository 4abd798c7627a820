"""The tokenizers: published token ids, round trips, Hugging Face's own implementation, bad input."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.data.corpus import load_text
from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers import tiktoken as tokenizer_module
from tinyllm.tokenizers.base import FILE_NAME
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.tokenizers.tiktoken import TiktokenTokenizer

GPT2 = load_tokenizer("gpt2")
END = "<|endoftext|>"


# GPT-2


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Every effort moves you", [6109, 3626, 6100, 345]),
        ("Hello, I am", [15496, 11, 314, 716]),
        ("", []),
        (" ", [220]),
        ("\n\n", [628]),
        ("\n\na", [198, 198, 64]),  # the last newline before a word stays apart
        ("!", [0]),
    ],
)
def test_gpt2_published_ids(text, ids):
    assert GPT2.encode(text) == ids
    assert GPT2.decode(ids) == text


def test_gpt2_size_and_name():
    assert GPT2.vocab_size == 50257
    assert GPT2.name == "gpt2"
    assert repr(GPT2) == "<TiktokenTokenizer gpt2: 50,257 ids>"


@given(st.text())
def test_gpt2_round_trip(text):
    ids = GPT2.encode(text, special="text")
    assert GPT2.decode(ids) == text
    assert GPT2.decode_bytes(np.array(ids, dtype=np.int32)) == text.encode("utf-8")


def test_gpt2_every_id_decodes_to_bytes_of_its_own():
    pieces = {GPT2.decode_bytes([i]) for i in range(GPT2.vocab_size)}
    assert len(pieces) == GPT2.vocab_size
    assert {bytes([byte]) for byte in range(256)} <= pieces


@pytest.fixture(scope="module")
def gpt2_files():
    folder = Path(os.environ.get("TINYLLM_DATA", "")) / "gpt2"
    if not os.environ.get("TINYLLM_DATA") or not (folder / "encoder.json").exists():
        pytest.skip("TINYLLM_DATA names no folder with gpt2/encoder.json")
    return folder / "encoder.json", folder / "vocab.bpe"


@pytest.fixture(scope="module")
def hugging_face(gpt2_files):
    tokenizers = pytest.importorskip("tokenizers")
    encoder, merges = gpt2_files
    reference = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(encoder), str(merges)))
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = tokenizers.decoders.ByteLevel()
    return reference


@given(text=st.text() | st.text("ab '.\n\t 0\u00a0é字👍s", max_size=60))
def test_gpt2_same_ids_as_hugging_face(hugging_face, text):
    assert GPT2.encode(text, special="text") == hugging_face.encode(text).ids


def test_gpt2_same_ids_as_hugging_face_on_python_docs(hugging_face):
    text = load_text("python-docs").text[:100_000]
    assert GPT2.encode(text) == hugging_face.encode(text).ids


def test_gpt2_same_vocabulary_as_openai_encoder_json(gpt2_files, hugging_face):
    encoder = json.loads(gpt2_files[0].read_text(encoding="utf-8"))
    assert len(encoder) == GPT2.vocab_size
    assert encoder[END] == 50256
    for piece, i in encoder.items():
        if piece != END:
            assert hugging_face.decoder.decode([piece]) == GPT2.decode([i])


def test_gpt2_special_token_is_refused_unless_told_otherwise():
    text = f"Hello{END}"
    with pytest.raises(Error, match=r"<\|endoftext\|>.*'allow'.*'text'"):
        GPT2.encode(text)
    assert GPT2.encode(text, special="allow") == [15496, 50256]
    as_text = GPT2.encode(text, special="text")
    assert 50256 not in as_text
    assert GPT2.decode(as_text) == GPT2.decode([15496, 50256]) == text


def test_gpt2_token_may_be_half_a_character():
    ids = GPT2.encode("👍")
    assert len(ids) > 1
    assert GPT2.decode(ids) == "👍"
    assert GPT2.decode(ids[:1]) == "\ufffd"
    assert b"".join(GPT2.decode_bytes([i]) for i in ids).decode() == "👍"


def test_gpt2_long_runs():
    for text in ("^" * 200_000, " " * 200_000, "a" * 50_000, " " * 100_000 + "a"):
        assert GPT2.decode(GPT2.encode(text)) == text


def test_text_that_tiktoken_gives_up_on_is_an_error():
    with pytest.raises(Error, match="whitespace"):
        GPT2.encode(" " * 3_000_000 + "a")


def test_gpt2_damaged_vocabulary_is_refused(tmp_path, monkeypatch):
    data = tokenizer_module.GPT2_VOCABULARY.read_bytes()
    (tmp_path / "vocab.bpe").write_bytes(data.replace(b"\n", b"\r\n"))
    monkeypatch.setattr(tokenizer_module, "GPT2_VOCABULARY", tmp_path / "vocab.bpe")
    with pytest.raises(Error, match="damaged"):
        load_tokenizer("gpt2")


def test_any_tiktoken_encoding_can_be_wrapped_but_only_gpt2_saved(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    encoding = tiktoken.Encoding(
        "mine", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<x>": 300}
    )
    mine = TiktokenTokenizer("mine", encoding)
    assert mine.vocab_size == 301
    assert mine.encode("abc") == [256, ord("c")]
    with pytest.raises(Error, match="280"):
        mine.decode([256, 280])
    with pytest.raises(Error, match="'mine' cannot be saved"):
        mine.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Characters


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


def test_char_unseen_character():
    with pytest.raises(Error, match=r"'é' \(U\+00E9, at 3\).*5: .*make the tokenizer from a text"):
        CharTokenizer.from_text("a cafe").encode("cafés"[:4])


@pytest.mark.parametrize(("characters", "said"), [("", "at least one"), ("abca", "'a' comes twice")])
def test_char_bad_characters(characters, said):
    with pytest.raises(Error, match=said):
        CharTokenizer(characters)


# Both


@pytest.fixture(params=["gpt2", "char"])
def tokenizer(request):
    return GPT2 if request.param == "gpt2" else CharTokenizer.from_text("Hello, I am\n")


def test_decode_of_nothing_is_empty(tokenizer):
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(np.array([], dtype=np.int64)) == ""


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_decode_takes_lists_and_arrays(tokenizer, kind):
    assert tokenizer.decode(kind(tokenizer.encode("Hello"))) == "Hello"


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer):
    last = tokenizer.vocab_size - 1
    for wrong in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(Error, match=rf"ids\[1\] is {wrong}\b.* 0 to {last}\b"):
            tokenizer.decode([0, wrong])
        with pytest.raises(Error, match=rf"ids\[1\] is {wrong}\b.* 0 to {last}\b"):
            tokenizer.decode_bytes(np.array([0, wrong]))
    assert isinstance(tokenizer.decode([0, last]), str)


@pytest.mark.parametrize("ids", [[0.0], [True], ["a"], [None], 3, np.zeros((1, 2), int), [[1], [2, 3]]])
def test_decode_refuses_what_is_no_sequence_of_integers(tokenizer, ids):
    with pytest.raises(Error, match="ids"):
        tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "special", "said"),
    [
        ("Hello", "ignore", "'ignore': choose 'refuse', 'allow' or 'text'"),
        (b"Hello", "refuse", "bytes"),
        (None, "refuse", "NoneType"),
        ("He\ud800llo", "refuse", "surrogate.* at 2"),
    ],
)
def test_encode_refuses_bad_arguments(tokenizer, text, special, said):
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


@given(text=st.text(min_size=1))
def test_char_json_holds_any_characters(text):
    tokenizer = CharTokenizer.from_text(text)
    assert json.loads(json.dumps(tokenizer.to_json()))["characters"] == tokenizer.characters


# load_tokenizer


def test_load_unknown_lists_what_is_known(tmp_path):
    for spec in ("gpt3", tmp_path, tmp_path / FILE_NAME, ""):
        known = "'gpt2', a run's or a model's folder, or a tokenizer file"
        with pytest.raises(Error, match=rf"no tokenizer in .*{known}|holds no tokenizer \(tokenizer\.json"):
            load_tokenizer(spec)


@pytest.mark.parametrize("content", [b"{not json", b"\xff\xfe", b"", b"[" * 100_000, b'{"kind": NaN}'])
def test_load_file_that_is_not_json(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(Error, match=f"{FILE_NAME} is not JSON in UTF-8"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "definition",
    [{}, {"kind": "word"}, {"kind": []}, {"kind": "char"}, {"kind": "char", "characters": ["a"]}],
)
def test_load_json_that_is_no_tokenizer_of_ours(tmp_path, definition):
    (tmp_path / FILE_NAME).write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(Error, match="'gpt2' or 'char'"):
        load_tokenizer(tmp_path)


def test_load_merges_that_would_fill_the_memory(tmp_path):
    """Each doubles the token of the one before: fifty of them would make one of 2**50 bytes."""
    merges = [[0, 0], *([i, i] for i in range(256, 305))]
    definition = {"kind": "bpe", "pattern": r"\w+", "merges": merges}
    (tmp_path / FILE_NAME).write_text(json.dumps(definition), encoding="utf-8")
    with pytest.raises(Error, match=rf"{FILE_NAME}.*merges\[22\] makes more than 8,388,608 bytes"):
        load_tokenizer(tmp_path)


def test_load_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CharTokenizer("ab").save("gpt2")
    assert load_tokenizer("gpt2").vocab_size == 50257
    assert load_tokenizer("./gpt2").vocab_size == 2
    assert load_tokenizer(Path("gpt2")).vocab_size == 2

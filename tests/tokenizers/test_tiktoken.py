"""The tokenizers of GPT-2 and Llama 3: published ids, round trips, comparison with other libraries."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st
from support.tokenizers import (
    COUNT,
    check_same,
    message_of,
    nasty_strings,
    texts,
)

from tinyllm.data.corpus import load_text
from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers import tiktoken as tiktoken_module
from tinyllm.tokenizers.tiktoken import (
    LLAMA3_PATTERN,
    LLAMA3_SPECIAL_TOKENS,
    TiktokenTokenizer,
)

GPT2 = load_tokenizer("gpt2")
END = "<|endoftext|>"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Every effort moves you", [6109, 3626, 6100, 345]),
        ("Hello, I am", [15496, 11, 314, 716]),
        ("", []),
        (" ", [220]),
        ("\n\n", [628]),
        ("\n\na", [198, 198, 64]),  # the last newline before a word is not merged
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


def test_gpt2_tokens_are_distinct():
    pieces = {GPT2.decode_bytes([i]) for i in range(GPT2.vocab_size)}
    assert len(pieces) == GPT2.vocab_size
    assert {bytes([byte]) for byte in range(256)} <= pieces


@pytest.fixture(scope="module")
def gpt2_files():
    folder = Path(os.environ.get("TINYLLM_DATA", "")) / "gpt2"
    if not os.environ.get("TINYLLM_DATA") or not (folder / "encoder.json").exists():
        pytest.skip("the folder TINYLLM_DATA has no gpt2/encoder.json")
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
def test_gpt2_ids_equal_those_of_hugging_face(hugging_face, text):
    assert GPT2.encode(text, special="text") == hugging_face.encode(text).ids


def test_gpt2_ids_equal_those_of_hugging_face_on_python_docs(hugging_face):
    text = load_text("python-docs").text[:100_000]
    assert GPT2.encode(text) == hugging_face.encode(text).ids


def test_gpt2_vocabulary_equals_openai_encoder_json(gpt2_files, hugging_face):
    encoder = json.loads(gpt2_files[0].read_text(encoding="utf-8"))
    assert len(encoder) == GPT2.vocab_size
    assert encoder[END] == 50256
    for piece, i in encoder.items():
        if piece != END:
            assert hugging_face.decoder.decode([piece]) == GPT2.decode([i])


def test_gpt2_special_token_in_text_is_refused_by_default():
    text = f"Hello{END}"
    with pytest.raises(Error, match=r"<\|endoftext\|>.*'allow'.*'text'"):
        GPT2.encode(text)
    assert GPT2.encode(text, special="allow") == [15496, 50256]
    as_text = GPT2.encode(text, special="text")
    assert 50256 not in as_text
    assert GPT2.decode(as_text) == GPT2.decode([15496, 50256]) == text


def test_gpt2_token_may_end_inside_a_character():
    ids = GPT2.encode("👍")
    assert len(ids) > 1
    assert GPT2.decode(ids) == "👍"
    assert GPT2.decode(ids[:1]) == "\ufffd"
    assert b"".join(GPT2.decode_bytes([i]) for i in ids).decode() == "👍"


def test_gpt2_long_runs():
    for text in ("^" * 200_000, " " * 200_000, "a" * 50_000, " " * 100_000 + "a"):
        assert GPT2.decode(GPT2.encode(text)) == text


def test_text_beyond_tiktokens_limits_is_an_error():
    with pytest.raises(Error, match="whitespace"):
        GPT2.encode(" " * 3_000_000 + "a")


def test_gpt2_damaged_vocabulary_is_rejected(tmp_path, monkeypatch):
    data = tiktoken_module.GPT2_VOCABULARY.read_bytes()
    (tmp_path / "vocab.bpe").write_bytes(data.replace(b"\n", b"\r\n"))
    monkeypatch.setattr(tiktoken_module, "GPT2_VOCABULARY", tmp_path / "vocab.bpe")
    with pytest.raises(Error, match="damaged"):
        load_tokenizer("gpt2")


def test_any_tiktoken_encoding_can_be_wrapped_but_only_gpt2_saved(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    encoding = tiktoken.Encoding(
        "mine", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<x>": 300, "<y>": 299}
    )
    mine = TiktokenTokenizer("mine", encoding)
    assert mine.vocab_size == 301 and list(mine.special_tokens) == ["<y>", "<x>"]  # by id
    assert mine.encode("abc") == [256, ord("c")]
    with pytest.raises(Error, match="280"):
        mine.decode([256, 280])
    with pytest.raises(Error, match="'mine' is not one of tinyllm's own"):
        mine.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_llama3_equals_transformers(llama3, llama3_reference):
    ours = load_tokenizer(llama3)
    for text in nasty_strings(COUNT):
        check_same(ours, llama3_reference, text)


@given(texts)
@example("1234567")
@example("I'LL")
@example("ſ")
@example("'ſ")
@example(" \r\n\n x")
def test_llama3_equals_transformers_property(llama3_pair, text):
    check_same(*llama3_pair, text)


def test_llama3_special_tokens(llama3):
    ours = load_tokenizer(llama3)
    assert len(ours.special_tokens) == 256
    assert ours.vocab_size == 50256 + 256
    offset = 128000 - 50256  # Llama 3 has 128,000 ordinary tokens
    assert ours.special_tokens["<|begin_of_text|>"] + offset == 128000 == ours.bos_id + offset
    assert ours.special_tokens["<|start_header_id|>"] + offset == 128006
    assert ours.special_tokens["<|reserved_special_token_247|>"] + offset == 128255
    assert [i + offset for i in ours.eos_ids] == [128001, 128008, 128009]
    assert LLAMA3_SPECIAL_TOKENS[9] == "<|eot_id|>"


def test_damaged_ranks_are_rejected(llama3, tmp_path):
    lines = (llama3 / "tokenizer.model").read_bytes().splitlines(keepends=True)
    again, next_rank = lines[3].split()[0], b" %d\n" % len(lines)
    last = lines[3], b"IQ== x\n", again + next_rank, b"!bm8gc3VjaCB0b2tlbg==" + next_rank
    for damaged in (lines[:5], [lines[0], *lines[2:]], *([*lines, line] for line in last)):
        (tmp_path / "tokenizer.model").write_bytes(b"".join(damaged))
        assert "copy it again" in message_of(load_tokenizer, tmp_path)


def test_llama3_pattern_equals_the_published_one():
    pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    assert TikTokenConverter().pattern == LLAMA3_PATTERN

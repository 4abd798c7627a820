"""Tokenizers in GGUF files: comparison with the original files and libraries."""

import time

import pytest
from hypothesis import example, given
from support.tokenizers import (
    COUNT,
    check_same,
    gguf_of_byte_level,
    message_of,
    nasty_strings,
    texts,
    write_gguf,
)

from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.tiktoken import (
    BYTE_OF,
    LLAMA3_PATTERN,
    SYMBOLS,
)

gguf = pytest.importorskip("gguf")
sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")


def test_gguf_gpt2_equals_tokenizer_json(byte_level, tmp_path):
    ours = load_tokenizer(gguf_of_byte_level(byte_level, tmp_path / "a.gguf"))
    reference = load_tokenizer(byte_level)
    assert ours.special_tokens == reference.special_tokens
    assert ours.vocab_size == reference.vocab_size
    assert (ours.bos_id, ours.eos_ids, ours.chat_template) == (0, (1,), "{{ messages }}")
    for text in nasty_strings(COUNT, seed=3):
        for special in ("allow", "text"):
            assert ours.encode(text, special) == reference.encode(text, special)


def test_gguf_equals_transformers(byte_level, tmp_path, monkeypatch):
    """Transformers also reads the vocabulary and Llama 3's pre-tokenizer from a GGUF file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for pre in ("gpt-2", "llama-bpe"):
        # Transformers does not set ignore_merges, so every token of this vocabulary is reached by merges.
        gguf_of_byte_level(byte_level, tmp_path / f"{pre}.gguf", pre=pre)
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=f"{pre}.gguf")
        ours = load_tokenizer(tmp_path / f"{pre}.gguf")
        for text in nasty_strings(COUNT, seed=4):
            assert ours.encode(text, "allow") == reference.encode(text, add_special_tokens=False)


def test_gguf_smollm_splits_digits(byte_level, tmp_path):
    """As in SmolLM2's tokenizer.json: digits are split first, then GPT-2's pieces."""
    ours = load_tokenizer(gguf_of_byte_level(byte_level, tmp_path / "a.gguf", pre="smollm"))
    reference = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    split = tokenizers.pre_tokenizers
    reference.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    for text in nasty_strings(COUNT, seed=6):
        check_same(ours, reference, text)
    keys = {"model": "gpt2", "tokens": ["1", "2", "12"], "merges": ["1 2"]}
    assert load_tokenizer(write_gguf(tmp_path / "b.gguf", **keys, pre="gpt-2")).encode("12") == [2]
    assert load_tokenizer(write_gguf(tmp_path / "b.gguf", **keys, pre="smollm")).encode("12") == [0, 1]


def test_gguf_with_llama3_pieces_and_all_merges(byte_level, tmp_path):
    """As in llama.cpp, whose rule smaug-bpe splits a text as Llama 3's does, but does not add BOS."""
    reference = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    split = tokenizers.pre_tokenizers
    pieces = split.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
    whole = split.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = split.Sequence([pieces, whole])
    for pre, add_bos in (("smaug-bpe", False), ("falcon3", True)):
        ours = load_tokenizer(gguf_of_byte_level(byte_level, tmp_path / "a.gguf", pre=pre))
        assert ours.add_bos is add_bos
        for text in nasty_strings(COUNT, seed=7):
            check_same(ours, reference, text)
    keys = {"model": "gpt2", "tokens": ["a", "b", "c", "abc", "bc"], "merges": ["b c"]}
    assert load_tokenizer(write_gguf(tmp_path / "b.gguf", **keys, pre="smaug-bpe")).encode("abc") == [0, 4]


@pytest.mark.parametrize("keys", [{}, {"pre": "default"}])
def test_gguf_that_names_no_pre_tokenizer_is_refused_with_a_remedy(tmp_path, keys):
    path = write_gguf(tmp_path / "a.gguf", model="gpt2", tokens=["a", "b"], merges=["a b"], **keys)
    said = message_of(load_tokenizer, path)
    assert "a.gguf does not say" in said and "Hugging Face folder" in said and "None" not in said


def test_gguf_llama3_does_not_merge_a_piece_that_is_a_token(tmp_path):
    """As in Llama 3, whose tokens need not be reachable by merges."""
    ranks = {"a": 0, "b": 1, "c": 2, "abc": 3}
    path = tmp_path / "whole.gguf"
    merges = ["b c"]
    keys = {"tokens": [*ranks, "bc"], "token_type": [1] * 5, "merges": merges, "model": "gpt2"}
    write_gguf(path, **keys, pre="llama-bpe")
    assert load_tokenizer(path).encode("abc") == [3]
    write_gguf(path, **keys, pre="gpt-2")
    assert load_tokenizer(path).encode("abc") == [0, 4]


def test_unknown_and_control_tokens_of_a_byte_level_vocabulary_are_special(tmp_path):
    keys = {"tokens": [*SYMBOLS, "ab", "<unk>", "<s>", "<u>"], "token_type": [1] * 257 + [2, 3, 4]}
    path = write_gguf(tmp_path / "m.gguf", model="gpt2", pre="gpt-2", merges=["a b"], **keys)
    ours = load_tokenizer(path)
    assert ours.special_tokens == {"<unk>": 257, "<s>": 258}
    assert ours.encode("<u>") == ours.encode("<u>", "text") == [259]


def small_sentencepiece(path, **changes):
    keys = {"tokens": ["?", "a", "b", "c", "ab", "bc"], "scores": [0.0, 0.0, 0.0, 0.0, -1.5, -1.2]}
    keys |= {"token_type": [2, 1, 1, 1, 1, 1], "model": "llama", "add_space_prefix": False}
    return load_tokenizer(write_gguf(path, **keys | changes))


def test_a_small_sentencepiece_vocabulary(tmp_path):
    """Without bytes, with an unknown token of any name and scores that are not whole numbers."""
    ours = small_sentencepiece(tmp_path / "m.gguf")
    assert ours.encode("abc") == [1, 5] and ours.encode("ab") == [4]
    assert ours.encode("aéb") == [1, 0, 2] and ours.special_tokens == {"?": 0}
    assert (ours.bos_id, ours.eos_ids) == (None, ())  # by default 1 and 2, if they are control tokens
    spaces = small_sentencepiece(tmp_path / "m.gguf", tokens=["?", "a", "▁", "c", "ab", "▁a"])
    assert spaces.encode(" a  a ") == [5, 2, 5, 2]
    squeezed = {"tokens": ["?", "a", "▁", "c", "ab", "▁a"], "remove_extra_whitespaces": True}
    assert small_sentencepiece(tmp_path / "m.gguf", **squeezed).encode(" a  a ") == [1, 5]


def test_time_of_control_tokens_is_linear(tmp_path):
    """The library rebuilds its index of added tokens in each call: one per token took 30 seconds here."""
    names, symbols = [f"<|{i}|>" for i in range(6000)], [*BYTE_OF, "ab"]
    types = [1] * len(symbols) + [3] * 5000 + [4] * 1000
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": symbols + names,
        "merges": ["a b"],
        "token_type": types,
    }
    path = write_gguf(tmp_path / "many.gguf", **keys)
    started = time.process_time()
    ours = load_tokenizer(path)
    assert time.process_time() - started < 3  # 0.1
    assert ours.special_tokens == {name: len(symbols) + i for i, name in enumerate(names[:5000])}
    assert ours.encode("<|4999|><|5000|>", "allow") == [257 + 4999, 257 + 5000]


def test_gguf_sentencepiece_equals_its_model(llama2, tmp_path):
    reference = load_tokenizer(llama2)
    processor = reference.processor
    n = len(processor)
    kinds = [(processor.is_unknown, 2), (processor.is_control, 3), (processor.is_byte, 6)]
    path = write_gguf(
        tmp_path / "llama2.gguf",
        model="llama",
        tokens=[processor.id_to_piece(i) for i in range(n)],
        scores=[float(processor.get_score(i)) for i in range(n)],
        token_type=[next((number for is_kind, number in kinds if is_kind(i)), 1) for i in range(n)],
        bos_token_id=1,
        eos_token_id=2,
    )
    ours = load_tokenizer(path)
    assert ours.special_tokens == reference.special_tokens
    assert (ours.bos_id, ours.eos_ids, ours.chat_template) == (1, (2,), None)
    for text in nasty_strings(COUNT, seed=5):
        ids = reference.encode(text, "allow")
        assert ours.encode(text, "allow") == ids
        assert ours.decode(ids) == reference.decode(ids)


def check_smollm2(ours, reference, text):
    reference.encode_special_tokens = True
    ids = reference.encode(text, add_special_tokens=False).ids
    if reference.decode(ids, skip_special_tokens=False) == text:
        check_same(ours, reference, text)
        assert ours.decode(ids) == text
    else:  # the library silently dropped a character
        assert "has no token for character" in message_of(ours.encode, text, "text")


def test_smollm2_equals_transformers(smollm2):
    for text in nasty_strings(COUNT):
        check_smollm2(*smollm2, text)


@given(texts)
@example("\x04")
@example("\U00050000")
@example("10 000")
def test_smollm2_equals_transformers_property(smollm2, text):
    check_smollm2(*smollm2, text)


def test_smollm2_vocabulary(smollm2):
    ours, _ = smollm2
    assert ours.vocab_size == 49152
    assert (ours.bos_id, ours.eos_ids) == (1, (2, 0))  # as in llama.cpp
    assert ours.special_tokens["<|im_start|>"] == 1
    assert len(ours.special_tokens) == 17
    assert ours.chat_template.startswith("{% for message in messages %}")
    assert ours.encode("12") == [ours.encode("1")[0], ours.encode("2")[0]]


def test_smollm2_encodes_every_character_or_raises(smollm2):
    """Of the 21 bytes without a token, 8 occur in UTF-8: 6 control characters, and two first bytes."""
    ours, _ = smollm2
    rejected = []
    for character in [*map(chr, range(0xD800)), *(chr(n) for n in range(0x10000, 0x110000, 4096))]:
        try:
            assert ours.decode(ours.encode(character)) == character
        except Error:
            rejected.append(character)
    assert [c for c in rejected if c < "\U00010000"] == list("\x04\x06\x13\x14\x16\x1d")
    assert {c.encode()[0] for c in rejected if c >= "\U00010000"} == {0xF1, 0xF2}
    assert {byte for symbol, byte in BYTE_OF.items() if ours.tokenizer.token_to_id(symbol) is None} >= {
        0xF1,
        0x04,
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", [1, 2]),
        ("pre", [1, 2]),
        ("chat_template", 7),
        ("add_space_prefix", [1, 2]),
        ("remove_extra_whitespaces", 1),
        ("bos_token_id", True),
        ("token_type", [True] * 258),
        ("token_type", [2.0, *[6.0] * 256, 1.0]),
        ("scores", [False] * 258),
        ("scores", [0] * 258),
    ],
)
def test_gguf_keys_of_wrong_type_are_rejected(tmp_path, key, value):
    tokens = SYMBOLS if key == "pre" else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    keys = {
        "model": "gpt2" if key == "pre" else "llama",
        "tokens": tokens,
        "scores": [0.0] * len(tokens),
        "token_type": [1] * 256 if key == "pre" else [2, *[6] * 256, 1],
    }
    said = message_of(load_tokenizer, write_gguf(tmp_path / "m.gguf", **keys | {key: value}))
    assert "m.gguf" in said and key in said


def test_rows_of_a_gguf_model_without_a_token_are_unused_ids(tmp_path):
    keys = {"tokens": [*SYMBOLS, "ab", "[PAD257]"], "token_type": [1] * 257 + [5], "merges": ["a b"]}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", model="gpt2", pre="gpt-2", **keys))
    assert list(tokenizer.unused_ids(258)) == [257]


def test_damaged_gguf_vocabularies_are_rejected(byte_level, tmp_path):
    path = tmp_path / "a.gguf"

    def error_of(**keys):
        return message_of(load_tokenizer, gguf_of_byte_level(byte_level, path, **keys))

    assert "'qwen5'" in error_of(pre="qwen5")
    assert "'bert'" in error_of(model="bert")
    assert "token_type" in error_of(token_type=[1, 1])
    for kind in (-1, 0, 7):
        assert "unknown type" in error_of(tokens=["a", "b"], token_type=[1, kind])
    assert "token_type" in error_of(tokens=["a", "b"], token_type=[1, 1, 1])
    assert "merges" in error_of(merges="a b")
    assert "copy it again" in error_of(merges=["a", "b"])
    assert "copy it again" in error_of(merges=["a notthere"])
    assert "eos_token_id" in error_of(eos_token_id=99999)
    assert "scores" in error_of(model="llama")
    two = {"model": "llama", "tokens": ["a", "b"], "scores": [0.0, 1.0]}
    assert "unknown" in error_of(**two, token_type=[1, 1])
    assert "scores" in error_of(**(two | {"scores": ["0", "1"]}), token_type=[2, 1])
    assert "only 1 of them differ" in error_of(tokens=["a", "a"], token_type=[1, 1])
    data = path.read_bytes()
    path.write_bytes(data[:1000])
    assert "copy it again" in message_of(load_tokenizer, path)

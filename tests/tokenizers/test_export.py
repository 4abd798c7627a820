"""Tokenizers for other programs: the same ids from transformers, and from the keys of a GGUF file."""

import json
from pydoc_data import topics

import pytest
from support.tokenizers import (
    COUNT,
    a_tokenizer,
    message_of,
    nasty_strings,
    special,
    write_gguf,
    write_json,
    write_sentencepiece_like,
)

from tinyllm.tokenizers import BPETokenizer, CharTokenizer, load_tokenizer, train_bpe
from tinyllm.tokenizers.export import ends_of_text, library_tokenizer, save_for_transformers
from tinyllm.tokenizers.gguf_writer import tokenizer_keys
from tinyllm.tokenizers.tiktoken import GPT2_PATTERN, SYMBOLS, merges_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("sentencepiece")

STRINGS = 2000
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def bpe():
    """One of our own, as a run of fine-tuning has it."""
    merges = train_bpe(list(topics.topics.values())[:40], 600)
    tokenizer = BPETokenizer(merges).with_special_tokens(["<|user|>", "<|assistant|>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


@pytest.fixture(params=["bpe", "gpt2", "byte_level", "llama2", "llama2_json", "llama3"])
def tokenizer(request):
    return get(request, request.param)


def get(request, name):
    found = request.getfixturevalue(name)
    return found if hasattr(found, "encode") else load_tokenizer(found)


def test_transformers_encodes_and_decodes_alike(tokenizer, tmp_path):
    save_for_transformers(tokenizer, tmp_path, context=64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(tokenizer.token_ids())
    strings = STRINGS if tokenizer.vocab_size < 2000 else COUNT
    for text in nasty_strings(strings, seed=11):
        ids = tokenizer.encode(text, "allow")
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        if not tokenizer.find_special(text):  # SentencePiece's library removes spaces after those, too
            assert theirs.decode(ids) == tokenizer.decode(ids), text
    assert theirs.encode("a b") == tokenizer.with_bos(tokenizer.encode("a b"))
    assert theirs.eos_token_id == (ends_of_text(tokenizer) or (None,))[0]
    assert theirs.chat_template == tokenizer.chat_template and theirs.model_max_length == 64


@pytest.mark.parametrize("name", ["bpe", "byte_level", "llama2"])
def test_tinyllm_loads_the_files_as_the_same_tokenizer(request, tmp_path, name):
    tokenizer = get(request, name)
    save_for_transformers(tokenizer, tmp_path, context=64)
    again = load_tokenizer(tmp_path)
    assert (again.vocab_size, again.special_tokens) == (tokenizer.vocab_size, tokenizer.special_tokens)
    assert (again.bos_id, again.add_bos) == (tokenizer.bos_id, tokenizer.add_bos)
    assert (again.eos_ids, again.chat_template) == (ends_of_text(tokenizer), tokenizer.chat_template)


@pytest.mark.parametrize("name", ["<|my:bos|>", "<begin of text>", "$A"])
def test_the_token_that_begins_a_text_may_have_any_name(tmp_path, name):
    write_json(tmp_path, a_tokenizer(added_tokens=[special(256, name)]))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": name, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    save_for_transformers(tokenizer, tmp_path, context=64)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    expected = [256, *tokenizer.encode("a b")]
    assert theirs.encode("a b") == expected == again.with_bos(again.encode("a b"))


def test_special_tokens_are_named_as_they_are_whatever_the_normalizer_makes_of_them(tmp_path):
    """In the first conversions of Llama they are normalized: the library calls them ▁<s> and ▁</s>."""
    file = write_sentencepiece_like(tmp_path, "legacy") / "tokenizer.json"
    definition = json.loads(file.read_text(encoding="utf-8"))
    for token in definition["added_tokens"]:
        token["normalized"] = True
    file.write_text(json.dumps(definition), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokenizer.id_to_token(tokenizer.bos_id) == "▁<s>"
    save_for_transformers(tokenizer, tmp_path, context=64)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>") and len(theirs) == tokenizer.vocab_size
    assert (again.bos_id, again.eos_ids) == (tokenizer.bos_id, tokenizer.eos_ids)
    assert theirs.encode("Hi you") == again.with_bos(again.encode("Hi you"))


def test_a_chat_template_renders_alike(bpe, tmp_path):
    save_for_transformers(bpe, tmp_path, context=64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "<|user|>hi<|endoftext|>"


def gguf_of(tokenizer, path, rows=None):
    keys = tokenizer_keys(tokenizer, rows or tokenizer.vocab_size)
    keys = {name.removeprefix("tokenizer.").removeprefix("ggml."): value for name, value in keys.items()}
    return write_gguf(path, **keys)


def test_a_gguf_file_holds_the_same_tokenizer(tokenizer, tmp_path):
    if not ends_of_text(tokenizer):
        tokenizer.eos_ids = (1,)
    again = load_tokenizer(gguf_of(tokenizer, tmp_path / "m.gguf"))
    assert (again.vocab_size, again.special_tokens) == (tokenizer.vocab_size, tokenizer.special_tokens)
    assert (again.add_bos, again.chat_template) == (tokenizer.add_bos, tokenizer.chat_template)
    assert again.eos_ids[0] == ends_of_text(tokenizer)[0] and set(again.eos_ids) >= set(
        ends_of_text(tokenizer)
    )
    for text in nasty_strings(COUNT, seed=12):
        ids = tokenizer.encode(text, "allow")
        assert again.encode(text, "allow") == ids, text
        if not tokenizer.find_special(text):
            assert again.decode(ids) == tokenizer.decode(ids), text


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe"])
def test_the_name_of_the_pre_tokenizer_comes_back(byte_level, tmp_path, pre):
    from support.tokenizers import gguf_of_byte_level

    tokenizer = load_tokenizer(gguf_of_byte_level(byte_level, tmp_path / "a.gguf", pre=pre))
    assert tokenizer_keys(tokenizer, tokenizer.vocab_size)["tokenizer.ggml.pre"] == pre


def test_types_of_tokens_and_rows_without_one(byte_level):
    tokenizer = load_tokenizer(byte_level)
    tokenizer.eos_ids = (1,)
    keys = tokenizer_keys(tokenizer, tokenizer.vocab_size + 3)
    tokens, types = (keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    last = tokenizer.vocab_size
    assert tokens[last - 1 :] == ["<think>", *(f"[PAD{last + i}]" for i in range(3))]
    assert types[:2] == [3, 3] and types[2] == 1 and types[last - 1 :] == [4, 5, 5, 5]
    assert len(tokens) == len(types) == last + 3


def test_ids_between_tokens_are_unused(tmp_path):
    added = [special(260, "<|endoftext|>")]
    definition = a_tokenizer(added_tokens=added, model={"vocab": VOCABULARY | {"<|endoftext|>": 260}})
    definition["model"]["merges"] = [["a", "b"]]
    keys = tokenizer_keys(load_tokenizer(write_json(tmp_path, definition)), 261)
    assert keys["tokenizer.ggml.tokens"][256:] == ["ab", "[PAD257]", "[PAD258]", "[PAD259]", "<|endoftext|>"]
    assert keys["tokenizer.ggml.token_type"][256:] == [1, 5, 5, 5, 3]


@pytest.mark.parametrize("rows", [799, 803])
def test_a_sentencepiece_vocabulary_has_the_rows_of_the_model(llama2, rows):
    keys = tokenizer_keys(load_tokenizer(llama2), rows)
    assert [len(keys[f"tokenizer.ggml.{name}"]) for name in ("tokens", "token_type", "scores")] == [rows] * 3
    assert keys["tokenizer.ggml.token_type"][800:] == [5, 5, 5][: rows - 800 if rows > 800 else 0]
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("llama", "default")


def without_prefix(llama2_json, folder):
    """Like Gemma's: no space in front of a text, and an added token of spaces."""
    definition = json.loads((llama2_json / "tokenizer.json").read_text(encoding="utf-8"))
    definition["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    definition["decoder"]["decoders"] = definition["decoder"]["decoders"][:3]
    definition["added_tokens"].append(special(800, "▁" * 40, special=False, normalized=True))
    definition["added_tokens"].append(special(801, "<▁>"))
    return load_tokenizer(write_json(folder, definition))


def test_a_bpe_over_characters_without_a_prefix_is_written_to_gguf(llama2_json, tmp_path):
    tokenizer = without_prefix(llama2_json, tmp_path)
    tokenizer.eos_ids = (2,)
    keys = tokenizer_keys(tokenizer, 802)
    assert keys["tokenizer.ggml.add_space_prefix"] is False and keys["tokenizer.ggml.unknown_token_id"] == 0
    assert keys["tokenizer.ggml.tokens"][800:] == [" " * 40, "<▁>"]
    types = keys["tokenizer.ggml.token_type"]
    assert (types[:3], types[800:], types.count(6)) == ([2, 3, 3], [4, 3], 256)
    again = load_tokenizer(gguf_of(tokenizer, tmp_path / "m.gguf"))
    for text in [*nasty_strings(COUNT, seed=13), "a" + " " * 43 + "b"]:
        assert again.encode(text, "allow") == tokenizer.encode(text, "allow"), text


@pytest.mark.parametrize("change", ["pieces", "no bytes"])
def test_what_a_bpe_over_characters_may_be(llama2_json, tmp_path, change):
    definition = json.loads((llama2_json / "tokenizer.json").read_text(encoding="utf-8"))
    if change == "pieces":
        definition["pre_tokenizer"] = {"type": "Whitespace"}
    else:
        definition["model"]["byte_fallback"] = False
    tokenizer = load_tokenizer(write_json(tmp_path, definition))
    tokenizer.eos_ids = (2,)
    if change == "pieces":
        assert "no place" in message_of(tokenizer_keys, tokenizer, 800)
        return
    keys = tokenizer_keys(tokenizer, 800)
    assert keys["tokenizer.ggml.token_type"].count(6) == 0 and keys["tokenizer.ggml.unknown_token_id"] == 0


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_without_bytes_is_exported(tmp_path, prefix):
    """Adjacent unknown characters are one unknown token; without a prefix there may be added pieces."""
    tokens = ["?", "<s>", "</s>", "a", "b", "c", "ab", "bc", "▁", "▁a", "▁▁"]
    keys = {"token_type": [2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1 if prefix else 4], "model": "llama"}
    keys |= {"tokens": tokens if prefix else [*tokens[:-1], "  "], "add_space_prefix": prefix}
    scores = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0, -1.0, 0.0, -3.0, -4.0]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", scores=scores, **keys))
    found = library_tokenizer(tokenizer)
    for text in ("abc", "a bc", "  abab", "aéèb", "éa  a   a", " ", "", "<s>ab</s>"):
        ids = tokenizer.encode(text, "allow")
        assert found.encode(text, add_special_tokens=False).ids == ids, text
        assert found.encode(text).ids == [1, *ids]
        if not tokenizer.find_special(text) and "é" not in text:
            assert found.decode(ids) == tokenizer.decode(ids), text


def test_the_end_of_a_text_and_what_begins_one(bpe, llama2):
    keys = tokenizer_keys(bpe, bpe.vocab_size)
    end = bpe.special_tokens["<|endoftext|>"]
    assert keys["tokenizer.ggml.eos_token_id"] == keys["tokenizer.ggml.bos_token_id"] == end
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == TEMPLATE
    keys = tokenizer_keys(load_tokenizer(llama2), 800)
    assert [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.add_space_prefix"] is True


def test_merges_of_ranks_are_those_that_were_learned():
    merges = train_bpe(list(topics.topics.values())[:10], 400)
    tokens = [bytes([byte]) for byte in load_tokenizer("gpt2").decode_bytes(range(256))]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    ranks = {token: i for i, token in enumerate(tokens)}
    assert merges_of(ranks) == [(tokens[left], tokens[right]) for left, right in merges]
    del ranks[tokens[256]]  # the longer tokens that contain it are made from other parts, or from none
    assert len(merges_of(ranks)) < len(merges) - 1


# ------------------------------------------------------------------------------------ refusals


def test_a_character_tokenizer_is_refused(tmp_path):
    for call in (
        lambda: library_tokenizer(CharTokenizer("abc")),
        lambda: tokenizer_keys(CharTokenizer("abc"), 3),
        lambda: save_for_transformers(CharTokenizer("abc"), tmp_path, 8),
    ):
        assert "char" in message_of(call) and "bpe:VOCAB" in message_of(call)
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_without_a_name_is_refused_by_name():
    tokenizer = BPETokenizer([(64, 65)], r"\w+|\W")
    assert repr(r"\w+|\W") in message_of(tokenizer_keys, tokenizer, 258)
    assert repr(GPT2_PATTERN) not in message_of(library_tokenizer, tokenizer)


VOCABULARY = {symbol: i for i, symbol in enumerate([*SYMBOLS, "ab"])}
SPLIT = {"type": "Split", "pattern": {"String": "-"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}}, "Split"),
        ({"normalizer": {"type": "Lowercase"}}, "has no name"),
        ({"model": {"ignore_merges": True}}, "has no name"),
        ({"added_tokens": [special(257, "<mask>", lstrip=True)]}, "'<mask>' with lstrip"),
        ({"added_tokens": []}, "no token that ends a text"),
        ({"model": {"merges": []}}, "has no merges"),
        ({"added_tokens": [special(257, "<mask>", rstrip=True)]}, "'<mask>' with rstrip"),
        ({"added_tokens": [special(257, "<mask>", single_word=True)]}, "'<mask>' with single_word"),
        ({"model": {"vocab": VOCABULARY | {" ": 258, "a ": 259}, "merges": [["a", " "]]}}, "its space"),
        ({"pre_tokenizer": None, "normalizer": {"type": "ByteLevel"}}, "has no name"),
    ],
)
def test_what_gguf_has_no_place_for_is_refused(tmp_path, changes, said):
    end = {"added_tokens": [special(257, "<|endoftext|>")]}
    model = {"vocab": VOCABULARY, "merges": [["a", "b"]]} | changes.pop("model", {})
    definition = a_tokenizer(**(end | changes), model=model)
    assert said in message_of(tokenizer_keys, load_tokenizer(write_json(tmp_path, definition)), 258)


def test_more_ends_than_keys_are_refused_unless_llamacpp_knows_their_names(tmp_path):
    names = ["<|endoftext|>", "<a>", "<b>", "<c>"]
    added = [special(257 + i, name) for i, name in enumerate(names)]
    definition = a_tokenizer(added_tokens=added, model={"vocab": VOCABULARY, "merges": [["a", "b"]]})
    tokenizer = load_tokenizer(write_json(tmp_path, definition))
    tokenizer.eos_ids = (257, 258, 259)
    tokenizer.closing_ids = (257,)
    keys = {name.rpartition(".")[2]: value for name, value in tokenizer_keys(tokenizer, 261).items()}
    assert [keys[f"{name}_token_id"] for name in ("eos", "eot", "eom", "bos")] == [257, 258, 259, 257]
    assert keys["add_eos_token"] is False  # our models are not trained to read one
    tokenizer.bos_id = 0
    assert tokenizer_keys(tokenizer, 261)["tokenizer.ggml.bos_token_id"] == 0
    tokenizer.eos_ids = (257, 258, 259, 260)
    assert "'<c>'" in message_of(tokenizer_keys, tokenizer, 261)
    definition["added_tokens"][3]["content"] = "<|im_end|>"
    tokenizer = load_tokenizer(write_json(tmp_path, definition))
    tokenizer.eos_ids = (257, 258, 259, 260)
    assert "tokenizer.ggml.tokens" in tokenizer_keys(tokenizer, 261)


def test_a_sentencepiece_model_of_another_kind_is_refused(corpus):
    import io

    import sentencepiece

    from tinyllm.tokenizers.sentencepiece import SentencePieceTokenizer

    plain = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    for options, said in (
        ({"model_type": "unigram", "normalization_rule_name": "identity"}, "not BPE"),
        ({"model_type": "bpe"}, "normalizes"),  # NFKC
        # Of "<x>b" the library encodes b, and other programs ▁b
        (plain | {"user_defined_symbols": ["<x>"]}, "<x>, after which it adds no space"),
    ):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus[:2000]), model_writer=model, vocab_size=300, num_threads=1,
            minloglevel=2, hard_vocab_limit=False, **options,
        )  # fmt: skip
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        tokenizer = SentencePieceTokenizer("x", processor)
        assert said in message_of(tokenizer_keys, tokenizer, 300)
        assert said in message_of(library_tokenizer, tokenizer)


def test_a_sentencepiece_model_with_spaces_and_added_tokens_is_refused(llama2):
    added = {800: {"content": "<|im_end|>", "special": True}}
    tokenizer = load_tokenizer(llama2).with_file_tokens(added)
    assert "<|im_end|>" in message_of(tokenizer_keys, tokenizer, 801)
    assert "<|im_end|>" in message_of(library_tokenizer, tokenizer)


def test_the_configs_name_what_the_tokenizer_has(tmp_path):
    added = [special(256 + i, name) for i, name in enumerate(("<s>", "</s>", "<end>", "<p>"))]
    tokenizer = load_tokenizer(write_json(tmp_path, a_tokenizer(added_tokens=added)))
    tokenizer.bos_id, tokenizer.eos_ids = 0, (258, 257)
    tokenizer.other_tokens = {"pad_token": "<p>", "eos_token": "<of the file>"}
    save_for_transformers(tokenizer, tmp_path, context=64)
    config, generation = (
        json.loads((tmp_path / f"{name}_config.json").read_text()) for name in ("tokenizer", "generation")
    )
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        "bos_token": "!",
        "eos_token": "<end>",
        "pad_token": "<p>",
    }
    assert generation == {"bos_token_id": 0, "eos_token_id": [258, 257]}
    tokenizer.bos_id, tokenizer.eos_ids = None, ()
    save_for_transformers(tokenizer, tmp_path, context=64)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {}


def test_an_export_leaves_the_tokenizer_and_adds_a_bos_only_where_it_does(byte_level, tmp_path):
    library = load_tokenizer(byte_level).tokenizer
    single = [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single}
    template["special_tokens"] = {"<|im_end|>": {"id": "<|im_end|>", "ids": [1], "tokens": ["<|im_end|>"]}}
    definition = json.loads(library.to_str()) | {"post_processor": template}
    tokenizer = load_tokenizer(write_json(tmp_path, definition))
    before, ids = tokenizer.tokenizer.to_str(), tokenizer.encode("a b")
    assert library_tokenizer(tokenizer).encode("a b").ids == [1, *ids]
    tokenizer.bos_id = 0
    assert library_tokenizer(tokenizer).encode("a b").ids == [0, *ids]
    tokenizer.add_bos = False
    assert library_tokenizer(tokenizer).encode("a b").ids == ids
    assert tokenizer.tokenizer.to_str() == before


def test_files_are_json_with_a_line_end(bpe, tmp_path):
    save_for_transformers(bpe, tmp_path, context=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for path in tmp_path.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert json.loads(text) and text.endswith("}\n")

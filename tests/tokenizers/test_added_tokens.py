"""Tokens that a model's files add to its vocabulary: ids, spaces and decoding equal those of transformers."""

import json

import pytest
from support.tokenizers import message_of

from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.configs import read_added_tokens
from tinyllm.tokenizers.tiktoken import SYMBOLS

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CHATML = "<|im_start|>user\nWhat is a  cat?<|im_end|>\n<|im_start|>assistant\n"
# No space at the beginning: for transformers' class of Llama 2, unlike sentencepiece, that is the added one.
TEXTS = [
    CHATML,
    "cat",
    "cat <|im_end|> cat",
    "<|im_start|><|im_end|>",
    "a <|im_end|>\n b",
    "",
    "é 漢字<|im_end|> 1",
]


def added(*ids, **flags):
    """The ``added_tokens_decoder`` of a tokenizer_config.json."""
    standard = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = ("<|im_start|>", "<|im_end|>")
    return {str(i): {"content": name} | standard | flags for i, name in zip(ids, names)}


def write(folder, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        suffix = ".txt" if name == "merges" else ".json"
        (folder / f"{name}{suffix}").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def llama(llama2, tmp_path):
    """Write a folder with Llama 2's tokenizer.model, 800 pieces, and these files."""

    def make(**files):
        (tmp_path / "tokenizer.model").write_bytes((llama2 / "tokenizer.model").read_bytes())
        config = {"tokenizer_class": "LlamaTokenizer"} | files.pop("config", {})
        return write(tmp_path, config={"model_type": "llama"}, tokenizer_config=config, **files)

    return make


def check_equals_transformers(folder, decodes=True):
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, "allow") == ids, text
        if decodes:
            assert ours.decode(ids) == theirs.decode(ids), text
    return ours


JSON = {"<|im_start|>": 800, "<|im_end|>": 801}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": JSON},
        {"added_tokens": JSON, "special_tokens_map": {"additional_special_tokens": ["<|im_end|>"]}},
        {"config": {"added_tokens_decoder": added(800, 801)}},
        {"config": {"added_tokens_decoder": added(800, 801, special=False)}},
        {"config": {"added_tokens_decoder": added(800, 801, rstrip=True)}},
        {"config": {"added_tokens_decoder": added(800, 801, lstrip=True)}},
    ],
    ids=["json", "json and map", "decoder", "not special", "rstrip", "lstrip"],
)
def test_sentencepiece_with_added_tokens_equals_transformers(llama, files):
    ours = check_equals_transformers(llama(**files))
    ids = ours.encode(CHATML, "allow")
    assert (ids[0], ids.count(800), ids.count(801), ours.vocab_size) == (800, 2, 1, 802)
    assert ours.decode_bytes([800, 801]) == b"<|im_start|><|im_end|>"


def test_special_and_ordinary_added_tokens_in_ordinary_text(llama):
    ordinary = load_tokenizer(llama(added_tokens=JSON))
    assert ordinary.encode("<|im_end|>") == ordinary.encode("<|im_end|>", "text") == [801]
    special = load_tokenizer(llama(added_tokens=JSON, config={"eos_token": "<|im_end|>"}))
    assert special.eos_ids == (801,)
    assert 801 not in special.encode("<|im_end|>", "text")
    assert "<|im_end|>" in message_of(special.encode, "<|im_end|>")
    assert special.encode("<|im_start|>") == [800]


def test_a_piece_of_the_model_may_be_an_added_token(llama):
    """No space is added after it, as after other added tokens."""
    processor = load_tokenizer(llama()).processor
    i = processor.piece_to_id("at")
    files = {
        "config": {"added_tokens_decoder": {str(i): added(i)[str(i)] | {"content": "at", "special": False}}}
    }
    ours = check_equals_transformers(llama(**files))
    assert ours.encode("cat a").count(i) == 1 and ours.decode(ours.encode("cat a")) == "cat a"


def test_of_added_tokens_that_overlap_the_first_is_encoded(llama):
    names = {800: ("<a>", True), 801: ("a>b", False)}
    tokens = {
        str(i): added(i)[str(i)] | {"content": name, "special": flag} for i, (name, flag) in names.items()
    }
    ours = load_tokenizer(llama(config={"added_tokens_decoder": tokens}))
    ids = ours.encode("<a>b", "allow")
    assert ids[0] == 800 and 801 not in ids and ours.decode(ids) == "<a>b"
    assert 801 in ours.encode("<a>b", "text")


def test_the_order_of_added_tokens_does_not_matter_and_they_are_added_to_a_copy(llama):
    base = load_tokenizer(llama())
    tokens = {i: {"content": f"<{i}>", "special": True} for i in (803, 801)}
    assert base.with_file_tokens(tokens).vocab_size == 804
    assert base.vocab_size <= 801 and not {"<801>", "<803>"} & base.special_tokens.keys()
    assert base.file_tokens() == {}


def test_ids_without_a_token_are_refused(llama):
    tokenizer = load_tokenizer(llama(added_tokens={"<|im_start|>": 803}))
    assert tokenizer.vocab_size == 804
    assert tokenizer.encode("<|im_start|>") == [803]
    for decode in (tokenizer.decode, tokenizer.decode_bytes):
        assert "no token with id 801" in message_of(decode, [801])


@pytest.mark.parametrize(
    "files, said",
    [
        ({"added_tokens": {"<x>": 5}}, "the id 5"),
        ({"added_tokens": {"<x>": "a"}}, "'a'"),
        ({"added_tokens": {"<x>": -1}}, "-1"),
        ({"added_tokens": {"": 900}}, "900"),
        ({"added_tokens": {"<x>": 900, "<y>": 900}}, "same name or id"),
        ({"added_tokens": {"\ud800": 900}}, "surrogate"),
        (
            {"config": {"added_tokens_decoder": {"900": {"content": "a"}, "901": {"content": "a"}}}},
            "same name",
        ),
        ({"config": {"added_tokens_decoder": {"900": "x"}}}, "'x'"),
        ({"config": {"added_tokens_decoder": {"900x": {"content": "a"}}}}, "'900x'"),
        ({"config": {"added_tokens_decoder": added(900, lstrip=None)}}, "'lstrip': None"),
        ({"config": {"added_tokens_decoder": added(900, special="true")}}, "'special': 'true'"),
        ({"config": {"added_tokens_decoder": ["x"]}}, "'x'"),
    ],
)
def test_malformed_added_tokens_are_refused(llama, files, said):
    assert said in message_of(load_tokenizer, llama(**files))


@pytest.mark.parametrize("kind", ["json", "decoder"])
def test_vocab_and_merges_with_added_tokens_equal_transformers(tmp_path, kind):
    vocabulary = {symbol: i for i, symbol in enumerate([*SYMBOLS, "ca", "cat", "<|endoftext|>"])}
    config, ids = {"tokenizer_class": "GPT2Tokenizer"}, (259, 260)
    files = {"vocab": vocabulary, "merges": "#version: 0.2\nc a\nca t\n"}
    if kind == "json":
        files["added_tokens"] = dict(zip(("<|im_start|>", "<|im_end|>"), ids))
    else:
        config["added_tokens_decoder"] = added(*ids)
    folder = write(tmp_path, tokenizer_config=config, config={"model_type": "gpt2"}, **files)
    ours = check_equals_transformers(folder, decodes=False)
    found = ours.encode(CHATML, "allow")
    assert (found[0], found.count(259), found.count(260), ours.vocab_size) == (259, 2, 1, 261)
    assert ours.decode(found) == CHATML
    write(folder, added_tokens={"<x>": 300}, tokenizer_config={})
    assert "not 300" in message_of(load_tokenizer, folder)


@pytest.mark.parametrize("kind", ["json", "decoder", "decoder, not special"])
def test_tokenizer_json_with_added_tokens_equals_transformers(byte_level, tmp_path, kind):
    definition = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    definition |= {"truncation": None, "padding": None}
    *_, think = definition["added_tokens"]  # those before are the first two ids
    definition["added_tokens"] = [think | {"id": think["id"] - 2}]
    vocabulary, size = definition["model"]["vocab"], think["id"] - 1
    definition["model"]["vocab"] = {token: i - 2 for token, i in vocabulary.items() if i >= 2}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer": definition, "config": {"model_type": "gpt2"}, "tokenizer_config": config}
    if kind == "json":
        files["added_tokens"] = {"<|im_start|>": size, "<|im_end|>": size + 1}
    else:
        config["added_tokens_decoder"] = added(size, size + 1, special=kind == "decoder")
    ours = check_equals_transformers(write(tmp_path, **files))
    assert ours.vocab_size == size + 2 and ours.encode(CHATML, "allow").count(size + 1) == 1
    assert ("<|im_end|>" in ours.special_tokens) is (kind == "decoder")
    files["tokenizer_config"] = config | {"added_tokens_decoder": added(size + 5, size + 6)}
    assert f"not {size + 5}" in message_of(load_tokenizer, write(tmp_path, **files))


def test_tokens_of_the_files_may_be_in_any_order_and_rename_none(byte_level):
    ours = load_tokenizer(byte_level)
    size, (start, end) = ours.vocab_size, added("start", "end").values()
    start, end = start | {"content": "<x>"}, end | {"content": "<y>"}
    new = ours.with_file_tokens({size + 1: end, size: start})
    assert new.encode("<x><y>", "allow") == [size, size + 1]
    assert "gives the added token '<x>'" in message_of(ours.with_file_tokens, {0: start})


def test_llama_3_vocabulary_with_renamed_and_added_tokens(llama3, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama3 / "tokenizer.model").read_bytes())
    plain = load_tokenizer(llama3)
    reserved, new = plain.special_tokens["<|reserved_special_token_0|>"], plain.vocab_size
    write(tmp_path, tokenizer_config={"added_tokens_decoder": added(reserved, new)})
    ours = load_tokenizer(tmp_path)
    assert ours.encode("<|im_start|>a<|im_end|>", "allow") == [reserved, *plain.encode("a"), new]
    assert ours.vocab_size == new + 1 and "<|reserved_special_token_0|>" not in ours.special_tokens
    assert ours.decode([reserved, new]) == "<|im_start|><|im_end|>"
    for i in (7, plain.special_tokens["<|begin_of_text|>"] - 1):  # the last of them
        write(tmp_path, tokenizer_config={"added_tokens_decoder": added(i)})
        assert f"the id {i}" in message_of(load_tokenizer, tmp_path)


def test_unused_ids_include_gaps(llama, llama3, byte_level, tmp_path):
    """A model's rows that no token has, also between tokens."""
    assert load_tokenizer("gpt2").unused_ids(50260) == [50257, 50258, 50259]
    assert load_tokenizer(llama(added_tokens={"<|im_start|>": 803})).unused_ids(805) == [800, 801, 802, 804]
    size = load_tokenizer(llama3).vocab_size
    assert load_tokenizer(llama3).unused_ids(size) == []
    definition = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    definition["model"]["vocab"] = {
        token: i + 5 * (i > 1) for token, i in definition["model"]["vocab"].items()
    }
    definition["added_tokens"] = definition["added_tokens"][:2]
    (tmp_path / "gap").mkdir()
    tokenizer = load_tokenizer(write(tmp_path / "gap", tokenizer=definition))
    assert tokenizer.unused_ids(tokenizer.vocab_size + 1) == [2, 3, 4, 5, 6, tokenizer.vocab_size]


def test_added_tokens_that_a_config_names_are_special(tmp_path):
    config = {"eos_token": {"content": "<e>"}, "additional_special_tokens": ["<a>"]}
    config |= {"extra_special_tokens": ["<x>"], "pad_token": "<p>"}  # the first as transformers 5 writes it
    names = ("<e>", "<a>", "<x>", "<p>", "<other>")
    write(tmp_path, tokenizer_config=config, added_tokens={name: i for i, name in enumerate(names)})
    found = [(token["special"], token["normalized"]) for token in read_added_tokens(tmp_path).values()]
    assert found == [(True, False)] * 4 + [(False, True)]


def test_a_config_makes_added_tokens_special(tmp_path):
    spacing = dict(lstrip=False, rstrip=False, single_word=False)
    decoder = {"1": {"content": "<a>", "special": False, "lstrip": True}}
    decoder["2"] = {"content": "<e>", "special": False}
    config = {"eos_token": "<e>", "added_tokens_decoder": decoder, "additional_special_tokens": 3}
    found = read_added_tokens(write(tmp_path, tokenizer_config=config, added_tokens={"<other>": 3}))
    assert found == {
        1: {"content": "<a>", "special": False, "normalized": True, **(spacing | {"lstrip": True})},
        2: {"content": "<e>", "special": True, "normalized": True, **spacing},
    }
    write(tmp_path, tokenizer_config={"added_tokens_decoder": {}})
    assert read_added_tokens(tmp_path) == {}  # as in transformers, the other file is not read


@pytest.mark.parametrize("flags", [
    {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"lstrip": True, "special": False}, {}, None,
])  # fmt: skip
@pytest.mark.parametrize("in_json", [{}, {"lstrip": True}, {"rstrip": True, "special": False}])
def test_properties_in_the_config_replace_those_in_tokenizer_json(byte_level, tmp_path, flags, in_json):
    definition = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    definition |= {"truncation": None, "padding": None}
    for token in definition["added_tokens"]:
        token |= in_json
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if flags is not None:
        config["added_tokens_decoder"] = added(0, 1, **flags)
    folder = write(tmp_path, tokenizer=definition, tokenizer_config=config)
    ours = check_equals_transformers(folder, decodes=False)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).added_tokens_decoder
    assert {*ours.special_tokens.values()} == {i for i, token in theirs.items() if token.special}
    text = "a <|im_end|> b"  # as ordinary text, unless the token is not special
    assert (1 in ours.encode(text, "text")) == (1 not in ours.special_tokens.values())


def test_added_tokens_json_does_not_replace_properties(byte_level, tmp_path):
    definition = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    definition |= {"truncation": None, "padding": None}
    definition["added_tokens"][1]["lstrip"] = True
    folder = write(tmp_path, tokenizer=definition, added_tokens={"<|im_end|>": 1})
    ours = check_equals_transformers(folder, decodes=False)
    assert 1 in ours.special_tokens.values()
    assert ours.encode("a <|im_end|>", "allow") == [*ours.encode("a"), 1]

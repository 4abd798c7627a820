"""The tokens before and after a text: when the files of a model ask for them, compared with transformers."""

import json

import pytest
from support.tokenizers import gguf_of_byte_level, message_of, write_gguf

from tinyllm.tokenizers import CharTokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXTS = ["Hello", "", "the cat sat\n"]


def write_folder(folder, vocabulary, **files):
    (folder / vocabulary.name).write_bytes(vocabulary.read_bytes())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def with_template(source, folder, single, first=()):
    """The tokenizer.json of a folder, with this template as its post-processor."""
    library = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    template = tokenizers.processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)]
    )
    library.post_processor = tokenizers.processors.Sequence([*first, template])
    library.save(str(folder / "tokenizer.json"))
    return folder


def check_equals_transformers(folder):
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.with_bos(ours.encode(text)) + list(ours.closing_ids) == theirs(text).input_ids
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    return ours


def test_with_bos_adds_it_once():
    tokenizer = CharTokenizer("ab").with_special_tokens(["<s>"])
    assert tokenizer.with_bos([0, 1]) == [0, 1]
    tokenizer.add_bos = True
    assert tokenizer.with_bos([0, 1]) == [0, 1]  # there is none
    tokenizer.bos_id = 2
    assert tokenizer.with_bos([0, 1]) == tokenizer.with_bos((2, 0, 1)) == [2, 0, 1]
    assert tokenizer.with_bos([]) == tokenizer.with_bos([2]) == [2]
    tokenizer.add_bos = False
    assert tokenizer.with_bos([0, 1]) == [0, 1]


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokenizer_config_of_a_llama_decides(llama2, tmp_path, add_bos):
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": add_bos, "bos_token": "<s>"}
    folder = write_folder(tmp_path, llama2 / "tokenizer.model", tokenizer_config=config)
    assert check_equals_transformers(folder).add_bos is add_bos


@pytest.mark.parametrize("first", [(), (tokenizers.processors.ByteLevel(trim_offsets=False),)])
@pytest.mark.parametrize("named", [True, False])
def test_template_of_tokenizer_json_decides(byte_level, tmp_path, first, named):
    folder = with_template(byte_level, tmp_path, "<|im_start|> $A", first)
    if named:
        config = {"bos_token": "<|im_start|>", "add_bos_token": None}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = check_equals_transformers(folder)
    assert (ours.bos_id, ours.add_bos) == (0, True)


def test_template_decides_if_the_config_names_no_bos(byte_level, tmp_path):
    folder = with_template(byte_level, tmp_path, "<|im_start|> $A")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}), encoding="utf-8")
    ours = check_equals_transformers(folder)
    assert (ours.bos_id, ours.add_bos) == (0, True)


def test_template_and_config_that_name_different_tokens_are_refused(byte_level, tmp_path):
    folder = with_template(byte_level, tmp_path, "<|im_start|> $A")
    config = {"bos_token": {"content": "<|im_end|>"}, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    said = message_of(load_tokenizer, folder)
    assert (
        "the bos_token '<|im_end|>'" in said
        and "puts '<|im_start|>' before a text: make them the same" in said
    )
    config["add_bos_token"] = False  # then neither begins a text
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_tokenizer(folder).with_bos([5]) == [5]


def test_another_id_in_the_models_config_does_not_change_what_the_template_says(byte_level, tmp_path):
    folder = with_template(byte_level, tmp_path, "<|im_start|> $A")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 1}))
    assert check_equals_transformers(folder).bos_id == 0


def test_template_of_two_tokens_before_the_text_is_refused(byte_level, tmp_path):
    folder = with_template(byte_level, tmp_path, "<|im_start|> <|im_end|> $A")
    assert "puts 2 tokens before a text" in message_of(load_tokenizer, folder)


def test_template_that_begins_with_the_text_adds_no_bos(byte_level, tmp_path):
    ours = load_tokenizer(with_template(byte_level, tmp_path, "$A <|im_end|>"))
    assert (ours.bos_id, ours.add_bos) == (None, False)


@pytest.mark.parametrize(
    ("single", "closing"),
    [("<|im_start|> $A <|im_end|>", (1,)), ("$A <|im_end|> <|im_start|>", (1, 0)), ("<|im_start|> $A", ())],
)
def test_template_says_what_follows_a_text(byte_level, tmp_path, single, closing):
    folder = with_template(byte_level, tmp_path, single)
    assert check_equals_transformers(folder).closing_ids == closing


def test_processors_of_bert_and_roberta_put_tokens_around_a_text(byte_level, tmp_path):
    around = ("<|im_end|>", 1), ("<|im_start|>", 0)
    for processor in (
        tokenizers.processors.RobertaProcessing(*around, add_prefix_space=False),
        tokenizers.processors.BertProcessing(*around),
    ):
        library = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
        library.post_processor = processor
        library.save(str(tmp_path / "tokenizer.json"))
        ours = check_equals_transformers(tmp_path)
        assert (ours.with_bos([]), ours.closing_ids) == ([0], (1,))


@pytest.mark.parametrize(("add_eos", "closing"), [(True, (2,)), (False, ()), (None, ())])
def test_tokenizer_config_of_a_llama_adds_eos(llama2, tmp_path, add_eos, closing):
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>"}
    config |= {"eos_token": "</s>"} | ({} if add_eos is None else {"add_eos_token": add_eos})
    folder = write_folder(tmp_path, llama2 / "tokenizer.model", tokenizer_config=config)
    assert check_equals_transformers(folder).closing_ids == closing
    del config["eos_token"]  # then it is that of the vocabulary
    write_folder(tmp_path, llama2 / "tokenizer.model", tokenizer_config=config)
    assert check_equals_transformers(folder).closing_ids == closing
    write_folder(tmp_path, llama2 / "tokenizer.model", generation_config={"eos_token_id": [2, 1]})
    assert load_tokenizer(folder).closing_ids == closing  # only the first one
    config["add_eos_token"] = 1
    write_folder(tmp_path, llama2 / "tokenizer.model", tokenizer_config=config)
    assert "add_eos_token" in message_of(load_tokenizer, tmp_path)


def test_tokenizer_config_takes_precedence_over_the_template(byte_level, tmp_path):
    with_template(byte_level, tmp_path, "<|im_start|> $A")
    config = {"bos_token": "<|im_start|>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_tokenizer(tmp_path).with_bos([5]) == [5]
    with_template(byte_level, tmp_path, "<|im_start|> $A <|im_end|>")
    for add_eos, closing in ((True, (1,)), (False, ()), (None, (1,))):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": add_eos}))
        assert load_tokenizer(tmp_path).closing_ids == closing
    config["add_bos_token"] = "yes"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "'yes'" in message_of(load_tokenizer, tmp_path)


def test_vocabulary_files_of_llama_2_and_3_add_it(llama2, llama3, byte_level):
    for folder in (llama2, llama3):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.with_bos([5]) == [tokenizer.bos_id, 5]
    for tokenizer in (load_tokenizer(byte_level), load_tokenizer("gpt2")):
        assert tokenizer.with_bos([5]) == [5]


def sentencepiece_keys():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a"]
    types = [2, 3, 3, *[6] * 256, 1]
    return {"model": "llama", "tokens": tokens, "scores": [0.0] * len(tokens), "token_type": types}


@pytest.mark.parametrize("keys, expected", [({}, [1, 9]), ({"add_bos_token": False}, [9])])
def test_gguf_with_sentencepiece_adds_it_by_default(tmp_path, keys, expected):
    """Without bos_token_id and eos_token_id, they are 1 and 2, as in llama.cpp."""
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", **sentencepiece_keys(), **keys))
    assert tokenizer.with_bos([9]) == expected
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.closing_ids) == (1, (2,), ())
    keys = sentencepiece_keys() | {"add_eos_token": True}
    assert load_tokenizer(write_gguf(tmp_path / "b.gguf", **keys)).closing_ids == (2,)
    tokenizer = load_tokenizer(write_gguf(tmp_path / "b.gguf", **keys, eot_token_id=9))
    assert (tokenizer.eos_ids, tokenizer.closing_ids) == ((2, 9), (2,))


def test_gguf_ids_that_end_a_turn_end_a_text(tmp_path):
    keys = sentencepiece_keys() | {"eot_token_id": 9, "eom_token_id": 10}
    assert load_tokenizer(write_gguf(tmp_path / "a.gguf", **keys)).eos_ids == (2, 9, 10)
    size = len(keys["tokens"])
    said = message_of(load_tokenizer, write_gguf(tmp_path / "b.gguf", **keys | {"eot_token_id": size}))
    assert f"eot_token_id = {size}, not an id below {size}" in said


def test_gguf_piece_that_is_spelled_like_a_byte_is_a_text(tmp_path):
    keys = {
        "tokens": ["<unk>", "<s>", "</s>", "<0x41>", "▁a"],
        "token_type": [2, 3, 3, 1, 1],
        "scores": [0.0] * 5,
    }
    assert (
        load_tokenizer(write_gguf(tmp_path / "a.gguf", model="llama", **keys)).decode_bytes([3]) == b"<0x41>"
    )


@pytest.mark.parametrize("pre, default", [("llama-bpe", True), ("gpt-2", False), ("smollm", False)])
def test_gguf_with_byte_level_bpe_adds_it_for_llama_3(byte_level, tmp_path, pre, default):
    for keys, add_bos in (({}, default), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)):
        tokenizer = load_tokenizer(gguf_of_byte_level(byte_level, tmp_path / "a.gguf", pre=pre, **keys))
        assert tokenizer.with_bos([9]) == ([0, 9] if add_bos else [9])

"""Tokens that end a turn of a chat, though the files of a model name only the end of a text."""

import json

import pytest
from support.tokenizers import gguf_of_byte_level

from tinyllm.tokenizers import CharTokenizer, load_tokenizer
from tinyllm.tokenizers.chat_template import end_of_answer

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|endoftext|>", "<|turn|>"]
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '\n\n' "
    "+ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n\n' }}{% endif %}"
)


@pytest.fixture
def folder(byte_level, tmp_path):
    """Write a model's folder with NAMES, from id 1001 on, as special tokens, and these configs."""

    def make(**files):
        library = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
        library.no_truncation()
        library.no_padding()
        library.add_special_tokens(NAMES)
        library.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return make


def test_folder_whose_template_ends_turns_with_another_token(folder):
    config = {"bos_token": NAMES[0], "eos_token": NAMES[1]}
    assert load_tokenizer(folder(tokenizer_config=config)).eos_ids == (1002,)
    with_template = folder(tokenizer_config=config | {"chat_template": LLAMA3})
    assert load_tokenizer(with_template).eos_ids == (1002, 1003)


def test_gguf_without_eot_key(folder, tmp_path):
    """By name, as in llama.cpp."""
    keys = {"pre": "llama-bpe", "bos_token_id": 1001, "eos_token_id": 1002, "chat_template": LLAMA3}
    tokenizer = load_tokenizer(gguf_of_byte_level(folder(), tmp_path / "a.gguf", **keys))
    assert tokenizer.eos_ids == (1002, 1003, 1, 1004)  # <|im_end|> and <|endoftext|>, too
    named = load_tokenizer(gguf_of_byte_level(folder(), tmp_path / "a.gguf", **keys, eot_token_id=1003))
    assert named.eos_ids == (1002, 1003, 1, 1004)


@pytest.mark.parametrize(
    "template, expected",
    [
        (LLAMA3, (1003,)),
        (LLAMA3.replace("eot_id", "turn"), (1005,)),  # a name that is not known
        (LLAMA3.replace("'<|eot_id|>'", "' \n<|turn|>\n'"), (1005,)),
        (LLAMA3.replace("'<|eot_id|>'", "'\n'"), ()),
        (LLAMA3.replace("'<|eot_id|>'", "' User: <|turn|>'"), ()),
        ("{{ raise_exception('no') }}", ()),
        ("{% for", ()),
        ("nothing", ()),
    ],
)
def test_token_that_the_template_writes_after_an_answer(folder, template, expected):
    config = {"bos_token": NAMES[0], "eos_token": NAMES[1], "chat_template": template}
    assert end_of_answer(load_tokenizer(folder(tokenizer_config=config))) == expected


def test_tokenizer_without_a_template_has_no_end_of_answer():
    assert end_of_answer(CharTokenizer("ab")) == ()

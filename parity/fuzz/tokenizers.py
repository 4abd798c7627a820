"""Broken tokenizers: our own, Hugging Face's, both of Llama's, and their configuration files."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from parity.fuzz.mutations import (
    Mutation,
    fixed_edit,
    mutations_of_bytes,
    mutations_of_json,
    mutations_of_lines,
    number_mutations,
    read_json,
    write_json,
)
from tinyllm.errors import Error
from tinyllm.tokenizers import TOKENIZER_MODEL, load_tokenizer
from tinyllm.tokenizers.base import END_OF_TEXT, FILE_NAME, Tokenizer
from tinyllm.tokenizers.bpe import BPETokenizer
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.tokenizers.huggingface import BYTE_OF, MERGES, TOKENIZER_JSON, VOCAB

TEXTS = ("Hello, world: 12  and\n\n3", " é漢👍\x00\u2028", "")

# Vocabularies of the two families: SentencePiece and byte-level
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

PIECES = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, "▁", "a", "b", "ab", "▁ab"]

SYMBOLS = list(BYTE_OF)

BYTE_MERGES = ["a b", "Ġ a", "Ġ ab"]

BYTE_LEVEL_TOKENS = [*SYMBOLS, *(merge.replace(" ", "") for merge in BYTE_MERGES), "<|end|>"]


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Check that all ids are in range, and that whatever the tokenizer cannot do raises Error."""
    size = tokenizer.vocab_size
    assert type(size) is int and size > 0, size
    ids = [*tokenizer.special_tokens.values(), *tokenizer.eos_ids]
    ids += [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert all(type(i) is int and 0 <= i < size for i in ids), ids
    assert all(type(name) is str for name in tokenizer.special_tokens)
    assert tokenizer.chat_template is None or type(tokenizer.chat_template) is str
    # Not the longest names: tiktoken takes a minute for one word of a hundred thousand letters.
    names = "".join([name for name in tokenizer.special_tokens if len(name) < 1000][:2])
    for text in TEXTS:
        for special in ("refuse", "allow", "text"):
            check_encoding(tokenizer, text + names, special)
    for i in (*range(min(size, 300)), size - 1):
        try:
            assert type(tokenizer.decode([i])) is str
            assert type(tokenizer.decode_bytes([i])) is bytes
        except Error:
            pass  # a vocabulary may have gaps


def check_encoding(tokenizer: Tokenizer, text: str, special: str) -> None:
    try:
        ids = tokenizer.encode(text, special)
    except Error:
        return  # for example, there is no token for a character
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids), ids
    assert type(tokenizer.decode(ids)) is str


def load_any_tokenizer(folder: Path) -> None:
    check_tokenizer(load_tokenizer(folder))


def make_bpe(folder: Path) -> None:
    BPETokenizer([(64, 65), (256, 66), (220, 64)]).with_special_tokens(["<|user|>"]).save(folder)


def make_char(folder: Path) -> None:
    CharTokenizer("abc\n é").with_special_tokens(["<|user|>"]).save(folder)


def our_tokenizer_mutations(folder: Path) -> list[Mutation]:
    definition = read_json(folder / FILE_NAME)
    changed = [_definition(definition, **change) for change in DEFINITIONS]
    return mutations_of_json(folder, FILE_NAME) + changed


DEFINITIONS = [
    dict(kind="gpt2"),
    dict(kind="char"),
    dict(pattern="("),
    dict(pattern="a*"),
    dict(pattern="(a+)+$"),
    dict(pattern=r"\p{L}+"),
    dict(pattern="(?P<a>x)(?P=a)"),
    dict(merges=[[0, 1]] * 2),
    dict(merges=[[256, 0]]),
    dict(merges=[[0, 0], [256, 256], [257, 257]]),
    dict(merges=[[0, 0], *([i, i] for i in range(256, 300))]),  # each token is twice as long as the last
    dict(merges=[[True, False]]),
    dict(merges=[[1.0, 2.0]]),
    dict(added_tokens=["<|x|>", "<|x|>"]),
    dict(added_tokens=[END_OF_TEXT]),
    dict(added_tokens=["a"]),
    dict(added_tokens=[f"<{n}>" for n in range(5000)]),
]


def _definition(definition: dict, **change) -> Mutation:
    text = json.dumps(definition | change)
    name = f"{next(iter(change))} is {str(*change.values())[:40]}"
    return fixed_edit(FILE_NAME, name, lambda data: text.encode("utf-8"))


def byte_level_definition() -> dict:
    """A tokenizer.json like those of GPT-2 and SmolLM2."""
    vocabulary = {token: i for i, token in enumerate(BYTE_LEVEL_TOKENS[:-1])}
    token = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(vocabulary), "content": "<|end|>", **token}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in BYTE_MERGES],
        },
    }


def make_byte_level(folder: Path) -> None:
    write_json(folder / TOKENIZER_JSON, byte_level_definition())


def make_sentencepiece_json(folder: Path) -> None:
    """Write a tokenizer.json like that of Llama 2."""
    definition = byte_level_definition()
    definition["added_tokens"] = [definition["added_tokens"][0] | {"id": 0, "content": "<unk>"}]
    definition["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    definition["pre_tokenizer"] = None
    definition["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    definition["model"] |= dict(
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
        vocab={piece: i for i, piece in enumerate(PIECES)},
        merges=[["a", "b"], ["▁", "ab"]],
    )
    write_json(folder / TOKENIZER_JSON, definition)


# Components that crash the library, never return, or fill the memory, unless they are refused
HOSTILE_COMPONENTS = [
    {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "(.+)+$"}, "content": "x"}},
    {"normalizer": {"type": "Prepend", "prepend": ""}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAEAAAAA"}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 60}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "B", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {},
        }
    },
]


def _with(part: dict) -> Mutation:
    def change(data: bytes) -> bytes:
        return json.dumps(json.loads(data) | part).encode("utf-8")

    return fixed_edit(TOKENIZER_JSON, f"has the component {json.dumps(part)[:80]}", change)


def tokenizer_json_mutations(folder: Path) -> list[Mutation]:
    return [*map(_with, HOSTILE_COMPONENTS), *mutations_of_json(folder, TOKENIZER_JSON)]


def make_pair(folder: Path) -> None:
    write_json(folder / VOCAB, {token: i for i, token in enumerate([*BYTE_LEVEL_TOKENS[:-1], END_OF_TEXT])})
    merges = "".join(f"{merge}\n" for merge in ["#version: 0.2", *BYTE_MERGES])
    (folder / MERGES).write_bytes(merges.encode("utf-8"))


def pair_mutations(folder: Path) -> list[Mutation]:
    return mutations_of_json(folder, VOCAB) + mutations_of_lines(folder, MERGES)


def make_llama3(folder: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b" a", b"abc"]
    lines = [base64.b64encode(token) + f" {rank}\n".encode("ascii") for rank, token in enumerate(tokens)]
    (folder / TOKENIZER_MODEL).write_bytes(b"".join(lines))


def llama3_mutations(folder: Path) -> list[Mutation]:
    size = (folder / TOKENIZER_MODEL).stat().st_size
    return mutations_of_lines(folder, TOKENIZER_MODEL, [4, 5, 6, 7, size - 6])


def make_sentencepiece(folder: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a cat and a hat", "that is the hat"] * 10),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / TOKENIZER_MODEL).write_bytes(model.getvalue())


def sentencepiece_mutations(folder: Path) -> list[Mutation]:
    data = (folder / TOKENIZER_MODEL).read_bytes()
    lengths = _field_lengths(data)
    ends = [start + 1 + data[start] for start in lengths]
    places = {f"the length at {start}": (start, 1) for start in [*lengths[:3], *lengths[-3:]]}
    places |= {
        f"the score of piece {n}": (start + data[start + 2] + 4, 4) for n, start in enumerate(lengths[:4])
    }
    numbers = number_mutations(TOKENIZER_MODEL, places)
    return numbers + mutations_of_bytes(folder, TOKENIZER_MODEL, [*ends[:3], *ends[-3:]])


def _field_lengths(data: bytes) -> list[int]:
    """The offset of every piece's length byte: field 1 of the protocol buffer, under 128 bytes long."""
    places, at = [], 0
    while data[at] == 0x0A:
        places.append(at + 1)
        at += 2 + data[at + 1]
    return places


CONFIGS = {
    "tokenizer_config.json": {
        "bos_token": "<|end|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        "model_max_length": 10**30,
    },
    "generation_config.json": {"bos_token_id": 259, "eos_token_id": [259]},
}

TEMPLATE = "chat_template.jinja"


def make_described(folder: Path) -> None:
    make_byte_level(folder)
    for name, content in CONFIGS.items():
        write_json(folder / name, content)
    (folder / TEMPLATE).write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")


def described_mutations(folder: Path) -> list[Mutation]:
    mutations = [mutation for name in CONFIGS for mutation in mutations_of_json(folder, name)]
    return mutations + mutations_of_bytes(folder, TEMPLATE)

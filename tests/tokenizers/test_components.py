"""Hostile tokenizer.json files are refused in one sentence; the components of published ones are accepted."""

import time

import pytest
from support.tokenizers import a_tokenizer, message_of, write_json

from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.components import is_linear

tokenizers = pytest.importorskip("tokenizers")


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(key, *parts):
    return {"type": "Sequence", key: list(parts)}


def template(*pieces):
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [text if piece == "A" else piece for piece in pieces]
    return {"type": "TemplateProcessing", "single": single, "pair": [text], "special_tokens": {}}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
HUNDREDFOLD = replace({"String": "a"}, "a" * 100)
HOSTILE = {
    "replaces nothing": {"normalizer": replace({"String": ""}, "x")},
    "replaces an empty match": {"normalizer": replace({"Regex": "a*"}, "x")},
    "replaces with backtracking": {"normalizer": replace({"Regex": "(a+)+$"}, "x")},
    "grows": {"normalizer": sequence("normalizers", *[HUNDREDFOLD] * 4)},
    "grows in nested sequences": {
        "normalizer": sequence("normalizers", *[sequence("normalizers", replace({"String": "a"}, "aaa"))] * 6)
    },
    "doubles": {"normalizer": sequence("normalizers", *[{"type": "ByteLevel"}] * 30)},
    "prepends nothing": {"normalizer": {"type": "Prepend", "prepend": ""}},
    "prepends much": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "precompiled": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAEAAAAA"}},
    "unknown": {"normalizer": {"type": "Next"}},
    "not an object": {"normalizer": [1]},
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "splits with backtracking": {"pre_tokenizer": split("(a+)+$")},
    "splits at nothing": {
        "pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
    },
    "a hundred steps": {"pre_tokenizer": sequence("pretokenizers", *[{"type": "Whitespace"}] * 100)},
    "a normalizer as pre-tokenizer": {"pre_tokenizer": replace({"String": "a"}, "b")},
    "the text twice": {"post_processor": template("A", "A")},
    "no text": {"post_processor": template()},
    "another text": {"post_processor": template({"Sequence": {"id": "B", "type_id": 0}})},
    "random": {"model": {"dropout": 0.5}},
    "always random": {"model": {"dropout": 1}},
    "grows 65-fold": {"normalizer": replace({"String": "a"}, "a" * 65)},
    "grows in two components": {"pre_tokenizer": BYTES, "normalizer": replace({"String": "a"}, "a" * 33)},
    "grows and shrinks": {
        "normalizer": sequence("normalizers", replace({"String": "b" * 99}, ""), HUNDREDFOLD)
    },
    "prepends again and again": {
        "normalizer": sequence("normalizers", *[{"type": "Prepend", "prepend": "▁"}] * 7)
    },
    "prepends again in pieces": {"pre_tokenizer": sequence("pretokenizers", *[METASPACE] * 7)},
    "prepends 17 characters": {"normalizer": {"type": "Prepend", "prepend": "a" * 17}},
    "prepends a number": {"normalizer": {"type": "Prepend", "prepend": 1}},
    "replaces by a number": {"normalizer": replace({"String": "a"}, 1)},
    "splits by no pattern": {"pre_tokenizer": {"type": "Split", "behavior": "Isolated", "invert": False}},
    "33 steps": {"pre_tokenizer": sequence("pretokenizers", *[{"type": "Whitespace"}] * 33)},
    "a number of steps": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": 3}},
    "a pre-tokenizer as normalizer": {"normalizer": split(" ")},
    "another normalizer as pre-tokenizer": {"pre_tokenizer": {"type": "Prepend", "prepend": "a"}},
    "a post-processor as pre-tokenizer": {"pre_tokenizer": template("A")},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_components_are_refused_when_loaded(tmp_path, capfd, name):
    said = message_of(load_tokenizer, write_json(tmp_path, a_tokenizer(**HOSTILE[name])))
    assert str(tmp_path / "tokenizer.json") in said and "\n" not in said and len(said) < 600
    key = next(iter(HOSTILE[name]))
    assert key in said or "dropout" in said
    assert "panicked" not in capfd.readouterr().err


def test_the_component_that_makes_a_text_too_long_is_named(tmp_path):
    parts = replace({"String": "a"}, "first---"), replace({"String": "b"}, "second---")
    path = write_json(tmp_path, a_tokenizer(normalizer=sequence("normalizers", *parts)))
    said = message_of(load_tokenizer, path)
    assert "second" in said and "first" not in said


def test_sizes_for_padding_and_truncation_are_not_used(tmp_path):
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": 0}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    path = write_json(tmp_path, a_tokenizer(padding=padding))
    assert load_tokenizer(path).encode("ab") == load_tokenizer(write_json(tmp_path, a_tokenizer())).encode(
        "ab"
    )


def test_failure_of_the_library_while_encoding_is_an_error(tmp_path):
    tokenizer = load_tokenizer(write_json(tmp_path, a_tokenizer()))

    class Failing:
        def encode_batch_fast(self, *_, **__):
            raise Exception("Unk token `x` not found")

    tokenizer.tokenizer = Failing()
    assert "cannot encode this text (Unk token `x` not found)" in message_of(tokenizer.encode, "a", "allow")


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LETTER = r"[^\r\n\p{L}\p{N}]?"
END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SYMBOLS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
PUBLISHED = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3": CONTRACTIONS + rf"|{LETTER}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + END,
    "Qwen 2": CONTRACTIONS + rf"|{LETTER}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + END,
    "GPT-4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*" + END,
    "GPT-4o": (
        f"{LETTER}{UPPER}*{LOWER}+{CONTRACTIONS}?|{LETTER}{UPPER}+{LOWER}*{CONTRACTIONS}?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + END
    ),
    "DeepSeek": (
        rf"{SYMBOLS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*" + END
    ),
    "DeepSeek's Chinese": "[一-龥぀-ゟ゠-ヿ]+",
    "Falcon": "[0-9][0-9][0-9]",
    "Bloom": " ?[^(\\s|[.,!?…。，、।۔،])]+",
    "CLIP": r"<\|startoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "spaces": " {2,}",
}
TEXTS = [
    text * 30_000 for text in (" ", "a", "A", "A ", " a", "\n", " \n", "\t\r", "!", "1", "一", "'", "'s", "(")
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_patterns_are_accepted_and_linear(name):
    assert is_linear(PUBLISHED[name])
    pieces = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PUBLISHED[name]), "isolated")
    for text in TEXTS:
        started = time.process_time()
        pieces.pre_tokenize_str(text + "x")
        assert time.process_time() - started < 5  # 0.1; for a quadratic pattern a minute


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "(a+)+$",
            "(a|a)+",
            "(?:a+)",
            "a*a*b",
            "a+b",
            "a++b",
            r"\s+$",
            r"\s+a{05}",
            "a{2,}b",
            r"\s*[\r\n]+",
        ),
        *("a{1,99}" * 5 + "b", "a?" * 40 + "a" * 40, "(a|a)" * 40 + "b", "(a|a){30}b", "a{1,3}+", ".*x"),
        *(r"\s+(?!\S)x", r"\s*[\r\n]+x|\s+", "[A-Z]*[a-z]+x|[A-Z]+[a-z]*", "a+b?c"),
        *(r"\s*[\r\n]+|a\s+", r"\s*[\r\n]+|\s+(?!\S)", "(a||b)", "(a|a){1,9}b", "a{9,1}" * 3 + "b"),
        "a{1,10}a{1,11}b",
        *("[a-z]*[a-y]+", "", "a|", "|a", "a*", r"\s?", "a{0,3}", "(a|)", "(|a)", "(?:|a)x"),
        *(
            r"(a)\1",
            "(?=a)",
            "(?<!a)b",
            "(?>a)",
            r"\b",
            r"\Ga",
            r"(?<n>a\g<n>)",
            "(a",
            "[a",
            "a{5",
            "a" * 20_000,
        ),
    ],
)
def test_patterns_that_may_backtrack_or_match_nothing_are_refused(pattern):
    assert not is_linear(pattern)


@pytest.mark.parametrize("pattern", ["a{1,10}a{1,10}b", r"\s*[\r\n]+|\s", "a" * 10_000])
def test_patterns_at_the_limits_are_accepted(pattern):
    assert is_linear(pattern)


def test_components_of_published_tokenizers_are_accepted(tmp_path):
    space = [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    digits = {"type": "Digits", "individual_digits": True}
    for changes in (
        {"normalizer": sequence("normalizers", *space)},
        {"normalizer": space[1]},
        {"normalizer": sequence("normalizers", {"type": "NFC"}, replace({"Regex": r"\s+"}, " "))},
        {"pre_tokenizer": sequence("pretokenizers", METASPACE, byte_level)},
        {"pre_tokenizer": sequence("pretokenizers", split(PUBLISHED["Qwen 2"]), byte_level)},
        {"pre_tokenizer": sequence("pretokenizers", digits, byte_level)},
        {"post_processor": sequence("processors", byte_level, template("A"))},
        # 32-fold, and doubled by the pre-tokenizer
        {"normalizer": replace({"String": "a"}, "a" * 32), "post_processor": byte_level},
        {"normalizer": sequence("normalizers", *[replace({"String": "a" * 9}, "b" * 9)] * 3)},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 16}},
        {"pre_tokenizer": sequence("pretokenizers", *[digits] * 31, byte_level)},
        {"model": {"continuing_subword_prefix": "", "dropout": 0.0}},
    ):
        assert load_tokenizer(write_json(tmp_path, a_tokenizer(**changes))).encode("") == []

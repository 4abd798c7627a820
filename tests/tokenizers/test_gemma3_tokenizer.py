"""Gemma 3's tokenizer: in its GGUF file, in tokenizer.json and as a SentencePiece model.

TINYLLM_GEMMA3 is the path of gemma3-270m's GGUF file, as ``tinyllm pull gemma3-270m`` prints it, and
TINYLLM_GEMMA3_TOKENIZER the folder with tokenizer.json and tokenizer_config.json of Gemma 3; .ci/run fetches
both. A small vocabulary with Gemma's peculiarities is always tested.
"""

import io
import itertools
import os
import time
from pathlib import Path

import pytest
from support.instructions import render_in_process
from support.tokenizers import COUNT, check_same, message_of, nasty_strings, write_gguf

from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import check_fits
from tinyllm.tokenizers.chat_template import encode_chat, render_chat

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<unused0>"]
SPACES = [" " * n for n in range(2, 6)] + ["\n" * n for n in range(1, 5)] + ["\t\t", "[multimodal]", "</s>"]
MORE = (
    [" " * n for n in (2, 3, 7, 30, 31, 32, 40, 70)]
    + ["\n" * n for n in (2, 5, 31, 33)]
    + ["\t" * 3, "\t" * 34]
)
MORE += [
    "[multimodal]",
    "<unused3>",
    "<unused6241>",
    "<mask>",
    "<table>",
    "</s>",
    "<start_of_turn>",
    "<end_of_image>",
]


def gemma_strings(count, seed):
    """Strings without ``▁``, which tokenizers does not treat as a space although a space is written so."""
    texts = (text.replace("▁", "_") for text in nasty_strings(2 * count, seed, MORE))
    return itertools.islice(texts, count)


# ---------------------------------------------------------------------------- a small vocabulary


@pytest.fixture(scope="module")
def small(corpus):
    """A SentencePiece model with Gemma's settings: no leading space, runs of whitespace as pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        control_symbols=CONTROL[4:],
        user_defined_symbols=[symbol.replace(" ", "▁") for symbol in SPACES],
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_small(small, path, **changes):
    """The model in a GGUF file as llama.cpp writes Gemma's: its unknown piece is a control one."""
    pieces = [small.id_to_piece(i) for i in range(len(small))]
    user = [symbol.replace(" ", "▁") for symbol in SPACES]
    kinds = [
        3 if p in CONTROL else 4 if p in user else 6 if small.is_byte(i) else 1 for i, p in enumerate(pieces)
    ]
    keys = dict(
        model="llama",
        pre="default",
        tokens=[p.replace("▁", " ") if kind == 4 else p for p, kind in zip(pieces, kinds)],
        scores=[-1000.0 if kind in (3, 4) else float(small.get_score(i)) for i, kind in enumerate(kinds)],
        token_type=kinds,
        bos_token_id=2,
        eos_token_id=1,
        unknown_token_id=3,
        padding_token_id=0,
        add_bos_token=True,
        add_space_prefix=False,
    )
    return write_gguf(path, **{key: value for key, value in (keys | changes).items() if value is not None})


def test_gguf_file_equals_the_sentencepiece_model(small, tmp_path):
    ours = load_tokenizer(write_small(small, tmp_path / "small.gguf"))
    assert (ours.bos_id, ours.add_bos, ours.eos_ids) == (2, True, (1, 5))  # <eos> and <end_of_turn>
    assert set(ours.special_tokens) == set(CONTROL)
    for text in nasty_strings(COUNT, seed=41, more=MORE):
        ids = small.encode(text)
        assert ours.encode(text, "text") == ids
        assert ours.decode(ids) == small.decode(ids)
    assert ours.encode("a<end_of_turn>b", "allow") == [*small.encode("a"), 5, *small.encode("b")]
    assert ours.decode_bytes(ours.encode("  x\n\n  é")) == "  x\n\n  é".encode()
    assert ours.with_bos(ours.encode("x")) == [2, *small.encode("x")]


@pytest.mark.parametrize("i", [None, 10**6])
def test_gguf_file_without_an_unknown_token_is_refused(small, tmp_path, i):
    path = write_small(small, tmp_path / "small.gguf", unknown_token_id=i)
    assert "0 unknown tokens instead of one" in message_of(load_tokenizer, path)


# ---------------------------------------------------------------------------- the real files


@pytest.fixture(scope="module")
def gguf():
    path = Path(os.environ.get("TINYLLM_GEMMA3", ""))
    if not path.is_file():
        pytest.skip("TINYLLM_GEMMA3 is not the path of gemma3-270m's GGUF file")
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def folder():
    folder = Path(os.environ.get("TINYLLM_GEMMA3_TOKENIZER", ""))
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("TINYLLM_GEMMA3_TOKENIZER is not a folder with Gemma 3's tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    return load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_vocabularies(gguf, pair):
    json, _ = pair
    assert (gguf.vocab_size, json.vocab_size) == (262_144, 262_145)  # the latter with <image_soft_token>
    assert (gguf.bos_id, gguf.add_bos, json.bos_id, json.add_bos) == (2, True, 2, True)
    assert (gguf.eos_ids, json.eos_ids) == ((1, 106), (106,))
    assert gguf.chat_template is None and json.chat_template.startswith("{{ bos_token }}")
    for tokenizer in (gguf, json):
        assert tokenizer.with_bos(tokenizer.encode("Hello\n\n  world")) == [2, 9259, 108, 138, 12392]

    class Text:
        class config:
            vocab_size = 262_144

    check_fits(gguf, Text)
    check_fits(json, Text, padded=True)


def test_tokenizer_json_equals_tokenizers(pair):
    for text in nasty_strings(max(COUNT, 2_000), seed=42, more=MORE):
        check_same(*pair, text)


def test_gguf_equals_tokenizers(gguf, pair):
    """Both with special tokens, of which GGUF has more: <unused0> and so on."""
    json, reference = pair
    reference.encode_special_tokens = False
    for text in gemma_strings(max(COUNT, 2_000), seed=43):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert gguf.encode(text, "allow") == ids
        assert gguf.decode(ids) == json.decode(ids)
        assert gguf.decode_bytes(ids) == json.decode_bytes(ids)


def test_sentencepiece_model_in_a_folder_equals_tokenizers(gguf, folder, pair, tmp_path):
    """tokenizer.model with tokenizer_config.json, which repeats 6,415 of its tokens."""
    (tmp_path / "tokenizer.model").write_bytes(gguf.processor.serialized_model_proto())
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    ours, (json, reference) = load_tokenizer(tmp_path), pair
    assert (ours.vocab_size, ours.bos_id, ours.add_bos, ours.eos_ids) == (262_145, 2, True, (106,))
    assert ours.chat_template == json.chat_template
    reference.encode_special_tokens = False
    for text in gemma_strings(max(COUNT, 500), seed=44):
        assert ours.encode(text, "allow") == reference.encode(text, add_special_tokens=False).ids


def test_speed(gguf, pair, verdict):
    """20,479 characters: 0.01 to 0.02 s; one id: 0.2 ms in GGUF's, of which 6,249 tokens are special."""
    for tokenizer in (gguf, pair[0]):
        tokenizer.encode(verdict.text)
        started = time.process_time()
        assert tokenizer.decode(tokenizer.encode(verdict.text)) == verdict.text
        for _ in range(100):
            tokenizer.decode_bytes(tokenizer.encode(" cat", "allow"))
        assert time.process_time() - started < 1


# ---------------------------------------------------------------------------- the chat template


@pytest.fixture(scope="module")
def theirs(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " What is 1 + 1?\n"}
ANSWER = {"role": "assistant", "content": "Two.  "}


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER]])
def test_template_equals_transformers(theirs, pair, monkeypatch, messages):
    pytest.importorskip("jinja2")
    render_in_process(monkeypatch)
    ours, _ = pair
    for prompt in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert render_chat(ours.chat_template, messages, prompt, bos_token="<bos>") == expected
        ids = theirs.encode(expected, add_special_tokens=False)
        assert encode_chat(ours, ours.chat_template, messages, prompt) == ids == ours.with_bos(ids)


def test_roles_that_do_not_alternate_are_refused(pair):
    pytest.importorskip("jinja2")
    assert "must alternate" in message_of(render_chat, pair[0].chat_template, [USER, USER])

"""Published tokenizers: strings that have caused errors, and small files of every kind."""

import json
import os

import numpy as np
import pytest
from hypothesis import strategies as st

from tinyllm.errors import Error
from tinyllm.tokenizers.tiktoken import SYMBOLS

SPECIAL = ["<|im_start|>", "<|im_end|>"]
COUNT = int(os.environ.get("TINYLLM_FUZZ", "300"))  # strings per kind; 10,000 in a thorough run

# Strings that have caused errors in tokenizers: runs of spaces and line breaks, digits of other scripts,
# combining marks, right-to-left text, joined emoji, control characters, contractions, lookalikes of special
# tokens.
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


def nasty_strings(count, seed=0, more=()):
    """Strings, half of them joined from the list above and ``more``, half of random characters of a range."""
    parts = [*NASTY, *more]
    rng = np.random.default_rng(seed)
    blocks = [0x80, 0x250, 0x700, 0x3000, 0xD800, 0x10000, 0x20000, 0x110000]
    for _ in range(count // 2):
        yield "".join(parts[i] for i in rng.integers(0, len(parts), rng.integers(1, 12)))
        points = rng.integers(0, rng.choice(blocks), rng.integers(1, 20))
        yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


texts = st.text() | st.lists(st.sampled_from(NASTY), max_size=8).map("".join)


def message_of(call, *args, **kwargs):
    with pytest.raises(Error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def check_same(ours, reference, text):
    """Encoding and decoding equal those of a ``tokenizers.Tokenizer``, with and without special tokens."""
    reference.encode_special_tokens = False
    ids = reference.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, "allow") == ids
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False)
    reference.encode_special_tokens = True
    ids = reference.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, "text") == ids
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False)


def write_gguf(path, **keys):
    """Write a GGUF file without tensors, with these keys after ``tokenizer.``."""
    gguf = pytest.importorskip("gguf")
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
    """Write the vocabulary of a tokenizer.json to a GGUF file."""
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


def a_tokenizer(**changes):
    """The definition of a small byte-level tokenizer.json."""
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


def write_sentencepiece_like(folder, scheme="legacy", config=None):
    """A folder with a small tokenizer.json in the manner of Llama 2, which adds a space in front of a text.

    ``scheme`` says how: "legacy" is the normalizer Prepend, "first", "always" and "never" are Metaspace's.
    <s> and </s> are special, and so is <a>, which absorbs the whitespace around it.
    """
    library = pytest.importorskip("tokenizers")
    normal, decode = library.normalizers, library.decoders
    tokens = ["<unk>", "<s>", "</s>", "<a>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*map(chr, range(33, 127)), "▁", "▁H", "▁Hi", "▁y", "▁▁"]
    merges = [("▁", "H"), ("▁H", "i"), ("▁", "y"), ("▁", "▁")]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    model = library.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    found = library.Tokenizer(model)
    if scheme == "legacy":
        found.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    else:
        found.pre_tokenizer = library.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse(), decode.Strip(" ", 1, 0)]
    found.decoder = decode.Sequence(steps)
    for name in ("<unk>", "<s>", "</s>", "<a>"):
        absorbs = dict.fromkeys(("lstrip", "rstrip"), name == "<a>")
        found.add_special_tokens([library.AddedToken(name, normalized=False, special=True, **absorbs)])
    folder.mkdir(parents=True, exist_ok=True)
    found.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}), encoding="utf-8")
    return folder

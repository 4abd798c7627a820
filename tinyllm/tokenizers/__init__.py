"""Tokenizers: text to token ids and back, with tinyllm's own tokenizers and those of published models.

tinyllm's own are GPT-2's (``tiktoken.py``), a byte-pair encoding trained on a text (``bpe.py``), one id per
byte (the same without merges) and one id per character (``char.py``). A run saves its tokenizer as
``tinyllm_tokenizer.json``.

A published model stores its vocabulary in one of these formats, recognised by the content of the file:

- ``tokenizer.json``, Hugging Face's format, or the older ``vocab.json`` with ``merges.txt`` (GPT-2, Qwen2);
- ``tokenizer.model`` in Llama 3's format: one line per token, its bytes in base64 and its rank;
- ``tokenizer.model`` in Llama 2's format: a SentencePiece model, with a score for every piece;
- a GGUF file, which contains either kind of vocabulary among its keys.

Each is run by the library it was created with, so that the ids are those the model was trained on. ``encode``
adds nothing to a text. A model that was trained on texts that begin with a BOS token needs it before a prompt
too: ``generate(model, [tokenizer.with_bos(tokenizer.encode(prompt))])``.
"""

from __future__ import annotations

import os
from pathlib import Path

from tinyllm.checks import described
from tinyllm.errors import Error
from tinyllm.files import read_file, read_json, read_text
from tinyllm.tokenizers.base import END_OF_TEXT, FILE_NAME, Tokenizer, extend_vocabulary
from tinyllm.tokenizers.bpe import BPETokenizer, train_bpe
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.tokenizers.configs import CHAT_TEMPLATE, check_prefix_space, read_added_tokens, read_configs
from tinyllm.tokenizers.gguf import read_gguf
from tinyllm.tokenizers.huggingface import (
    MERGES,
    TOKENIZER_JSON,
    VOCAB,
    read_tokenizer_json,
    read_vocab_and_merges,
)
from tinyllm.tokenizers.sentencepiece import read_sentencepiece
from tinyllm.tokenizers.tiktoken import BASE64_LINE, gpt2, read_llama3
from tinyllm.weights.gguf_format import MAGIC
from tinyllm.weights.hub import find_model
from tinyllm.weights.pull import KNOWN_MODELS

__all__ = [
    "END_OF_TEXT",
    "BPETokenizer",
    "CharTokenizer",
    "Tokenizer",
    "extend_vocabulary",
    "load_tokenizer",
    "train_bpe",
]

TOKENIZER_MODEL = "tokenizer.model"


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a tokenizer: ``"gpt2"``, ``"bytes"``, or the one in a run's folder, a model's folder or a file.

    ``bytes`` has 256 ids, the bytes in GPT-2's order, and ``<|endoftext|>``. A name takes precedence over a
    folder of that name; write ``./gpt2`` for the folder. The name of a model that was pulled, such as
    ``smollm2``, gives that model's tokenizer.

    For a published model, ``added_tokens.json`` or ``tokenizer_config.json`` may add tokens to the
    vocabulary. The files next to it (``tokenizer_config.json``, ``generation_config.json``, ``config.json``,
    ``chat_template.jinja``; in GGUF, the file's keys) set ``bos_id`` (the id that begins a text, or None),
    ``add_bos`` (whether the model expects it before a text), ``eos_ids`` (a tuple of the ids that end one,
    possibly empty), ``closing_ids`` (those after a text that is classified; usually none),
    ``chat_template`` (or None; see ``chat_template.py``) and ``other_tokens``, the names of tokens that a
    template may use, such as ``pad_token``. The bos token in ``tokenizer_config.json``, even if null, takes
    precedence over the vocabulary's, and that over the model's configs; null does not replace the token that
    a template in ``tokenizer.json`` puts before a text, and another one is an error. ``eos_ids`` combines the
    ids of all files. ``add_bos`` is ``add_bos_token`` in ``tokenizer_config.json`` or the GGUF file, else it
    is true if the template in ``tokenizer.json`` begins with a token, and for ``tokenizer.model`` and
    llama.cpp's Llama vocabularies. ``closing_ids`` are those after the text in that template;
    ``add_eos_token`` adds the first of ``eos_ids``, or removes them.

    Raises ``Error`` if there is no tokenizer, if it is damaged or of an unsupported kind, or if a package is
    not installed.
    """
    if spec == "gpt2":
        return gpt2()
    if spec == "bytes":
        return BPETokenizer([])
    if not isinstance(spec, str | Path):
        raise Error(
            f"the tokenizer is {described(spec)}: give 'gpt2', 'bytes', or the path of a folder or file"
        )
    if spec in KNOWN_MODELS and not os.path.lexists(spec):
        spec = find_model(spec)
    if not os.path.exists(spec):
        raise Error(
            f"no tokenizer {str(spec)!r}: give 'gpt2', 'bytes', a run's or a model's folder, or a tokenizer "
            "file ('char' and 'bpe:VOCAB' are trained on a text by tinyllm train)"
        )
    path = Path(spec)
    file = _find_file(path) if path.is_dir() else path
    read = _read_ours if file.name == FILE_NAME else _reader(file)
    tokenizer = read(file)
    if read in (_read_ours, read_gguf):
        if (file.parent / CHAT_TEMPLATE).exists():  # of a run that chose one
            tokenizer.chat_template = read_text(file.parent / CHAT_TEMPLATE)
        return tokenizer
    tokenizer = tokenizer.with_file_tokens(read_added_tokens(file.parent))
    if read in (read_vocab_and_merges, read_sentencepiece):
        check_prefix_space(tokenizer, file.parent)
    read_configs(tokenizer, file.parent)
    return tokenizer


def _find_file(folder: Path) -> Path:
    for name in (FILE_NAME, TOKENIZER_JSON, TOKENIZER_MODEL, VOCAB):
        if (folder / name).exists():
            return folder / name
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) > 1:
        raise Error(f"{folder} has {len(ggufs)} GGUF files: give the path of one, such as {ggufs[0]}")
    if not ggufs:
        raise Error(
            f"{folder} has no tokenizer ({FILE_NAME}, {TOKENIZER_JSON}, {TOKENIZER_MODEL}, {VOCAB} with "
            f"{MERGES}, or a .gguf file): copy the model's tokenizer into it"
        )
    return ggufs[0]


def _read_ours(file: Path) -> Tokenizer:
    definition = read_json(file)
    try:
        match definition:
            case {"kind": "gpt2"}:
                tokenizer = gpt2()
            case {"kind": "char", "characters": str(characters)}:
                tokenizer = CharTokenizer(characters)
            case {"kind": "bpe", "pattern": str(pattern), "merges": list(merges)}:
                tokenizer = BPETokenizer(merges, pattern)
            case _:
                raise Error(
                    "its kind must be 'bpe' with pattern and merges, 'gpt2', or 'char' with characters"
                )
        added = definition.get("added_tokens", [])  # absent in files of older versions
        return tokenizer if added == [] else tokenizer.with_special_tokens(added)
    except Error as error:
        raise Error(f"{str(file)!r} cannot be loaded: {error}") from None


def _reader(file: Path):
    """The function that reads a published file, chosen by its first line, or by name for GPT-2's pair."""
    if file.name in (VOCAB, MERGES):
        return read_vocab_and_merges
    line = read_file(file, 4096).partition(b"\n")
    start = line[0] + line[1]
    if start.startswith(MAGIC) or file.suffix.lower() == ".gguf":  # says what is wrong with a damaged file
        return read_gguf
    if start.lstrip().startswith(b"{"):
        return read_tokenizer_json
    if BASE64_LINE.fullmatch(start):
        return read_llama3
    if start.startswith(b"\n"):  # the tag of ModelProto's first field, pieces
        return read_sentencepiece
    raise Error(
        f"{file} is not a tokenizer of a known format: give a {TOKENIZER_JSON}, {TOKENIZER_MODEL} or GGUF "
        "file"
    )

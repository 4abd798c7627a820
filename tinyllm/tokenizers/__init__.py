"""How does text become token ids and back?

GPT-2's vocabulary or one of our own (``bpe.py``) through tiktoken, or one id per character. A tokenizer
travels with a run as ``tinyllm_tokenizer.json`` (Hugging Face's ``tokenizer.json`` is another format).

A special token, such as ``<|endoftext|>`` between documents or ``<|user|>`` in a chat, stands for
something that no text says: it has one id, and no merge makes it.
"""

from __future__ import annotations

from pathlib import Path

from tinyllm.errors import Error
from tinyllm.files import check_is_file, read_json
from tinyllm.tokenizers.base import FILE_NAME, Tokenizer
from tinyllm.tokenizers.bpe import BPETokenizer
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.tokenizers.gguf import read_gguf
from tinyllm.tokenizers.huggingface import (
    MERGES,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    VOCAB,
    describe,
    read_tokenizer_json,
    read_vocab_and_merges,
)
from tinyllm.tokenizers.sentencepiece import read_sentencepiece
from tinyllm.tokenizers.tiktoken import BASE64_LINE, gpt2, read_llama3
from tinyllm.weights.gguf import MAGIC


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """A tokenizer by name (``"gpt2"``), or the one in a folder or file.

    A run's folder and ``tinyllm_tokenizer.json`` are ours; any other folder or file is read as a published
    model's (``tokenizer_files.py``). The name wins over a folder of that name; write ``./gpt2`` for the
    folder. Raises ``Error`` if there is no tokenizer, or it is damaged or of an unknown kind.
    """
    if spec == "gpt2":
        return gpt2()
    path = Path(spec)
    file = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        raise Error(
            f"no tokenizer in {str(path)!r}: give 'gpt2', a run's or a model's folder, or a tokenizer file "
            "('char' and 'bpe:VOCAB' are made from a text, by tinyllm train)"
        )
    if not file.exists() or file.name != FILE_NAME:
        from tinyllm.tokenizers import read_tokenizer

        return read_tokenizer(path)
    definition = read_json(file)
    try:
        return _from_json(definition)
    except Error as error:
        raise Error(f"{str(file)!r} cannot be loaded: {error}") from None


def _from_json(definition: dict) -> Tokenizer:
    match definition:
        case {"kind": "gpt2"}:
            tokenizer = gpt2()
        case {"kind": "char", "characters": str(characters)}:
            tokenizer = CharTokenizer(characters)
        case {"kind": "bpe", "pattern": str(pattern), "merges": list(merges)}:
            tokenizer = BPETokenizer(merges, pattern)
        case _:
            raise Error(
                "its kind is no tokenizer known here: it must be 'bpe' with a pattern and merges, 'gpt2' or "
                "'char' with characters"
            )
    added = definition.get("added_tokens", [])  # files from before there were any have none
    return tokenizer if added == [] else tokenizer.with_special_tokens(added)


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder, or in one of the files named above.

    Besides what every ``Tokenizer`` has, it knows from the files beside it (``tokenizer_config.json``,
    ``generation_config.json``, ``config.json``, ``chat_template.jinja``; or from the GGUF's keys)
    ``bos_id`` (the id that begins a text, or None), ``eos_ids`` (a tuple of the ids that end one, maybe
    empty) and ``chat_template`` (or None, see ``chat.py``). Where ``tokenizer_config.json`` names a bos
    token or says there is none, that counts; ids that end a text are gathered from all of them.

    Raises ``Error`` if nothing of the kind is there, the file is damaged or of a kind that would be read
    wrongly, or a package is not installed.
    """
    path = Path(path)
    file = _find_file(path) if path.is_dir() else path
    kind = _kind(file)
    if kind == "gguf":
        return read_gguf(file)
    tokenizer = {
        "json": read_tokenizer_json,
        "pair": read_vocab_and_merges,
        "tiktoken": read_llama3,
        "sentencepiece": read_sentencepiece,
    }[kind](file)
    describe(tokenizer, file.parent)
    return tokenizer


def _find_file(folder: Path) -> Path:
    for name in (TOKENIZER_JSON, TOKENIZER_MODEL, VOCAB):
        if (folder / name).exists():
            return folder / name
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) > 1:
        raise Error(f"{folder} holds {len(ggufs)} GGUF files: name the one to take, {ggufs[0].name}, say")
    if not ggufs:
        raise Error(
            f"{folder} holds no tokenizer ({TOKENIZER_JSON}, {TOKENIZER_MODEL}, {VOCAB} with {MERGES}, or a "
            ".gguf file): copy the model's one into it"
        )
    return ggufs[0]


def _kind(file: Path) -> str:
    """Which of the five shapes a file has, from its first line; only GPT-2's pair goes by its names."""
    if file.name in (VOCAB, MERGES):
        return "pair"
    try:
        check_is_file(file)
        with open(file, "rb") as opened:
            start = opened.readline(4096)
    except OSError as error:
        raise Error(f"{file} cannot be read ({error.strerror}): check the path") from error
    if start.startswith(MAGIC):
        return "gguf"
    if start.lstrip().startswith(b"{"):
        return "json"
    if BASE64_LINE.fullmatch(start):
        return "tiktoken"
    if start.startswith(b"\n"):  # the tag of ModelProto's first field, the pieces
        return "sentencepiece"
    raise Error(
        f"{file} is no tokenizer known here: give a {TOKENIZER_JSON}, Llama's {TOKENIZER_MODEL} or a GGUF"
    )

"""Text to token ids and back: tokenizers of our own and those of published models.

Ours are GPT-2's (``tiktoken.py``), a byte-pair encoding trained on a text (``bpe.py``) and one id per
character (``char.py``). They travel with a run as ``tinyllm_tokenizer.json``.

A published model brings its vocabulary in one of five shapes, told apart by what is inside the file:

- ``tokenizer.json``, Hugging Face's own description, or GPT-2's older ``vocab.json`` with ``merges.txt``;
- ``tokenizer.model`` as Llama 3 has it: one line per token, its bytes in base64 and its rank;
- ``tokenizer.model`` as Llama 2 has it: a SentencePiece model, with a score for every piece;
- a GGUF file, which holds either kind of vocabulary among its keys.

Each goes to the library that it was made with, so that the ids are the ones the model was trained on.
Nothing is added to a text: a model's first token, ``bos_id``, is for the caller to put in front.
"""

from __future__ import annotations

from pathlib import Path

from tinyllm.errors import Error
from tinyllm.files import read_file, read_json
from tinyllm.tokenizers.base import END_OF_TEXT, FILE_NAME, Tokenizer, extend_vocabulary
from tinyllm.tokenizers.bpe import BPETokenizer, train_bpe
from tinyllm.tokenizers.char import CharTokenizer
from tinyllm.tokenizers.gguf import read_gguf
from tinyllm.tokenizers.huggingface import (
    MERGES,
    TOKENIZER_JSON,
    VOCAB,
    read_configs,
    read_tokenizer_json,
    read_vocab_and_merges,
)
from tinyllm.tokenizers.sentencepiece import read_sentencepiece
from tinyllm.tokenizers.tiktoken import BASE64_LINE, gpt2, read_llama3
from tinyllm.weights.gguf_format import MAGIC

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
    """A tokenizer by name (``"gpt2"``), or the one in a run's folder, a model's folder or a file.

    The name wins over a folder of that name; write ``./gpt2`` for the folder.

    Besides what every ``Tokenizer`` has, a published one knows from the files beside it
    (``tokenizer_config.json``, ``generation_config.json``, ``config.json``, ``chat_template.jinja``; or from
    the GGUF's keys) ``bos_id`` (the id that begins a text, or None), ``eos_ids`` (a tuple of the ids that
    end one, maybe empty) and ``chat_template`` (or None, see ``chat_template.py``). Where
    ``tokenizer_config.json`` names a bos token or says there is none, that counts; ids that end a text are
    gathered from all of them.

    Raises ``Error`` if there is no tokenizer, it is damaged or of a kind that is unknown or would be read
    wrongly, or a package is not installed.
    """
    if spec == "gpt2":
        return gpt2()
    path = Path(spec)
    if not path.exists():
        raise Error(
            f"no tokenizer in {str(path)!r}: give 'gpt2', a run's or a model's folder, or a tokenizer file "
            "('char' and 'bpe:VOCAB' are made from a text, by tinyllm train)"
        )
    file = _find_file(path) if path.is_dir() else path
    if file.name == FILE_NAME:
        return _read_ours(file)
    read = _reader(file)
    tokenizer = read(file)
    if read is not read_gguf:
        read_configs(tokenizer, file.parent)
    return tokenizer


def _find_file(folder: Path) -> Path:
    for name in (FILE_NAME, TOKENIZER_JSON, TOKENIZER_MODEL, VOCAB):
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
                raise Error("it must be 'bpe' with a pattern and merges, 'gpt2' or 'char' with characters")
        added = definition.get("added_tokens", [])  # files from before there were any have none
        return tokenizer if added == [] else tokenizer.with_special_tokens(added)
    except Error as error:
        raise Error(f"{str(file)!r} cannot be loaded: {error}") from None


def _reader(file: Path):
    """The function that reads a published file, by its first line; only GPT-2's pair goes by its names."""
    if file.name in (VOCAB, MERGES):
        return read_vocab_and_merges
    line = read_file(file, 4096).partition(b"\n")
    start = line[0] + line[1]
    if start.startswith(MAGIC):
        return read_gguf
    if start.lstrip().startswith(b"{"):
        return read_tokenizer_json
    if BASE64_LINE.fullmatch(start):
        return read_llama3
    if start.startswith(b"\n"):  # the tag of ModelProto's first field, the pieces
        return read_sentencepiece
    raise Error(f"{file} is not a known tokenizer: give a {TOKENIZER_JSON}, {TOKENIZER_MODEL} or GGUF file")

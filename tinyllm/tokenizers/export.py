"""A tokenizer as an object of Hugging Face's library, and as files for ``transformers.AutoTokenizer``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllm.errors import Error
from tinyllm.files import write_whole
from tinyllm.tokenizers.base import END_OF_TEXT, Tokenizer, require
from tinyllm.tokenizers.configs import CHAT_TEMPLATE, GENERATION_CONFIG
from tinyllm.tokenizers.huggingface import TOKENIZER_JSON, TokenizersTokenizer, build_byte_level
from tinyllm.tokenizers.pieces import pieces_of
from tinyllm.tokenizers.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceTokenizer,
)
from tinyllm.tokenizers.tiktoken import (
    BYTE_OF,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    TiktokenTokenizer,
    merges_of,
)

if TYPE_CHECKING:
    import tokenizers

SYMBOL_OF = {byte: symbol for symbol, byte in BYTE_OF.items()}
NAMES = {GPT2_PATTERN: "gpt-2", LLAMA3_PATTERN: "llama-bpe"}  # llama.cpp's names of a pattern


def library_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as an object of the library tokenizers that gives the same ids.

    It begins a text with BOS if ``add_bos`` is true. Raises ``Error`` if there is none: a character tokenizer
    has no form in other programs' formats.
    """
    match tokenizer:
        case TokenizersTokenizer():
            found = type(tokenizer.tokenizer).from_str(tokenizer.tokenizer.to_str())
        case TiktokenTokenizer():
            found = _of_tiktoken(tokenizer)
        case SentencePieceTokenizer():
            found = _of_sentencepiece(tokenizer)
        case _:
            raise Error(
                f"the tokenizer {tokenizer.name} has no form that other programs read: train with "
                "--tokenizer gpt2 or bpe:VOCAB"
            )
    found.no_truncation()
    found.no_padding()
    processors = require("tokenizers").processors
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        template, name = processors.TemplateProcessing(), _name_of(tokenizer, found, tokenizer.bos_id)
        template.__setstate__(json.dumps(_bos_and_text(name, tokenizer.bos_id)).encode())
        found.post_processor = template
    elif found.post_processor is not None:
        found.post_processor = processors.ByteLevel(trim_offsets=False)  # adds nothing
    return found


def _name_of(tokenizer: Tokenizer, found: tokenizers.Tokenizer, i: int) -> str:
    """A token's name; the library gives that of a special token as its normalizer changes it, as ▁<s>."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return names.get(i) or found.id_to_token(i)


def _bos_and_text(name: str, i: int) -> dict:
    """The state of a post-processor: a template written as "<s> $A" takes no name with a space or a colon."""
    texts = [{"Sequence": {"id": letter, "type_id": kind}} for kind, letter in enumerate("AB")]
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]}}
    single = [bos, texts[0]]
    return {"type": "TemplateProcessing", "single": single, "pair": texts, "special_tokens": tokens}


def _of_tiktoken(tokenizer: TiktokenTokenizer) -> tokenizers.Tokenizer:
    """Byte-level BPE: tokens in byte symbols, and the merges that the ranks imply."""
    library, ranks = require("tokenizers"), tokenizer.encoding._mergeable_ranks
    pattern = tokenizer.encoding._pat_str
    if pattern not in NAMES:
        raise Error(
            f"the pattern {pattern!r} of the tokenizer {tokenizer.name} has no name in other programs"
        )
    symbols = {token: "".join(SYMBOL_OF[byte] for byte in token) for token in ranks}
    vocabulary = {symbols[token]: i for token, i in ranks.items()} | tokenizer.special_tokens
    merges = [f"{symbols[left]} {symbols[right]}" for left, right in merges_of(ranks)]
    found = build_byte_level(Path(tokenizer.name), vocabulary, merges, NAMES[pattern])
    names = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.get)
    found.add_tokens([library.AddedToken(name, normalized=False, special=True) for name in names])
    return found


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """A SentencePiece model as BPE over characters: a pair is merged in the order of the result's score."""
    library, pieces = require("tokenizers"), pieces_of(tokenizer)
    vocabulary = {text: i for i, text in enumerate(pieces.tokens)}
    scores = {pieces.tokens[i]: pieces.scores[i] for i in pieces.ids_of(NORMAL)}
    splits = (
        (-score, vocabulary[text[:i]], text[:i], text[i:])
        for text, score in scores.items()
        for i in range(1, len(text))
        if text[:i] in scores and text[i:] in scores
    )
    pairs = [(left, right) for *_, left, right in sorted(splits)]
    unknown, fallback = pieces.tokens[pieces.ids_of(UNKNOWN)[0]], bool(pieces.ids_of(BYTE))
    model = library.models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    found, normal = library.Tokenizer(model), library.normalizers
    replace = [normal.Replace(" ", "▁")]
    found.normalizer = normal.Sequence([normal.Prepend("▁")] * pieces.add_space_prefix + replace)
    found.decoder = sentencepiece_decoder(pieces.add_space_prefix)
    # Pieces such as ▁▁ are searched in the text with its spaces replaced, special tokens in the text itself.
    for special, kinds in ((True, (UNKNOWN, CONTROL)), (False, (USER_DEFINED,))):
        names = [pieces.tokens[i] for i in pieces.ids_of(*kinds)]
        flags = {"special": special, "normalized": not special and not pieces.add_space_prefix}
        found.add_tokens([library.AddedToken(name, **flags) for name in names])
    return found


def sentencepiece_decoder(space_prefix: bool) -> tokenizers.decoders.Decoder:
    """One of ``SENTENCEPIECE_DECODERS``."""
    decoders = require("tokenizers").decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * space_prefix)


def ends_of_text(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text: ``eos_ids``, or ``<|endoftext|>``, which separates a run's documents."""
    end = tokenizer.special_tokens.get(END_OF_TEXT)
    return tokenizer.eos_ids or (() if end is None else (end,))


def save_for_transformers(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write the files from which ``transformers.AutoTokenizer`` loads the tokenizer into a folder.

    They are ``tokenizer.json``, the whole tokenizer; ``tokenizer_config.json``, which names its special
    tokens; ``generation_config.json`` with the ids that end a text; and ``chat_template.jinja`` if there is a
    template. ``context`` is the maximum length. Raises ``Error`` as ``library_tokenizer`` does.
    """
    found, ends = library_tokenizer(tokenizer), ends_of_text(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one that reads nothing but tokenizer.json
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "bos_token": None if tokenizer.bos_id is None else _name_of(tokenizer, found, tokenizer.bos_id),
        "eos_token": _name_of(tokenizer, found, ends[0]) if ends else None,
        "unk_token": found.model.unk_token,
    }
    config = {**tokenizer.other_tokens} | {name: x for name, x in config.items() if x is not None}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(ends)}
    files = {
        TOKENIZER_JSON: found.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        GENERATION_CONFIG: json.dumps({name: i for name, i in ids.items() if i not in (None, [])}),
    }
    for name, text in files.items():
        write_whole(folder / name, f"{text}\n".encode())
    if tokenizer.chat_template is not None:
        write_whole(folder / CHAT_TEMPLATE, tokenizer.chat_template.encode())

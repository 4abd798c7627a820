"""The text of ``tinyllm train``: what a run reads, its tokenizer, and its training and validation windows."""

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tinyllm.data.batches import Windows
from tinyllm.data.corpus import (
    Corpus,
    count_bytes,
    encode_documents,
    has_json_lines,
    is_folder,
    open_corpus,
    splits,
    train_validation_split,
)
from tinyllm.data.token_file import tokenize_corpus
from tinyllm.data.unseen import without_paragraphs_of
from tinyllm.errors import Error
from tinyllm.tokenizers import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer, train_bpe
from tinyllm.tokenizers.bpe import parse_bpe
from tinyllm.training.config import TrainConfig
from tinyllm.training.output import say
from tinyllm.training.start import is_ours

BPE_CHARACTERS = 10_000_000  # learn the vocabulary of a larger text from a sample of this size

VALIDATION_FRACTION = 0.1

SHORTEST_CONTEXT = 8  # that is worth suggesting


@dataclass(frozen=True)
class SecondText:
    """A text that shares no paragraph with the text of the run."""

    name: str
    text: bytes
    windows: Windows
    bytes_per_token: float


@dataclass(frozen=True)
class Data:
    """The data of a run: its text, its tokenizer, and the windows of both parts."""

    corpus: Corpus
    tokenizer: Tokenizer
    prompt: str
    prompt_ids: list[int]
    train: Windows
    validation: Windows
    bytes_per_token: float  # of the validation text: losses per byte compare across tokenizers
    texts: tuple[bytes, bytes] | None  # both parts, unless the text is too large for memory
    second: SecondText | None


def load_data(
    config: TrainConfig, tokenizer: Tokenizer | None = None, text_sha256: str | None = None
) -> Data:
    """Read the text, learn or load a tokenizer, encode the text, and cut it into windows: 90% for training.

    A text of at most ``config.in_memory`` MB is split by characters. A larger one is encoded into a file of
    tokens, which is split between two of its chunks. For a resumed run, give its ``tokenizer`` and the hash
    of its text. Raises ``Error`` if the text has changed, is too short or cannot be encoded.
    """
    corpus = _open_text(config, config.text, config.second_text)
    if text_sha256 not in (None, corpus.sha256):
        raise Error(
            f"the text {corpus.name} is not the one that the run was started with (its SHA-256 is "
            f"{corpus.sha256[:8]}…, not {text_sha256[:8]}…): give that one with --text, or start a new run"
        )
    if corpus.left_out:
        say(f"{corpus.name}: {len(corpus.left_out):,} other files and links to folders were not read")
    large = corpus.num_bytes > config.in_memory * 10**6
    if large:
        _check_large(config, corpus, tokenizer)
    # A learned tokenizer has <|endoftext|>.
    split = config.special == "allow" if tokenizer is None else splits(tokenizer, config.special)
    documents = [] if large else [*corpus.documents(split)]
    parts = [] if large else train_validation_split(documents, VALIDATION_FRACTION)
    texts = None if large else tuple("".join(part).encode("utf-8") for part in parts)
    if not large and _is_learned(config):  # not more tokens than bytes, and one between documents
        _check_length(config, corpus, parts, len(texts[1]) + len(parts[1]) - 1, "bytes")
    tokenizer = tokenizer or _learn_tokenizer(config, corpus, *parts)
    prompt = _default_prompt(corpus, split) if config.prompt is None else config.prompt
    prompt_ids = encode_prompt(config, tokenizer, prompt)
    if large:
        train, validation, validation_bytes = _tokenized(config, corpus, tokenizer)
    else:
        _check_special(config, corpus, tokenizer, [*parts[0], *parts[1]])
        train, validation = (encode_documents(tokenizer, part, config.special) for part in parts)
        validation_bytes = count_bytes(tokenizer, parts[1], config.special)
    _check_length(config, corpus, parts, len(validation), "tokens")
    if validation_bytes == 0:
        raise Error(
            f"the last tenth of the text {corpus.name}, for validation, has nothing but special tokens: "
            "use a text with words at its end"
        )
    bytes_per_token = validation_bytes / len(validation)
    train = Windows(train, config.context, config.stride or max(1, config.context // 4))
    validation = Windows(validation, config.context)
    second = _second_text(config, tokenizer, documents)
    return Data(corpus, tokenizer, prompt, prompt_ids, train, validation, bytes_per_token, texts, second)


def _check_large(config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer | None) -> None:
    """Raise ``Error`` for an option that needs the whole text in memory."""
    if config.tokenizer == "char" or (tokenizer is not None and not is_ours(tokenizer)):
        raise Error(
            f"{corpus.name} has {corpus.num_bytes / 10**6:,.0f} MB, too much for the tokenizer "
            f"{config.tokenizer}: choose bpe:VOCAB or gpt2, or a larger --in-memory"
        )
    if config.second_text is not None:
        raise Error(
            f"--second-text {config.second_text}: the paragraphs of {corpus.name}, which is larger than "
            f"{config.in_memory} MB, cannot be compared with it: omit it, or choose a larger --in-memory"
        )


def _tokenized(config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer) -> tuple:
    """The ids of a text in a token file, split; a new file that cannot be split is removed."""
    default = Path(f"{corpus.name.rstrip('/')}.{tokenizer.name.replace(':', '-')}.tokens")
    folder = config.tokens or default
    existed = folder.exists()
    tokens = tokenize_corpus(corpus, tokenizer, config.special, folder)
    try:
        return tokens.split(VALIDATION_FRACTION)
    except Error:
        if not existed:
            shutil.rmtree(folder)
        raise _too_short_for_a_file(corpus) from None


def _too_short_for_a_file(corpus: Corpus) -> Error:
    return Error(
        f"the text {corpus.name} is too short for a token file, of which no chunk is in the last tenth: "
        f"choose --in-memory {math.ceil(corpus.num_bytes / 10**6)} or more"
    )


def _second_text(config: TrainConfig, tokenizer: Tokenizer, known: list[str]) -> SecondText | None:
    """The text of ``config.second_text``, without the paragraphs of the ``known`` documents."""
    name = config.second_text
    try:
        if name is not None:
            return _without(known, config, name, tokenizer)
        if config.text == "python-docs" and known:
            return _without(known, config, "python-docstrings", tokenizer)
    except Error as error:
        if name is not None:
            raise Error(f"--second-text {name}: {error}") from None
        say(f"no second text is evaluated: {error}")
    return None


def _without(known: list[str], config: TrainConfig, name: str, tokenizer: Tokenizer) -> SecondText:
    corpus = _open_text(config, name, config.text)
    split = splits(tokenizer, config.special)
    documents = [*without_paragraphs_of(corpus.documents(split), known)]
    _check_special(config, corpus, tokenizer, documents)
    num_bytes = count_bytes(tokenizer, documents, config.special)
    if num_bytes == 0:
        raise Error(f"no paragraph of it with words is not in {config.text} too: give another text")
    windows = Windows(encode_documents(tokenizer, documents, config.special), config.context, name=name)
    return SecondText(name, "".join(documents).encode(), windows, num_bytes / len(windows.tokens))


def _open_text(config: TrainConfig, name: str, other: str | None) -> Corpus:
    """One of the run's two texts. An option that only the ``other`` can have is not for this one."""
    patterns = {text: config.pattern if is_folder(text) else None for text in (name, other) if text}
    field, pattern = config.text_field, patterns[name] if any(patterns.values()) else config.pattern
    with naming_options():
        if field is not None and not has_json_lines(name, pattern):
            field = None if other and has_json_lines(other, patterns[other]) else field
        return open_corpus(name, field, pattern)


@contextmanager
def naming_options() -> Iterator[None]:
    """Within this context, what ``open_corpus`` raises names the options."""
    try:
        yield
    except Error as error:
        for word, option in (("field", "--text-field"), ("pattern", "--pattern")):
            if re.search(rf"\b{word}\b", str(error)):
                raise Error(f"{error} (option {option})") from None
        raise


def _check_length(config: TrainConfig, corpus: Corpus, parts: list, size: int, unit: str) -> None:
    if size <= config.context:
        raise Error(
            f"the text {corpus.name} is too short: its last tenth, for validation, has {size} {unit}, and a "
            f"window of --context {config.context} needs {config.context + 1} tokens: use a longer text"
            + _options_for_short(config, parts, size)
        )


def _options_for_short(config: TrainConfig, parts: list, size: int = 0) -> str:
    """Options with which a short text can be trained on, if there are any."""
    learned = _is_learned(config)
    if learned and parts:
        size = sum(map(len, parts[1])) + len(parts[1]) - 1  # with the tokenizer char
    context = min(config.context, 1 << max(size - 1, 1).bit_length() - 1)
    options = "--tokenizer char " * (learned and config.tokenizer != "char")
    if context < config.context:
        options += f"--context {context}"
    return f", or {options.strip()}" if context >= SHORTEST_CONTEXT else ""


def _check_special(config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer, documents: list[str]) -> None:
    if config.special != "refuse":
        return
    for document in documents:
        for found in tokenizer.find_special(document):
            raise Error(
                f"the text {corpus.name} contains the special token {found[0]!r}: give --special allow to "
                "encode it as its id, or --special text to encode it as ordinary text"
            )


def _is_learned(config: TrainConfig) -> bool:
    return config.tokenizer == "char" or config.tokenizer.startswith("bpe:")


def named_tokenizer(config: TrainConfig) -> Tokenizer | None:
    """The tokenizer that ``config`` names; None for one that is learned from the text."""
    if config.tokenizer.startswith("bpe:"):
        parse_bpe(config.tokenizer)
    if _is_learned(config):
        return None
    tokenizer = load_tokenizer(config.tokenizer)
    if config.special_tokens and not is_ours(tokenizer):
        raise Error(f"--special-tokens cannot be added to the published tokenizer {tokenizer.name}: omit it")
    return tokenizer.with_special_tokens(config.special_tokens)


def _learn_tokenizer(config: TrainConfig, corpus: Corpus, train=(), validation=()) -> Tokenizer:
    """The tokenizer that ``config`` names; a BPE of the training part only, so that validation is unseen."""
    if (loaded := named_tokenizer(config)) is not None:
        return loaded
    if config.tokenizer == "char":
        tokenizer = CharTokenizer.from_text("".join([*train, *validation]))
        if max(corpus.num_documents, len(train), len(validation)) > 1:
            tokenizer = tokenizer.with_special_tokens([END_OF_TEXT])  # to separate them
    else:
        try:
            sample = train or corpus.sample(BPE_CHARACTERS, VALIDATION_FRACTION, config.special == "allow")
        except Error as error:
            raise _too_short_for_a_file(corpus) if "too few to sample" in str(error) else error from None
        try:
            tokenizer = BPETokenizer(train_bpe(sample, parse_bpe(config.tokenizer)))
        except Error as error:
            most = re.search(r"a vocab_size of at most (\d+)", str(error))
            if most is None:
                raise Error(f"--tokenizer {config.tokenizer}: {error}") from None
            raise Error(
                f"the text {corpus.name} is too short for --tokenizer {config.tokenizer} (bpe:{most[1]} at "
                f"most): use a longer text{_options_for_short(config, [train, validation])}"
            ) from None
    return tokenizer.with_special_tokens(config.special_tokens)


def _default_prompt(corpus: Corpus, split: bool) -> str:
    """The if it occurs at the beginning of the text, else the first word (of at most ten characters)."""
    first = next(piece.text for piece in corpus.pieces(split) if piece.text.strip())
    return "The" if "The" in first else first.split()[0][:10]


def encode_prompt(config: TrainConfig, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of the prompt; a default one is cut to the context."""
    if config.prompt is None:
        return tokenizer.encode(prompt, config.special)[: config.context]
    try:
        ids = tokenizer.encode(prompt)
    except Error as error:
        raise Error(f"--prompt: {error}") from None
    if not 0 < len(ids) <= config.context:
        raise Error(f"--prompt is {len(ids)} tokens long: it must have 1 to {config.context} (--context)")
    return ids

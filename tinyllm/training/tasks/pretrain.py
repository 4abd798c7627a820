"""The task of ``tinyllm train``: a model learns to predict the next token of a text."""

import math
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.backend import distributed
from tinyllm.backend.memory import keep_memory
from tinyllm.data.batches import Batches, Windows
from tinyllm.data.corpus import (
    Corpus,
    count_bytes,
    encode_documents,
    open_corpus,
    splits,
    train_validation_split,
)
from tinyllm.data.token_file import tokenize_corpus
from tinyllm.errors import Error
from tinyllm.inference.generate import generate
from tinyllm.nn import Module, initialize_as_torch
from tinyllm.optim import NoLossScale
from tinyllm.tokenizers import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer, train_bpe
from tinyllm.tokenizers.base import check_fits
from tinyllm.tokenizers.bpe import parse_bpe
from tinyllm.training import baselines
from tinyllm.training.config import TrainConfig, check_writable
from tinyllm.training.data_parallel import Replicas
from tinyllm.training.loggers import Log, number, say
from tinyllm.training.run import make_optimizer, open_run_device, run_task
from tinyllm.training.shared_run import in_turn
from tinyllm.training.start import (
    check_architecture,
    check_start,
    describe_start,
    hash_tokenizer,
    is_ours,
    save_tokenizer,
    starting_model,
)
from tinyllm.training.step import Alone, Check, accumulate_gradients, count_targets, do_nothing, evaluate
from tinyllm.training.tasks.base import Task
from tinyllm.weights.runs import checkpoints

SAMPLE_TOKENS, FEWEST_SAMPLE_TOKENS = 50, 10

# A generated token takes as long as this many in a batch (measured: 14 to 108, depending on the shapes).
BATCHED_TOKENS_PER_GENERATED = 64

BPE_CHARACTERS = 10_000_000  # learn the vocabulary of a larger text from a sample of this size

VALIDATION_FRACTION = 0.1

SHORTEST_CONTEXT = 8  # that is worth suggesting


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


def load_data(
    config: TrainConfig, tokenizer: Tokenizer | None = None, text_sha256: str | None = None
) -> Data:
    """Read the text, learn or load a tokenizer, encode the text, and cut it into windows: 90% for training.

    A text of at most ``config.in_memory`` MB is split by characters. A larger one is encoded into a file of
    tokens, which is split between two of its chunks. For a resumed run, give its ``tokenizer`` and the hash
    of its text. Raises ``Error`` if the text has changed, is too short or cannot be encoded.
    """
    corpus = _open_text(config)
    if text_sha256 not in (None, corpus.sha256):
        raise Error(
            f"the text {corpus.name} is not the one that the run was started with (its SHA-256 is "
            f"{corpus.sha256[:8]}…, not {text_sha256[:8]}…): give that one with --text, or start a new run"
        )
    if corpus.left_out:
        say(f"{corpus.name}: {len(corpus.left_out):,} other files and links to folders were not read")
    large = corpus.num_bytes > config.in_memory * 10**6
    if large and (config.tokenizer == "char" or (tokenizer is not None and not is_ours(tokenizer))):
        raise Error(
            f"{corpus.name} has {corpus.num_bytes / 10**6:,.0f} MB, too much for the tokenizer "
            f"{config.tokenizer}: choose bpe:VOCAB or gpt2, or a larger --in-memory"
        )
    # A learned tokenizer has <|endoftext|>.
    split = config.special == "allow" if tokenizer is None else splits(tokenizer, config.special)
    parts = [] if large else train_validation_split(corpus.documents(split), VALIDATION_FRACTION)
    texts = None if large else tuple("".join(part).encode("utf-8") for part in parts)
    if not large and _is_learned(config):  # not more tokens than bytes, and one between documents
        _check_length(config, corpus, parts, len(texts[1]) + len(parts[1]) - 1, "bytes")
    tokenizer = tokenizer or _learn_tokenizer(config, corpus, *parts)
    prompt = _default_prompt(corpus, split) if config.prompt is None else config.prompt
    prompt_ids = _encode_prompt(config, tokenizer, prompt)
    if large:
        default = Path(f"{corpus.name.rstrip('/')}.{tokenizer.name.replace(':', '-')}.tokens")
        tokens = tokenize_corpus(corpus, tokenizer, config.special, config.tokens or default)
        train, validation, validation_bytes = tokens.split(VALIDATION_FRACTION)
    else:
        _check_special(config, corpus, tokenizer, [*parts[0], *parts[1]])
        train, validation = (encode_documents(tokenizer, part, config.special) for part in parts)
        validation_bytes = count_bytes(tokenizer, parts[1], config.special)
    _check_length(config, corpus, parts, len(validation), "tokens")
    bytes_per_token = validation_bytes / len(validation)
    train = Windows(train, config.context, config.stride or max(1, config.context // 4))
    validation = Windows(validation, config.context)
    return Data(corpus, tokenizer, prompt, prompt_ids, train, validation, bytes_per_token, texts)


def _open_text(config: TrainConfig) -> Corpus:
    try:
        return open_corpus(config.text, config.text_field, config.pattern)
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


def _load_tokenizer(config: TrainConfig) -> Tokenizer | None:
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
    if (loaded := _load_tokenizer(config)) is not None:
        return loaded
    if config.tokenizer == "char":
        tokenizer = CharTokenizer.from_text("".join([*train, *validation]))
        if max(corpus.num_documents, len(train), len(validation)) > 1:
            tokenizer = tokenizer.with_special_tokens([END_OF_TEXT])  # to separate them
    else:
        sample = train or corpus.sample(BPE_CHARACTERS, VALIDATION_FRACTION, config.special == "allow")
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


def _encode_prompt(config: TrainConfig, tokenizer: Tokenizer, prompt: str) -> list[int]:
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


def train(config: TrainConfig, progress: bool = True, callback: Log | None = None) -> Module:
    """Train a model on a text as ``config`` describes; see ``run_task``."""
    return run_task(Pretraining(config), progress, callback)


class Pretraining(Task):
    """Next-token prediction on windows of a text; a sample continues ``config.prompt``."""

    rows = "windows"
    tokenizer: Tokenizer | None = None  # if it is loaded, not learned
    start: dict | None = None  # the source of the first weights, for config.json

    @property
    def name(self) -> str:
        return Path(os.path.abspath(self.config.text)).stem or self.config.task

    def check(self) -> None:
        config = self.config
        model = None if config.start_from is None else check_architecture(config)
        if config.tokens is not None:
            check_writable(config.tokens, "--tokens")
        if config.prompt == "":
            raise Error("--prompt is empty: give at least one character, or omit it")
        self.tokenizer = _load_tokenizer(config)
        if model is not None:
            check_fits(self.tokenizer, model, padded=True)
        if self.tokenizer is not None and config.prompt is not None:
            _encode_prompt(config, self.tokenizer, config.prompt)

    def load(self, folder: Path, about: dict) -> None:
        config, text_sha256 = self.config, None
        self.place, self.checkpoint = config.tokenizer, None
        if about:
            self.place, self.start = folder, about.get("start")
            self.checkpoint = next(reversed(checkpoints(folder)), None)
            self.tokenizer, text_sha256 = load_tokenizer(folder), about["text"]["sha256"]
            if hash_tokenizer(self.tokenizer, folder) != about["tokenizer"]["sha256"]:
                raise Error(f"the tokenizer in {folder} changed since the run was started: copy it back")
        self.text = load_data(config, self.tokenizer, text_sha256)
        self.batches = Batches(self.text.train, config.batch, config.seed)
        self.steps_per_epoch, self.batch_at = self.batches.steps_per_epoch, self.batches.at

    def model(self) -> Module:
        config, tokenizer = self.config, self.text.tokenizer
        if config.start_from is not None:
            return self._starting_model().train()
        rng = np.random.default_rng(config.seed)
        model = config.model(tokenizer.vocab_size, rng)
        if config.init == "torch":
            initialize_as_torch(model, rng)
        return model.astype(config.parameter_dtype).train()

    def _starting_model(self) -> Module:
        model = starting_model(self.config, self.checkpoint)
        if self.checkpoint is None:
            found = describe_start(self.config.start_from, model)
            check_start(found, self.start)
            self.start = found
        return model

    def _windows_to_evaluate(self, final: bool) -> int:
        """The most windows of each part: before the end, no more than are trained on in between.

        A training step costs about three forward passes: two for both parts, and one for the sample.
        """
        most, trained = self.config.eval_windows, self.eval_every * self.config.batch
        return most if final else min(most, trained)

    def _evaluated(self, final: bool) -> str:
        most = self._windows_to_evaluate(final)
        train, validation = (min(most, len(part)) for part in (self.text.train, self.text.validation))
        return f"{train:,} training and {validation:,} validation windows"

    def evaluate(self, model: Module, check: Check, final: bool) -> dict[str, float]:
        """Both losses, each of a fixed set of windows."""
        most, found = self._windows_to_evaluate(final), {}
        for key, windows in (("train_eval_loss", self.text.train), ("val_loss", self.text.validation)):
            found[key] = mean_loss(model, windows, most, self.config.at_once, check)
        found["val_bits_per_byte"] = found["val_loss"] / math.log(2) / self.text.bytes_per_token
        return found

    def sample(self, model: Module, step: int, check: Check, final: bool) -> str:
        config, prompt = self.config, self.text.prompt_ids
        trained = self.eval_every * config.batch * config.context
        length = max(FEWEST_SAMPLE_TOKENS, trained // BATCHED_TOKENS_PER_GENERATED)
        length = SAMPLE_TOKENS if final else min(SAMPLE_TOKENS, length)
        rng, ids = np.random.default_rng([config.seed, step]), list(prompt)
        unused = self.text.tokenizer.unused_ids(model.config.vocab_size)
        for token in generate(model, [prompt], length, 0.8, top_k=40, rng=rng, suppress_ids=unused):
            check()
            ids.append(int(token[0]))
        return self.text.tokenizer.decode(ids)

    def data(self) -> dict[str, dict]:
        corpus, tokenizer = self.text.corpus, self.text.tokenizer
        found = {
            "text": {"name": corpus.name, "sha256": corpus.sha256, "bytes": corpus.num_bytes},
            "tokenizer": {"name": tokenizer.name, "sha256": hash_tokenizer(tokenizer, self.place)},
        }
        return found if self.start is None else found | {"start": self.start}

    def save(self, folder: Path) -> None:
        save_tokenizer(self.text.tokenizer, self.config.tokenizer, folder)

    def introduction(self) -> list[str]:
        corpus, tokenizer = self.text.corpus, self.text.tokenizer
        train, validation = self.text.train, self.text.validation
        evaluated = f"evaluated every {self.eval_every:,} steps: {self._evaluated(final=False)}"
        if self._evaluated(final=True) != self._evaluated(final=False):
            evaluated += f"; at the end: {self._evaluated(final=True)}"
        lines = [
            f"{corpus.name}: {corpus.num_bytes:,} bytes; {tokenizer.name} tokenizer, "
            f"{tokenizer.vocab_size:,} ids; {len(train.tokens):,} + {len(validation.tokens):,} tokens",
            f"{len(train):,} + {len(validation):,} windows of {self.config.context} tokens, "
            f"{train.stride} and {validation.stride} apart "
            f"({train.unused_tokens} + {validation.unused_tokens} tokens unused)",
            evaluated,
        ]
        return lines if self.start is None else [f"starts from {self.start['weights']}", *lines]

    def describe_evaluation(self, record: dict) -> str:
        with np.errstate(over="ignore"):  # a diverging run's perplexity is inf
            perplexity = np.exp(record["val_loss"])
        train, val = (number(record[key], 4) for key in ("train_eval_loss", "val_loss"))
        bits = number(record["val_bits_per_byte"], 3)
        return f"train {train}  val {val} = perplexity {number(perplexity, 1)} = {bits} bits/byte"

    def describe_batch(self, batch: tuple) -> dict:
        ids, targets = batch
        text = [self.text.tokenizer.decode(row) for row in ids]
        return {"ids": ids.tolist(), "targets": targets.tolist(), "text": text}

    def picture(self) -> tuple:
        return self.text.tokenizer.vocab_size, self.text.bytes_per_token

    def conclusion(self, record: dict) -> str | None:
        texts = self.text.texts
        return baselines.describe(record["val_bits_per_byte"], *texts) if texts else None

    def next_commands(self, folder: Path) -> list[str]:
        run, prompt = shlex.quote(str(folder)), self.text.prompt
        prompt = f'"{prompt}"' if not set(prompt) & set('"\\$`!\n') else shlex.quote(prompt)
        return [
            f"tinyllm generate --run {run} --prompt {prompt}",
            f"tinyllm train --from {run} --steps {self.config.steps}",
        ]


def mean_loss(model: Module, windows: Windows, most: int, batch: int, check: Check = do_nothing) -> float:
    """Mean loss per token in eval mode: at most ``most`` windows, evenly spread, ``batch`` at a time."""
    chosen = np.linspace(0, len(windows) - 1, min(most, len(windows))).astype(int)
    batches = (windows[chosen[start : start + batch]] for start in range(0, len(chosen), batch))
    return evaluate(model, batches, check=check)


def parts_of_a_step(config: TrainConfig) -> tuple[Module, dict[str, Callable[[], object]]]:
    """The model of a run and the parts of its first step, in order, as functions to profile.

    Nothing is written.
    """
    task = Pretraining(config)
    task.check()
    config.check_division()
    device, processes = open_run_device(config), distributed.current()
    in_turn(processes, lambda: task.load(Path(), {}))
    model, batch = task.model().to(device), task.batch_at(0)
    keep_memory()
    optimizer = make_optimizer(model, config)
    replicas = Replicas(processes, optimizer) if processes.size > 1 else Alone()
    how = (task.loss, config.at_once, NoLossScale(), config.seed, 0, do_nothing, replicas)
    return model, {
        "gradients": lambda: accumulate_gradients(model, batch, count_targets(batch), *how),
        **replicas.parts(optimizer, config.clip),
        "zero_grad": optimizer.zero_grad,
    }

"""The task of `tinyllm train`: a model learns to predict the next token of a text, from random numbers on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.backend.device import open_device
from tinyllm.backend.memory import keep_memory
from tinyllm.data.batches import Batches, Windows
from tinyllm.data.corpus import Corpus, encode_documents, open_corpus, train_validation_split
from tinyllm.data.token_file import tokenize_corpus, tokenizer_sha256
from tinyllm.errors import Error
from tinyllm.inference.generate import generate
from tinyllm.nn import Module, initialize_as_torch
from tinyllm.optim import AdamW, NoLossScale, clip_grad_norm
from tinyllm.tokenizers import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer, train_bpe
from tinyllm.tokenizers.bpe import parse_bpe
from tinyllm.training import baselines
from tinyllm.training.config import TrainConfig
from tinyllm.training.loggers import Log, say
from tinyllm.training.run import run_task
from tinyllm.training.step import Check, accumulate_gradients, count_targets, do_nothing, evaluate
from tinyllm.training.tasks.base import Task

SAMPLE_TOKENS = 50

BPE_CHARACTERS = 10_000_000  # of a text that is too large to learn a vocabulary from all of it


@dataclass(frozen=True)
class Data:
    """What a run reads: the text, its tokenizer, and the windows of both parts."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: Windows
    validation: Windows
    bytes_per_token: float  # of the validation text: losses per byte compare across tokenizers
    texts: tuple[bytes, bytes] | None  # both parts, unless they were too large to read at once


def load_data(
    config: TrainConfig, tokenizer: Tokenizer | None = None, text_sha256: str | None = None
) -> Data:
    """Read the text, learn or load a tokenizer, tokenise, cut into windows: 90% for training.

    A text of at most ``config.in_memory`` MB is split by characters. A larger one goes through a file of
    tokens on disk, which is split between two of its chunks. A resumed run brings its ``tokenizer`` and the
    hash of its text; raises ``Error`` if the text is another one now.
    """
    corpus = open_corpus(config.text, config.text_field)
    if text_sha256 not in (None, corpus.sha256):
        raise Error(
            f"the text {corpus.name} is not the one that the run was begun with (its SHA-256 is "
            f"{corpus.sha256[:8]}…, not {text_sha256[:8]}…): give that with --text, or start a new run"
        )
    if corpus.left_out:
        say(f"{corpus.name}: {len(corpus.left_out)} files are neither .txt nor .jsonl and were left out")
    if corpus.num_bytes > config.in_memory * 10**6:
        if config.tokenizer == "char":
            raise Error(
                f"{corpus.name} has {corpus.num_bytes / 10**6:,.0f} MB, too much for a character tokenizer: "
                "choose bpe:VOCAB or gpt2, or a larger --in-memory"
            )
        tokenizer = tokenizer or _tokenizer(config, corpus, corpus.sample(BPE_CHARACTERS))
        beside_the_text = f"{corpus.name.rstrip('/')}.{tokenizer.name.replace(':', '-')}.tokens"
        tokens = tokenize_corpus(corpus, tokenizer, config.special, config.tokens or Path(beside_the_text))
        train, validation, validation_bytes = tokens.split(0.1)
        texts = None
    else:
        parts = train_validation_split(corpus.documents())
        tokenizer = tokenizer or _tokenizer(config, corpus, *parts)
        train, validation = (encode_documents(tokenizer, part, config.special) for part in parts)
        texts = tuple("".join(part).encode("utf-8") for part in parts)
        validation_bytes = len(texts[1])
    bytes_per_token = validation_bytes / len(validation)
    train = Windows(train, config.context, config.stride or max(1, config.context // 4))
    return Data(corpus, tokenizer, train, Windows(validation, config.context), bytes_per_token, texts)


def _tokenizer(config: TrainConfig, corpus: Corpus, train: Sequence[str], validation=()) -> Tokenizer:
    if config.tokenizer == "char":
        tokenizer = CharTokenizer.from_text("".join([*train, *validation]))
        if corpus.num_documents > 1:
            tokenizer = tokenizer.with_special_tokens([END_OF_TEXT])  # to stand between them
    elif config.tokenizer.startswith("bpe:"):
        # Learned from the training part only: the validation text stays unseen.
        tokenizer = BPETokenizer(train_bpe(train, parse_bpe(config.tokenizer)))
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    return tokenizer.with_special_tokens(config.special_tokens)


def train(config: TrainConfig, progress: bool = True, callback: Log | None = None) -> Module:
    """Train a model on a text, as ``config`` says; see ``run_task``."""
    return run_task(Pretraining(config), progress, callback)


class Pretraining(Task):
    """Windows of a text, and at evaluations what the model writes after ``config.prompt``."""

    rows = "windows"

    @property
    def name(self) -> str:
        return Path(self.config.text).stem

    def load(self, folder: Path, about: dict) -> None:
        tokenizer = None
        if about:
            tokenizer = load_tokenizer(folder)
            if tokenizer_sha256(tokenizer) != about["tokenizer"]["sha256"]:
                raise Error(f"the tokenizer in {folder} is not the run's own any more: copy it back")
        self.text = load_data(self.config, tokenizer, about["text"]["sha256"] if about else None)
        self.batches = Batches(self.text.train, self.config.batch, self.config.seed)
        self.steps_per_epoch, self.batch_at = self.batches.steps_per_epoch, self.batches.at
        try:
            self.prompt = self.text.tokenizer.encode(self.config.prompt)
        except Error as error:
            raise Error(f"--prompt: {error}") from None
        length, most = len(self.prompt), self.config.context
        if not 0 < length <= most:
            raise Error(f"--prompt is {length} tokens long: it must have 1 to {most} (the context)")

    def model(self) -> Module:
        rng = np.random.default_rng(self.config.seed)
        model = self.config.model(self.text.tokenizer.vocab_size, rng)
        if self.config.init == "torch":
            initialize_as_torch(model, rng)
        return model.astype(self.config.parameter_dtype).train()

    def evaluate(self, model: Module, check: Check) -> dict[str, float]:
        """Both losses, each of a fixed set of windows."""
        config, found = self.config, {}
        for key, windows in (("train_eval_loss", self.text.train), ("val_loss", self.text.validation)):
            found[key] = mean_loss(model, windows, config.eval_windows, config.at_once, check)
        found["val_bits_per_byte"] = found["val_loss"] / math.log(2) / self.text.bytes_per_token
        return found

    def sample(self, model: Module, step: int, check: Check) -> str:
        rng, ids = np.random.default_rng([self.config.seed, step]), list(self.prompt)
        for token in generate(model, [self.prompt], SAMPLE_TOKENS, temperature=0.8, top_k=40, rng=rng):
            check()
            ids.append(int(token[0]))
        return self.text.tokenizer.decode(ids)

    def data(self) -> dict[str, dict]:
        corpus, tokenizer = self.text.corpus, self.text.tokenizer
        return {
            "text": {"name": corpus.name, "sha256": corpus.sha256, "bytes": corpus.num_bytes},
            "tokenizer": {"name": tokenizer.name, "sha256": tokenizer_sha256(tokenizer)},
        }

    def save(self, folder: Path) -> None:
        self.text.tokenizer.save(folder)

    def introduction(self) -> list[str]:
        corpus, tokenizer = self.text.corpus, self.text.tokenizer
        train, validation = self.text.train, self.text.validation
        return [
            f"{corpus.name}: {corpus.num_bytes:,} bytes; {tokenizer.name} tokenizer, "
            f"{tokenizer.vocab_size:,} ids; {len(train.tokens):,} + {len(validation.tokens):,} tokens",
            f"{len(train):,} + {len(validation):,} windows of {self.config.context} tokens, {train.stride} "
            f"and {validation.stride} apart ({train.unused_tokens} + {validation.unused_tokens} tokens at "
            "the ends fit none)",
        ]

    def describe_evaluation(self, record: dict) -> str:
        with np.errstate(over="ignore"):  # a diverging run's perplexity is inf
            perplexity = np.exp(record["val_loss"])
        return (
            f"train {record['train_eval_loss']:.4f}  val {record['val_loss']:.4f} = perplexity "
            f"{perplexity:.1f} = {record['val_bits_per_byte']:.3f} bits/byte"
        )

    def describe_batch(self, batch: tuple) -> dict:
        ids, targets = batch
        text = [self.text.tokenizer.decode(row) for row in ids]
        return {"ids": ids.tolist(), "targets": targets.tolist(), "text": text}

    def picture(self) -> tuple:
        return self.text.tokenizer.vocab_size, self.text.bytes_per_token

    def conclusion(self, record: dict) -> str | None:
        texts = self.text.texts
        return baselines.describe(record["val_bits_per_byte"], *texts) if texts else None


def mean_loss(model: Module, windows: Windows, most: int, batch: int, check: Check = do_nothing) -> float:
    """Mean loss per token over at most ``most`` windows, spread evenly, ``batch`` at a time; in eval mode."""
    chosen = np.linspace(0, len(windows) - 1, min(most, len(windows))).astype(int)
    batches = (windows[chosen[start : start + batch]] for start in range(0, len(chosen), batch))
    return evaluate(model, batches, check=check)


def parts_of_a_step(config: TrainConfig) -> tuple[Module, dict[str, Callable[[], object]]]:
    """The model of a run and the parts of its first step, in order, each a function: for a profile.

    Nothing is written.
    """
    device, task = open_device(config.device, config.dtype, config.gpu_memory), Pretraining(config)
    task.load(Path(), {})
    model, batch = task.model().to(device), task.batch_at(0)
    keep_memory()
    optimizer, scale = AdamW(model, config.lr, weight_decay=config.weight_decay), NoLossScale()
    how = (task.loss, config.at_once, scale, config.seed, 0)
    return model, {
        "gradients": lambda: accumulate_gradients(model, batch, count_targets(batch), *how),
        "clip_grad_norm": lambda: clip_grad_norm(optimizer.parameters, config.clip),
        "AdamW": optimizer.step,
        "zero_grad": optimizer.zero_grad,
    }

"""Fine-tuning for any task: the start model, which of its parameters are trained, and what is saved.

A task (``instruct.py``, …) adds its options and the rows that it makes of the examples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from tinyllm import nn
from tinyllm.data.batches import Batches
from tinyllm.data.examples import Examples, open_examples
from tinyllm.errors import Error
from tinyllm.models import LanguageModel, empty_model, load_model
from tinyllm.nn import Module
from tinyllm.tensor import Tensor
from tinyllm.tokenizers import Tokenizer, load_tokenizer
from tinyllm.tokenizers.base import check_fits
from tinyllm.training.config import RunOptions
from tinyllm.training.start import (
    check_start,
    describe_start,
    find_source,
    hash_tokenizer,
    save_tokenizer,
    tokenizer_place,
    with_dropout,
)
from tinyllm.training.step import Check, evaluate
from tinyllm.training.tasks.base import Task

LAST_BLOCKS = re.compile(r"last-blocks:([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions):
    """Teach a pretrained model a task, such as to follow instructions.

    These are the options of every task of ``tinyllm finetune``; a task's class adds its own.
    """

    model: str
    """The model to start from: smollm2, a model's folder, a run, a .gguf file or a hub id."""
    data: str
    """The examples: a file of JSON or JSON lines, a folder with train, valid and test, or a known name."""
    train: str = "lora"
    """What to train: lora, all, head, or last-blocks:N (the last N blocks and the final norm)."""
    rank: int = 16
    """LoRA: rank of the update of each layer."""
    alpha: float = 16.0
    """LoRA: the update is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """LoRA: dropout probability of the update's input."""
    targets: tuple[str, ...] = ("all-linear",)
    """LoRA: the layers it is added to, such as q_proj v_proj; all-linear: every linear layer but the head."""
    dropout: float = 0.0
    """Dropout probability of the model's own layers."""
    epochs: float | None = None
    """Passes over the training examples, instead of --steps; by default 1."""
    max_length: int | None = None
    """Longest example in tokens; by default the model's context, and at most 1,024."""
    split_seed: int = 0
    """Seed of the split into training, validation and test examples, where the data has none."""
    eval_examples: int = 256
    """Maximum number of validation examples to evaluate before the end; at the end all."""
    batch: int = 8
    """Examples per step."""
    steps: int | None = None
    """Updates of the weights; by default those of --epochs."""
    lr: float | None = None
    """Peak learning rate; by default 2e-4 for lora, 1e-3 for head, else 5e-5."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine decay."""
    warmup: int | None = None
    """Steps in which the learning rate rises to its peak; by default a sixth of the steps."""
    weight_decay: float = 0.01
    """Weight decay of the trained matrices (biases and norms have none)."""

    command = "tinyllm finetune"
    restart = "tinyllm finetune --model"
    length_option = "--max-length"
    free = RunOptions.free | {"model", "data", "eval_examples"}  # the first two may move: they are hashed

    # LoRA's A and B start from random numbers and 0, a head from random numbers: they take larger steps than
    # pretrained weights. 2e-4 is QLoRA's (arXiv 2305.14314, table 9), 5e-5 that of transformers' Trainer.
    rates: ClassVar[dict[str, float]] = {"lora": 2e-4, "head": 1e-3, "all": 5e-5, "last-blocks": 5e-5}

    def __post_init__(self):
        kind = self.train.partition(":")[0]
        known = self.train in ("lora", "head", "all") or LAST_BLOCKS.fullmatch(self.train)
        self._require("train", known, "lora, all, head or last-blocks:N")
        if self.lr is None:
            vars(self)["lr"] = self.rates[kind]  # the dataclass is frozen: fill in the default this way
        super().__post_init__()
        self._require_at_least(1, "rank max_length eval_examples")
        self._require_at_least(0, "split_seed")
        for name in ("alpha", "epochs"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "above 0")
        for name in ("dropout", "lora_dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        if self.epochs is not None and self.steps is not None:
            raise Error("--epochs and --steps both set the length of the run: give one of them")

    def with_steps(self, steps_per_epoch: int) -> FinetuneOptions:
        """The options with ``steps`` instead of ``epochs``."""
        if self.steps is not None:
            return self
        return replace(self, steps=math.ceil((self.epochs or 1) * steps_per_epoch), epochs=None)


class Rows(Protocol):
    """The examples of a part as a task encodes them."""

    lengths: np.ndarray  # (n,), tokens of each

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """Arrays that share axis 0, one row per index."""


class Finetuning(Task):
    """Base class of the tasks: a task defines ``encode`` and, if its loss is not that of the next token,
    ``loss`` and ``count``.

    The model is loaded from ``config.model``, whose weights are hashed, both when a run starts and when it
    resumes. With ``--train lora`` a checkpoint holds the adapter only, in PEFT's layout, so a run cannot be
    used without the model that it started from; otherwise it holds the whole model.
    """

    rows = "examples"

    config: FinetuneOptions
    tokenizer: Tokenizer
    examples: Examples
    train_rows: Rows
    valid_rows: Rows

    def encode(self) -> tuple[Rows, Rows]:
        """The training and the validation rows, of ``self.examples`` with ``self.tokenizer``.

        Raises ``Error``, naming the row, for an example that the task cannot use.
        """
        raise NotImplementedError

    def prepare(self, model: LanguageModel, rng: np.random.Generator) -> None:
        """Change a model as loaded, for example its head, before it is chosen what of it is trained."""

    def head(self, model: LanguageModel) -> Module:
        """The part of the model that ``--train head`` trains."""
        return model.lm_head

    # The start model and the data

    def check(self) -> None:
        config = self.config
        try:
            model = empty_model(find_source(config.model)[0])
        except Error as error:
            raise Error(f"--model: {error}") from None
        if (config.max_length or 0) > model.context:
            raise Error(
                f"--max-length is {config.max_length}, and {config.model} takes at most {model.context} "
                "tokens: choose no more"
            )
        if found := LAST_BLOCKS.fullmatch(config.train):
            blocks = len(getattr(model, model.blocks))
            if int(found[1]) > blocks:
                raise Error(f"--train {config.train}: {config.model} has {blocks} blocks: choose no more")

    def load(self, folder: Path, about: dict) -> None:
        config = self.config
        weights, run = find_source(config.model)
        self.architecture, self.start = empty_model(weights), about.get("start")
        rows = self.architecture.config.vocab_size
        self.place = str(folder if about else run or tokenizer_place(weights, rows))
        self.tokenizer = load_tokenizer(self.place)
        if about and hash_tokenizer(self.tokenizer, self.place) != about["tokenizer"]["sha256"]:
            raise Error(f"the tokenizer in {folder} changed since the run was started: copy it back")
        if not about:
            check_fits(self.tokenizer, self.architecture, padded=True)
        self.max_length = config.max_length or min(self.architecture.context, 1024)
        self.examples = self.open_examples()
        self.train_rows, self.valid_rows = self.encode()
        batches = Batches(self.train_rows, config.batch, config.seed, self.train_rows.lengths)
        self.steps_per_epoch, self.batch_at = batches.steps_per_epoch, batches.at
        self.config = config.with_steps(self.steps_per_epoch)

    def open_examples(self) -> Examples:
        """The examples that ``config.data`` names, in their parts."""
        return open_examples(self.config.data, self.config.split_seed)

    # The model

    def model(self) -> Module:
        model = self._start_model()
        found = describe_start(self.config.model, model)
        check_start(found, self.start)
        self.start = found
        rng = np.random.default_rng(self.config.seed)
        self.prepare(model, rng)
        self._choose(model, rng)
        return model.train()

    def _start_model(self) -> LanguageModel:
        """The model as published, with the dropout asked for, in eval mode."""
        weights, _ = find_source(self.config.model)
        model = load_model(weights, self.config.parameter_dtype)
        arrays = model.state_dict()
        model = with_dropout(model, self.config.dropout).astype(self.config.parameter_dtype)
        model.load_state_dict(arrays, source=str(weights))
        return model.eval()

    def _choose(self, model: LanguageModel, rng: np.random.Generator) -> None:
        """Freeze what is not trained, and add LoRA's matrices."""
        train = self.config.train
        if train == "all":
            return
        model.requires_grad_(False)
        if train == "lora":
            self._add_lora(model, rng)
        elif train == "head":
            self.head(model).requires_grad_()
        else:
            last = int(LAST_BLOCKS.fullmatch(train)[1])
            for block in getattr(model, model.blocks)[-last:]:
                block.requires_grad_()
            for norm in _between_blocks_and_head(model):
                norm.requires_grad_()

    def _add_lora(self, model: LanguageModel, rng: np.random.Generator) -> None:
        config = self.config
        targets = "all-linear" if config.targets == ("all-linear",) else config.targets
        nn.add_lora(model, config.rank, config.alpha, targets, config.lora_dropout, rng=rng)

    # Checkpoints

    def saved_parameters(self, model: Module) -> Iterable[Tensor]:
        if self.config.train != "lora":
            return model.parameters()
        return (parameter for parameter in model.parameters() if parameter.requires_grad)

    def save_weights(self, model: Module, folder: Path) -> None:
        if self.config.train == "lora":
            from tinyllm.weights.adapters import save_adapter

            save_adapter(model, folder, base=self.start["weights"])
        else:
            super().save_weights(model, folder)

    def load_weights(self, model: Module, folder: Path) -> None:
        if self.config.train == "lora":
            from tinyllm.weights.adapters import load_adapter

            load_adapter(model, folder)
        else:
            super().load_weights(model, folder)

    # An evaluation

    def evaluate(self, model: Module, check: Check, final: bool) -> dict[str, float]:
        return {"val_loss": evaluate(model, self.validation_batches(final), self.loss, self.count, check)}

    def validation_batches(self, final: bool) -> Iterable[tuple[np.ndarray, ...]]:
        """Validation rows in batches: at the end all, before that ``eval_examples`` evenly spread ones."""
        rows, config = self.valid_rows, self.config
        number = len(rows) if final else min(len(rows), config.eval_examples)
        chosen = np.linspace(0, len(rows) - 1, number).astype(int)
        chosen = chosen[np.argsort(rows.lengths[chosen], kind="stable")]  # little padding
        for first in range(0, number, config.at_once):
            yield rows[chosen[first : first + config.at_once]]

    # Records and messages

    def data(self) -> dict[str, dict]:
        found = self.examples
        counts = {part: len(getattr(found, part)) for part in ("train", "valid", "test")}
        return {
            "data": {"name": found.name, "sha256": found.sha256, **counts},
            "tokenizer": {
                "name": self.tokenizer.name,
                "sha256": hash_tokenizer(self.tokenizer, self.place),
            },
            "start": self.start,
        }

    def save(self, folder: Path) -> None:
        save_tokenizer(self.tokenizer, self.place, folder)

    def introduction(self) -> list[str]:
        return [f"starts from {self.start['weights']}", self.examples.describe()]


def _between_blocks_and_head(model: LanguageModel) -> list[Module]:
    """The layers after the last block that are not the head: the final norm."""
    children = list(model.children())
    last = max(i for i, (name, _) in enumerate(children) if name.startswith(f"{model.blocks}."))
    return [child for _, child in children[last + 1 :] if child is not model.lm_head]


def describe_trained(model: Module) -> str:
    """How many of a model's parameters are trained."""
    trained = sum(parameter.size for parameter in model.parameters() if parameter.requires_grad)
    return f"trains {trained:,} of {model.num_parameters():,} parameters"

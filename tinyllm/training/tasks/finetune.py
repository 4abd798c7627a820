"""Fine-tuning for any task: the start model, which of its parameters are trained, and what is saved.

A task (``instruct.py``, …) adds its options and the rows that it makes of the examples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from tinyllm import nn
from tinyllm.data.batches import Batches
from tinyllm.data.examples import Examples, open_examples
from tinyllm.errors import Error
from tinyllm.models import LanguageModel, empty_model
from tinyllm.nn import Module
from tinyllm.nn.lora import ALL_LINEAR
from tinyllm.tensor import Tensor
from tinyllm.tokenizers import Tokenizer, load_tokenizer
from tinyllm.tokenizers.base import check_fits
from tinyllm.training.config import RunOptions, flag
from tinyllm.training.start import (
    describe_start,
    find_source,
    has_tokenizer,
    hash_tokenizer,
    load_own_tokenizer,
    save_tokenizer,
    tokenizer_place,
    with_dropout,
)
from tinyllm.training.step import Check, evaluate
from tinyllm.training.tasks.base import Task
from tinyllm.weights.adapter_config import CAUSAL_LM, base_of, check_causal_lm, read_adapter_config
from tinyllm.weights.adapters import load_adapter, save_adapter
from tinyllm.weights.hub import open_weights
from tinyllm.weights.safetensors import is_adapter

LONGEST = 1024  # tokens of an example unless --max-length says otherwise, as in TRL

LAST_BLOCKS = re.compile(r"last-blocks:([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """The model that is fine-tuned, its examples, and what of it is trained."""

    model: str
    """The model to start from: smollm2, gemma3-270m, gpt2, a folder, a run, a .gguf file or a hub id."""
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
    """Maximum number of validation examples to evaluate, the same each time."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions, StartOptions):
    """Teach a pretrained model a task, such as to follow instructions.

    These are the options of every task of ``tinyllm finetune``; a task's class adds its own.
    """

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
    free = RunOptions.free | {"model", "data"}  # which may move: they are hashed

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
        if self.steps is not None:
            self._require("initial_lr", self.initial_lr == 0 or self.warmup_steps > 0, "0 without a warm-up")
        if self.epochs is not None and self.steps is not None and self.resume is None:
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
    called: ClassVar[dict[str, str]] = {}  # the names for users of layers that are trained whole
    adapter_type = CAUSAL_LM  # PEFT's name for the kind of task

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

    def trained_whole(self, model: LanguageModel) -> list[str]:
        """The names of layers to train whole whatever ``--train`` says, such as a new head."""
        return []

    # The start model and the data

    def check(self) -> None:
        config = self.config
        if config.train != "lora" and (given := self._given(("rank", "alpha", "lora_dropout", "targets"))):
            are = "is" if len(given) == 1 else "are"
            raise Error(
                f"{' and '.join(map(flag, given))} {are} for --train lora, not {config.train}: omit it"
            )
        try:
            base, adapter = self._find_start()
            model = empty_model(base)
            if adapter is not None:
                check_causal_lm(adapter)
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
        if config.train == "lora" and adapter is None:
            nn.add_lora(model, config.rank, config.alpha, self._targets, rng=None)  # raises an error
        elif config.train == "lora":
            self._check_adapter(model, adapter)

    def _given(self, names: Iterable[str]) -> list[str]:
        """Those of the options that are not the default."""
        default = {field.name: field.default for field in fields(self.config)}
        return [name for name in names if getattr(self.config, name) != default[name]]

    def _check_adapter(self, model: LanguageModel, adapter: Path) -> None:
        """Raise ``Error`` for what the adapter of the start model cannot have if it is trained further."""
        config, about = self.config, read_adapter_config(adapter)
        own = {"rank": about["r"], "alpha": about["lora_alpha"], "targets": (*about["target_modules"],)}
        if given := [name for name in self._given(own) if getattr(config, name) != own[name]]:
            raise Error(
                f"{config.model} has an adapter, which keeps its own rank, alpha and targets: omit "
                f"{' and '.join(map(flag, given))}, or merge it first"
            )
        if whole := self.trained_whole(model):
            raise Error(
                f"{config.model} has an adapter, which cannot train {self._called(whole)} in addition: merge "
                "it first, or choose another --train"
            )

    def _find_start(self) -> tuple[Path, Path | None]:
        """The weights of the start model, and the adapter on them if it has one."""
        weights, _ = find_source(self.config.model)
        return (find_source(base_of(weights))[0], weights) if is_adapter(weights) else (weights, None)

    def load(self, folder: Path, about: dict) -> None:
        config, self.resumed, self.start = self.config, bool(about), about.get("start")
        self.base, self.adapter = self._find_start()
        _, run = find_source(config.model)
        self.base_name = str(self.base) if self.adapter or run else config.model  # in the adapter's config
        architecture = empty_model(self.base)
        if about:
            self.place, self.tokenizer = folder, load_own_tokenizer(folder, about)
        else:
            self.place = self._tokenizer_place(architecture.config.vocab_size)
            self.tokenizer = load_tokenizer(self.place)
            if not self.adapter:  # which may extend the vocabulary
                check_fits(self.tokenizer, architecture, padded=True)
        self.max_length = config.max_length or min(architecture.context, LONGEST)
        self.examples = self.open_examples()
        if about and self.examples.sha256 != about["data"]["sha256"]:
            raise Error(f"the data {self.examples.name} is not that of the run in {folder}: restore it")
        self.train_rows, self.valid_rows = self.encode()
        batches = Batches(self.train_rows, config.batch, config.seed, self.train_rows.lengths)
        self.steps_per_epoch, self.batch_at = batches.steps_per_epoch, batches.at
        self.config = config.with_steps(self.steps_per_epoch)

    def _tokenizer_place(self, rows: int) -> str | Path:
        weights, run = find_source(self.config.model)
        if run is None and self.adapter and not has_tokenizer(weights):
            weights, run = find_source(base_of(self.adapter))
        return run or tokenizer_place(weights, rows)  # a path: the name "gpt2" is not that of a folder

    def open_examples(self) -> Examples:
        """The examples that ``config.data`` names, in their parts."""
        return open_examples(self.config.data, self.config.split_seed)

    # The model

    def model(self) -> Module:
        model = self._start_model()
        self.start = describe_start(self.config.model, model, self.start)
        rng = np.random.default_rng(self.config.seed)
        self.prepare(model, rng)
        self._choose(model, rng)
        return model.train()

    def _start_model(self) -> LanguageModel:
        """The model as published, adapter included, with the dropout asked for."""
        dtype = self.config.parameter_dtype
        model = with_dropout(empty_model(self.base), self.config.dropout).astype(dtype)
        model.load_state_dict(open_weights(self.base), source=str(self.base))
        if self.adapter:
            load_adapter(model, self.adapter)
            for layer in nn.lora_layers(model).values():
                layer.dropout.p = self.config.lora_dropout
            if self.config.train != "lora":  # otherwise it is trained further
                nn.merge_lora(model)
        return model.eval()

    def _choose(self, model: LanguageModel, rng: np.random.Generator) -> None:
        """Freeze what is not trained, and add LoRA's matrices."""
        config, whole = self.config, self.trained_whole(model)
        if config.train == "all":
            model.requires_grad_()
        elif config.train != "lora":
            model.requires_grad_(False)
            layers = dict(model.named_modules())
            for layer in [*self._chosen_layers(model), *(layers[name] for name in whole)]:
                layer.requires_grad_()
        elif not self.adapter:
            options = dict(dropout=config.lora_dropout, modules_to_save=whole, rng=rng)
            nn.add_lora(model, config.rank, config.alpha, self._targets, **options)
        trained = sum(parameter.size for parameter in model.parameters() if parameter.requires_grad)
        self.trains = f"trains {trained:,} of {model.num_parameters():,} parameters: {self._what(model)}"
        if whole and config.train != "all":
            self.trains += f"; {self._called(whole)} whole"

    def _called(self, layers: list[str]) -> str:
        return " and ".join(self.called.get(name, name) for name in layers)

    @property
    def _targets(self) -> str | tuple[str, ...]:
        targets = self.config.targets
        return ALL_LINEAR if targets == (ALL_LINEAR,) else targets

    def _chosen_layers(self, model: LanguageModel) -> list[Module]:
        """The layers that --train head or last-blocks:N trains."""
        found = LAST_BLOCKS.fullmatch(self.config.train)
        if found is None:
            return [self.head(model)]
        blocks = getattr(model, model.blocks)
        children = [child for _, child in model.children()]
        after = children[children.index(blocks[-1]) + 1 :]  # the final norm, and the head
        return [*blocks[-int(found[1]) :], *(layer for layer in after if layer is not model.lm_head)]

    def _what(self, model: LanguageModel) -> str:
        if self.config.train != "lora":
            return self.config.train
        layers = nn.lora_layers(model)
        ranks = ", ".join(str(rank) for rank in sorted({layer.rank for layer in layers.values()}))
        return f"LoRA of rank {ranks} on {len(layers):,} layers" + " of the adapter" * bool(self.adapter)

    # Checkpoints

    def saved_parameters(self, model: Module) -> Iterable[Tensor]:
        if self.config.train != "lora":
            return model.parameters()
        return (parameter for parameter in model.parameters() if parameter.requires_grad)

    def save_weights(self, model: Module, folder: Path) -> None:
        if self.config.train != "lora":
            super().save_weights(model, folder)
        else:
            save_adapter(model, folder, self.base_name, self.adapter_type)

    def load_weights(self, model: Module, folder: Path) -> None:
        if self.config.train == "lora":
            load_adapter(model, folder)
        else:
            super().load_weights(model, folder)

    # An evaluation

    def evaluate(self, model: Module, check: Check, final: bool) -> dict[str, float]:
        return {"val_loss": evaluate(model, self.validation_batches(), self.loss, self.count, check)}

    def validation_batches(self) -> Iterable[tuple[np.ndarray, ...]]:
        """Validation rows in batches: all, or ``eval_examples`` evenly spread ones."""
        return (self.valid_rows[chosen] for chosen in self.spread(self.valid_rows, self.config.eval_examples))

    def spread(self, rows: Rows, most: int) -> list[np.ndarray]:
        """The indices of at most ``most`` evenly spread rows, in batches of similar length."""
        number, size = min(len(rows), most), self.config.at_once
        chosen = np.linspace(0, len(rows) - 1, number).astype(int)
        chosen = chosen[np.argsort(rows.lengths[chosen], kind="stable")]  # little padding
        return [chosen[first : first + size] for first in range(0, number, size)]

    # Records and messages

    def data(self) -> dict[str, dict]:
        found = self.examples
        counts = {part: len(getattr(found, part)) for part in ("train", "valid", "test")}
        return {
            "data": {"name": found.name, "sha256": found.sha256, **counts},
            "tokenizer": {"name": self.tokenizer.name, "sha256": hash_tokenizer(self.tokenizer, self.place)},
            "start": self.start,
        }

    def save(self, folder: Path) -> None:
        save_tokenizer(self.tokenizer, self.place, folder)

    def introduction(self) -> list[str]:
        return [f"starts from {self.start['weights']}; {self.trains}", self.examples.describe()]

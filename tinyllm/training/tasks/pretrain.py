"""The task of ``tinyllm train``: a model learns to predict the next token of a text."""

import hashlib
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tinyllm.backend import distributed
from tinyllm.backend.memory import keep_memory
from tinyllm.data.batches import Batches, Windows
from tinyllm.data.noise import replace_tokens, split_tokens
from tinyllm.errors import Error
from tinyllm.files import check_writable
from tinyllm.inference.generate import generate
from tinyllm.nn import Module, initialize_as_torch, initialize_as_zero
from tinyllm.optim import NoLossScale
from tinyllm.tokenizers import Tokenizer
from tinyllm.tokenizers.base import check_fits
from tinyllm.training import baselines
from tinyllm.training.config import TrainConfig
from tinyllm.training.data_parallel import Replicas
from tinyllm.training.loggers import Log
from tinyllm.training.output import number
from tinyllm.training.run import make_optimizer, open_run_device, run_task
from tinyllm.training.shared_run import in_turn
from tinyllm.training.start import (
    check_architecture,
    check_tokenizer,
    describe_start,
    hash_tokenizer,
    load_own_tokenizer,
    save_tokenizer,
    starting_model,
)
from tinyllm.training.step import Alone, Check, accumulate_gradients, count_targets, do_nothing, evaluate
from tinyllm.training.tasks.base import Task
from tinyllm.training.tasks.text import encode_prompt, load_data, named_tokenizer
from tinyllm.weights.runs import checkpoints

SAMPLE_TOKENS, FEWEST_SAMPLE_TOKENS = 50, 10

# A generated token takes as long as this many in a batch (measured: 14 to 108, depending on the shapes).
BATCHED_TOKENS_PER_GENERATED = 64


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
        self.tokenizer = named_tokenizer(config)
        if model is not None:
            check_fits(self.tokenizer, model, padded=True)
            check_tokenizer(config, self.tokenizer)
        if self.tokenizer is not None and config.prompt is not None:
            encode_prompt(config, self.tokenizer, config.prompt)

    def load(self, folder: Path, about: dict) -> None:
        config, text_sha256 = self.config, None
        self.place, self.checkpoint = config.tokenizer, None
        if about:
            self.place, self.start = folder, about.get("start")
            self.checkpoint = next(reversed(checkpoints(folder)), None)
            self.tokenizer, text_sha256 = load_own_tokenizer(folder, about), about["text"]["sha256"]
        self.text = load_data(config, self.tokenizer, text_sha256)
        self.batches = Batches(self.text.train, config.batch, config.seed)
        self.pairs = self.text.tokenizer.merged_pairs() if config.token_splits > 0 else None
        self.steps_per_epoch = self.batches.steps_per_epoch
        # A resumed run may be evaluated more often, but on the same windows: only then losses compare.
        every = self.interval(about["train"]["eval_every"] if about else config.eval_every)
        self.most_windows = min(config.eval_windows, every * config.batch)

    def batch_at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows of a step, with what ``--token-splits`` and ``--token-noise`` change (``noise.py``)."""
        config, (ids, targets) = self.config, self.batches.at(step)
        if config.token_splits > 0:
            rng, rows = np.random.default_rng([config.seed, step, 2]), np.hstack([ids, targets[:, -1:]])
            rows = split_tokens(rows, self.pairs, config.token_splits, rng)
            ids, targets = rows[:, :-1], rows[:, 1:]
        if config.token_noise > 0:
            rng = np.random.default_rng([config.seed, step, 1])
            ids = replace_tokens(ids, config.token_noise, self.text.tokenizer.vocab_size, rng)
        return ids, targets

    def model(self) -> Module:
        config, tokenizer = self.config, self.text.tokenizer
        if config.start_from is not None:
            model = starting_model(config, self.checkpoint)
            if self.checkpoint is None:
                self.start = describe_start(config.start_from, model, self.start)
            return model.train()
        rng = np.random.default_rng(config.seed)
        model = config.model(tokenizer.vocab_size, rng)
        if config.init == "torch":
            initialize_as_torch(model, rng)
        if config.init == "zero":
            initialize_as_zero(model, model.into_residual)
        return model.astype(config.parameter_dtype).train()

    def evaluate(self, model: Module, check: Check, final: bool) -> dict[str, float]:
        """Both losses, of the same windows at every step, and in the end the bits per byte of the table.

        The windows are no more than those trained on in between: a training step costs about three forward
        passes, two for both losses and one for the sample. The table is of ``config.eval_windows``.
        """
        found, validation = {}, self.text.validation

        def loss(windows: Windows, most: int) -> float:
            return mean_loss(model, windows, most, self.config.at_once, check)

        def bits_per_byte(loss: float, bytes_per_token: float) -> float:
            return loss / math.log(2) / bytes_per_token

        for key, windows in (("train_eval_loss", self.text.train), ("val_loss", validation)):
            found[key] = loss(windows, self.most_windows)
        found["val_bits_per_byte"] = bits_per_byte(found["val_loss"], self.text.bytes_per_token)
        if final:
            most = self.config.eval_windows
            if min(most, len(validation)) > self.most_windows:
                at_end = loss(validation, most)
                found["val_final_bits_per_byte"] = bits_per_byte(at_end, self.text.bytes_per_token)
            if second := self.text.second:
                of_second = loss(second.windows, most)
                found["val_second_bits_per_byte"] = bits_per_byte(of_second, second.bytes_per_token)
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
        if second := self.text.second:
            sha256 = hashlib.sha256(second.text).hexdigest()
            found["second_text"] = {"name": second.name, "sha256": sha256, "bytes": len(second.text)}
        return found if self.start is None else found | {"start": self.start}

    def save(self, folder: Path) -> None:
        save_tokenizer(self.text.tokenizer, self.config.tokenizer, folder)

    def introduction(self) -> list[str]:
        corpus, tokenizer = self.text.corpus, self.text.tokenizer
        train, validation = self.text.train, self.text.validation
        most, at_end = (min(n, len(validation)) for n in (self.most_windows, self.config.eval_windows))
        evaluated = (
            f"evaluated every {self.eval_every:,} steps: {min(self.most_windows, len(train)):,} training and "
            f"{most:,} validation windows"
        )
        if at_end > most:
            evaluated += f"; at the end, for the table, {at_end:,} validation windows"
        lines = [
            f"{corpus.name}: {corpus.num_bytes:,} bytes; {tokenizer.name} tokenizer, "
            f"{tokenizer.vocab_size:,} ids; {len(train.tokens):,} + {len(validation.tokens):,} tokens",
            f"{len(train):,} + {len(validation):,} windows of {self.config.context} tokens, "
            f"{train.stride} and {validation.stride} apart "
            f"({train.unused_tokens} + {validation.unused_tokens} tokens unused)",
            evaluated,
        ]
        if self.pairs is not None and (self.pairs < 0).all():
            lines.append(f"--token-splits divides no token of {tokenizer.name}: none is known to be merged")
        if self.config.tokens is not None and self.text.texts is not None:
            lines.append(f"--tokens is not used: {corpus.name} is not larger than --in-memory")
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
        texts, second = self.text.texts, self.text.second
        if texts is None:
            return None
        bits = record.get("val_final_bits_per_byte", record["val_bits_per_byte"])
        measured = {"validation text": (bits, texts[1])}
        if second is not None and "val_second_bits_per_byte" in record:
            measured[second.name] = record["val_second_bits_per_byte"], second.text
        return baselines.describe(texts[0], measured)

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

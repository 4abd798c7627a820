"""What does a training run leave behind? All of it lies in one folder:

config.json           what was asked for, the text's hash, the library versions
tinyllm_tokenizer.json
metrics.jsonl         one object per step: step, tokens, train_loss, lr, grad_norm, tokens_per_s; at
                      evaluations also train_eval_loss, val_loss (without dropout), val_bits_per_byte,
                      mean_tokens_per_s and, on a CPU, gemm_share (of the run so far), peak_memory (bytes,
                      of the GPU if it is on one); a step whose loss or gradient was not finite has
                      ``skipped`` instead of train_loss; in float16 a step has its loss_scale, and one
                      whose gradients that was too large for has ``overflow`` instead of grad_norm
samples.txt           what the model wrote at each evaluation
loss.png              the curves
step-000135/          a checkpoint: the model as Hugging Face lays it out, and what a resumed run needs
                      (``checkpoint.py``)
tensorboard/, wandb/  if asked for (``logs.py``), with wandb-id.txt
nonfinite-step-7.json the batch of a step whose loss or gradient was not finite
lock                  whoever holds it is the one process that writes here
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinyllm.backend.device import pick_device
from tinyllm.data.token_file import tokenizer_sha256
from tinyllm.errors import Error
from tinyllm.files import SAVING, lock, read_sealed, sealed, sync, write_whole
from tinyllm.nn import Module
from tinyllm.optim import AdamW, LossScale
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tools.plot import plot_losses
from tinyllm.training.checkpoint import (
    check_space,
    checkpoint_folder,
    checkpoints,
    load_checkpoint,
    machine,
    remove_checkpoint,
    remove_left_overs,
    save_checkpoint,
    set_aside,
    step_of,
    verify,
)
from tinyllm.training.config import TrainConfig, check_continues
from tinyllm.training.metrics import parse_record, what_is_wrong

RUN_CONFIG, METRICS, SAMPLES, PLOT, LOCK = "config.json", "metrics.jsonl", "samples.txt", "loss.png", "lock"

EVALUATED = ("train_eval_loss", "val_loss", "val_bits_per_byte")  # of a record, by an evaluation


def begun_config(folder: Path) -> TrainConfig:
    """The options that resume the run in a folder: those it was begun with.

    Raises ``Error`` if the folder is no run's or its config.json is damaged.
    """
    try:
        begun = TrainConfig.from_json(_read_about(folder)["train"])
    except TypeError as error:  # a comparison of what cannot be compared
        raise Error(
            f"{folder / RUN_CONFIG} is not of a run of this version ({error}): start a new run"
        ) from None
    return replace(begun, out=folder, resume=folder)


def _read_about(folder: Path) -> dict:
    if not (folder / RUN_CONFIG).exists():
        raise Error(f"{folder} is not a run folder (it holds no {RUN_CONFIG}): give the --out of a run")
    match read_sealed(folder / RUN_CONFIG):
        case {
            "train": dict(),
            "text": {"sha256": str()},
            "tokenizer": {"sha256": str()},
            "versions": dict(),
        } as about:
            return about
    raise Error(f"{folder / RUN_CONFIG} is not of a run of this version: start a new run")


class RunFolder:
    """The folder of a run: ``begin`` makes a new one, ``reopen`` goes on with one. A context manager.

    Called with the record of a step, it writes it down and prints evaluations; ``save`` writes checkpoints
    and removes older ones. It is locked until the context ends.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.folder = config, config.resume or config.out or new_folder(config.text)
        self.history: list[dict] = []
        self.state: dict | None = None  # checkpoint.json of the one to go on from
        self.tokenizer: Tokenizer | None = None
        self.about: dict = {}  # config.json
        self.bytes_per_token = math.nan  # of the validation text
        self.loss_scale: LossScale | None = None  # of a run in float16
        self._lock = None
        self._saved_at = time.monotonic()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            self._lock.release()

    # Beginning

    def begin(self, about: dict, tokenizer: Tokenizer, model: Module) -> None:
        """Make the folder. Raises ``Error`` if there is something in it, OSError if the disk is too small."""
        self._check_empty()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self._check_empty()  # nobody began a run there between the first look and the lock
        try:
            check_space(self.folder, model)
        except OSError as error:
            raise OSError(f"{error}: make room, or choose another --out") from error
        self.tokenizer = tokenizer
        tokenizer.save(self.folder)
        # Last: a folder is a run once this is there.
        write_whole(self.folder / RUN_CONFIG, sealed(about))
        self.about = read_sealed(self.folder / RUN_CONFIG)

    def _check_empty(self) -> None:
        if not self.folder.exists():
            return
        if not self.folder.is_dir() or any(path.name != LOCK for path in self.folder.iterdir()):
            raise Error(f"{self.folder} exists and is not an empty folder: choose another --out")

    def _take_lock(self) -> None:
        busy = f"another process is writing the run in {self.folder}: wait for it, or choose another folder"
        self._lock = lock(self.folder / LOCK, busy)

    # Going on

    def reopen(self) -> None:
        """Find the newest whole checkpoint, and bring the logs to where they were when it was written.

        Raises ``Error`` if the folder is no run's, if another process writes there, if an option would
        change the numbers, or if there are checkpoints and all of them are damaged.
        """
        check_continues(begun_config(self.folder), self.config)
        self._take_lock()
        self.about = _read_about(self.folder)
        self._load_tokenizer()
        self._find_checkpoint()
        remove_left_overs(self.folder)
        step = self.state["step"] if self.state else -1
        self.history = _records_up_to(self.folder / METRICS, step)
        if not self.is_finished():
            self._repair_logs(step)

    @property
    def text_sha256(self) -> str | None:
        """Of the text that a reopened run was begun with."""
        return self.about["text"]["sha256"] if self.about else None

    def _load_tokenizer(self) -> None:
        self.tokenizer = load_tokenizer(self.folder)
        if tokenizer_sha256(self.tokenizer) != self.about["tokenizer"]["sha256"]:
            raise Error(f"the tokenizer in {self.folder} is not the run's own any more: copy it back")

    def _find_checkpoint(self) -> None:
        damaged = {}
        for folder in reversed(checkpoints(self.folder)):
            try:
                self.state = verify(folder)
            except Error as error:
                damaged[folder] = error
            else:
                break
        if damaged and self.state is None:
            raise Error(f"{self.folder} has no whole checkpoint: {'; '.join(map(str, damaged.values()))}")
        if self.state is not None and self.state["run"] != self.about["sha256"]:
            raise Error(f"{folder} is a checkpoint of another run: remove it")
        for folder, error in damaged.items():
            say(f"warning: {error}; the checkpoint is now {set_aside(folder)}, and the one before is taken")

    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.was_evaluated(self.config.steps)

    def was_evaluated(self, step: int) -> bool:
        """Whether this is the last step that was made, and its evaluation is written down."""
        return bool(self.history) and self.history[-1]["step"] == step and "val_loss" in self.history[-1]

    def _repair_logs(self, step: int) -> None:
        """As they were when the checkpoint was written: what came after it comes again."""
        if self.state and (not self.history or self.history[-1]["step"] != step):
            say(f"warning: {self.folder / METRICS} is damaged: not all records up to step {step} are there")
        if self.state and self.state["val_loss"] is None and self.was_evaluated(step):
            last = self.history.pop()  # the evaluation came later than the checkpoint, and its sample goes
            self.history.append({key: last[key] for key in last if key not in EVALUATED})
        self._rewrite_metrics()
        if (self.folder / SAMPLES).exists():
            size = self.state["samples_bytes"] if self.state else 0
            write_whole(self.folder / SAMPLES, (self.folder / SAMPLES).read_bytes()[:size])

    def _rewrite_metrics(self) -> None:
        write_whole(self.folder / METRICS, b"".join(map(_line, self.history)))

    def take_back(self, step: int) -> dict:
        """The last record, out of metrics.jsonl again: the run was stopped before its evaluation was done."""
        if self.history and self.history[-1]["step"] == step:
            last = self.history.pop()
            self._rewrite_metrics()
            return last
        return {"step": step, "tokens": self.state["tokens"] if self.state else 0}

    def restore(self, model: Module, optimizer: AdamW) -> tuple[int, int]:
        """The steps done and the tokens seen, once model and optimizer have the numbers of the checkpoint."""
        if self.state is None:
            say(f"{self.folder}: there is no checkpoint yet, the run begins again")
            return 0, 0
        folder = checkpoint_folder(self.folder, self.state["step"])
        say(f"{folder}: going on after step {self.state['step']:,} of {self.config.steps:,}")
        load_checkpoint(folder, self.state, model, optimizer, pick_device(self.config.device))
        if self.loss_scale is not None and "loss_scale" in self.state:
            self.loss_scale.load_state_dict(self.state["loss_scale"])
        here, there = self._machine(), self.state["machine"]
        changed = [
            f"{key} was {there[key]} and is {here[key]}"
            for key in here
            if here[key] != there.get(key, here[key])
        ]
        if changed:
            say(f"warning: {'; '.join(changed)}: the numbers may differ from now on")
        return self.state["step"], self.state["tokens"]

    def _machine(self) -> dict:
        """What a checkpoint says of where it was made, and of what may be another there (``ELSEWHERE``)."""
        here = machine(pick_device(self.config.device))
        return here | {"dtype": self.config.dtype, "micro-batch": self.config.at_once}

    # What happens at every step

    def __call__(self, record: dict) -> None:
        metrics = {key: value for key, value in record.items() if key not in ("sample", "seconds_left")}
        self.history.append(metrics)
        if "sample" in record:  # before the metrics: where they say val_loss, there is a sample
            with open(self.folder / SAMPLES, "ab") as file:
                file.write(f"--- step {record['step']}\n{record['sample']}\n".encode())
        with open(self.folder / METRICS, "ab") as file:
            file.write(_line(metrics))
        if "sample" in record:
            self._plot()
            say(_evaluation(record))

    def _plot(self) -> None:
        new = self.folder / (SAVING + PLOT)
        plot_losses(self.history, new, self.tokenizer.vocab_size, self.bytes_per_token)
        if new.exists():  # there is no picture without matplotlib
            os.replace(new, self.folder / PLOT)

    def not_finite(self, step: int, ids, targets, loss: float, grad_norm: float, lr: float) -> str:
        """Write the batch down, and say what was not finite; FloatingPointError if that is once too often."""
        what = f"the loss is {loss} and the gradient norm {grad_norm} at learning rate {lr:.3g}"
        path = self.folder / f"nonfinite-step-{step}.json"
        found = {
            "step": step,
            "loss": str(loss),  # JSON knows no nan
            "grad_norm": str(grad_norm),
            "lr": lr,
            "ids": ids.tolist(),
            "targets": targets.tolist(),
            "text": [self.tokenizer.decode(row) for row in ids],
        }
        write_whole(path, _line(found))
        before = itertools.takewhile(lambda record: "skipped" in record, reversed(self.history))
        if sum(1 for _ in before) >= self.config.skip_nonfinite:
            raise FloatingPointError(
                f"step {step}: {what}: start again with a smaller --lr or --clip, or --resume {self.folder} "
                f"with --skip-nonfinite (its batch is in {path})"
            )
        say(f"step {step}: {what}: no update (its batch is in {path})")
        return what

    # Checkpoints

    def save_if_due(self, model: Module, optimizer: AdamW, step: int) -> None:
        config, minutes = self.config, (time.monotonic() - self._saved_at) / 60
        every = config.checkpoint_every
        by_steps = every is not None and (step % every == 0 or self._is_best(step))
        by_time = 0 < config.checkpoint_minutes <= minutes
        if step == config.steps or by_steps or by_time:
            self.save(model, optimizer, step)

    def _is_best(self, step: int) -> bool:
        losses = self._val_losses()
        return step in losses and all(losses[step] < loss for at, loss in losses.items() if at != step)

    def _val_losses(self) -> dict[int, float]:
        return {record["step"]: record["val_loss"] for record in self.history if "val_loss" in record}

    def save(self, model: Module, optimizer: AdamW, step: int) -> Path:
        """Write the checkpoint after ``step`` steps, unless it is there; returns its folder.

        Raises OSError if the disk has not the room, or refuses: the checkpoint before is untouched then.
        """
        folder = checkpoint_folder(self.folder, step)
        if folder.exists():
            return folder
        self._sync_logs()
        about = {
            "step": step,  # also the position in the data: batches are addressed by it
            "tokens": self.history[-1]["tokens"],
            "lr": optimizer.lr,
            "seed": self.config.seed,
            "val_loss": self._val_losses().get(step),
            "samples_bytes": (self.folder / SAMPLES).stat().st_size,
            "run": self.about["sha256"],
            "text_sha256": self.about["text"]["sha256"],
            "tokenizer_sha256": self.about["tokenizer"]["sha256"],
            "versions": self.about["versions"],
            "machine": self._machine(),
        }
        if self.loss_scale is not None:
            about["loss_scale"] = self.loss_scale.state_dict()
        try:
            check_space(self.folder, model)
            save_checkpoint(folder, model, optimizer, about)
        except OSError as error:
            raise OSError(
                f"{error}: see to the disk, then tinyllm train --resume {self.folder} goes on"
            ) from error
        self._saved_at = time.monotonic()
        self._remove_old_checkpoints()
        return folder

    def _sync_logs(self) -> None:
        """A checkpoint is never newer than the logs, even if the power fails."""
        for name in (METRICS, SAMPLES):
            with open(self.folder / name, "ab") as file:
                sync(file)

    def _remove_old_checkpoints(self) -> None:
        saved, losses = checkpoints(self.folder), self._val_losses()
        evaluated = [folder for folder in saved if step_of(folder) in losses]
        best = min(evaluated, key=lambda folder: losses[step_of(folder)], default=None)
        for folder in saved[: -self.config.keep]:
            if folder == best:
                continue
            try:
                remove_checkpoint(folder)
            except OSError as error:  # no reason to end a run
                say(f"warning: the old checkpoint {folder} cannot be removed ({error})")


def _line(record: dict) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _records_up_to(path: Path, step: int) -> list[dict]:
    """The records of metrics.jsonl until the first that is of a later step, cut or damaged."""
    records = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        record = parse_record(line)
        wrong = not line.endswith(b"\n") or what_is_wrong(record, records[-1] if records else None)
        if wrong or record["step"] > step:
            break
        records.append(record)
    return records


def _evaluation(record: dict) -> str:
    """An evaluation in two lines: how well it goes, and what the model writes."""
    with np.errstate(over="ignore"):  # a diverging run's perplexity is inf
        perplexity = np.exp(record["val_loss"])
    line = (
        f"step {record['step']:>5}  train {record['train_eval_loss']:.4f}  val {record['val_loss']:.4f}"
        f" = perplexity {perplexity:.1f} = {record['val_bits_per_byte']:.3f} bits/byte"
    )
    if "mean_tokens_per_s" in record:
        line += f"  {record['mean_tokens_per_s']:,.0f} tokens/s"
    if "gemm_share" in record:
        line += f", {record['gemm_share']:.0%} of GEMM rate"
    if record.get("peak_memory") is not None:
        line += f", {record['peak_memory'] / 1e9:.2f} GB"
    if record.get("seconds_left"):
        minutes, seconds = divmod(round(record["seconds_left"]), 60)
        line += f", {minutes}:{seconds:02} left"
    return f"{line}\n            {' '.join(record['sample'].split())[:98]}"


def new_folder(text_name: str) -> Path:
    """runs/NAME-N with the first number that is free."""
    stem = Path(text_name).stem
    return next(path for n in itertools.count(1) if not (path := Path("runs") / f"{stem}-{n}").exists())


def last_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint of a run. It was complete when it got its name; its bits are not checked here."""
    with_weights = [folder for folder in checkpoints(Path(run)) if any(folder.glob("model.safetensors*"))]
    if not with_weights:
        raise Error(
            f"{run} holds no checkpoint (step-…/model.safetensors): give the --out of a run that saved one"
        )
    return with_weights[-1]


def say(line: str) -> None:
    """Print a line above the progress bar."""
    from tqdm import tqdm

    try:
        tqdm.write(line)
    except BrokenPipeError:  # nobody reads what we say any more: no reason to end a run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

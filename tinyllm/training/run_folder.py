"""The folder of a training run:

config.json           the options, the hashes of the data, the library versions
metrics.jsonl         one object per step: step, tokens, train_loss, lr, grad_norm, tokens_per_s; at
                      evaluations also val_loss (without dropout) and the task's other numbers, such as
                      train_eval_loss and val_bits_per_byte, mean_tokens_per_s (of the run so far) and
                      peak_memory (in bytes; of the GPU if the run uses one). A step whose loss or gradient
                      was not finite has ``skipped`` instead of train_loss. In float16 a step has its
                      loss_scale, and one whose gradients overflowed has ``overflow`` instead of grad_norm.
                      stdout_error and stderr_error say why output before this step was lost
samples.txt           the text generated at each evaluation
loss.png              the loss curves
step-000135/          a checkpoint: the model in Hugging Face's layout, and the state to resume from
                      (``checkpoint.py``)
tensorboard/, wandb/  logs, with --log (``loggers.py``), and wandb-id.txt
nonfinite-step-7.json the batch of a step whose loss or gradient was not finite
lock                  held by the one process that writes here

and the files of the task, such as tinyllm_tokenizer.json.
"""

import itertools
import platform
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np

from tinyllm.backend.device import describe_device, pick_device
from tinyllm.checks import pip_install
from tinyllm.errors import Error
from tinyllm.files import check_writable, lock, read_sealed, sealed, write_whole
from tinyllm.models.mixture import is_balanced
from tinyllm.nn import Module
from tinyllm.optim import AdamW, LossScale, NoLossScale
from tinyllm.training.begun import RUN_CONFIG, begun_config, data_hashes, read_about
from tinyllm.training.checkpoint import (
    check_space,
    load_checkpoint,
    machine,
    remove_checkpoint,
    remove_left_overs,
    save_checkpoint,
    set_aside,
    verify,
)
from tinyllm.training.config import RunOptions, check_continues
from tinyllm.training.loop import CompletedStep
from tinyllm.training.metrics import best_record
from tinyllm.training.output import say
from tinyllm.training.picture import PLOT
from tinyllm.training.run_log import RunLog, json_line
from tinyllm.training.step import Alone, weights_are_finite
from tinyllm.training.tasks.base import Task
from tinyllm.training.workers import Workers, suitable_number
from tinyllm.version import __version__
from tinyllm.weights.runs import checkpoint_folder, checkpoints, step_of

LOCK = "lock"


class RunFolder:
    """The folder of a new run or, after ``reopen``, of one to resume.

    Called with the record of a step, it writes the record and prints evaluations; ``save`` writes checkpoints
    and removes older ones. The folder is locked until ``close``.
    """

    replicas = Alone()

    def __init__(self, task: Task):
        self.task = task
        self.log = RunLog(self.config.resume or self.config.out or new_folder(task.name), task)
        self.about: dict = {}  # config.json
        self.state: dict = {}  # checkpoint.json of the checkpoint to resume from
        self.step = self.tokens = 0  # completed steps, and the tokens trained on
        self.loss_scale = LossScale() if self.config.dtype == "float16" else NoLossScale()
        self._lock, self._saved_at = None, time.monotonic()

    @property
    def config(self) -> RunOptions:
        """The task's options, which ``Task.load`` may complete."""
        return self.task.config

    @property
    def folder(self) -> Path:
        return self.log.folder

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.log.writes

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    # A new run

    def check_new(self) -> None:
        """Raise ``Error`` unless a new run can be written to the folder; nothing is written."""
        check_writable(self.folder, "--out")
        if self.config.out is not None:
            self._check_empty()

    def start(self, model: Module, optimizer: AdamW) -> None:
        """Start the run with this model and optimizer, or load the newest checkpoint into them."""
        self.model, self.optimizer = model, optimizer
        self.shared_by = self.config.processes or suitable_number(model, self.config.batch)  # processes
        if self.config.resume is None:
            self._begin()
        else:
            self._restore()
        self._updates = optimizer.state_dict()["t"]
        self._started = self.step, time.perf_counter()

    def _begin(self) -> None:
        """Make the folder. Raises ``Error`` if it is not empty, OSError if the disk is too full."""
        task, config, parameters = self.task, self.config, self.model.num_parameters()
        if config.out is None:
            self.log.folder = make_new_folder(task.name)  # perhaps another, if two runs started at once
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self._check_empty()  # again: another process may have started a run since ``check_new``
        asked = {"task": config.task, "train": config.to_json() | {"out": str(self.folder)}}
        found = {"parameters": parameters, "steps_per_epoch": task.steps_per_epoch}
        versions = {"tinyllm": __version__, "numpy": np.__version__, "python": platform.python_version()}
        about = asked | task.data() | found | {"versions": versions}
        try:
            check_space(self.folder, task.saved_parameters(self.model), self.optimizer)
            task.save(self.folder)
            write_whole(self.folder / RUN_CONFIG, sealed(about))  # last: it makes the folder a run
        except OSError as error:
            for path in self.folder.iterdir():
                if path.name != LOCK:
                    path.unlink()
            raise OSError(f"{error}: free some space, or choose another --out") from error
        self.about = read_sealed(self.folder / RUN_CONFIG)
        device = describe_device(pick_device(config.device))
        model = (
            f"{type(self.model).__name__}, {parameters:,} parameters, on {device}; "
            f"{config.steps:,} steps of {config.batch} {task.rows}, {task.steps_per_epoch:,} an epoch"
        )
        for line in (*task.introduction(), model):
            say(line, indent=0)
        say(f"the run will be saved in {self.folder}")

    def _check_empty(self) -> None:
        if not self.folder.exists():
            return
        if any(path.name != LOCK for path in self.folder.iterdir()):
            raise Error(f"{self.folder} exists and is not an empty folder: choose another --out")

    def _take_lock(self) -> None:
        busy = f"another process is writing the run in {self.folder}: wait for it, or choose another folder"
        self._lock = lock(self.folder / LOCK, busy)

    # A resumed run

    def reopen(self) -> None:
        """Find the newest undamaged checkpoint, and restore the logs to their state when it was written.

        Raises ``Error`` if the folder is not a run's, if another process writes to it, if an option would
        change the run's results, or if all checkpoints are damaged.
        """
        check_continues(begun_config(self.folder, type(self.config)), self.config)
        self._take_lock()
        self.about = read_about(self.folder, self.config.task)
        self._find_checkpoint()
        remove_left_overs(self.folder)
        self.log.read(self.step if self.state else -1)
        if not self.is_finished():
            self.log.repair(self.state)

    def _find_checkpoint(self) -> None:
        damaged = {}
        for folder in reversed(checkpoints(self.folder)):
            try:
                self.state = verify(folder)
            except Error as error:
                damaged[folder] = error
            else:
                break
        if damaged and not self.state:
            found = "; ".join(map(str, damaged.values()))
            raise Error(f"{self.folder} has no undamaged checkpoint: {found}")
        if self.state:
            if self.state["run"] != self.about["sha256"]:
                raise Error(f"{folder} is a checkpoint of another run: remove it")
            self.step, self.tokens = self.state["step"], self.state["tokens"]
        for folder, error in damaged.items():
            say(f"warning: {error}; it was renamed to {set_aside(folder)}, and an older checkpoint is used")

    def is_finished(self) -> bool:
        """Whether all steps and the last evaluation are done."""
        return self.log.was_evaluated(self.config.steps)

    def _restore(self) -> None:
        """Load the checkpoint into model and optimizer, if the data has not changed."""
        now = data_hashes(self.task.data())
        changed = [name for name, sha256 in data_hashes(self.about).items() if now.get(name) != sha256]
        if changed:
            found = ", ".join(changed)
            raise Error(f"the {found} of the run in {self.folder} changed since it was started: restore it")
        if not self.state:
            say(f"{self.folder} has no checkpoint yet: the run starts again")
            return
        folder, device = checkpoint_folder(self.folder, self.step), pick_device(self.config.device)
        say(f"resuming from {folder}, after step {self.step:,} of {self.config.steps:,}")
        load_checkpoint(folder, self.state, self.model, self.optimizer, device, self.task.load_weights)
        if "loss_scale" in self.state:
            self.loss_scale.load_state_dict(self.state["loss_scale"])
        here, there = self._machine(), self.state["machine"]
        changed = [key for key in here if here[key] != there.get(key, here[key])]
        if changed:
            found = "; ".join(f"{key} was {there[key]} and is {here[key]}" for key in changed)
            differ = "results may differ by rounding from here on"
            if {"micro-batch", "processes"} & {*changed} and is_balanced(self.model):
                differ = "results differ from here on, as each micro-batch has its own load-balancing loss"
            say(f"warning: {found}: {differ}")

    def _machine(self) -> dict:
        """The machine and the options in ``ELSEWHERE``, recorded in checkpoints."""
        here = machine(pick_device(self.config.device))
        here["processes"] *= self.shared_by
        return here | {"dtype": self.config.dtype, "micro-batch": self.config.at_once}

    # Every step

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Within this block workers share the steps, if there should be several processes."""
        if self.shared_by == 1:
            yield
            return
        with closing(Workers(self.shared_by, self.model, self.optimizer, self.task.loss)) as self.replicas:
            say(f"{self.shared_by} processes share every step, a core each", indent=0)
            yield

    def __call__(self, record: dict) -> None:
        self.log.add(record)
        self.step, self.tokens = record["step"], record["tokens"]
        self._updates = self.optimizer.state_dict()["t"]
        if "val_loss" in record and self.leads:
            self.log.show(record, self._seconds_left())

    def _seconds_left(self) -> float | None:
        """At the speed of the steps since the start; None before the first and after the last one."""
        first, started = self._started
        if not first < self.step < self.config.steps:
            return None
        return (time.perf_counter() - started) / (self.step - first) * (self.config.steps - self.step)

    def summary(self) -> str:
        """The lines at the end of a run: where its folder and picture are, and how to continue."""
        picture = self.folder / PLOT
        if not picture.exists():
            picture = f"no {PLOT}, which needs matplotlib: {pip_install('plot')}"
        commands = "".join(f"\n  {command}" for command in self.task.next_commands(self.folder))
        return f"run: {self.folder}\nloss curves: {picture}" + (commands and f"\nnext:{commands}")

    def resuming(self) -> str:
        """The command that resumes the run."""
        begun = type(self.config).from_json(self.about["train"]) if self.about else None
        return self.config.resuming(self.folder, begun)

    def is_between_updates(self) -> bool:
        """Whether the weights are those of the last record, that is, no later update was interrupted."""
        return bool(self.log.history) and self.optimizer.state_dict()["t"] == self._updates

    def not_finite(self, completed: CompletedStep) -> str:
        """Save the batch, and return what was not finite; FloatingPointError if it is one time too many."""
        what, path = completed.what_is_not_finite(), self.folder / f"nonfinite-step-{completed.step}.json"
        numbers = {"loss": str(completed.loss), "grad_norm": str(completed.grad_norm)}  # JSON has no nan
        batch = self.task.describe_batch(completed.batch)
        write_whole(path, json_line({"step": completed.step, **numbers, "lr": completed.lr, **batch}))
        before = itertools.takewhile(lambda record: "skipped" in record, reversed(self.log.history))
        if sum(1 for _ in before) >= self.config.skip_nonfinite or not weights_are_finite(self.model):
            raise FloatingPointError(
                f"step {completed.step}: {what}: start again with a smaller --lr or --clip, or --resume "
                f"{self.folder} with --skip-nonfinite; the batch is in {path}"
            )
        say(f"step {completed.step}: {what}: the update is skipped (the batch is in {path})")
        return what

    # Checkpoints

    def is_due(self) -> bool:
        """Whether to write a checkpoint of the last step."""
        step, every, minutes = self.step, self.config.checkpoint_every, self.config.checkpoint_minutes
        by_time = 0 < minutes <= (time.monotonic() - self._saved_at) / 60
        by_steps = every is not None and (
            step % every == 0 or best_record(self.log.history, "val_loss") is self.log.history[-1]
        )
        return step == self.config.steps or by_steps or by_time

    def save(self) -> Path:
        """Write the checkpoint of the last step, unless it exists; returns its folder.

        Raises FloatingPointError if the weights are not finite, and OSError if the disk is too full or fails;
        the checkpoint before is then unchanged.
        """
        folder = checkpoint_folder(self.folder, self.step)
        if folder.exists():
            return folder
        if not weights_are_finite(self.model):
            remedy = "start again with a smaller --lr or --weight-decay"
            if saved := checkpoints(self.folder):
                remedy += f", for example with {self.config.restart} {saved[-1]}"
            raise FloatingPointError(f"the weights after step {self.step} are not finite: {remedy}")
        samples_bytes = self.log.sync()  # on disk before the checkpoint that refers to them
        # The step is also the position in the data: a batch is a function of it.
        here = {"step": self.step, "tokens": self.tokens, "lr": self.optimizer.lr, "seed": self.config.seed}
        here |= {"val_loss": self.log.history[-1].get("val_loss"), "samples_bytes": samples_bytes}
        here |= {f"{name}_sha256": found for name, found in data_hashes(self.about).items()}
        here |= {"run": self.about["sha256"], "versions": self.about["versions"], "machine": self._machine()}
        if scale := self.loss_scale.state_dict():
            here["loss_scale"] = scale
        check_space(self.folder, self.task.saved_parameters(self.model), self.optimizer)
        save_checkpoint(folder, self.model, self.optimizer, here, self.task.save_weights)
        self._saved_at = time.monotonic()
        self._remove_old_checkpoints()
        return folder

    def _remove_old_checkpoints(self) -> None:
        saved = {step_of(folder): folder for folder in checkpoints(self.folder)}
        best = best_record((record for record in self.log.history if record["step"] in saved), "val_loss")
        for step in list(saved)[: -self.config.keep]:
            try:
                if best is None or step != best["step"]:
                    remove_checkpoint(saved[step])
            except OSError as error:  # the run can continue
                say(f"warning: the old checkpoint {saved[step]} cannot be removed ({error})")


def new_folder(name: str, parent: str = "runs") -> Path:
    """PARENT/NAME-N with the first number N that is free."""
    return next(path for path in _numbered(name, parent) if not path.exists())


def make_new_folder(name: str) -> Path:
    """Make ``new_folder``, or the next one if another process makes it first."""
    for path in _numbered(name, "runs"):
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def _numbered(name: str, parent: str) -> Iterator[Path]:
    return (Path(parent) / f"{name}-{n}" for n in itertools.count(1))

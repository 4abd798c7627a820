"""What a run needs to know of what it trains: a task has batches, a loss, an evaluation and samples.

``run.run_task`` does the rest for every task: steps, checkpoints, resuming, signals, logs.
"""

from pathlib import Path

from tinyllm.models import load_model
from tinyllm.nn import Module
from tinyllm.tensor import Tensor
from tinyllm.training.config import RunOptions
from tinyllm.training.step import Check, count_targets, language_model_loss


class Task:
    """A subclass has ``load``, ``model``, ``batch_at``, ``evaluate``, ``data`` and ``steps_per_epoch``."""

    rows = "rows"  # what a batch has so many of

    steps_per_epoch: int  # known once the data is loaded

    def __init__(self, config: RunOptions):
        self.config = config

    @property
    def name(self) -> str:
        """What the folder of a new run is named after."""
        return self.config.task

    def load(self, folder: Path, about: dict) -> None:
        """Read the data. ``about`` is the config.json of the run to go on with in ``folder``; {}: a new run.

        Raises ``Error`` if the data is not the one that the run was begun with.
        """
        raise NotImplementedError

    def model(self) -> Module:
        """The model to begin with, on the CPU, in train mode."""
        raise NotImplementedError

    def trained(self, checkpoint: Path) -> Module:
        """The model in a checkpoint of a finished run, for which no data was loaded."""
        return load_model(checkpoint, self.config.parameter_dtype)

    # A step

    def batch_at(self, step: int) -> tuple:
        """The batch of a step, counted from 0: arrays that share axis 0, from the step alone."""
        raise NotImplementedError

    def loss(self, model: Module, *rows, num_targets: int) -> Tensor:
        """The loss of some rows of a batch: a sum over them, divided by ``num_targets``."""
        return language_model_loss(model, *rows, num_targets=num_targets)

    def count(self, batch: tuple) -> int:
        """How many targets a batch has."""
        return count_targets(batch)

    def tokens(self, batch: tuple) -> int:
        """How much a batch shows the model: what a run's speed is measured in."""
        return batch[0].size

    # An evaluation

    def evaluate(self, model: Module, check: Check) -> dict[str, float]:
        """``val_loss``, the lower the better, and more numbers whose names begin with val_ or train_eval_.

        ``check()`` is to be called before every batch; what it raises breaks off the evaluation.
        """
        raise NotImplementedError

    def sample(self, model: Module, step: int, check: Check) -> str | None:
        """Something that the model wrote, for people to read."""

    # What is written down and said

    def data(self) -> dict[str, dict]:
        """What config.json says of the data: name -> a dict with its ``sha256``, and what else is of use."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write what belongs to the model, such as a tokenizer, into a new run's folder."""

    def introduction(self) -> list[str]:
        """Lines about the data, said when a run begins."""
        return []

    def describe_evaluation(self, record: dict) -> str:
        """What an evaluation found, on one line."""
        return "  ".join(f"{key} {record[key]:.4f}" for key in record if is_evaluation(key))

    def describe_batch(self, batch: tuple) -> dict:
        """A batch as JSON, for whoever looks into one whose loss is not finite."""
        return {"batch": [array.tolist() for array in batch]}

    def picture(self) -> tuple:
        """More arguments of ``plot_losses``."""
        return ()

    def conclusion(self, record: dict) -> str | None:
        """What is said of the last record, when the run is over."""


def is_evaluation(key: str) -> bool:
    """Whether a number of a record comes from an evaluation."""
    return key.startswith(("val_", "train_eval_"))

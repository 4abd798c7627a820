"""What a run reports of its steps: records, generated texts, the picture, and the lines it prints."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from tinyllm.files import append_whole, read_file, sync, write_whole
from tinyllm.training.checkpoint import DAMAGED, lost_evaluations
from tinyllm.training.metrics import METRICS, parse_records
from tinyllm.training.output import say
from tinyllm.training.picture import PLOT, plot_losses
from tinyllm.training.tasks.base import Task, is_evaluation

SAMPLES = "samples.txt"


class RunLog:
    """The records of a run's steps, in ``history`` and in its folder; see ``run_folder.py`` for the files.

    Of several processes only the first one ``writes``; the others have the history.
    """

    def __init__(self, folder: Path, task: Task):
        self.folder, self.task, self.writes = folder, task, True
        self.history: list[dict] = []
        self._plotted_at, self._plotting = time.monotonic(), 0.0  # the last picture took so many seconds

    # A resumed run

    def read(self, last: int) -> None:
        """Read the records up to step ``last``."""
        path = self.folder / METRICS
        lines = read_file(path).split(b"\n")[:-1] if path.exists() else []  # not a partial last line
        records, _ = parse_records(lines)
        self.history = [record for record in records if record["step"] <= last]

    def repair(self, state: dict) -> None:
        """Restore the files to their state when a checkpoint was written: later steps are run again.

        ``state`` is its checkpoint.json, or empty if there is none.
        """
        step, samples, metrics = state.get("step", 0), self.folder / SAMPLES, self.folder / METRICS
        if state and (not self.history or self.history[-1]["step"] != step):
            kept = ""
            if metrics.exists():
                write_whole(self.folder / f"{DAMAGED}{METRICS}", read_file(metrics))
                kept = f"; it was copied to {DAMAGED}{METRICS}"
            say(f"warning: {metrics} is damaged: records up to step {step} are missing{kept}")
            self.history += lost_evaluations(self.folder, self.history, step)
        if state and state["val_loss"] is None and self.was_evaluated(step):
            last = self.history.pop()  # the evaluation is later than the checkpoint: it is repeated
            self.history.append({key: last[key] for key in last if not is_evaluation(key)})
        self._rewrite()
        if samples.exists():
            write_whole(samples, read_file(samples, state.get("samples_bytes", 0)))

    def _rewrite(self) -> None:
        if self.writes:
            write_whole(self.folder / METRICS, b"".join(map(json_line, self.history)))

    def was_evaluated(self, step: int) -> bool:
        """Whether this is the last completed step, and its evaluation is recorded."""
        return bool(self.history) and self.history[-1]["step"] == step and "val_loss" in self.history[-1]

    def take_back(self, step: int) -> dict | None:
        """Remove and return the record of this step, if it is the last: its evaluation was not completed."""
        if not self.history or self.history[-1]["step"] != step:
            return None
        last = self.history.pop()
        self._rewrite()
        return last

    # Every step

    def add(self, record: dict) -> None:
        metrics = {key: value for key, value in record.items() if key != "sample"}
        if self.writes:
            if "sample" in record:  # before the metrics, so that a recorded val_loss implies a sample
                text = f"--- step {record['step']}\n{record['sample']}\n"
                append_whole(self.folder / SAMPLES, text.encode())
            append_whole(self.folder / METRICS, json_line(metrics))
        self.history.append(metrics)

    def show(self, record: dict, seconds_left: float | None) -> None:
        """Draw the loss curves and print the evaluation in ``record``."""
        self._plot()
        for line in self._describe(record, seconds_left):
            say(line, indent=12)

    def _plot(self) -> None:
        """Draw the loss curves, unless (before the end) that last took longer than the training since."""
        started = time.monotonic()
        recent = started - self._plotted_at < self._plotting
        if recent and self.history[-1]["step"] < self.task.config.steps:
            return
        plot_losses(self.history, self.folder / PLOT, *self.task.picture())
        self._plotted_at = time.monotonic()
        self._plotting = self._plotted_at - started

    def _describe(self, record: dict, seconds_left: float | None) -> Iterator[str]:
        """The lines of an evaluation: its numbers; speed, memory and time left; the sample."""
        yield f"step {record['step']:>5}  {self.task.describe_evaluation(record)}"
        if "mean_tokens_per_s" in record:
            line = f"{' ' * 12}{record['mean_tokens_per_s']:,.0f} tokens/s"
            if record.get("peak_memory") is not None:
                line += f", {record['peak_memory'] / 1e9:.2f} GB"
            if seconds_left is not None:
                minutes, seconds = divmod(round(seconds_left), 60)
                line += f", {minutes}:{seconds:02} left"
            yield line
        if "sample" in record:
            yield f"{' ' * 12}{' '.join(record['sample'].split())}"

    def sync(self) -> int:
        """Bring the files onto the disk; return the size of samples.txt in bytes."""
        for name in (METRICS, SAMPLES):
            with open(self.folder / name, "ab") as file:
                sync(file)
        return (self.folder / SAMPLES).stat().st_size


def json_line(record: dict) -> bytes:
    return json.dumps(record).encode() + b"\n"

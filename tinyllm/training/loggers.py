"""Logs of a run: lines on the terminal, a picture of its losses, TensorBoard, Weights & Biases.

A log is a callback that receives the record of every step. ``open_logs`` opens the ones in ``--log``, and
closes them at the end of the run, however it ends. Their packages, and matplotlib for the picture, are
optional, and imported only when they are used.

    loss.png      the losses so far (``plot_losses``), drawn at evaluations
    tensorboard   the folder tensorboard/ in the run's folder, for `tensorboard --logdir`
    wandb         the project tinyllm of the user who is logged in; WANDB_PROJECT selects another, and
                  WANDB_MODE=offline logs to the folder wandb/ in the run's folder
"""

import html
import importlib
import io
import itertools
import json
import math
import os
import re
import secrets
import struct
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

from tinyllm.checks import pip_install
from tinyllm.errors import Error
from tinyllm.files import read_file, replacing, write_whole

PLOT = "loss.png"

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # the package that each log needs

TENSORBOARD_FOLDER, WANDB_ID = "tensorboard", "wandb-id.txt"

Log = Callable[[dict], None]

Written = Callable[[int, dict[str, float], str | None, Path | None], None]  # step, numbers, sample, picture

LINE = 88  # columns


def check_logs(names: Sequence[str]) -> None:
    """Raise ``Error`` for a log that is unknown or named twice, or whose package is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise Error(f"--log {name!r} is unknown: choose {' or '.join(PACKAGES)}")
        if list(names).count(name) > 1:
            raise Error(f"--log names {name!r} twice: name it once")
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            raise Error(f"--log {name} needs {PACKAGES[name]}: {pip_install(name)}") from None


@contextmanager
def open_logs(names: Sequence[str], folder: Path, about: dict) -> Iterator[Log]:
    """The logs of a run as one callback, to be called with the record of every step.

    A record has ``step``, numbers, which are logged under their own names (None is omitted), and at
    evaluations ``val_loss`` and perhaps a generated ``sample``. The picture ``loss.png`` in the run's
    ``folder`` is logged at evaluations, if it exists. ``about``, the run's config.json, is logged once.

    A resumed run continues the same logs. TensorBoard discards what was logged from the first repeated step
    on; W&B keeps it, and ignores the repeated steps with a warning.

    Raises ``Error`` as ``check_logs`` does, if W&B's file in the run's folder is damaged, or if W&B does not
    start; OSError if a log cannot be written.
    """
    check_logs(names)
    opened = {"tensorboard": tensorboard_log, "wandb": wandb_log}
    with ExitStack() as stack:
        logs = [stack.enter_context(opened[name](folder, about)) for name in names]

        def log(record: dict) -> None:
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            step, sample = numbers.pop("step"), record.get("sample")
            picture = folder / PLOT if "val_loss" in record and (folder / PLOT).exists() else None
            for each in logs:
                each(step, numbers, sample, picture)

        yield log


# ------------------------------------------------------------------------------ TensorBoard


@contextmanager
def tensorboard_log(folder: Path, about: dict) -> Iterator[Written]:
    """A TensorBoard log in the subfolder ``tensorboard``; see ``open_logs``.

    Every number is a scalar (stored in float32), the sample a text, the picture an image. Each attempt of a
    run, resumed or not, writes its own file of events, which are tensorboardX's protocol buffers; TensorBoard
    reads the files in the order of their names. They are flushed at the end of every evaluation.
    """
    # Not its SummaryWriter: that writes from a thread with a bounded queue. If the disk is full, the thread
    # ends, and the run then waits for ever for a free slot.
    from tensorboardX import RecordWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import scalar, text

    events = folder / TENSORBOARD_FOLDER
    events.mkdir(parents=True, exist_ok=True)
    attempts = sum(1 for _ in events.glob("events.out.tfevents.*"))
    names = (events / f"events.out.tfevents.{number:06}" for number in itertools.count(attempts))
    with closing(RecordWriter(str(next(path for path in names if not path.exists())))) as file:

        def write(**event) -> None:
            file.write(Event(wall_time=time.time(), **event).SerializeToString())

        def log(step: int, numbers: dict[str, float], sample: str | None, picture: Path | None) -> None:
            nonlocal begun
            if not begun and attempts > 0:  # discards what earlier attempts logged from this step on
                write(step=step, session_log=SessionLog(status=SessionLog.START))
            if not begun:
                write(step=step, summary=text("about", _as_code(json.dumps(about, indent=2))))
            begun = True
            for key, value in numbers.items():
                write(step=step, summary=scalar(key, value))
            if sample is not None:
                write(step=step, summary=text("sample", _as_code(sample)))
            if picture is not None:
                data = picture.read_bytes()
                width, height = struct.unpack(">II", data[16:24])  # the first chunk of a PNG
                image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=data)
                write(step=step, summary=Summary(value=[Summary.Value(tag="loss", image=image)]))
            if "val_loss" in numbers:
                file.flush()

        write(file_version="brain.Event:2")
        begun = False
        yield log


def _as_code(text: str) -> str:
    """Markdown that shows a text verbatim."""
    return "\n".join("    " + line for line in text.split("\n"))


# ------------------------------------------------------------------------ Weights & Biases


@contextmanager
def wandb_log(folder: Path, about: dict) -> Iterator[Written]:
    """A Weights & Biases log with the name of the run's folder; see ``open_logs``.

    Its id is stored in ``wandb-id.txt`` in that folder, where a resumed run finds it. A run that ends with an
    exception is marked as failed.
    """
    import wandb

    project, name = os.environ.get("WANDB_PROJECT", "tinyllm"), folder.resolve().name
    again = dict(id=_wandb_id(folder), resume="allow", allow_val_change=True)  # options may differ
    try:
        run = wandb.init(project=project, name=name, dir=str(folder), config=about, **again)
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise Error(f"W&B does not start ({reason}): run `wandb login`, or set WANDB_MODE=offline") from None

    def log(step: int, numbers: dict[str, float], sample: str | None, picture: Path | None) -> None:
        media = {}
        if sample is not None:
            media["sample"] = wandb.Html(f"<pre>{html.escape(sample)}</pre>")
        if picture is not None:
            media["loss"] = wandb.Image(str(picture))
        run.log(numbers | media, step=step)

    with run:
        yield log


def _wandb_id(folder: Path) -> str:
    """The run's id at W&B, from its folder; a new one is written there."""
    file = folder / WANDB_ID
    if not file.exists():
        write_whole(file, f"{secrets.token_hex(4)}\n".encode())
    found = read_file(file).decode("utf-8", errors="replace").strip()
    if not (found.isascii() and found.isalnum()):
        raise Error(f"{file} has no W&B id: remove it to log to a new W&B run")
    return found


# ------------------------------------------------------------------------------ the terminal


def say(text: str, indent: int | None = None) -> None:
    """Print a text above the progress bar; with an ``indent`` it is wrapped, which would break a command."""
    from tqdm import tqdm

    tqdm.write(text if indent is None else "\n".join(wrap(text, indent)))


class Output:
    """A text stream that drops what cannot be written, so that this never ends a run.

    The reader of a pipe may be gone, a disk full, a terminal or the stream itself (None) closed.
    """

    def __init__(self, stream: TextIO | None):
        self.stream, self.error = stream or io.StringIO(), None if stream else "it is closed"

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except ValueError as error:  # it is closed, or cannot encode the text
            self.error = str(error)
        except OSError as error:
            self.error = str(error.strerror)
            silence(self.stream)
        return len(text)

    def flush(self) -> None:
        """Do nothing: ``write`` flushes."""


def silence(stream: TextIO) -> None:
    """Make the null device of a stream that cannot be written, or Python fails to flush it at exit."""
    with suppress(OSError, AttributeError), open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), stream.fileno())


@contextmanager
def robust_output(*names: str) -> Iterator[None]:
    """Within this context, what stdout and stderr, or one of them, cannot write is dropped."""
    redirect = {"stdout": redirect_stdout, "stderr": redirect_stderr}
    with ExitStack() as stack:
        for name in names or redirect:
            stream = getattr(sys, name)
            stack.enter_context(redirect[name](stream if isinstance(stream, Output) else Output(stream)))
        yield


def output_errors() -> dict[str, str]:
    """Why stdout or stderr could not be written since the last call, as entries of a step's record."""
    found = {}
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if reason := getattr(stream, "error", None):
            found[f"{name}_error"], stream.error = reason, None
    return found


def number(value: float, decimals: int) -> str:
    """The value with these decimals, or four digits if it is large, as in a run that diverges."""
    return f"{value:.{decimals}f}" if value < 1e6 else f"{value:.4g}"


def wrap(line: str, indent: int) -> list[str]:
    """The line broken at spaces into lines of at most ``LINE`` columns, all but the first indented.

    A word that is too long, a path say, is broken only if there is an indent.
    """
    lines, current = [], ""
    for word in re.findall(" *[^ ]+", line):
        if current.strip() and _columns(current + word) > LINE:
            lines.append(current)
            current, word = " " * indent, word.lstrip()
        for character in word:
            if indent and _columns(current + character) > LINE:
                lines.append(current)
                current = " " * indent
            current += character
    return [*lines, current]


def _columns(text: str) -> int:
    """The width of a text in a terminal, where a Chinese character, say, takes two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


# ------------------------------------------------------------------------------ the picture

# Dark enough to read on white; the first few can be told apart with colour blindness.
COLORS = ("#2f6db0", "#d1622b", "#3d8f5f", "#8a5fb0", "#b8912a", "#2b9aa8", "#b0487a", "#6b6b6b")

GREY, LIGHT = "#6b6b6b", "#e4e4e4"

Y_AXES = {"loss": "loss (nats per token)", "bits-per-byte": "bits per byte"}

FIGURE_SIZE, DPI = (8, 4.5), 150  # inches, and pixels in each


def plot_losses(
    history: list[dict], path: str | Path, vocab_size: int | None = None, bytes_per_token: float | None = None
) -> None:
    """Plot the losses of one run over its steps; without matplotlib, do nothing.

    ``history`` has the records of ``metrics.jsonl``, a dict per step. The loss of each training batch, which
    dropout increases, is a faint line; the losses of evaluations have dots, and the lowest validation loss a
    ring. With ``vocab_size`` a dotted line marks ln V, the loss of guessing; with ``bytes_per_token`` (of the
    validation text) a second axis has the loss in bits per byte.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
    axes = figure.subplots()
    train, validation = COLORS[:2]
    faint, dots = dict(alpha=0.3, linewidth=0.8), dict(marker="o", markersize=3)
    for key, label, style in (
        ("train_loss", "training batch (with dropout and noise, if any)", dict(color=train, **faint)),
        ("train_eval_loss", "training data", dict(color=train, **dots)),
        ("val_loss", "validation data", dict(color=validation, **dots)),
    ):
        points = [(record["step"], record[key]) for record in history if key in record]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    nats_per_bit = None if bytes_per_token is None else math.log(2) * bytes_per_token
    if best := best_record(history, "val_loss"):
        bits = f" ({best['val_loss'] / nats_per_bit:.3f} bits per byte)" if nats_per_bit else ""
        label = f"best: {best['val_loss']:.3f}{bits} at step {best['step']:,}"
        ring(axes, best["step"], best["val_loss"], validation, label)
    if vocab_size is not None:
        guessing = math.log(vocab_size)
        axes.axhline(guessing, color=GREY, linestyle=":", linewidth=1.2)
        where = dict(xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points")
        axes.annotate("ln V: guessing", (1, guessing), ha="right", color=GREY, fontsize="small", **where)
    if nats_per_bit:
        functions = (lambda nats: nats / nats_per_bit, lambda bits: bits * nats_per_bit)
        right = axes.secondary_yaxis("right", functions=functions)
        right.set_ylabel(Y_AXES["bits-per-byte"])
        quiet_axes(right)
    axes.set(xlabel="step", ylabel="loss" if vocab_size is None else Y_AXES["loss"])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", integer=True)
    quiet_axes(axes)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize="small")
    with replacing(Path(path)) as new:
        figure.savefig(new, dpi=DPI)


def best_record(records: Iterable[dict], key: str) -> dict | None:
    """The first record in which ``key`` is lowest; None if no record has it."""
    found = (record for record in records if key in record)
    return min(found, key=lambda record: record[key], default=None)


def ring(axes, x: float, y: float, color: str, label: str | None = None) -> None:
    style = dict(marker="o", markersize=9, markerfacecolor="none", markeredgewidth=1.5, linestyle="none")
    axes.plot([x], [y], color=color, zorder=5, label=label, **style)


def quiet_axes(axes) -> None:
    """A light grid and frame, so that the curves are the darkest part of the picture."""
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(LIGHT)
    axes.tick_params(color=LIGHT, labelcolor=GREY)

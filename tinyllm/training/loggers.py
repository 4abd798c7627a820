"""Logs of a run: lines on the terminal, a picture of its losses, TensorBoard, Weights & Biases.

Everything that a run has to say goes through one place, which gets the record of every step. A log is a
callback for it: ``open_logs`` opens those that are asked for, and closes them when the run is over, however
it ended. These, and matplotlib for the picture, are optional packages, imported when they are asked for.

    loss.png      the losses so far (``plot_losses``), drawn at every evaluation
    tensorboard   the folder tensorboard/ in the run's folder, for `tensorboard --logdir`
    wandb         the project tinyllm of the user who is logged in; WANDB_PROJECT names another, and
                  WANDB_MODE=offline keeps it on this machine, in the folder wandb/ in the run's folder
"""

import html
import importlib
import itertools
import json
import math
import os
import secrets
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from tinyllm.errors import Error

PLOT = "loss.png"

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # what each log is written with

TENSORBOARD_FOLDER, WANDB_ID = "tensorboard", "wandb-id.txt"

Log = Callable[[dict], None]

Written = Callable[[int, dict[str, float], str | None, Path | None], None]  # step, numbers, sample, picture


def check_logs(names: Sequence[str]) -> None:
    """``Error`` unless every name is that of a log, none comes twice, and their packages are installed."""
    for name in names:
        if name not in PACKAGES:
            raise Error(f"log {name!r} is unknown: choose {' or '.join(PACKAGES)}")
        if list(names).count(name) > 1:
            raise Error(f"log {name!r} is asked for twice: name it once")
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            raise Error(f"log {name!r} needs {PACKAGES[name]}: pip install 'tinyllm-numpy[{name}]'") from None


@contextmanager
def open_logs(names: Sequence[str], folder: Path, about: dict) -> Iterator[Log]:
    """The logs of a run in one callback, to be called with the record of every step.

    A record holds ``step``, numbers, which are logged under their own names (what is None is not known and
    omitted), and at evaluations ``val_loss`` and perhaps a ``sample`` of the model's writing; then
    ``loss.png`` in the run's ``folder`` is logged too, if it is there. ``about`` says what the run is, and is
    logged once.

    A run that is resumed goes on in the same logs. TensorBoard forgets what was logged before of the first
    step that comes, and of all after it; W&B keeps that, and ignores, with a warning, those steps when they
    come again.

    Raises ``Error`` as ``check_logs``, if W&B's file in the run's folder is damaged, or if W&B does not
    begin; OSError if a log cannot be written.
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
    """A log that TensorBoard reads, in the folder's ``tensorboard``; see ``open_logs``.

    Every number is a scalar (in float32, as TensorBoard keeps them), the sample a text, the plot an image.
    A file of events holds records of tensorboardX's protocol buffers; every attempt of a run has its own,
    and TensorBoard reads them in order of their names. All is on disk at the end of every evaluation.
    """
    # Not its SummaryWriter: that hands events to a thread, and once a full disk has ended the thread, the run
    # waits for ever for a place in its queue.
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
            if not begun and attempts > 0:  # what an attempt before logged from this step on is forgotten
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
                width, height = struct.unpack(">II", data[16:24])  # as the first chunk of every PNG says
                image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=data)
                write(step=step, summary=Summary(value=[Summary.Value(tag="loss", image=image)]))
            if "val_loss" in numbers:
                file.flush()

        write(file_version="brain.Event:2")
        begun = False
        yield log


def _as_code(text: str) -> str:
    """Markdown that shows a text as it stands."""
    return "\n".join("    " + line for line in text.split("\n"))


# ------------------------------------------------------------------------ Weights & Biases


@contextmanager
def wandb_log(folder: Path, about: dict) -> Iterator[Written]:
    """A log at Weights & Biases, named as the run's folder; see ``open_logs``.

    Its id is in the run's folder, in ``wandb-id.txt``: that is how a resumed run finds it. A run that ends
    with an exception is marked as failed.
    """
    import wandb

    project, name = os.environ.get("WANDB_PROJECT", "tinyllm"), folder.resolve().name
    again = dict(id=_wandb_id(folder), resume="allow", allow_val_change=True)  # perhaps with other options
    try:
        run = wandb.init(project=project, name=name, dir=str(folder), config=about, **again)
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise Error(f"W&B does not begin ({reason}): run `wandb login`, or set WANDB_MODE=offline") from None

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
    """The id of the run at W&B: the one in its folder, or a new one, written there first."""
    file = folder / WANDB_ID
    if not file.exists():
        file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    found = file.read_text(encoding="utf-8", errors="replace").strip()
    if not (found.isascii() and found.isalnum()):
        raise Error(f"{file} holds no id of W&B's: remove it, and the run goes on there as a new one")
    return found


# ------------------------------------------------------------------------------ the terminal


def say(line: str) -> None:
    """Print a line above the progress bar."""
    from tqdm import tqdm

    try:
        tqdm.write(line)
    except BrokenPipeError:  # nobody reads what we say any more: no reason to end a run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ------------------------------------------------------------------------------ the picture

# Dark enough to read on white, and apart for colour-blind eyes where few runs are compared.
COLORS = ("#2f6db0", "#d1622b", "#3d8f5f", "#8a5fb0", "#b8912a", "#2b9aa8", "#b0487a", "#6b6b6b")

GREY, LIGHT = "#6b6b6b", "#e4e4e4"

Y_AXES = {"loss": "loss (nats per token)", "bits-per-byte": "bits per byte"}

FIGURE_SIZE, DPI = (8, 4.5), 150  # inches, and pixels in each


def plot_losses(
    history: list[dict], path: str | Path, vocab_size: int | None = None, bytes_per_token: float | None = None
) -> None:
    """Draw the losses of one run over its steps; without matplotlib, do nothing.

    ``history`` is what ``metrics.jsonl`` holds, a dict per step. The loss of each training batch is faint
    (dropout makes it higher than the model is); the losses measured at evaluations have dots, and the best
    on the validation data a ring. With ``vocab_size`` a dotted line stands at ln V, the loss of guessing;
    with ``bytes_per_token`` (of the validation text) a second axis reads the loss in bits per byte.
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
        ("train_loss", "training batch (with dropout, if any)", dict(color=train, **faint)),
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
    figure.savefig(path, dpi=DPI)


def best_record(records: Iterable[dict], key: str) -> dict | None:
    """The record in which ``key`` is lowest, the first if there are several; None if no record has it."""
    found = (record for record in records if key in record)
    return min(found, key=lambda record: record[key], default=None)


def ring(axes, x: float, y: float, color: str, label: str | None = None) -> None:
    style = dict(marker="o", markersize=9, markerfacecolor="none", markeredgewidth=1.5, linestyle="none")
    axes.plot([x], [y], color=color, zorder=5, label=label, **style)


def quiet_axes(axes) -> None:
    """Light grid, no box: the curves are what is dark in the picture."""
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(LIGHT)
    axes.tick_params(color=LIGHT, labelcolor=GREY)

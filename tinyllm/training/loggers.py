"""Logs of a run: TensorBoard and Weights & Biases.

A log is a callback that receives the record of every step. ``open_logs`` opens the ones in ``--log``, and
closes them at the end of the run, however it ends. Their packages are optional, and imported only when they
are used.

    tensorboard   the folder tensorboard/ in the run's folder, for `tensorboard --logdir`
    wandb         the project tinyllm of the user who is logged in; WANDB_PROJECT selects another, and
                  WANDB_MODE=offline logs to the folder wandb/ in the run's folder
"""

import html
import importlib
import itertools
import json
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from tinyllm.checks import pip_install
from tinyllm.errors import Error
from tinyllm.files import read_file, write_whole
from tinyllm.training.picture import PLOT

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # the package that each log needs

TENSORBOARD_FOLDER, WANDB_ID = "tensorboard", "wandb-id.txt"

Log = Callable[[dict], None]

Written = Callable[[int, dict[str, float], str | None, Path | None], None]  # step, numbers, sample, picture


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

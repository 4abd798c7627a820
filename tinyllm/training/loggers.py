"""How does one watch a run from elsewhere? With TensorBoard, or with Weights & Biases.

Everything that a run has to say goes through one place, the callback of ``train``, which gets the record of
every step. A log is such a callback: ``open_logs`` opens those that are asked for, and closes them when
the run is over, however it ended. Both are optional packages, imported when they are asked for.

    tensorboard   the folder tensorboard/ in the run's folder, for `tensorboard --logdir`
    wandb         the project tinyllm of the user who is logged in; WANDB_PROJECT names another, and
                  WANDB_MODE=offline keeps it on this machine, in the folder wandb/ in the run's folder
"""

from __future__ import annotations

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

from tinyllm.errors import Error
from tinyllm.training.run_folder import PLOT

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # what each log is written with

TENSORBOARD_FOLDER, WANDB_ID = "tensorboard", "wandb-id.txt"

Log = Callable[[dict], None]


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
            raise Error(f"log {name!r} needs {PACKAGES[name]}: pip install 'tinyllm[{name}]'") from None


@contextmanager
def open_logs(names: Sequence[str], folder: Path, about: dict) -> Iterator[Log]:
    """The logs of a run in one callback, to be called with the record of every step.

    A record holds ``step``, numbers, which are logged under their own names (what is None is not known and
    left out), and at evaluations a ``sample`` of the model's writing; then ``loss.png`` in the run's
    ``folder`` is logged too, if it is there. ``about`` says what the run is, and is logged once.

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
            for each in logs:
                each(record)

        yield log


def _numbers(record: dict) -> dict[str, float]:
    """What of a record is a curve over the steps: the numbers that metrics.jsonl has."""
    known = {key: value for key, value in record.items() if isinstance(value, int | float)}
    return {key: value for key, value in known.items() if key not in ("step", "seconds_left")}


# ------------------------------------------------------------------------------ TensorBoard


@contextmanager
def tensorboard_log(folder: Path, about: dict) -> Iterator[Log]:
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

        def begin(step: int) -> None:
            if attempts > 0:  # what an attempt before logged from this step on, TensorBoard forgets
                write(step=step, session_log=SessionLog(status=SessionLog.START))
            write(step=step, summary=text("about", _as_code(json.dumps(about, indent=2))))

        def log(record: dict) -> None:
            nonlocal begun
            step = record["step"]
            if not begun:
                begin(step)
                begun = True
            for key, value in _numbers(record).items():
                write(step=step, summary=scalar(key, value))
            if "sample" not in record:
                return
            write(step=step, summary=text("sample", _as_code(record["sample"])))
            if (folder / PLOT).exists():
                write(step=step, summary=Summary(value=[Summary.Value(tag="loss", image=_picture())]))
            file.flush()

        def _picture() -> Summary.Image:
            data = (folder / PLOT).read_bytes()
            width, height = struct.unpack(">II", data[16:24])  # as the first chunk of every PNG says
            return Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=data)

        write(file_version="brain.Event:2")
        begun = False
        yield log


def _as_code(text: str) -> str:
    """Markdown that shows a text as it stands."""
    return "\n".join("    " + line for line in text.split("\n"))


# ------------------------------------------------------------------------ Weights & Biases


@contextmanager
def wandb_log(folder: Path, about: dict) -> Iterator[Log]:
    """A log at Weights & Biases, named as the run's folder; see ``open_logs``.

    Its id is in the run's folder, in ``wandb-id.txt``: that is how a resumed run finds it. A run that ends
    with an exception is marked as failed.
    """
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tinyllm"),
            name=folder.resolve().name,
            dir=str(folder),
            id=_wandb_id(folder),
            resume="allow",
            config=about,
            allow_val_change=True,  # a resumed run may go on with more steps
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise Error(f"W&B does not begin ({reason}): run `wandb login`, or set WANDB_MODE=offline") from None

    def log(record: dict) -> None:
        values = _numbers(record)
        if "sample" in record:
            values["sample"] = wandb.Html(f"<pre>{html.escape(record['sample'])}</pre>")
            if (folder / PLOT).exists():
                values["loss"] = wandb.Image(str(folder / PLOT))
        run.log(values, step=record["step"])

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

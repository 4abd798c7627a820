"""TensorBoard and W&B receive every record, and their logs are complete however a run ends."""

import base64
import dataclasses
import inspect
import json
import os
import signal
import struct
import subprocess
import sys
import types

import numpy as np
import pytest

from tinyllm import Error
from tinyllm.training.config import TrainConfig
from tinyllm.training.loggers import check_logs, open_logs
from tinyllm.training.picture import PLOT
from tinyllm.training.run_folder import begun_config
from tinyllm.training.tasks.pretrain import train

tensorboardX = pytest.importorskip("tensorboardX")
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboardX.record_writer import masked_crc32c  # noqa: E402

ABOUT = {"train": {"lr": 0.1}, "text": {"name": "rhyme"}}
SAMPLE = "The <b>cat</b>\n\nsat é"
STEP_0 = {"step": 0, "tokens": 0, "val_loss": 4.5, "sample": SAMPLE}
STEP_1 = {"step": 1, "tokens": 8, "train_loss": 4.25, "lr": 0.01, "grad_norm": 3.0, "tokens_per_s": 100.5}
STEP_2 = {"step": 2, "tokens": 16, "train_loss": None, "lr": 0.02, "grad_norm": None}
PNG = base64.b64decode(  # a picture of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def read_events(file) -> list[Event]:
    """The records of a file as TensorBoard reads them: length, its checksum, data, its checksum."""
    data, events = file.read_bytes(), []
    while data:
        header, (check,) = data[:8], struct.unpack("<I", data[8:12])
        assert check == masked_crc32c(header)
        (length,) = struct.unpack("<Q", header)
        record, (check,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert check == masked_crc32c(record)
        events.append(Event.FromString(record))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    return events


def event_files(folder):
    return sorted((folder / "tensorboard").iterdir())


def values(events):
    """(step, tag, value) of everything that was logged, in order."""
    return [(event.step, value.tag, value) for event in events for value in event.summary.value]


def scalars(events) -> dict[tuple[int, str], float]:
    return {
        (step, tag): value.simple_value
        for step, tag, value in values(events)
        if value.WhichOneof("value") == "simple_value"
    }


def texts(events) -> dict[tuple[int, str], str]:
    return {
        (step, tag): value.tensor.string_val[0].decode("utf-8")
        for step, tag, value in values(events)
        if value.metadata.plugin_data.plugin_name == "text"
    }


# ------------------------------------------------------------------------------ TensorBoard


def test_tensorboard_has_the_scalars_of_the_metrics_and_the_samples(tmp_path):
    text = tmp_path / "rhyme.txt"
    text.write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    config = TrainConfig(
        out=tmp_path / "run", text=str(text), tokenizer="char", n_layer=1, n_head=2, n_embd=16, context=16,
        batch=4, steps=4, warmup=1, eval_every=2, prompt="the",
    )  # fmt: skip
    with open_logs(["tensorboard"], tmp_path / "logs", ABOUT) as log:
        train(config, progress=False, callback=log)
    (file,) = event_files(tmp_path / "logs")
    events = read_events(file)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    expected = {}
    for record in map(json.loads, lines):
        step = record.pop("step")
        expected |= {(step, key): float(np.float32(value)) for key, value in record.items()}
    assert scalars(events) == expected
    assert {tag for _, tag in expected} >= {"train_loss", "lr", "grad_norm", "tokens_per_s", "val_loss"}
    samples = (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
    for step in (0, 2, 4):
        shown = texts(events)[step, "sample/text_summary"]
        assert all(line.startswith("    ") for line in shown.split("\n"))
        sample = "\n".join(line[4:] for line in shown.split("\n"))
        assert f"--- step {step}\n{sample}\n" in samples


def test_tensorboard_has_every_record_and_the_config(tmp_path):
    with open_logs(["tensorboard"], tmp_path / "new" / "run", ABOUT) as log:
        for record in (STEP_0, STEP_1, STEP_2):
            log(record)
    (file,) = event_files(tmp_path / "new" / "run")
    assert "tfevents" in file.name  # TensorBoard looks for it
    events = read_events(file)
    assert scalars(events) == {
        (0, "tokens"): 0,
        (0, "val_loss"): 4.5,
        (1, "tokens"): 8,
        (1, "train_loss"): 4.25,
        (1, "lr"): np.float32(0.01),
        (1, "grad_norm"): 3,
        (1, "tokens_per_s"): 100.5,
        (2, "tokens"): 16,
        (2, "lr"): np.float32(0.02),
    }
    found = texts(events)
    assert found.keys() == {(0, "about/text_summary"), (0, "sample/text_summary")}
    assert found[0, "sample/text_summary"] == "    The <b>cat</b>\n    \n    sat é"
    assert json.loads(found[0, "about/text_summary"]) == ABOUT
    assert not any(event.HasField("session_log") for event in events)


def test_tensorboard_has_the_picture_of_each_evaluation(tmp_path):
    with open_logs(["tensorboard"], tmp_path, ABOUT) as log:
        log(STEP_0)  # without matplotlib there is none
        (tmp_path / PLOT).write_bytes(PNG)
        log(STEP_1)
        log(STEP_0 | {"step": 2})
    found = values(read_events(event_files(tmp_path)[0]))
    ((step, tag, value),) = [each for each in found if each[2].WhichOneof("value") == "image"]
    assert (step, tag, value.image.width, value.image.height) == (2, "loss", 1, 1)
    assert value.image.encoded_image_string == PNG


def test_tensorboard_has_the_size_of_the_picture(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(3, 2), dpi=10)
    figure.savefig(tmp_path / PLOT, dpi=10)
    with open_logs(["tensorboard"], tmp_path, ABOUT) as log:
        log(STEP_0)
    image = values(read_events(event_files(tmp_path)[0]))[-1][2].image
    assert (image.width, image.height) == (30, 20)


def test_tensorboard_files_are_flushed_at_evaluations(tmp_path):
    with open_logs(["tensorboard"], tmp_path, ABOUT) as log:
        log(STEP_1)
        log(STEP_0 | {"step": 2})
        assert (2, "val_loss") in scalars(read_events(event_files(tmp_path)[0]))


def test_tensorboard_files_are_complete_after_a_failure(tmp_path):
    with pytest.raises(FloatingPointError), open_logs(["tensorboard"], tmp_path, ABOUT) as log:
        log(STEP_1)
        raise FloatingPointError
    assert (1, "train_loss") in scalars(read_events(event_files(tmp_path)[0]))


def test_a_resumed_run_discards_the_repeated_steps_in_tensorboard(tmp_path):
    for first in (0, 2, 0):
        with open_logs(["tensorboard"], tmp_path, ABOUT) as log:
            log(STEP_1 | {"step": first})
            log(STEP_2 | {"step": first + 1})
    attempts = [read_events(file) for file in event_files(tmp_path)]
    assert len(attempts) == 3
    assert not any(event.HasField("session_log") for event in attempts[0])
    for events, first in zip(attempts[1:], (2, 0)):
        (start,) = [event for event in events if event.HasField("session_log")]
        assert (start.step, start.session_log.status) == (
            first,
            SessionLog.START,
        )  # discards it and all later steps
        assert events.index(start) == 1
        assert {step for step, _ in scalars(events)} == {first, first + 1}
        assert texts(events).keys() == {(first, "about/text_summary")}


def test_tensorboard_files_are_never_overwritten(tmp_path):
    for _ in range(2):
        with open_logs(["tensorboard"], tmp_path, ABOUT):
            pass
    first, second = event_files(tmp_path)
    first.unlink()
    before = second.read_bytes()
    with open_logs(["tensorboard"], tmp_path, ABOUT):
        pass
    assert second.read_bytes() == before
    assert event_files(tmp_path)[0] == second


def test_a_full_disk_raises_instead_of_blocking(tmp_path, monkeypatch):
    def write(self, data):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), open_logs(["tensorboard"], tmp_path, ABOUT) as log:
        monkeypatch.setattr(tensorboardX.RecordWriter, "write", write)
        for _ in range(100):
            log(STEP_1)


# ------------------------------------------------------------------------ Weights & Biases


class FakeWandb(types.ModuleType):
    """The parts of the package wandb that are used, which record their calls."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.ended = [], [], []
        self.Html, self.Image = (lambda data: ("html", data)), (lambda data_or_path: ("image", data_or_path))

    def init(
        self,
        project=None,
        dir=None,
        id=None,
        name=None,
        config=None,
        allow_val_change=None,
        resume=None,
    ):
        self.begun.append(dict(locals()))
        return self

    def log(self, data, step=None):
        self.logged.append((step, data))

    def __enter__(self):
        return self

    def __exit__(self, exception, *_):
        self.ended.append(exception)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_wandb_has_every_record_and_the_config(wandb, tmp_path):
    folder = tmp_path / "rhyme-1"
    folder.mkdir()
    with open_logs(["wandb"], folder, ABOUT) as log:
        log(STEP_0)
        (folder / PLOT).write_bytes(PNG)
        log(STEP_1)
        log(STEP_2)
        log(STEP_0 | {"step": 3})
        assert wandb.ended == []
    (begun,) = wandb.begun
    assert (begun["project"], begun["name"], begun["dir"]) == ("tinyllm", "rhyme-1", str(folder))
    assert (begun["config"], begun["resume"], begun["allow_val_change"]) == (ABOUT, "allow", True)
    sample = ("html", "<pre>The &lt;b&gt;cat&lt;/b&gt;\n\nsat é</pre>")
    assert wandb.logged == [
        (0, {"tokens": 0, "val_loss": 4.5, "sample": sample}),
        (1, {key: value for key, value in STEP_1.items() if key != "step"}),
        (2, {"tokens": 16, "lr": 0.02}),
        (3, {"tokens": 0, "val_loss": 4.5, "sample": sample, "loss": ("image", str(folder / PLOT))}),
    ]
    assert wandb.ended == [None]


def test_a_resumed_run_has_the_same_id_at_wandb(wandb, tmp_path, monkeypatch):
    for _ in range(2):
        with open_logs(["wandb"], tmp_path, ABOUT):
            pass
    monkeypatch.setenv("WANDB_PROJECT", "other")
    (tmp_path / "another").mkdir()
    with open_logs(["wandb"], tmp_path / "another", ABOUT):
        pass
    first, second, another = (begun["id"] for begun in wandb.begun)
    assert first == second != another
    assert len(first) == 8
    assert [begun["project"] for begun in wandb.begun] == ["tinyllm", "tinyllm", "other"]


def test_a_failed_run_is_marked_at_wandb(wandb, tmp_path):
    with pytest.raises(KeyboardInterrupt), open_logs(["wandb"], tmp_path, ABOUT):
        raise KeyboardInterrupt
    assert wandb.ended == [KeyboardInterrupt]


def test_wandb_that_does_not_start_is_refused(wandb, tmp_path, monkeypatch):
    def init(**more):
        raise wandb.Error("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    said = r"W&B does not start \(api_key not configured \(no-tty\)\): run `wandb login`, or set"
    with pytest.raises(Error, match=said), open_logs(["tensorboard", "wandb"], tmp_path, ABOUT):
        pass
    assert read_events(event_files(tmp_path)[0])  # the other log is closed and complete


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../other\n", "größe".encode()])
def test_a_damaged_wandb_id_is_refused(wandb, tmp_path, content):
    (tmp_path / "wandb-id.txt").write_bytes(content)
    said = "wandb-id.txt has no W&B id: remove it"
    with pytest.raises(Error, match=said), open_logs(["wandb"], tmp_path, ABOUT):
        pass
    assert wandb.begun == []


def test_the_package_wandb_takes_the_same_calls(tmp_path, monkeypatch):
    """An offline run is written."""
    real = pytest.importorskip("wandb")
    parameters = inspect.signature(real.init).parameters
    assert parameters.keys() > inspect.signature(FakeWandb().init).parameters.keys()
    assert list(inspect.signature(real.Run.log).parameters)[:3] == ["self", "data", "step"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / PLOT).write_bytes(PNG)
    with open_logs(["wandb"], tmp_path, ABOUT) as log:
        log(STEP_0)
        log(STEP_2)
        log(STEP_0 | {"step": 3})
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert written.stem == f"run-{(tmp_path / 'wandb-id.txt').read_text(encoding='utf-8').strip()}"
    for kind, suffix in (("images", "png"), ("html", "html")):
        assert len(list(written.parent.glob(f"files/media/{kind}/*.{suffix}"))) == 2


# -------------------------------------------------------------------------------------- both


def test_several_logs_receive_every_record(wandb, tmp_path):
    with open_logs(["wandb", "tensorboard"], tmp_path, ABOUT) as log:
        log(STEP_1)
    assert wandb.logged == [(1, {key: value for key, value in STEP_1.items() if key != "step"})]
    assert (1, "train_loss") in scalars(read_events(event_files(tmp_path)[0]))


def test_without_logs_nothing_is_written(tmp_path):
    with open_logs([], tmp_path, ABOUT) as log:
        log(STEP_0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "names, said",
    [
        (["tensorflow"], "--log 'tensorflow' is unknown: choose tensorboard or wandb"),
        (["tensorboard", "tensorboard"], "--log names 'tensorboard' twice"),
    ],
)
def test_unknown_and_repeated_logs_are_refused(tmp_path, names, said):
    with pytest.raises(Error, match=said), open_logs(names, tmp_path, ABOUT):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Error) as raised:
        check_logs([name])
    assert str(raised.value) == f"--log {name} needs {package}: pip install 'tinyllm-numpy[{name}]'"


def test_the_packages_are_imported_only_when_they_are_used():
    names = ("tensorboardX", "wandb")
    code = f"import sys, tinyllm.training.loggers; sys.exit(any(m in sys.modules for m in {names}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_stopped_and_resumed_logs_each_step_once(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20, encoding="utf-8")
    config = TrainConfig(
        out=tmp_path / "run", text=str(tmp_path / "text.txt"), tokenizer="char", n_layer=1, n_head=1,
        n_embd=8, context=8, batch=2, steps=4, warmup=1, eval_every=2, eval_windows=2, prompt="to ",
        log=("tensorboard",),
    )  # fmt: skip

    def stop(record):
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False, callback=stop)
    train(begun_config(config.out), progress=False)
    attempts = [scalars(read_events(file)) for file in event_files(config.out)]
    assert [[step for step, tag in found if tag == "train_loss"] for found in attempts] == [[1, 2], [3, 4]]
    with pytest.raises(Error, match="--log 'paper' is unknown"):
        train(dataclasses.replace(config, out=tmp_path / "other", log=("paper",)), progress=False)
    assert not (tmp_path / "other").exists()  # refused before anything is written

"""A run of a custom task without text: training, interruption, bit-exact resumption, and logs."""

import json
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest
from support.runs import Alarm, Killed, contents, left, no_pictures, stopped_after, values, weights

from tinyllm.errors import Error
from tinyllm.nn import Dropout, Linear, Module
from tinyllm.tensor import Tensor
from tinyllm.tools.plot import summary
from tinyllm.training.checkpoint import verify
from tinyllm.training.config import RunOptions
from tinyllm.training.metrics import read_run
from tinyllm.training.run import run_task
from tinyllm.training.run_folder import begun_config
from tinyllm.training.step import evaluate
from tinyllm.training.tasks.base import Task
from tinyllm.weights.runs import checkpoint_folder, last_checkpoint
from tinyllm.weights.safetensors import Weights


@dataclass(frozen=True)
class CurveOptions(RunOptions):
    """Fit a line to points."""

    slope: float = 2.0
    """Slope of the line."""

    task = "curve"


class Net(Module):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.first, self.dropout = Linear(2, 6, rng=rng, std=0.5), Dropout(0.1)
        self.second = Linear(6, 1, rng=rng, std=0.5)

    def forward(self, x):
        return self.second(self.dropout(self.first(Tensor(x))))

    def loss(self, x, y, num_targets):
        error = self(x) - Tensor(y)
        return (error * error).sum() / num_targets


class Curve(Task):
    rows, steps_per_epoch = "points", 3
    hash_of_data = "0" * 64

    def load(self, folder, about):
        x = np.random.default_rng(0).standard_normal((16, 2)).astype(np.float32)
        self.x, self.y = x, self.config.slope * x[:, :1]

    def model(self):
        return Net()

    def trained(self, checkpoint):
        model = Net()
        model.load_state_dict(Weights(checkpoint))
        return model

    def batch_at(self, step):
        first = step % 3 * 4
        return self.x[first : first + 4], self.y[first : first + 4]

    def count(self, batch):
        return len(batch[0])

    def evaluate(self, model, check, final):
        batches = [(self.x[12:], self.y[12:])]
        val_loss = evaluate(model, batches, self.loss, self.count, check)
        return {"val_loss": val_loss, "val_within": float(val_loss < 1)}

    def data(self):
        return {"points": {"sha256": self.hash_of_data, "count": 16}}


def options(out, **changes):
    config = CurveOptions(
        out=out, batch=4, micro_batch=2, steps=6, lr=1e-2, warmup=2, eval_every=2, checkpoint_every=4
    )
    return replace(config, **changes)


def train(config, progress=False, callback=None):
    return run_task(Curve(config), progress, callback)


def begun(out):
    return begun_config(out, CurveOptions)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patched:
        no_pictures(patched)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted; tests only read it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(options(out))
    return out


def test_the_files_of_a_run(whole):
    assert {path.name for path in whole.iterdir()} == {
        *("config.json", "metrics.jsonl", "samples.txt", "loss.png", "lock", "step-000004", "step-000006")
    }
    assert (whole / "samples.txt").read_bytes() == b""
    about = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    assert (about["task"], about["train"]["slope"]) == ("curve", 2.0)
    assert about["points"] == {"sha256": Curve.hash_of_data, "count": 16}
    state = verify(whole / "step-000006")
    assert state["points_sha256"] == Curve.hash_of_data
    assert not any("text" in key or "tokenizer" in key for key in [*state, *about])
    first, *steps = values(whole)
    assert first.keys() == {"step", "tokens", "val_loss", "val_within"}
    assert all(("val_within" in record) == (record["step"] % 2 == 0) for record in steps)
    assert [record["tokens"] for record in steps] == [8 * n for n in range(1, 7)]
    assert steps[-1]["val_loss"] < first["val_loss"]


def test_the_output_of_a_run(whole, tmp_path, capsys):
    train(options(tmp_path / "run"))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Net, 25 parameters, on cpu; 6 steps of 4 points, 3 an epoch"
    assert said[1] == f"the run will be saved in {tmp_path / 'run'}"
    evaluations = [line.split()[:3] for line in said if line.startswith("step")]
    assert evaluations == [["step", str(n), "val_loss"] for n in (0, 2, 4, 6)]
    assert said[-2:] == [f"run: {tmp_path / 'run'}", f"loss curves: {tmp_path / 'run' / 'loss.png'}"]
    assert not any("bits" in line or "perplexity" in line for line in said)


def test_read_run_reads_it(whole):
    recorded = read_run(whole)
    assert recorded.options["slope"] == 2.0
    assert recorded.tokenizer == {}
    with pytest.raises(Error, match="bits_per_byte"):
        recorded.bytes_per_token()
    assert "run" in summary([whole])


def test_a_new_run_is_named_after_its_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(options(None, steps=1, warmup=0))
    assert (tmp_path / "runs" / "curve-1" / "step-000001").exists()


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_a_run_stopped_after_a_step_resumes(whole, tmp_path, step):
    out = tmp_path / "run"
    assert stopped_after(options(out), step, signal.SIGTERM, train)[0] == signal.SIGTERM
    assert last_checkpoint(out) == checkpoint_folder(out, step)
    train(begun(out))
    assert left(out) == left(whole)


@pytest.mark.parametrize("call", [1, 3, 5, 10])
def test_a_run_stopped_in_a_step_or_an_evaluation_resumes(whole, tmp_path, call):
    out = tmp_path / "run"
    with Alarm(Net, signal.SIGINT, call), pytest.raises(KeyboardInterrupt):
        train(options(out))
    train(begun(out))
    assert left(out) == left(whole)


def test_a_killed_run_resumes(whole, tmp_path):
    out = tmp_path / "run"

    def kill(record):
        if record["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        train(options(out), callback=kill)
    assert last_checkpoint(out).name == "step-000004"
    train(begun(out))
    assert left(out) == left(whole)


def test_a_finished_run_returns_its_model(whole, capsys):
    before = contents(whole)
    model = train(begun(whole))
    assert "is finished" in capsys.readouterr().out
    for name, array in weights(whole).items():
        assert np.array_equal(model.state_dict()[name], array)
    assert contents(whole) == before


def test_the_logs_of_a_custom_task(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr("tinyllm.training.run_log.plot_losses", lambda *_: None)
    out = tmp_path / "run"
    train(options(out, log=("tensorboard",)))
    (events,) = (out / "tensorboard").iterdir()
    assert b"val_within" in events.read_bytes()
    assert b"sample" not in events.read_bytes()


def test_a_batch_that_is_not_finite_is_saved(tmp_path):
    out = tmp_path / "run"

    class Broken(Curve):
        def batch_at(self, step):
            x, y = super().batch_at(step)
            return (x, y * np.nan) if step == 2 else (x, y)

    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        run_task(Broken(options(out)), progress=False)
    found = json.loads((out / "nonfinite-step-3.json").read_text(encoding="utf-8"))
    assert np.array(found["batch"][0]).shape == (4, 2)
    assert last_checkpoint(out).name == "step-000002"


def test_another_task_other_data_and_other_options_are_refused(tmp_path):
    out = tmp_path / "run"
    stopped_after(options(out), 2, train=train)
    with pytest.raises(Error, match="a run of the task curve, not pretrain"):
        begun_config(out)
    with pytest.raises(Error, match=r"--slope 2\.0, not --slope 3\.0"):
        train(replace(begun(out), slope=3.0))

    class Other(Curve):
        hash_of_data = "1" * 64

    with pytest.raises(Error, match="the points of the run"):
        run_task(Other(begun(out)), progress=False)

"""The checkpoints of a run are found by name, and a run's folder stands for its newest model."""

import json

import pytest

from tinyllm.errors import Error
from tinyllm.weights.hub import find_model, model_config
from tinyllm.weights.runs import checkpoint_folder, checkpoints, last_checkpoint, step_of
from tinyllm.weights.safetensors import save_folder


@pytest.fixture
def run(tmp_path):
    """A run with a model in two checkpoints and none in the newest folder of that name."""
    (tmp_path / "config.json").write_text(json.dumps({"train": {}}))
    for step in (3, 1_000_000):
        save_folder(checkpoint_folder(tmp_path, step), {"step": step}, {})
    checkpoint_folder(tmp_path, 2_000_000).mkdir()
    return tmp_path


def test_checkpoints_are_in_the_order_of_their_steps(run):
    for name in ("step-12", "damaged-step-000004", ".saving-step-000005", "step-00000٣"):
        (run / name).mkdir()
    (run / "step-000006").touch()
    assert [step_of(folder) for folder in checkpoints(run)] == [3, 1_000_000, 2_000_000]
    assert checkpoints(str(run)) == checkpoints(run)
    assert checkpoints(run / "nowhere") == []


def test_the_last_checkpoint_holds_a_model(run):
    assert last_checkpoint(run) == last_checkpoint(str(run)) == run / "step-1000000"


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(Error, match="has no checkpoint"):
        last_checkpoint(tmp_path)


def test_a_run_stands_for_its_newest_model(run):
    assert find_model(run) == run / "step-1000000"
    assert model_config(find_model(str(run))) == {"step": 1_000_000}


def test_a_model_that_lies_in_the_folder_of_a_run_counts_first(run):
    save_folder(run, {"own": True}, {}, overwrite=True)
    assert find_model(run) == run

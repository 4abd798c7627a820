"""Checkpoints of a run are found by name, and a run's folder gives its newest model."""

import json

import pytest

from tinyllm.errors import Error
from tinyllm.weights.hub import find_model, model_config
from tinyllm.weights.runs import checkpoint_folder, checkpoints, last_checkpoint, step_of
from tinyllm.weights.safetensors import save_folder


@pytest.fixture
def run(tmp_path):
    """A run with a model in two checkpoints and none in the newest checkpoint folder."""
    (tmp_path / "config.json").write_text(json.dumps({"train": {}}))
    for step in (999_999, 1_000_000):
        save_folder(checkpoint_folder(tmp_path, step), {"step": step}, {})
    checkpoint_folder(tmp_path, 2_000_000).mkdir()
    return tmp_path


def test_checkpoints_are_sorted_by_step(run):
    for name in ("step-12", "damaged-step-000004", ".saving-step-000005", "step-00000٣"):
        (run / name).mkdir()
    (run / "step-000006").touch()
    assert [step_of(folder) for folder in checkpoints(run)] == [999_999, 1_000_000, 2_000_000]
    assert checkpoints(str(run)) == checkpoints(run)
    assert checkpoints(run / "nowhere") == []


def test_last_checkpoint_contains_a_model(run):
    assert last_checkpoint(run) == last_checkpoint(str(run)) == run / "step-1000000"


def test_run_without_a_checkpoint_is_rejected(tmp_path):
    with pytest.raises(Error, match="has no checkpoint"):
        last_checkpoint(tmp_path)


def test_run_folder_gives_its_newest_model(run):
    assert find_model(run) == run / "step-1000000"
    assert model_config(find_model(str(run))) == {"step": 1_000_000}


def test_model_in_a_run_folder_takes_precedence(run):
    save_folder(run, {"own": True}, {}, overwrite=True)
    assert find_model(run) == run

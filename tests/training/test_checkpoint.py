"""Checkpoints: bit-exact round trips, detection of damage, and atomicity under injected faults."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.runs import full_disk

from parity.durability.faults import raising, writing
from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig, load_model
from tinyllm.errors import Error
from tinyllm.files import append_whole, lock, read_sealed, sealed, sync_folder, write_whole
from tinyllm.optim import AdamW
from tinyllm.training.checkpoint import (
    check_space,
    hash_weights,
    load_checkpoint,
    lost_evaluations,
    machine,
    remove_checkpoint,
    remove_left_overs,
    save_checkpoint,
    set_aside,
    verify,
)
from tinyllm.weights.runs import checkpoint_folder, checkpoints
from tinyllm.weights.safetensors import write_safetensors

ABOUT = {
    "step": 3,
    "tokens": 48,
    "val_loss": None,
    "samples_bytes": 5,
    "run": "abc",
    "machine": {"numpy": "2"},
}
GPT2_CONFIG = GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_head=2, n_layer=1)
LLAMA_CONFIG = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=6,
)
FILES = ["checkpoint.json", "config.json", "model.safetensors", "optimizer.safetensors"]


def a_model(arch="gpt2", seed=0):
    rng = np.random.default_rng(seed)
    return GPT2(GPT2_CONFIG, rng=rng) if arch == "gpt2" else Llama(LLAMA_CONFIG, rng=rng)


def trained(model, steps=2):
    """The model after some updates, and its optimizer."""
    optimizer, rng = AdamW(model, lr=0.1), np.random.default_rng(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = rng.standard_normal(parameter.shape).astype(parameter.dtype)
        optimizer.step()
    return model, optimizer


def bits(state):
    return {key: {name: np.asarray(x).tobytes() for name, x in part.items()} for key, part in state.items()}


@pytest.fixture
def saved(tmp_path):
    """The checkpoint of step 3 in a run folder."""
    folder = checkpoint_folder(tmp_path, 3)
    save_checkpoint(folder, *trained(a_model()), ABOUT)
    return folder


# Round trips


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_checkpoint_restores_model_and_optimizer_bit_exact(tmp_path, arch, dtype):
    model, optimizer = trained(a_model(arch).astype(dtype))
    folder = checkpoint_folder(tmp_path, 3)
    save_checkpoint(folder, model, optimizer, ABOUT)
    other, its_optimizer = trained(a_model(arch, seed=5).astype(dtype), steps=1)
    load_checkpoint(folder, verify(folder), other, its_optimizer)
    assert bits({"": other.state_dict()}) == bits({"": model.state_dict()})
    assert bits(its_optimizer.state_dict()) == bits(optimizer.state_dict())
    assert set(its_optimizer.state_dict()["t"].values()) == {2}
    # The next step is the same too: the optimizer uses the restored arrays.
    for each in ((model, optimizer), (other, its_optimizer)):
        for name, parameter in each[0].named_parameters():
            parameter.grad = np.full(parameter.shape, len(name), dtype)
        each[1].step()
    assert bits({"": other.state_dict()}) == bits({"": model.state_dict()})


def test_a_checkpoint_contains_the_model_and_the_averages(saved):
    model, optimizer = trained(a_model())
    assert sorted(path.name for path in saved.iterdir()) == FILES
    assert bits({"": load_model(saved).state_dict()}) == bits({"": model.state_dict()})
    averages = load_file(saved / "optimizer.safetensors")
    assert averages.keys() == {f"{key}.{name}" for key in "mv" for name, _ in model.named_parameters()}
    assert np.array_equal(averages["v.ln_f.bias"], optimizer.state["ln_f.bias"][2])


def test_checkpoint_json_has_the_state_and_the_hashes(saved):
    about = verify(saved)
    assert {key: about[key] for key in ABOUT} == ABOUT
    assert about["format"] == 1
    assert set(about["t"].values()) == {2}
    assert sorted(about["files"]) == FILES[1:]
    for name, said in about["files"].items():
        data = (saved / name).read_bytes()
        assert said == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_checkpoint_before_the_first_step_has_no_averages(tmp_path):
    folder = checkpoint_folder(tmp_path, 0)
    save_checkpoint(folder, *trained(a_model(), steps=0), ABOUT)
    model, optimizer = trained(a_model(seed=5), steps=0)
    load_checkpoint(folder, verify(folder), model, optimizer)
    assert optimizer.state == {}
    assert bits({"": model.state_dict()}) == bits({"": a_model().state_dict()})


def test_reserved_averages_are_not_saved_before_a_step():
    """``reserve`` allocates them, and changes nothing else."""
    model, optimizer = trained(a_model(), steps=0)
    optimizer.reserve()
    assert optimizer.state.keys() == {name for name, _ in model.named_parameters()}
    assert optimizer.state_dict() == {"t": {}, "m": {}, "v": {}}
    other, its_optimizer = trained(a_model(), steps=0)
    places = {name: state[1] for name, state in optimizer.state.items()}
    for each, its in ((model, optimizer), (other, its_optimizer)):
        for name, parameter in each.named_parameters():
            if name != "ln_f.bias":  # one parameter without a gradient
                parameter.grad = np.full(parameter.shape, len(name), parameter.dtype)
        its.step()
    assert bits({"": model.state_dict()}) == bits({"": other.state_dict()})
    assert bits(optimizer.state_dict()) == bits(its_optimizer.state_dict())
    assert all(optimizer.state[name][1] is m for name, m in places.items())


def test_checkpoints_are_sorted_by_step(tmp_path):
    for name in ("step-1000000", "step-999999", "step-000003", "step-7", ".saving-step-000009", "step-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-2000000").write_text("not a folder")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000003", "step-999999", "step-1000000"]
    assert checkpoints(tmp_path / "nowhere") == []


def test_a_checkpoint_of_another_model_is_refused(saved):
    other = a_model("llama")
    with pytest.raises(Error, match="does not fit the model"):
        load_checkpoint(saved, verify(saved), other, AdamW(other, lr=0.1))


# The optimizer's state


def test_optimizer_state_of_other_parameters_is_refused_and_changes_nothing():
    _, optimizer = trained(a_model())
    state = optimizer.state_dict()
    other = AdamW(a_model("llama"), lr=0.1)
    with pytest.raises(Error, match="belongs to other parameters"):
        other.load_state_dict(state)
    with pytest.raises(Error, match="belongs to other parameters"):
        AdamW(a_model(), lr=0.1).load_state_dict(state | {"m": {}})
    fresh = AdamW(a_model(), lr=0.1)
    wrong = {name: array.astype(np.float64) for name, array in state["v"].items()}
    with pytest.raises(Error, match=r"wte\.weight is float64"):
        fresh.load_state_dict(state | {"v": wrong})
    with pytest.raises(Error, match=r"ln_f\.bias is float32 \(3,\)"):
        fresh.load_state_dict(state | {"m": state["m"] | {"ln_f.bias": np.zeros(3, np.float32)}})
    assert other.state == fresh.state == {}


# Damage


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "step-000003"
    save_checkpoint(folder, *trained(a_model()), ABOUT)
    return folder


@settings(max_examples=150)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@example("checkpoint.json", 0.0, 1)
@example("checkpoint.json", 0.9999999, 0)  # the last newline
@example("model.safetensors", 0.0, 0)  # the header's length
@example("optimizer.safetensors", 0.9999999, 7)
def test_one_flipped_bit_is_detected(one_checkpoint, name, where, bit):
    path = one_checkpoint / name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[int(where * len(whole))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        with pytest.raises(Error, match=rf"{name}.* is damaged \("):
            verify(one_checkpoint)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_longer_or_missing_file_is_detected(saved, name):
    whole = (saved / name).read_bytes()
    for data in (whole[:-1], whole + b"\0", b""):
        (saved / name).write_bytes(data)
        with pytest.raises(Error, match=f"{name} is damaged"):
            verify(saved)
    (saved / name).unlink()
    with pytest.raises(Error, match=f"{name} cannot be read"):
        verify(saved)
    (saved / name).mkdir()
    with pytest.raises(Error, match=f"{name} cannot be read"):
        verify(saved)


def test_an_invalid_checkpoint_json_with_a_valid_hash_is_refused(saved):
    about = verify(saved)
    del about["sha256"]
    for change in ({"format": 2}, {"step": "3"}, {"files": {}}, {"t": None}):
        (saved / "checkpoint.json").write_bytes(sealed(about | change))
        with pytest.raises(Error, match="was not written by this version"):
            verify(saved)
    for name in ("../x", "/x", "a\\b", "C:x"):
        (saved / "checkpoint.json").write_bytes(sealed(about | {"files": about["files"] | {name: {}}}))
        with pytest.raises(Error, match="not a plain file name"):
            verify(saved)


def test_averages_that_do_not_match_the_steps_are_refused(saved):
    about = verify(saved)
    model, optimizer = trained(a_model(), steps=0)
    with pytest.raises(Error, match="belongs to other parameters"):
        load_checkpoint(saved, about | {"t": {**about["t"], "unknown": 1}}, model, optimizer)
    with pytest.raises(Error, match=r"optimizer\.safetensors cannot be read"):
        (saved / "optimizer.safetensors").write_bytes(b"\xff" * 20)
        load_checkpoint(saved, about, model, optimizer)
    write_safetensors(saved / "optimizer.safetensors", {"x.wte.weight": np.zeros(1, np.float32)})
    with pytest.raises(Error, match=r"optimizer\.safetensors cannot be read"):
        load_checkpoint(saved, about, model, optimizer)


def test_lost_evaluations_are_those_after_the_records_and_before_the_step(tmp_path):
    for step, val_loss in ((1, 5.0), (2, 4.0), (3, None), (4, 3.0), (5, 2.0)):
        about = ABOUT | {"step": step, "val_loss": val_loss}
        save_checkpoint(checkpoint_folder(tmp_path, step), *trained(a_model()), about)
    lost = [{"step": step, "tokens": 48, "val_loss": val_loss} for step, val_loss in ((2, 4.0), (4, 3.0))]
    assert lost_evaluations(tmp_path, [{"step": 1}], before=5) == lost
    assert [record["step"] for record in lost_evaluations(tmp_path, [], before=2)] == [1]


# Injected faults

AFTER_THE_RENAME = 0 if os.name == "nt" else 1  # the folder is flushed then, where the system can


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_no_failure_changes_the_checkpoint_before(tmp_path, code):
    save_checkpoint(tmp_path / "step-000003", *trained(a_model()), ABOUT)
    before = bits({"": load_model(tmp_path / "step-000003").state_dict()})
    new, model, optimizer = tmp_path / "step-000004", *trained(a_model(), steps=4)
    with writing() as calls:
        save_checkpoint(new, model, optimizer, ABOUT)
    assert {"mkdir", "open", "write", "flush", "fsync", "replace"} <= set(calls)
    assert calls.count("write") > 2 * 16  # one per array
    last = ["open", "write", "flush", "fsync", "fsync", "replace", "fsync"]  # checkpoint.json, both folders
    if os.name == "nt":
        last = ["open", "write", "flush", "fsync", "replace"]
    assert calls[-len(last) :] == last
    assert calls.count("open") == calls.count("flush") == 4  # every file once
    inner_mkdir = calls.index("mkdir", 1)
    remove_checkpoint(new)
    for n in range(len(calls)):
        if n == inner_mkdir:  # of an existing folder: the failure is ignored
            continue
        failure = OSError(code, os.strerror(code))
        with writing(n, raising(failure)), pytest.raises(OSError, match=os.strerror(code)) as raised:
            save_checkpoint(new, model, optimizer, ABOUT)
        assert str(new) in str(raised.value)
        verify(tmp_path / "step-000003")
        assert bits({"": load_model(tmp_path / "step-000003").state_dict()}) == before
        if n < len(calls) - AFTER_THE_RENAME:
            assert [path.name for path in tmp_path.iterdir()] == ["step-000003"], calls[n]
        else:  # only the new name was not flushed: both checkpoints are complete
            verify(new)


def test_a_process_killed_anywhere_leaves_only_complete_checkpoints(tmp_path):
    """As when the process is killed, no exception handler cleans up."""

    class Killed(BaseException):
        pass

    save_checkpoint(tmp_path / "step-000003", *trained(a_model()), ABOUT)
    new, model, optimizer = tmp_path / "step-000004", *trained(a_model(), steps=4)
    with writing() as calls:
        save_checkpoint(new, model, optimizer, ABOUT)
    remove_checkpoint(new)
    for n in range(len(calls)):
        with writing(n, raising(Killed())), pytest.raises(Killed):
            save_checkpoint(new, model, optimizer, ABOUT)
        for folder in checkpoints(tmp_path):
            verify(folder)
        assert (new in checkpoints(tmp_path)) == (n == len(calls) - AFTER_THE_RENAME)
        remove_left_overs(tmp_path)
        assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_is_renamed_before_it_is_removed(saved, monkeypatch):
    def killed(path, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(saved)
    assert checkpoints(saved.parent) == []
    monkeypatch.undo()
    (saved.parent / ".saving-12345678-metrics.jsonl").write_text("{}")
    remove_left_overs(saved.parent)
    assert list(saved.parent.iterdir()) == []


def test_set_aside_renames_and_replaces_an_earlier_one(saved):
    for content in ("first", "second"):
        saved.mkdir(exist_ok=True)
        (saved / "note").write_text(content)
        with writing() as calls:
            aside = set_aside(saved)
        assert calls == ["replace", *["fsync"] * AFTER_THE_RENAME]
        assert (aside / "note").read_text() == content
        assert [path.name for path in saved.parent.iterdir()] == ["damaged-step-000003"]


def test_check_space_needs_the_size_of_a_checkpoint_and_of_the_logs(tmp_path, monkeypatch):
    model = a_model()
    optimizer = AdamW(model)
    numbers = 3 * 4 * model.num_parameters()  # weights and two averages, of four bytes
    usage = shutil.disk_usage(tmp_path)
    for free, enough in ((numbers + 2**20, True), (numbers + 2**20 - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if enough:
            check_space(tmp_path, model.parameters(), optimizer)
        else:
            said = rf"has {free / 1e6:.1f} MB left; a checkpoint needs {numbers / 1e6:.1f} MB"
            with pytest.raises(OSError, match=said) as raised:
                check_space(tmp_path, model.parameters(), optimizer)
            assert str(tmp_path) in str(raised.value)


def test_the_hash_of_weights_has_their_names():
    one, other = (SimpleNamespace(state_dict=lambda name=name: {name: np.ones(2)}) for name in "ab")
    assert hash_weights(one) == hash_weights(one) != hash_weights(other)


def test_the_machine_has_the_blas_of_numpy_also_without_an_architecture(monkeypatch):
    about = {"user_api": "blas", "internal_api": "mkl", "num_threads": 2}
    paths = {"1": "/packages/numpy/libmkl.so", "2": "/packages/torch/libmkl.so"}
    found = [about | {"version": version, "filepath": path} for version, path in paths.items()]
    openmp = {"user_api": "openmp", "filepath": "/packages/numpy/libgomp.so"}
    for libraries, blas in (
        ([openmp, *found], "mkl 1, None, threads: 2"),
        (found[1:], "mkl 2, None, threads: 2"),
    ):
        monkeypatch.setattr("threadpoolctl.threadpool_info", lambda libraries=libraries: libraries)
        assert machine("cpu")["blas"] == blas


# Files


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "sha256"), json_values, max_size=4), st.data())
def test_sealed_json_round_trips_and_every_flipped_bit_is_detected(tmp_path_factory, content, data):
    path = tmp_path_factory.mktemp("sealed") / "x.json"
    path.write_bytes(sealed(content))
    found = read_sealed(path)
    digest = found.pop("sha256")
    assert found == content
    assert digest == hashlib.sha256((json.dumps(content, indent=2) + "\n").encode()).hexdigest()
    flipped = bytearray(path.read_bytes())
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    with pytest.raises(Error, match=r"x\.json is damaged"):
        read_sealed(path)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"5", b"\xff", b"[" * 10**5, b'{"sha256": NaN}', b"null"]
)
def test_read_sealed_refuses_files_without_a_hash(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(Error, match=r"x\.json is damaged"):
        read_sealed(tmp_path / "x.json")


def test_what_json_cannot_say_is_not_sealed():
    with pytest.raises(ValueError, match="not JSON compliant"):
        sealed({"loss": float("nan")})


def test_write_whole_leaves_the_old_or_the_new_file_whatever_fails(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"old")
    with writing() as calls:
        write_whole(path, b"newer")
    last = ["write", "fsync", "replace", *["fsync"] * AFTER_THE_RENAME]  # the file, its name, the folder
    assert calls[-len(last) :] == last
    for n in range(len(calls)):
        write_whole(path, b"old")
        with writing(n, raising(OSError(errno.EIO, "broken"))), pytest.raises(OSError, match="broken"):
            write_whole(path, b"newer")
        assert path.read_bytes() == (b"newer" if n == len(calls) - AFTER_THE_RENAME else b"old")
        assert list(tmp_path.iterdir()) == [path]


def test_flushing_a_folder_leaves_nothing_open(tmp_path):
    lowest = [os.dup(0)]
    os.close(lowest[0])
    sync_folder(tmp_path)
    lowest.append(os.dup(0))
    os.close(lowest[1])
    assert lowest[0] == lowest[1]


def test_append_whole_appends_everything_or_nothing(tmp_path):
    path = tmp_path / "file"
    with full_disk(3), pytest.raises(OSError, match="file cannot be written"):
        append_whole(path, b"more")
    append_whole(path, b"one")
    with full_disk(5), pytest.raises(OSError, match="file cannot be written"):
        append_whole(path, b"more")
    assert path.read_bytes() == b"one"
    append_whole(path, b"more")
    assert path.read_bytes() == b"onemore"
    with pytest.raises(OSError, match="cannot be written"):
        append_whole(tmp_path / "none" / "file", b"more")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes with names")
def test_write_whole_writes_into_a_pipe_and_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)


def test_a_lock_has_one_holder(tmp_path):
    held = lock(tmp_path / "lock", "it is held")
    with pytest.raises(Error, match="it is held"):
        lock(tmp_path / "lock", "it is held")
    held.release()
    lock(Path(tmp_path) / "lock", "it is held").release()

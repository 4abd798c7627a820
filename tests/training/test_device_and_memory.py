"""Commands on a GPU: the same results as on a CPU, and remedies when memory runs out.

The GPU is a fake (`fake_cupy.py`): strict device arrays, no kernels, and a driver whose answers the test
sets. In the last test it is simulated, including the kernels (`cuda_on_cpu.py`).
"""

import contextlib
import math
import re
import shutil
import signal
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.cuda_on_cpu import needs_compiler, simulated_cupy
from support.device_array import DeviceArray
from support.fake_cupy import OutOfMemoryError, fake_cupy
from support.runs import no_pictures, records, rhyme, values

import tinyllm.nn.module
import tinyllm.training.checkpoint
import tinyllm.training.run
import tinyllm.training.run_folder
import tinyllm.training.step
import tinyllm.training.tasks.pretrain
from tinyllm import GPT2, load_model
from tinyllm.cli import _parse, main
from tinyllm.nn import Module
from tinyllm.optim import AdamW
from tinyllm.training.checkpoint import verify
from tinyllm.training.run_folder import begun_config
from tinyllm.training.tasks.pretrain import train
from tinyllm.weights.runs import checkpoints, last_checkpoint

TINY = (
    "--preset gpt2-small --tokenizer char --n-layer 1 --n-head 2 --n-embd 8 --context 8 --stride 4 "
    "--batch 24 --micro-batch 8 --processes 1 "
    "--steps 6 --lr 1e-2 --warmup 2 --dropout 0.2 --eval-every 2 --eval-windows 20 --prompt the"
).split()


@pytest.fixture
def cupy(monkeypatch):
    return fake_cupy(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patched:
        no_pictures(patched)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(rhyme(tmp_path_factory.mktemp("text"), 12))


def trained(text, out, *options):
    """The records of a run from the command line, which must succeed."""
    assert main(["train", *TINY, "--text", text, "--out", str(out), *options]) == 0
    return records(out)


def numbers(out, key):
    return {record["step"]: record[key] for record in records(out) if key in record}


@pytest.fixture(scope="module")
def on_a_cpu(text, tmp_path_factory):
    """A finished run; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "cpu"
    trained(text, out)
    return out


def full(size=4_096):
    raise OutOfMemoryError(size, 2_000)


# A run on a GPU


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_run_on_a_gpu_equals_the_run_on_a_cpu(cupy, text, tmp_path, capsys, arch):
    cupy.taken, cupy.count = 123_456_789, 1
    expected = trained(text, tmp_path / "cpu", "--arch", arch)
    moved, place = [], tinyllm.nn.module.to_device

    def see(array, device):
        moved.append(device)
        return place(array, device)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tinyllm.nn.module, "to_device", see)
        found = trained(text, tmp_path / "gpu", "--arch", arch, "--device", "auto")
    assert "cuda" in moved
    said = capsys.readouterr()
    assert said.err.startswith("device: cuda (Paper GPU, CuPy 14.2.0)\n")
    assert "parameters, on cuda (Paper GPU, CuPy 14.2.0); 6 steps" in said.out
    assert len(found) == len(expected) == 7
    for ours, theirs in zip(found, expected):
        for key in ("train_loss", "val_loss", "train_eval_loss", "grad_norm", "lr"):
            assert (key in ours) == (key in theirs)
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-5)
        at_an_evaluation = "mean_tokens_per_s" in ours
        assert at_an_evaluation == (ours["step"] in (2, 4, 6))
        assert ours.get("peak_memory") == (123_456_789 if at_an_evaluation else None)
    assert re.search(r"tokens/s, 0\.12 GB", said.out)


def test_a_checkpoint_of_a_gpu_has_the_format_of_a_cpus(cupy, text, tmp_path, on_a_cpu):
    out = tmp_path / "gpu"
    trained(text, out, "--device", "cuda:1")
    assert cupy.current == 1
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(last_checkpoint(folder) / name) for folder in (out, on_a_cpu))
        assert {key: (a.dtype, a.shape) for key, a in ours.items()} == {
            key: (a.dtype, a.shape) for key, a in theirs.items()
        }
        for key, array in ours.items():
            assert np.abs(array - theirs[key]).max() < 1e-4, key
    config = (last_checkpoint(out) / "config.json").read_text(encoding="utf-8")
    assert config == (last_checkpoint(on_a_cpu) / "config.json").read_text(encoding="utf-8")


def begun_on_a_gpu(text, out, *options, stop):
    """Start a run on a GPU, and stop it by SIGINT while the record of this step is logged."""
    config = _parse(["train", *TINY, "--text", text, "--out", str(out), "--device", "cuda", *options])

    def ring(record):
        if record["step"] == stop:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False, callback=ring)


@pytest.mark.parametrize("dtype", ["float32", "tf32"])
def test_a_run_on_a_gpu_resumes_on_a_machine_without_one(
    cupy, monkeypatch, text, tmp_path, capsys, on_a_cpu, dtype
):
    out = tmp_path / "run"
    begun_on_a_gpu(text, out, "--dtype", dtype, "--gpu-memory", "2", stop=2)
    assert cupy.limit == 2 * 10**9
    assert verify(last_checkpoint(out))["machine"]["dtype"] == dtype
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["generate", "--run", str(out), "--prompt", "the", "--max-new-tokens", "3"]) == 0
    assert main(["eval", "--run", str(out), "--text", text]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", str(out)]) == 2
    assert "device 'cuda'" in capsys.readouterr().err
    assert main(["train", "--resume", str(out), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert ("--gpu-memory 2.0 bounds" if dtype == "float32" else "--dtype tf32 needs a GPU") in said
    options = ["--device", "cpu", "--dtype", "float32", "--gpu-memory", "None"]
    assert main(["train", "--resume", str(out), *options]) == 0
    said = capsys.readouterr().out
    assert "warning: device was cuda (Paper GPU, CuPy 14.2.0) and is cpu" in said
    assert ("; dtype was tf32 and is float32: " in said) == (dtype == "tf32")
    for key in ("train_loss", "val_loss"):
        assert numbers(out, key) == pytest.approx(numbers(on_a_cpu, key), rel=1e-5)
    assert main(["generate", "--run", str(out), "--prompt", "the", "--max-new-tokens", "3"]) == 0


def test_a_run_on_a_cpu_resumes_on_a_gpu(cupy, text, tmp_path, capsys, on_a_cpu):
    out = tmp_path / "run"
    begun_on_a_gpu(text, out, "--device", "cpu", stop=3)
    assert main(["train", "--resume", str(out), "--device", "cuda"]) == 0
    assert "warning: device was cpu and is cuda (Paper GPU, CuPy 14.2.0): " in capsys.readouterr().out
    assert numbers(out, "train_loss") == pytest.approx(numbers(on_a_cpu, "train_loss"), rel=1e-5)


def test_the_optimizers_state_is_on_the_device_of_the_parameters(cupy, text, tmp_path):
    out, seen = tmp_path / "run", []
    begun_on_a_gpu(text, out, stop=2)
    step = AdamW.step

    def see(optimizer):
        step(optimizer)
        seen.append({type(a) for _, p in optimizer.parameters for a in (p.data, p.grad)})
        seen.append({type(a) for _, m, v in optimizer.state.values() for a in (m, v)})

    for options, kind in ([["--device", "cuda"], DeviceArray], [["--device", "cpu"], np.ndarray]):
        copied = shutil.copytree(out, tmp_path / kind.__name__)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(AdamW, "step", see)
            config = replace(begun_config(copied), device=options[1])
            train(config, progress=False)
        assert seen == [{kind}] * 8
        seen.clear()


# Other commands on a GPU


def test_generate_and_eval_on_a_gpu(cupy, text, on_a_cpu, capsys, monkeypatch):
    def said(*args):
        assert main([*args, "--run", str(on_a_cpu)]) == 0
        return capsys.readouterr()

    generate = ["generate", "--prompt", "the", "--max-new-tokens", "5"]
    evaluate = ["eval", "--text", text]
    assert said(*generate, "--device", "auto") == (
        said(*generate).out,
        "device: cuda (Paper GPU, CuPy 14.2.0)\n",
    )
    assert said(*evaluate, "--device", "cuda:1", "--gpu-memory", "1") == said(*evaluate)
    assert (cupy.current, cupy.limit) == (1, 10**9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
def test_loaded_weights_have_the_requested_dtype(cupy, text, on_a_cpu, monkeypatch, dtype):
    seen = []

    def see(model, *_, **__):
        seen.extend((type(p.data), p.dtype.name) for p in model.parameters())
        return full()

    monkeypatch.setattr("tinyllm.cli.eval.evaluate_text", see)
    monkeypatch.setattr("tinyllm.cli.generate.generate", see)
    options = ["--run", str(on_a_cpu), "--device", "cuda", "--dtype", dtype]
    assert main(["eval", "--text", text, *options]) == 1
    assert main(["generate", "--prompt", "the", *options]) == 1
    assert set(seen) == {(DeviceArray, "float32" if dtype == "tf32" else dtype)}


# Memory


GPU_FULL = "Out of memory allocating 4,096 bytes (allocated so far: 2,000 bytes), "
GPU_FULL += "and 2.00 of the GPU's 8.00 GB are free"
TRY = "try --micro-batch 6 or a new run with a shorter --context"


def out_of_memory_at(monkeypatch, call, owner, name, error=full):
    """The n-th call of a function runs out of memory."""
    real, left = getattr(owner, name), [call]

    def counted(*args, **kwargs):
        left[0] -= 1
        return error() if left[0] == 0 else real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ((1, GPT2, "loss"), 0),  # in the first evaluation
        ((3 + 2, tinyllm.training.step, "manual_seed"), 1),  # the second micro-batch of step 2
        ((2, tinyllm.training.step, "clip_grad_norm"), 1),
        ((3, tinyllm.training.tasks.pretrain, "generate"), 4),  # the sample after step 4
    ],
    ids=["evaluation", "gradients", "clipping", "sample"],
)
def test_a_full_gpu_saves_the_last_step_and_proposes_a_command(
    cupy, monkeypatch, text, tmp_path, capsys, on_a_cpu, moment, step
):
    """The proposed command resumes the run."""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        out_of_memory_at(patched, *moment)
        assert main(["train", *TINY, "--text", text, "--out", str(out), "--device", "cuda"]) == 1
    *_, said = capsys.readouterr().err.splitlines()
    saved = out / f"step-{step:06}"
    assert said == (
        f"tinyllm: {GPU_FULL}: {TRY} or --dtype bfloat16; "
        f"tinyllm train --resume {out} --micro-batch 6 continues from the checkpoint {saved}"
    )
    assert verify(saved)["step"] == step
    assert [record["step"] for record in records(out)] == list(range(step + 1))
    command = re.search(r"tinyllm (train --resume .*) continues", said)[1]
    assert main(command.split()) == 0
    assert "micro-batch was 8 and is 6" in capsys.readouterr().out
    assert last_checkpoint(out).name == "step-000006"
    before = numbers(on_a_cpu, "train_loss")
    found = numbers(out, "train_loss")
    assert list(found) == list(before)
    assert all(found[n] == pytest.approx(before[n], rel=1e-5) for n in range(1, step + 1))


def test_a_partial_update_is_never_saved(cupy, monkeypatch, text, tmp_path, capsys):
    out = tmp_path / "run"
    step = AdamW.step

    def update(optimizer):
        if optimizer.state["wte.weight"][0] == 3:
            optimizer.parameters[-1][1].grad = None  # only the parameters before it are updated
            step(optimizer)
            full()
        step(optimizer)

    with monkeypatch.context() as patched:
        patched.setattr(AdamW, "step", update)
        options = ["--device", "cuda", "--checkpoint-every", "2"]
        assert main(["train", *TINY, "--text", text, "--out", str(out), *options]) == 1
    assert f"continues from the checkpoint {out / 'step-000002'}" in capsys.readouterr().err
    assert [folder.name for folder in checkpoints(out)] == ["step-000002"]
    assert [record["step"] for record in records(out)] == [0, 1, 2, 3]
    assert verify(last_checkpoint(out))["t"]["wte.weight"] == 2


def test_the_steps_arrays_are_freed_before_the_checkpoint_is_written(cupy, monkeypatch, text, tmp_path):
    """Copying a parameter to the host may need memory on the GPU, which those arrays occupy."""
    arrays, alive = [], []
    save, loss = tinyllm.training.run_folder.save_checkpoint, GPT2.loss

    def fill(model, *args, **kwargs):
        found = loss(model, *args, **kwargs)
        if model.training:
            arrays.append(weakref.ref(found.data))
        return full() if len(arrays) == 5 else found

    def look(folder, model, *args):
        alive.extend(array() for array in arrays)
        alive.extend(parameter.grad for parameter in model.parameters())
        save(folder, model, *args)

    monkeypatch.setattr(GPT2, "loss", fill)
    monkeypatch.setattr(tinyllm.training.run_folder, "save_checkpoint", look)
    options = ["--device", "cuda"]
    assert main(["train", *TINY, "--text", text, "--out", str(tmp_path / "run"), *options]) == 1
    assert len(arrays) == 5 and len(alive) > 5
    assert all(array is None for array in alive)


def test_a_checkpoint_that_runs_out_of_memory_too_is_removed(cupy, monkeypatch, text, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--device", "cuda", "--checkpoint-every", "2"]
    with monkeypatch.context() as patched:
        out_of_memory_at(patched, 4, tinyllm.training.step, "clip_grad_norm")
        out_of_memory_at(patched, 2, tinyllm.training.checkpoint, "write_safetensors")
        assert main(["train", *TINY, "--text", text, "--out", str(out), *options]) == 1
    assert f"continues from the checkpoint {out / 'step-000002'}" in capsys.readouterr().err
    assert [folder.name for folder in checkpoints(out)] == ["step-000002"]
    assert not list(out.glob(".saving-step*"))


def test_a_model_too_large_for_the_gpu(cupy, monkeypatch, text, tmp_path, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Module, "to", lambda *_: full())
        assert main(["train", *TINY, "--text", text, "--out", str(out), "--device", "cuda"]) == 1
    assert capsys.readouterr().err == f"tinyllm: {GPU_FULL}: {TRY} or --dtype bfloat16\n"
    assert not out.exists()
    with monkeypatch.context() as patched:
        patched.setattr(AdamW, "reserve", lambda *_: full())
        assert main(["train", *TINY, "--text", text, "--out", str(out), "--device", "cuda"]) == 1
    assert capsys.readouterr().err.endswith(f"; tinyllm train --resume {out} --micro-batch 6 starts again\n")
    assert main(["train", "--resume", str(out), "--micro-batch", "6"]) == 0


@pytest.mark.parametrize(
    ("options", "device", "said"),
    [
        ("--micro-batch 1", "cuda", "try a new run with a shorter --context or --dtype bfloat16"),
        ("--batch 25 --micro-batch 5", "cuda", "try --micro-batch 1 or a new run"),
        ("--micro-batch None", "cuda", "try --micro-batch 12 or a new run"),
        ("--dtype float64", "cuda", f"{TRY}; tinyllm train"),
        ("", "cpu", f"tinyllm: the memory is full: {TRY}; tinyllm train"),
    ],
)
def test_remedies_when_memory_runs_out(cupy, monkeypatch, text, tmp_path, capsys, options, device, said):
    def host_full():
        raise MemoryError

    error = full if device == "cuda" else host_full
    out_of_memory_at(monkeypatch, 1, tinyllm.training.step, "clip_grad_norm", error)
    out = tmp_path / "run"
    args = [*TINY, *options.split(), "--text", text, "--out", str(out), "--device", device]
    assert main(["train", *args]) == 1
    found = capsys.readouterr().err.splitlines()[-1]
    assert said in found
    command = f"tinyllm train --resume {out}" + ("" if "--micro-batch 1" in options else " --micro-batch ")
    assert command in found


def test_a_profile_that_runs_out_of_memory(monkeypatch, text, tmp_path, capsys):
    monkeypatch.setattr(tinyllm.training.step, "clip_grad_norm", lambda *_: np.empty(2**59))
    args = [*TINY, "--profile", "--text", text, "--out", str(tmp_path / "run")]
    assert main(["train", *args]) == 1
    said = capsys.readouterr().err
    assert said.startswith("tinyllm: Unable to allocate 4.00 EiB") and said.endswith(f": {TRY}\n")


def test_remedies_of_generate_and_eval_on_a_full_gpu(cupy, monkeypatch, text, on_a_cpu, capsys):
    cupy.limit = 5_000
    monkeypatch.setattr(Module, "to", lambda *_: full())
    for args, remedy in [
        (["generate", "--prompt", "the"], "fewer --max-new-tokens or --dtype bfloat16"),
        (["eval", "--text", text], "a smaller --batch or a shorter --context or --dtype bfloat16"),
    ]:
        assert main([*args, "--run", str(on_a_cpu), "--device", "cuda"]) == 1
        sentence = f"tinyllm: {GPU_FULL}: try {remedy} or a larger --gpu-memory\n"
        assert capsys.readouterr() == ("", sentence)


# float16


@pytest.fixture
def float16(cupy, monkeypatch):
    """Products stay in float32, which strict arrays multiply: the loop is tested, not the products."""
    dtypes = []

    def autocast(dtype):
        dtypes.append(dtype)
        return contextlib.nullcontext()

    monkeypatch.setattr(tinyllm.training.run, "autocast", autocast)
    return dtypes


FLOAT16 = ["--device", "cuda", "--dtype", "float16"]


def overflow_at(monkeypatch, calls, value=math.inf):
    """The gradient norm of these steps (counted from 1) is not finite."""
    clip, count = tinyllm.training.step.clip_grad_norm, [0]

    def norm(*args):
        count[0] += 1
        return value if count[0] in calls else clip(*args)

    monkeypatch.setattr(tinyllm.training.step, "clip_grad_norm", norm)


def test_float16_without_overflow_is_the_same_run(float16, text, tmp_path, on_a_cpu):
    found = trained(text, tmp_path / "run", *FLOAT16)
    assert float16 == ["float16"]
    assert [record.get("loss_scale") for record in found] == [None] + 6 * [65536.0]
    assert numbers(tmp_path / "run", "train_loss") == pytest.approx(numbers(on_a_cpu, "train_loss"), rel=1e-5)
    about = verify(last_checkpoint(tmp_path / "run"))
    assert about["loss_scale"] == {"scale": 65536.0, "good_steps": 6}
    assert load_model(last_checkpoint(tmp_path / "run")).wte.weight.dtype == np.float32


def test_a_step_that_overflows_is_skipped_and_is_not_a_failure(float16, monkeypatch, text, tmp_path, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        overflow_at(patched, {1, 2, 5}, math.nan)
        found = trained(text, out, *FLOAT16)[1:]
    assert [record["loss_scale"] for record in found] == [65536, 32768, 16384, 16384, 16384, 8192]
    for record in found:
        overflowed = record["step"] in (1, 2, 5)
        assert ("overflow" in record) == overflowed == ("grad_norm" not in record)
        assert math.isfinite(record["train_loss"]) and "skipped" not in record
    what = found[1]["overflow"]
    assert "loss scale 32,768" in what
    assert f"step 2: {what}" in capsys.readouterr().out
    assert not list(out.glob("nonfinite-*"))
    assert set(verify(last_checkpoint(out))["t"].values()) == {3}
    assert main(["plot", str(out), "--out", str(tmp_path / "x.png")]) in (0, 2)  # 2: without matplotlib


def test_the_loss_scale_is_resumed(float16, monkeypatch, text, tmp_path):
    """The resumed run is bitwise identical, with one step that overflowed before and one after."""
    monkeypatch.setattr("tinyllm.optim.LossScale.GROWTH_STEPS", 3)
    with monkeypatch.context() as patched:
        overflow_at(patched, {1, 6})
        whole = trained(text, tmp_path / "whole", *FLOAT16)
    with monkeypatch.context() as patched:
        overflow_at(patched, {1, 6})
        begun_on_a_gpu(text, tmp_path / "run", *FLOAT16, stop=3)
        assert verify(last_checkpoint(tmp_path / "run"))["loss_scale"] == {"scale": 32768, "good_steps": 2}
        assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert [record["loss_scale"] for record in whole[1:]] == [65536, 32768, 32768, 32768, 65536, 65536]
    assert values(tmp_path / "run") == values(tmp_path / "whole")
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = ((last_checkpoint(tmp_path / out) / name).read_bytes() for out in ("run", "whole"))
        assert ours == theirs


def test_a_checkpoint_without_a_loss_scale_resumes_in_float16(float16, text, tmp_path):
    out = tmp_path / "run"
    begun_on_a_gpu(text, out, stop=3)
    assert "loss_scale" not in verify(last_checkpoint(out))
    assert main(["train", "--resume", str(out), "--dtype", "float16"]) == 0
    assert [record.get("loss_scale") for record in records(out)] == 4 * [None] + 3 * [65536.0]
    assert main(["train", "--resume", str(out), "--dtype", "float32"]) == 0  # finished


def test_a_loss_that_is_not_finite_stops_a_float16_run(float16, monkeypatch, text, tmp_path, capsys):
    out = tmp_path / "run"
    add = tinyllm.training.step.accumulate_gradients
    monkeypatch.setattr(tinyllm.training.step, "accumulate_gradients", lambda *args: add(*args) * math.nan)
    assert main(["train", *TINY, "--text", text, "--out", str(out), *FLOAT16]) == 1
    assert "step 1: the loss is nan" in capsys.readouterr().err
    assert last_checkpoint(out).name == "step-000000"
    assert verify(last_checkpoint(out))["loss_scale"]["scale"] == 65536


def test_a_gradient_that_is_never_finite_stops_the_run(float16, monkeypatch, text, tmp_path, capsys):
    """At a scale of 1 a smaller scale cannot help."""
    out = tmp_path / "run"
    overflow_at(monkeypatch, range(1, 100))
    assert main(["train", *TINY, "--text", text, "--out", str(out), *FLOAT16, "--steps", "30"]) == 1
    assert "step 17: the loss is 2." in capsys.readouterr().err
    assert [record["loss_scale"] for record in records(out)[1:]] == [2.0**n for n in range(16, 0, -1)]
    assert last_checkpoint(out).name == "step-000016"


@needs_compiler
def test_half_precision_with_the_kernels(monkeypatch, text, tmp_path, capsys, on_a_cpu):
    """Nothing is patched: the simulated cuBLAS multiplies float16 and bfloat16."""
    simulated_cupy(monkeypatch)
    options = ["--steps", "2", "--warmup", "1", "--batch", "8", "--device", "cuda"]
    cpu = trained(text, tmp_path / "cpu", *options, "--device", "cpu")
    out = tmp_path / "run"
    found = trained(text, out, *options, "--dtype", "float16")
    for ours, theirs in zip(found[1:], cpu[1:], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        assert ours["train_loss"] != theirs["train_loss"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
        assert ours["loss_scale"] == 65536
    saved = load_file(last_checkpoint(out) / "model.safetensors")
    assert {array.dtype for array in saved.values()} == {np.dtype(np.float32)}
    options = ["--prompt", "the", "--max-new-tokens", "5", "--device", "cuda", "--dtype", "bfloat16"]
    capsys.readouterr()
    assert main(["generate", "--run", str(out), *options]) == 0
    assert len(capsys.readouterr().out) == len("the") + 5 + len("\n")

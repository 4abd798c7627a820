"""The benchmark of a GPU runs end to end on small models, and its figures follow from what it recorded.

Where there is no GPU, everything but the GPU's own answers is tested: on the CPU; tinyllm's variants on a
stand-in for CuPy, and PyTorch's on its "meta" device, both of which refuse to mix with arrays of the host.
"""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
from support.cuda_on_cpu import Simulator, needs_compiler
from support.device_array import DeviceArray
from support.fake_cupy import stand_in_cupy

from parity.__main__ import COMMANDS, main
from parity.bench import cuda as bench_cuda
from parity.bench import cuda_variants as bench_cuda_variants
from parity.bench.cuda import Job, Request
from parity.bench.cuda_variants import PRECISIONS, SMALL_WORKS, VARIANTS, WORKS, prepare
from tinyllm.backend.cuda import launch

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

pytest.importorskip("transformers")
pytest.importorskip("resource", reason="on a CPU the benchmark reads the process's memory through resource")

TASKS = list(SMALL_WORKS)
REQUEST = Request("cpu", ("train",), ("float32",), VARIANTS, True, 1, 1, 2, "eager")


def parity(*arguments):
    return subprocess.run([sys.executable, "-m", "parity", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What ``bench --device cpu --small`` printed and wrote, of every work, in one round."""
    path = tmp_path_factory.mktemp("bench") / "small.json"
    options = "--small --rounds 1 --warmup 1 --steps 2 --variants tinyllm torch-eager".split()
    done = parity("bench", "--device", "cpu", *options, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return done, json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """work -> the folder with its weights"""
    folders = {name: tmp_path_factory.mktemp(name) / "model" for name in TASKS}
    for name, folder in folders.items():
        bench_cuda_variants.write_weights(SMALL_WORKS[name], folder)
    return folders


# ---- End to end, in processes of their own ----


def test_every_work_is_measured_and_the_sides_agree(small):
    done, result = small
    assert list(result["cases"]) == [f"{task} float32" for task in TASKS]
    for name, case in result["cases"].items():
        assert list(case["runs"]) == ["tinyllm", "torch-eager"] and case["failed"] == {}
        for variant, (run,) in case["runs"].items():
            assert run["device"] == "cpu" and run["whole_bytes"] is None
            assert run["seconds"] > 0 and run["product_rate"] > 0 and run["peak_bytes"] > 1e7
            assert f"round 1/1: {variant} … " in done.stderr
        ours, theirs = (case["runs"][variant][0]["difference"] for variant in case["runs"])
        assert theirs == 0 and 0 < ours <= case["bound"] == 5e-5, name


def test_the_tables_figures_are_those_of_the_records(small):
    done, result = small
    for name, case in result["cases"].items():
        work, (ours,), (theirs,) = SMALL_WORKS[name.split()[0]], *case["runs"].values()
        assert f"{work}, float32" in done.stdout
        for variant, run in {"tinyllm": ours, "torch-eager": theirs}.items():
            rate = work.tokens / run["seconds"]
            figures = case["variants"][variant]
            assert figures["tokens_per_s"]["median"] == pytest.approx(rate)
            utilisation = rate * case["flops_per_token"] / run["product_rate"]
            assert figures["utilisation"] == pytest.approx(utilisation)
            said = [variant, *[f"{rate:,.0f}"] * 3, f"{utilisation:.1%}", f"{run['product_rate'] / 1e12:.3g}"]
            said += [f"{run['peak_bytes'] / 1e9:.2f}", "–", f"{run['difference']:.1g}"]
            assert said in [line.split() for line in done.stdout.splitlines()]
            losses = run["losses"] or []
            assert len(losses) == (3 if work.task == "train" else 0)
            assert ", ".join(f"{loss:.5f}" for loss in losses) in done.stdout
        ratios = case["ratios"]["torch-eager"]
        assert ratios["time"]["rounds"] == pytest.approx([ours["seconds"] / theirs["seconds"]])
        assert ratios["peak memory"]["median"] == pytest.approx(ours["peak_bytes"] / theirs["peak_bytes"])
        assert f"{ratios['time']['median']:.3f}" in done.stdout


def test_the_cpus_figures_stand_under_no_gpus_heading(small):
    done, result = small
    command, machine, *rest = done.stdout.splitlines()
    assert command.startswith("python -m parity bench --device cpu --variants tinyllm torch-eager --small ")
    assert command == result["command"] and machine.startswith("cpu ") and "GPU" not in machine
    assert "NO GPU WAS MEASURED: these are the CPU's figures." in rest
    assert any("says nothing about speed" in line for line in rest)
    assert result["reach"] == [] and "met" not in done.stdout.split() and "missed" not in done.stdout.split()


def test_a_compiler_that_fails_is_the_result_with_the_reason(weights, tmp_path):
    request = replace(REQUEST, compiler="none")
    job = Job("torch-compile", SMALL_WORKS["train"], "float32", str(weights["train"]), "unused", request)
    assert bench_cuda.run_or_say_why_not(job)["failed"].startswith("InvalidBackend: ")
    with pytest.raises(OSError, match="no-such-folder"):
        bench_cuda.run_or_say_why_not(replace(job, variant="torch-eager", answers="no-such-folder/x.npy"))


def test_it_is_a_row_and_the_rest_goes_on_in_turn(monkeypatch, capsys, tmp_path):
    measure = answer(monkeypatch, tmp_path, tinyllm=[1.0], torch_eager=[1.0], torch_compile=None)
    runs = measure("train", "float32", rounds=2)
    turns = [line.split(" …")[0] for line in capsys.readouterr().err.splitlines()]
    first = [f"round 1/2: {variant}" for variant in ("tinyllm", "torch-eager", "torch-compile")]
    assert turns == [*first, "round 2/2: tinyllm", "round 2/2: torch-eager"]
    case = bench_cuda.summarise(SMALL_WORKS["train"], "float32", runs)
    assert list(case["ratios"]) == ["torch-eager"] and len(runs["torch-eager"]) == 2
    (row,) = (line for line in bench_cuda.case_table(case) if line.startswith("torch-compile"))
    assert row.split() == "torch-compile failed: no compiler".split()
    alone = bench_cuda.summarise(
        SMALL_WORKS["train"], "float32", {"torch-compile": [{"failed": "no compiler"}]}
    )
    assert bench_cuda.case_table(alone)[1:] == [row]


# ---- Every variant ----


@pytest.mark.parametrize("task", TASKS)
def test_what_is_compiled_computes_what_eager_does(weights, task):
    """With a compiler that only traces: the graph has no break, and the cache has a fixed size."""
    eager, compiled = (
        prepare(variant, "float32", "cpu", SMALL_WORKS[task], str(weights[task]), "eager")
        for variant in ("torch-eager", "torch-compile")
    )
    expected = eager.answers()
    assert np.abs(compiled.answers() - expected).max() < 1e-6 * np.abs(expected).max()
    if task == "decode":
        assert [t.item() for t in compiled.once()] == [t.item() for t in eager.once()]


@pytest.mark.parametrize("task", TASKS)
def test_pytorch_in_bfloat16_is_near_float32_and_not_equal(weights, task):
    work, folder = SMALL_WORKS[task], str(weights[task])
    exact, short = (
        prepare("torch-eager", precision, "cpu", work, folder, "").answers()
        for precision in ("float32", "bfloat16")
    )
    assert short.dtype == np.float32
    assert 0 < np.abs(short - exact).max() / np.abs(exact).max() < bench_cuda.bound_of(work, "bfloat16")


def test_the_compared_losses_fall(tmp_path):
    """Of a step whose gradients do nothing all three would be the same, whatever they are."""
    work = replace(SMALL_WORKS["train"], changes=SMALL_WORKS["train"].changes | {"n_embd": 64})
    bench_cuda_variants.write_weights(work, tmp_path / "model")
    for variant in ("tinyllm", "torch-eager"):
        losses = prepare(variant, "float32", "cpu", work, str(tmp_path / "model"), "").answers()
        assert losses[0] > losses[1] + 0.001 > losses[2] + 0.002


def test_decoding_writes_greedily_what_a_loop_without_a_cache_writes(weights):
    work, folder = SMALL_WORKS["decode"], str(weights["decode"])
    ours, theirs = (
        [token.item() for token in prepare(variant, "float32", "cpu", work, folder, "").once()]
        for variant in ("tinyllm", "torch-eager")
    )
    twin = bench_cuda_variants.torch_twin(folder, "cpu", torch.float32)
    ids = torch.from_numpy(bench_cuda_variants.random_ids(work)[0])
    for _ in range(work.new):
        ids = torch.cat([ids, twin(ids)[:, -1:].argmax(-1)], dim=1)
    assert ours == theirs == ids[0, work.context :].tolist() and len(ours) == work.new


@pytest.mark.parametrize("task", TASKS)
def test_the_twin_has_the_models_weights_and_a_tied_head(weights, task):
    from tinyllm import load_model

    ours = load_model(weights[task])
    twin = bench_cuda_variants.torch_twin(str(weights[task]), "cpu", torch.float32)
    theirs = dict(twin.named_parameters())
    assert {name: p.shape for name, p in ours.named_parameters()} == {
        n: tuple(p.shape) for n, p in theirs.items()
    }
    for name, parameter in ours.named_parameters():
        assert np.array_equal(parameter.data, theirs[name].detach().numpy())
        assert not np.shares_memory(parameter.data, theirs[name].detach().numpy())


def test_the_works_are_those_that_were_asked_for():
    train, forward, decode = WORKS.values()
    assert train.config().n_layer == 12 and (train.batch, train.context) == (16, 1024)
    assert train.config().embd_pdrop == train.config().attn_pdrop == train.config().resid_pdrop == 0
    assert forward.config() == decode.config() and forward.config().num_hidden_layers == 16
    assert [work.tokens for work in WORKS.values()] == [16 * 1024, 4 * 1024, 128]
    assert WORKS.keys() == SMALL_WORKS.keys() == bench_cuda_variants.TINYLLM.keys()
    assert WORKS.keys() == bench_cuda_variants.TORCH.keys()


def test_the_last_position_of_a_sequence_is_compared():
    """It has attended to all others."""
    for context in (1, 7, 16, 100, 1024):
        compared = range(context)[bench_cuda_variants.positions_compared(context)]
        assert compared[-1] > context - 16 and len(compared) >= min(context, 16)
    assert range(1024)[bench_cuda_variants.positions_compared(1024)] == range(63, 1024, 64)


def test_model_flops_are_two_per_weight_and_token_and_six_in_training():
    """And of attention, two products of all queries with the keys."""
    train, forward, decode = WORKS.values()
    gpt2, attention = 12 * 12 * 768**2 + 50257 * 768, 2 * 2 * 12 * 768 * 1024
    assert train.flops_per_token() == pytest.approx(6 * gpt2 + 3 * attention)
    llama = 16 * (2048 * (2048 + 2 * 512 + 2048) + 3 * 2048 * 8192) + 128256 * 2048
    assert forward.flops_per_token() == pytest.approx(2 * llama + 4 * 16 * 2048 * 1024)
    assert decode.flops_per_token() == pytest.approx(2 * llama + 4 * 16 * 2048 * 128)


# ---- As on a GPU ----


@pytest.fixture
def cupy(monkeypatch):
    """A stand-in for CuPy; ``done`` lists what the device was asked to do."""
    module = stand_in_cupy(monkeypatch)
    module.done, module.taken, module.free = [], 3 * 10**9, 2 * 10**9
    module.pool.free_all_blocks = lambda: module.done.append("free_all_blocks")
    module.cuda.Device.synchronize = lambda self: module.done.append("synchronize")
    module.cuda.runtime.driverGetVersion = lambda: 12090
    module.cuda.runtime.runtimeGetVersion = lambda: 12080
    tf32 = []
    monkeypatch.setattr("tinyllm.backend.dtypes.allow_tf32", tf32.append)
    module.tf32 = tf32
    return module


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_tinyllm_runs_on_arrays_of_a_device(cupy, weights, task, precision):
    work, folder = SMALL_WORKS[task], str(weights[task])
    there, here = (prepare("tinyllm", precision, device, work, folder, "") for device in ("cuda", "cpu"))
    assert (there.device, here.device) == ("Paper GPU", "cpu") and cupy.tf32 == [precision == "tf32"]
    answers = there.answers()
    assert type(answers) is np.ndarray and answers.dtype == np.float32
    assert np.allclose(answers, here.answers(), rtol=1e-5, atol=1e-6)
    there.once()


@needs_compiler
@pytest.mark.parametrize("task", TASKS)
def test_in_bfloat16_tinyllm_agrees_with_pytorch(cupy, monkeypatch, weights, task):
    """On a simulated GPU, whose kernels and products round as a real one's."""
    monkeypatch.setitem(launch.LIBRARIES, DeviceArray, Simulator())
    work, folder = SMALL_WORKS[task], str(weights[task])
    ours = prepare("tinyllm", "bfloat16", "cuda", work, folder, "").answers()
    theirs = prepare("torch-eager", "bfloat16", "cpu", work, folder, "").answers()
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert 0 < difference < bench_cuda.bound_of(work, "bfloat16")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_product_beside_which_the_model_stands_is_one_of_its_own(cupy, monkeypatch, precision):
    if precision == "bfloat16":
        monkeypatch.setitem(launch.LIBRARIES, DeviceArray, Simulator())
    ours = bench_cuda_variants.product("tinyllm", precision, "cuda", 24)().data
    theirs = bench_cuda_variants.product("torch-eager", precision, "cpu", 24)()
    short = precision == "bfloat16"
    assert type(ours) is DeviceArray and theirs.dtype == (torch.bfloat16 if short else torch.float32)
    ours, theirs = ours.get().astype(np.float32), theirs.float().numpy()
    assert np.abs(ours - theirs).max() < (0.02 if short else 1e-5) * np.abs(theirs).max()


@pytest.mark.parametrize("task", ["forward", "decode"])
def test_of_bfloat16_the_weights_are_stored_in_it_on_both_sides(monkeypatch, weights, task):
    from tinyllm.backend.dtypes import dtype_of

    kept = {}
    monkeypatch.setattr(bench_cuda_variants, "where_tinyllm_is", lambda model: kept.setdefault("ours", model))
    monkeypatch.setattr(bench_cuda_variants, "where_torch_is", lambda model: kept.setdefault("theirs", model))
    for variant in ("tinyllm", "torch-eager"):
        prepare(variant, "bfloat16", "cpu", SMALL_WORKS[task], str(weights[task]), "")
    assert {p.dtype for p in kept["ours"].parameters()} == {dtype_of("bfloat16")}
    assert {p.dtype for p in kept["theirs"].parameters()} == {torch.bfloat16}


def test_training_in_bfloat16_keeps_the_parameters_in_float32(monkeypatch, weights):
    kept, asked = {}, []
    monkeypatch.setattr(bench_cuda_variants, "where_tinyllm_is", lambda model: kept.setdefault("ours", model))
    monkeypatch.setattr(bench_cuda_variants, "where_torch_is", lambda model: kept.setdefault("theirs", model))
    monkeypatch.setattr(
        "tinyllm.nn.Module.multiply_in", lambda self, dtype: asked.append(dtype), raising=False
    )
    for precision in PRECISIONS:
        for variant in ("tinyllm", "torch-eager"):
            prepare(variant, precision, "cpu", SMALL_WORKS["train"], str(weights["train"]), "")
    assert [str(dtype) for dtype in asked] == ["bfloat16"]
    assert {p.dtype for p in kept["ours"].parameters()} == {np.dtype(np.float32)}
    assert {p.dtype for p in kept["theirs"].parameters()} == {torch.float32}


class NothingOfTheHost(TorchDispatchMode):
    """Within it no op of PyTorch takes a tensor of the CPU: there is nothing to copy, and to wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {"meta"}, function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("task", TASKS)
def test_pytorch_mixes_nothing_of_the_host_with_the_device(monkeypatch, weights, task, precision):
    monkeypatch.setattr(bench_cuda_variants, "where_torch_is", lambda model: next(model.parameters()).device)
    # Neither autocast nor a fused AdamW knows "meta", and AdamW's plain form counts its steps on the host.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **_: torch.optim.SGD(groups, lr=0.1))
    prepared = prepare("torch-eager", precision, "meta", SMALL_WORKS[task], str(weights[task]), "")
    with NothingOfTheHost():
        done = prepared.once()
    assert prepared.device.type == "meta"
    assert {t.device.type for t in (done if isinstance(done, list) else [done])} == {"meta"}
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")


def test_the_timed_steps_lie_between_two_synchronisations(cupy):
    device = bench_cuda.device_of("tinyllm", "cuda")
    bench_cuda.timed(lambda: cupy.done.append("step"), 3, device)
    assert cupy.done == ["synchronize", "step", "step", "step", "synchronize"]


def test_memory_is_what_the_pools_hold_and_what_the_gpu_has_in_use(cupy, monkeypatch):
    bench_cuda.device_of("tinyllm", "cuda").settle()
    assert cupy.done == ["free_all_blocks"]
    ours = bench_cuda.device_of("tinyllm", "cuda").memory()
    assert ours == {"peak_bytes": 3 * 10**9, "whole_bytes": 6 * 10**9}

    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: cupy.done.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2, 9))
    theirs = bench_cuda.device_of("torch-compile", "cuda")
    theirs.settle()
    theirs.synchronize()
    assert cupy.done[1:] == ["empty_cache", "reset_peak_memory_stats", "synchronize"]
    assert theirs.memory() == {"peak_bytes": 5, "whole_bytes": 7}


def test_the_head_names_the_gpu_its_driver_the_versions_and_the_command(cupy, monkeypatch):
    said = SimpleNamespace(stdout="570.86.15\n570.86.15\n")
    monkeypatch.setattr(bench_cuda.subprocess, "run", lambda *_, **__: said)
    facts = bench_cuda.gpu_facts()
    assert facts == {
        "GPU": "Paper GPU",
        "driver": "570.86.15 for CUDA up to 12.9",
        "numpy": np.__version__,
        "cupy": "14.2.0 with CUDA 12.8",
        "torch": f"{torch.__version__} with CUDA {torch.version.cuda}",
    }
    head = bench_cuda.head("python -m …", replace(REQUEST, device="cuda", small=False), facts)
    assert head[0] == "python -m …" and head[1].startswith("GPU Paper GPU, driver 570.86.15 for CUDA up to")
    assert "8192 x 8192 GEMM" in head[2] and not any("CPU's figures" in line for line in head)

    def no_such_program(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(bench_cuda.subprocess, "run", no_such_program)
    assert bench_cuda.gpu_facts()["driver"] == "unknown (nvidia-smi does not say) for CUDA up to 12.9"


@pytest.mark.gpu
def test_small_models_run_on_the_gpu_and_agree():
    done = parity("bench", "--device", "cuda", "--small", "--rounds", "1", "--warmup", "1", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert "CPU's figures" not in done.stdout and "failed:" not in done.stdout


# ---- From records to figures ----


def run(seconds, peak_bytes, product_rate=2e15, whole_bytes=9 * 10**9, difference=1e-3):
    return dict(
        seconds=seconds, peak_bytes=peak_bytes, product_rate=product_rate, whole_bytes=whole_bytes,
        device="Paper GPU", difference=difference, losses=[2.0, 1.5, 1.25],
    )  # fmt: skip


def test_reach_is_eagers_speed_and_at_most_its_memory_round_by_round():
    """In the second round the machine was twice as slow: the ratios stay."""
    runs = {
        "tinyllm": [run(0.9, 30), run(1.8, 30), run(2.0, 30)],
        "torch-eager": [run(1.0, 20), run(2.0, 20), run(1.0, 20)],
        "torch-compile": [{"failed": "no triton"}],
    }
    case = bench_cuda.summarise(WORKS["train"], "tf32", runs)
    rows = bench_cuda.reach_rows({"train tf32": case})
    assert [(row["work"], row["cost"], row["against"]) for row in rows] == [
        ("train tf32", "time", ("torch-eager",)), ("train tf32", "peak memory", ("torch-eager",)),
    ]  # fmt: skip
    assert [row["at_most"] for row in rows] == [1.0, 1.0]
    assert rows[0]["rounds"] == pytest.approx([0.9, 0.9, 2.0])
    assert [(row["reached"], row["verdict"]) for row in rows] == [(0.9, "met"), (1.5, "missed")]
    table = bench_cuda.reach_table(rows)
    assert table[1].split() == "train tf32 time torch-eager 1 0.900 0.900 to 2.000 met".split()
    assert table[2].split()[-1] == "missed"


def test_a_reach_without_its_peer_is_not_measured():
    case = bench_cuda.summarise(WORKS["decode"], "float32", {"tinyllm": [run(1.0, 1)]})
    rows = bench_cuda.reach_rows({"decode float32": case})
    assert [row["verdict"] for row in rows] == ["not measured"] * 2 and case["ratios"] == {}


def test_figures_are_medians_and_ranges_over_the_rounds():
    seconds = [1.0, 4.0, 2.0]
    runs = {
        "tinyllm": [run(s, 10**9 * m, difference=d) for s, m, d in zip(seconds, (1, 5, 2), (0.1, 0.3, 0.2))],
        "torch-compile": [run(2.0, 10**9), run(2.0, 10**9), run(2.0, 10**9)],
        "torch-eager": [run(4.0, 10**9), run(4.0, 10**9), run(4.0, 10**9)],
    }
    work = WORKS["train"]
    case = bench_cuda.summarise(work, "bfloat16", runs)
    figures, tokens = case["variants"]["tinyllm"], 16 * 1024
    assert figures["tokens_per_s"] == {"median": tokens / 2, "min": tokens / 4, "max": tokens}
    assert figures["utilisation"] == pytest.approx(
        median(tokens / s for s in seconds) * work.flops_per_token() / 2e15
    )
    assert figures["peak_bytes"] == 2 * 10**9 and figures["whole_bytes"] == 9 * 10**9
    assert figures["difference"] == 0.3 and case["bound"] == 5e-3
    assert list(case["ratios"]) == ["torch-eager", "torch-compile"]
    assert case["ratios"]["torch-eager"]["time"]["rounds"] == [0.25, 1.0, 0.5]
    assert case["ratios"]["torch-compile"]["peak memory"]["median"] == 2.0
    table = bench_cuda.case_table(case)
    utilisation = f"{figures['utilisation']:.1%}"
    assert table[1].split() == ["tinyllm", "8,192", "4,096", "16,384", utilisation, "2e+03", "2.00", "9.00",
                                "0.3"]  # fmt: skip
    assert "tinyllm losses 2.00000, 1.50000, 1.25000".split() in [line.split() for line in table]
    assert "time 0.500 0.250 1.000 0.250 1.000 0.500".split() in [line.split() for line in table]


# ---- What does not compute the same is not compared ----


def answer(monkeypatch, tmp_path, **arrays):
    """``measure`` with variants (with_underscores) whose processes answer these arrays; None: it failed."""

    def measure_once(job: Job, number: int) -> dict:
        array = arrays[job.variant.replace("-", "_")]
        if array is None:
            return {"failed": "no compiler"}
        np.save(job.answers, np.array(array, np.float32))
        return {key: value for key, value in run(1.0, 1).items() if key != "difference"} | {"device": "cpu"}

    monkeypatch.setattr(bench_cuda, "measure_once", measure_once)
    request = replace(REQUEST, variants=tuple(name.replace("_", "-") for name in arrays))
    return lambda task, precision, rounds=1: bench_cuda.measure(
        WORKS[task], precision, tmp_path, replace(request, rounds=rounds)
    )


def test_losses_are_compared_one_by_one_and_logits_by_the_largest(monkeypatch, tmp_path):
    measure = answer(monkeypatch, tmp_path, tinyllm=[10.0, 0.102], torch_eager=[10.0, 0.1])
    runs = measure("forward", "bfloat16")
    assert runs["tinyllm"][0]["difference"] == pytest.approx(2e-4, rel=1e-3)
    assert runs["torch-eager"][0]["difference"] == 0
    with pytest.raises(
        SystemExit, match=r"train.*bfloat16: tinyllm's answers differ by 0\.02, and the bound is 0"
    ):
        measure("train", "bfloat16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("task", TASKS)
def test_a_difference_beyond_the_bound_ends_it_and_one_within_does_not(
    monkeypatch, tmp_path, task, precision
):
    bound = bench_cuda.bound_of(WORKS[task], precision)
    measure = answer(monkeypatch, tmp_path, tinyllm=[1 + 0.9 * bound], torch_eager=[1.0])
    assert measure(task, precision)["tinyllm"][0]["difference"] == pytest.approx(0.9 * bound, rel=0.01)
    measure = answer(monkeypatch, tmp_path, tinyllm=[1 + 1.1 * bound], torch_eager=[1.0])
    with pytest.raises(SystemExit, match="what does not compute the same is not compared"):
        measure(task, precision)


@pytest.mark.parametrize("wrong", [[np.nan, 1.0], [np.inf, 1.0], [1.0]])
def test_answers_that_are_no_numbers_or_too_few_end_it(monkeypatch, tmp_path, wrong):
    for arrays in (
        {"tinyllm": wrong, "torch_eager": [1.0, 1.0]},
        {"tinyllm": [1.0, 1.0], "torch_eager": wrong},
    ):
        with pytest.raises(SystemExit, match=r"answers (differ by (nan|inf)|have shape)"):
            answer(monkeypatch, tmp_path, **arrays)("train", "float32")


def test_a_wrong_model_is_found(monkeypatch, weights):
    """One matrix of one side, off by a hundredth of each weight, is beyond the bound of float32."""
    work, folder = SMALL_WORKS["forward"], str(weights["forward"])
    right, wrong = (
        prepare(variant, "float32", "cpu", work, folder, "") for variant in ("tinyllm", "torch-eager")
    )
    twin = wrong.once.__closure__
    reference = right.answers()
    (module,) = (cell.cell_contents for cell in twin if isinstance(cell.cell_contents, torch.nn.Module))
    with torch.no_grad():
        module.layers[1].mlp.down_proj.weight *= 1.01
    difference = np.abs(wrong.answers() - reference).max() / np.abs(reference).max()
    assert difference > bench_cuda.bound_of(work, "float32")


@pytest.mark.parametrize(("asked", "found"), [("cuda", "cpu"), ("cpu", "Paper GPU")])
def test_figures_of_another_device_end_it(asked, found):
    with pytest.raises(SystemExit, match=f"torch-eager was to run on {asked} and ran on {found}"):
        bench_cuda.check_device("torch-eager", asked, found)


# ---- Requests ----


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--device cpu", "--device cpu takes --small: on a CPU bench train and bench decode measure speed"),
        ("--device cpu --small --precisions bfloat16", "--precisions bfloat16: a CPU has float32 only"),
        ("--device tpu", "invalid choice 'tpu' for argument '--device'"),
        ("--rounds 2", "--device {cuda,cpu}"),
        ("--device cuda --works sleep", "--works sleep is unknown; choose from train, forward, decode"),
        (
            "--device cuda --variants jax",
            "--variants jax is unknown; choose from tinyllm, torch-eager, torch-",
        ),
        (
            "--device cuda --precisions float8",
            "--precisions float8 is unknown; choose from float32, tf32, bf",
        ),
        ("--device cuda --works train train", "--works train train: name one or more of train, forward, dec"),
        ("--device cuda --rounds 0", "--rounds 0 is too small; give at least 1"),
        ("--device cuda --warmup -1", "--warmup -1 is too small; give at least 0"),
        ("--device cuda --json no/such/folder/x.json", "cannot be written; name a file in a folder that"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(capsys, options, sentence):
    assert main(["bench", *options.split()]) == 2
    said = capsys.readouterr()
    assert said.out == "" and sentence in said.err and said.err.count("\n") == 1


def test_without_cupy_it_is_one_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["bench", "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "device 'cuda'" in said.err and "CuPy" in said.err


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (0, "there is no device 'cuda': CuPy sees 0 GPUs"),
        (RuntimeError("cudaErrorNoDevice"), "finds no GPU (cudaErrorNoDevice)"),
    ],
)
def test_without_a_gpu_it_is_one_sentence_and_exit_code_2(cupy, capsys, count, sentence):
    cupy.count = count
    assert main(["bench", "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and sentence in said.err


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        (None, f"torch {torch.__version__} is built without CUDA: install the one for your CUDA"),
        ("12.8", f"torch {torch.__version__} for CUDA 12.8 finds no GPU: see to the driver (nvidia-smi)"),
    ],
)
def test_a_torch_without_a_gpu_is_one_sentence_and_exit_code_2(cupy, monkeypatch, capsys, version, sentence):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and sentence in said.err


@pytest.mark.parametrize(("seconds", "code"), [(0.9, 0), (1.1, 1)])
def test_the_whole_command_on_a_gpu_from_given_records(cupy, monkeypatch, capsys, seconds, code):
    """All works in all precisions, in turn; a missed bound is code 1."""
    asked = []

    def measure_once(job: Job, number: int) -> dict:
        asked.append((job.work.task, job.precision, job.variant))
        np.save(job.answers, np.ones(2, np.float32))
        taken = seconds if job.variant == "tinyllm" else 1.0
        return {key: value for key, value in run(taken, 7).items() if key != "difference"}

    monkeypatch.setattr(bench_cuda, "measure_once", measure_once)
    monkeypatch.setattr(bench_cuda, "write_weights", lambda work, folder: folder.mkdir())
    monkeypatch.setattr(bench_cuda, "driver_version", lambda: "570")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", "--device", "cuda", "--rounds", "1"]) == code
    assert asked == [(t, p, v) for t in TASKS for p in PRECISIONS for v in VARIANTS]
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "python -m parity bench --device cuda --rounds 1"
    assert out.splitlines()[1].startswith("GPU Paper GPU, driver 570 for CUDA up to 12.9, numpy ")
    verdicts = [line.split()[-1] for line in out.splitlines()[-18:]]
    assert verdicts == ["missed" if code else "met", "met"] * 9


def test_the_precision_is_not_changed_by_the_environment(monkeypatch):
    seen = {}

    def in_own_process(module, request, environment):
        seen.update(environment)
        return SimpleNamespace(returncode=0, stdout='a library says hello\n{"seconds": 1}\n')

    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("CUPY_TF32", "1")
    monkeypatch.setattr(bench_cuda, "in_own_process", in_own_process)
    job = Job("tinyllm", SMALL_WORKS["train"], "float32", "", "", REQUEST)
    assert bench_cuda.measure_once(job, 1) == {"seconds": 1}
    assert "PATH" in seen and not {"NVIDIA_TF32_OVERRIDE", "CUPY_TF32"} & seen.keys()


def test_a_variant_that_fails_ends_it_but_a_compiler_does_not(monkeypatch):
    monkeypatch.setattr(bench_cuda, "in_own_process", lambda *_: SimpleNamespace(returncode=-11, stdout=""))
    job = Job("torch-eager", SMALL_WORKS["train"], "float32", "", "", REQUEST)
    with pytest.raises(SystemExit, match=r"torch-eager failed in round 2 \(code -11\): no report"):
        bench_cuda.measure_once(job, 2)
    result = bench_cuda.measure_once(replace(job, variant="torch-compile"), 2)
    assert result == {"failed": "its process ended with code -11"}


def test_a_job_arrives_as_it_was_sent():
    from dataclasses import asdict

    job = Job("tinyllm", SMALL_WORKS["decode"], "tf32", "weights", "answers", REQUEST)
    received = bench_cuda.job_of(json.loads(json.dumps(asdict(job))))
    assert asdict(received) == json.loads(json.dumps(asdict(job))) | {"request": asdict(received.request)}
    assert received.work == job.work and received.request.product_size == 64
    assert replace(received.request, small=False).product_size == 8192


def test_the_module_brings_nothing_into_a_variants_process():
    found = "import sys, parity.bench.cuda; print({'numpy', 'torch', 'tinyllm', 'cupy'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def test_bench_alone_takes_options_only_and_help_says_how(capsys):
    assert "bench" in COMMANDS and main(["bench"]) == main(["bench", "sleep"]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "usage: python -m parity bench" in said and "--device {cuda,cpu}" in said
    assert "bench train, bench decode, bench scaling" in said

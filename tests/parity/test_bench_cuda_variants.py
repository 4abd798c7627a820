"""``bench --device``: all variants compute the same numbers from the same weights.

Without a GPU the variants run on the CPU. tinyllm's also run on a fake CuPy, and PyTorch's on its "meta"
device; both raise if their arrays are mixed with arrays of the host.
"""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from support.bench_cuda import TASKS
from support.cuda_on_cpu import Simulator, needs_compiler
from support.device_array import DeviceArray

from parity.bench.cuda import measure, variants
from parity.bench.cuda.answers import bound_of
from parity.bench.cuda.devices import device_of
from parity.bench.cuda.variants import prepare
from parity.bench.cuda.works import (
    PRECISIONS,
    SMALL_WORKS,
    WORKS,
    positions_compared,
    random_ids,
    write_weights,
)
from tinyllm import load_model
from tinyllm.backend.cuda import launch
from tinyllm.backend.dtypes import dtype_of

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

pytest.importorskip("transformers")
pytest.importorskip("resource", reason="on a CPU the benchmark reads the process's memory through resource")


@pytest.mark.parametrize("task", TASKS)
def test_compiled_variant_agrees_with_eager(weights, task):
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
def test_torch_in_bfloat16_is_close_but_not_equal_to_float32(weights, task):
    work, folder = SMALL_WORKS[task], str(weights[task])
    exact, half = (
        prepare("torch-eager", precision, "cpu", work, folder, "").answers()
        for precision in ("float32", "bfloat16")
    )
    assert half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() / np.abs(exact).max() < bound_of(work, "bfloat16")


def test_compared_losses_decrease(tmp_path):
    """Otherwise a step without any update would pass the comparison."""
    work = replace(SMALL_WORKS["train"], changes=SMALL_WORKS["train"].changes | {"n_embd": 64})
    write_weights(work, tmp_path / "model")
    for variant in ("tinyllm", "torch-eager"):
        losses = prepare(variant, "float32", "cpu", work, str(tmp_path / "model"), "").answers()
        assert losses[0] > losses[1] + 0.001 > losses[2] + 0.002


def test_decoding_generates_the_tokens_of_a_greedy_loop_without_a_cache(weights):
    work, folder = SMALL_WORKS["decode"], str(weights["decode"])
    ours, theirs = (
        [token.item() for token in prepare(variant, "float32", "cpu", work, folder, "").once()]
        for variant in ("tinyllm", "torch-eager")
    )
    twin = variants.torch_twin(folder, "cpu", torch.float32)
    ids = torch.from_numpy(random_ids(work)[0])
    for _ in range(work.new):
        ids = torch.cat([ids, twin(ids)[:, -1:].argmax(-1)], dim=1)
    assert ours == theirs == ids[0, work.context :].tolist() and len(ours) == work.new


@pytest.mark.parametrize("task", TASKS)
def test_torch_twin_has_the_weights_of_the_model_and_a_tied_head(weights, task):
    ours = load_model(weights[task])
    twin = variants.torch_twin(str(weights[task]), "cpu", torch.float32)
    theirs = dict(twin.named_parameters())
    assert {name: p.shape for name, p in ours.named_parameters()} == {
        n: tuple(p.shape) for n, p in theirs.items()
    }
    for name, parameter in ours.named_parameters():
        assert np.array_equal(parameter.data, theirs[name].detach().numpy())
        assert not np.shares_memory(parameter.data, theirs[name].detach().numpy())


def test_works_have_the_documented_sizes():
    train, forward, decode = WORKS.values()
    assert train.config().n_layer == 12 and (train.batch, train.context) == (16, 1024)
    assert train.config().embd_pdrop == train.config().attn_pdrop == train.config().resid_pdrop == 0
    assert forward.config() == decode.config() and forward.config().num_hidden_layers == 16
    assert [work.tokens for work in WORKS.values()] == [16 * 1024, 4 * 1024, 128]
    assert WORKS.keys() == SMALL_WORKS.keys() == variants.TINYLLM.keys()
    assert WORKS.keys() == variants.TORCH.keys()


def test_the_last_position_is_compared():
    """It attends to all others."""
    for context in (1, 7, 16, 100, 1024):
        compared = range(context)[positions_compared(context)]
        assert compared[-1] > context - 16 and len(compared) >= min(context, 16)
    assert range(1024)[positions_compared(1024)] == range(63, 1024, 64)


def test_model_flops_are_two_per_weight_and_token_and_six_in_training():
    """Attention adds two products of all queries with all keys."""
    train, forward, decode = WORKS.values()
    gpt2, attention = 12 * 12 * 768**2 + 50257 * 768, 2 * 2 * 12 * 768 * 1024
    assert train.flops_per_token() == pytest.approx(6 * gpt2 + 3 * attention)
    llama = 16 * (2048 * (2048 + 2 * 512 + 2048) + 3 * 2048 * 8192) + 128256 * 2048
    assert forward.flops_per_token() == pytest.approx(2 * llama + 4 * 16 * 2048 * 1024)
    assert decode.flops_per_token() == pytest.approx(2 * llama + 4 * 16 * 2048 * 128)


# ---- On simulated devices ----


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_tinyllm_runs_on_device_arrays(cupy, weights, task, precision):
    work, folder = SMALL_WORKS[task], str(weights[task])
    gpu, cpu = (prepare("tinyllm", precision, device, work, folder, "") for device in ("cuda", "cpu"))
    assert (gpu.device, cpu.device) == ("Paper GPU", "cpu")
    answers = gpu.answers()
    assert cupy.precisions == [precision]
    assert type(answers) is np.ndarray and answers.dtype == np.float32
    assert np.allclose(answers, cpu.answers(), rtol=1e-5, atol=1e-6)
    gpu.once()


@needs_compiler
@pytest.mark.parametrize("task", TASKS)
def test_tinyllm_in_bfloat16_agrees_with_torch(cupy, monkeypatch, weights, task):
    """On a simulated GPU, whose kernels and products round like a real one's."""
    monkeypatch.setitem(launch.LIBRARIES, DeviceArray, Simulator())
    work, folder = SMALL_WORKS[task], str(weights[task])
    ours = prepare("tinyllm", "bfloat16", "cuda", work, folder, "").answers()
    theirs = prepare("torch-eager", "bfloat16", "cpu", work, folder, "").answers()
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert 0 < difference < bound_of(work, "bfloat16")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_of_both_libraries_agree(cupy, monkeypatch, precision):
    if precision == "bfloat16":
        monkeypatch.setitem(launch.LIBRARIES, DeviceArray, Simulator())
    ours = variants.product("tinyllm", precision, "cuda", 24)().data
    theirs = variants.product("torch-eager", precision, "cpu", 24)()
    half = precision == "bfloat16"
    assert type(ours) is DeviceArray and theirs.dtype == (torch.bfloat16 if half else torch.float32)
    ours, theirs = ours.get().astype(np.float32), theirs.float().numpy()
    assert np.abs(ours - theirs).max() < (0.02 if half else 1e-5) * np.abs(theirs).max()


@pytest.mark.parametrize("task", ["forward", "decode"])
def test_inference_in_bfloat16_stores_weights_in_bfloat16(monkeypatch, weights, task):
    kept = {}
    monkeypatch.setattr(variants, "tinyllm_device", lambda model: kept.setdefault("ours", model))
    monkeypatch.setattr(variants, "torch_device", lambda model: kept.setdefault("theirs", model))
    for variant in ("tinyllm", "torch-eager"):
        prepare(variant, "bfloat16", "cpu", SMALL_WORKS[task], str(weights[task]), "")
    assert {p.dtype for p in kept["ours"].parameters()} == {dtype_of("bfloat16")}
    assert {p.dtype for p in kept["theirs"].parameters()} == {torch.bfloat16}


def test_training_in_bfloat16_keeps_the_parameters_in_float32(monkeypatch, weights):
    kept = {}
    monkeypatch.setattr(variants, "tinyllm_device", lambda model: kept.setdefault("ours", model))
    monkeypatch.setattr(variants, "torch_device", lambda model: kept.setdefault("theirs", model))
    for precision in PRECISIONS:
        for variant in ("tinyllm", "torch-eager"):
            prepare(variant, precision, "cpu", SMALL_WORKS["train"], str(weights["train"]), "")
    assert {p.dtype for p in kept["ours"].parameters()} == {np.dtype(np.float32)}
    assert {p.dtype for p in kept["theirs"].parameters()} == {torch.float32}


class NoHostTensors(TorchDispatchMode):
    """Assert that no op receives a CPU tensor, which would have to be copied and waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {"meta"}, function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("task", TASKS)
def test_torch_ops_receive_no_host_tensors(monkeypatch, weights, task, precision):
    monkeypatch.setattr(variants, "torch_device", lambda model: next(model.parameters()).device)
    # Autocast and fused AdamW do not support "meta", and plain AdamW keeps its step count on the host.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **_: torch.optim.SGD(groups, lr=0.1))
    prepared = prepare("torch-eager", precision, "meta", SMALL_WORKS[task], str(weights[task]), "")
    with NoHostTensors():
        done = prepared.once()
    assert prepared.device.type == "meta"
    assert {t.device.type for t in (done if isinstance(done, list) else [done])} == {"meta"}
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")


def test_device_is_synchronized_before_and_after_the_timed_steps(cupy):
    device = device_of("tinyllm", "cuda")
    measure.timed(lambda: cupy.done.append("step"), 3, device)
    assert cupy.done == ["synchronize", "step", "step", "step", "synchronize"]


def test_memory_is_the_pool_and_the_memory_in_use_on_the_gpu(cupy, monkeypatch):
    device_of("tinyllm", "cuda").settle()
    assert cupy.done == ["free_all_blocks"]
    ours = device_of("tinyllm", "cuda").memory()
    assert ours == {"peak_bytes": 3 * 10**9, "whole_bytes": 6 * 10**9}

    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: cupy.done.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2, 9))
    theirs = device_of("torch-compile", "cuda")
    theirs.settle()
    theirs.synchronize()
    assert cupy.done[1:] == ["empty_cache", "reset_peak_memory_stats", "synchronize"]
    assert theirs.memory() == {"peak_bytes": 5, "whole_bytes": 7}

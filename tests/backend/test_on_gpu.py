"""Both models against PyTorch on the same GPU: loss, gradients, training steps and generation.

``pytest -m gpu`` runs this on CuPy and torch's CUDA. Everywhere else the same tests run with a simulated GPU
(``cuda_on_cpu.py``) against torch on the CPU.
"""

import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cuda_on_cpu import GPUS, needs_compiler, simulated_cupy
from support.models import MODELS, on_host

from parity.compare import compare
from parity.twins import bridge
from tinyllm import Tensor, manual_seed, no_grad, optim
from tinyllm import functional as F
from tinyllm.backend.dtypes import autocast
from tinyllm.inference.generate import generate

IDS = np.random.default_rng(5).integers(0, 23, (3, 2, 20))
on_both = pytest.mark.parametrize("put", GPUS, indirect=True)
every_model = pytest.mark.parametrize("name", MODELS)


def pair(name, put, dtype):
    """The model on the device under test, and its twin on the corresponding device of torch."""
    model, rng = MODELS[name](0.0).astype(dtype), np.random.default_rng(1)
    for parameter in model.parameters():
        noise = 0.2 * rng.standard_normal(parameter.shape)
        parameter.replace(put(parameter.data + noise.astype(dtype)))
    kind = "cuda" if type(put(IDS)).__module__.startswith("cupy") else "cpu"
    return model, bridge.to_torch(model).to(kind)


def loss_of_twin(twin, ids, autocast=None):
    """The loss of the next token and all gradients by name, on the host."""
    device = next(twin.parameters()).device
    ids = torch.tensor(ids, device=device)
    twin.zero_grad()
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        loss = twin.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    grads = {name: p.grad for name, p in twin.named_parameters()}  # None: an expert that no token chose
    return loss.item(), {name: g.cpu().numpy() for name, g in grads.items() if g is not None}


def loss_of_ours(model, ids):
    model.zero_grad()
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return loss.item(), {name: on_host(g) for name, g in grads.items() if g is not None}


def distance(grads, others) -> float:
    """|grads - others| / |others| over all parameters together."""
    difference = sum(np.sum((grads[name].astype(float) - others[name]) ** 2) for name in others)
    return math.sqrt(difference / sum(np.sum(g.astype(float) ** 2) for g in others.values()))


@on_both
@every_model
@pytest.mark.parametrize("dtype, bound", [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_loss_and_gradients_equal_torch(name, put, dtype, bound):
    model, twin = pair(name, put, dtype)
    loss, grads = loss_of_ours(model, IDS[0])
    expected, expected_grads = loss_of_twin(twin, IDS[0])
    assert loss == pytest.approx(expected, rel=bound)
    assert grads.keys() == expected_grads.keys()
    for key, grad in grads.items():
        error = np.abs(grad - expected_grads[key]).max()
        assert error <= bound * max(1, np.abs(expected_grads[key]).max()), key


@on_both
@every_model
def test_training_steps_equal_torch(name, put):
    model, twin = pair(name, put, np.float64)
    optimizer = optim.AdamW(model, lr=1e-3, eps=1e-6, weight_decay=0.1)
    groups = [
        {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-3, eps=1e-6)
    for ids in IDS:
        loss, _ = loss_of_ours(model, ids)
        expected, _ = loss_of_twin(twin, ids)
        norm = optim.clip_grad_norm(model, 0.5)
        expected_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5).item()
        optimizer.step()
        theirs.step()
        assert (loss, norm) == pytest.approx((expected, expected_norm), rel=1e-9)
        assert norm > 0.5
    parameters = dict(twin.named_parameters())
    for key, parameter in model.named_parameters():
        np.testing.assert_allclose(
            on_host(parameter.data), parameters[key].detach().cpu().numpy(), rtol=1e-9, atol=1e-9, err_msg=key
        )


@on_both
@every_model
def test_bfloat16_is_as_accurate_as_torch_autocast(name, put):
    model, twin = pair(name, put, np.float32)
    expected, expected_grads = loss_of_twin(twin, IDS[0])
    _, their_grads = loss_of_twin(twin, IDS[0], torch.bfloat16)
    with autocast("bfloat16"):
        ours, our_grads = loss_of_ours(model, IDS[0])
    assert ours == pytest.approx(expected, rel=2.0**-8)
    assert 0 < distance(our_grads, expected_grads) < 1.25 * distance(their_grads, expected_grads)


@on_both
def test_attention_under_autocast_gives_each_input_a_gradient_of_its_dtype(put):
    """Normalised and rotated queries and keys are float32, values come from a product; biases are learned."""
    rng = np.random.default_rng(0)
    q, k, v = (put(rng.standard_normal((2, 4, 5, 8)).astype(np.float32)) for _ in range(3))
    bias, grads = put(rng.standard_normal((4, 5, 5)).astype(np.float32)), []
    for dtype in (None, "bfloat16"):
        inputs = [Tensor(x, requires_grad=True) for x in (q, k, v, bias)]
        with autocast(dtype):
            value = inputs[2] if dtype is None else inputs[2].astype(dtype)
            out = F.scaled_dot_product_attention(*inputs[:2], value, inputs[3], is_causal=True)
        assert out.dtype == (dtype or np.float32)
        (out * out).sum().backward()
        assert all(x.grad.dtype == np.float32 for x in inputs)
        grads.append([on_host(x.grad) for x in inputs])
    for exact, rounded in zip(*grads):
        assert 0 < np.abs(rounded - exact).max() < 2.0**-5 * np.abs(exact).max()


@on_both
@every_model
def test_generated_tokens_equal_those_of_the_cpu(name, put):
    model, _ = pair(name, put, np.float64)
    at_home = bridge.from_torch(bridge.to_torch(model)).eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    for options in (dict(temperature=0), dict(temperature=1.0, top_k=5)):
        tokens, expected = (
            np.array(list(generate(m, prompts, 6, rng=np.random.default_rng(0), **options)))
            for m in (model, at_home)
        )
        np.testing.assert_array_equal(tokens, expected)


@on_both
@every_model
def test_weights_are_saved_and_loaded_across_devices(name, put, tmp_path):
    """Weights saved from a GPU load on a CPU and vice versa; a model stays on its device."""
    model, _ = pair(name, put, np.float32)
    model.save_pretrained(tmp_path / "saved")
    at_home = type(model).from_pretrained(tmp_path / "saved")
    back, _ = pair(name, put, np.float64)
    back.load_state_dict(at_home.state_dict())
    assert all(type(p.data) is type(put(IDS)) and p.dtype == np.float64 for p in back.parameters())
    at_home.load_state_dict(model.state_dict())
    for key, parameter in model.named_parameters():
        for other in (at_home, back):
            np.testing.assert_array_equal(
                on_host(parameter.data), on_host(dict(other.named_parameters())[key].data)
            )
    with no_grad():
        np.testing.assert_allclose(
            on_host(model.eval()(IDS[0]).data), at_home(IDS[0]).data, rtol=1e-4, atol=1e-4
        )


@on_both
@every_model
def test_models_are_compared_on_their_device(name, put):
    model, twin = pair(name, put, np.float64)
    result = compare(model.eval(), twin.eval(), IDS[0, :, :9])
    assert result.first is None and len(result.rows) > 60, str(result)
    assert all(type(p.data) is type(put(IDS)) for p in model.parameters())


@needs_compiler
@every_model
def test_run_moves_between_devices(name, monkeypatch):
    """Moving model and optimizer between GPUs and CPU between steps does not change the results."""
    simulated_cupy(monkeypatch)

    def losses(devices):
        model = MODELS[name](0.1).astype(np.float64)
        optimizer, found = optim.AdamW(model, lr=1e-2), []
        for step, device in enumerate(devices):
            model.to(device)
            if step == 3:
                optimizer.to(device)  # at the other steps the averages follow the parameters
            manual_seed(0, step)
            loss = model.loss(IDS[0, :, :-1], IDS[0, :, 1:])
            loss.backward()
            optim.clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    expected = losses(["cpu"] * 5)
    assert losses(["cuda:1", "cpu", "cuda:0", "cuda:1", "cpu"]) == pytest.approx(expected, rel=1e-9)


@needs_compiler
def test_gradient_of_a_moved_tensor_is_moved_back(monkeypatch):
    simulated_cupy(monkeypatch)
    x = Tensor(np.arange(3.0), requires_grad=True)
    there = x.to("cuda:1")
    assert there.data.device.id == 1 and there.to("cuda:1") is there and x.to("cpu") is x
    (there.to("cuda:0") * there.to("cuda:0")).to("cpu").backward(np.ones(3))
    assert isinstance(x.grad, np.ndarray)
    np.testing.assert_array_equal(x.grad, [0, 2, 4])


@needs_compiler
def test_example_uses_an_available_gpu(monkeypatch, capsys):
    simulated_cupy(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["08"])
    for name, value in (("TINYLLM_EXAMPLES", "small"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    example = Path(__file__).parents[2] / "examples" / "08_weights_and_sampling.py"
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert " parameters on cuda\n" in printed and printed.count("top-k") == 9 + 2  # the grid; sure and unsure

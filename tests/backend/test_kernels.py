"""The CUDA kernels and products: half precision, layouts, masks, many arrays, and errors.

``test_device_discipline.py`` runs every op and model through the kernels in float32 and float64. Here a
simulated GPU (``cuda_on_cpu.py``) runs them in bfloat16 and float16, and NVIDIA's compiler, where CuPy
includes it, compiles each for every dtype it is used with.

Tolerances in half precision follow from the roundings: u = 2⁻⁸ (bfloat16) or 2⁻¹¹ (float16) is the maximum
relative error of one rounding.
"""

import itertools
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cuda_on_cpu import GPUS, Simulator
from support.device_array import Device, DeviceArray
from support.models import MODELS

from tinyllm import Error, Tensor, manual_seed, nn, no_grad, optim
from tinyllm import functional as F
from tinyllm.backend.cuda import launch
from tinyllm.backend.dtypes import accumulation_dtype, autocast, compute_dtype, tf32_allowed
from tinyllm.backend.random import dropout_mask
from tinyllm.inference.generate import generate

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROUNDING = {BFLOAT16: 2.0**-8, np.dtype(np.float16): 2.0**-11}
SHORT = list(ROUNDING)
on_gpus = pytest.mark.parametrize("put", GPUS, indirect=True)
every_short = pytest.mark.parametrize("dtype", SHORT, ids=str)


def rounded(rng, shape, dtype):
    """Random float64 numbers that the dtype represents exactly."""
    return rng.standard_normal(shape).astype(dtype).astype(np.float64)


# ------------------------------------------------------------------------------------- ops


def attention_with_dropout(q, k, v):
    manual_seed(0)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True, enable_gqa=True)


# name -> the op of some leaves, its rounding error besides that of the result, and for each leaf its shape
# and whether it is a weight, which stays float32
OPS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), 1, [((3, 5, 8), 0), ((6, 8), 1), ((6,), 1)]),
    "gelu": (lambda x: F.gelu(x, "tanh"), 0, [((3, 40), 0)]),
    "gelu of erf": (lambda x: F.gelu(x), 0, [((3, 40), 0)]),
    "swiglu": (lambda a, u: F.swiglu(a, u), 0, [((3, 40), 0), ((3, 40), 0)]),
    "geglu": (lambda a, u: F.geglu(a, u), 0, [((3, 40), 0), ((3, 40), 0)]),
    "softcap": (lambda x: F.softcap(x, 0.7), 0, [((3, 40), 0)]),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        2,
        [((2, 4, 7, 8), 0), ((2, 2, 9, 8), 0), ((2, 2, 9, 6), 0)],
    ),
    "attention in a window": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, window=3, softcap=1.5
        ),
        2,
        [((2, 4, 7, 8), 0), ((2, 2, 9, 8), 0), ((2, 2, 9, 6), 0)],
    ),
    "attention with dropout": (
        attention_with_dropout,
        2,
        [((2, 4, 7, 8), 0), ((2, 2, 9, 8), 0), ((2, 2, 9, 6), 0)],
    ),
    "cross_entropy": (lambda x: F.cross_entropy(x, np.array([2, 39, -100])), 0, [((3, 40), 0)]),
    "linear_cross_entropy": (
        lambda x, w, b: F.linear_cross_entropy(
            x, w, np.array([[1, 0, -100], [2, 9, 9]]), linear_bias=b, num_targets=2.0
        ),
        1,
        [((2, 3, 8), 0), ((10, 8), 1), ((10,), 1)],
    ),
    "linear_cross_entropy with a softcap": (
        lambda x, w: F.linear_cross_entropy(x, w, np.array([[1, 0, -100], [2, 9, 9]]), softcap=2.5),
        1,
        [((2, 3, 8), 0), ((10, 8), 1)],
    ),
}


@on_gpus
@every_short
@pytest.mark.parametrize("name", OPS)
def test_op_in_half_precision_equals_numpy(name, dtype, put):
    """Against NumPy in float64 on the same numbers, within the rounding error of the dtype."""
    op, on_the_way, described = OPS[name]
    rng, u = np.random.default_rng(0), ROUNDING[dtype]
    arrays = [rounded(rng, shape, dtype) for shape, _ in described]
    exact = [Tensor(array, requires_grad=True) for array in arrays]
    short = [
        Tensor(put(array.astype(np.float32 if is_weight else dtype)), requires_grad=True)
        for array, (_, is_weight) in zip(arrays, described)
    ]
    expected, result = op(*exact), op(*short)
    upstream = rounded(rng, expected.shape, dtype)
    expected.backward(upstream)
    result.backward(put(upstream.astype(result.dtype)))
    assert result.dtype == (np.float32 if "cross_entropy" in name else dtype)
    pairs = [(result.data, expected.data)] + [(s.grad, e.grad) for s, e in zip(short, exact)]
    assert all(s.grad.dtype == s.dtype for s in short)
    for got, want in pairs:
        error = np.abs(got.get().astype(np.float64) - want)
        bound = 1.01 * u * np.abs(want) + (on_the_way * u + 1e-6) * np.abs(want).max()
        assert (error <= bound).all(), (error / bound).max()


@on_gpus
@every_short
@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm, partial(F.rms_norm, offset=1.0)])
def test_norm_returns_the_dtype_of_products(norm, dtype, put):
    rng, u = np.random.default_rng(0), ROUNDING[dtype]
    x, w, upstream = (rng.standard_normal(s).astype(np.float32) for s in [(3, 2, 70), (70,), (3, 2, 70)])
    upstream = upstream.astype(dtype).astype(np.float32)
    exact = [Tensor(a.astype(np.float64), requires_grad=True) for a in (x, w)]
    leaves = [Tensor(put(a), requires_grad=True) for a in (x, w)]
    expected = norm(exact[0], 70, exact[1])
    with autocast(dtype.name):
        result = norm(leaves[0], 70, leaves[1])
    assert result.dtype == dtype and result.recompute().dtype == dtype
    np.testing.assert_array_equal(result.recompute().get(), result.data.get())
    np.testing.assert_allclose(result.data.get().astype(float), expected.data, rtol=1.01 * u, atol=1e-6)
    expected.backward(upstream.astype(np.float64))
    result.backward(put(upstream.astype(dtype)))
    for leaf, other in zip(leaves, exact):
        assert leaf.grad.dtype == np.float32  # of the residual stream and of the weight
        np.testing.assert_allclose(leaf.grad.get(), other.grad, rtol=1e-5, atol=1e-5)


@on_gpus
@every_short
def test_rope_in_half_precision_uses_float32_angles(dtype, put):
    rng = np.random.default_rng(0)
    x, angles = rounded(rng, (2, 3, 5, 8), dtype), rng.uniform(0, 7, (5, 4)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    expected = F.rope(Tensor(x), cos.astype(np.float64), sin.astype(np.float64)).data
    result = F.rope(Tensor(put(x.astype(dtype))), put(cos), put(sin))
    assert result.dtype == dtype
    np.testing.assert_allclose(
        result.data.get().astype(float), expected, rtol=1.01 * ROUNDING[dtype], atol=1e-6
    )
    with pytest.raises(Error, match="needs cos and sin in float32, not in"):
        F.rope(Tensor(put(x.astype(dtype))), put(cos.astype(dtype)), put(sin.astype(dtype)))


@on_gpus
def test_embedding_of_a_half_precision_table_is_float32(put):
    table = Tensor(put(np.ones((4, 3), BFLOAT16)), requires_grad=True)
    rows = F.embedding(put(np.array([1, 1, 2])), table)
    rows.backward(put(np.ones((3, 3), np.float32)))
    assert rows.dtype == np.float32 and table.grad.dtype == BFLOAT16
    np.testing.assert_array_equal(table.grad.get()[:, 0].astype(float), [0, 2, 1, 0])


@on_gpus
def test_gradients_of_equal_ids_accumulate_in_float32(put):
    """In bfloat16 ten thousand ones would sum to 256: there is no number between 256 and 258."""
    table = Tensor(put(np.zeros((2, 1), BFLOAT16)), requires_grad=True)
    ids = put(np.zeros(10_000, np.int64))
    F.embedding(ids, table).backward(put(np.ones((10_000, 1), np.float32)))
    assert table.grad.get()[0, 0] == 9984.0  # 10,000 rounded to eight bits


@on_gpus
@every_short
def test_gradients_of_weights_accumulate_in_float32(dtype, put):
    """600 terms with as many bits as the dtype has: a sum of two of them has one more."""
    term, rows = 1 + 2 * ROUNDING[dtype], 600
    g, ones = put(np.full((rows, 3), term, dtype)), put(np.ones((rows, 3), np.float32))
    _, of_bias = launch.sums_over_rows(g, np.float32)
    of_norm = launch.sums_over_rows(g, np.float32, ones, ones[:, 0] * 0, ones[:, 0], centred=True)
    of_table = put(np.zeros((2, 3), np.float32))
    launch.add_rows_at(of_table, put(np.zeros(rows, np.int64)), g)
    for gradient in (of_bias, *of_norm, of_table[0]):
        np.testing.assert_array_equal(gradient.get(), np.full(3, rows * term))  # exact in float32


REDUCTIONS = {
    "sum": lambda x: x.sum(axis=-1),
    "mean": lambda x: x.mean(axis=-1),
    "var": lambda x: x.var(axis=-1, ddof=1, keepdims=True),
    "softmax": lambda x: F.softmax(x),
    "silu": lambda x: F.silu(x),
}


@pytest.mark.parametrize("op", REDUCTIONS)
@every_short
def test_half_precision_sums_are_computed_in_float32(dtype, op):
    """Also on a CPU: with eight bits the sum of 5,000 numbers around 3 would not exceed 1,024."""
    u, numbers = ROUNDING[dtype], 3 + rounded(np.random.default_rng(0), (2, 5_000), dtype)
    exact, short = (
        Tensor(a, requires_grad=True) for a in (numbers.astype(dtype).astype(float), numbers.astype(dtype))
    )
    expected, result = REDUCTIONS[op](exact), REDUCTIONS[op](short)
    upstream = np.ones(expected.shape) / 4
    expected.backward(upstream)
    result.backward(upstream.astype(dtype))
    assert result.dtype == short.grad.dtype == dtype
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    np.testing.assert_allclose(result.data.astype(float), expected.data, rtol=1.01 * u, atol=smallest)
    np.testing.assert_allclose(short.grad.astype(float), exact.grad, rtol=1.01 * u, atol=max(smallest, 1e-7))


# -------------------------------------------------------------------------------- products


@st.composite
def products(draw):
    """A function of ``put`` to A and B of any size and memory layout, single matrices or batches."""
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    M, K, N = (draw(st.integers(0, 5)) for _ in range(3))
    dtype = draw(st.sampled_from([np.dtype(np.float64), np.dtype(np.float32), *SHORT]))
    rng = np.random.default_rng(draw(st.integers(0, 9)))

    def matrix(rows, columns):
        by_columns, gap, stride = draw(st.booleans()), draw(st.integers(0, 2)), draw(st.sampled_from([1, 2]))
        rows, columns = (columns, rows) if by_columns else (rows, columns)
        whole = rng.integers(-4, 5, (*batch, rows, stride * columns + gap)).astype(dtype)

        def part(put):
            x = put(whole)[..., : stride * columns : stride]
            return x.swapaxes(-1, -2) if by_columns else x

        return part

    a, b = matrix(M, K), matrix(K, N)
    return lambda put: (a(put), b(put))


@on_gpus
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # one device for all examples
@given(products(), st.sampled_from([1.0, 0.5]), st.sampled_from([0.0, 1.0]))
def test_gemm_of_any_layout(put, product, alpha, beta):
    a, b = product(put)
    dtype = accumulation_dtype(a.dtype)
    before = np.full((*a.shape[:-1], b.shape[-1]), 3.0 if beta else math.nan)
    out = put(before.astype(dtype))
    assert launch.gemm(a, b, out, alpha=alpha, beta=beta) is out
    expected = alpha * (a.get().astype(float) @ b.get().astype(float)) + (3.0 if beta else 0)
    np.testing.assert_array_equal(out.get(), expected)  # integers are exact in every type
    new = launch.gemm(a, b)
    assert new.dtype == a.dtype and new.shape == out.shape


@on_gpus
def test_gemm_into_a_slice(put):
    rng = np.random.default_rng(0)
    whole, a, b = put(np.zeros((2, 5, 7))), rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 4, 6))
    launch.gemm(put(a), put(b), out=whole[:, 1:4, :6])
    expected = np.zeros((2, 5, 7))
    expected[:, 1:4, :6] = a @ b
    np.testing.assert_allclose(whole.get(), expected, rtol=1e-14, atol=1e-14)


@on_gpus
def test_tf32_rounds_float32_products_only(put):
    x = np.full((2, 2), 1 + 2.0**-12)  # TF32 has a mantissa of ten bits

    def product_and_gradient(dtype, name):
        a, b = (Tensor(put(x.astype(dtype)), requires_grad=True) for _ in range(2))
        with autocast(name):
            y = F.linear(a, b)
        y.backward(put(x.astype(dtype)))  # outside the block, in the dtype of the forward pass
        return y.data.get()[0, 0], a.grad.get()[0, 0]

    exact = 2 * (1 + 2.0**-12) ** 2
    assert product_and_gradient(np.float32, "float32") == (np.float32(exact),) * 2
    assert product_and_gradient(np.float32, "tf32") == (2.0, 2.0)
    assert product_and_gradient(np.float64, "tf32") == (exact, exact)


# --------------------------------------------------------------------------------- dropout


@on_gpus
@pytest.mark.parametrize("shape", [(1,), (16,), (3, 5, 7), (64, 33)])
def test_dropout_is_equal_on_every_device(shape, put):
    for address, part in [((0, 0, 0, 0), None), ((7, 12345, 3, 9), 41), ((2**40, 1, 2, 2**33), None)]:
        for p in (0.3, 0.999, 1):  # with 16 and with 32 bits for each element
            host = dropout_mask(address, shape, p, np.zeros(1, np.float32), part)
            there = dropout_mask(address, shape, p, put(np.zeros(1, np.float32)), part)
            assert there.dtype == np.float32
            np.testing.assert_array_equal(there.get(), host)


# ------------------------------------------------------------------------- many arrays at once


@on_gpus
@pytest.mark.parametrize("chunk", [3, 2**16])
def test_many_arrays_are_processed_in_one_launch(monkeypatch, chunk, put):
    monkeypatch.setattr(launch, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in [(4, 5), (1,), (3,), (2, 3, 2)]]
    moved = [put(array) for array in arrays]
    assert launch.sum_of_squares(moved) == pytest.approx(sum((a * a).sum() for a in arrays), rel=1e-14)
    launch.scale(moved, 0.25)
    for array, there in zip(arrays, moved):
        np.testing.assert_array_equal(there.get(), array * 0.25)


@on_gpus
def test_adamw_recovers_from_a_gradient_whose_square_overflows(put):
    parameter = Tensor(put(np.ones(1, np.float32)), requires_grad=True)
    optimizer = optim.AdamW([parameter], lr=0.1)
    for step in range(199):
        parameter.grad = put(np.full(1, 1e20 if step == 0 else 1.0, np.float32))
        optimizer.step()
    assert parameter.data.get().item() == pytest.approx(0.3994, abs=1e-4)  # torch's


@on_gpus
def test_unsuitable_arrays_are_not_launched_together(put):
    rows = put(np.zeros((4, 4)))
    assert launch.fit_for_many([rows, rows[1]])
    for others in ([], [rows, rows.T[1:]], [rows, put(np.zeros(3, np.float32))], [np.zeros(3)]):
        assert not launch.fit_for_many(others)


# ---------------------------------------------------------------------------------- models


def moved(name, put, dropout=0.0):
    model = MODELS[name](dropout)
    rng = np.random.default_rng(1)
    for parameter in model.parameters():
        parameter.replace(put(parameter.data + 0.1 * rng.standard_normal(parameter.shape).astype(np.float32)))
    return model


def losses_and_gradients(model, dtype="float32", steps=2):
    rng = np.random.default_rng(1)
    optimizer, found = optim.AdamW(model, lr=1e-2, weight_decay=0.1), []
    for step in range(steps):
        tokens = rng.integers(0, 23, (2, 31))
        manual_seed(0, step)
        with autocast(dtype):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        grads = {name: p.grad.get() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), grads))
        optim.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return found


@on_gpus
@pytest.mark.parametrize("dtype, dropout", [(SHORT[0], 0.2), (SHORT[1], 0.0)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_training_with_products_in_half_precision(name, dtype, dropout, put):
    """Parameters, gradients and loss are float32 and close to those with products in float32."""
    expected = losses_and_gradients(moved(name, put, dropout))
    model = moved(name, put, dropout)
    found = losses_and_gradients(model, dtype.name)
    u = ROUNDING[dtype]
    assert all(parameter.dtype == np.float32 for parameter in model.parameters())
    assert all(g.dtype == np.float32 for _, grads in found for g in grads.values())
    losses, other_losses = ([loss for loss, _ in steps] for steps in (found, expected))
    assert losses == pytest.approx(other_losses, rel=u) and losses != other_losses
    # After the first step only: AdamW divides small gradients, and their rounding errors, by their size.
    (_, grads), (_, others) = found[0], expected[0]
    difference = math.sqrt(sum(np.sum((g - others[n]) ** 2) for n, g in grads.items()))
    roundings = 6 if name == "gemma3" else 4  # it rounds queries and keys twice, and each block's two terms
    assert 0 < difference < roundings * u * math.sqrt(sum(np.sum(g**2) for g in others.values()))


@on_gpus
@pytest.mark.parametrize("name", MODELS)
def test_results_do_not_depend_on_the_order_of_threads(name, monkeypatch, put):
    """Bitwise identical, so that a resumed run continues exactly on a GPU as well."""
    runs = []
    for seed in (2, 3):  # opposite thread orders on the simulated GPU; a real one ignores them
        monkeypatch.setitem(launch.LIBRARIES, DeviceArray, Simulator(seed))
        model = moved(name, put, 0.2)
        [(loss, grads)] = losses_and_gradients(model, "bfloat16", steps=1)
        parameters = {f"{key} after the step": p.data.get() for key, p in model.named_parameters()}
        runs.append({"loss": loss} | grads | parameters)
    for key, array in runs[0].items():
        np.testing.assert_array_equal(array, runs[1][key], err_msg=key)


@on_gpus
def test_target_is_read_before_the_gradient_overwrites_it(monkeypatch, put):
    """In float32 the gradient is written where the logits were, here by two warps for a row."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((60, 8)), rng.standard_normal((60, 8))
    expected = F.linear_cross_entropy(Tensor(x), Tensor(w), np.arange(60))
    for seed in (2, 3):  # opposite thread orders
        monkeypatch.setitem(launch.LIBRARIES, DeviceArray, Simulator(seed))
        leaves = [Tensor(put(a.astype(np.float32)), requires_grad=True) for a in (x, w)]
        loss = F.linear_cross_entropy(*leaves, np.arange(60))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("put", GPUS[:1], indirect=True)
@pytest.mark.parametrize("name", MODELS)
def test_training_step_synchronizes_once(name, put, monkeypatch):
    """Only for the gradient norm, which clipping compares on the host, not for the loss.

    A mixture also reads how many tokens chose each expert, on which the shapes of its products depend.
    """
    waits, mixtures = [], ["get"] * 2 if name == "mixtral" else []
    for method in ("item", "get"):
        honest = getattr(DeviceArray, method)
        monkeypatch.setattr(DeviceArray, method, lambda x, f=honest, m=method: (waits.append(m), f(x))[1])
    model = moved(name, put, 0.2)
    optimizer = optim.AdamW(model, lr=1e-2)
    ids = np.random.default_rng(1).integers(0, 23, (2, 31))
    for step in range(2):
        manual_seed(0, step)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        assert waits == [*mixtures, "item"] * step + mixtures
        optim.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert waits == [*mixtures, "item"] * (step + 1)


@on_gpus
@every_short
@pytest.mark.parametrize("name", MODELS)
def test_model_in_half_precision_generates(name, dtype, put):
    model = moved(name, put).eval()
    ids = np.random.default_rng(2).integers(0, 23, (2, 9))
    with no_grad():
        expected = model(ids).data.get()
        logits = model.astype(dtype)(ids).data
    assert logits.dtype == dtype and all(p.dtype == dtype for p in model.parameters())
    assert (
        0
        < np.abs(logits.get().astype(np.float32) - expected).max()
        < 8 * ROUNDING[dtype] * np.abs(expected).max()
    )
    assert model.new_cache(1).keys[0].dtype == dtype
    cached, afresh = (
        np.array(list(generate(model, ids, 4, temperature=0, use_cache=use))) for use in (True, False)
    )
    np.testing.assert_array_equal(cached, afresh)


@on_gpus
def test_cache_has_the_dtype_of_products(put):
    model = moved("llama", put).eval()
    with autocast("bfloat16"):
        assert model.new_cache(1).keys[0].dtype == BFLOAT16
        tokens = np.array(list(generate(model, [[1, 2, 3]], 5, temperature=0)))
        again = np.array(list(generate(model, [[1, 2, 3]], 5, temperature=0, use_cache=False)))
    np.testing.assert_array_equal(tokens, again)
    assert model.new_cache(1).keys[0].dtype == np.float32


def test_autocast_applies_within_its_block_and_thread():
    assert compute_dtype() is None
    with autocast("bfloat16"):
        assert compute_dtype() == BFLOAT16 and not tf32_allowed()
        with autocast("tf32"):
            assert compute_dtype() is None and tf32_allowed()
        with autocast(None), ThreadPoolExecutor(1) as pool:
            assert compute_dtype() is None and pool.submit(compute_dtype).result() is None
        assert compute_dtype() == BFLOAT16
    assert compute_dtype() is None
    with pytest.raises(Error, match="int8"), autocast("int8"):
        pass


@on_gpus
@pytest.mark.parametrize("name", ["gpt2", "llama tied"])
def test_replaced_layer_is_called(name, put):
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2.0

    def logits(put):
        model, rng = MODELS[name](0.0).eval(), np.random.default_rng(3)
        mlp, layer = (model.h[0].mlp, "c_fc") if name == "gpt2" else (model.layers[0].mlp, "up_proj")
        setattr(mlp, layer, Doubled(*getattr(mlp, layer).weight.shape[::-1], rng=rng))
        for parameter in model.parameters():
            parameter.replace(put(rng.standard_normal(parameter.shape)))
        with no_grad():
            return model(np.array([[1, 2, 3]])).data

    np.testing.assert_allclose(logits(put).get(), logits(lambda x: x), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------- bad input


def test_half_precision_is_refused_on_a_cpu():
    x = Tensor(np.ones((2, 4), BFLOAT16))
    with pytest.raises(Error, match=r"bfloat16 needs a GPU: use float32, or to\('cuda'\)"):
        F.linear(x, x)
    model = MODELS["gpt2"](0.0)
    for short in (model.astype(BFLOAT16), MODELS["llama"](0.0).astype(np.float16)):
        with pytest.raises(Error, match="needs a GPU"):
            short(np.array([[1, 2]]))
    with autocast("bfloat16"):  # which affects products on a GPU only
        assert MODELS["gpt2"](0.0)(np.array([[1, 2]])).dtype == np.float32


OF_TWO = {
    "linear": lambda x, y: F.linear(x, y),
    "layer_norm": lambda x, y: F.layer_norm(x, 4, y[0]),
    "swiglu": lambda x, y: F.swiglu(x, y),
    "geglu": lambda x, y: F.geglu(x, y),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[None, None], y[None, None], y[None, None]),
    "linear_cross_entropy": lambda x, y: F.linear_cross_entropy(x, y, np.array([1, 0, 2, 3])),
    "+": lambda x, y: x + y,
    "@": lambda x, y: x @ y,
}


@pytest.mark.parametrize("put", GPUS[:1], indirect=True)
@pytest.mark.parametrize("op", OF_TWO)
def test_arrays_on_two_devices_are_refused(op, put):
    here, there = Tensor(np.ones((4, 4))), Tensor(put(np.ones((4, 4))))
    far = Tensor(DeviceArray.of(np.ones((4, 4)), Device(1)))
    for one, other, names in [
        (here, there, "cpu and cuda:0"),
        (there, here, "cuda:0 and cpu"),
        (there, far, "cuda:0 and cuda:1"),
    ]:
        with pytest.raises(Error, match=f"arrays on {names}"):
            OF_TWO[op](one, other)


@pytest.mark.parametrize("array", [np.ones((2, 4)), DeviceArray.of(np.ones((2, 4)))], ids=["host", "device"])
def test_array_instead_of_a_tensor_is_refused(array):
    with pytest.raises(Error, match=r"takes Tensors, not (ndarray|DeviceArray): wrap the array with Tensor"):
        F.linear(array, Tensor(np.ones((3, 4))))


@pytest.mark.parametrize("status, error", [(1, MemoryError), (3, MemoryError), (13, RuntimeError)])
def test_cublas_out_of_memory_raises_memory_error(monkeypatch, status, error):
    class CUBLASError(RuntimeError):
        def __init__(self):
            self.status = status
            super().__init__("CUBLAS_STATUS_OF_THE_TEST")

    def refuse(handle, *arguments):
        assert (handle, arguments) == (7, (1, 2))
        raise CUBLASError

    modules = {
        "cupy": ModuleType("cupy"),
        "cupy.cuda": SimpleNamespace(
            cublas=SimpleNamespace(CUBLASError=CUBLASError, gemmStridedBatchedEx=refuse),
            device=SimpleNamespace(get_cublas_handle=lambda: 7),
        ),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(error, match="CUBLAS_STATUS_OF_THE_TEST"):
        launch.CuPyLibrary().gemm(1, 2)


# --------------------------------------------------------------------------------- compiling

# The template parameters of a kernel for each precision in which a model can compute.
POLICIES = {
    "float32": dict(X="float", W="float", T="float", Z="float"),
    "float64": dict(X="double", W="double", T="double", Z="double"),
} | {
    f"{kind} in {short}": dict(X=x, W=weights, T=result, Z="float")
    for short in ("__nv_bfloat16", "__half")
    for kind, x, weights, result in [
        ("products", "float", "float", short),
        ("stored", "float", short, short),
        ("norms of products", short, "float", "float"),
    ]
}


def every_kernel():
    """Every kernel with every combination of dtypes, as ``launch.launch`` names them."""
    source = launch.SOURCE.read_text(encoding="utf-8")
    found = re.findall(r"(?:template <([^<]*(?:<T>|<X>|<W>|<Z>)?[^<]*)>\n)?__global__ void (\w+)\(", source)
    for parameters, name in found:
        kinds = [p.split()[:2] for p in parameters.split(", ") if p and "=" not in p]
        for policy in POLICIES.values():
            only_wide = name in (
                "sum_of_squares",
                "scale",
                "adamw",
            )  # of parameters and gradients in training
            if only_wide and policy["W"] not in ("float", "double"):
                continue
            policy = policy | ({"T": policy["W"]} if only_wide else {})
            choices = [("true", "false") if kind == "bool" else (policy[letter],) for kind, letter in kinds]
            for choice in itertools.product(*choices):
                yield f"{name}<{', '.join(choice)}>" if choice else name


def test_every_kernel_is_in_the_list():
    source = launch.SOURCE.read_text(encoding="utf-8")
    names = {expression.partition("<")[0] for expression in every_kernel()}
    assert len(names) == source.count("__global__ void") and {"norm", "adamw", "dropout_mask"} <= names


def test_every_kernel_compiles_with_nvrtc():
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy and NVRTC")
    compiler = pytest.importorskip("cupy.cuda.compiler")
    headers = pytest.importorskip("nvidia.cuda_runtime", reason="needs the headers of nvidia-cuda-runtime")
    expressions = sorted(set(every_kernel()))
    include = f"-I{next(iter(headers.__path__))}/include"
    source = launch.SOURCE.read_text(encoding="utf-8")
    program = compiler._NVRTCProgram(source, "kernels.cu", (), (), tuple(expressions), "ptx")
    try:
        ptx, names = program.compile(("-std=c++17", "-arch=compute_80", include))
    except nvrtc.NVRTCError as error:  # pragma: no cover
        pytest.fail(str(error))
    assert set(names) == set(expressions) and all(name.encode() in ptx for name in names.values())

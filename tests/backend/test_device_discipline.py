"""The NumPy source runs on a GPU: every op and both models on arrays that are not NumPy's.

``DeviceArray`` has CuPy's limits and computes with NumPy. On it everything runs twice: with NumPy's functions
only, and with the CUDA kernels on a simulated GPU (``cuda_on_cpu.py``). With a GPU, ``pytest -m gpu`` runs
everything on CuPy as well. Each run is compared with the one on NumPy arrays.
"""

import inspect
import math
import operator
from types import SimpleNamespace

import numpy as np
import pytest
from support.device_array import DeviceArray
from support.models import MODELS, RELATIVE_MODELS, on_host
from support.ops import COMPARISONS, NOT_OPS, keeping

import tinyllm
from tinyllm import Tensor, manual_seed, nn, no_grad, optim
from tinyllm import functional as F
from tinyllm.backend.cuda import launch
from tinyllm.functional import attention, composed, cuda, cuda_losses
from tinyllm.tensor_ops import ArrayAlgebra

TARGETS = np.array([[0, 3, 1], [2, -100, 3]])
WEIGHTS = np.array([[1.0, 0.5, 2.0], [0.0, 3.0, 0.25]])
SOME = np.array([[[True, False, True, True, False]]])


def stay(array):
    """A ``put`` that leaves the array on the host."""
    return array


def world(put, dtype):
    """Leaves, constants and indices for the cases below. ``put`` moves an array to the device under test."""
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return Tensor(put(rng.standard_normal(shape).astype(dtype)), requires_grad=True)

    return SimpleNamespace(
        x=leaf(2, 3, 4), y=leaf(2, 3, 4), row=leaf(4), other_row=leaf(4), w=leaf(5, 4), b=leaf(5),
        square=leaf(4, 4),
        q=leaf(2, 2, 3, 4), shared_q=leaf(2, 6, 3, 4), k=leaf(2, 2, 5, 4), v=leaf(2, 2, 5, 6),
        constant=Tensor(put(rng.standard_normal(4).astype(dtype))),
        array=put(rng.standard_normal((2, 3, 4)).astype(dtype)),
        integers=put(np.arange(4)),
        ids=put(np.array([[1, 4, 1], [0, 0, 4]])),
        targets=put(TARGETS),
        condition=put(rng.random((2, 3, 4)) > 0.5),
        mask=put(SOME),
        bias=put(rng.standard_normal((2, 1, 3, 5)).astype(dtype)),
        cos=put(np.cos(rng.standard_normal((3, 2))).astype(dtype)),
        sin=put(np.sin(rng.standard_normal((2, 1, 3, 2))).astype(dtype)),
    )  # fmt: skip


# The first word is the op's name. test_every_op_has_a_case checks that none is missing.
CASES = {
    "__add__": lambda t: t.x + t.row,
    "__add__ number": lambda t: t.x + 1,
    "__add__ numpy number": lambda t: t.x + np.float64(1),
    "__add__ array": lambda t: t.x + t.array,
    "__add__ integers": lambda t: t.x + t.integers,
    "__add__ list": lambda t: t.x + [1, 2, 3, 4],  # noqa: RUF005  (a Tensor, not a list)
    "__add__ constant": lambda t: t.x + t.constant,
    "__radd__": lambda t: 1 + t.x,
    "__neg__": lambda t: -t.x,
    "__sub__": lambda t: t.row - t.x,
    "__sub__ number": lambda t: t.x - 2.5,
    "__rsub__": lambda t: 2.5 - t.x,
    "__mul__": lambda t: t.x * t.row,
    "__mul__ itself": lambda t: t.x * t.x,
    "__rmul__": lambda t: 3 * t.x,
    "__truediv__": lambda t: t.x / (t.row * t.row + 1),
    "__truediv__ number": lambda t: t.x / 3,
    "__rtruediv__": lambda t: 3 / (t.x * t.x + 1),
    "__pow__": lambda t: t.x**3,
    "__pow__ numpy number": lambda t: (t.x * t.x + 1) ** np.float64(-0.5),
    "__pow__ zero": lambda t: t.x**0,
    "__pow__ tensor": lambda t: (t.x * t.x + 1) ** t.row,
    "__rpow__": lambda t: 2.0**t.x,
    "__rpow__ array": lambda t: (t.array * t.array) ** t.row,
    **{
        f"__{op.__name__}__": lambda t, compare=op: tinyllm.where(
            compare(t.x, t.row), t.x, compare(t.x, 0.5) * t.y
        )
        for op in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
    },
    "__matmul__": lambda t: t.x @ t.square,
    "__matmul__ batches": lambda t: t.q @ t.k.swapaxes(-1, -2),
    "__matmul__ broadcast": lambda t: t.q @ t.k[0, 0].swapaxes(0, 1) @ t.v,
    "__matmul__ vectors": lambda t: (t.row @ t.other_row) + (t.w @ t.row).sum() + (t.row @ t.square).sum(),
    "__rmatmul__": lambda t: t.array @ t.square,
    "__getitem__": lambda t: t.x[0],
    "__getitem__ slices": lambda t: t.x[:, 1:, ::2] + t.x[:, :-1, 1::2],
    "__getitem__ ellipsis": lambda t: t.x[..., None, -1],
    "__getitem__ rows": lambda t: t.w[t.ids],
    "__getitem__ rows of a transposed": lambda t: t.w.transpose()[t.integers],
    "__getitem__ pairs": lambda t: t.square[t.integers, t.integers],
    "__getitem__ mixed": lambda t: t.x[:, :, t.integers[:2]],
    "__getitem__ tensor": lambda t: t.w[Tensor(t.ids)] + t.x[:, Tensor(t.integers[:1])],
    "__getitem__ mask": lambda t: t.x[t.condition],
    "exp": lambda t: t.x.exp(),
    "log": lambda t: (t.x * t.x + 1).log(),
    "tanh": lambda t: t.x.tanh(),
    "sqrt": lambda t: (t.x * t.x + 1).sqrt(),
    "sum": lambda t: t.x.sum(),
    "sum axis": lambda t: t.x.sum(axis=1),
    "sum axes": lambda t: t.x.sum(axis=(0, -1), keepdims=True),
    "mean": lambda t: t.x.mean(),
    "mean axis": lambda t: t.x.mean(axis=-1, keepdims=True),
    "max": lambda t: t.x.max(),
    "max axis": lambda t: t.x.max(axis=1),
    "var": lambda t: t.x.var(),
    "var axis": lambda t: t.x.var(axis=-1, ddof=1, keepdims=True),
    "reshape": lambda t: t.x.reshape(6, -1) + t.x.reshape((6, 4)),
    "reshape transposed": lambda t: t.x.swapaxes(0, 2).reshape(24),
    "transpose": lambda t: t.x.transpose(2, 0, 1),
    "transpose all": lambda t: t.x.transpose(),
    "swapaxes": lambda t: t.x.swapaxes(0, -1),
    "rearrange": lambda t: t.x.rearrange("b t (h d) -> b h t d", h=2),
    "rearrange back": lambda t: t.q.rearrange("b h t d -> b t (h d)"),
    "astype": lambda t: t.x.astype(np.float32) * 2,
    "concatenate": lambda t: tinyllm.concatenate([t.x, t.y, t.x], axis=-1),
    "stack": lambda t: tinyllm.stack([t.x, t.y], axis=1),
    "split": lambda t: sum(part * (i + 1) for i, part in enumerate(tinyllm.split(t.x, 2, axis=-1))),
    "split sizes": lambda t: tinyllm.split(t.x, [1, 0, 3], axis=-1)[2],
    "chunk": lambda t: tinyllm.chunk(t.x, 3, axis=-1)[0],
    "where": lambda t: tinyllm.where(t.condition, t.x, t.row),
    "where number": lambda t: tinyllm.where(t.condition, 2.0, t.x) + tinyllm.where(t.condition, t.x, -1),
    "einsum": lambda t: tinyllm.einsum("bhtd,bhsd->bhts", t.q, t.k),
    "einsum ellipsis": lambda t: tinyllm.einsum("...td,...sd", t.q, t.k),
    "einsum diagonal": lambda t: tinyllm.einsum("ii,i->i", t.square, t.row),
    "einsum sums": lambda t: tinyllm.einsum("btc,d->b", t.x, t.row),
    "F.linear": lambda t: F.linear(t.x, t.w, t.b),
    "F.linear without bias": lambda t: F.linear(t.row, t.w),
    "F.embedding": lambda t: F.embedding(t.ids, t.w),
    "F.layer_norm": lambda t: F.layer_norm(t.x, (4,), t.row, t.other_row),
    "F.layer_norm plain": lambda t: F.layer_norm(t.x, 4),
    "F.rms_norm": lambda t: F.rms_norm(t.x, (4,), t.row, 1e-5),
    "F.layer_norm two axes": lambda t: F.layer_norm(t.x, (3, 4), t.x[0], t.y[1]),
    "F.rms_norm two axes": lambda t: F.rms_norm(t.x, (3, 4), t.y[0]),
    "F.rms_norm plain": lambda t: F.rms_norm(t.x, 4),
    "F.silu": lambda t: F.silu(300 * t.x),
    "F.swiglu": lambda t: F.swiglu(t.x, t.y),
    "F.swiglu of one product": lambda t: F.swiglu(*tinyllm.split(t.x, 2, axis=-1)),
    "F.geglu": lambda t: F.geglu(t.x, t.y),
    "F.geglu of one product": lambda t: F.geglu(*tinyllm.split(t.x, 2, axis=-1)),
    "F.softcap": lambda t: F.softcap(30 * t.x, 5.0),
    "F.rms_norm with an offset": lambda t: F.rms_norm(t.x, (4,), t.row, 1e-5, 1.0),
    "F.rope": lambda t: F.rope(t.q, t.cos, t.cos * 2),
    "F.rope of rows": lambda t: F.rope(t.q, t.sin, t.sin * 2),
    "F.gelu tanh": lambda t: F.gelu(30 * t.x, "tanh"),
    "F.gelu erf": lambda t: F.gelu(t.x),
    "F.linear columns": lambda t: F.linear(t.x.swapaxes(0, 2).swapaxes(0, 1), t.w[:, ::2], t.w[:, 1]),
    "F.layer_norm columns": lambda t: F.layer_norm(t.x, 4, t.square[:, 0], t.square[:, 1]),
    "F.rms_norm columns": lambda t: F.rms_norm(t.x.swapaxes(0, 1), 4, t.square[:, 0]),
    "F.linear_cross_entropy columns": lambda t: F.linear_cross_entropy(
        t.x, t.w, t.targets, linear_bias=t.w[:, 0]
    ),
    "F.gelu transposed": lambda t: F.gelu(t.x.transpose(), "tanh"),
    "F.softmax": lambda t: F.softmax(t.x),
    "F.softmax middle": lambda t: F.softmax(t.x, dim=1),
    "F.dropout": lambda t: F.dropout(t.x, 0.3),
    "F.scaled_dot_product_attention": lambda t: F.scaled_dot_product_attention(t.q, t.k, t.v),
    "F.scaled_dot_product_attention causal": lambda t: F.scaled_dot_product_attention(
        t.q, t.k, t.v, is_causal=True, scale=0.3
    ),
    "F.scaled_dot_product_attention more queries": lambda t: F.scaled_dot_product_attention(
        t.k, t.q, t.q, is_causal=True
    ),
    "F.scaled_dot_product_attention mask": lambda t: F.scaled_dot_product_attention(t.q, t.k, t.v, t.mask),
    "F.scaled_dot_product_attention bias": lambda t: F.scaled_dot_product_attention(t.q, t.k, t.v, t.bias),
    "F.scaled_dot_product_attention -1e9": lambda t: F.scaled_dot_product_attention(
        t.q, t.k, t.v, t.bias * 0 - 1e9
    ),
    "F.scaled_dot_product_attention dropout": lambda t: F.scaled_dot_product_attention(
        t.q, t.k, t.v, dropout_p=0.4, is_causal=True
    ),
    "F.scaled_dot_product_attention shared heads": lambda t: F.scaled_dot_product_attention(
        t.shared_q, t.k, t.v, t.bias, dropout_p=0.4, is_causal=True, enable_gqa=True
    ),
    "F.scaled_dot_product_attention one head": lambda t: F.scaled_dot_product_attention(
        t.x, t.y, t.y, is_causal=True
    ),
    "F.scaled_dot_product_attention learned bias": lambda t: F.scaled_dot_product_attention(
        t.q, t.k, t.v, t.x[:, None, :, :1] * t.row[:1] + t.bias, dropout_p=0.4, is_causal=True
    ),
    "F.scaled_dot_product_attention window": lambda t: F.scaled_dot_product_attention(
        t.q, t.k, t.v, dropout_p=0.4, is_causal=True, window=2
    ),
    "F.scaled_dot_product_attention window of more queries": lambda t: F.scaled_dot_product_attention(
        t.k, t.q, t.q, t.k[..., :3].data, is_causal=True, window=2, softcap=0.8
    ),
    "F.scaled_dot_product_attention softcap": lambda t: F.scaled_dot_product_attention(
        t.shared_q, t.k, t.v, t.mask, enable_gqa=True, softcap=np.float64(0.8)
    ),
    "F.scaled_dot_product_attention learned bias, softcap": lambda t: F.scaled_dot_product_attention(
        t.q, t.k, t.v, t.x[:, None, :, :1] * t.row[:1] + t.bias, is_causal=True, window=2, softcap=0.8
    ),
    "F.cross_entropy": lambda t: F.cross_entropy(t.x, t.targets),
    "F.cross_entropy host targets": lambda t: F.cross_entropy(t.x, TARGETS),
    "F.cross_entropy weights": lambda t: F.cross_entropy(t.x, t.targets, weights=WEIGHTS),
    "F.linear_cross_entropy weights": lambda t: F.linear_cross_entropy(t.x, t.w, TARGETS, weights=WEIGHTS),
    "F.cross_entropy num_targets": lambda t: F.cross_entropy(t.x, t.targets, num_targets=17),
    "F.cross_entropy options": lambda t: F.cross_entropy(
        t.x, t.targets, weight=t.array[0, 0] ** 2, reduction="none", label_smoothing=0.1, weights=WEIGHTS
    ),
    "F.cross_entropy smoothing": lambda t: F.cross_entropy(t.x, t.targets, label_smoothing=0.1),
    "F.linear_cross_entropy options": lambda t: F.linear_cross_entropy(
        t.x, t.w, TARGETS, linear_bias=t.b, weight=t.array[:, :, 0].reshape(6)[:5] ** 2, label_smoothing=0.1
    ),
    "F.linear_cross_entropy sum": lambda t: F.linear_cross_entropy(t.x, t.w, t.targets, reduction="sum"),
    "F.linear_cross_entropy": lambda t: F.linear_cross_entropy(t.x, t.w, t.targets, linear_bias=t.b),
    "F.linear_cross_entropy host targets": lambda t: F.linear_cross_entropy(t.x, t.w, TARGETS),
    "F.linear_cross_entropy num_targets": lambda t: F.linear_cross_entropy(
        t.x, t.w, t.targets, num_targets=17
    ),
    "F.linear_cross_entropy with a softcap": lambda t: F.linear_cross_entropy(
        t.x, t.w, TARGETS, linear_bias=t.b, weights=WEIGHTS, softcap=0.8
    ),
    "composed.linear": lambda t: composed.linear(t.x, t.w, t.b),
    "composed.embedding": lambda t: composed.embedding(t.ids, t.w),
    "composed.layer_norm": lambda t: composed.layer_norm(t.x, 4, t.row, t.other_row),
    "composed.rms_norm": lambda t: composed.rms_norm(t.x, 4, t.row),
    "composed.silu": lambda t: composed.silu(t.x),
    "composed.swiglu": lambda t: composed.swiglu(t.x, t.y),
    "composed.geglu": lambda t: composed.geglu(t.x, t.y),
    "composed.softcap": lambda t: composed.softcap(t.x, 0.5),
    "composed.repeat_heads": lambda t: composed.repeat_heads(t.k, 6),
    "composed.rope": lambda t: composed.rope(t.q, t.cos, t.cos * 2),
    "composed.gelu": lambda t: composed.gelu(t.x),
    "composed.softmax": lambda t: composed.softmax(t.x, dim=1),
    "composed.dropout": lambda t: composed.dropout(t.x, 0.3),
    "composed.attention_weights": lambda t: composed.attention_weights(t.q, t.k, t.mask, is_causal=False),
    "composed.scaled_dot_product_attention": lambda t: composed.scaled_dot_product_attention(
        t.q, t.k, t.v, t.bias, is_causal=True
    ),
    "composed.scaled_dot_product_attention shared heads": lambda t: composed.scaled_dot_product_attention(
        t.shared_q, t.k, t.v, is_causal=True, enable_gqa=True
    ),
    "composed.scaled_dot_product_attention window": lambda t: composed.scaled_dot_product_attention(
        t.q, t.k, t.v, t.bias, is_causal=True, window=2, softcap=0.8
    ),
    "composed.cross_entropy": lambda t: composed.cross_entropy(t.x, t.targets),
    "composed.linear_cross_entropy": lambda t: composed.linear_cross_entropy(
        t.x, t.w, t.targets, linear_bias=t.b
    ),
}


def on_leaves(op):
    """A case that calls the op with leaves of one shape, so that a new op needs no line above."""
    required = [p for p in inspect.signature(op).parameters.values() if p.default is p.empty]
    return lambda t: op(*[t.x, t.y, t.x][: len(required)])


LISTED = {name.partition(" ")[0] for name in CASES}
for module, prefix in ((F, "F"), (composed, "composed")):
    new = [name for name in F.__all__ if f"{prefix}.{name}" not in LISTED and hasattr(module, name)]
    CASES |= {f"{prefix}.{name}": on_leaves(getattr(module, name)) for name in new}


def run(case, put, dtype):
    """The op's result and the gradients of all leaves on the host, accumulated over two backward passes."""
    t = world(put, dtype)
    for repeat in range(2):
        manual_seed(4)
        y = case(t)
        if y.requires_grad:
            upstream = np.random.default_rng(repeat).standard_normal(y.shape).astype(y.dtype)
            y.backward(put(upstream))
        assert isinstance(y.data, type(t.x.data))
    leaves = {
        name: value for name, value in vars(t).items() if isinstance(value, Tensor) and value.requires_grad
    }
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert all(isinstance(grad, type(t.x.data)) for grad in grads.values())
    return on_host(y.data), {name: on_host(grad) for name, grad in grads.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_op_on_the_device_equals_numpy(case, dtype, put):
    expected, expected_grads = run(case, stay, dtype)
    result, grads = run(case, put, dtype)
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert np.allclose(result, expected, rtol=tolerance, atol=tolerance)
    assert grads.keys() == expected_grads.keys() and grads
    for name, grad in grads.items():
        assert grad.dtype == dtype and grad.shape == expected_grads[name].shape, name
        assert np.allclose(grad, expected_grads[name], rtol=tolerance, atol=tolerance), name


def test_every_op_has_a_case():
    members = vars(ArrayAlgebra) | vars(Tensor)
    methods = {name for name, value in members.items() if inspect.isfunction(value)}
    methods -= NOT_OPS - COMPARISONS
    functions = {"concatenate", "stack", "split", "chunk", "where", "einsum"}
    assert functions == {
        name
        for name in tinyllm.__all__
        if getattr(getattr(tinyllm, name), "__module__", "").startswith("tinyllm.tensor_")
    }
    expected = methods | functions | {f"F.{name}" for name in F.__all__}
    expected |= {
        f"composed.{name}"
        for name, f in vars(composed).items()
        if inspect.isfunction(f) and f.__module__ == composed.__name__
    }
    assert {name.partition(" ")[0] for name in CASES} == expected


def test_tensor_on_the_device(put):
    x = Tensor(put(np.array([1.0, 2.0])), requires_grad=True)
    loss = (x * x).sum()
    loss.backward()  # the initial gradient is created on the device
    assert loss.item() == 5.0 and isinstance(x.grad, type(x.data))
    assert np.array_equal(x.grad.get(), [2.0, 4.0])
    assert x.detach().data is x.data
    assert "[1., 2.]" in repr(x) and f"{loss:.1f} {float(loss)} {int(loss)} {bool(loss)}" == "5.0 5.0 5 True"


def test_gradients_on_the_device_have_one_owner(put):
    a, b = (Tensor(put(np.ones((2, 3))), requires_grad=True) for _ in range(2))
    seed = put(np.ones((2, 3)))
    (a + b).backward(seed)
    a.grad *= 0.0
    assert b.grad.get().all() and seed.get().all()
    (a + b.transpose().transpose()).backward(seed)
    b.grad *= 0.0
    assert a.grad.get().all() and seed.get().all()
    assert a.grad.flags.c_contiguous and b.grad.flags.c_contiguous


# -------------------------------------------------------------------------------------- models


def build(name, put, dropout=0.0):
    """The model in float64 with perturbed parameters on the device under test."""
    rng = np.random.default_rng(1)
    model = (MODELS | RELATIVE_MODELS)[name](dropout).astype(np.float64)
    for parameter in model.parameters():
        moved = parameter.data + 0.3 * rng.standard_normal(parameter.shape)
        parameter.replace(put(moved))
    return model


def train(name, put, dropout, steps=2, length=20, kind=optim.AdamW):
    """The losses and gradient norms of training steps, and the final parameters."""
    model = build(name, put, dropout)
    optimizer = kind(model, lr=1e-2, weight_decay=0.1)
    rng = np.random.default_rng(1)
    numbers = []
    for step in range(steps):
        tokens = rng.integers(0, 23, (2, length + 1))
        targets = np.where(rng.random((2, length)) < 0.1, -100, tokens[:, 1:])
        manual_seed(0, step)
        loss = model.loss(tokens[:, :-1], targets)  # ids are on the host, where they are checked
        loss.backward()
        norm = optim.clip_grad_norm(model, 0.1)
        assert norm > 0.1  # above max_norm: clipping has an effect
        optimizer.step()
        optimizer.zero_grad()
        numbers += [loss.item(), norm]
    assert all(isinstance(parameter.data, type(put(np.zeros(1)))) for parameter in model.parameters())
    return numbers, {name: on_host(parameter.data) for name, parameter in model.named_parameters()}


every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that two texts of 70 tokens have several of every kind."""
    assert cuda.QUERY_BLOCK == attention.QUERY_BLOCK  # each block has a dropout mask of its own
    for module in (attention, cuda):
        monkeypatch.setattr(module, "QUERY_BLOCK", 64)
    monkeypatch.setattr(cuda, "SCORES", 2**14)  # blocks of queries without dropout
    monkeypatch.setattr(cuda_losses, "LOGITS", 2**12)
    monkeypatch.setattr(launch, "ROWS", 64)


@pytest.mark.parametrize("dropout, steps", [(0.0, 1), (0.2, 2)])
@every_model
def test_training_on_the_device_equals_numpy(name, dropout, steps, put, small_blocks):
    length = 70
    with keeping(everything=False):  # as on a GPU
        expected, expected_parameters = train(name, stay, dropout, steps, length)
    numbers, parameters = train(name, put, dropout, steps, length)
    # With NumPy's calls results are identical. Kernels sum in another order, and for the key bias, whose true
    # gradient is zero, AdamW divides the rounding errors by their own size.
    tolerance = 1e-12 if put == DeviceArray.of and DeviceArray not in launch.LIBRARIES else 1e-9
    assert numbers == pytest.approx(expected, rel=1e-12)
    for name, array in parameters.items():
        assert np.allclose(array, expected_parameters[name], rtol=tolerance, atol=tolerance), name


@every_model
def test_training_with_muon_on_the_device_equals_numpy(name, put):
    expected, expected_parameters = train(name, stay, 0.0, kind=optim.Muon)
    numbers, parameters = train(name, put, 0.0, kind=optim.Muon)
    assert numbers == pytest.approx(expected, rel=1e-12)
    for key, array in parameters.items():
        assert np.allclose(array, expected_parameters[key], rtol=1e-9, atol=1e-9), key


@pytest.mark.parametrize("name", RELATIVE_MODELS)
def test_a_step_of_a_relative_on_the_device_equals_numpy(name, put):
    """With a window, normalized heads and scaled cos and sin; in training mode, with dropout."""
    expected, expected_parameters = train(name, stay, 0.2, steps=1)
    numbers, parameters = train(name, put, 0.2, steps=1)
    assert numbers == pytest.approx(expected, rel=1e-12)
    for key, array in parameters.items():
        assert np.allclose(array, expected_parameters[key], rtol=1e-9, atol=1e-9), key


@pytest.mark.parametrize("name", [*MODELS, *RELATIVE_MODELS])
def test_logits_and_observations_on_the_device_equal_numpy(name, put):
    ids = np.random.default_rng(2).integers(0, 23, (2, 9))
    host, device = (build(name, where).eval() for where in (stay, put))
    names = []
    with no_grad(), nn.observe(lambda observation: names.append(observation.name)):
        logits = device(ids).data
        expected = host(ids).data
    assert isinstance(logits, type(put(ids))) and names[-1] == ""
    assert np.allclose(logits.get(), expected, rtol=1e-12, atol=1e-12)


@every_model
def test_model_on_the_device_is_converted_and_counted(name, put):
    model, kind = build(name, put), type(put(np.zeros(1)))
    assert model.num_parameters() == build(name, stay).num_parameters()
    model.astype(np.float32)
    ids = np.arange(23)[None]  # enough for every expert of a mixture
    loss = model.loss(ids, ids)
    loss.backward()
    assert loss.dtype == np.float32 and math.isfinite(loss.item())
    assert all(p.grad.dtype == np.float32 and isinstance(p.grad, kind) for p in model.parameters())
    assert all(isinstance(array, kind) for array in model.state_dict().values())

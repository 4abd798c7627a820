"""The strict device array: forbidden calls are refused, permitted calls equal NumPy, CuPy agrees.

Calls are given as text, one per line, so that a failing test is named after its call.
"""

import copy
import ctypes
import inspect
import math
import operator
import re

import einops
import ml_dtypes
import numpy as np
import pytest
from support.cupy_signatures import FUNCTIONS, METHODS, UFUNCS
from support.device_array import Device, DeviceArray

X = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)
Y = np.array([[1, 3, 2], [6, 5, 4]], dtype=np.float32)
I = np.array([2, 0, 1])

# Each line runs on NumPy arrays and on device arrays: x and y are X and Y, i is I.
PERMITTED = """
x + y, x - y, x * y, x / y, x // y, x % y, y**2, x @ y.T, -x, +x, abs(x)
2 + x, 2 - x, 2 * x, 2 / y, 7 // y, 7 % y, 2**x, i << 1, 16 >> i, ~i, i & 1, i | 4, i ^ 3
x == y, x != y, x < y, x <= 0.5, x > y, x >= 0, (x > 0) & (y > 2), ~(x > 0)
x * np.float32(2), x * np.float64(2), np.float64(2) * x, x * True, i * 2.0, x * 2, i / i.size
np.exp(x), np.log(y), np.sqrt(y), np.tanh(x), np.square(x), np.reciprocal(y), np.sign(x), np.abs(x)
np.maximum(x, 0), np.minimum(x, y), np.logical_and(x > 0, y > 2), np.isfinite(x), np.power(y, 0.5)
np.exp(x, dtype=np.float64), np.add(x, y, casting="same_kind"), np.matmul(x, y.T), np.multiply.outer(i, x)
np.exp(x, out=np.empty_like(x)), np.matmul(x, y.T, out=np.empty((2, 2), np.float32, like=x))
np.add.reduce(x), np.add.reduce(x, axis=1, keepdims=True), np.multiply.reduce(y, axis=-1)
np.sum(x), np.mean(x, axis=-1, keepdims=True), np.max(x, axis=0), np.amin(x), np.prod(y), np.std(x)
np.var(x, axis=-1, ddof=1), np.any(x > 0), np.all(x > 0, axis=1), np.count_nonzero(x > 0), np.sum(i)
np.argmin(y, axis=0, keepdims=True), np.linalg.norm(x), np.cumsum(x, axis=1), np.sum(x, dtype=np.float64)
x.sum(), x.sum(axis=(0, 1)), x.mean(-1), x.max(axis=1, keepdims=True), x.min(), x.var(), x.argmax(axis=-1)
np.zeros((2, 2), like=x), np.zeros(3, dtype=np.float32, like=x), np.arange(1, 7, 2, like=x)
np.zeros_like(x), np.ones_like(x, shape=(2, 2)), np.full_like(x, 7, dtype=np.int32)
np.asarray(I, like=x), np.array([1.0, 2.0], dtype=np.float32, like=x), np.asarray(2, like=x)
np.asarray(x, dtype=np.float64, like=x), np.ascontiguousarray(x.T, like=x), x.copy(), x.astype(int)
np.concatenate([x, y]), np.stack((x, y), axis=1), np.split(x, [1, 2], axis=1)[1], np.split(x, 3, axis=-1)[2]
x.T, x.reshape(3, -1), x.reshape((6,)), np.reshape(x, (3, 2)), x.ravel(), x.swapaxes(0, 1), x.squeeze()
x.transpose(1, 0), x.transpose(), np.transpose(x, (1, 0)), np.moveaxis(x, 0, 1), np.flip(x), x.view(np.int32)
np.expand_dims(x, (0, 2)), np.squeeze(x[None]), np.broadcast_to(x, (2, 2, 3)), np.tile(x, (2, 1))
np.repeat(x, 2, axis=0), np.roll(x, 1, axis=1), np.tril(x), np.triu(x, k=1), x.repeat([1, 2, 0], axis=1)
np.where(x > 0, x, 0.0), np.where(x > 0, x, y), np.clip(x, -1, None), x.clip(-1, 1)
np.take(y, i, axis=1), np.take_along_axis(y, np.argsort(y), axis=-1), y.take(i), x.round(1)
np.sort(y), np.argsort(y, axis=0), np.partition(y, 1)[:, 1], np.searchsorted(i * 2, i), np.bincount(i)
np.unique(i), np.unique(i, return_counts=True)[1], np.nonzero(x > 0)[1]
np.allclose(x, y), np.array_equal(x, x), np.isclose(x, y), np.nan_to_num(x), np.round(x, 1)
x[0], x[0, 1], x[..., None], x[:, ::2], x[-1, None], x[:, i], x[x > 0], x[np.int64(1)], x[i[1]], x[...]
np.dot(x, y.T), np.tensordot(x, y, axes=([1], [1])), np.outer(i, i), x.dot(y.T)
np.einsum("ij,kj->ik", x, y), np.einsum("ij,kj->", x, y, optimize=True)
einops.rearrange(x, "a b -> b a 1"), einops.rearrange([x, y], "n a b -> a (n b)")
[einops.reduce(x, "a b -> a", op) for op in ("sum", "mean", "max", "min", "prod")]
einops.repeat(x, "a b -> a n b", n=2), einops.einsum(x, y, "a c, b c -> a b"), einops.pack([x, y], "* c")[0]
""".strip().splitlines()

# Calls that CuPy's interface refuses: test_cupy_refuses_the_same_calls runs them on a real CuPy array.
NOT_IN_CUPY = """
np.block([x, x])
np.einsum_path("ij,ij", x, x)
np.insert(x, 0, 1.0)
np.ones((2, 2), like=x)
np.full((2, 2), 1.0, like=x)
np.eye(2, like=x)
np.zeros_like(x, device="cpu")
np.sum(x, where=True)
np.sum(x, initial=0.0)
np.sum(x, 0, None, None, False, 0.0)
np.max(x, initial=0.0)
x.max(initial=0.0)
x.mean(where=True)
np.var(x, mean=x)
np.exp(x, where=True)
np.exp(x, order="C")
np.add.reduce(x, where=True)
np.add.reduce(x, initial=1.0)
np.maximum.reduce(x)
np.maximum.accumulate(x)
np.multiply.at(x, 0, 2.0)
np.clip(x, min=0)
np.clip(x, 0)
np.reshape(x, shape=(3, 2))
np.take(x, x, mode="clip")
np.take_along_axis(x, x)
np.argsort(x, stable=True)
np.broadcast_to(x, (2, 2, 3), subok=True)
x.astype(np.int32, casting="unsafe")
np.asarray(x)
np.asarray(x[0, 0])
np.array(x)
np.array([x, x])
np.ascontiguousarray(x)
np.float64(x)
np.random.default_rng(0).permutation(x)
X[x]
operator.setitem(X.copy(), 0, x)
""".strip().splitlines()

# Calls for which CuPy copies between host and device implicitly, and calls that only a GPU could check.
HIDDEN_COPIES = """
bool(x)
bool(x[0, 0])
bool((x == x).all())
int(x[0, 0])
float(x[0, 0])
complex(x[0, 0])
math.sqrt(x[0, 0])
range(x[0, 0].astype(int))
x[: x[0, 0].astype(int)]
x.reshape(x[0, 0].astype(int), -1)
np.zeros((x[0, 0].astype(int), 2), like=x)
np.sum(x, axis=x[0, 0].astype(int))
np.repeat(x, x[0].astype(int), axis=1)
list(x)
max(x.reshape(-1))
1.0 in x
np.vecdot(x, x)
np.einsum("ij->i", x, casting="safe")
operator.imatmul(x, x.T)
x + X
X + x
operator.iadd(x, X)
operator.iadd(X.copy(), x)
x * np.array(2.0)
x == np.array(2.0)
x + [1.0, 2.0, 3.0]
x == None
X @ x.T
np.exp(x, out=X.copy())
np.exp(X, out=x)
np.sum(x, axis=0, out=X[0].copy())
np.concatenate([x, X])
np.where(X > 0, x, 0.0)
np.where(x > 0, x, [1.0, 2.0, 3.0])
np.einsum("ij,ij->", x, X)
np.full_like(x, np.array(1.0))
np.copyto(x, X)
x.fill(np.array(1.0))
operator.setitem(x, slice(None), X)
operator.setitem(x, 0, [1.0, 2.0, 3.0])
operator.setitem(x, X > 0, 0.0)
x[X > 0]
x[:, I]
x[:, [0, 1]]
np.take(x, I, axis=1)
np.take(x, [0, 1], axis=1)
x.take([0, 1])
np.add.at(x, I, 1.0)
np.add.at(x > 0, x > 0, True)
np.asarray([x, X], like=x)
DeviceArray.of(x)
""".strip().splitlines()


NAMES = {"np": np, "math": math, "operator": operator, "einops": einops, "DeviceArray": DeviceArray}


def run(call, **arrays):
    return eval(call, {**NAMES, "X": X, "I": I, **arrays})


def on_device():
    return {"x": DeviceArray.of(X), "y": DeviceArray.of(Y), "i": DeviceArray.of(I)}


@pytest.mark.parametrize("calls", PERMITTED)
def test_permitted_calls_equal_numpy(calls):
    want, got = run(calls, x=X, y=Y, i=I), run(calls, **on_device())
    assert len(got) == len(want)
    for device, host in zip(got, want):
        assert type(device) is DeviceArray
        assert device.dtype == np.asarray(host).dtype
        np.testing.assert_array_equal(device.get(), host, strict=np.ndim(host) > 0)


@pytest.mark.parametrize("call", NOT_IN_CUPY + HIDDEN_COPIES)
def test_forbidden_calls_are_refused(call):
    with pytest.raises(TypeError):
        run(call, **on_device())


@pytest.mark.parametrize("name", ["tobytes", "tofile", "resize", "put", "ctypes", "__array_interface__"])
def test_unlisted_attributes_are_missing(name):
    assert not hasattr(DeviceArray.of(X), name)


def test_refusal_names_the_function_and_the_argument():
    x = DeviceArray.of(X)
    with pytest.raises(TypeError, match=r"numpy\.block is not on the list"):
        np.block([x, x])
    with pytest.raises(TypeError, match=r"sum does not take this call: .*'where'"):
        np.sum(x, where=True)
    with pytest.raises(TypeError, match=r"maximum\.reduce is not on the list"):
        np.maximum.reduce(x)


def test_of_and_get_copy():
    source = X.copy()
    x = DeviceArray.of(source)
    source[:] = 0
    x.get()[:] = 0
    np.testing.assert_array_equal(x.get(), X)
    np.asarray(source, like=x)[...] = 1.0
    assert not source.any()


def test_plain_attributes_equal_numpy():
    x = DeviceArray.of(X).T
    for name in ("shape", "dtype", "ndim", "size", "nbytes", "itemsize", "strides"):
        assert getattr(x, name) == getattr(X.T, name)
    assert (len(x), np.ndim(x), np.shape(x)) == (3, 2, (3, 2))
    assert np.result_type(x, 1.0) == np.float32
    assert x.flags == (False, True, False) and x.flags.f_contiguous
    assert not hasattr(x.flags, "writeable")
    assert type(x[0, 0].item()) is float and x[0, 0].item() == -2.0
    with pytest.raises(ValueError):
        x.item()
    with pytest.raises(AttributeError):
        x.shape = (6,)


def test_views_have_a_base_and_write_through():
    x = DeviceArray.of(X)
    assert x.base is None and (x * 2).base is None and x.copy().base is None and x.flags.owndata
    for view in (x[0], x[0, 1], x[:, 1:], x.T, x.reshape(-1), x.view(), np.split(x, 3, axis=1)[0]):
        assert view.base is x and not view.flags.owndata
        assert np.shares_memory(view, x) is True
    x[0, 1].fill(7)
    x.T[2] += 1
    x.reshape(-1)[3:5] = DeviceArray.of([8, 9])
    np.testing.assert_array_equal(x.get(), [[-2, 7, X[0, 2] + 1], [8, 9, 3]])


def test_assignment_equals_numpy():
    x, mask = DeviceArray.of(X), DeviceArray.of(X > 0)
    x[mask] = 0
    x[:, DeviceArray.of([0, 2])] = np.float64(5)
    x[1] = DeviceArray.of([1, 2, 3])
    x[0, 1] = x[1, 2]
    np.testing.assert_array_equal(x.get(), [[5, 3, 5], [1, 2, 3]])
    np.add.at(x, (DeviceArray.of([0, 0, 1])), 1.0)
    np.testing.assert_array_equal(x.get(), [[7, 5, 7], [2, 3, 4]])


def test_in_place_operators_modify_the_array():
    x = same = DeviceArray.of(Y)
    x += 1
    x -= DeviceArray.of(X)
    x *= 2.0
    x /= x + 1
    want = (Y + 1 - X) * 2
    assert x is same
    np.testing.assert_array_equal(x.get(), want / (want + 1))
    with pytest.raises(TypeError):
        x += 1j


def test_out_is_returned():
    x, out = DeviceArray.of(X), DeviceArray.of(Y)
    assert np.exp(x, out=out) is out and np.multiply(x, 2, out) is out
    assert np.sum(x, axis=0, out=out[0]).base is not None
    assert np.concatenate([x[:1], x[:1]], out=out) is out
    assert x.astype(np.float32, copy=False) is x and np.asarray(x, like=x) is x
    np.testing.assert_array_equal(out.get(), X[[0, 0]])


def test_operator_defers_to_types_without_ufunc_support():
    class Tensor:
        __array_ufunc__ = None

        def __rmul__(self, other):
            return "reflected"

    assert DeviceArray.of(X) * Tensor() == "reflected"


def test_copy_module_and_repr():
    x = DeviceArray.of(I)
    twin = copy.deepcopy(x)
    twin[0] = 9
    assert repr(x) == "DeviceArray(array([2, 0, 1]))" and repr(twin) == "DeviceArray(array([9, 0, 1]))"


def test_arrays_are_on_a_device():
    x, there = DeviceArray.of(X), DeviceArray.of(X, Device(1))
    assert repr(x.device) == "<CUDA Device 0>" and there.device.id == 1
    with Device(2):
        assert DeviceArray.of(X).device == Device() == Device(2)
    assert Device() == Device(0) != Device(1)
    made = [there + 1, there.T, there[0], there[0, 1], np.exp(there), there.sum(), np.zeros(2, like=there)]
    made += [
        np.split(there, 3, axis=1)[2],
        np.allclose(there, there),
        there.copy(),
    ]
    made += [there.T.base, np.exp(there, out=there[:1].copy() + there), copy.deepcopy(there), 2 * there]
    assert [array.device.id for array in made] == [1] * len(made)
    for source in (X, x, there):  # CuPy creates arrays on the current GPU, not that of ``like``
        assert np.asarray(source, like=there).device.id == 0
        with there.device:
            assert np.asarray(source, like=x).device.id == 1
    assert np.asarray(x, like=there) is x


MIXED = """
x + y
x.dot(y.T)
np.where(x > 0, x, y)
np.exp(x, out=y)
np.concatenate([x, y])
x[y > 0]
operator.setitem(x, 0, y[0])
operator.setitem(x, y > 0, 0)
operator.iadd(x, y)
""".strip().splitlines()


@pytest.mark.parametrize("call", MIXED)
def test_mixing_devices_is_refused(call):
    x, y = DeviceArray.of(X), DeviceArray.of(Y, Device(1))
    with pytest.raises(TypeError, match=r"<CUDA Device \d> and on <CUDA Device \d>"):
        run(call, x=x, y=y)
    np.testing.assert_array_equal(x.get(), X)


def test_data_is_the_address_of_the_first_element():
    x = DeviceArray.of(X)
    assert (x[1].data.ptr - x.data.ptr, x[:, ::-1].data.ptr - x.data.ptr) == (12, 8)
    assert (
        np.frombuffer((ctypes.c_float * 6).from_address(x.data.ptr), np.float32).tolist()
        == X.ravel().tolist()
    )


SHORT = np.arange(-4, 4).reshape(2, 4).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    "call, dtype",
    [
        ("x + x", "bfloat16"), ("x * 2", "bfloat16"), ("-x", "bfloat16"), ("np.exp(x)", "bfloat16"),
        ("x * 2.0", "float32"), ("x + np.float32(1)", "float32"), ("x + x.astype(np.float32)", "float32"),
        ("x > 0", "bool"), ("x.astype(np.float64)", "float64"), ("np.maximum(x, x * 2)", "bfloat16"),
        ("x.max(axis=1)", "bfloat16"), ("np.sum(x, axis=0)", "bfloat16"), ("x.mean()", "bfloat16"),
        ("np.add.reduce(x)", "bfloat16"), ("x.sum(-1, dtype=np.float32)", "float32"), ("x.T", "bfloat16"),
        ("x @ x.T", "bfloat16"), ("x[0] @ x[1]", "bfloat16"),
        ("np.matmul(x, x.T, dtype=np.float32)", "float32"),
        ("np.where(x > 0, x, 0.0)", "float32"), ("np.where(x > 0, x, x)", "float32"),
        ("np.matmul(x, x.T, out=x[:, :2])", "bfloat16"), ("np.sum(x, axis=1, out=x[:, 0])", "bfloat16"),
    ],
)  # fmt: skip
def test_bfloat16_results_have_cupys_dtype(call, dtype):
    """The dtype is tested: except for exp the numbers are small integers, exact in bfloat16."""
    result = run(call, x=DeviceArray.of(SHORT))
    assert type(result) is DeviceArray and result.dtype.name == dtype
    want = run(call, x=SHORT.astype(np.float64))
    np.testing.assert_allclose(result.get().astype(np.float64), want, rtol=2**-8 if "exp" in call else 0)


def test_bfloat16_accumulates_in_float32():
    ones = DeviceArray.of(np.ones(1024, ml_dtypes.bfloat16))
    sums = [ones.sum(), np.sum(ones), np.add.reduce(ones), ones @ ones, ones.sum(dtype=ones.dtype)]
    assert [s.item() for s in sums] == [1024] * 5
    with pytest.raises(TypeError, match="no batched product"):
        ones.reshape(4, 16, 16) @ ones.reshape(4, 16, 16)
    with pytest.raises(TypeError, match="by name"):
        ones.sum(None, np.float32)


def test_erf_of_scipy_is_dispatched():
    special = pytest.importorskip("scipy.special")
    x = special.erf(DeviceArray.of(X))
    assert type(x) is DeviceArray
    np.testing.assert_array_equal(x.get(), special.erf(X))


def parameters(signature):
    """All but `blocking`, which NumPy cannot pass, and `subok`, which must be None in CuPy."""
    return [p for p in signature.parameters.values() if p.name not in ("subok", "blocking")]


def positional(signature):
    return [p for p in parameters(signature) if p.kind is not p.KEYWORD_ONLY]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_positional_arguments_mean_the_same_in_numpy(name):
    """Calls are checked with CuPy's signature and run by NumPy, so positional arguments must agree."""
    try:
        numpys = positional(inspect.signature(operator.attrgetter(name)(np)))
    except ValueError:
        pytest.skip("this NumPy does not tell the signature")
    for ours, theirs in zip(positional(FUNCTIONS[name]), numpys):
        assert (
            ours.name == theirs.name or ours.default is ours.empty
        )  # required parameters may have different names


@pytest.fixture(scope="module")
def cupy():
    return pytest.importorskip("cupy", reason="CuPy is not installed")


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_have_cupys_signatures(cupy, name):
    function = operator.attrgetter(name)(cupy)
    if name == "einsum":
        assert function.__doc__.startswith("einsum(subscripts, *operands, dtype=None, optimize=False)")
        return
    ours, theirs = FUNCTIONS[name], inspect.signature(function)
    assert {p.name: p.default for p in parameters(ours)} == {p.name: p.default for p in parameters(theirs)}
    assert [p.name for p in positional(ours)] == [p.name for p in positional(theirs)][: len(positional(ours))]


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"ndim", "shape"}))
def test_methods_have_cupys_signatures(cupy, name):
    method = getattr(cupy.ndarray, name)
    if name == "view":
        names = list(inspect.signature(method).parameters)
    else:  # compiled: the docstring starts with the signature, "ndarray.sum(self, axis=None, ...) -> ..."
        text = re.search(r"\((.*)\)", method.__doc__.splitlines()[0])[1]
        names = [re.search(r"\w+(?==|$)", part.strip())[0] for part in text.split(",")]
    not_taken = {"astype": {"casting", "subok"}, "view": {"type"}}.get(name, set())
    ours = [p.name for p in METHODS[name].parameters.values()][1:]
    assert set(ours) == set(names[1:]) - not_taken
    positionally = [p.name for p in positional(METHODS[name])][1:]
    assert positionally == names[1 : len(positionally) + 1]


@pytest.mark.parametrize("name", sorted(set(UFUNCS) - {"erf"}))  # cupyx.scipy.special needs a driver
def test_ufuncs_are_cupys(cupy, name):
    ufunc, _, method = name.partition(".")
    assert type(getattr(cupy, ufunc)).__name__ == ("_GUFunc" if name == "matmul" else "ufunc")
    if method in ("reduce", "at"):
        names = re.search(r"\((.*)\)", getattr(getattr(cupy, ufunc), method).__doc__.splitlines()[0])[1]
        assert names.replace("self, ", "") == str(UFUNCS[name])[1:-1]


@pytest.mark.parametrize("call", NOT_IN_CUPY)
def test_cupy_refuses_the_same_calls(cupy, call):
    """A CuPy array over host memory needs no GPU: a call is refused before memory is accessed."""
    memory = X.copy()
    pointer = cupy.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, device_id=0)
    x = cupy.ndarray(X.shape, X.dtype, cupy.cuda.MemoryPointer(pointer, 0))
    with pytest.raises((TypeError, NotImplementedError)):
        run(call, x=x)

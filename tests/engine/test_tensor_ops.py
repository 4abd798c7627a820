"""Every operator and method of Tensor, and every function of several tensors: output and gradients.

``CASES`` holds one strategy per op; the checks of ``parity.ops.cases`` run on all of them.
"""

import copy
import inspect
import math
import operator
import pickle
from functools import partial

import einops
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.ops import NOT_OPS, fails, place_of_error, scale_one_gradient
from support.suite import proven

import tinyllm
from parity.ops import strategies as some
from parity.ops.cases import Case, assert_close, check_direction, check_float32, check_torch
from tinyllm import Tensor, chunk, concatenate, einsum, split, stack, tensor, tensor_einsum, tensor_ops, where
from tinyllm.errors import Error
from tinyllm.tensor_ops import ArrayAlgebra

# -------------------------------------------------------------------- arithmetic operators


def constant(value, like):
    """A float array in the dtype of ``like``; numbers and integer arrays unchanged."""
    return value.astype(like.dtype) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def torch_constant(value):
    return torch.tensor(np.array(value, np.float64))


@st.composite
def other_operand(draw, shape):
    """A number or array: an operand without a gradient."""
    kind = draw(st.sampled_from(["number", "integer", "NumPy number", "array", "integers"]))
    rng = np.random.default_rng(draw(some.SEEDS))
    if kind == "number":
        return rng.uniform(0.5, 2)
    if kind == "integer":
        return int(rng.integers(1, 4))
    if kind == "NumPy number":
        return draw(st.sampled_from([np.float64, np.float32, np.int64]))(rng.integers(1, 9) / 2 + 0.5)
    if kind == "array":
        return some.nonzero(rng, shape)
    return rng.integers(1, 4, shape) * rng.choice([-1, 1], shape)


@st.composite
def binary(draw, op):
    """x op y for another tensor, the same tensor, a number, or an array without a gradient."""
    left, right = draw(some.broadcastable(2))
    x = draw(some.arrays(left, some.nonzero))
    kind = draw(st.sampled_from(["tensor", "itself", "constant"]))
    name, seed = f"{op.__name__} {kind}", draw(some.SEEDS)
    if kind == "tensor":
        y = draw(some.arrays(right, some.nonzero))
        return Case(name, [x, y], op, op, needs=draw(some.subsets(2)), seed=seed)
    if kind == "itself":
        return Case(name, [x], lambda x: op(x, x), lambda x: op(x, x), seed=seed)
    c = draw(other_operand(right))
    return Case(name, [x], lambda x: op(x, constant(c, x)), lambda x: op(x, torch_constant(c)), seed=seed)


@st.composite
def reflected(draw, op):
    """c op x with a number or an array on the left."""
    left, right = draw(some.broadcastable(2))
    x, c = draw(some.arrays(right, some.nonzero)), draw(other_operand(left))
    return Case(
        f"{op.__name__}, {type(c).__name__} on the left",
        [x],
        lambda x: op(constant(c, x), x),
        lambda x: op(torch_constant(c), x),
        seed=draw(some.SEEDS),
    )


@st.composite
def power(draw):
    n = draw(
        st.sampled_from([0, 1, 2, 3, -1, -2, 0.5, -1.5, 2.5, np.int64(3), np.float64(2), np.float32(0.5)])
    )
    values = some.nonzero if n == int(n) else some.positive
    x = draw(some.arrays(draw(some.shapes()), values))
    return Case(f"** {n!r}", [x], lambda x: x**n, lambda x: x ** float(n), seed=draw(some.SEEDS))


@st.composite
def power_of_tensors(draw):
    """x ** y of Tensors that broadcast, or one of them a number or an array; the base is positive."""
    left, right = draw(some.broadcastable(2))
    x, y, seed = draw(some.arrays(left, some.positive)), draw(some.arrays(right)), draw(some.SEEDS)
    if draw(st.booleans()):
        return Case(
            "** of Tensors", [x, y], operator.pow, operator.pow, needs=draw(some.subsets(2)), seed=seed
        )
    return Case("** array", [x], lambda x: x ** constant(y, x), lambda x: x ** torch_constant(y), seed=seed)


@st.composite
def rpower(draw):
    left, right = draw(some.broadcastable(2))
    c = draw(st.sampled_from([2.0, 3, 0.5, np.float32(1.5), draw(some.arrays(left, some.positive))]))
    return Case(
        f"{c!r} ** x",
        [draw(some.arrays(right))],
        lambda x: constant(c, x) ** x,
        lambda x: torch_constant(c) ** x,
        seed=draw(some.SEEDS),
    )


@st.composite
def matmul_shapes(draw):
    """Vectors, matrices, batches, batches that broadcast."""
    signature = draw(
        st.sampled_from(["(n),(n)->()", "(n),(n,p)->(p)", "(m,n),(n)->(m)", "(m,n),(n,p)->(m,p)"])
    )
    batches = draw(st.integers(0, 2))
    drawn = hnp.mutually_broadcastable_shapes(signature=signature, max_dims=batches, min_side=0, max_side=4)
    left, right = draw(drawn).input_shapes
    # The strategy puts batch axes in front of vectors too, where @ does not have any.
    return left[-1:] if "(n)," in signature else left, right[-1:] if ",(n)-" in signature else right


@st.composite
def matmul(draw):
    left, right = draw(matmul_shapes())
    return Case(
        f"{left} @ {right}",
        [draw(some.arrays(left)), draw(some.arrays(right))],
        operator.matmul,
        operator.matmul,
        needs=draw(some.subsets(2)),
        seed=draw(some.SEEDS),
    )


@st.composite
def rmatmul(draw):
    left, right = draw(matmul_shapes())
    c, dtype = draw(some.arrays(left)), draw(st.sampled_from([np.float64, np.int64]))
    c = (4 * c).astype(dtype)
    return Case(
        f"array of {np.dtype(dtype)} {left} @ {right}",
        [draw(some.arrays(right))],
        lambda x: constant(c, x) @ x,
        lambda x: torch_constant(c) @ x,
        seed=draw(some.SEEDS),
    )


# ----------------------------------------------------------------- elementwise, reductions


@st.composite
def elementwise(draw, name, values=some.normal):
    x = draw(some.arrays(draw(some.shapes()), values))
    op = operator.methodcaller(name)
    return Case(name, [x], op, op, seed=draw(some.SEEDS))


@st.composite
def reduction(draw, name, theirs, values=some.normal, min_side=1, ddofs=(None,)):
    """``theirs(x, dim, keepdim, ddof)``, where dim is all axes if axis is None."""
    shape = draw(some.shapes(min_side=min_side))
    axis, keepdims = draw(some.axes(len(shape))), draw(st.booleans())
    every = tuple(range(len(shape)))
    dim = every if axis is None else axis
    count = math.prod(np.array(shape, int)[list(np.atleast_1d(np.array(dim, int)))])
    ddof = draw(st.sampled_from([d for d in ddofs if d is None or d < count]))
    options = {"axis": axis, "keepdims": keepdims} | ({} if ddof is None else {"ddof": ddof})
    return Case(
        f"{name} of {shape}, {options}",
        [draw(some.arrays(shape, values))],
        lambda x: getattr(x, name)(**options),
        # torch reads an empty tuple of axes as all axes: reduce a scalar as an array of one element.
        lambda x: theirs(x, dim, keepdims, ddof) if every else theirs(x.reshape(1), 0, False, ddof),
        seed=draw(some.SEEDS),
    )


# --------------------------------------------------------------------------------- layout


@st.composite
def reshape(draw):
    shape = draw(some.shapes(min_dims=1))
    known = math.prod(shape[1:])
    target = draw(st.sampled_from([(math.prod(shape),), (1, *shape), (*shape, 1), shape[::-1], (-1, known)]))
    if -1 in target and known == 0:
        target = shape
    as_given = draw(st.sampled_from([lambda x: x.reshape(*target), lambda x: x.reshape(list(target))]))
    x = draw(some.arrays(shape))
    return Case(
        f"reshape {shape} to {target}", [x], as_given, lambda x: x.reshape(target), seed=draw(some.SEEDS)
    )


@st.composite
def transpose(draw):
    shape = draw(some.shapes())
    n = len(shape)
    axes = tuple(axis - n * draw(st.booleans()) for axis in draw(st.permutations(range(n))))
    ours, order = draw(
        st.sampled_from(
            [
                (lambda x: x.transpose(), tuple(range(n))[::-1]),
                (lambda x: x.transpose(*axes), axes or ()),
                (lambda x: x.transpose(axes), axes),
            ]
        )
    )
    x = draw(some.arrays(shape))
    return Case(f"transpose {order}", [x], ours, lambda x: x.permute(order), seed=draw(some.SEEDS))


@st.composite
def swapaxes(draw):
    shape = draw(some.shapes(min_dims=1))
    a, b = (draw(st.integers(-len(shape), len(shape) - 1)) for _ in range(2))
    op = operator.methodcaller("swapaxes", a, b)
    return Case(f"swapaxes({a}, {b})", [draw(some.arrays(shape))], op, op, seed=draw(some.SEEDS))


@st.composite
def rearrange(draw):
    """The reference is einops on a torch tensor, with torch's gradient."""
    shape, pattern, sizes = draw(
        st.sampled_from(
            [
                ((2, 3, 8), "b t (h d) -> b h t d", {"h": 4}),
                ((2, 3, 4, 2), "b h t d -> b t (h d)", {}),
                ((2, 3, 12), "b t (three h d) -> three b h t d", {"three": 3, "h": 2}),
                ((6, 4), "(a b) (c d) -> (b c) (a d)", {"a": 2, "d": 2}),
                ((2, 1, 3), "a 1 c -> c a", {}),
                ((2, 3), "a b -> 1 b a 1", {}),
                ((5,), "i -> i", {}),
            ]
        )
    )
    return Case(
        f"rearrange {pattern}",
        [draw(some.arrays(shape))],
        lambda x: x.rearrange(pattern, **sizes),
        lambda x: einops.rearrange(x, pattern, **sizes),
        seed=draw(some.SEEDS),
    )


@st.composite
def astype(draw):
    """To a larger dtype and back; casts that round have a test of their own."""
    x = draw(some.arrays(draw(some.shapes())))
    there_and_back = lambda x: x.astype(np.longdouble).astype(x.dtype)  # noqa: E731
    return Case("astype", [x], there_and_back, lambda x: x * 1, seed=draw(some.SEEDS))


def index_of_tensors(index):
    """The index with its arrays as Tensors."""
    if isinstance(index, tuple):
        return tuple(map(index_of_tensors, index))
    return Tensor(index) if isinstance(index, np.ndarray) else index


@st.composite
def getitem(draw):
    """torch has no negative steps: the reference gathers the element numbers that NumPy selects."""
    shape = draw(some.shapes())
    index = draw(some.indices(shape))
    numbers = np.asarray(np.arange(math.prod(shape)).reshape(shape)[index])
    with_tensors = draw(st.sampled_from([lambda index: index, index_of_tensors]))
    return Case(
        f"{shape}[{index!r}]",
        [draw(some.arrays(shape))],
        lambda x: x[with_tensors(index)],
        lambda x: x.reshape(-1)[torch.tensor(numbers.copy())],
        seed=draw(some.SEEDS),
    )


# --------------------------------------------------------------- functions of several tensors


@st.composite
def concatenation(draw):
    shape = draw(some.shapes(min_dims=1))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    shapes = [list(shape) for _ in range(draw(st.integers(1, 3)))]
    for s in shapes:
        s[axis] = draw(st.integers(0, 3))
    return Case(
        f"concatenate {shapes}, axis {axis}",
        [draw(some.arrays(s)) for s in shapes],
        lambda *x: concatenate(x, axis=axis),
        lambda *x: torch.cat(x, dim=axis),
        needs=draw(some.subsets(len(shapes))),
        seed=draw(some.SEEDS),
    )


@st.composite
def stacking(draw):
    shape, count = draw(some.shapes()), draw(st.integers(1, 3))
    axis = draw(st.integers(-len(shape) - 1, len(shape)))
    return Case(
        f"stack {count} of {shape}, axis {axis}",
        [draw(some.arrays(shape)) for _ in range(count)],
        lambda *x: stack(x, axis=axis),
        lambda *x: torch.stack(x, dim=axis),
        needs=draw(some.subsets(count)),
        seed=draw(some.SEEDS),
    )


@st.composite
def splitting(draw):
    """Equal parts or parts of given sizes: all in reverse order, and the first once more, in one result."""
    shape = list(draw(some.shapes(min_dims=1)))
    axis, sections = draw(st.integers(-len(shape), len(shape) - 1)), draw(st.integers(1, 3))
    sizes = [draw(st.integers(1, 3))] * sections
    if draw(st.booleans()):
        sections = sizes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    shape[axis] = sum(sizes)

    def ours(x):
        parts = split(x, sections, axis=axis)
        return concatenate([*parts[::-1], parts[0]], axis=axis)

    def theirs(x):
        parts = torch.split(x, list(sizes), dim=axis)
        return torch.cat([*parts[::-1], parts[0]], dim=axis)

    x = draw(some.arrays(shape))
    return Case(f"split {shape} into {sections}, axis {axis}", [x], ours, theirs, seed=draw(some.SEEDS))


@st.composite
def chunking(draw):
    """All parts in reverse order; that their number is torch's is a test of its own."""
    shape = list(draw(some.shapes(min_dims=1, max_side=7)))
    axis, chunks = draw(st.integers(-len(shape), len(shape) - 1)), draw(st.integers(1, 4))
    return Case(
        f"{chunks} chunks of {shape}, axis {axis}",
        [draw(some.arrays(shape))],
        lambda x: concatenate(chunk(x, chunks, axis)[::-1], axis),
        lambda x: torch.cat(torch.chunk(x, chunks, axis)[::-1], axis),
        seed=draw(some.SEEDS),
    )


@st.composite
def choosing(draw):
    shape, left, right = draw(some.broadcastable(3))
    condition = np.random.default_rng(draw(some.SEEDS)).random(shape) < 0.5
    x, y = draw(some.arrays(left)), draw(some.arrays(right))
    chosen, seed, mask = draw(st.sampled_from(["both", "x", "y"])), draw(some.SEEDS), torch.tensor(condition)
    if chosen == "both":
        ours, theirs = lambda x, y: where(condition, x, y), lambda x, y: torch.where(mask, x, y)
        return Case("where", [x, y], ours, theirs, needs=draw(some.subsets(2)), seed=seed)
    if chosen == "x":
        ours, theirs = lambda x: where(condition, x, -1.5), lambda x: torch.where(mask, x, -1.5)
        return Case("where, else a number", [x], ours, theirs, seed=seed)
    ours, theirs = lambda y: where(condition, 2, y), lambda y: torch.where(mask, 2.0, y)
    return Case("where a number, else", [y], ours, theirs, seed=seed)


@st.composite
def contraction(draw):
    subscripts = draw(
        st.sampled_from(
            "ij,jk->ik bhtd,bhsd->bhts bhts,bhse->bhte i,i-> ij-> ij->j ij->ji i,j->ij ij,ij->ij ij,ij->j "
            "ijk,kl,lm->im ij,k->i ij,kl->k ,i->i bi,bi->b abc,cb->a ab,ab,b->a "
            "ij,jk i,i ba b,a ii ii->i iij,jk->ki iji->j aab,bcc->ac ...ij,...jk->...ik ...ij,jk "
            "...i->... ...ij->...ji ...,...->... i...,i...->... ...ii->...i ...i,...i b...a".split()
        )
    )
    terms = subscripts.split("->")[0].split(",")
    size = {c: draw(st.integers(1, 4)) for c in sorted({*"".join(terms)} - {"."})}
    # Letters for "...": X and Y of the first operand, Y of the others.
    batch = draw(st.sampled_from(["", "Y", "XY"]))
    size |= {c: draw(st.integers(1, 3)) for c in batch}
    terms = [term.replace("...", batch[-1:] if k else batch) for k, term in enumerate(terms)]
    return Case(
        f"einsum {subscripts} {size}",
        [draw(some.arrays([size[c] for c in term])) for term in terms],
        lambda *x: einsum(subscripts, *x),
        lambda *x: torch.einsum(subscripts, *x),
        needs=draw(some.subsets(len(terms))),
        seed=draw(some.SEEDS),
    )


CASES = {
    "__add__": binary(operator.add),
    "__radd__": reflected(operator.add),
    "__neg__": elementwise("__neg__"),
    "__sub__": binary(operator.sub),
    "__rsub__": reflected(operator.sub),
    "__mul__": binary(operator.mul),
    "__rmul__": reflected(operator.mul),
    "__truediv__": binary(operator.truediv),
    "__rtruediv__": reflected(operator.truediv),
    "__pow__": power() | power_of_tensors(),
    "__rpow__": rpower(),
    "__matmul__": matmul(),
    "__rmatmul__": rmatmul(),
    "__getitem__": getitem(),
    "exp": elementwise("exp"),
    "log": elementwise("log", some.positive),
    "tanh": elementwise("tanh"),
    "sqrt": elementwise("sqrt", some.positive),
    "sum": reduction("sum", lambda x, dim, keep, _: x.sum(dim, keep), min_side=0),
    "mean": reduction("mean", lambda x, dim, keep, _: x.mean(dim, keep)),
    "max": reduction("max", lambda x, dim, keep, _: x.amax(dim, keep), some.distinct),
    "var": reduction(
        "var",
        lambda x, dim, keep, ddof: x.var(dim, correction=ddof or 0, keepdim=keep),
        ddofs=(None, 0, 1, 2),
    ),
    "reshape": reshape(),
    "transpose": transpose(),
    "swapaxes": swapaxes(),
    "rearrange": rearrange(),
    "astype": astype(),
    "concatenate": concatenation(),
    "stack": stacking(),
    "split": splitting(),
    "chunk": chunking(),
    "where": choosing(),
    "einsum": contraction(),
}

# ------------------------------------------------------------------------ checks of every op

every_op = pytest.mark.parametrize("op", CASES)


@proven("op", CASES)
@given(data=st.data())
def test_output_and_gradients_match_torch(op, data):
    check_torch(data.draw(CASES[op]))


@every_op
@given(data=st.data())
def test_gradient_matches_directional_derivative(op, data):
    check_direction(data.draw(CASES[op]))


@every_op
@given(data=st.data())
def test_float32_results_are_float32_and_close_to_float64(op, data):
    check_float32(data.draw(CASES[op]))


def test_every_public_op_has_cases():
    members = vars(ArrayAlgebra) | vars(Tensor)
    hidden = {name for name in members if name.startswith("_") and not name.endswith("__")}
    methods = {name for name, value in members.items() if callable(value)} - hidden
    functions = {
        name
        for name in tinyllm.__all__
        if inspect.isfunction(getattr(tinyllm, name))
        and getattr(tinyllm, name).__module__.startswith("tinyllm.tensor_")
    }
    assert (methods | functions) - NOT_OPS == set(CASES)


# -------------------------------------------------------------------------- planted faults


@pytest.mark.parametrize("position", [0, -1])
@every_op
def test_relative_gradient_error_of_1e_8_is_detected(op, position, monkeypatch):
    scale_one_gradient(monkeypatch, position, 1 + 1e-8)
    find(CASES[op], fails, settings=settings(phases=[Phase.generate]))  # raises if every example passes


def test_direction_check_detects_relative_gradient_error_of_1e_4(monkeypatch):
    x = np.random.default_rng(0).standard_normal((3, 4))
    case = Case("exp", [x], Tensor.exp, torch.exp)
    check_direction(case)
    scale_one_gradient(monkeypatch, 0, 1 + 1e-4)
    with pytest.raises(AssertionError, match="differ by"):
        check_direction(case)


# ------------------------------------------------------------------------- particular inputs


@pytest.mark.parametrize(
    "subscripts, shapes",
    [
        ("ab,ab->ab", [(4, 2), (1, 2)]),
        ("i,i->", [(2,), (1,)]),
        ("i,i->", [(1,), (2,)]),
        ("ij,jk->ik", [(3, 1), (4, 5)]),
        ("ij,jk->ik", [(3, 4), (1, 5)]),
        ("abc,bd,c->a", [(2, 3, 1), (1, 4), (5,)]),
        ("ab,ab,ab->b", [(3, 1), (1, 2), (3, 2)]),
        ("ij->j", [(3, 1)]),
    ],
)
def test_einsum_broadcasts_axes_of_length_1(subscripts, shapes):
    arrays = [np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate(shapes)]
    ours, theirs = partial(einsum, subscripts), partial(torch.einsum, subscripts)
    check_torch(Case(f"einsum {subscripts}", arrays, ours, theirs))


@pytest.mark.parametrize("shape, axis", [((1,), None), ((1,), 0), ((3, 1), 1), ((1, 4), 0), ((2, 3), (0, 1))])
@pytest.mark.parametrize("ddof", [0, 1, 2, 6, 7])
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_variance_of_too_few_elements_matches_torch(shape, axis, ddof):
    """For N = ddof the value is nan if all elements are equal, else infinite, and so is the gradient.

    For N < ddof torch's gradient is finite along an axis but not over all axes; here it never is.
    """
    x = np.random.default_rng(0).standard_normal(shape)
    ours, theirs = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    out, expected = ours.var(axis=axis, ddof=ddof), theirs.var(dim=axis, correction=ddof)
    out.backward(np.ones_like(out.data))
    expected.sum().backward()
    np.testing.assert_allclose(out.data, expected.detach().numpy(), rtol=1e-12)
    if out.size * ddof <= x.size:
        np.testing.assert_allclose(ours.grad, theirs.grad.numpy(), rtol=1e-12)
    else:
        assert not np.isfinite(ours.grad).any()


def test_scalar_has_an_axis_0_as_in_torch():
    for name, theirs in (("sum", torch.sum), ("mean", torch.mean), ("max", torch.amax)):
        for axis in (None, 0, -1, (0,), [-1]):
            ours = operator.methodcaller(name, axis=axis)
            check_torch(Case(f"{name} of a scalar", [np.array(3.0)], ours, lambda x, f=theirs: f(x)))


def test_axes_in_a_list_and_no_axes_reduce_as_in_torch():
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    for axes in ([0, 1], [-1], (), []):
        for name, theirs in (("sum", torch.sum), ("mean", torch.mean), ("max", torch.amax)):
            ours = operator.methodcaller(name, axis=axes)
            check_torch(Case(name, [x], ours, lambda x, f=theirs, a=axes: f(x, dim=tuple(a))))


@pytest.mark.parametrize("length, chunks", [(7, 3), (6, 4), (2, 5), (0, 3), (9, 1)])
def test_chunks_are_as_many_and_as_long_as_in_torch(length, chunks):
    ours, theirs = chunk(Tensor(np.arange(length)), chunks), torch.arange(length).chunk(chunks)
    assert [part.data.tolist() for part in ours] == [part.tolist() for part in theirs]


def test_power_at_zero_and_of_negative_bases_matches_torch():
    base, exponent = np.array([0.0, 0, 0, -2, -1.5, 3]), np.array([0.0, 2, 1, 2, 0, 0])
    check_torch(Case("**", [base, exponent], operator.pow, operator.pow, needs=[True, False]))
    check_torch(Case("**", [abs(base), exponent], operator.pow, operator.pow))
    powers = np.array([0.0, 1, 2.5])
    check_torch(Case("0 ** x", [powers], lambda x: 0.0**x, lambda x: 0.0**x))
    check_torch(Case("x ** 0", [base], lambda x: x**0, lambda x: x**0))
    negative = Tensor(np.array([-1.0]), requires_grad=True)
    with np.errstate(divide="ignore"):
        (Tensor(np.zeros(1)) ** negative).backward()
    assert negative.grad == -np.inf


@pytest.mark.parametrize(
    "compare", [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]
)
def test_comparisons_give_the_boolean_arrays_of_torch(compare):
    x, y = np.array([[1.0, 2, 3], [3, 2, 1]]), np.array([1.0, 2, 1])
    expected = compare(torch.tensor(x), torch.tensor(y)).numpy()
    for left, right in ((Tensor(x), Tensor(y)), (Tensor(x), y), (x, Tensor(y)), (Tensor(x), [1, 2, 1])):
        result = compare(left, right)
        assert isinstance(result, np.ndarray) and result.dtype == bool
        np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(compare(Tensor(x), 2), compare(torch.tensor(x), 2).numpy())
    np.testing.assert_array_equal(compare(2, Tensor(x)), compare(2, torch.tensor(x)).numpy())
    assert (Tensor(x) == None) is False  # noqa: E711


def test_condition_of_where_may_be_a_comparison_or_a_boolean_tensor():
    x = Tensor(np.array([-1.0, 2.0]), requires_grad=True)
    for condition in (x > 0, Tensor(x > 0)):
        assert where(condition, x, 0.0).data.tolist() == [0, 2]


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "pow", "matmul"])
def test_an_operator_in_place_is_the_operator_except_on_a_leaf_with_a_gradient(name):
    in_place, plain = getattr(operator, f"i{name}"), getattr(operator, name)
    x, w = Tensor(np.array([3.0, 5.0])), Tensor(np.array([2.0, 4.0]), requires_grad=True)
    for result in (in_place(x, w), in_place(x * w, w)):
        assert result.requires_grad
    assert np.array_equal(in_place(x, w).data, plain(x.data, w.data))
    assert x.data.tolist() == [3, 5]
    with pytest.raises(Error, match=r"w\.data"):
        in_place(w, x)
    assert w.data.tolist() == [2, 4]


def test_requires_grad_can_be_set_on_a_leaf():
    a, b = Tensor(np.ones(3)), Tensor(np.ones(3), requires_grad=True)
    a.requires_grad = True
    b.requires_grad = False
    assert a.requires_grad and not b.requires_grad
    (a * b).sum().backward()
    np.testing.assert_array_equal(a.grad, np.ones(3))
    assert b.grad is None
    b.grad = None  # allowed without a gradient: zero_grad() does this to every parameter
    b.requires_grad = True
    (a * b).sum().backward()
    b.requires_grad = True  # unchanged: the gradient is kept
    np.testing.assert_array_equal(a.grad, np.full(3, 2.0))
    np.testing.assert_array_equal(b.grad, np.ones(3))
    a.requires_grad = False
    assert a.grad is None and (a * 2).requires_grad is False


def test_tied_maxima_share_the_gradient():
    x = np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    for axis in (0, 1, (0, 1)):
        check_torch(Case("max with ties", [x], lambda x, a=axis: x.max(axis=a), lambda x, a=axis: x.amax(a)))
    many = Tensor(np.zeros(1024, ml_dtypes.bfloat16), requires_grad=True)  # whose numbers end at 256 ones
    many.max().backward()
    assert (many.grad == 2.0**-10).all()
    a = Tensor(x, requires_grad=True)
    a.max(axis=1).backward(np.array([1.0, 1.0]))
    np.testing.assert_allclose(a.grad, [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])


def test_element_indexed_twice_gets_both_gradients():
    for index in ([0, 2, 0], np.array([0, 2, 0]), np.array([0, 2, 0], np.uint8), ([0, 2, 0], slice(None))):
        x = Tensor(np.ones((3, 2)), requires_grad=True)
        x[index].sum().backward()
        np.testing.assert_array_equal(x.grad, [[2, 2], [0, 0], [1, 1]], err_msg=f"index {index!r}")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32])
def test_index_of_small_integer_dtype_does_not_overflow(dtype):
    """Row 250 of 300 columns starts at element 75,000, which overflows 8 and 16 bits."""
    x = Tensor(np.zeros((256, 300)), requires_grad=True)
    x[np.array([250, 3, 250], dtype)].sum().backward()
    assert (x.grad[250] == 2).all() and (x.grad[3] == 1).all() and x.grad.sum() == 900


def test_numpy_scalar_is_an_index():
    for i in (2, np.int64(2), np.uint8(2), np.array(2)):
        x = Tensor(np.ones((3, 2)), requires_grad=True)
        x[i].sum().backward()
        np.testing.assert_array_equal(x.grad, [[0, 0], [0, 0], [1, 1]], err_msg=f"index {i!r}")


def test_empty_index_array():
    for shape in ((3, 2), (0, 2), (0,)):
        x = Tensor(np.ones(shape), requires_grad=True)
        x[np.array([], int)].sum().backward()
        np.testing.assert_array_equal(x.grad, np.zeros(shape))


def test_gradient_of_overlapping_views_matches_torch():
    x = np.random.default_rng(0).standard_normal((4, 6))

    def op(x):
        return x[1:, ::2] * x[:-1, ::-2] + x[1:, ::2]

    def theirs(x):
        return x[1:, ::2] * x[:-1].flip(1)[:, ::2] + x[1:, ::2]

    check_torch(Case("views of one tensor", [x], op, theirs))


def test_lists_of_integers_are_converted_to_the_dtype():
    x = Tensor(np.array([1.0, 2.0], np.float32), requires_grad=True)
    for op in (operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul):
        for numbers in ([3, 4], [True, False]):
            for left, right in (
                ((x, numbers), (numbers, x)) if op is not operator.truediv else ((numbers, x),)
            ):
                arrays = [np.asarray(getattr(side, "data", side), np.float32) for side in (left, right)]
                result = op(left, right)
                assert result.dtype == np.float32
                np.testing.assert_array_equal(result.data, op(*arrays))


def test_integer_operand_is_not_modified():
    ids, x = np.array([1, 2]), Tensor(np.ones(2), requires_grad=True)
    x * ids
    assert ids.dtype == np.int64 and ids.tolist() == [1, 2]


@pytest.mark.parametrize("left, right", [(np.float32, np.float64), (np.float64, np.float32)])
def test_astype_rounds_and_casts_its_gradient_back(left, right):
    data = np.array([1 / 3, 1e-8, 3.0]).astype(left)
    x = Tensor(data, requires_grad=True)
    y = x.astype(right)
    np.testing.assert_array_equal(y.data, data.astype(right))
    y.backward(np.array([0.1, 0.2, 0.3], right))
    assert x.grad.dtype == left
    np.testing.assert_array_equal(x.grad, np.array([0.1, 0.2, 0.3], right).astype(left))


@pytest.mark.parametrize("dtype", [bool, np.int64])
def test_conversion_to_integers_ends_the_gradient_as_in_torch(dtype):
    x = Tensor(np.array([0.5, 1.5]), requires_grad=True)
    y = x.astype(dtype)
    assert y.dtype == dtype and not y.requires_grad
    (x * y.astype(np.float64)).sum().backward()
    np.testing.assert_array_equal(x.grad, x.data.astype(dtype))


def test_where_accepts_minus_infinity():
    x = Tensor(np.ones((2, 2), np.float32), requires_grad=True)
    y = where(np.array([[True, False], [True, True]]), x, -math.inf)
    assert y.dtype == np.float32 and y.data.tolist() == [[1, -math.inf], [1, 1]]
    y.backward(np.ones((2, 2), np.float32))
    np.testing.assert_array_equal(x.grad, [[1, 0], [1, 1]])


def test_detach_has_no_graph_and_item_is_a_number():
    x = Tensor(np.array([2.0]), requires_grad=True)
    (x.detach() * x).backward()
    assert x.grad.tolist() == [2.0]  # not 4: one factor is a constant
    assert type(x.item()) is float and x.item() == 2.0


def test_tanh_and_exp_of_large_inputs():
    for dtype in (np.float32, np.float64):
        x = Tensor(np.array([-1e4, -50, 0, 50, 1e4], dtype), requires_grad=True)
        x.tanh().backward(np.ones(5, dtype))
        np.testing.assert_array_equal(x.tanh().data, [-1, -1, 0, 1, 1])
        np.testing.assert_array_equal(x.grad, [0, 0, 1, 0, 0])
        assert Tensor(np.array([-1e4], dtype)).exp().data.tolist() == [0]


def test_assert_close_rejects_nan_and_another_shape():
    good = np.ones(3)
    for bad in (np.array([1, 1, np.nan]), np.ones((3, 1)), np.ones(3) + 3e-10):
        with pytest.raises(AssertionError):
            assert_close(bad, good, "bad")


# ---------------------------------------------------------------------------------- errors


def leaf(*shape, dtype=np.float64):
    return Tensor(np.ones(shape, dtype), requires_grad=True)


def after_backward():
    loss = leaf(2).sum()
    loss.backward()
    return loss


def set_grad_of_computed_tensor():
    (leaf(2) * 2).grad = np.ones(2)


ERRORS = {  # mistake -> (call, words in its message: the value and the remedy)
    "backward twice": (lambda: after_backward().backward(), ["already", "forward pass again"]),
    "Tensor of a Tensor": (lambda: Tensor(leaf(2)), ["detach()", "Tensor(tensor.data)"]),
    "Tensor of None": (lambda: Tensor(None), ["NoneType", "give numbers"]),
    "gradient of integers": (lambda: Tensor(np.arange(2), requires_grad=True), ["int64", "floating-point"]),
    "backward on a constant": (lambda: Tensor(np.ones(1)).backward(), ["requires_grad=True"]),
    "backward on a vector": (lambda: (leaf(2) * 2).backward(), ["(2,)", "grad="]),
    "grad of another shape": (lambda: (leaf(2) * 2).backward(np.ones(3)), ["(2,)", "float64", "(3,)"]),
    "grad of another dtype": (
        lambda: (leaf(2) * 2).backward(np.ones(2, np.float32)),
        ["(2,)", "float64", "float32"],
    ),
    "grad that is a list": (lambda: (leaf(2) * 2).backward([1.0, 1.0]), ["(2,)", "float64", "list"]),
    "grad that is a Tensor": (lambda: (leaf(2) * 2).backward(leaf(2)), ["(2,)", "float64", "Tensor"]),
    "a leaf's grad of another shape": (lambda: setattr(leaf(2), "grad", np.ones((1, 2))), ["(2,)", "(1, 2)"]),
    "a leaf's grad of another dtype": (
        lambda: setattr(leaf(2), "grad", np.ones(2, np.float32)),
        ["float64", "float32"],
    ),
    "a leaf's grad that is a number": (lambda: setattr(leaf(2), "grad", 1.0), ["(2,)", "float"]),
    "a leaf's grad that is a Tensor": (lambda: setattr(leaf(2), "grad", leaf(2)), ["(2,)", "Tensor"]),
    "grad of a computed tensor": (set_grad_of_computed_tensor, ["leaf", "requires_grad=True"]),
    "deepcopy of a computed tensor": (lambda: copy.deepcopy(leaf(2) * 2), ["leaf", "computed", "detach()"]),
    "deepcopy of a loss after backward": (lambda: copy.deepcopy(after_backward()), ["leaf", "detach()"]),
    "pickle of a computed tensor": (lambda: pickle.dumps(leaf(2) * 2), ["leaf", "computed", "detach()"]),
    "requires_grad of a computed tensor": (
        lambda: setattr(leaf(2) * 2, "requires_grad", False),
        ["computed", "detach()"],
    ),
    "a leaf changed in place": (lambda: operator.isub(leaf(2), 1.0), ["leaf", "w.data"]),
    "truth of a Tensor": (lambda: bool(leaf(2)), [".data", ".item()"]),
    "np.asarray of a Tensor": (lambda: np.asarray(leaf(2)), [".data"]),
    "np.mean of a Tensor": (lambda: np.mean(leaf(2)), ["np.mean", ".data"]),
    "float32 + float64": (lambda: leaf(2) + np.ones(2, np.float32), ["float64", "float32", "astype()"]),
    "float64 @ float32": (lambda: leaf(2) @ leaf(2, dtype=np.float32), ["float64", "float32", "astype()"]),
    "where of two dtypes": (
        lambda: where(np.ones(2, bool), leaf(2), leaf(2, dtype=np.float32)),
        ["astype()"],
    ),
    "where of an array of another dtype": (
        lambda: where(np.ones(2, bool), leaf(2), np.ones(2, np.float32)),
        ["where cannot mix float64 and float32"],
    ),
    "where of integers and a fraction": (
        lambda: where(np.ones(2, bool), Tensor(np.arange(2)), 0.5),
        ["0.5", "int64", "astype()"],
    ),
    "a fraction to the power of integers": (
        lambda: 2.5 ** Tensor(np.arange(2)),
        ["2.5", "int64", "astype()"],
    ),
    "integers and an array of larger ones": (
        lambda: Tensor(np.arange(2, dtype=np.uint8)) - np.array([1, 300]),
        ["300 is not a number of uint8", "astype()"],
    ),
    "integers and a list of negative ones": (
        lambda: [-1, 2] * Tensor(np.arange(2, dtype=np.uint8)),
        ["-1 is not a number of uint8", "astype()"],
    ),
    "where of integers and a larger array": (
        lambda: where(np.ones(2, bool), Tensor(np.arange(2)), np.array([1, 2**63], np.uint64)),
        ["9223372036854775808 is not a number of int64", "astype()"],
    ),
    "where of integers and a larger number": (
        lambda: where(np.ones(2, bool), Tensor(np.arange(2, dtype=np.int8)), 128),
        ["128 is not a number of int8", "astype()"],
    ),
    "where of integers and infinity": (
        lambda: where(np.ones(2, bool), Tensor(np.arange(2)), -math.inf),
        ["-inf is not a number of int64", "astype()"],
    ),
    "truth and numbers": (lambda: Tensor(np.ones(2, bool)) * [1, 2], ["2 is not a number of bool"]),
    "integers and a larger number": (lambda: Tensor(np.arange(2, dtype=np.uint8)) - 300, ["300", "uint8"]),
    "a larger number and integers": (lambda: 300 - Tensor(np.arange(2, dtype=np.uint8)), ["300", "uint8"]),
    "a larger number to the power of integers": (
        lambda: 300 ** Tensor(np.arange(2, dtype=np.uint8)),
        ["300", "uint8"],
    ),
    "integers and a huge number": (lambda: Tensor(np.arange(2)) * 2**70, ["mul", "int too large"]),
    "concatenate with an array": (lambda: concatenate([leaf(2), np.ones(2)]), ["ndarray", "Tensor(array)"]),
    "stack of arrays": (lambda: stack([np.ones(2)]), ["ndarray", "Tensor(array)"]),
    "einsum of an array": (lambda: einsum("i,i->i", leaf(2), np.ones(2)), ["ndarray", "Tensor(array)"]),
    "concatenate half precision and float32": (
        lambda: concatenate([leaf(2, dtype=np.float16), leaf(2, dtype=np.float32)]),
        ["concatenate cannot mix float16 and float32"],
    ),
    "stack half precision and float32": (
        lambda: stack([leaf(2, dtype=np.float16), leaf(2, dtype=np.float32)]),
        ["stack cannot mix float16 and float32"],
    ),
    "einsum of half precision and float32": (
        lambda: einsum("i,i->i", leaf(2, dtype=np.float16), leaf(2, dtype=np.float32)),
        ["einsum cannot mix float16 and float32"],
    ),
    "where of two numbers": (lambda: where(np.ones(2, bool), 1.0, 2.0), ["1.0", "2.0", "np.where"]),
    "an op of two dtypes": (
        lambda: Tensor.from_op(np.ones(2), (leaf(2), leaf(2, dtype=np.float32)), None),
        ["float64 and float32", "astype()"],
    ),
    "retain_grad of a constant": (lambda: Tensor(np.ones(2)).retain_grad(), ["requires_grad=True"]),
    "@ with a number": (lambda: leaf(2) @ 3, ["@", "use *"]),
    "@ of two lengths": (lambda: leaf(1) @ leaf(4), ["(1,)", "(4,)", "as long as"]),
    "split unevenly": (lambda: split(leaf(5), 2), ["5", "2 equal parts"]),
    "rearrange with an ellipsis": (
        lambda: leaf(2, 2).rearrange("... c -> c ..."),
        ["'... c -> c ...'", "every axis"],
    ),
    "einsum of too few tensors": (lambda: einsum("i,i->i", leaf(2)), ["'i,i->i'", "one term per tensor"]),
    "einsum of a diagonal of no square": (lambda: einsum("ii->i", leaf(2, 3)), ["'ii'", "(2, 3)"]),
}

WRONG_SHAPES = {  # each is an error in NumPy; the shapes that the message names
    "+": (lambda: leaf(2, 3) + leaf(4), ["(2, 3)", "(4,)"]),
    "- of an array": (lambda: np.ones(4) - leaf(2, 3), ["(2, 3)", "(4,)"]),
    "* of a list": (lambda: leaf(2, 3) * [1, 2], ["(2, 3)", "(2,)"]),
    "/": (lambda: leaf(2, 3) / leaf(2), ["(2, 3)", "(2,)"]),
    "**": (lambda: leaf(2, 3) ** leaf(2), ["(2, 3)", "(2,)"]),
    "** of an array": (lambda: np.ones(2) ** leaf(2, 3), ["(2, 3)", "(2,)"]),
    "<": (lambda: leaf(2, 3) < leaf(2), ["(2, 3)", "(2,)"]),
    "==": (lambda: leaf(2, 3) == leaf(2), ["(2, 3)", "(2,)"]),
    "@": (lambda: leaf(2, 3) @ leaf(4, 5), ["(2, 3)", "(4, 5)"]),
    "@ of a vector": (lambda: leaf(2) @ leaf(3, 4), ["(2,)", "(3, 4)"]),
    "@ of length 1": (lambda: leaf(1) @ leaf(3, 4), ["(1,)", "(3, 4)"]),
    "@ of batches": (lambda: leaf(2, 3, 4) @ leaf(3, 4, 5), ["(2, 3, 4)", "(3, 4, 5)"]),
    "reshape": (lambda: leaf(2, 3).reshape(4), ["(2, 3)", "(4,)"]),
    "reshape with two unknowns": (lambda: leaf(2, 3).reshape(-1, -1), ["(2, 3)"]),
    "transpose beyond the last axis": (lambda: leaf(2, 3).transpose(3, 2), ["(2, 3)", "3"]),
    "transpose of an axis twice": (lambda: leaf(2, 3).transpose(0, 0), ["(2, 3)", "repeated"]),
    "transpose of too few axes": (lambda: leaf(2, 3).transpose(1), ["(2, 3)"]),
    "swapaxes": (lambda: leaf(2, 3).swapaxes(0, 2), ["(2, 3)", "2"]),
    "swapaxes of a scalar": (lambda: leaf().swapaxes(0, 1), ["()", "0"]),
    "rearrange": (lambda: leaf(2, 3).rearrange("a (b c) -> a b c", b=2), ["(2, 3)", "(b c)"]),
    "rearrange into no groups": (lambda: leaf(4).rearrange("(a b) -> a b", a=0), ["(4,)", "{'a': 0}"]),
    "rearrange of more axes": (lambda: leaf(2, 3).rearrange("a b c -> c b a"), ["(2, 3)", "a b c"]),
    "index": (lambda: leaf(2, 3)[2], ["(2, 3)", "2"]),
    "index of an array": (lambda: leaf(2, 3)[np.array([0, 5])], ["(2, 3)", "5"]),
    "index of numbers": (lambda: leaf(2, 3)[np.array([0.0])], ["(2, 3)", "integer"]),
    "too many indices": (lambda: leaf(2)[0, 0], ["(2,)", "2"]),
    "mask of another shape": (lambda: leaf(2, 3)[np.ones((3, 2), bool)], ["(2, 3)", "3"]),
    "sum": (lambda: leaf(2, 3).sum(axis=2), ["(2, 3)", "2"]),
    "sum over an axis twice": (lambda: leaf(2, 3).sum(axis=(0, -2)), ["(2, 3)", "repeated"]),
    "mean": (lambda: leaf(2, 3).mean(axis=-3), ["(2, 3)", "-3"]),
    "mean of a scalar": (lambda: leaf().mean(axis=1), ["()", "1"]),
    "max": (lambda: leaf(2, 3).max(axis=[0, 0]), ["(2, 3)", "repeated"]),
    "max of nothing": (lambda: leaf(2, 0).max(axis=1), ["(2, 0)"]),
    "var": (lambda: leaf(2, 3).var(axis=5), ["(2, 3)", "5"]),
    "concatenate": (lambda: concatenate([leaf(2, 3), leaf(2, 4)]), ["(2, 3)", "(2, 4)"]),
    "concatenate of scalars": (lambda: concatenate([leaf(), leaf()]), ["()"]),
    "concatenate along no axis": (lambda: concatenate([leaf(2)], axis=1), ["(2,)", "1"]),
    "concatenate of nothing": (lambda: concatenate([]), ["at least one"]),
    "stack": (lambda: stack([leaf(2), leaf(3)]), ["(2,)", "(3,)"]),
    "stack of nothing": (lambda: stack([]), ["at least one"]),
    "split along no axis": (lambda: split(leaf(4), 2, axis=1), ["(4,)", "1"]),
    "split of sizes": (lambda: split(leaf(9), [1, 4, 5]), ["9", "[1, 4, 5]"]),
    "split of a negative size": (lambda: split(leaf(3), [4, -1]), ["3", "[4, -1]"]),
    "split into nothing": (lambda: split(leaf(3), []), ["3", "[]"]),
    "split into 0": (lambda: split(leaf(3), 0), ["3", "0"]),
    "split into 1.5": (lambda: split(leaf(3), 1.5), ["3", "1.5", "whole number"]),
    "split of a scalar": (lambda: split(leaf(), 1), ["()"]),
    "chunk": (lambda: chunk(leaf(3), 0), ["0", "at least 1"]),
    "chunk along no axis": (lambda: chunk(leaf(3), 2, 1), ["(3,)"]),
    "where": (lambda: where(np.ones(2, bool), leaf(2, 3), 0.0), ["(2,)", "(2, 3)"]),
    "einsum": (lambda: einsum("ij,jk->ik", leaf(2, 3), leaf(4, 5)), ["(2, 3)", "(4, 5)"]),
    "einsum of more axes": (lambda: einsum("ijk->i", leaf(2, 3)), ["(2, 3)", "'ijk->i'"]),
    "einsum of fewer axes": (lambda: einsum("i->i", leaf(2, 3)), ["(2, 3)", "'i->i'"]),
    "einsum of an unknown letter": (lambda: einsum("ij->k", leaf(2, 3)), ["(2, 3)", "k"]),
    "einsum with two ellipses": (lambda: einsum("......i->i", leaf(2, 3)), ["(2, 3)", "'......i->i'"]),
    "einsum of batches": (lambda: einsum("...i,...i", leaf(2, 3), leaf(4, 3)), ["(2, 3)", "(4, 3)"]),
    "einsum of nothing": (lambda: einsum("i->i"), ["'i->i'"]),
}


def test_integers_stay_integers():
    x = Tensor(np.array([5, 200], np.uint8))
    for y, expected in (
        (x - 3, [2, 197]),
        (x - [3, 200], [2, 0]),
        (255 - x, [250, 55]),
        ([255, 201] - x, [250, 1]),
        (x + np.array([1, 55]), [6, 255]),
        (x * True, [5, 200]),
        (where(np.array([True, False]), x, [0, 255]), [5, 255]),
    ):
        assert y.dtype == np.uint8 and y.data.tolist() == expected


PRODUCTS = {
    "matrices": (((3, 4), (4, 2)), lambda a, b: a @ b),
    "batches": (((2, 3, 4), (2, 4, 5)), lambda a, b: a @ b),
    "vectors": (((4,), (4,)), lambda a, b: a @ b),
    "a row and a matrix": (((4,), (4, 2)), lambda a, b: a @ b),
    "a matrix and a column": (((3, 4), (4,)), lambda a, b: a @ b),
    "einsum": (((3, 4), (2, 4)), lambda a, b: einsum("ij,kj->ik", a, b)),
    "einsum of a sum": (((3, 4), (2, 4)), lambda a, b: einsum("ij,kj->k", a, b)),
    "a sum": (((3, 4),), lambda a: a.sum(axis=1, keepdims=True)),
    "a mean": (((3, 4),), lambda a: a.mean(axis=1, keepdims=True)),
    "a variance": (((3, 4),), lambda a: a.var(axis=1, ddof=1, keepdims=True)),
}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_half_precision_are_summed_in_float32(name, dtype):
    shapes, product = PRODUCTS[name]
    rng = np.random.default_rng(0)
    halves = [Tensor(rng.standard_normal(shape).astype(dtype), requires_grad=True) for shape in shapes]
    singles = [Tensor(half.data.astype(np.float32), requires_grad=True) for half in halves]
    out, exact = product(*halves), product(*singles)
    grad = rng.standard_normal(out.shape).astype(dtype)
    out.backward(grad)
    exact.backward(grad.astype(np.float32))
    assert out.dtype == dtype and np.array_equal(out.data, exact.data.astype(dtype))
    for half, single in zip(halves, singles):
        assert half.grad.dtype == dtype and np.array_equal(half.grad, single.grad.astype(dtype))
    ones = Tensor(np.ones((1, 1000), dtype))
    assert (ones @ ones.transpose()).item() == einsum("ij,kj->ik", ones, ones).item() == 1000


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_wrong_shape_or_axis_is_one_error_that_names_it(name):
    call, words = WRONG_SHAPES[name]
    with pytest.raises(Error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ERRORS)
def test_error_names_the_value_and_the_remedy(name):
    call, words = ERRORS[name]
    with pytest.raises(Error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [np.sum, np.max, np.std, np.argmax, np.copy, np.flip, lambda x: np.where(x > 0, x, 0),
     lambda x: np.concatenate([x, x]), lambda x: np.array_equal(x, np.ones(2)), lambda x: np.asarray([x])],
)  # fmt: skip
def test_function_of_numpy_on_a_tensor_names_the_remedy(call):
    with pytest.raises(Error, match=r"use \.data"):
        call(leaf(2))


@pytest.mark.parametrize("name", ["isub", "iadd", "imul", "itruediv", "ipow", "imatmul"])
def test_an_array_never_becomes_a_tensor_in_place(name):
    """As in ``w.data -= lr * gradient`` with a gradient that is a Tensor."""
    array = np.ones((2, 2))
    with pytest.raises(TypeError):
        getattr(operator, name)(array, leaf(2, 2))
    assert (array == 1).all()


def test_numpy_reads_a_tensors_shape_and_leaves_operators_to_it():
    x, array = leaf(2, 3), np.arange(3.0)
    assert (np.shape(x), np.ndim(x), np.size(x), np.size(x, 0)) == ((2, 3), 2, 6, 2)
    assert isinstance(array - x, Tensor) and isinstance(np.float64(2) * x, Tensor)
    assert np.array_equal(array < x, array < x.data) and np.array_equal((array / x).data, array / x.data)


@pytest.mark.parametrize("module", [tensor, tensor_ops, tensor_einsum])
def test_every_error_of_the_engine_is_tested(module):
    places = {place_of_error(call) for call, _ in ERRORS.values()}
    raised = sum(path == module.__file__ for path, _ in places)
    assert raised == inspect.getsource(module).count("raise Error(")

"""The engine with NumPy alone: graph depth, memory, ownership of gradients, failures, rejected operands.

Other files test what each op computes; this one tests the backward pass and the lifetime of arrays.
"""

import gc
import json
import subprocess
import sys
import threading
import tracemalloc
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tinyllm
from tinyllm import GPT2, Error, GPT2Config, Tensor, no_grad
from tinyllm import functional as F
from tinyllm.backend import threads
from tinyllm.tensor_ops import At

DEPTH = 100_000


def leaf(*shape, seed=0, dtype=np.float64):
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype), requires_grad=True)


@pytest.fixture
def no_gc():
    """Disable the garbage collector, so that arrays are freed by reference counts alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# ------------------------------------------------------------------------------------- depth


def test_backward_through_100_000_ops():
    assert 10 * sys.getrecursionlimit() < DEPTH
    x = leaf(2)
    y = x
    for _ in range(DEPTH):
        y = -y
    y.backward(np.ones(2))
    assert np.array_equal(x.grad, np.ones(2))  # an even number of negations


def test_graph_of_100_000_ops_is_freed_without_backward():
    x = leaf(2)
    y = x
    for _ in range(DEPTH):
        y = y + x
    last = weakref.ref(y.data)
    del y  # frees 100,000 nodes, each with a reference to the next
    assert last() is None
    assert x.grad is None


# ------------------------------------------------------------------------------------ memory


def small_gpt2(dropout=0.0, dtype=np.float32):
    """A model, token ids and targets, large enough for several blocks of every op."""
    config = GPT2Config(
        vocab_size=600, n_positions=160, n_embd=48, n_layer=2, n_head=3,
        embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout,
    )  # fmt: skip
    model = GPT2(config, rng=np.random.default_rng(0)).astype(dtype)
    ids = np.random.default_rng(1).integers(0, 600, (4, 161))
    return model, ids[:, :-1], ids[:, 1:]


@pytest.fixture
def results(monkeypatch):
    """Weak references to the result arrays of all ops."""
    made, from_op = [], Tensor.from_op

    def recording(*op, **recompute):
        out = from_op(*op, **recompute)
        made.append(weakref.ref(out.data))
        return out

    monkeypatch.setattr(Tensor, "from_op", staticmethod(recording))
    return made


@pytest.fixture(params=[1, 2])
def with_threads(request, monkeypatch):
    """Run without and with the thread pool."""
    monkeypatch.setattr(threads, "num_threads", lambda: request.param)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_step_frees_all_its_arrays(dropout, with_threads, results, no_gc):
    model, ids, targets = small_gpt2(dropout)
    for _ in range(3):
        loss = model.loss(ids, targets)
        alive = sum(reference() is not None for reference in results)
        assert alive > 1  # the references work: some arrays are alive
        loss.backward()
        del loss
        assert len(results) > 20
        assert all(reference() is None for reference in results)
        results.clear()
        model.zero_grad()


def bytes_of_arrays():
    """Bytes that NumPy has allocated for array data. (Python's own free lists grow for a hundred steps.)"""
    numpy_data = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([numpy_data]).traces)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backward", [True, False])
def test_memory_returns_to_baseline_after_every_step(dropout, backward, with_threads, no_gc):
    model, ids, targets = small_gpt2(dropout)
    activation = ids.size * model.config.n_embd * 4

    def step():
        loss = model.loss(ids, targets)
        if backward:
            loss.backward()
        model.zero_grad()

    tracemalloc.start()
    try:
        step()
        baseline = bytes_of_arrays()
        for _ in range(3):
            tracemalloc.reset_peak()
            step()
            _, peak = tracemalloc.get_traced_memory()
            assert peak - baseline > 10 * activation  # arrays are traced
            assert bytes_of_arrays() - baseline < 2_000  # NumPy caches blocks below 1,024 bytes
    finally:
        tracemalloc.stop()


def test_training_step_creates_no_reference_cycles(with_threads, no_gc):
    model, ids, targets = small_gpt2(dropout=0.1)
    optimizer = tinyllm.optim.AdamW(model, lr=1e-3)

    def step():
        loss = model.loss(ids, targets)
        loss.backward()
        tinyllm.optim.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    for _ in range(3):
        step()
    assert gc.collect() == 0


@pytest.mark.parametrize("backward", [True, False])
def test_no_op_creates_a_reference_cycle(backward, no_gc):
    def run():
        x, w, row = leaf(2, 3, 4), leaf(5, 4, seed=1), leaf(4, seed=2)
        q = leaf(1, 2, 3, 4, seed=3)
        results = [
            x + row, x - 1, 2 * x, x / (row * row + 1), x**2, x @ w.transpose(), row @ row, (x * x).exp(),
            (x * x + 1).log(), x.tanh(), (x * x + 1).sqrt(), x.sum(axis=1), x.mean(), x.max(axis=-1), x.var(),
            x.reshape(6, 4), x.swapaxes(0, 1), x.rearrange("a b c -> b (a c)"), x.astype(np.float32), x[1],
            x[:, [0, 0]], tinyllm.concatenate([x, x]), tinyllm.stack([x, x]), tinyllm.split(x, 2)[0],
            tinyllm.where(x.data > 0, x, 0.0), tinyllm.einsum("abc,dc->abd", x, w), F.linear(x, w),
            F.embedding(np.array([1, 1]), w), F.layer_norm(x, 4, row, row), F.gelu(x, "tanh"), F.softmax(x),
            F.dropout(x), F.scaled_dot_product_attention(q, q, q, is_causal=True),
            F.cross_entropy(x, np.zeros((2, 3), int)), F.linear_cross_entropy(x, w, np.zeros((2, 3), int)),
        ]  # fmt: skip
        if backward:
            for y in results:
                y.backward(np.ones_like(y.data))

    run()
    gc.collect()
    run()
    assert gc.collect() == 0


def test_array_that_no_closure_needs_is_freed_in_the_forward_pass(no_gc):
    x, y = leaf(3), leaf(3, seed=1)
    total = x + y  # an add needs neither its inputs nor its result
    unneeded = weakref.ref(total.data)
    total = total + y
    assert unneeded() is None

    needed = weakref.ref(total.data)
    total = total * y  # a product needs both factors
    assert needed() is not None
    total.backward(np.ones(3))
    assert needed() is None
    assert np.array_equal(x.grad, y.data)


def test_layer_norm_does_not_keep_its_input(no_gc):
    x, w = leaf(5, 4), leaf(4, seed=1)
    doubled = 2 * x
    residual = weakref.ref(doubled.data)
    y = F.layer_norm(doubled, 4, w, w)
    del doubled
    assert residual() is None
    y.backward(np.ones((5, 4)))


def test_backward_runs_newest_first_and_frees_each_closure(no_gc):
    log = []

    def op(x, name):
        kept = np.full(3, 2.0)
        weakref.finalize(kept, log.append, f"{name} freed")

        def vjp(grad):
            log.append(f"{name} ran")
            return (grad * kept,)

        return Tensor.from_op(x.data * kept, (x,), vjp)

    x = leaf(3)
    loss = op(op(op(x, "first"), "second"), "third")
    assert log == []
    loss.backward(np.ones(3))
    assert log == ["third ran", "third freed", "second ran", "second freed", "first ran", "first freed"]
    assert np.array_equal(x.grad, np.full(3, 8.0))


def test_backward_frees_each_gradient_after_use(no_gc):
    gradients = []

    def watched(x):
        def vjp(grad):
            # Only the gradient that was passed to this vjp may be alive.
            assert sum(reference() is not None for reference in gradients) == bool(gradients)
            result = grad * 2
            gradients.append(weakref.ref(result))
            return (result,)

        return Tensor.from_op(x.data * 2, (x,), vjp)

    x = leaf(3)
    y = x
    for _ in range(5):
        y = watched(y)
    y.backward(np.ones(3))
    assert len(gradients) == 5


# ------------------------------------------------------------------------ gradient ownership


def one_new_array_for_both(a, b):
    def vjp(grad):
        doubled = grad * 2
        return doubled, doubled

    return Tensor.from_op(2 * (a.data + b.data), (a, b), vjp)


def embedding_rows(a, b):
    return F.embedding(np.array([0, 1, 1]), a) + F.embedding(np.array([2, 0, 2]), b)


# Leaves a and b are (3, 4). Every way in which a gradient can be shared by two parents, or be a view.
GRAPHS = {
    "a + b": lambda a, b: a + b,
    "a - b": lambda a, b: a - b,
    "a + b + a": lambda a, b: a + b + a,
    "(a + b) + (a + b)": lambda a, b: (a + b) + (a + b),
    "numbers": lambda a, b: (a + 1) + (b - 1),
    "2 (a + b), one array": one_new_array_for_both,
    "2 (2a + 2b), one array": lambda a, b: one_new_array_for_both(a * 2, b + 0) + a + b,
    "a * b": lambda a, b: a * b,
    "a * a + b": lambda a, b: a * a + b,
    "reshape": lambda a, b: a.reshape(4, 3) + b.reshape(4, 3),
    "transpose": lambda a, b: a.transpose() + b.transpose(),
    "swapaxes": lambda a, b: a.swapaxes(0, 1) + b.reshape(4, 3),
    "rearrange": lambda a, b: a.rearrange("r (x y) -> x (y r)", x=2) + b.reshape(2, 6),
    "slices": lambda a, b: a[1:] + b[:-1],
    "slice of a sum": lambda a, b: (a + b)[1:],
    "a sum and its slice": lambda a, b: (a + b)[:1] + (a + b),
    "rows twice": lambda a, b: a[[0, 0, 2]] + b[[1, 2, 1]],
    "embedding": embedding_rows,
    "sums": lambda a, b: a.sum() + b.sum(axis=0),
    "mean and max": lambda a, b: a.mean(axis=1, keepdims=True) + b.max(axis=0),
    "broadcast": lambda a, b: a[:1] + b,
    "concatenate": lambda a, b: tinyllm.concatenate([a, b, a]),
    "stack": lambda a, b: tinyllm.stack([a, b, a]),
    "split": lambda a, b: tinyllm.split(a, 2, axis=1)[0] + tinyllm.split(b, 2, axis=1)[1],
    "where": lambda a, b: tinyllm.where(a.data > 0, a, b),
    "einsum": lambda a, b: tinyllm.einsum("ij,kj->ik", a, b),
    "einsum, a letter alone": lambda a, b: tinyllm.einsum("ij,kj->k", a, b),
    "matmul": lambda a, b: a @ b.transpose(),
    "linear": lambda a, b: F.linear(a, b, b[:, 0]),
    "layer_norm": lambda a, b: F.layer_norm(a, 4, b[0], b[1]),
    "attention": lambda a, b: F.scaled_dot_product_attention(*[t.reshape(1, 1, 3, 4) for t in (a, b, a)]),
    "cross_entropy": lambda a, b: F.cross_entropy(a + b, np.array([0, 3, 1])),
    "linear_cross_entropy": lambda a, b: F.linear_cross_entropy(a, b, np.array([0, 2, 1])),
    "astype": lambda a, b: a.astype(np.float64) + b.astype(np.float64),
    "leaf first": lambda a, b: a + (b * 2 + a),
    "observed": lambda a, b: observed_sum(a, b),
}


def observed_sum(a, b):
    class Sum(tinyllm.nn.Module):
        def forward(self, a, b):
            return a + b

    with tinyllm.nn.observe(lambda observation: None):
        return Sum()(a, b)


@pytest.fixture
def arrays_seen(monkeypatch):
    """Functions that return the result of an op, or an array that a closure held (None once freed)."""
    arrays, from_op = [], Tensor.from_op

    def recording(data, parents, vjp, recompute=None):
        out = from_op(data, parents, vjp, recompute)
        arrays.append(lambda: out.data)
        # Weak references: an array that only the closure held may become the gradient.
        held = [cell.cell_contents for cell in vjp.__closure__ or ()]
        arrays.extend(weakref.ref(array) for array in held if isinstance(array, np.ndarray))
        return out

    monkeypatch.setattr(Tensor, "from_op", staticmethod(recording))
    return arrays


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("times", [1, 2])
def test_gradient_of_a_leaf_shares_no_memory(graph, times, arrays_seen):
    a, b = leaf(3, 4), leaf(3, 4, seed=1)
    seeds, expected = [], {}
    for round_ in range(times):
        y = graph(a, b)
        seed = np.random.default_rng(round_).standard_normal(y.shape)
        seed.flags.writeable = False  # writing to it raises
        seeds.append(seed)
        y.backward(seed)
    for x in (a, b):
        assert x.grad.shape == (3, 4) and x.grad.dtype == np.float64
        assert x.grad.flags.c_contiguous and x.grad.flags.owndata and x.grad.flags.writeable
        used = [array() for array in arrays_seen if array() is not None and array() is not x.grad]
        others = [a.data, b.data, *seeds, *used, *[other.grad for other in (a, b) if other is not x]]
        assert not any(np.shares_memory(x.grad, other) for other in others)
        expected[x] = x.grad.copy()

    a.grad *= 0.5  # as clipping does, in place
    assert np.array_equal(b.grad, expected[b])


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_two_backward_calls_accumulate(graph):
    a, b = leaf(3, 4), leaf(3, 4, seed=1)
    seed = np.random.default_rng(2).standard_normal(graph(a, b).shape)
    graph(a, b).backward(seed)
    first = {x: (x.grad, x.grad.copy()) for x in (a, b)}
    graph(a, b).backward(seed)
    for x, (array, value) in first.items():
        assert np.allclose(x.grad, 2 * value, rtol=1e-14, atol=1e-14)
        assert x.grad.flags.c_contiguous and x.grad.flags.owndata
        assert x.grad is array or np.array_equal(array, value)  # added in place, or unchanged


def test_seed_gradient_is_neither_modified_nor_kept():
    a, b = leaf(3, 4), leaf(3, 4, seed=1)
    for graph in (lambda: a + b, lambda: (a + b)[1:], lambda: (a + b).transpose(), lambda: a * b + a + b):
        y = graph()
        seed = np.random.default_rng(3).standard_normal(y.shape)
        before = seed.copy()
        y.backward(seed)
        y = graph()
        y.backward(seed)
        assert np.array_equal(seed, before)
        a.grad += 1
        b.grad += 1
        assert np.array_equal(seed, before)


@pytest.mark.parametrize("layout", ["transposed", "strided", "broadcast"])
def test_seed_gradient_of_any_layout(layout):
    seed = {
        "transposed": np.arange(12.0).reshape(4, 3).T,
        "strided": np.arange(24.0).reshape(3, 8)[:, ::2],
        "broadcast": np.broadcast_to(np.arange(4.0), (3, 4)),
    }[layout]
    a, b = leaf(3, 4), leaf(3, 4, seed=1)
    (a + b).backward(seed)
    for x in (a, b):
        assert np.array_equal(x.grad, seed)
        assert x.grad.flags.c_contiguous and x.grad.flags.owndata


def test_backward_on_a_leaf():
    x = Tensor(np.array(3.0), requires_grad=True)
    x.backward()
    x.backward()  # a leaf has no graph that is consumed
    assert x.grad == 2 and x.grad.shape == ()

    y, seed = leaf(2, 3), np.arange(6.0).reshape(2, 3)
    y.backward(seed)
    assert np.array_equal(y.grad, seed) and not np.shares_memory(y.grad, seed)
    y.backward(seed)
    assert np.array_equal(y.grad, 2 * seed)
    assert np.array_equal(seed, np.arange(6.0).reshape(2, 3))


def test_gradient_of_a_scalar_is_an_array():
    """A NumPy scalar could not be clipped in place."""
    x = Tensor(3.0, requires_grad=True)
    (x * x).backward()
    assert isinstance(x.grad, np.ndarray) and x.grad == 6


def test_transposed_leaf_has_a_contiguous_gradient():
    x = Tensor(np.arange(6.0).reshape(2, 3).T, requires_grad=True)
    (x * x).backward(np.ones((2, 3)).T)
    assert np.array_equal(x.grad, 2 * x.data) and x.grad.flags.c_contiguous


def test_leaf_used_100_times():
    x = leaf(3)
    y = x * 0
    for k in range(1, 101):
        y = y + x * k
    y.backward(np.ones(3))
    assert np.array_equal(x.grad, np.full(3, 5050.0))


def test_backward_visits_each_node_once_not_each_path():
    x = leaf(2)
    y = x
    for _ in range(200):  # 2²⁰⁰ paths
        y = (y + y) * 0.5 + y * 0
    y.backward(np.ones(2))
    assert np.array_equal(x.grad, np.ones(2))


def test_gradient_is_complete_before_it_is_propagated():
    x = leaf(3)
    y = x * 2
    late = y.exp()  # the longer path
    for _ in range(5):
        late = late + 1
    (late * y + y).backward(np.ones(3))
    u = 2 * x.data
    assert np.allclose(x.grad, 2 * (np.exp(u) * u + np.exp(u) + 5 + 1), rtol=1e-14)


def test_only_ancestors_of_the_root_get_a_gradient():
    x, y, z = leaf(2), leaf(2, seed=1), leaf(2, seed=2)
    _ = (x * z).sum()  # another graph over x
    (x * y).backward(np.ones(2))
    assert np.array_equal(x.grad, y.data) and np.array_equal(y.grad, x.data)
    assert z.grad is None


def test_constants_and_detached_tensors_get_no_gradient():
    x, constant = leaf(2), Tensor(np.array([3.0, 4.0]))
    (x * constant + x.detach() * 5).backward(np.ones(2))
    assert np.array_equal(x.grad, constant.data)
    assert constant.grad is None and not constant.requires_grad


def test_gradients_at_indices_sum_to_the_dense_gradient():
    x = leaf(4, 3)
    w = np.random.default_rng(5).standard_normal((5, 3, 3))
    doubled = x * 2  # not a leaf: the engine owns its buffer
    for owner, factor in ((x, 1), (doubled, 2)):
        parts = [owner[0:3], owner[1:4], owner[[2, 2, 0]], owner[np.array([1, 1, 1])], owner[::-1][:3]]
        total = sum((part * wi).sum() for part, wi in zip(parts, w))
        x.grad = None
        total.backward()
        dense = np.zeros((4, 3))
        for rows, wi in zip(([0, 1, 2], [1, 2, 3], [2, 2, 0], [1, 1, 1], [3, 2, 1]), w):
            for row, values in zip(rows, wi):
                dense[row] += factor * values
        assert np.allclose(x.grad, dense, rtol=1e-14, atol=1e-14)


def test_rows_of_a_transposed_tensor_get_their_gradient():
    """That of y * y is there first, in the layout of y: the rows' is added into it."""
    x = leaf(3, 4)
    y = x.transpose()
    rows = y[[0, 1, 1]]
    ((y * y).sum() + rows.sum()).backward()
    assert np.array_equal(x.grad, 2 * x.data + [1, 2, 0, 0])


@pytest.mark.parametrize("order", ["dense newest", "slice newest"])
def test_slice_gradient_is_not_added_into_a_shared_buffer(order):
    """y + w returns one array for two parents; the slice's gradient must reach only one of them."""
    x, other = leaf(3), leaf(3, seed=1)
    y, w = x * 1, other * 1
    if order == "dense newest":
        piece = y[:2] * 5
        total = ((y + w) * 2).sum() + piece.sum()
    else:
        both = (y + w) * 2
        total = (y[:2] * 5).sum() + both.sum()
    total.backward()
    assert np.array_equal(x.grad, [7.0, 7.0, 2.0])
    assert np.array_equal(other.grad, [2.0, 2.0, 2.0])


def test_embedding_row_looked_up_twice_gets_both_gradients():
    table = leaf(5, 2)
    ids = np.array([[1, 3, 1], [1, 0, 3]])
    seed = np.random.default_rng(1).standard_normal((2, 3, 2))
    F.embedding(ids, table).backward(seed)
    dense = np.zeros((5, 2))
    for i, g in zip(ids.reshape(-1), seed.reshape(-1, 2)):
        dense[i] += g
    assert np.allclose(table.grad, dense, rtol=1e-15, atol=0)


def test_tied_embedding_and_head_gradient():
    table = leaf(5, 2)
    ids = np.array([4, 4, 0])
    w = np.random.default_rng(1).standard_normal((3, 5))
    logits = F.linear(F.embedding(ids, table), table)
    logits.backward(w)
    onehot = np.eye(5)[ids]
    expected = w.T @ onehot @ table.data + onehot.T @ w @ table.data
    assert np.allclose(table.grad, expected, rtol=1e-13)


# Steps of random programs on (3, 4) arrays, in operations that Tensor and NumPy share.
STEPS = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: 0.5 * (x * y),
    "negate": lambda x, y: -x,
    "shift": lambda x, y: x + 0.25,
    "flip": lambda x, y: x[::-1],
    "rows": lambda x, y: x[[0, 0, 2]],
    "overlap": lambda x, y: x[:, :3].sum(axis=1, keepdims=True) + y[:, 1:].mean(axis=1, keepdims=True) * x,
    "row": lambda x, y: x[1] + y,
    "columns": lambda x, y: 0.3 * (x.sum(axis=0) + y),
    "layout": lambda x, y: x.transpose().reshape(3, 4) + y,
    "swap": lambda x, y: x.reshape(4, 3).swapaxes(0, 1),
}


@given(
    program=st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)),
        min_size=1,
        max_size=9,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_graphs_match_complex_step_derivative(program, seed):
    """f(x + ih v) = f(x) + ih ⟨f'(x), v⟩ + O(h²): with h = 1e-20, exact derivatives from plain NumPy."""
    rng = np.random.default_rng(seed)
    points, direction = rng.uniform(-1, 1, (2, 3, 4)), rng.uniform(-1, 1, (2, 3, 4))

    def run(values):
        values = list(values)
        for name, i, j in program:
            values.append(STEPS[name](values[-1 - i % len(values)], values[-1 - j % len(values)]))
        return values[-1]

    leaves = [Tensor(x.copy(), requires_grad=True) for x in points]
    out = run(leaves)
    upstream = rng.uniform(-1, 1, (3, 4))
    out.backward(upstream)
    for k, x in enumerate(leaves):
        moved = [p + (1e-20j * direction[k] if k == i else 0) for i, p in enumerate(points)]
        expected = (upstream * run(moved).imag).sum() / 1e-20
        grad = np.zeros((3, 4)) if x.grad is None else x.grad
        scale = np.abs(grad).max() + 1
        assert abs((grad * direction[k]).sum() - expected) <= 1e-12 * scale
    grads = [x.grad for x in leaves if x.grad is not None]
    assert all(grad.flags.c_contiguous and grad.flags.owndata for grad in grads)
    for i, grad in enumerate(grads):
        others = [upstream, out.data, *points, *grads[:i], *[x.data for x in leaves]]
        assert not any(np.shares_memory(grad, other) for other in others)
    assert np.array_equal(out.data, run(points))


# --------------------------------------------------------- gradients of computed tensors


def test_retained_gradient_of_a_computed_tensor_matches_torch():
    ours, theirs = leaf(3), torch.tensor(leaf(3).data, requires_grad=True)
    kept = {}
    for name, x in (("ours", ours), ("theirs", theirs)):
        y = x * x
        z = y * 2 + y[:1]
        loss = (z * z).sum()
        for tensor in (x, y, z, loss):
            tensor.retain_grad()
        kept[name] = x, y, z, loss
        loss.backward()
    for one, other in zip(kept["ours"], kept["theirs"]):
        assert np.allclose(one.grad, other.grad.numpy(), rtol=1e-14) and one.grad.flags.owndata


def test_gradient_that_is_not_retained_is_none():
    x = leaf(3)
    y = x * 2
    z = y * 3
    z.retain_grad()
    seed = np.ones(3)
    z.backward(seed)
    assert y.grad is None and np.array_equal(z.grad, seed) and z.grad is not seed
    assert np.array_equal(x.grad, np.full(3, 6.0))


def test_failure_in_backward_clears_a_retained_gradient():
    x = leaf(3)
    y = failing(x, ValueError("broken")) * 2
    y.retain_grad()
    with pytest.raises(ValueError):
        y.backward(np.ones(3))
    assert y.grad is None


def test_retained_tensor_creates_no_reference_cycle(no_gc):
    y = leaf(3) * 2
    y.retain_grad()
    (y * y).sum().backward()
    reference = weakref.ref(y.grad)
    del y
    assert reference() is None


# ---------------------------------------------------------------------------- consumed graphs


def test_second_backward_raises_and_keeps_the_first_gradient():
    x = leaf(3)
    loss = (x * x).sum()
    loss.backward()
    first = x.grad.copy()
    with pytest.raises(Error, match="run the forward pass again"):
        loss.backward()
    assert np.array_equal(x.grad, first)  # it raises before anything is added


def test_backward_through_a_consumed_subgraph_raises_before_anything_is_added():
    x, y = leaf(3), leaf(3, seed=1)
    shared = x.exp()
    first, second = shared.sum(), (shared * y).sum()
    first.backward()
    grad = x.grad.copy()
    with pytest.raises(Error, match="run the forward pass again"):
        second.backward()
    assert np.array_equal(x.grad, grad)
    assert y.grad is None


def test_sum_of_losses_over_a_shared_subgraph():
    x, y = leaf(3), leaf(3, seed=1)
    shared = x.exp()
    (shared.sum() + (shared * y).sum()).backward()
    assert np.allclose(x.grad, np.exp(x.data) * (1 + y.data), rtol=1e-14)
    assert np.array_equal(y.grad, shared.data)


# ----------------------------------------------------------------------------------- failures


def failing(x, error):
    def vjp(grad):
        raise error

    return Tensor.from_op(x.data * 1.0, (x,), vjp)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), MemoryError(), Error("no")])
def test_exception_in_backward_clears_every_gradient_it_could_reach(error):
    early, late, outside = leaf(3), leaf(3, seed=1), leaf(3, seed=2)
    (early * late * outside).backward(np.ones(3))  # gradients of earlier micro-batches
    loss = (failing(early * 2, error) * late).sum()  # late gets its gradient before the error
    with pytest.raises(type(error)) as caught:
        loss.backward()
    assert caught.value is error
    assert early.grad is None and late.grad is None
    assert outside.grad is not None
    assert any("cleared" in note and "repeat the step" in note for note in caught.value.__notes__)

    with pytest.raises(Error, match="run the forward pass again"):
        loss.backward()
    (early * late).backward(np.ones(3))  # the leaves can be used again
    assert np.array_equal(early.grad, late.data)


WRONG = {
    "shape": lambda grad: (np.zeros(5),),
    "shape, same size, transposed": lambda grad: (np.zeros((3, 2)),),
    "shape, same size, flat": lambda grad: (np.zeros(6),),
    "shape, one axis too few": lambda grad: (np.zeros(3),),
    "a scalar": lambda grad: (grad.sum(),),
    "dtype": lambda grad: (grad.astype(np.float32),),
    "integers": lambda grad: (np.ones((2, 3), int),),
    "dtype at an index": lambda grad: (At(slice(0, 1), np.ones((1, 3), np.float32)),),
    "too few": lambda grad: (),
    "too many": lambda grad: (grad, grad),
    "a Tensor": lambda grad: (Tensor(grad),),
}


@pytest.mark.parametrize("vjp", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("to_leaf", [True, False])
def test_vjp_with_a_wrong_result_raises(vjp, to_leaf):
    x = leaf(2, 3)
    parent = x if to_leaf else x * 2
    y = Tensor.from_op(parent.data * 1.0, (parent,), vjp)
    with pytest.raises((AssertionError, ValueError, TypeError, AttributeError)) as caught:
        y.backward(np.ones((2, 3)))
    assert x.grad is None
    assert any("cleared" in note for note in caught.value.__notes__)


# ------------------------------------------------------------------------------------ no_grad


def test_no_grad_records_nothing():
    x = leaf(3)
    with no_grad():
        y = x * x
        inside = leaf(3)
    assert not y.requires_grad and y.node is None
    assert inside.requires_grad  # leaves can be created
    with pytest.raises(Error, match="no_grad"):
        y.backward(np.ones(3))
    assert (x * x).requires_grad


def test_no_grad_keeps_nothing(no_gc):
    x = leaf(3)
    with no_grad():
        first = x * x
        reference = weakref.ref(first.data)
        second = first * x
        del first
        assert reference() is None
    assert second.data.shape == (3,)


def test_no_grad_nests_and_ends_after_an_exception():
    x = leaf(3)
    with no_grad():
        with no_grad():
            assert not (x * x).requires_grad
        assert not (x * x).requires_grad
        with pytest.raises(RuntimeError), no_grad():
            raise RuntimeError
        assert not (x * x).requires_grad
    assert (x * x).requires_grad
    with pytest.raises(KeyboardInterrupt), no_grad():
        raise KeyboardInterrupt
    assert (x * x).requires_grad


def test_no_grad_is_per_thread():
    x, seen = leaf(3), {}
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait()
        seen["while the first thread is in no_grad"] = (x * x).requires_grad
        with no_grad():
            done.set()
            inside_too.wait()

    inside_too = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    with no_grad():
        inside.set()
        assert done.wait(10)
    seen["while the other thread is in no_grad"] = (x * x).requires_grad
    inside_too.set()
    thread.join()
    assert seen == {
        "while the first thread is in no_grad": True,
        "while the other thread is in no_grad": True,
    }


def test_backward_in_several_threads_at_once():
    def work(results, seed):
        x = leaf(50, seed=seed)
        y = x
        for _ in range(300):
            y = y * 1.01
        y.backward(np.ones(50))
        results[seed] = x.grad

    results = {}
    threads = [threading.Thread(target=work, args=(results, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.allclose(results[seed], 1.01**300, rtol=1e-12) for seed in range(4))


# ---------------------------------------------------------------------------------- operands

F32, F64 = Tensor(np.ones(3, np.float32), requires_grad=True), Tensor(np.ones(3), requires_grad=True)
REJECTED = {
    "float32 + float64": (lambda: F32 + F64, "add cannot mix float32 and float64.*Tensor.x.astype"),
    "float64 - float32 array": (lambda: F64 - np.ones(3, np.float32), "cannot mix"),
    "float32 * float64 array": (lambda: F32 * np.ones(3), "cannot mix"),
    "float64 array * float32": (lambda: np.ones(3) * F32, "cannot mix"),
    "float32 / float64": (lambda: F32 / F64, "cannot mix"),
    "float32 @ float64": (lambda: F32 @ F64, "cannot mix"),
    "float64 array @ float32": (lambda: np.ones((2, 3)) @ F32, "cannot mix"),
    "where of float32 and float64": (lambda: tinyllm.where(np.ones(3, bool), F32, F64), "cannot mix"),
    "bool()": (lambda: bool(F64), "no truth value"),
    "if tensor": (lambda: 1 if F64 else 0, "no truth value"),
    "float() of several elements": (lambda: float(F64), r"item of shapes \(3,\)"),
    "int() of several elements": (lambda: int(F64), r"item of shapes \(3,\)"),
    "a format of several elements": (lambda: f"{F64:.3f}", r"item of shapes \(3,\)"),
    "float() of none": (lambda: float(Tensor(np.ones(0))), r"item of shapes \(0,\)"),
    "len() of a scalar": (lambda: len(F64.sum()), r"len of shapes \(\)"),
    "iteration over a scalar": (lambda: list(F64.sum()), r"len of shapes \(\)"),
    "a dtype as device": (lambda: F64.to(np.float32), r"float32.*astype"),
    "np.asarray": (lambda: np.asarray(F64), "use .data"),
    "np.array": (lambda: np.array(F64), "use .data"),
    "Tensor(tensor)": (lambda: Tensor(F64), "ambiguous"),
    "Tensor(None)": (lambda: Tensor(None), "a NoneType is not an array of numbers"),
    "Tensor(torch's)": (lambda: Tensor(torch.ones(3)), "a Tensor of torch is not a NumPy array"),
    "tensor + torch's": (lambda: F32 + torch.ones(3), "a Tensor of torch is not a NumPy array"),
    "a text": (lambda: Tensor("1.0"), "a str is not an array of numbers"),
    "lists of different lengths": (lambda: Tensor([[1.0, 2.0], [3.0]]), "a list is not.*equal lengths"),
    "tensor + None": (lambda: F32 + None, "a NoneType is not an array of numbers"),
    "tensor * a dict": (lambda: F32 * {}, "a dict is not an array of numbers"),
    "tensor - lists of different lengths": (lambda: F32 - [[1.0, 2.0], [3.0]], "a list is not"),
    "tensor * a list of texts": (lambda: F32 * ["a", "b", "c"], "a list is not an array of numbers"),
    "an integer leaf": (lambda: Tensor(np.ones(3, int), requires_grad=True), "only floating-point.*int64"),
    "a boolean leaf": (lambda: Tensor(True, requires_grad=True), "only floating-point.*bool"),
    "backward without a gradient": (lambda: (F64 * 2).backward(), r"shape \(3,\) needs grad="),
    "a gradient of another shape": (lambda: (F64 * 2).backward(np.ones(4)), r"shape \(3,\)"),
    "a gradient that would broadcast": (lambda: (F64 * 2).backward(np.ones(())), r"shape \(3,\)"),
    "a gradient of another dtype": (lambda: (F64 * 2).backward(np.ones(3, np.float32)), "dtype float64"),
    "a number as gradient": (lambda: F64.sum().backward(1.0), "must be an array"),
    "backward of a constant": (lambda: Tensor(np.ones(())).backward(), "requires_grad=True"),
    "the gradient of an intermediate": (lambda: setattr(F64 * 2, "grad", None), "only a leaf"),
    "the gradient of a constant": (lambda: setattr(Tensor(1.0), "grad", np.ones(())), "only a leaf"),
}


@pytest.mark.parametrize(("action", "message"), REJECTED.values(), ids=REJECTED)
def test_tensor_rejects(action, message):
    with pytest.raises(Error, match=message):
        action()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_single_element_converts_to_python_number(shape):
    x = Tensor(np.full(shape, 2.75, np.float32), requires_grad=True)
    assert (float(x), int(x), f"{x:.1f}", f"{x:8.3f}") == (2.75, 2, "2.8", "   2.750")
    assert x and not Tensor(np.zeros(shape))


def test_iteration_ends_after_the_last_row_and_has_gradients():
    x = Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    first, second = x
    assert len(x) == len(list(x)) == 2 and np.array_equal(second.data, [3, 4, 5])
    (first * 2 + second * 3).sum().backward()
    assert np.array_equal(x.grad, [[2, 2, 2], [3, 3, 3]])


def test_repr_has_shape_and_dtype_and_abbreviates_values():
    x = Tensor(np.arange(6, dtype=np.float32).reshape(2, 3), requires_grad=True)
    assert repr(x) == (
        "Tensor([[0., 1., 2.],\n        [3., 4., 5.]], shape=(2, 3), dtype=float32, requires_grad=True)"
    )
    assert f"{x}" == str(x) == repr(x)
    assert repr(Tensor(np.array(1.5))) == "Tensor(1.5, shape=(), dtype=float64)"
    text = repr(Tensor(np.zeros((1000, 1000))))
    assert "..." in text and "shape=(1000, 1000), dtype=float64" in text and len(text) < 1000


def test_hash_is_identity_although_equality_is_elementwise():
    a, b = Tensor(np.ones(2)), Tensor(np.ones(2))
    assert (a == b).tolist() == [True, True] and (a != b).tolist() == [False, False]
    assert len({a, b, a}) == 2 and {a: 1, b: 2}[b] == 2 and b not in {a}
    assert (a == None) is False and a not in [None]  # noqa: E711
    with pytest.raises(TypeError):
        a < None  # noqa: B015


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_numbers_do_not_change_the_dtype(dtype):
    x = Tensor(np.ones(3, dtype), requires_grad=True)
    for number in (2, 2.0, True, np.float64(2), np.float32(2), np.int64(2)):
        for y in (x + number, number + x, x - number, number - x, x * number, number * x, x / number,
                  number / x, x**number):  # fmt: skip
            assert y.dtype == dtype
            x.grad = None
            y.backward(np.ones(3, dtype))
            assert x.grad.dtype == dtype


def test_integer_arrays_and_lists_are_converted_on_either_side():
    x, matrix = leaf(3), leaf(3, 2, seed=1)
    integers = np.array([1, 2, 3])
    for left, right in (
        (integers + x, x + integers),
        (integers * x, x * integers),
        (-(integers - x), x - integers),
        ([1, 2, 3] * x, x * [1, 2, 3]),
    ):
        assert left.dtype == right.dtype == np.float64
        assert np.array_equal(left.data, right.data)
    assert np.array_equal((x @ integers).data, (integers @ x).data)
    assert np.array_equal((integers @ matrix).data, integers @ matrix.data)


def test_array_on_the_left_gives_a_tensor():
    x = leaf(3)
    array = np.arange(3.0)
    assert isinstance(array * x, Tensor) and isinstance(array @ x, Tensor)
    (array - x).backward(np.ones(3))
    assert np.array_equal(x.grad, -np.ones(3))


def test_replace_drops_the_gradient_and_keeps_requires_grad():
    x = leaf(3)
    (x * 2).backward(np.ones(3))
    x.replace(np.zeros((2, 2), np.float32))
    assert x.grad is None and x.requires_grad and x.shape == (2, 2) and x.dtype == np.float32
    x.sum().backward()
    assert np.array_equal(x.grad, np.ones((2, 2))) and x.grad.dtype == np.float32
    constant = Tensor(np.ones(3))
    constant.replace(np.zeros(3))
    assert not constant.requires_grad


# ---------------------------------------------------------------------------------- importing


def test_import_tinyllm_imports_no_slow_library():
    code = "import sys, json, tinyllm; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert {"numpy", "tinyllm"} <= loaded
    slow = {"torch", "transformers", "scipy", "pytest", "matplotlib", "tiktoken", "pooch", "tyro", "tqdm"}
    assert not slow & loaded

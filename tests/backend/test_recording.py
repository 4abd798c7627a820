"""A plan repeats the NumPy calls of two recorded steps, or says that it cannot."""

import numpy as np
import pytest

from tinyllm.backend.recording import NotRepeatable, Plan, recorded, recording


def plan_of(step, inputs, steps=5):
    """The plan of ``step(x, n)``, recorded with the first two of ``inputs`` as x, and the array x."""
    x, calls = np.array(inputs[0]), []
    for n in range(2):
        x[...] = inputs[n]
        with recording() as some:
            result = step(recorded(x), n)
        calls.append(some)
    return Plan(*calls, result.view(np.ndarray), steps), x


def check(step, steps=5):
    """The plan gives what ``step`` gives, in the steps that were recorded, after them and before them."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((steps, 3, 4))
    plan, x = plan_of(step, inputs, steps)
    for n in [1, 2, 3, 4, 2, 0]:
        x[...] = inputs[n]
        np.testing.assert_array_equal(plan(n - 1), step(x, n), strict=True)


def half_in_place(x, n):
    y = np.empty_like(x)
    y[..., :2] = x[..., 2:]
    y[..., 2:] = x[..., :2] * 2
    y[:2] *= 3  # which Python ends by assigning y[:2] to itself
    y -= y.max(axis=-1, keepdims=True)
    return y


STEPS = {
    "ufuncs and reductions": lambda x, n: (np.exp(x) * 2 - x.sum(axis=0)) / x.mean(),
    "axes of length 1, and numbers": lambda x, n: 1 - (x[None, :1] * 2 - 0.5) * x[:1, :1] + x[2] / 3,
    "a row of one element": lambda x, n: 1 / np.sqrt(x[:1, :1] ** 2 + 1e-5) * x,
    "sums of products": lambda x, n: np.einsum("nc,nc->n", x, x)[:, None] * x,
    "halves, in place": half_in_place,
    "a view": lambda x, n: (x + 1).swapaxes(0, 1)[1:].reshape(3, 3),
    "reshape of a transpose, a copy": lambda x, n: (x + 1).T.reshape(2, 6) * 2,
    "rows by integers": lambda x, n: x[np.array([2, 0, 2])] + x[1],
    "assignment to integers": lambda x, n: assigned(x + 0, [0, 2], x[:2]),
    "a product": lambda x, n: x @ x.T,
    "functions without an out argument": lambda x, n: np.where(x > 0, x, np.zeros_like(x)).astype(np.float32),
}


def assigned(y, index, value):
    y[index] = value
    return y


@pytest.mark.parametrize("name", STEPS)
def test_a_plan_computes_what_the_step_computes(name):
    check(STEPS[name])


def test_arrays_may_grow_by_the_same_amount_at_every_step():
    cache = np.zeros((9, 4))

    def step(x, n):
        kept = cache if type(x) is np.ndarray else recorded(cache)
        kept[n] = x[0]
        scores = kept[: n + 1] @ x.T  # (n + 1, 3): offset, shape and strides differ by step
        scores -= scores.max(axis=0)
        return (np.exp(scores).T @ kept[: n + 1]) + 1

    inputs = np.random.default_rng(0).standard_normal((9, 3, 4))
    plan, x = plan_of(step, inputs, 8)
    repeated = []
    for n in range(2, 9):
        x[...] = inputs[n]
        repeated.append(plan(n - 1).copy())
    cache[2:] = 0
    for n in range(2, 9):
        np.testing.assert_array_equal(repeated[n - 2], step(inputs[n], n))
    with pytest.raises((TypeError, ValueError)):  # outside the memory: NumPy refuses to make the view
        plan(9)


NOT_REPEATABLE = {
    "a number that differs": lambda x, n: x * n,
    "an array computed outside": lambda x, n: x + np.full(4, n + 0.5),
    "another function": lambda x, n: np.exp(x) if n else np.abs(x),
    "one call more": lambda x, n: x + 1 if n else x + 1 + 1,
    "an unknown function": lambda x, n: np.linalg.norm(x, axis=0) + np.sort(x, axis=0),
    "several arrays in a list": lambda x, n: np.concatenate([x, x]),
    "several results": lambda x, n: np.modf(x)[0],
}


@pytest.mark.parametrize("name", NOT_REPEATABLE)
def test_other_steps_are_not_repeatable(name):
    with pytest.raises(NotRepeatable):
        plan_of(NOT_REPEATABLE[name], np.random.default_rng(0).standard_normal((2, 3, 4)))


def test_recorded_arrays_compute_as_usual_after_the_recording():
    x = recorded(np.arange(3.0))
    with recording() as calls:
        y = x + 1
    assert (y * 2).tolist() == [2, 4, 6]
    assert len(calls) == 1


def test_products_of_one_row_become_one():
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((out, 4)) for out in (3, 5, 2)]

    def step(x, n):
        row = x[:1] * 2
        a, b = row @ weights[0].T, row @ weights[1].T
        a += 1  # a bias between the products
        c = row @ weights[2].T
        row *= 3  # a product after this has another input
        return a.sum() + b.reshape(5, 1) * c + (row @ weights[0].T).sum()

    inputs = rng.standard_normal((4, 3, 4))
    plan, x = plan_of(step, inputs)
    count, joined = len(plan.calls), []
    plan.fuse_products(lambda matrices: joined.append(len(matrices)) or np.concatenate(matrices))
    assert joined == [3] and len(plan.calls) == count - 2
    for n in range(4):
        x[...] = inputs[n]
        np.testing.assert_allclose(plan(n - 1), step(x, n), rtol=1e-14)

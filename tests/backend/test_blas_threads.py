"""Matrix products and threads: BLAS's own for few rows, and if they sleep for many; else ours for many."""

import os
import subprocess
import sys

import numpy as np
import pytest
import threadpoolctl

from tinyllm.backend import threads
from tinyllm.backend.recording import Plan, recorded, recording


@pytest.mark.parametrize("pool", ["1", "2", "3"])
@pytest.mark.parametrize("columns", [7, 200])  # 200 are split instead of the rows
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17])
@pytest.mark.parametrize("sleep", [True, False])
def test_products_of_many_rows_use_our_threads_unless_those_of_blas_sleep(
    monkeypatch, rows, columns, pool, sleep
):
    monkeypatch.setenv("OMP_NUM_THREADS", pool)
    monkeypatch.setattr(threads, "_BLAS_THREADS_SLEEP", sleep)
    monkeypatch.setattr(threads, "SMALL_PRODUCT", 0 if rows >= threads.FEW_ROWS else 10**9)
    shared_out, run_tasks = [], threads.run_tasks

    def recording(function, tasks):
        shared_out.append(tasks)
        run_tasks(function, tasks)

    monkeypatch.setattr(threads, "run_tasks", recording)
    rng = np.random.default_rng(0)
    a, w = rng.standard_normal((rows, 6)), rng.standard_normal((columns, 6))
    for b in (w.T, np.ascontiguousarray(w.T)):
        out = np.empty((rows, columns))
        for product in (threads.matmul(a, b), threads.matmul(a, b, out=out), out):
            assert np.allclose(product, np.einsum("ik,kj->ij", a, b), rtol=1e-13, atol=1e-13)
    for tasks in shared_out:
        times = np.zeros((rows, columns), int)
        for part in tasks:
            times[part] += 1
        assert (times == 1).all()
        assert len(tasks) <= int(pool)
    assert len(shared_out) == (0 if sleep or rows < 16 else 4)


@pytest.mark.parametrize("limit", [threads.in_this_thread, threads.one_blas_thread])
def test_products_within_a_limit_to_one_thread_take_one(monkeypatch, limit):
    monkeypatch.setattr(threads, "_BLAS_THREADS_SLEEP", True)
    monkeypatch.setattr(
        threads, "run_tasks", lambda function, tasks: shared_out.append(tasks) or function(*tasks)
    )
    monkeypatch.setattr(threads, "SMALL_PRODUCT", 10**9)
    shared_out, a = [], np.ones((20, 30))
    with limit():
        assert (threads.matmul(a, a.T) == 30).all()
    assert len(shared_out) == 1


def test_one_blas_thread_sets_the_limit_once_and_restores_it():
    def counts():
        pools = threadpoolctl.threadpool_info()  # scipy may have loaded its own BLAS since
        return [pool["num_threads"] for pool in pools if "numpy" in pool["filepath"]]

    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        before = counts()
        with pytest.raises(ZeroDivisionError), threads.one_blas_thread():
            with threads.one_blas_thread():
                assert set(counts()) == {1}
            assert set(counts()) == {1}
            raise ZeroDivisionError
        assert counts() == before
        with threads.one_blas_thread():
            assert set(counts()) == {1}
        assert counts() == before


@pytest.mark.parametrize(
    "imports, falls_asleep",
    [("import tinyllm, numpy", True), ("import numpy, tinyllm", False)],
)
def test_blas_timeout_is_set_only_before_numpy_is_imported(imports, falls_asleep):
    code = "print(tinyllm.backend.threads._BLAS_THREADS_SLEEP, os.environ.get('OPENBLAS_THREAD_TIMEOUT'))"
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_THREAD_TIMEOUT"}

    def run(**more):
        command = [sys.executable, "-c", f"import os; {imports}; {code}"]
        return subprocess.check_output(command, text=True, env=environment | more).split()

    assert run() == [str(falls_asleep), "20" if falls_asleep else "None"]
    assert run(OPENBLAS_THREAD_TIMEOUT="7") == ["True", "7"]  # the user's setting is kept


@pytest.mark.parametrize("rows", [2, 3, 8, 15])
@pytest.mark.parametrize(("outputs", "inputs"), [(1500, 700), (64, 20_000), (67, 9_001), (4099, 300)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_of_few_rows_in_blocks_equal_whole_ones(rows, outputs, inputs, dtype):
    """Also with an ``out``, a bias, and numbers of rows that the blocks do not divide."""
    rng = np.random.default_rng(0)
    w, x, bias = (
        rng.standard_normal(shape).astype(dtype) for shape in ((outputs, inputs), (rows, inputs), outputs)
    )
    expected = x.astype(np.float64) @ w.T + bias
    found, out = threads.matmul(x, w.T, bias=bias), np.empty((rows, outputs), dtype)
    assert threads.matmul(x, w.T, out=out, bias=bias) is out and np.array_equal(found, out)
    assert found.dtype == dtype
    assert (
        np.abs(found - expected).max() <= 30 * np.finfo(dtype).eps * np.sqrt(inputs) * np.abs(expected).max()
    )


def test_few_rows_are_recorded_as_one_call_and_repeated():
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((1500, 700)), rng.standard_normal((4, 700))
    calls = []
    for _ in range(2):
        with recording() as some:
            result = threads.matmul(recorded(x), w.T)
        calls.append(some)
    assert [len(some) for some in calls] == [1, 1]
    plan = Plan(*calls, result.view(np.ndarray), 5)
    x[...] = rng.standard_normal(x.shape)
    assert np.array_equal(plan(1), threads.matmul(x, w.T))


def test_products_of_the_same_few_rows_become_one_call(monkeypatch):
    """Unless the rows change between them, or a matrix is computed in the step."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    rng = np.random.default_rng(0)
    weights, x = [rng.standard_normal((n, 700)) for n in (500, 192, 67, 300)], rng.standard_normal((4, 700))

    def step(x):
        rows = x * 2
        q, k = threads.matmul(rows, weights[0].T), threads.matmul(rows, weights[1].T)
        q += 1  # a bias between the products
        v = threads.matmul(rows, weights[2].T)
        scaled = np.multiply(x[:1], weights[3], out=np.empty_like(x, shape=weights[3].shape))
        last = threads.matmul(rows, scaled.T)
        rows += 1
        return (
            q.sum(axis=1)
            + (k * 3).sum(axis=1)
            + v.sum(axis=1)
            + last.sum(axis=1)
            + (threads.matmul(rows, weights[0].T).sum(axis=1))
        )

    calls = []
    for _ in range(2):
        with recording() as some:
            result = step(recorded(x))
        calls.append(some)
    plan = Plan(*calls, result.view(np.ndarray), 5)
    plan.merge(threads.few_rows.__wrapped__)
    merged = [len(call.args) for call in plan.calls if call.function is threads.few_rows.__wrapped__]
    assert merged == [7, 3, 3]
    x[...] = rng.standard_normal(x.shape)
    np.testing.assert_allclose(plan(1), step(x), rtol=1e-12)

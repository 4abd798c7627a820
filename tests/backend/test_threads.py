"""Tasks on all cores: every task runs once, all threads take part, and exceptions propagate."""

import os
import threading
import time

import numpy as np
import pytest

from tinyllm import Tensor, functional
from tinyllm.backend import threads


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")


@pytest.mark.parametrize(
    "omp, openblas, asked",
    [
        ("3", "2", 3),
        ("3", None, 3),
        (None, "2", 2),
        ("", "2", 2),
        ("0", "2", 2),
        ("x", "2", 2),
        (None, None, None),
    ],
)
def test_num_threads_follows_environment_variables(monkeypatch, omp, openblas, asked):
    for name, value in (("OMP_NUM_THREADS", omp), ("OPENBLAS_NUM_THREADS", openblas)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads.num_threads() == (asked or cores)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
def test_every_task_runs_once(count):
    done = []
    threads.run_tasks(done.append, list(range(count)))
    assert sorted(done) == list(range(count))


def test_all_threads_including_this_one_run_tasks():
    together = threading.Barrier(3, timeout=10)  # breaks unless three threads meet
    met = []

    def meet(_):
        met.append(threading.get_ident())
        together.wait()

    threads.run_tasks(meet, [0, 1, 2])
    assert threading.get_ident() in met and len(set(met)) == 3


@pytest.mark.parametrize("elements, number", [(0, 1), (3 * 2**17, 1), (3 * 2**17 + 1, 3)])
def test_work_on_few_elements_stays_in_this_thread(elements, number):
    used, together = set(), threading.Barrier(number, timeout=10)

    def task(_):
        used.add(threading.get_ident())
        together.wait()

    threads.run_tasks(task, [0, 1, 2], elements)
    assert len(used) == number and (number > 1 or used == {threading.get_ident()})


def test_nested_tasks_stay_in_their_thread():
    found = {}

    def outer(task):
        assert threads.in_task()
        threads.run_tasks(lambda inner: found.setdefault((task, inner), threading.get_ident()), [0, 1, 2])
        assert threads.in_task()  # also after the nested tasks ended
        found[task] = threading.get_ident()

    threads.run_tasks(outer, [0, 1, 2, 3])
    assert not threads.in_task()
    assert all(found[task, inner] == found[task] for task in range(4) for inner in range(3))


@pytest.mark.parametrize("number", range(6))
def test_exceptions_are_raised_after_the_other_tasks_end(number):
    at_work = []

    def work(task):
        if task == number:
            raise ZeroDivisionError(task)
        at_work.append(task)
        time.sleep(0.02)
        at_work.remove(task)

    with pytest.raises(ZeroDivisionError, match=str(number)):
        threads.run_tasks(work, list(range(6)))
    assert at_work == []  # no thread is still writing
    assert not threads.in_task()
    threads.run_tasks(at_work.append, list(range(6)))  # the pool still works
    assert sorted(at_work) == list(range(6))


def test_numpy_error_state_applies_in_every_thread():
    together = threading.Barrier(3, timeout=10)

    def overflow(_):
        together.wait()
        np.float32(3e38) * np.float32(10)

    with np.errstate(over="ignore"):
        threads.run_tasks(overflow, [0, 1, 2])
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        threads.run_tasks(overflow, [0, 1, 2])


@pytest.mark.parametrize("rows, columns", [(40, 3), (5, 3), (0, 3), (2000, 700), (20, 7000)])
def test_matmul_adds_the_bias_to_every_row(rows, columns):
    rng = np.random.default_rng(0)
    a, b, bias = (rng.standard_normal(shape) for shape in ((rows, 8), (8, columns), (columns,)))
    out = np.empty((rows, columns))
    assert threads.matmul(a, b, out=out, bias=bias) is out
    np.testing.assert_allclose(out, np.einsum("ik,kj->ij", a, b) + bias, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(threads.matmul(a, b, bias=bias), out)


def test_threads_share_blocks_of_attention_forward_and_heads_backward(monkeypatch):
    shares, run_tasks = [], threads.run_tasks

    def recording(function, tasks, elements):
        shares.append(len(tasks))
        run_tasks(function, tasks, elements)

    monkeypatch.setattr(functional.attention, "run_tasks", recording)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    # A block of all 4 heads, 128 queries and 512 keys fits the cache.
    x = Tensor(np.zeros((1, 4, 512, 1), np.float32), requires_grad=True)
    out = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    out.backward(np.ones_like(out.data))
    assert shares == [4, 2]

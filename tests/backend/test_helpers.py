"""Parts of a short piece of work run in threads of their own."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tinyllm.backend import threads
from tinyllm.backend.helpers import run_parts


@pytest.mark.parametrize("count", [1, 2, 4, 2])
def test_each_part_runs_once_in_its_own_thread(count):
    ran = []
    run_parts(lambda part: ran.append((part, threading.get_ident())), list(range(count)))
    assert sorted(part for part, _ in ran) == list(range(count))
    assert len({thread for _, thread in ran}) == count
    assert dict(ran)[0] == threading.get_ident()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_is_raised_when_all_parts_are_done(failing):
    done = []

    def work(part):
        if part == failing:
            raise ZeroDivisionError
        done.append(part)

    for _ in range(2):  # and the helpers go on
        with pytest.raises(ZeroDivisionError):
            run_parts(work, [0, 1, 2])
    assert sorted(done) == sorted(2 * list({0, 1, 2} - {failing}))


def test_the_context_holds_in_every_thread():
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("error")
        run_parts(lambda part: np.zeros(1) / 0, [0, 1, 2])


def test_several_threads_may_hand_out_work_at_once():
    def total(n):
        sums = [0, 0]
        run_parts(lambda part: sums.__setitem__(part, sum(range(part, n, 2))), [0, 1])
        return sum(sums)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(total, range(200))) == [n * (n - 1) // 2 for n in range(200)]


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("head_start", [0, 40, 1000])
def test_matrices_are_divided_among_threads_without_a_gap(number, head_start):
    pairs = [(np.arange(n)[:, None], np.arange(n)[None]) for n in (100, 7, 64, 1)]
    parts = threads._divided(pairs, 172, number, head_start, 8)
    assert len(parts) <= number and all(parts)
    rows = np.concatenate([w[:, 0] for part in parts for w, _ in part])
    assert rows.tolist() == [i for w, _ in pairs for i in range(len(w))]
    assert all(np.array_equal(w[:, 0], out[0]) for part in parts for w, out in part)

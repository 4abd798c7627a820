"""The benchmark of a GPU without a GPU: a request, a record, and processes with given answers."""

from dataclasses import replace

import numpy as np

from parity.bench.cuda import measure
from parity.bench.cuda.measure import Job, Request
from parity.bench.cuda.variants import VARIANTS
from parity.bench.cuda.works import SMALL_WORKS, WORKS

TASKS = list(SMALL_WORKS)

REQUEST = Request("cpu", ("train",), ("float32",), VARIANTS, True, 1, 1, 2, "eager")


def record(seconds, peak_bytes, product_rate=2e15, whole_bytes=9 * 10**9, difference=1e-3):
    """A record as ``run_variant`` and ``measure`` return it."""
    return dict(
        seconds=seconds, peak_bytes=peak_bytes, product_rate=product_rate, whole_bytes=whole_bytes,
        device="Paper GPU", difference=difference, losses=[2.0, 1.5, 1.25],
    )  # fmt: skip


def answer(monkeypatch, tmp_path, **arrays):
    """``measure`` with processes that return these arrays (variant_with_underscores=array); None: failure."""

    def measure_once(job: Job, number: int) -> dict:
        array = arrays[job.variant.replace("-", "_")]
        if array is None:
            return {"failed": "no compiler"}
        np.save(job.answers, np.array(array, np.float32))
        return {key: value for key, value in record(1.0, 1).items() if key != "difference"} | {
            "device": "cpu"
        }

    monkeypatch.setattr(measure, "measure_once", measure_once)
    request = replace(REQUEST, variants=tuple(name.replace("_", "-") for name in arrays))
    return lambda task, precision, rounds=1: measure.measure(
        WORKS[task], precision, tmp_path, replace(request, rounds=rounds)
    )

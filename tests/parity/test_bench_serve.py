"""``bench serve``: an end-to-end run on a tiny model, and what its report says about a result."""

import copy

import pytest
from support.chat_model import write_model

from parity.bench import serve as bench
from parity.bench.serve import Reply, Sizes

pytest.importorskip("uvicorn")

SMALL = Sizes(
    clients=(1, 2), steady=1, prompt=4, new=6, crowd=6, seconds=3, slots=2, queue=1, context=900,
    history=20, turns=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return bench.serve(str(write_model(tmp_path_factory.mktemp("tiny"), context=1024)), 1, SMALL)


def test_a_run_on_a_tiny_model(result):
    assert list(result["tokens per second"]) == [1, 2] and min(result["tokens per second"].values()) > 0
    assert result["first turn"] > 0 and result["second turn"] > 0
    crowd = result["crowd"]
    assert set(crowd["statuses"]) == {200, 503} and crowd["problems"] == []
    assert crowd["tokens"] > 0 and len(crowd["firsts"]) <= crowd["statuses"][200]
    assert "| 2 |" in bench.report(result)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda result: result["tokens per second"].update({1: 10.0, 8: 24.0}), "2.40"),
        (lambda result: result.update({"first turn": 1.0, "second turn": 0.6}), "0.60"),
        (lambda result: result["crowd"]["statuses"].update({500: 1}), "500"),
        (lambda result: result["crowd"]["problems"].append("the stream has no end"), "1 streams"),
        (lambda result: result["crowd"].update(memory=[100, 100, 100, 106]), "6.0%"),
    ],
)
def test_a_target_that_is_not_met_is_named(result, change, problem):
    good = copy.deepcopy(result) | {
        "first turn": 1.0,
        "second turn": 0.2,
        "tokens per second": {1: 10.0, 8: 26.0},
    }
    good["crowd"]["memory"] = [100, 101, 100]
    assert bench.not_met(good) == []
    change(good)
    (found,) = bench.not_met(good)
    assert problem in found and problem in bench.markdown(good)


def test_the_growth_of_memory_is_that_of_the_two_numbers_before_it(result):
    made = copy.deepcopy(result)
    made["crowd"]["memory"] = [100_000_000, 90_000_000, 95_000_000, 95_000_000, 106_000_000, 91_000_000]
    assert "100 MB, 106 MB (+6.0%)" in bench.markdown(made)


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([], "no end"),
        ([b'{"choices": [{"text": "a", "finish_reason": null}]}'], "no end"),
        ([b'{"choices": [{"text": "a", "finish_reason": null}]}', b"[DONE]"], "no reason"),
        ([b'{"error": {}}', b"[DONE]"], "no reason"),
    ],
)
def test_a_stream_that_is_not_whole_is_seen(events, problem):
    assert problem in bench._read(events, Reply())

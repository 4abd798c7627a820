"""The benchmark runs end to end, and its numbers follow from what it recorded."""

import json
import math
import subprocess
import sys
from statistics import median

import pytest

from parity import bench

pytest.importorskip("resource", reason="the benchmark reads page faults and memory through resource")
pytest.importorskip("torch")
pytest.importorskip("transformers")


def parity(*arguments):
    return subprocess.run([sys.executable, "-m", "parity", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What ``bench train`` printed and wrote for a tiny model: two rounds of 2 warm-up and 3 timed steps."""
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    counts = ["--rounds", "2", "--warmup", "2", "--steps", "3", "--threads", "1"]
    done = parity("bench", "train", "--work", "tiny", *counts, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return done, json.loads(path.read_text(encoding="utf-8"))


def test_every_variant_runs_in_every_round_in_turn(tiny):
    done, result = tiny
    assert result["request"] == {"work": "tiny", "rounds": 2, "warmup": 2, "steps": 3, "threads": 1}
    assert list(result["runs"]) == ["tinyllm", "torch-eager"]
    turns = [line.split(" …")[0] for line in done.stderr.splitlines() if line.startswith("round")]
    expected = [f"round {number}/2: {variant}" for number in (1, 2) for variant in result["runs"]]
    assert turns == expected
    for rounds in result["runs"].values():
        assert len(rounds) == 2
        for run in rounds:
            assert len(run["seconds"]) == len(run["page_faults"]) == 3
            assert all(value > 0 for value in run["seconds"])
            assert all(value >= 0 for value in run["page_faults"])
            assert run["peak_bytes"] > 1e7  # an interpreter with NumPy


def test_both_variants_train_the_same_kind_of_model(tiny):
    """Random tokens and small random weights: the loss starts near that of a uniform guess, log V."""
    uniform = math.log(bench.WORKS["tiny"].vocab_size)
    for rounds in tiny[1]["runs"].values():
        for run in rounds:
            assert len(run["losses"]) == 2 + 3  # the warm-up's are recorded too
            assert all(abs(loss - uniform) < 0.2 for loss in run["losses"])
            assert len(set(run["losses"])) == 5  # new tokens, or new weights, in every step
        # Same seeds and one thread: the second process repeats the first.
        assert rounds[0]["losses"] == pytest.approx(rounds[1]["losses"], rel=1e-6)


def test_a_variants_process_holds_its_own_libraries_only(tiny):
    runs = tiny[1]["runs"]
    assert set(runs["tinyllm"][0]["libraries"]) == {"numpy"}
    assert set(runs["torch-eager"][0]["libraries"]) == {"numpy", "torch", "transformers"}


def test_summary_and_ratios_follow_from_the_runs(tiny):
    done, result = tiny
    ours, theirs = result["runs"]["tinyllm"], result["runs"]["torch-eager"]
    for variant, rounds in result["runs"].items():
        seconds = [*rounds[0]["seconds"], *rounds[1]["seconds"]]
        summary = result["variants"][variant]
        assert summary["seconds"] == {"median": median(seconds), "min": min(seconds), "max": max(seconds)}
        assert summary["tokens_per_s"] == pytest.approx(2 * 16 / median(seconds))
        assert f"{summary['seconds']['median']:.4f}" in done.stdout
    recomputed = {
        "time (medians)": [median(a["seconds"]) / median(b["seconds"]) for a, b in zip(ours, theirs)],
        "time (minima)": [min(a["seconds"]) / min(b["seconds"]) for a, b in zip(ours, theirs)],
        "peak memory": [a["peak_bytes"] / b["peak_bytes"] for a, b in zip(ours, theirs)],
    }
    for name, values in recomputed.items():
        ratio = result["ratios"]["torch-eager"][name]
        assert ratio["rounds"] == pytest.approx(values)
        assert ratio["median"] == pytest.approx(sum(values) / 2)
        assert [ratio["min"], ratio["max"]] == pytest.approx(sorted(values))
        assert f"{ratio['median']:.3f}" in done.stdout


def test_ratios_are_paired_by_round():
    """A machine twice as slow in one round changes both times, not their ratio."""
    seconds = {"tinyllm": ([1.0, 2.0, 9.0], [4.0, 5.0, 3.0]), "torch-eager": ([4.0], [8.0])}
    runs = {v: [{"seconds": s, "peak_bytes": 1} for s in rounds] for v, rounds in seconds.items()}
    assert bench.compare(runs)["torch-eager"]["time (medians)"]["rounds"] == [0.5, 0.5]
    assert bench.compare(runs)["torch-eager"]["time (minima)"]["rounds"] == [0.25, 0.375]


def test_peak_memory_is_this_process_alone():
    """A child of a large process is not counted as large: on Linux ru_maxrss would say so."""
    code = "from parity.bench import peak_memory; print(peak_memory())"
    ballast = bytearray(b"x") * 200_000_000
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(ballast) / 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--work", "huge"], "--work huge is unknown; choose one of gpt2-124m,"),
        (["--rounds", "0"], "--rounds 0 is too small; give at least 1"),
        (["--warmup", "-1"], "--warmup -1 is too small; give at least 0"),
        (["--json", "no/such/folder/x.json"], "cannot be written; name a file in a folder that exists"),
        (["--steps", "many"], "Error parsing --steps: invalid literal for int() with base 10: 'many'; see "),
        (["--stepz", "3"], "Unrecognized options: --stepz, 3; see python -m parity bench train --help"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(arguments, sentence):
    done = parity("bench", "train", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_command_is_one_sentence_and_exit_code_2():
    done = parity("bench", "sleep")
    assert (done.returncode, done.stdout) == (2, "")
    known = "python -m parity bench train --help or python -m parity report --help"
    assert done.stderr == f"there is no command 'bench sleep'; try {known}\n"


def test_a_failing_variant_ends_the_benchmark_with_code_1():
    """Its own process does not know this variant's name: no result, and no report without it."""
    with pytest.raises(SystemExit, match=r"no-such-variant failed in round 1 \(code 1\): no report"):
        bench.measure(bench.WORKS["tiny"], ["no-such-variant"], rounds=1, warmup=0, steps=1, threads=1)

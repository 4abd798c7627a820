"""``bench scaling``: an end-to-end run, its tables, its plot, and the exponents of growth."""

import json
import math

import pytest
from support.pictures import close, legend, saved_figures
from support.pictures import points as drawn

from parity import tables
from parity.__main__ import main
from parity.bench import pages
from parity.bench import scaling as bench_scaling
from parity.bench.train_variants import Work

pytest.importorskip("resource", reason="the benchmark reads page faults and memory through resource")
pytest.importorskip("torch")
pytest.importorskip("transformers")

TINY = Work(n_layer=1, n_embd=8, n_head=2, n_positions=32, vocab_size=16, batch=1, context=16)
AXES = {"context": ("context (tokens)", [16, 32], {}), "batch": ("batch (sequences)", [1, 2], {})}


def points(sizes, costs):
    """The points of one axis as ``scaling`` returns them, with these costs for both variants."""
    each = [{name: {"median": cost} for name in bench_scaling.COSTS} for cost in costs]
    return [
        {"size": size, "work": {}, "threads": 1, "costs": dict.fromkeys(bench_scaling.VARIANTS, cost)}
        for size, cost in zip(sizes, each)
    ]


def test_scaling_end_to_end(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench_scaling, "AXES", AXES)
    monkeypatch.setattr(bench_scaling, "BASE", TINY)
    monkeypatch.setattr(bench_scaling, "BASE_THREADS", 1)
    measured, measure = [], bench_scaling.measure

    def measure_torch_once(work, variants, **counts):
        """PyTorch takes four seconds to load, so its first measurement stands for the others."""
        assert variants == bench_scaling.VARIANTS
        runs = measure(work, variants[: 1 if measured else 2], **counts)
        measured.append(runs)
        return measured[0] | runs

    monkeypatch.setattr(bench_scaling, "measure", measure_torch_once)
    out, path = tmp_path / "new" / "folder", tmp_path / "scaling.json"
    options = ["--axes", *AXES, "--warmup", "1", "--steps", "2", "--out", str(out), "--json", str(path)]
    assert main(["bench", "scaling", *options]) == 0

    captured, result = capsys.readouterr(), json.loads(path.read_text(encoding="utf-8"))
    # 4 points, one of which the two axes share
    assert captured.err.count("tinyllm …") == len(measured) == 3
    assert captured.err.count("torch-eager …") == 1
    for axis, (label, sizes, _) in AXES.items():
        assert label in captured.out
        assert [point["size"] for point in result["axes"][axis]] == sizes
        for point in result["axes"][axis]:
            assert point["work"][axis] == point["size"] and point["threads"] == 1
            for costs in point["costs"].values():
                assert costs["seconds"]["median"] > 0
                assert costs["peak_bytes"]["median"] > costs["training_bytes"]["median"] >= 0
                assert f"{costs['seconds']['median']:.4f}" in captured.out
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "process MB" in captured.out and str(out / "scaling.png") in captured.out

    labels = {axis: label for axis, (label, *_) in AXES.items()}
    text = bench_scaling.markdown(result, labels)
    assert tables.first_cells(text) == [list(labels.values())]
    grown = bench_scaling.exponents(result["axes"]["batch"], "seconds")
    assert f"| 1 to 2 | {grown[0]} | {grown[1]} |" in text and "torch" in text


@pytest.mark.parametrize(
    "maker, instructions", [("Intel", "avx512"), ("AMD", "avx2"), ("AMD", "avx512")]
)  # on an Intel with AVX2 it was not measured yet
def test_the_written_table_has_every_axis(maker, instructions):
    (axes,) = tables.first_cells(tables.read(pages.page_of({"cpu": maker}), f"scaling-{instructions}"))
    assert axes == [label for label, *_ in bench_scaling.AXES.values()], (
        "run: python -m parity bench scaling --write"
    )


def test_the_plot_shows_growth_and_ratio_of_every_axis(monkeypatch, tmp_path):
    figures = saved_figures(monkeypatch)
    grown = points([2, 4, 8], [3.0, 6.0, 15.0])
    for point in grown:
        point["costs"] = {"tinyllm": point["costs"]["tinyllm"], "torch-eager": {"seconds": {"median": 12.0}}}
        point["costs"]["torch-eager"]["training_bytes"] = {"median": 0}  # too little to measure
    bench_scaling.plot({"axes": {"batch": grown}}, {"batch": "batch (sequences)"}, tmp_path / "scaling.png")
    growth, ratio, memory_growth, memory_ratio = figures[0].axes
    close(drawn(growth.lines[0]), [(1, 1), (2, 2), (4, 5)])
    close(drawn(ratio.lines[0]), [(1, 0.25), (2, 0.5), (4, 1.25)])
    close(drawn(memory_growth.lines[0]), [(1, 1), (2, 2), (4, 5)])
    assert all(math.isnan(y) for _, y in drawn(memory_ratio.lines[0]))
    assert legend(figures[0]) == ["batch (sequences), 2 to 8"]


@pytest.mark.parametrize("power", [0, 1, 2])
def test_exponent_of_a_power_law_is_its_power(power):
    grown = points([1, 2, 8], [999.0, 3 * 2**power, 3 * 8**power])
    assert bench_scaling.exponent(grown, "tinyllm", "seconds") == pytest.approx(power)


def test_a_cost_of_zero_has_no_exponent_and_no_ratio():
    assert math.isnan(bench_scaling.exponent(points([1, 2], [0, 5]), "tinyllm", "training_bytes"))
    assert (bench_scaling.quotient(1, 0), bench_scaling.quotient(1, 4)) == ("–", "0.25")


def test_every_point_of_every_axis_is_a_valid_model():
    for axis, (_, sizes, others) in bench_scaling.AXES.items():
        assert len(sizes) >= 2
        for size in sizes:
            work, threads = bench_scaling.point_of(bench_scaling.BASE, axis, size, others)
            assert work.context <= work.n_positions and work.n_embd % work.n_head == 0
            assert (threads if axis == "threads" else getattr(work, axis)) == size


def test_costs_are_the_fastest_step_and_the_memory_beyond_the_model():
    runs = [{"seconds": [3.0, 2.0, 4.0], "peak_bytes": 100, "built_bytes": 60}]
    costs = bench_scaling.costs_of(runs)
    assert [costs[name]["median"] for name in ("seconds", "training_bytes", "peak_bytes")] == [2.0, 40, 100]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--axes", "depth"],
            "--axes depth",
        ),
        (["--axes", "batch", "--write"], "--axes"),
        (["--steps", "0"], "--steps 0"),
        (["--out", __file__], f"--out {__file__}"),
        (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json"),
    ],
)
def test_wrong_arguments_give_one_sentence_and_exit_code_2(capsys, arguments, sentence):
    pytest.importorskip("matplotlib")
    assert main(["bench", "scaling", *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and captured.out == ""

"""``bench --device``: figures from given measurements, and the comparison of the variants' answers."""

from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
from support.bench_cuda import REQUEST, TASKS, answer, record

from parity.bench.cuda import measure, report
from parity.bench.cuda.answers import bound_of
from parity.bench.cuda.variants import prepare
from parity.bench.cuda.works import PRECISIONS, SMALL_WORKS, WORKS
from parity.bench.targets import target_table

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("resource", reason="on a CPU the benchmark reads the process's memory through resource")


def test_head_contains_gpu_driver_versions_and_command(cupy, monkeypatch):
    smi = SimpleNamespace(stdout="570.86.15\n570.86.15\n")
    monkeypatch.setattr(report.subprocess, "run", lambda *_, **__: smi)
    facts = report.gpu_facts()
    assert facts == {
        "GPU": "Paper GPU",
        "driver": "570.86.15 for CUDA up to 12.9",
        "numpy": np.__version__,
        "cupy": "14.2.0 with CUDA 12.8",
        "torch": f"{torch.__version__} with CUDA {torch.version.cuda}",
    }
    head = measure.head("python -m …", replace(REQUEST, device="cuda", small=False), facts)
    assert head[0] == "python -m …" and head[1].startswith("GPU Paper GPU, driver 570.86.15 for CUDA up to")
    assert "8192 x 8192 GEMM" in head[2] and not any("NO GPU" in line for line in head)

    def no_such_program(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(report.subprocess, "run", no_such_program)
    assert report.gpu_facts()["driver"] == "unknown (nvidia-smi failed) for CUDA up to 12.9"


def test_targets_are_the_time_and_memory_of_eager_by_round():
    """In the second round the machine is half as fast, but the ratios stay."""
    runs = {
        "tinyllm": [record(0.9, 30), record(1.8, 30), record(2.0, 30)],
        "torch-eager": [record(1.0, 20), record(2.0, 20), record(1.0, 20)],
        "torch-compile": [{"failed": "no triton"}],
    }
    case = report.summarise(WORKS["train"], "tf32", runs)
    rows = report.target_rows({"train tf32": case})
    assert [(row["work"], row["cost"], row["against"]) for row in rows] == [
        ("train tf32", "time", ("torch-eager",)), ("train tf32", "peak memory", ("torch-eager",)),
    ]  # fmt: skip
    assert [row["at_most"] for row in rows] == [1.0, 1.0]
    assert rows[0]["rounds"] == pytest.approx([0.9, 0.9, 2.0])
    assert [(row["measured"], row["verdict"]) for row in rows] == [(0.9, "met"), (1.5, "not met")]
    table = target_table(rows)
    assert table[1].split() == "train tf32 time torch-eager 1 0.900 0.900 to 2.000 met".split()
    assert table[2].endswith("not met")


def test_targets_without_their_peer_are_not_measured():
    case = report.summarise(WORKS["decode"], "float32", {"tinyllm": [record(1.0, 1)]})
    rows = report.target_rows({"decode float32": case})
    assert [row["verdict"] for row in rows] == ["not measured"] * 2 and case["ratios"] == {}


def test_figures_are_medians_and_ranges_over_the_rounds():
    seconds = [1.0, 4.0, 2.0]
    runs = {
        "tinyllm": [
            record(s, 10**9 * m, difference=d) for s, m, d in zip(seconds, (1, 5, 2), (0.1, 0.3, 0.2))
        ],
        "torch-compile": [record(2.0, 10**9), record(2.0, 10**9), record(2.0, 10**9)],
        "torch-eager": [record(4.0, 10**9), record(4.0, 10**9), record(4.0, 10**9)],
    }
    work = WORKS["train"]
    case = report.summarise(work, "bfloat16", runs)
    figures, tokens = case["variants"]["tinyllm"], 16 * 1024
    assert figures["tokens_per_s"] == {"median": tokens / 2, "min": tokens / 4, "max": tokens}
    assert figures["utilisation"] == pytest.approx(
        median(tokens / s for s in seconds) * work.flops_per_token() / 2e15
    )
    assert figures["peak_bytes"] == 2 * 10**9 and figures["whole_bytes"] == 9 * 10**9
    assert figures["difference"] == 0.3 and case["bound"] == 5e-3
    assert list(case["ratios"]) == ["torch-eager", "torch-compile"]
    assert case["ratios"]["torch-eager"]["time"]["rounds"] == [0.25, 1.0, 0.5]
    assert case["ratios"]["torch-compile"]["peak memory"]["median"] == 2.0
    table = report.case_table(case)
    utilisation = f"{figures['utilisation']:.1%}"
    assert table[1].split() == ["tinyllm", "8,192", "4,096", "16,384", utilisation, "2e+03", "2.00", "9.00",
                                "0.3"]  # fmt: skip
    assert "tinyllm losses 2.00000, 1.50000, 1.25000".split() in [line.split() for line in table]
    assert "time 0.500 0.250 1.000 0.250 1.000 0.500".split() in [line.split() for line in table]


def test_a_failed_compiler_gets_a_row_and_the_other_variants_continue(monkeypatch, capsys, tmp_path):
    measured = answer(monkeypatch, tmp_path, tinyllm=[1.0], torch_eager=[1.0], torch_compile=None)
    runs = measured("train", "float32", rounds=2)
    turns = [line.split(" …")[0] for line in capsys.readouterr().err.splitlines()]
    first = [f"round 1/2: {variant}" for variant in ("tinyllm", "torch-eager", "torch-compile")]
    assert turns == [*first, "round 2/2: tinyllm", "round 2/2: torch-eager"]
    case = report.summarise(SMALL_WORKS["train"], "float32", runs)
    assert list(case["ratios"]) == ["torch-eager"] and len(runs["torch-eager"]) == 2
    (row,) = (line for line in report.case_table(case) if line.startswith("torch-compile"))
    assert row.split() == "torch-compile failed: no compiler".split()
    alone = report.summarise(SMALL_WORKS["train"], "float32", {"torch-compile": [{"failed": "no compiler"}]})
    assert report.case_table(alone)[1:] == [row]


# ---- Only equal computations are compared ----


def test_losses_are_relative_to_themselves_and_logits_to_the_largest(monkeypatch, tmp_path):
    measured = answer(monkeypatch, tmp_path, tinyllm=[10.0, 0.102], torch_eager=[10.0, 0.1])
    runs = measured("forward", "bfloat16")
    assert runs["tinyllm"][0]["difference"] == pytest.approx(2e-4, rel=1e-3)
    assert runs["torch-eager"][0]["difference"] == 0
    with pytest.raises(
        SystemExit, match=r"train.*bfloat16: tinyllm's losses differ from the reference by 0\.02, .* 0\.005"
    ):
        measured("train", "bfloat16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("task", TASKS)
def test_a_difference_exits_only_beyond_the_bound(monkeypatch, tmp_path, task, precision):
    bound = bound_of(WORKS[task], precision)
    measured = answer(monkeypatch, tmp_path, tinyllm=[1 + 0.9 * bound], torch_eager=[1.0])
    assert measured(task, precision)["tinyllm"][0]["difference"] == pytest.approx(0.9 * bound, rel=0.01)
    measured = answer(monkeypatch, tmp_path, tinyllm=[1 + 1.1 * bound], torch_eager=[1.0])
    with pytest.raises(SystemExit, match="differ from the reference"):
        measured(task, precision)


@pytest.mark.parametrize("wrong", [[np.nan, 1.0], [np.inf, 1.0], [1.0]])
def test_answers_that_are_not_finite_or_too_few_exit(monkeypatch, tmp_path, wrong):
    for arrays in (
        {"tinyllm": wrong, "torch_eager": [1.0, 1.0]},
        {"tinyllm": [1.0, 1.0], "torch_eager": wrong},
    ):
        with pytest.raises(SystemExit, match=r"losses (differ from the reference by (nan|inf)|have shape)"):
            answer(monkeypatch, tmp_path, **arrays)("train", "float32")


def test_a_wrong_model_exceeds_the_bound(monkeypatch, weights):
    """One matrix of one side is scaled by 1.01, which exceeds the bound of float32."""
    work, folder = SMALL_WORKS["forward"], str(weights["forward"])
    right, wrong = (
        prepare(variant, "float32", "cpu", work, folder, "") for variant in ("tinyllm", "torch-eager")
    )
    cells = wrong.once.__closure__
    reference = right.answers()
    (module,) = (cell.cell_contents for cell in cells if isinstance(cell.cell_contents, torch.nn.Module))
    with torch.no_grad():
        module.layers[1].mlp.down_proj.weight *= 1.01
    difference = np.abs(wrong.answers() - reference).max() / np.abs(reference).max()
    assert difference > bound_of(work, "float32")


@pytest.mark.parametrize(("requested", "actual"), [("cuda", "cpu"), ("cpu", "Paper GPU")])
def test_a_run_on_another_device_exits(requested, actual):
    with pytest.raises(SystemExit, match=f"torch-eager ran on {actual} instead of {requested}"):
        measure.check_device("torch-eager", requested, actual)

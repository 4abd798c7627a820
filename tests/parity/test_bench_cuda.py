"""``bench --device``: end-to-end runs of small models in processes of their own, and wrong arguments."""

import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from support.bench_cuda import REQUEST, TASKS, record

from parity.__main__ import COMMANDS, main
from parity.bench.cuda import measure, report
from parity.bench.cuda.measure import Job
from parity.bench.cuda.variants import VARIANTS
from parity.bench.cuda.works import PRECISIONS, SMALL_WORKS

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("resource", reason="on a CPU the benchmark reads the process's memory through resource")


def parity(*arguments):
    return subprocess.run([sys.executable, "-m", "parity", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Output and JSON of ``bench --device cpu --small`` for every work, one round.

    The first work is measured in processes of their own; the others in this one, which has loaded PyTorch.
    """
    path = tmp_path_factory.mktemp("bench") / "small.json"
    options = "--small --rounds 1 --warmup 1 --steps 2 --variants tinyllm torch-eager".split()
    in_a_process = measure.measure_once

    def measure_once(job, number):
        if job.work.task == TASKS[0]:
            return in_a_process(job, number)
        return measure.run_or_report_failure(measure.job_of(json.loads(json.dumps(asdict(job)))))

    with (
        mock.patch.object(measure, "measure_once", measure_once),
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
    ):
        code = main(["bench", "--device", "cpu", *options, "--json", str(path)])
    assert code == 0, err.getvalue()
    done = SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
    return done, json.loads(path.read_text(encoding="utf-8"))


def test_every_work_is_measured_and_the_sides_agree(small):
    done, result = small
    assert list(result["cases"]) == [f"{task} float32" for task in TASKS]
    for name, case in result["cases"].items():
        assert list(case["runs"]) == ["tinyllm", "torch-eager"] and case["failed"] == {}
        for variant, (run,) in case["runs"].items():
            assert run["device"] == "cpu" and run["whole_bytes"] is None
            assert run["seconds"] > 0 and run["product_rate"] > 0 and run["peak_bytes"] > 1e7
            assert f"round 1/1: {variant} … " in done.stderr
        ours, theirs = (case["runs"][variant][0]["difference"] for variant in case["runs"])
        assert theirs == 0 and 0 < ours <= case["bound"] == 5e-5, name


def test_printed_figures_are_computed_from_the_recorded_ones(small):
    done, result = small
    for name, case in result["cases"].items():
        work, (ours,), (theirs,) = SMALL_WORKS[name.split()[0]], *case["runs"].values()
        assert f"{work}, float32" in done.stdout
        for variant, run in {"tinyllm": ours, "torch-eager": theirs}.items():
            rate = work.tokens / run["seconds"]
            figures = case["variants"][variant]
            assert figures["tokens_per_s"]["median"] == pytest.approx(rate)
            utilisation = rate * case["flops_per_token"] / run["product_rate"]
            assert figures["utilisation"] == pytest.approx(utilisation)
            row = [variant, *[f"{rate:,.0f}"] * 3, f"{utilisation:.1%}", f"{run['product_rate'] / 1e12:.3g}"]
            row += [f"{run['peak_bytes'] / 1e9:.2f}", "–", f"{run['difference']:.1g}"]
            assert row in [line.split() for line in done.stdout.splitlines()]
            losses = run["losses"] or []
            assert len(losses) == (3 if work.task == "train" else 0)
            assert ", ".join(f"{loss:.5f}" for loss in losses) in done.stdout
        ratios = case["ratios"]["torch-eager"]
        assert ratios["time"]["rounds"] == pytest.approx([ours["seconds"] / theirs["seconds"]])
        assert ratios["peak memory"]["median"] == pytest.approx(ours["peak_bytes"] / theirs["peak_bytes"])
        assert f"{ratios['time']['median']:.3f}" in done.stdout


def test_figures_of_a_cpu_are_marked_as_such(small):
    done, result = small
    command, machine, *rest = done.stdout.splitlines()
    assert command.startswith("python -m parity bench --device cpu --variants tinyllm torch-eager --small ")
    assert command == result["command"] and machine.startswith("cpu ") and "GPU" not in machine
    assert any(line.startswith("NO GPU WAS MEASURED") for line in rest)
    assert any("does not measure speed" in line for line in rest)
    assert result["targets"] == [] and "met" not in done.stdout.split()


def test_a_failing_compiler_becomes_the_result_with_its_reason(weights, tmp_path):
    request = replace(REQUEST, compiler="none")
    job = Job("torch-compile", SMALL_WORKS["train"], "float32", str(weights["train"]), "unused", request)
    assert measure.run_or_report_failure(job)["failed"].startswith("InvalidBackend: ")
    with pytest.raises(OSError, match="no-such-folder"):
        measure.run_or_report_failure(replace(job, variant="torch-eager", answers="no-such-folder/x.npy"))


@pytest.mark.gpu
def test_small_models_run_on_the_gpu_and_agree():
    done = parity("bench", "--device", "cuda", "--small", "--rounds", "1", "--warmup", "1", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert "NO GPU" not in done.stdout and "failed:" not in done.stdout


# ---- Wrong arguments ----


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--device cpu", "--small"),
        ("--device cpu --small --precisions bfloat16", "--precisions bfloat16"),
        ("--device tpu", "'tpu'"),
        ("--rounds 2", "--device"),
        ("--device cuda --works sleep", "--works sleep"),
        (
            "--device cuda --variants jax",
            "--variants jax",
        ),
        (
            "--device cuda --precisions float8",
            "--precisions float8",
        ),
        ("--device cuda --works train train", "--works train train"),
        ("--device cuda --rounds 0", "--rounds 0"),
        ("--device cuda --warmup -1", "--warmup -1"),
        ("--device cuda --json no/such/folder/x.json", "--json no/such/folder/x.json"),
    ],
)
def test_wrong_arguments_give_one_sentence_and_exit_code_2(capsys, options, sentence):
    assert main(["bench", *options.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and sentence in captured.err and captured.err.count("\n") == 1


def test_missing_cupy_gives_one_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["bench", "--device", "cuda"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "device 'cuda'" in captured.err and "CuPy" in captured.err


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (0, "0 GPUs"),
        (RuntimeError("cudaErrorNoDevice"), "cudaErrorNoDevice"),
    ],
)
def test_missing_gpu_gives_one_sentence_and_exit_code_2(cupy, capsys, count, sentence):
    cupy.count = count
    assert main(["bench", "--device", "cuda"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and sentence in captured.err


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        (None, f"torch {torch.__version__} is built without CUDA"),
        ("12.8", f"torch {torch.__version__} for CUDA 12.8"),
    ],
)
def test_torch_without_a_gpu_gives_one_sentence_and_exit_code_2(cupy, monkeypatch, capsys, version, sentence):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and sentence in captured.err


@pytest.mark.parametrize(("seconds", "code"), [(0.9, 0), (1.1, 1)])
def test_the_whole_command_with_given_measurements(cupy, monkeypatch, capsys, seconds, code):
    """Every work runs in every precision, the variants in turn; a target that is not met is exit code 1."""
    jobs = []

    def measure_once(job: Job, number: int) -> dict:
        jobs.append((job.work.task, job.precision, job.variant))
        np.save(job.answers, np.ones(2, np.float32))
        taken = seconds if job.variant == "tinyllm" else 1.0
        return {key: value for key, value in record(taken, 7).items() if key != "difference"}

    monkeypatch.setattr(measure, "measure_once", measure_once)
    monkeypatch.setattr(measure, "write_weights", lambda work, folder: folder.mkdir())
    monkeypatch.setattr(report, "driver_version", lambda: "570")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", "--device", "cuda", "--rounds", "1"]) == code
    assert jobs == [(t, p, v) for t in TASKS for p in PRECISIONS for v in VARIANTS]
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "python -m parity bench --device cuda --rounds 1"
    assert out.splitlines()[1].startswith("GPU Paper GPU, driver 570 for CUDA up to 12.9, numpy ")
    unmet = [line.endswith("not met") for line in out.splitlines()[-18:]]
    assert unmet == [bool(code), False] * 9


def test_environment_variables_that_change_the_precision_are_removed(monkeypatch):
    seen = {}

    def in_own_process(module, request, environment):
        seen.update(environment)
        return SimpleNamespace(returncode=0, stdout='a message of a library\n{"seconds": 1}\n')

    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("CUPY_TF32", "1")
    monkeypatch.setattr(measure, "in_own_process", in_own_process)
    job = Job("tinyllm", SMALL_WORKS["train"], "float32", "", "", REQUEST)
    assert measure.measure_once(job, 1) == {"seconds": 1}
    assert "PATH" in seen and not {"NVIDIA_TF32_OVERRIDE", "CUPY_TF32"} & seen.keys()


def test_a_failing_variant_exits_but_a_failing_compiler_does_not(monkeypatch):
    monkeypatch.setattr(measure, "in_own_process", lambda *_: SimpleNamespace(returncode=-11, stdout=""))
    job = Job("torch-eager", SMALL_WORKS["train"], "float32", "", "", REQUEST)
    with pytest.raises(SystemExit, match=r"torch-eager failed in round 2 \(code -11\): no report"):
        measure.measure_once(job, 2)
    result = measure.measure_once(replace(job, variant="torch-compile"), 2)
    assert result == {"failed": "its process exited with code -11"}


def test_a_job_survives_serialization():
    job = Job("tinyllm", SMALL_WORKS["decode"], "tf32", "weights", "answers", REQUEST)
    received = measure.job_of(json.loads(json.dumps(asdict(job))))
    assert asdict(received) == json.loads(json.dumps(asdict(job))) | {"request": asdict(received.request)}
    assert received.work == job.work and received.request.product_size == 64
    assert replace(received.request, small=False).product_size == 8192


def test_importing_the_module_loads_no_array_library():
    code = (
        "import sys, parity.bench.cuda.measure; print({'numpy', 'torch', 'tinyllm', 'cupy'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_bench_without_a_subcommand_needs_options_and_has_help(capsys):
    assert "bench" in COMMANDS and main(["bench"]) == main(["bench", "sleep"]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: python -m parity bench" in text and "--device {cuda,cpu}" in text
    assert "bench train, bench decode and bench scaling" in text

"""The benchmark of a GPU runs end to end on small models, in processes of their own; and what it refuses."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

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
    """What ``bench --device cpu --small`` printed and wrote, of every work, in one round."""
    path = tmp_path_factory.mktemp("bench") / "small.json"
    options = "--small --rounds 1 --warmup 1 --steps 2 --variants tinyllm torch-eager".split()
    done = parity("bench", "--device", "cpu", *options, "--json", str(path))
    assert done.returncode == 0, done.stderr
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


def test_the_tables_figures_are_those_of_the_records(small):
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
            said = [variant, *[f"{rate:,.0f}"] * 3, f"{utilisation:.1%}", f"{run['product_rate'] / 1e12:.3g}"]
            said += [f"{run['peak_bytes'] / 1e9:.2f}", "–", f"{run['difference']:.1g}"]
            assert said in [line.split() for line in done.stdout.splitlines()]
            losses = run["losses"] or []
            assert len(losses) == (3 if work.task == "train" else 0)
            assert ", ".join(f"{loss:.5f}" for loss in losses) in done.stdout
        ratios = case["ratios"]["torch-eager"]
        assert ratios["time"]["rounds"] == pytest.approx([ours["seconds"] / theirs["seconds"]])
        assert ratios["peak memory"]["median"] == pytest.approx(ours["peak_bytes"] / theirs["peak_bytes"])
        assert f"{ratios['time']['median']:.3f}" in done.stdout


def test_the_cpus_figures_stand_under_no_gpus_heading(small):
    done, result = small
    command, machine, *rest = done.stdout.splitlines()
    assert command.startswith("python -m parity bench --device cpu --variants tinyllm torch-eager --small ")
    assert command == result["command"] and machine.startswith("cpu ") and "GPU" not in machine
    assert "NO GPU WAS MEASURED: these are the CPU's figures." in rest
    assert any("says nothing about speed" in line for line in rest)
    assert result["reach"] == [] and "met" not in done.stdout.split() and "missed" not in done.stdout.split()


def test_a_compiler_that_fails_is_the_result_with_the_reason(weights, tmp_path):
    request = replace(REQUEST, compiler="none")
    job = Job("torch-compile", SMALL_WORKS["train"], "float32", str(weights["train"]), "unused", request)
    assert measure.run_or_say_why_not(job)["failed"].startswith("InvalidBackend: ")
    with pytest.raises(OSError, match="no-such-folder"):
        measure.run_or_say_why_not(replace(job, variant="torch-eager", answers="no-such-folder/x.npy"))


@pytest.mark.gpu
def test_small_models_run_on_the_gpu_and_agree():
    done = parity("bench", "--device", "cuda", "--small", "--rounds", "1", "--warmup", "1", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert "CPU's figures" not in done.stdout and "failed:" not in done.stdout


# ---- Requests ----


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--device cpu", "--small"),
        ("--device cpu --small --precisions bfloat16", "--precisions bfloat16"),
        ("--device tpu", "'tpu'"),
        ("--rounds 2", "--device {cuda,cpu}"),
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
def test_a_wrong_request_is_one_sentence_and_exit_code_2(capsys, options, sentence):
    assert main(["bench", *options.split()]) == 2
    said = capsys.readouterr()
    assert said.out == "" and sentence in said.err and said.err.count("\n") == 1


def test_without_cupy_it_is_one_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["bench", "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "device 'cuda'" in said.err and "CuPy" in said.err


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (0, "0 GPUs"),
        (RuntimeError("cudaErrorNoDevice"), "cudaErrorNoDevice"),
    ],
)
def test_without_a_gpu_it_is_one_sentence_and_exit_code_2(cupy, capsys, count, sentence):
    cupy.count = count
    assert main(["bench", "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and sentence in said.err


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        (None, f"torch {torch.__version__} is built without CUDA"),
        ("12.8", f"torch {torch.__version__} for CUDA 12.8"),
    ],
)
def test_a_torch_without_a_gpu_is_one_sentence_and_exit_code_2(cupy, monkeypatch, capsys, version, sentence):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and sentence in said.err


@pytest.mark.parametrize(("seconds", "code"), [(0.9, 0), (1.1, 1)])
def test_the_whole_command_on_a_gpu_from_given_records(cupy, monkeypatch, capsys, seconds, code):
    """All works in all precisions, in turn; a missed bound is code 1."""
    asked = []

    def measure_once(job: Job, number: int) -> dict:
        asked.append((job.work.task, job.precision, job.variant))
        np.save(job.answers, np.ones(2, np.float32))
        taken = seconds if job.variant == "tinyllm" else 1.0
        return {key: value for key, value in record(taken, 7).items() if key != "difference"}

    monkeypatch.setattr(measure, "measure_once", measure_once)
    monkeypatch.setattr(measure, "write_weights", lambda work, folder: folder.mkdir())
    monkeypatch.setattr(report, "driver_version", lambda: "570")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", "--device", "cuda", "--rounds", "1"]) == code
    assert asked == [(t, p, v) for t in TASKS for p in PRECISIONS for v in VARIANTS]
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "python -m parity bench --device cuda --rounds 1"
    assert out.splitlines()[1].startswith("GPU Paper GPU, driver 570 for CUDA up to 12.9, numpy ")
    verdicts = [line.split()[-1] for line in out.splitlines()[-18:]]
    assert verdicts == ["missed" if code else "met", "met"] * 9


def test_the_precision_is_not_changed_by_the_environment(monkeypatch):
    seen = {}

    def in_own_process(module, request, environment):
        seen.update(environment)
        return SimpleNamespace(returncode=0, stdout='a library says hello\n{"seconds": 1}\n')

    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("CUPY_TF32", "1")
    monkeypatch.setattr(measure, "in_own_process", in_own_process)
    job = Job("tinyllm", SMALL_WORKS["train"], "float32", "", "", REQUEST)
    assert measure.measure_once(job, 1) == {"seconds": 1}
    assert "PATH" in seen and not {"NVIDIA_TF32_OVERRIDE", "CUPY_TF32"} & seen.keys()


def test_a_variant_that_fails_ends_it_but_a_compiler_does_not(monkeypatch):
    monkeypatch.setattr(measure, "in_own_process", lambda *_: SimpleNamespace(returncode=-11, stdout=""))
    job = Job("torch-eager", SMALL_WORKS["train"], "float32", "", "", REQUEST)
    with pytest.raises(SystemExit, match=r"torch-eager failed in round 2 \(code -11\): no report"):
        measure.measure_once(job, 2)
    result = measure.measure_once(replace(job, variant="torch-compile"), 2)
    assert result == {"failed": "its process ended with code -11"}


def test_a_job_arrives_as_it_was_sent():
    job = Job("tinyllm", SMALL_WORKS["decode"], "tf32", "weights", "answers", REQUEST)
    received = measure.job_of(json.loads(json.dumps(asdict(job))))
    assert asdict(received) == json.loads(json.dumps(asdict(job))) | {"request": asdict(received.request)}
    assert received.work == job.work and received.request.product_size == 64
    assert replace(received.request, small=False).product_size == 8192


def test_the_module_brings_nothing_into_a_variants_process():
    code = (
        "import sys, parity.bench.cuda.measure; print({'numpy', 'torch', 'tinyllm', 'cupy'} & {*sys.modules})"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def test_bench_alone_takes_options_only_and_help_says_how(capsys):
    assert "bench" in COMMANDS and main(["bench"]) == main(["bench", "sleep"]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "usage: python -m parity bench" in said and "--device {cuda,cpu}" in said
    assert "bench train, bench decode, bench scaling" in said

"""The wheel: it holds every file that the program needs, and trains where there is no checkout."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.suite import ROOT

import tinyllm

TEXT = "the cat sat on the mat and the dog lay on the rug. " * 60
TEN_STEPS = (
    "--tokenizer char --n-layer 1 --n-head 2 --n-embd 16 --context 16 --steps 10 --warmup 2 --prompt the"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that neither an old ``build/`` nor the checkout is read or written."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("tinyllm", "parity"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    (path,) = out.iterdir()
    return path


def test_tinyllm_is_the_tests_own_checkout():
    assert Path(tinyllm.__file__).is_relative_to(ROOT)


def test_packages_that_ops_and_layers_import_are_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    files = [path for name in ("functional", "nn") for path in (ROOT / "tinyllm" / name).glob("*.py")]
    imported = {
        name
        for path in [*files, *(ROOT / "tinyllm").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [getattr(node, "module", None)] if hasattr(node, "module") else [a.name for a in node.names]
        )
    }
    packages = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert {"numpy", "scipy", "einops"} <= packages
    assert packages - {"tinyllm", "cupy"} <= required


def test_wheel_holds_every_package_and_data_file(wheel):
    assert wheel.name == f"tinyllm_numpy-{tinyllm.__version__}-py3-none-any.whl"
    files = {
        path.relative_to(ROOT).as_posix()
        for package in ("tinyllm", "parity")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {"tinyllm/backend/cuda/kernels.cu", "tinyllm/assets/vocab.bpe", "tinyllm/py.typed"} <= inside
    assert inside == files


def test_wheel_trains_and_generates_outside_the_checkout(wheel, tmp_path):
    """In a virtual environment that has the wheel, and from this one only what the wheel requires."""
    environment, work = tmp_path / "environment", tmp_path / "work"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    packages = sysconfig.get_path("purelib", vars={"base": environment, "platbase": environment})
    install = ["install", "--ignore-installed", "--no-deps", "--no-index", "--prefix", environment, wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    (Path(packages) / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    work.mkdir()
    (work / "text.txt").write_text(TEXT)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program, *args):
        done = subprocess.run([scripts / program, *args], cwd=work, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("python", "-c", "import tinyllm; print(tinyllm.__file__)").strip()
    assert Path(where).is_relative_to(environment)
    run("tinyllm", "train", "--text", "text.txt", "--out", "run", *TEN_STEPS.split())
    assert (work / "run" / "metrics.jsonl").read_text().count("\n") >= 10
    text = run("tinyllm", "generate", "--run", "run", "--prompt", "the", "--max-new-tokens", "5")
    assert text.startswith("the")
    report = run("python", "-m", "parity", "report", "--random", "--dtype", "float64", "--out", "report.html")
    assert (work / "report.html").exists(), report

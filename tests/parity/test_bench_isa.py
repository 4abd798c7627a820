"""``--isa``: the environment that holds a process to AVX2, and the check that the process obeys."""

import os
import re
import subprocess
import sys

import pytest

from parity.__main__ import main
from parity.bench import command, isa
from parity.bench.isa import check_isa, held_to, in_use, processor
from parity.bench.process import machine, python_path
from tinyllm import Error

pytest.importorskip("torch")

ON_AVX512 = {"cpu": "A CPU", "instructions": "AVX-512"}
ON_AVX2 = {"cpu": "A CPU", "instructions": "AVX2"}
ON_ARM = {"cpu": "A chip", "instructions": "arm64"}

on_avx2 = pytest.mark.skipif(machine()["instructions"] not in ("AVX2", "AVX-512"), reason="needs AVX2")


def child(environment):
    """A process with NumPy and torch that checks itself, in this environment."""
    code = "import numpy, torch; from parity.bench.isa import *; print(kernels()); check_obeyed('avx2')"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | python_path(), capture_output=True, text=True
    )


def test_names_of_the_instruction_set_and_the_processor():
    assert [in_use("native", facts) for facts in (ON_AVX512, ON_AVX2, ON_ARM)] == ["AVX-512", "AVX2", "arm64"]
    assert [in_use("avx2", facts) for facts in (ON_AVX512, ON_AVX2)] == ["AVX2", "AVX2"]
    assert processor("native", ON_AVX512) == "A CPU (AVX-512)"
    assert processor("avx2", ON_AVX512) == "A CPU (AVX-512) held to AVX2"
    assert processor("native", ON_AVX2) == processor("avx2", ON_AVX2) == "A CPU (AVX2, the widest it has)"


def test_avx2_needs_a_processor_that_has_it():
    for facts in ON_AVX512, ON_AVX2:
        check_isa("avx2", facts)
    check_isa("native", ON_ARM)
    with pytest.raises(Error, match="A chip has no AVX2"):
        check_isa("avx2", ON_ARM)


@pytest.mark.parametrize("kind", ["train", "scaling", "decode"])
def test_every_command_checks_the_processor(kind, monkeypatch, capsys):
    monkeypatch.setattr(command, "machine", lambda: ON_ARM)
    assert main(["bench", kind, "--isa", "avx2"]) == 2
    assert "A chip has no AVX2" in capsys.readouterr().err


def test_native_is_held_to_nothing_whatever_limits_this_shell():
    limited = {
        "OPENBLAS_CORETYPE": "Haswell",
        "OPENBLAS_L2_SIZE": "512",
        "ATEN_CPU_CAPABILITY": "avx2",
        "HOME": "/",
    }
    assert held_to("native", limited) == {"HOME": "/"}


@on_avx2
def test_avx2_replaces_what_limits_this_shell():
    held = held_to("avx2", {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_L2_SIZE": "512", "HOME": "/"})
    assert (held["OPENBLAS_CORETYPE"], held["HOME"]) == ("Haswell", "/") and "OPENBLAS_L2_SIZE" not in held


@on_avx2
def test_a_held_process_obeys():
    done = child(held_to("avx2", os.environ))
    assert done.returncode == 0, done.stderr
    for words in "at most AVX2", "'openblas': ('Haswell', True)", "'torch': ('AVX2', True)":
        assert words in done.stdout


@pytest.mark.skipif(machine()["instructions"] != "AVX-512", reason="needs AVX-512 to disobey")
def test_a_process_that_does_not_obey_fails_and_names_every_library():
    done = child(held_to("native", os.environ))
    assert done.returncode == 1
    problem = done.stderr.splitlines()[-1].partition("not valid: ")[2]
    named = re.findall(r"(\w+) uses ", problem)
    # On a processor that is not Intel's, OpenBLAS and MKL may keep to AVX2 by themselves.
    assert named == [name for name in ("NumPy", "openblas", "torch", "MKL", "oneDNN") if name in named]
    assert {"NumPy", "torch", "oneDNN"} <= {*named}


def test_a_library_that_does_not_name_its_kernels_fails(monkeypatch):
    monkeypatch.setattr(isa, "kernels", lambda: {"MKL": isa._named(None), "NumPy": ("at most AVX2", True)})
    with pytest.raises(SystemExit, match="MKL uses kernels that it does not name"):
        isa.check_obeyed("avx2")
    isa.check_obeyed("native")


@pytest.mark.parametrize(
    "printed, obeys",
    [
        ("Intel(R) Advanced Vector Extensions 2 (Intel(R) AVX2) enabled processors", True),
        ("Intel AVX2", True),
        ("Intel AVX-512 with AVX512_VNNI", False),
        ("Intel AVX10.1 and Intel AMX with bfloat16 support", False),
        ("Intel AVX 10.1", False),
    ],
)
def test_printed_names_are_judged(printed, obeys):
    assert isa._named(re.search("(.*)", printed)) == (printed, obeys)


def test_what_libraries_print_is_captured(capfd):
    assert isa.printed(lambda: os.write(1, b"from C")) == "from C"
    assert capfd.readouterr().out == ""

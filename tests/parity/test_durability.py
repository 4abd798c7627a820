"""``python -m parity reliability``: crash recovery of runs, and faulty checkpoints that it must detect."""

import contextlib
import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

import tinyllm.training.run_folder
from parity import tables
from parity.__main__ import main
from parity.durability import disk
from parity.durability import kill as killing
from parity.durability.disk import bit_flips, failing_disk
from parity.durability.kill import kill
from parity.durability.processes import kill_processes, launcher
from parity.durability.runs import Figures
from parity.fuzz.targets import TARGETS
from tinyllm import GPT2Config
from tinyllm.errors import Error
from tinyllm.training import checkpoint
from tinyllm.weights.runs import checkpoints

PARTS = [
    "model.safetensors: length of the header",
    "model.safetensors: header",
    "model.safetensors: numbers",
    "optimizer.safetensors: length of the header",
    "optimizer.safetensors: header",
    "optimizer.safetensors: numbers",
    "config.json",
    "checkpoint.json",
]
DISKS = ["ENOSPC while saving a checkpoint", "EIO while saving a checkpoint"]


def passed(test):
    """Name -> figures of a test, after checking that it has no failures."""
    results = dict(test)
    for name, figures in results.items():
        assert figures.failures == [], name
        assert figures.tries == figures.counts["recovered"] + figures.counts["detected"], name
    return results


def failures(test):
    return [failure for _, figures in test for failure in figures.failures]


# ---- Runs recover ----


def test_runs_recover_from_kill_9(tmp_path):
    ((name, figures),) = passed(kill(3, keep=tmp_path)).items()
    assert name == "kill -9"
    assert figures.tries == 3
    assert 1 <= figures.counts["runs"] <= 4
    assert list(tmp_path.iterdir()) == []


def test_runs_recover_from_disk_errors():
    results = passed(failing_disk(every=13))
    assert list(results) == DISKS
    assert {figures.tries for figures in results.values()} == {6}


def test_every_flipped_bit_is_detected():
    results = passed(bit_flips(12, seed=1))
    assert [name.removeprefix("a bit of ") for name in results] == PARTS
    assert sum(figures.tries for figures in results.values()) == 12
    assert {figures.tries for figures in results.values()} == {1, 2}


def test_runs_of_several_processes_recover_from_kill_9_of_one():
    skip_without_mpi()
    ((name, figures),) = passed(kill_processes(2)).items()
    assert name == "kill -9 of one of 2 processes"
    assert figures.tries == 2


@pytest.mark.torture
def test_forty_kills_of_one_of_several_processes():
    skip_without_mpi()
    figures = passed(kill_processes(40, options=("--shard-optimizer", "--optimizer=adamw")))[
        "kill -9 of one of 2 processes"
    ]
    assert figures.tries == 40


def skip_without_mpi():
    try:
        launcher()
    except Error as error:
        pytest.skip(str(error))


@pytest.mark.torture
def test_a_hundred_kills(tmp_path):
    figures = passed(kill(100, keep=tmp_path))["kill -9"]
    assert figures.tries == 100
    assert figures.counts[killing.INSIDE] >= 20


@pytest.mark.torture
def test_every_disk_call_may_fail():
    for figures in passed(failing_disk()).values():
        assert figures.tries > 60


@pytest.mark.torture
def test_two_thousand_flipped_bits():
    assert {figures.tries for figures in passed(bit_flips(2_000)).values()} == {250}


# ---- Faulty checkpoints are detected ----

SAVE, LOAD = checkpoint.save_checkpoint, checkpoint.load_checkpoint


def test_an_unreported_disk_error_is_detected(monkeypatch):
    def save(*args):
        with contextlib.suppress(OSError):
            SAVE(*args)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    found = failures(failing_disk(every=13))
    assert len(found) == 12 - 2  # the first call of each is mkdir, which may fail unreported
    assert all(failure.endswith("not reported") for failure in found)


def test_deleting_the_previous_checkpoint_too_early_is_detected(monkeypatch):
    def save(folder, *args):
        for older in checkpoints(folder.parent):
            shutil.rmtree(older)
        SAVE(folder, *args)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    assert any(failure.endswith("previous checkpoint is gone") for failure in failures(failing_disk(30)))


def load_without_moments(folder, about, model, optimizer, *args):
    LOAD(folder, about, model, optimizer, *args)
    for _, m, _ in optimizer.state.values():
        m[...] = 0


def test_a_resumed_run_without_optimizer_moments_is_detected(monkeypatch):
    monkeypatch.setattr(tinyllm.training.run_folder, "load_checkpoint", load_without_moments)
    found = failures(failing_disk(every=30))
    assert len(found) == 2 * 3
    assert all("its metrics.jsonl, " in failure and failure.endswith("differ") for failure in found)


def test_unverified_or_unreported_bit_flips_are_detected(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(disk, "verify", lambda folder: {"t": {}})
        assert Counter(failure.split(": ")[-1] for failure in failures(bit_flips(8))) == {
            "verify did not detect it": 8
        }
    monkeypatch.setattr(tinyllm.training.run_folder, "say", lambda *_, **__: None)
    found = failures(bit_flips(8))
    assert len(found) == 8
    assert all("the resumed run printed something else" in failure for failure in found)


def flip_in_the_newest(out):
    path = checkpoints(Path(out.removeprefix("--out=")))[-1] / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("tamper", "failure"),
    [
        ("another seed", "its metrics.jsonl, model.safetensors, optimizer.safetensors, samples.txt differ"),
        ("another exit code", "it exited with code 3: why"),
        ("damage", "optimizer.safetensors is damaged"),
    ],
)
def test_a_run_that_does_not_recover_from_a_kill_is_detected(monkeypatch, tmp_path, tamper, failure):
    run = killing._run

    def tampered(arguments, *death):
        if "whole" in arguments[-1]:
            return run(arguments, *death)
        if tamper == "another exit code":
            return 3, "why", 1.0
        if tamper == "another seed":
            arguments = [*arguments, "--seed=1"]
        result = run(arguments, *death)
        if tamper == "damage":
            flip_in_the_newest(arguments[-1])
        return result

    dies_at = 300 if tamper == "damage" else killing.NEVER  # late enough for some checkpoints
    monkeypatch.setattr(killing, "_death", lambda *_: (dies_at, None))
    monkeypatch.setattr(killing, "_run", tampered)
    ((_, figures),) = kill(3, keep=tmp_path)
    assert len(figures.failures) == 1
    assert failure in figures.failures[0]
    assert figures.counts["recovered"] == 0
    assert (tmp_path / "killed-run-1").exists() == (tamper != "another exit code")


# ---- The command and its table ----


@pytest.fixture
def reliability():
    for package in ("gguf", "sentencepiece", "tokenizers"):
        pytest.importorskip(package)
    from parity.durability import reliability

    return reliability


def test_table_failures_and_exit_code(reliability, monkeypatch, tmp_path, capsys):
    sizes = []

    def proofs(kills, flips, cases, seed, keep, processes):
        sizes.append((kills, flips, cases, seed, keep))
        yield reliability.Row("kill -9", 1000, {"recovered": 1000, "runs": 90}, [])
        yield reliability.Row("a bit of x", 2, {"detected": 2 - len(broken)}, broken)

    monkeypatch.setattr(reliability, "proofs", proofs)
    path = tmp_path / "x.json"
    for broken, code in (([], 0), (["bit 1 of byte 2: " + "x" * 5000], 1)):
        assert main(["reliability", "--flips", "2", "--seed", "7", "--json", str(path)]) == code
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == [
            "| fault | tries | outcome | failures |",
            "| --- | --- | --- | --- |",
            "| kill -9 | 1,000 | 1,000 recovered, 90 runs | 0 |",
        ]
        assert lines[3] == f"| a bit of x | 2 | {2 - code} detected | {code} |"
        assert len(lines) == 4 + 2 * code
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["proofs"][1] == {
            "proof": "a bit of x",
            "tries": 2,
            "outcome": {"detected": 2 - code},
            "failures": broken,
        }
        assert result["seed"] == 7
        assert "checkpoint_124m" not in result
    assert lines[5].startswith("a bit of x: bit 1 of byte 2: xxx")
    assert lines[5].endswith("xxx … (5,017 characters)")
    assert set(sizes) == {(20, 2, 950, 7, None)}


def test_large_selects_the_large_sizes(reliability, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reliability, "proofs", lambda **sizes: [reliability.Row(f"{sizes}", 1, {}, [])])
    monkeypatch.setattr(reliability, "GPT2Config", lambda: GPT2Config(11, 8, 8, 1, 2))
    assert main(["reliability", "--large", "--kills", "5", "--keep", str(tmp_path)]) == 0
    sizes = dict(kills=5, flips=2_000, cases=10_000, seed=0, keep=tmp_path, processes=None)
    printed = capsys.readouterr().out
    assert f"| {sizes} | 1 |" in printed
    assert "| checkpoint | size | save | verify | load | resume (both) |" in printed


@pytest.mark.parametrize("failures", [[], ["why"]])
def test_write_replaces_the_table_only_without_failures(reliability, monkeypatch, tmp_path, failures):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- reliability -->\nold\n<!-- /reliability -->\n", encoding="utf-8")
    monkeypatch.setattr(tables, "PAGE", page)
    rows = [reliability.Row("EIO here", 2, {"recovered": 2}, failures)]
    rows.append(reliability.Row("ENOSPC there", 1, {"recovered": 1}, []))
    monkeypatch.setattr(reliability, "proofs", lambda **sizes: rows)
    monkeypatch.setattr(reliability, "GPT2Config", lambda: GPT2Config(11, 8, 8, 1, 2))
    assert main(["reliability", "--large", "--write"]) == len(failures)
    text = tables.read(page, "reliability")
    if failures:
        assert text == "old\n"
    else:
        faults, (cost,) = tables.first_cells(text)
        assert faults == list(reliability.KINDS) and cost.startswith("GPT-2, ")
        assert "| ENOSPC or EIO while saving a checkpoint | 3 | 3 recovered | 0 |" in text


def test_every_fault_belongs_to_a_row_of_the_written_table(reliability):
    names = ["kill -9", *DISKS, *(f"a bit of {part}" for part in PARTS)]
    names += [f"fuzzed: {target.name}" for target in TARGETS]
    for name in names:
        assert sum(name.startswith(begins) for begins in reliability.KINDS.values()) == 1, name
    written, _ = tables.first_cells(tables.read(tables.PAGE, "reliability"))
    assert written == list(reliability.KINDS), "run: python -m parity reliability --large --write"


def test_every_kind_of_fault_has_its_rows(reliability, monkeypatch):
    for module, name in ((killing, "kill"), (disk, "failing_disk"), (disk, "bit_flips")):
        result = [(name, Figures(2, Counter(recovered=1), ["why"]))]
        monkeypatch.setattr(module, name, lambda *_, result=result: result)
    monkeypatch.setattr(
        reliability.harness, "fuzz_all", lambda *_: [("GGUF", reliability.harness.Figures(3, 2, 0, [5]))]
    )
    assert list(map(str, reliability.proofs(1, 1, 1))) == [
        "| kill | 2 | 1 recovered | 1 |",
        "| failing_disk | 2 | 1 recovered | 1 |",
        "| bit_flips | 2 | 1 recovered | 1 |",
        "| fuzzed: GGUF | 3 | 2 refused, 0 loaded | 1 |",
    ]


def test_costs_of_a_checkpoint(reliability):
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    costs = reliability.costs_of_a_checkpoint(config)
    numbers = 3 * 4 * costs["parameters"]  # four bytes each: a weight and two moments per parameter
    assert numbers < costs["bytes"] < numbers + 20_000
    assert min(costs["save_s"], costs["verify_s"], costs["load_s"]) > 0
    described = reliability.describe(dict(parameters=10, bytes=3e6, save_s=2.0, verify_s=0.5, load_s=0.25))
    assert described.splitlines()[2] == (
        "| GPT-2, 10 parameters, float32, with AdamW's moments | 3.0 MB | 2.00 s (2 MB/s) | 0.50 s | 0.25 s "
        "| 0.75 s |"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kills", "0"], "--kills 0"),
        (["--flips", "-1"], "--flips -1"),
        (["--large", "--cases", "0"], "--cases 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--json", "no/such/x.json"], "--json no/such/x.json"),
        (["--write"], "--large"),
        (["--write", "--large", "--kills", "5"], "--kills"),
    ],
)
def test_wrong_arguments_give_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert main(["reliability", *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["reliability"]) == 2
    assert "gguf: pip install" in capsys.readouterr().err

"""Runs survive kills, failing disks and flipped bits; and the proofs of that see a run that does not."""

import contextlib
import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

import tinyllm.training.run_folder
from parity.__main__ import main
from parity.durability import disk
from parity.durability import kill as killing
from parity.durability.disk import bit_flips, failing_disk
from parity.durability.kill import kill
from parity.durability.runs import Figures
from tinyllm import GPT2Config
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
DISKS = ["ENOSPC in a checkpoint's writing", "EIO in a checkpoint's writing"]


def found(proof):
    """Name -> figures, all of them without a failure."""
    proven = dict(proof)
    for name, figures in proven.items():
        assert figures.failures == [], name
        assert figures.tries == figures.counts["survived"] + figures.counts["detected"], name
    return proven


def failures(proof):
    return [failure for _, figures in proof for failure in figures.failures]


# Runs survive


def test_kill_minus_9(tmp_path):
    ((name, figures),) = found(kill(3, keep=tmp_path)).items()
    assert name == "kill -9"
    assert figures.tries == 3
    assert 1 <= figures.counts["runs"] <= 4
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk():
    proven = found(failing_disk(every=13))
    assert list(proven) == DISKS
    assert {figures.tries for figures in proven.values()} == {6}


def test_every_flipped_bit_is_detected():
    proven = found(bit_flips(12, seed=1))
    assert [name.removeprefix("a bit of ") for name in proven] == PARTS
    assert sum(figures.tries for figures in proven.values()) == 12
    assert {figures.tries for figures in proven.values()} == {1, 2}


@pytest.mark.torture
def test_a_hundred_kills(tmp_path):
    figures = found(kill(100, keep=tmp_path))["kill -9"]
    assert figures.tries == 100
    assert figures.counts[killing.INSIDE] >= 20


@pytest.mark.torture
def test_every_call_of_a_failing_disk():
    for figures in found(failing_disk()).values():
        assert figures.tries > 60


@pytest.mark.torture
def test_two_thousand_flipped_bits():
    assert {figures.tries for figures in found(bit_flips(2_000)).values()} == {250}


# The proofs see what does not survive

SAVE, LOAD = checkpoint.save_checkpoint, checkpoint.load_checkpoint


def test_a_failure_that_nobody_notices(monkeypatch):
    def save(*args):
        with contextlib.suppress(OSError):
            SAVE(*args)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    said = failures(failing_disk(every=13))
    assert len(said) == 12 - 2  # each disk's first call is the folder's mkdir, which may be there already
    assert all(failure.endswith("nobody noticed") for failure in said)


def test_a_checkpoint_that_makes_room_too_early(monkeypatch):
    def save(folder, *args):
        for older in checkpoints(folder.parent):
            shutil.rmtree(older)
        SAVE(folder, *args)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    assert any(failure.endswith("the checkpoint before is gone") for failure in failures(failing_disk(30)))


def forget_averages(folder, about, model, optimizer, device="cpu"):
    LOAD(folder, about, model, optimizer, device)
    for _, m, _ in optimizer.state.values():
        m[...] = 0


def test_a_resumed_run_that_forgets(monkeypatch):
    monkeypatch.setattr(tinyllm.training.run_folder, "load_checkpoint", forget_averages)
    said = failures(failing_disk(every=30))
    assert len(said) == 2 * 3
    assert all("its metrics.jsonl, " in failure and failure.endswith("differ") for failure in said)


def test_flips_that_are_not_detected_or_not_said(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(disk, "verify", lambda folder: {"t": {}})
        assert Counter(failure.split(": ")[-1] for failure in failures(bit_flips(8))) == {
            "verify finds nothing": 8
        }
    monkeypatch.setattr(tinyllm.training.run_folder, "say", lambda line: None)
    said = failures(bit_flips(8))
    assert len(said) == 8
    assert all("the resumed run says something else" in failure for failure in said)


def flip_in_the_newest(out):
    path = checkpoints(Path(out.removeprefix("--out=")))[-1] / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("tamper", "failure"),
    [
        ("another seed", "its metrics.jsonl, model.safetensors, optimizer.safetensors, samples.txt differ"),
        ("another exit code", "it ended with code 3: why"),
        ("damage", "optimizer.safetensors is damaged"),
    ],
)
def test_a_run_that_does_not_survive_a_kill(monkeypatch, tmp_path, tamper, failure):
    live = killing._live

    def tampered(arguments, *death):
        if "whole" in arguments[-1]:
            return live(arguments, *death)
        if tamper == "another exit code":
            return 3, "why", 1.0
        if tamper == "another seed":
            arguments = [*arguments, "--seed=1"]
        result = live(arguments, *death)
        if tamper == "damage":
            flip_in_the_newest(arguments[-1])
        return result

    dies_at = 300 if tamper == "damage" else killing.NEVER  # there are some checkpoints then
    monkeypatch.setattr(killing, "_death", lambda *_: (dies_at, None))
    monkeypatch.setattr(killing, "_live", tampered)
    ((_, figures),) = kill(3, keep=tmp_path)
    assert len(figures.failures) == 1
    assert failure in figures.failures[0]
    assert figures.counts["survived"] == 0
    assert (tmp_path / "killed-run-1").exists() == (tamper != "another exit code")


# The table


@pytest.fixture
def reliability():
    for package in ("gguf", "sentencepiece", "tokenizers"):
        pytest.importorskip(package)
    from parity.durability import reliability

    return reliability


def test_the_table_and_the_exit_code(reliability, monkeypatch, tmp_path, capsys):
    asked = []

    def proofs(kills, flips, cases, seed, keep):
        asked.append((kills, flips, cases, seed, keep))
        yield reliability.Row("kill -9", 1000, {"survived": 1000, "runs": 90}, [])
        yield reliability.Row("a bit of x", 2, {"detected": 2 - len(broken)}, broken)

    monkeypatch.setattr(reliability, "proofs", proofs)
    path = tmp_path / "x.json"
    for broken, code in (([], 0), (["bit 1 of byte 2: " + "x" * 5000], 1)):
        assert main(["reliability", "--flips", "2", "--seed", "7", "--json", str(path)]) == code
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == [
            "| proof | tries | outcome | failures |",
            "| --- | --- | --- | --- |",
            "| kill -9 | 1,000 | 1,000 survived, 90 runs | 0 |",
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
    assert set(asked) == {(20, 2, 950, 7, None)}


def test_the_large_sizes(reliability, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reliability, "proofs", lambda **asked: [reliability.Row(f"{asked}", 1, {}, [])])
    monkeypatch.setattr(reliability, "GPT2Config", lambda: GPT2Config(11, 8, 8, 1, 2))
    assert main(["reliability", "--large", "--kills", "5", "--keep", str(tmp_path)]) == 0
    asked = dict(kills=5, flips=2_000, cases=10_000, seed=0, keep=tmp_path)
    printed = capsys.readouterr().out
    assert f"| {asked} | 1 |" in printed
    assert "| checkpoint | size | save | verify | load | resume (both) |" in printed


def test_every_proof_has_its_rows(reliability, monkeypatch):
    for module, name in ((killing, "kill"), (disk, "failing_disk"), (disk, "bit_flips")):
        proof = [(name, Figures(2, Counter(survived=1), ["why"]))]
        monkeypatch.setattr(module, name, lambda *_, proof=proof: proof)
    monkeypatch.setattr(
        reliability.harness, "fuzz_all", lambda *_: [("GGUF", reliability.harness.Figures(3, 2, 0, [5]))]
    )
    assert list(map(str, reliability.proofs(1, 1, 1))) == [
        "| kill | 2 | 1 survived | 1 |",
        "| failing_disk | 2 | 1 survived | 1 |",
        "| bit_flips | 2 | 1 survived | 1 |",
        "| fuzzed: GGUF | 3 | 2 refused, 0 loaded | 1 |",
    ]


def test_what_a_checkpoint_costs(reliability):
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    costs = reliability.costs_of_a_checkpoint(config)
    numbers = 3 * 4 * costs["parameters"]  # of four bytes: a weight and two averages for each
    assert numbers < costs["bytes"] < numbers + 20_000
    assert min(costs["save_s"], costs["verify_s"], costs["load_s"]) > 0
    said = reliability.describe(dict(parameters=10, bytes=3e6, save_s=2.0, verify_s=0.5, load_s=0.25))
    assert said.splitlines()[2] == (
        "| GPT-2, 10 parameters, float32, with AdamW's averages | 3.0 MB | 2.00 s (2 MB/s) | 0.50 s | 0.25 s "
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
    ],
)
def test_a_wrong_request(arguments, sentence, capsys):
    assert main(["reliability", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_without_the_readers_of_others_files(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["reliability"]) == 2
    assert "gguf: pip install" in capsys.readouterr().err

"""The readers against broken files, and the fuzzer against readers that are broken themselves."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from parity.fuzz import gguf as fuzz_gguf
from parity.fuzz import harness
from parity.fuzz import runs as fuzz_runs
from parity.fuzz import tokenizers as fuzz_tokenizers
from parity.fuzz import weights as fuzz_weights
from parity.fuzz.harness import Target, choose, fuzz, fuzz_all
from parity.fuzz.mutations import VALUES, Mutation, json_mutations
from parity.fuzz.targets import TARGETS
from tinyllm import files
from tinyllm.data import token_file
from tinyllm.errors import Error
from tinyllm.tokenizers import huggingface
from tinyllm.weights import gguf_format, safetensors

for package in ("gguf", "sentencepiece", "tokenizers"):
    pytest.importorskip(package)


def failures_of(figures):
    return "\n".join(map(str, figures.failures))


# The readers


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_broken_files_are_refused_or_load_to_something_valid(target):
    figures = fuzz(target, 24, seed=1)
    assert not figures.failures, failures_of(figures)
    assert figures.tries == figures.refused + figures.loaded == 24
    assert figures.refused >= 6


@pytest.mark.torture
def test_ten_thousand_broken_files(tmp_path):
    tries = 0
    for _, figures in fuzz_all(TARGETS, 10_000, keep=tmp_path):
        assert not figures.failures, failures_of(figures)
        assert figures.refused > 0 and figures.loaded > 0
        tries += figures.tries
    assert tries == 10_000


# The fuzzer: a target whose only file says what its reader does wrong

FILE = "what.txt"


def make_what(folder):
    (folder / FILE).write_text("nothing", encoding="utf-8")


def what_mutations(folder):
    def writes(what, expect=None):
        return Mutation(what, lambda folder, rng: (folder / FILE).write_text(what), expect=expect)

    return [writes(what) for what in (*WRONG, "refuses", "opens Python's files", "opens its file")] + [
        writes("refuses, and should not", "loaded"),
        writes("refuses as it should", "refused"),
    ]


def unguarded(sentence):
    """An Error that says exactly this, whatever its class makes of sentences."""
    error = Error("")
    error.args = (sentence,)
    return error


def load_what(folder):
    """Do what the file says."""
    match (folder / FILE).read_text():
        case "raises KeyError":
            raise KeyError("x")
        case "leaves":
            raise SystemExit(0)
        case "names no file":
            raise Error("there is a mistake: correct it")
        case "says two sentences":
            raise Error(f"{FILE} is wrong. Correct it.")
        case "takes a terminal":
            raise unguarded(f"{FILE} is wrong \x1b[2J: correct it")
        case "says a novel":
            raise unguarded(f"{FILE} is {'very ' * 5000}wrong: correct it")
        case "is invalid":
            raise AssertionError("the ids are out of range")
        case "hangs":
            threading.Event().wait()
        case "is killed":
            os.kill(os.getpid(), 9)
        case "aborts":
            os.abort()
        case "takes memory":
            np.ones(20 * 2**20)
        case "asks for too much":
            np.empty(2**40)
        case "hides that it asked for too much":
            try:
                np.empty(2**40)
            except MemoryError as error:
                raise Error(f"{FILE} is too large: make it smaller") from error
        case "opens another file":
            Path(__file__).parents[1].joinpath("conftest.py").read_bytes()
        case "opens a file above":
            (folder / ".." / FILE).touch()
        case "writes":
            (folder / FILE).write_text("x")
        case "starts a program":
            subprocess.run([sys.executable, "-c", ""], check=True)
        case "removes":
            (folder / FILE).unlink()
        case "opens Python's files":
            Path(subprocess.__file__).read_bytes()
        case what if "refuses" in what:
            raise Error(f"{FILE} is wrong: correct it")


WRONG = {
    "raises KeyError": "KeyError: 'x'",
    "leaves": "SystemExit",
    "names no file": "names no file: there is",
    "says two sentences": "not one sentence",
    "takes a terminal": "not one sentence: 'what.txt is wrong \\x1b[2J",
    "says a novel": "not one sentence",
    "is invalid": "the ids are out of range",
    "hangs": "not done, twice, after 0.5 s",
    "is killed": "the process died (SIGKILL)",
    "aborts": "the process died (SIGABRT)",
    "takes memory": "160 MB of memory, and 64 are enough",
    "asks for too much": "MemoryError",
    "hides that it asked for too much": "ran out of memory",
    "opens another file": "must not: opened ",
    "opens a file above": f"{FILE}",
    "writes": "for writing",
    "starts a program": "subprocess.Popen",
    "removes": "os.remove",
    "refuses, and should not": "it was refused, and should be loaded",
}
SAYS = Target("what a reader does", make_what, load_what, what_mutations)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere memory is not measured")
def test_whatever_a_reader_does_wrong_is_a_failure_of_its_case(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "TIME_LIMIT", 0.5)
    cases = len(what_mutations(None))
    seen = []
    figures = fuzz(SAYS, cases, seed=3, keep=tmp_path, advance=lambda: seen.append(1))
    assert figures.tries == len(seen) == cases
    assert figures.tries == figures.refused + figures.loaded + len(figures.failures)
    assert {failure.mutation for failure in figures.failures} == set(WRONG)
    for failure in figures.failures:
        assert WRONG[failure.mutation] in failure.problem, str(failure)
        assert (failure.kept / harness.FOLDER).is_dir() and failure.kept.parent == tmp_path
        assert f"seed 3, case {failure.case} ({failure.mutation})" in str(failure)


def test_a_case_is_repeated_by_its_seed_and_number(monkeypatch):
    monkeypatch.setattr(harness, "TIME_LIMIT", 0.5)
    first = fuzz(SAYS, 6, seed=5)
    assert len(first.failures) > 2
    for failure in first.failures[:2]:
        again = fuzz(SAYS, 1, seed=5, first=failure.case).failures
        assert [(f.case, f.mutation, f.problem[-20:]) for f in again] == [
            (failure.case, failure.mutation, failure.problem[-20:])
        ]


def broken_by(target, seed, place):
    """Names of mutations and what they made of the files."""
    valid = place / "valid"
    valid.mkdir(parents=True)
    target.make(valid)
    mutations = target.mutations(valid)
    made = []
    for case in range(12):
        mutation = choose(mutations, seed, case)
        folder = place / str(case) / "f"
        shutil.copytree(valid, folder)
        mutation.apply(folder, np.random.default_rng([seed, case]))
        files = sorted(path for path in folder.rglob("*") if path.resolve().is_file())
        made.append((mutation.name, [(path.name, path.read_bytes()) for path in files]))
    return made


@pytest.mark.parametrize(
    "target", [TARGETS[1], TARGETS[4], TARGETS[9], TARGETS[16]], ids=lambda target: target.name
)
def test_a_case_is_the_same_files_every_time(tmp_path, target):
    """And another seed gives other ones."""
    one, two, other = (
        broken_by(target, seed, tmp_path / name) for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert one == two
    assert one != other and len({name for name, _ in one}) > 8


def test_every_key_becomes_every_kind_of_value():
    document = {"a": 1, "b": [{"c": None}, "x"]}
    mutations = json_mutations("f.json", document)
    names = [mutation.name.removeprefix("f.json: ") for mutation in mutations]
    for key in ("the document", "a", "b", "b/0", "b/0/c", "b/1"):
        assert {f"{key} is {kind}" for kind in VALUES} <= set(names)
    assert len(names) == len(set(names)) and "b/0/c: there twice" in names and "b/1: left out" in names


def test_every_fixed_mutation_has_its_turn():
    mutations = [Mutation(str(n), print) for n in range(5)] + [Mutation("d", print, drawn=True)]
    for seed in range(3):
        assert {choose(mutations, seed, case).name for case in range(10)} == {*"01234", "d"}
        assert [choose(mutations, seed, case).name for case in (1, 3, 5)] == ["d"] * 3


# Sabotage: a check less in a reader is noticed. The readers are changed in the process that reads.


class AnyName:
    """Every name is a plain file's."""

    def __init__(self, name):
        self.name = name


def load_shards_from_anywhere(folder):
    safetensors.PureWindowsPath = AnyName
    fuzz_weights.load_shards(folder)


def load_json_as_python_does(folder):
    files.parse_json = json.loads
    fuzz_weights.load_shards(folder)


def load_what_is_no_file(folder):
    files.check_is_file = Path
    fuzz_tokenizers.load_any_tokenizer(folder)


def load_tensors_that_overlap(folder):
    gguf_format._check_places = print
    fuzz_gguf.load_gguf_model(folder)


def load_ids_out_of_range(folder):
    token_file._check_range = lambda *_: None
    fuzz_runs.load_tokens(folder)


def load_any_counts(folder):
    token_file._check_counts = lambda *_: None
    fuzz_runs.load_tokens(folder)


def load_any_vocabulary(folder):
    huggingface._check_vocabulary = lambda *_: None
    fuzz_tokenizers.load_any_tokenizer(folder)


def led_out(folder):
    return [
        m
        for m in fuzz_weights.shard_mutations(folder)
        if m.name.endswith(("leads to '../{}'", "leads to '{folder}/{}'"))
    ]


def deep_json(folder):
    return [m for m in fuzz_weights.shard_mutations(folder) if m.name.endswith("weight_map is deep lists")]


def pipes(folder):
    return [m for m in fuzz_tokenizers.llama3_mutations(folder) if m.name.endswith("a pipe")]


def shifted(folder):
    return [m for m in fuzz_gguf.gguf_model_mutations(folder) if "shifted by -1" in m.name]


def large_ids(folder):
    return [m for m in fuzz_runs.tokens_mutations(folder) if "the first id is 65535" in m.name]


def other_counts(folder):
    return [m for m in fuzz_runs.tokens_mutations(folder) if "chunks/0/0 is one" in m.name]


def huge_ids(folder):
    return [m for m in fuzz_tokenizers.pair_mutations(folder) if m.name.endswith("! is 2**31")]


SABOTAGE = {
    "shards lie anywhere": (fuzz_weights.make_shards, load_shards_from_anywhere, led_out),
    "JSON as Python reads it": (fuzz_weights.make_shards, load_json_as_python_does, deep_json),
    "a pipe is a file": (fuzz_tokenizers.make_llama3, load_what_is_no_file, pipes),
    "tensors overlap": (fuzz_gguf.make_gguf_model, load_tensors_that_overlap, shifted),
    "ids are not looked at": (fuzz_runs.make_tokens, load_ids_out_of_range, large_ids),
    "counts are not looked at": (fuzz_runs.make_tokens, load_any_counts, other_counts),
    "a vocabulary of any ids": (fuzz_tokenizers.make_pair, load_any_vocabulary, huge_ids),
}
SOUND = {
    fuzz_weights.make_shards: fuzz_weights.load_shards,
    fuzz_tokenizers.make_llama3: fuzz_tokenizers.load_any_tokenizer,
    fuzz_gguf.make_gguf_model: fuzz_gguf.load_gguf_model,
    fuzz_runs.make_tokens: fuzz_runs.load_tokens,
    fuzz_tokenizers.make_pair: fuzz_tokenizers.load_any_tokenizer,
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere memory is not bounded")
@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_of_a_reader_is_noticed(name, monkeypatch):
    monkeypatch.setattr(harness, "TIME_LIMIT", 0.5)
    make, load, mutations = SABOTAGE[name]
    assert fuzz(Target(name, make, load, mutations), 1).failures
    sound = fuzz(Target(name, make, SOUND[make], mutations), 4)
    assert not sound.failures, failures_of(sound)

"""The fuzzer: our readers against broken files, and faulty readers that it must detect."""

import functools
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


# ---- Our readers ----


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_broken_files_are_refused_or_load_validly(target):
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


# ---- The fuzzer, with a target whose file tells its reader what to do wrong ----

FILE = "what.txt"


def make_what(folder):
    (folder / FILE).write_text("nothing", encoding="utf-8")


def what_mutations(folder):
    def writes(what, expect=None):
        return Mutation(what, lambda folder, rng: (folder / FILE).write_text(what), expect=expect)

    return [writes(what) for what in (*WRONG, "refuses", "opens Python's files", "opens its file")] + [
        writes("refuses wrongly", "loaded"),
        writes("refuses rightly", "refused"),
    ]


def raw_error(sentence):
    """An Error with exactly this message, bypassing the escapes of its class."""
    error = Error("")
    error.args = (sentence,)
    return error


def load_what(folder):
    """Do what the file says."""
    match (folder / FILE).read_text():
        case "raises KeyError":
            raise KeyError("x")
        case "exits":
            raise SystemExit(0)
        case "names no file":
            raise Error("there is a mistake: correct it")
        case "raises two sentences":
            raise Error(f"{FILE} is wrong. Correct it.")
        case "raises control characters":
            raise raw_error(f"{FILE} is wrong \x1b[2J: correct it")
        case "raises a long text":
            raise raw_error(f"{FILE} is {'very ' * 5000}wrong: correct it")
        case "loads invalid ids":
            raise AssertionError("the ids are out of range")
        case "hangs":
            threading.Event().wait()
        case "is killed":
            os.kill(os.getpid(), 9)
        case "aborts":
            os.abort()
        case "takes memory":
            np.ones(20 * 2**20)
        case "allocates too much":
            np.empty(2**40)
        case "hides a failed allocation":
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
    "exits": "SystemExit",
    "names no file": "does not name the file: there is",
    "raises two sentences": "not one sentence",
    "raises control characters": "not one sentence: 'what.txt is wrong \\x1b[2J",
    "raises a long text": "not one sentence",
    "loads invalid ids": "the ids are out of range",
    "hangs": "timed out twice after 2 s",
    "is killed": "the process died (SIGKILL)",
    "aborts": "the process died (SIGABRT)",
    "takes memory": "160 MB of memory, but the limit is 64 MB",
    "allocates too much": "MemoryError",
    "hides a failed allocation": "ran out of memory",
    "opens another file": "not allowed to: opened ",
    "opens a file above": f"{FILE}",
    "writes": "for writing",
    "starts a program": "subprocess.Popen",
    "removes": "os.remove",
    "refuses wrongly": "it was refused, but should be loaded",
}
FAULTY = Target("faulty reader", make_what, load_what, what_mutations)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere memory is not measured")
def test_every_fault_of_a_reader_is_a_failure_of_its_case(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "TIME_LIMIT", 2)
    cases = len(what_mutations(None))
    seen = []
    figures = fuzz(FAULTY, cases, seed=3, keep=tmp_path, advance=lambda: seen.append(1))
    assert figures.tries == len(seen) == cases
    assert figures.tries == figures.refused + figures.loaded + len(figures.failures)
    assert {failure.mutation for failure in figures.failures} == set(WRONG)
    for failure in figures.failures:
        assert WRONG[failure.mutation] in failure.problem, str(failure)
        assert (failure.kept / harness.FOLDER).is_dir() and failure.kept.parent == tmp_path
        assert f"seed 3, case {failure.case} ({failure.mutation})" in str(failure)


def test_seed_and_number_repeat_a_case(monkeypatch):
    monkeypatch.setattr(harness, "TIME_LIMIT", 2)
    first = fuzz(FAULTY, 6, seed=5)
    assert len(first.failures) > 2
    for failure in first.failures[:2]:
        again = fuzz(FAULTY, 1, seed=5, first=failure.case).failures
        assert [(f.case, f.mutation, f.problem[-20:]) for f in again] == [
            (failure.case, failure.mutation, failure.problem[-20:])
        ]


def broken_by(target, seed, place):
    """The names of the first mutations and the contents of the files that each leaves."""
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
def test_cases_depend_only_on_the_seed(tmp_path, target):
    one, two, other = (
        broken_by(target, seed, tmp_path / name) for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert one == two
    assert one != other and len({name for name, _ in one}) > 8


def test_json_mutations_replace_every_value_by_every_kind():
    document = {"a": 1, "b": [{"c": None}, "x"]}
    mutations = json_mutations("f.json", document)
    names = [mutation.name.removeprefix("f.json: ") for mutation in mutations]
    for key in ("the document", "a", "b", "b/0", "b/0/c", "b/1"):
        assert {f"{key} is {kind}" for kind in VALUES} <= set(names)
    assert len(names) == len(set(names)) and "b/0/c: repeated" in names and "b/1: removed" in names


def test_fixed_and_random_mutations_alternate():
    mutations = [Mutation(str(n), print) for n in range(5)] + [Mutation("d", print, random=True)]
    for seed in range(3):
        assert {choose(mutations, seed, case).name for case in range(10)} == {*"01234", "d"}
        assert [choose(mutations, seed, case).name for case in (1, 3, 5)] == ["d"] * 3


# ---- Our readers with one check removed, in the child process ----


class AnyName:
    """A path type that accepts every name as a plain file name."""

    def __init__(self, name):
        self.name = name


def load_shards_from_anywhere(folder):
    safetensors.PureWindowsPath = AnyName
    fuzz_weights.load_shards(folder)


def load_json_as_python_does(folder):
    files.parse_json = json.loads
    fuzz_weights.load_shards(folder)


def load_special_files(folder):
    files.open_regular = functools.partial(open, mode="rb")
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


def shards_outside(folder):
    return [
        m
        for m in fuzz_weights.shard_mutations(folder)
        if m.name.endswith(("refers to '../{}'", "refers to '{folder}/{}'"))
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


WEAKENED = {
    "shards in any folder": (fuzz_weights.make_shards, load_shards_from_anywhere, shards_outside),
    "Python's JSON parser": (fuzz_weights.make_shards, load_json_as_python_does, deep_json),
    "pipes allowed": (fuzz_tokenizers.make_llama3, load_special_files, pipes),
    "overlapping tensors": (fuzz_gguf.make_gguf_model, load_tensors_that_overlap, shifted),
    "ids not checked": (fuzz_runs.make_tokens, load_ids_out_of_range, large_ids),
    "counts not checked": (fuzz_runs.make_tokens, load_any_counts, other_counts),
    "vocabulary ids not checked": (fuzz_tokenizers.make_pair, load_any_vocabulary, huge_ids),
}
UNCHANGED = {
    fuzz_weights.make_shards: fuzz_weights.load_shards,
    fuzz_tokenizers.make_llama3: fuzz_tokenizers.load_any_tokenizer,
    fuzz_gguf.make_gguf_model: fuzz_gguf.load_gguf_model,
    fuzz_runs.make_tokens: fuzz_runs.load_tokens,
    fuzz_tokenizers.make_pair: fuzz_tokenizers.load_any_tokenizer,
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere memory is not bounded")
@pytest.mark.parametrize("name", WEAKENED)
def test_a_reader_without_one_of_its_checks_fails(name, monkeypatch):
    monkeypatch.setattr(harness, "TIME_LIMIT", 2)
    make, load, mutations = WEAKENED[name]
    assert fuzz(Target(name, make, load, mutations), 1).failures
    unchanged = fuzz(Target(name, make, UNCHANGED[make], mutations), 4)
    assert not unchanged.failures, failures_of(unchanged)

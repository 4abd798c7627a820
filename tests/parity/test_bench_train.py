"""``bench train``: end-to-end runs on a tiny model, and the figures computed from their measurements."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from statistics import median
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest

from parity import tables
from parity.__main__ import COMMANDS, main
from parity.bench import command, pages
from parity.bench import targets as bench_targets
from parity.bench import train as bench
from parity.bench import train_variants as bench_variants
from parity.bench.targets import Target
from parity.bench.train_variants import WORKS

pytest.importorskip("resource", reason="the benchmark reads page faults and memory through resource")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def parity(*arguments):
    return subprocess.run([sys.executable, "-m", "parity", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Output and JSON of ``bench train`` on a tiny model: two rounds of 2 warm-up and 3 timed steps."""
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    counts = ["--rounds", "2", "--warmup", "2", "--steps", "3", "--threads", "1"]
    done = parity("bench", "train", "--work", "tiny", *counts, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return done, json.loads(path.read_text(encoding="utf-8"))


def test_variants_take_turns_in_every_round(tiny):
    done, result = tiny
    assert result["request"] == {"rounds": 2, "warmup": 2, "steps": 3, "threads": 1, "isa": "native"}
    assert list(result["works"]) == ["tiny"]
    runs = result["works"]["tiny"]["runs"]
    assert list(runs) == ["tinyllm", "torch-eager"]
    turns = [line.split(" …")[0] for line in done.stderr.splitlines() if line.startswith("round")]
    expected = [f"round {number}/2: {variant}" for number in (1, 2) for variant in runs]
    assert turns == expected
    for rounds in runs.values():
        assert len(rounds) == 2
        for run in rounds:
            assert len(run["seconds"]) == len(run["page_faults"]) == 3
            assert all(value > 0 for value in run["seconds"])
            assert all(value >= 0 for value in run["page_faults"])
            assert run["peak_bytes"] >= run["built_bytes"] > 1e7  # an interpreter with NumPy


def test_losses_of_both_variants_are_near_log_vocabulary_size(tiny):
    """Random tokens and small random weights: the loss is near that of a uniform distribution, log V."""
    uniform = math.log(WORKS["tiny"].vocab_size)
    for rounds in tiny[1]["works"]["tiny"]["runs"].values():
        for run in rounds:
            assert len(run["losses"]) == 2 + 3  # including the warm-up
            assert all(abs(loss - uniform) < 0.2 for loss in run["losses"])
            assert len(set(run["losses"])) == 5  # tokens and weights change in every step
        # With the same seeds and one thread, the second process repeats the first.
        assert rounds[0]["losses"] == pytest.approx(rounds[1]["losses"], rel=1e-6)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_both_sides_train_the_same_number_of_parameters(arch):
    work = replace(WORKS["tiny"], arch=arch)
    theirs = bench_variants.hugging_face_model(work, threads=torch.get_num_threads())
    assert theirs.config.model_type == arch and theirs.config._attn_implementation == "sdpa"
    assert bench_variants.tinyllm_model(work).num_parameters() == theirs.num_parameters()


def test_a_process_loads_only_the_libraries_of_its_variant(tiny):
    runs = tiny[1]["works"]["tiny"]["runs"]
    assert set(runs["tinyllm"][0]["libraries"]) == {"numpy"}
    assert set(runs["torch-eager"][0]["libraries"]) == {"numpy", "torch", "transformers"}


def test_summary_and_ratios_are_computed_from_the_runs(tiny):
    done, result = tiny[0], tiny[1]["works"]["tiny"]
    ours, theirs = result["runs"]["tinyllm"], result["runs"]["torch-eager"]
    for variant, rounds in result["runs"].items():
        seconds = [*rounds[0]["seconds"], *rounds[1]["seconds"]]
        summary = result["variants"][variant]
        assert summary["seconds"] == {"median": median(seconds), "min": min(seconds), "max": max(seconds)}
        assert summary["tokens_per_s"] == pytest.approx(2 * 16 / median(seconds))
        assert f"{summary['seconds']['median']:.4f}" in done.stdout
    recomputed = {
        "time (medians)": [median(a["seconds"]) / median(b["seconds"]) for a, b in zip(ours, theirs)],
        "time (minima)": [min(a["seconds"]) / min(b["seconds"]) for a, b in zip(ours, theirs)],
        "peak memory": [a["peak_bytes"] / b["peak_bytes"] for a, b in zip(ours, theirs)],
    }
    for name, values in recomputed.items():
        ratio = result["ratios"]["torch-eager"][name]
        assert ratio["rounds"] == pytest.approx(values)
        assert ratio["median"] == pytest.approx(sum(values) / 2)
        assert [ratio["min"], ratio["max"]] == pytest.approx(sorted(values))
        assert f"{ratio['median']:.3f}" in done.stdout


def test_ratios_are_paired_by_round():
    """If the machine is half as fast in one round, both times double and their ratio stays."""
    seconds = {"tinyllm": ([1.0, 2.0, 9.0], [4.0, 5.0, 3.0]), "torch-eager": ([4.0], [8.0])}
    runs = {v: [{"seconds": s, "peak_bytes": 1} for s in rounds] for v, rounds in seconds.items()}
    assert bench.compare(runs)["torch-eager"]["time (medians)"]["rounds"] == [0.5, 0.5]
    assert bench.compare(runs)["torch-eager"]["time (minima)"]["rounds"] == [0.25, 0.375]


def losses_in_this_process(variant):
    """Of a variant of PyTorch, which takes seconds to load: this process already has it."""
    return bench.run_variant(variant, WORKS["tiny"], warmup=2, steps=3, threads=1)["losses"]


def losses_of_eager(tiny):
    return tiny[1]["works"]["tiny"]["runs"]["torch-eager"][0]["losses"]


def test_fused_loss_gives_the_losses_of_eager(tiny):
    if missing := bench_variants.what_is_missing("torch-linear-ce"):
        pytest.skip(f"needs {missing}")
    assert losses_in_this_process("torch-linear-ce") == pytest.approx(losses_of_eager(tiny), rel=1e-5)


def test_compiled_model_gives_the_losses_of_eager(tiny, monkeypatch):
    """With a compiler that only traces: model and loss are one graph."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert losses_in_this_process("torch-compile") == pytest.approx(losses_of_eager(tiny), rel=1e-5)
    torch._dynamo.reset()


@pytest.mark.full
def test_model_compiled_to_machine_code_gives_the_losses_of_eager(tiny):
    """Takes half a minute until torch has cached its compilation."""
    if missing := bench_variants.what_is_missing("torch-compile"):
        pytest.skip(f"needs {missing}")
    runs = bench.measure(WORKS["tiny"], ["torch-compile"], rounds=1, warmup=2, steps=3, threads=1)
    assert runs["torch-compile"][0]["losses"] == pytest.approx(losses_of_eager(tiny), rel=1e-5)


def test_gemms_have_no_loss_and_load_only_numpy(tiny):
    isa = "avx2" if bench.machine()["instructions"] in ("AVX2", "AVX-512") else "native"  # and it obeys
    (run,) = bench.measure(WORKS["tiny"], ["gemms"], 1, warmup=2, steps=3, threads=1, isa=isa)["gemms"]
    assert len(run["seconds"]) == 3 and all(value > 0 for value in run["seconds"])
    assert run["losses"] == [None] * 5
    assert set(run["libraries"]) == {"numpy"}
    runs = {"tinyllm": tiny[1]["works"]["tiny"]["runs"]["tinyllm"][:1], "gemms": [run]}
    ratios = bench.compare(runs)
    assert list(ratios["gemms"]) == ["time (medians)", "time (minima)"]
    ratio = median(runs["tinyllm"][0]["seconds"]) / median(run["seconds"])
    assert ratios["gemms"]["time (medians)"]["median"] == pytest.approx(ratio)
    work = {"runs": runs, "variants": bench.summarise(runs, WORKS["tiny"]), "ratios": ratios}
    table = "\n".join(bench.work_tables(work))
    assert "tinyllm / gemms" in table and f"{ratio:.3f}" in table


class Recorded(np.ndarray):
    """An array whose matrix products record their shapes in ``products``; so do the products of results."""

    products: ClassVar[Counter] = Counter()

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        if ufunc.__name__ == "matmul" and min(array.ndim for array in inputs) > 1:  # else a sum
            Recorded.products[tuple(array.shape for array in inputs)] += 1
        plain = [array.view(np.ndarray) if isinstance(array, Recorded) else array for array in inputs]
        if out is not None:
            kwargs["out"] = tuple(array.view(np.ndarray) for array in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        return result.view(Recorded) if isinstance(result, np.ndarray) else result

    def __array_function__(self, function, types, args, kwargs):  # np.empty(…, like=recorded) and so on
        result = super().__array_function__(function, types, args, kwargs)
        return result.view(Recorded) if isinstance(result, np.ndarray) else result


@pytest.mark.parametrize(
    "sizes",
    [
        dict(n_layer=2, n_embd=32, n_head=2, vocab_size=64, batch=2, context=16),
        # Several chunks of rows and classes, blocks of queries and groups of heads, all with a remainder.
        dict(n_layer=1, n_embd=24, n_head=24, vocab_size=8500, batch=2, context=300),
        dict(n_layer=2, n_embd=48, n_head=3, vocab_size=64, batch=2, context=300, arch="llama"),
    ],
)
def test_gemms_are_exactly_the_products_of_a_training_step(monkeypatch, sizes):
    matmul = np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, out=None: matmul(a.view(Recorded), b, out=out))
    work = bench_variants.Work(**sizes, n_positions=sizes["context"])
    ids = np.random.default_rng(0).integers(0, work.vocab_size, (work.batch, work.context))

    def products_of(function):
        monkeypatch.setattr(Recorded, "products", Counter())
        function()
        return Recorded.products

    model = bench_variants.tinyllm_model(work)
    for parameter in model.parameters():
        parameter.data = parameter.data.view(Recorded)
    expected = products_of(lambda: model.loss(ids, ids).backward())
    gemms = bench_variants.gemms_step(work, threads=1)
    for name in ("attention_products", "head_products"):  # these use @, which does not call np.matmul
        plain = getattr(bench_variants, name)
        recorded = lambda *arrays, plain=plain: plain(*(array.view(Recorded) for array in arrays))  # noqa: E731
        monkeypatch.setattr(bench_variants, name, recorded)
    assert expected.total() > 12 * work.n_layer
    assert products_of(lambda: gemms(ids, ids)) == expected


def fake_runs(**costs):
    """variant_with_underscores=[(seconds, peak_bytes, page_faults) per round] -> a result of ``measure``."""
    return {
        variant.replace("_", "-"): [
            {"seconds": [seconds], "peak_bytes": memory, "page_faults": [faults]}
            for seconds, memory, faults in rounds
        ]
        for variant, rounds in costs.items()
    }


def rows_of_works(instructions, works):
    return bench_targets.rows_of(bench_targets.train_targets(instructions), bench_targets.COSTS, works)


def test_targets_are_computed_by_round():
    """In the second round the machine is half as fast, but the ratios stay."""
    runs = fake_runs(
        tinyllm=[(7.0, 52, 4000), (14.0, 52, 6000)],
        torch_eager=[(10.0, 100, 0), (20.0, 100, 0)],
        torch_compile=[(9.0, 80, 0), (14.0, 80, 0)],
        torch_linear_ce=[(8.0, 65, 0), (18.0, 65, 0)],
        gemms=[(5.0, 30, 0), (10.0, 30, 0)],
    )
    rows = rows_of_works("AVX2", {"gpt2-124m": runs})
    found = {(row["cost"], row["against"]): (row["measured"], row["verdict"]) for row in rows}
    eager, best = ("torch-eager",), ("torch-compile", "torch-linear-ce")
    assert found == {
        ("time (medians)", eager): (0.7, "met, stretch too"),
        ("peak memory", eager): (0.52, "not met"),
        ("time (medians)", best): (pytest.approx((7 / 8 + 14 / 14) / 2), "met"),  # fastest of each round
        ("peak memory", best): (0.8, "met"),
        ("time (medians)", ("gemms",)): (1.4, "not met"),
        ("page faults", ()): (5000, "met"),
    }
    table = bench_targets.target_table(rows)
    assert len(table) == 1 + len(rows)
    assert table[3].split() == ["gpt2-124m", "time", "(medians)", "gemms", "1.2", "(1.12)", "1.400",
                                "1.400", "to", "1.400", "not", "met"]  # fmt: skip
    wider = {
        (row["cost"], row["against"]): row["verdict"] for row in rows_of_works("AVX-512", {"gpt2-124m": runs})
    }
    assert wider["time (medians)", eager] == "not met" and wider["peak memory", eager] == "met"


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [(0.5, "met, stretch too"), (0.51, "met"), (0.58, "met"), (0.581, "not met"), (None, "not measured")],
)
def test_verdict_compares_the_measurement_with_the_target(measured, verdict):
    assert bench_targets.verdict(Target("small", "peak memory", (), 0.58, stretch=0.50), measured) == verdict


def test_a_target_without_its_peer_is_not_measured():
    runs = fake_runs(tinyllm=[(1.0, 1, 9000)], torch_compile=[(1.0, 1, 0)])
    rows = rows_of_works("AVX2", {"gpt2-124m": runs})
    verdicts = {(row["cost"], row["against"]): row["verdict"] for row in rows}
    assert verdicts.pop(("page faults", ())) == "not met"
    assert set(verdicts.values()) == {"not measured"}
    assert "–" in bench_targets.target_table(rows)[1]


@pytest.mark.parametrize("instructions", ["AVX2", "AVX-512", "ASIMD"])
def test_default_variants_cover_every_target(instructions):
    targets = bench_targets.train_targets(instructions)
    assert tuple(dict.fromkeys(target.work for target in targets)) == bench_targets.TARGET_WORKS
    for target in targets:
        assert target.work in WORKS and target.cost in bench_targets.COSTS
        assert set(target.against) <= set(bench_targets.needed_variants(target.work)) <= set(bench.VARIANTS)
        assert target.stretch is None or target.stretch < target.at_most


def only_tiny(monkeypatch, *targets):
    """Measure only the work ``tiny``, with these targets: (cost, against, at most)."""
    reach = tuple((("tiny",), cost, against, *2 * [(at_most, None)]) for cost, against, at_most in targets)
    monkeypatch.setattr(bench_targets, "_REACH", reach)
    monkeypatch.setattr(bench_targets, "TARGET_WORKS", ("tiny",))


@pytest.mark.parametrize(("at_most", "code"), [(1e-9, 1), (1e9, 0)])
def test_without_work_targets_are_reported_and_a_missed_one_is_exit_code_1(
    monkeypatch, capsys, tmp_path, at_most, code
):
    only_tiny(monkeypatch, ("time (medians)", ("gemms",), at_most), ("page faults", (), 1e9))
    path = tmp_path / "all.json"
    options = "--variants tinyllm gemms --rounds 1 --warmup 0 --steps 1 --threads 1 --json".split()
    assert main(["bench", "train", *options, str(path)]) == code
    rows = json.loads(path.read_text(encoding="utf-8"))["targets"]
    assert [row["verdict"] for row in rows] == ["not met" if code else "met", "met"]
    out = capsys.readouterr().out
    assert out.splitlines()[-2].endswith(rows[0]["verdict"])
    assert f"{rows[0]['measured']:.3f}" in out


# ---- The written tables ----


def test_write_replaces_the_tables_of_the_page(monkeypatch, tmp_path, tiny):
    """``--write`` with the first round of ``tiny``; only the text between the markers changes."""
    rounds = {name: runs[:1] for name, runs in tiny[1]["works"]["tiny"]["runs"].items()}
    monkeypatch.setattr(bench, "measure", mock.Mock(return_value=rounds))
    only_tiny(monkeypatch, ("time (medians)", ("torch-eager",), 1e-9), ("page faults", (), 1e9))
    others = "train-avx512", "decode-avx2", "decode-avx512"
    empty = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in others)
    front = tmp_path / "front.md"
    front.write_text("<!-- speed -->\n<!-- /speed -->\n", encoding="utf-8")
    for maker in pages.MAKERS:
        old = "before\n<!-- train-avx2 -->\nold\n<!-- /train-avx2 -->\nafter\n"
        (tmp_path / f"{maker.lower()}.md").write_text(old + empty, encoding="utf-8")
    monkeypatch.setattr(pages, "MEASURED", tmp_path)
    monkeypatch.setattr(pages, "FRONT_PAGE", front)
    monkeypatch.setattr(pages, "TRAINING", {"two layers": "tiny"})
    facts = bench.machine() | {"cpu": "AMD EPYC"}
    for module in command, bench:
        monkeypatch.setattr(module, "machine", lambda: facts)
    options = "--rounds 1 --warmup 0 --steps 1 --threads 1 --isa avx2 --write".split()
    assert main(["bench", "train", *options]) == 1
    counts = dict(warmup=0, steps=1, threads=1, isa="avx2")
    bench.measure.assert_called_once_with(WORKS["tiny"], list(rounds), 1, **counts)
    text = (tmp_path / "amd.md").read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- train-avx2 -->\n\n`python -m parity bench train`, ")
    assert text.endswith("\n\n<!-- /train-avx2 -->\nafter\n" + empty) and "old" not in text
    assert "old" in (tmp_path / "intel.md").read_text(encoding="utf-8")
    assert tables.first_cells(tables.read(tmp_path / "amd.md", "train-avx2")) == [["tiny", "tiny"], ["tiny"]]
    ratio = tables.cells(text)[1][0][3].split()[0]
    ((row, *further),) = tables.cells(front.read_text(encoding="utf-8"))
    assert row == ["two layers", *2 * ["not measured"], ratio, "not measured", "–"]
    assert len(further) == len(pages.DECODING)
    assert "| 2 × 16 tokens | s/step |" in text and "| work | batch |  | tinyllm | torch-eager |" in text
    assert "Not met: time (medians) on tiny (" in text and "1e-09" in text
    assert "Page faults per step: tinyllm " in text


def test_a_processor_without_a_page_is_told_what_to_do_instead_before_it_is_measured(monkeypatch, capsys):
    facts = {"cpu": "Apple M9", "instructions": "arm64", "load": "0.0"}
    for name, options in (("train", []), ("scaling", []), ("decode", ["--model", "x"])):
        monkeypatch.setattr(command, "machine", lambda: facts)
        assert main(["bench", name, *options, "--write"]) == 2
        assert "not for Apple M9: write the result to a file with --json" in capsys.readouterr().err


@pytest.mark.parametrize("maker", pages.MAKERS)
@pytest.mark.parametrize("instructions", ["AVX2", "AVX-512"])
def test_the_written_tables_have_every_work_and_target(maker, instructions):
    page, name = pages.page_of({"cpu": maker}), f"train-{pages.INSTRUCTIONS[instructions]}"
    costs, ratios = tables.first_cells(tables.read(page, name))
    assert tuple(dict.fromkeys(costs)) == bench_targets.TARGET_WORKS, (
        "run: python -m parity bench train --write"
    )
    assert ratios == [target.work for target in bench_targets.train_targets(instructions) if target.against]


def test_the_front_page_has_the_ratios_of_the_written_tables():
    written = tables.read(pages.FRONT_PAGE, "speed").strip()
    assert written == pages.front_page(), "run: python -m parity bench train --write"


def test_peak_memory_excludes_the_parent_process():
    """On Linux ru_maxrss of a child starts at the peak of its parent."""
    code = "from parity.bench.train import peak_memory; print(peak_memory())"
    ballast = bytearray(b"x") * 200_000_000
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(ballast) / 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--variants", "tinyllm", "llama.cpp"],
            "--variants llama.cpp",
        ),
        (["--variants", "tinyllm", "--peers"], "--peers"),
        (["--variants", "gemms", "gemms"], "--variants gemms gemms"),
        (["--peers", "--warmup", "0"], "--warmup 0"),
        (["--work", "huge"], "--work huge"),
        (["--rounds", "0"], "--rounds 0"),
        (["--warmup", "-1"], "--warmup -1"),
        (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json"),
        (["--steps", "many"], "--steps"),
        (["--stepz", "3"], "--stepz"),
        (["--write", "--work", "small"], "--write"),
    ],
)
def test_wrong_arguments_give_one_sentence_and_exit_code_2(capsys, arguments, sentence):
    assert main(["bench", "train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and sentence in captured.err


def test_the_exit_code_and_the_sentence_are_those_of_the_process():
    done = parity("bench", "train", "--work", "huge")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--work huge" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bench"], ["train", "decode", "scaling", "--device cuda"]),
        (["bench", "sleep"], ["'bench sleep'", "scaling"]),
        (["bench", "tran"], ["did you mean train?"]),
        (["reprot"], ["did you mean report?"]),
        (["sleep"], ["'sleep'", "report, proof, grade, check, bench, reliability", "--help"]),
    ],
)
def test_an_unknown_command_gives_one_sentence_and_exit_code_2(capsys, arguments, named):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(words in captured.err for words in named)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_with_its_description(capsys, arguments):
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    text = " ".join(captured.out.split())
    for words, options in COMMANDS.items():
        assert f"  {words}" in captured.out and options.__doc__.splitlines()[0] in text


def test_a_failing_variant_ends_the_benchmark_with_exit_code_1():
    """Its own process does not know the variant's name, so there is neither a result nor a report."""
    with pytest.raises(SystemExit, match=r"no-such-variant failed in round 1 \(code 1\): no report"):
        bench.measure(WORKS["tiny"], ["no-such-variant"], rounds=1, warmup=0, steps=1, threads=1)

"""``bench decode``: an end-to-end run on a small model, and the figures computed from its measurements."""

import subprocess
import sys

import numpy as np
import pytest

from parity import tables
from parity.__main__ import main
from parity.bench import command, decode_sides, pages
from parity.bench import decode as bench_decode
from parity.bench.decode_sides import SIZES, Side, Sizes
from parity.bench.targets import any_not_met
from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")

SMALL = Sizes(prompt=5, new=6, prefills=(10, 20), repeats=2, steps=3, history=8, question=4, rows=3)

TEXTS = {
    name: {"ids": [[3, 4, 5, 3, 4]], "temperature": temperature, "rng": 0, "stop_ids": []}
    for name, temperature in {"edit of code": 0, "summary": 0, "poem": 1}.items()
}


@pytest.fixture(scope="module")
def model():
    small = dict(
        vocab_size=64, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    return Llama(LlamaConfig(**small), rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def sources(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder, overwrite=True)
    return dict.fromkeys(("tinyllm", "transformers"), str(folder))


@pytest.fixture(scope="module")
def result(sources):
    works = tuple(work for work in bench_decode.WORKS if work != "speculation")
    return bench_decode.decode(
        sources, "a small one", rounds=1, threads=1, works=works, omitted=("No llama.",), sizes=SMALL
    )


def side_of(name, source, works, texts=None):
    return Side(name, source, works, texts or {}, SMALL, threads=1, started=0.0)


# ---- Measurements ----


def test_both_sides_are_measured_and_generate_the_same_tokens(result):
    assert list(result["runs"]) == ["tinyllm", "transformers"]
    (ours,), (theirs,) = result["runs"].values()
    both = {"cold start": 1, "token": 1, "prefill 10": 2, "prefill 20": 2}
    alone = {"step": 3, "products on all threads": 3, "products on one thread": 3, "products": 3}
    alone |= {"second turn kept": 2, "second turn anew": 2, "1 rows": 3, "3 rows": 3}
    assert {cost: len(times) for cost, times in ours["seconds"].items()} == both | alone
    assert {cost: len(times) for cost, times in theirs["seconds"].items()} == both
    for run in (ours, theirs):
        assert all(0 < second < 60 for times in run["seconds"].values() for second in times)
        assert run["seconds"]["cold start"][0] > run["seconds"]["token"][0]
    assert set(ours["libraries"]) == {"numpy"}
    assert set(theirs["libraries"]) == {"numpy", "torch", "transformers"}
    assert len(ours["tokens"]["token"]) == 6 and ours["tokens"]["token"] == theirs["tokens"]["token"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_products_are_those_of_a_decoding_step(monkeypatch, kind):
    """Every matrix except untied embeddings, of which a step reads only a row; a tied head counts."""
    rng = np.random.default_rng(0)
    if kind == "gpt2":
        model = GPT2(GPT2Config(64, n_positions=16, n_embd=12, n_layer=2, n_head=3), rng=rng)
    else:
        model = Llama(LlamaConfig(64, 12, 20, 2, 6, 2), rng=rng)
    sizes, matmul = [], np.matmul

    def recording(a, b, **options):
        sizes.append(b.size)
        return matmul(a, b, **options)

    monkeypatch.setattr(np, "matmul", recording)
    decode_sides.steps_and_products(model, np.array([[1, 2]]), 1)
    matrices = [p.size for name, p in model.named_parameters() if p.ndim == 2 and name != "wpe.weight"]
    untied = [model.embed_tokens.weight.size] if kind == "llama" else []
    # The prefill and one step, then the same products on all threads and on one.
    assert sum(sizes) == 4 * (sum(matrices) - sum(untied))


def test_the_faster_products_count(monkeypatch):
    times = {"step": [9.0], "products on all threads": [1.0, 4.0, 5.0], "products on one thread": [3.0]}
    monkeypatch.setattr(decode_sides, "steps_and_products", lambda *arguments: times)
    assert decode_sides.step(None, side_of("tinyllm", "", ()))["seconds"]["products"] == [3.0]


def test_a_second_turn_reads_only_the_question_if_the_first_is_kept(model, monkeypatch):
    lengths, forward = [], type(model).forward

    def recording(self, ids, **options):
        lengths.append(np.shape(ids)[1])
        return forward(self, ids, **options)

    monkeypatch.setattr(type(model), "forward", recording)
    measured = decode_sides.second_turn(model, side_of("tinyllm", "", ()))
    # The first turn (8 tokens, then 3 of the answer), then the question of 4 tokens thrice, with the answer's
    # last token at first, because generate has not processed it.
    assert lengths == [8, 1, 1, 5, 15, 4, 15, 4, 15]
    assert measured["tokens"]["second turn kept"] == measured["tokens"]["second turn anew"]


def test_speculation_is_measured_after_the_first_token_and_with_the_same_sampling(monkeypatch):
    calls = []

    def generate(model, ids, max_new_tokens, temperature, rng, stop_ids, speculate=None):
        calls.append((temperature, rng, speculate))
        assert ids == [[3, 4, 5, 3, 4]] and stop_ids == [] and max_new_tokens == 6
        for token in (7, 8, 9) if speculate else (7, 8):
            yield np.array([token])

    monkeypatch.setattr("tinyllm.generate", generate)
    measured = decode_sides.speculation(None, side_of("tinyllm", "", ("speculation",), TEXTS))
    assert calls == [(temp, 0, way) for temp in (0, 0, 1) for way in (None, "prompt")]
    assert measured["tokens"]["poem plain"] == [7, 8] and measured["tokens"]["poem speculative"] == [7, 8, 9]
    assert set(measured["seconds"]) == set(measured["tokens"])


def test_importing_the_modules_loads_no_array_library():
    modules = "parity.bench.decode, parity.bench.decode_sides"
    code = f"import sys, {modules}; print({{'numpy', 'torch', 'tinyllm'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_a_failing_side_exits_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"tinyllm failed in round 1 \(code 1\): no report"):
        bench_decode.decode({"tinyllm": str(tmp_path)}, "none", rounds=1, threads=1, sizes=SMALL)


# ---- Ratios and verdicts ----


def runs_of(**costs):
    """A side's result in one round: cost -> its one measurement."""
    return {"seconds": {name.replace("_", " "): [value] for name, value in costs.items()}, "tokens": {}}


def test_ratios_and_verdicts_are_computed_by_round():
    ours = [runs_of(token=t, step=s, products=2.0) for t, s in ((2.0, 2.0), (20.0, 6.0), (2.0, 2.2))]
    theirs = [runs_of(token=t) for t in (5.0, 10.0, 4.0)]
    runs = {"tinyllm": ours, "transformers": theirs}
    step, token = bench_decode.target_rows(runs, ("step", "token"), SIZES, "AVX2")
    assert step["rounds"] == [1.0, 3.0, 1.1] and token["rounds"] == [0.4, 2.0, 0.5]
    assert (step["measured"], step["verdict"]) == (1.1, "met, stretch too")
    assert (token["measured"], token["verdict"]) == (0.5, "met")
    _, token = bench_decode.target_rows(runs, ("step", "token"), SIZES, "AVX-512")
    assert token["verdict"] == "not met" and any_not_met({"targets": [token]})


def test_the_median_of_repeated_measurements_counts():
    ours = {"seconds": {"step": [1.0, 9.0, 2.0], "products": [4.0, 0.1, 1.0]}, "tokens": {}}
    (row,) = bench_decode.target_rows({"tinyllm": [ours]}, ("step",), SIZES, "AVX2")
    assert row["rounds"] == [2.0]


def test_targets_are_those_of_the_instruction_set():
    limits = {}
    for comparison in bench_decode.comparisons(SIZES):
        targets = [comparison.target(name) for name in ("AVX2", "AVX-512", "arm64")]
        assert targets[0] == targets[2]
        limits[comparison.name] = [(target.at_most, target.stretch) for target in targets[:2]]
    assert limits["a step"] == 2 * [(1.2, 1.1)]
    assert limits["a token"] == [(0.55, 0.45), (0.42, 0.38)]
    for length in (128, 512, 2048):
        assert limits[f"prefill of {length} tokens"] == [(1.0, 0.85), (0.7, 0.6)]
    assert limits["second turn of a chat, first token"] == 2 * [(0.35, None)]
    # Rates: at least 1.3 (1.6), 0.97 and 3 times the tokens/s
    (at_most, stretch), _ = limits["edit of code, speculative"]
    assert 1.3 <= 1 / at_most < 1.302 and 1 / stretch == 1.6
    assert 0.97 <= 1 / limits["poem, speculative"][0][0] < 0.972
    assert limits["poem, speculative"] == limits["summary, speculative"]
    assert 3 <= 1 / limits["8 rows at once"][0][0] < 3.01


def test_what_was_not_measured_has_no_ratio_and_is_named():
    rows = bench_decode.target_rows({"tinyllm": [runs_of(token=1.0)]}, ("token", "rows"), SIZES, "AVX2")
    assert [row["verdict"] for row in rows] == ["not measured"] * 2
    assert not any_not_met({"targets": rows})


def test_same_tokens_counts_up_to_the_first_difference():
    assert bench_decode.same_tokens([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert bench_decode.same_tokens([1, 2], [1, 2, 3]) == 2


# ---- Reports ----


def with_speculation(result):
    """The result with made-up measurements of speculation and of llama.cpp."""
    seconds = {f"{text} plain": [0.02] for text in TEXTS} | {f"{text} speculative": [0.01] for text in TEXTS}
    tokens = {f"{text} {way}": [1, 2, 3] for text in TEXTS for way in ("plain", "speculative")}
    tokens["poem speculative"] = [1, 2, 4]
    ours, llama = result["runs"]["tinyllm"][0], result["runs"]["transformers"][0]
    ours = ours | {"seconds": ours["seconds"] | seconds, "tokens": ours["tokens"] | tokens}
    llama = llama | {"seconds": llama["seconds"] | {"token": [1 / 114]}}
    runs = result["runs"] | {"tinyllm": [ours], "llama.cpp Q4_1": [llama]}
    request = result["request"] | {"works": bench_decode.WORKS}
    targets = bench_decode.target_rows(runs, bench_decode.WORKS, SMALL, "AVX2")
    return result | {"request": request, "runs": runs, "targets": targets}


def test_report_contains_machine_versions_and_every_figure(result):
    report = bench_decode.report(with_speculation(result))
    for words in (
        "a small one", "numpy", "transformers 5", "tokens/s", "prefill of 20 tokens", "its products", "load",
        "The first 6 of 6 tokens of tinyllm and transformers are the same.", "No llama.", "114.0",
        "Poem speculative: the first 2 of 3 tokens are those of plain.",
        "Second turn kept: the first 3 of 3 tokens are those of anew.",
    ):  # fmt: skip
        assert words in report, words
    for row in result["targets"]:
        assert f"{row['measured']:.3f}" in report and row["verdict"] in report


def test_markdown_contains_every_cost_and_ratio(result):
    text = bench_decode.markdown(with_speculation(result))
    comparisons, llama = tables.first_cells(text)
    assert comparisons == [row.name for row in bench_decode.comparisons(SMALL)]
    assert llama == ["a token", "prefill of 10 tokens", "prefill of 20 tokens"]
    assert "| summary, speculative | tokens/s | 100.0 | plain | 50.0 | 0.500 | 0.50 | 1.03 |" in text
    assert "| poem, speculative |" in text and "a small one" in text and "transformers 5" in text
    assert "No llama." in text and "| tinyllm F32 | llama.cpp Q4_1 |" in text


def test_a_report_of_some_works_has_their_rows_only(result):
    (rows,) = tables.first_cells(bench_decode.markdown(result))
    names = [row.name for row in bench_decode.comparisons(SMALL) if row.work != "speculation"]
    assert rows == names


@pytest.mark.parametrize("maker", pages.MAKERS)
@pytest.mark.parametrize("name", ["decode-avx2", "decode-avx512"])
def test_the_written_tables_have_every_comparison(maker, name):
    rows, *_ = tables.first_cells(tables.read(pages.page_of({"cpu": maker}), name)) or [[]]
    assert rows == [row.name for row in bench_decode.comparisons(SIZES)], (
        "run: python -m parity bench decode --model smollm2 --write, with and without --isa avx2"
    )


# ---- The command ----


def test_sides_and_omissions_follow_from_the_model_and_the_works(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(bench_decode, "decode", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(bench_decode, "write_smollm2", lambda folder: None)
    command.BenchDecode(works=("step", "speculation", "llama.cpp"))._measure(None, tmp_path)
    (sources, name, *_, works, texts, omitted) = asked[0]
    assert list(sources) == ["tinyllm"] and "random" in name and texts == {}
    assert works == ("step", "speculation", "llama.cpp")
    assert [sentence.split()[0] for sentence in omitted] == ["Speculation", "llama.cpp"]
    command.BenchDecode(model="x", works=("token",))._measure(tmp_path, tmp_path)
    assert asked[1][0] == {"tinyllm": str(tmp_path), "transformers": str(tmp_path)} and asked[1][-1] == ()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--works", "sleep"], "--works sleep"),
        (["--isa", "avx2", "--write"], "--model"),
        (["--model", "x", "--works", "step", "--write"], "--works"),
        (["--model", "/no/such/model", "--rounds", "1"], "/no/such/model"),
    ],
)
def test_wrong_arguments_are_named(options, words, capsys):
    assert main(["bench", "decode", *options]) == 2
    assert words in capsys.readouterr().err

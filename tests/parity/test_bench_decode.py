"""``bench decode``: an end-to-end run on a small model, and the figures computed from its measurements."""

import subprocess
import sys

import numpy as np
import pytest

from parity import tables
from parity.bench import decode as bench_decode
from parity.bench.decode import Sizes
from parity.bench.targets import any_not_met
from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")

SIZES = Sizes(prompt=5, new=6, long_prompt=20, repeats=2, steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = dict(
        vocab_size=64, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    Llama(LlamaConfig(**small), rng=np.random.default_rng(0)).save_pretrained(path, overwrite=True)
    return path


@pytest.fixture(scope="module")
def result(folder):
    return bench_decode.decode(folder, "a small one", rounds=1, threads=1, sizes=SIZES)


def test_both_sides_are_measured_and_generate_the_same_tokens(result):
    assert list(result["runs"]) == ["tinyllm", "transformers"]
    for side, (run,) in result["runs"].items():
        assert len(run["tokens"]) == 6 and len(run["prefill_s"]) == 2
        assert run["first_token_s"] > run["token_s"] > 0 and min(run["prefill_s"]) > 0
        assert set(run["libraries"]) == {"numpy"} if side == "tinyllm" else {"numpy", "torch", "transformers"}
    ours = result["runs"]["tinyllm"][0]
    assert [len(ours[name]) for name in ("step_s", "products_s", "products_1_s")] == [3, 3, 3]
    assert bench_decode.same_tokens(result["runs"]) == 6


def test_report_contains_machine_versions_and_every_figure(result):
    report = bench_decode.report(result)
    for words in (
        "a small one",
        "numpy",
        "transformers 5",
        "tokens/s",
        "prefill of 20",
        "its products",
        "load",
    ):
        assert words in report
    assert "The first 6 of 6 greedy tokens are the same on both sides." in report
    for row in result["targets"]:
        assert f"{row['measured']:.3f}" in report and row["verdict"] in report


def test_markdown_contains_every_cost_and_ratio(result):
    text = bench_decode.markdown(result)
    costs, ratios = tables.first_cells(text)
    assert costs == [
        "decode", "prefill of 20 tokens", "cold start to first token", "decoding step",
        "its matrix-vector products alone",
    ]  # fmt: skip
    assert ratios == [target.work for target, _ in bench_decode.TARGETS]
    seconds = bench_decode.seconds_of(result["runs"])
    assert f"| {seconds['tinyllm']['prefill']:.3f} | {seconds['transformers']['prefill']:.3f} |" in text
    assert "a small one" in text and "transformers 5" in text and "6 of 6" in text


def test_the_written_table_has_every_target():
    _, ratios = tables.first_cells(tables.read(tables.BENCH_PAGE, "decode"))
    assert ratios == [target.work for target, _ in bench_decode.TARGETS], (
        "run: python -m parity bench decode --write"
    )


def run(token_s, step_s, products, prefill_s, first_token_s):
    many, one = products
    return dict(
        token_s=token_s, step_s=[step_s, 9.0, 0.0], products_s=[many], products_1_s=[one],
        prefill_s=[prefill_s], first_token_s=first_token_s,
    )  # fmt: skip


def test_ratios_and_verdicts_are_computed_by_round():
    ours, theirs = run(2.0, 1.0, (0.5, 0.8), 3.0, 4.0), run(5.0, 9.0, (9.0, 9.0), 2.0, 8.0)
    slow = run(20.0, 3.0, (8.0, 2.0), 3.0, 4.0)
    rows = bench_decode.target_rows({"tinyllm": [ours, slow, ours], "transformers": [theirs] * 3})
    assert [row["rounds"] for row in rows] == [[0.4, 4.0, 0.4], [2.0, 1.5, 2.0], [1.5] * 3, [0.5] * 3]
    assert [row["measured"] for row in rows] == [0.4, 2.0, 1.5, 0.5]
    assert [row["at_most"] for row in rows] == [0.5, 1.25, 1.0, 1.0]
    assert [row["verdict"] for row in rows] == ["met", "not met", "not met", "met"]
    assert any_not_met({"targets": rows}) and not any_not_met({"targets": [rows[0], rows[3]]})


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
    bench_decode.steps_and_products(model, np.array([[1, 2]]), 1)
    matrices = [p.size for name, p in model.named_parameters() if p.ndim == 2 and name != "wpe.weight"]
    untied = [model.embed_tokens.weight.size] if kind == "llama" else []
    # The prefill and one step, then the same products on all threads and on one.
    assert sum(sizes) == 4 * (sum(matrices) - sum(untied))


def test_same_tokens_counts_up_to_the_first_difference():
    runs = {"tinyllm": [{"tokens": [1, 2, 3, 4]}], "transformers": [{"tokens": [1, 2, 9, 4]}]}
    assert bench_decode.same_tokens(runs) == 2


def test_importing_the_module_loads_no_array_library():
    code = "import sys, parity.bench.decode; print({'numpy', 'torch', 'tinyllm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_a_failing_side_exits_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"tinyllm failed in round 1 \(code 1\): no report"):
        bench_decode.decode(tmp_path, "none", rounds=1, threads=1, sizes=SIZES)

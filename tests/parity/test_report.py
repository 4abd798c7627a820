"""``python -m parity report``: its output, its HTML page, and its exit codes."""

import importlib.util
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.compare import scaled_gradient  # noqa: E402
from support.models import SMALL, batch, configs, random_gpt2  # noqa: E402
from support.runs import full_disk  # noqa: E402

from parity.__main__ import main  # noqa: E402
from parity.compare import report  # noqa: E402
from parity.compare.layers import GRADIENTS, OUTPUTS, PARAMETERS  # noqa: E402
from parity.twins import bridge  # noqa: E402
from tinyllm import GPT2, GPT2Config  # noqa: E402
from tinyllm import functional as F  # noqa: E402
from tinyllm.models import ARCHITECTURES  # noqa: E402

CONFIG = GPT2Config(**SMALL)
TINY = "--n-layer 2 --n-head 3 --n-embd 12 --vocab-size 13 --n-positions 8 --tokens 7".split()


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of ``python -m parity report …``."""
    code = main(["report", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@settings(max_examples=15)
@given(config=configs(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_every_module_and_parameter_is_compared_and_agrees(config, seed, data):
    model = random_gpt2(config, seed)
    ids, targets = batch(config, (2, data.draw(st.integers(1, config.n_positions))), seed)
    findings = report.examine(model, bridge.to_torch(model), bridge.to_transformers(model), ids, targets)
    assert findings.first is None, findings.verdict()
    modules = {name for name, _ in model.named_modules() if name}
    parameters = {name for name, _ in model.named_parameters()}
    for comparison in (findings.twin, findings.theirs):
        rows = {kind: {row.name for row in comparison.rows if row.kind == kind} for kind in
                (OUTPUTS, GRADIENTS, PARAMETERS)}  # fmt: skip
        assert rows[OUTPUTS] == modules | {"loss"}
        assert rows[GRADIENTS] == modules - {"lm_head"}  # the fused loss holds no gradient of all logits
        assert rows[PARAMETERS] == parameters
        assert not comparison.only_ours


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_page_and_output_list_every_layer_of_a_random_model(tmp_path, capsys, dtype):
    page = tmp_path / "page.html"
    code, out, err = run(capsys, "--random", *TINY, "--dtype", dtype, "--seed", "3", "--out", str(page))
    assert (code, err) == (0, "")
    assert "comparisons are within their bounds" in out and f"dtype: {dtype}" in out
    assert "computed here in float64" in out
    text = page.read_text(encoding="utf-8")
    names = {name for name, _ in random_gpt2(CONFIG).named_modules() if name}
    names |= {name for name, _ in random_gpt2(CONFIG).named_parameters()}
    for name in names:
        assert f"<code>{name}</code>" in text, name
        assert re.search(rf"^{re.escape(name)} ", out, re.MULTILINE), name
    assert "within their bounds" in text and "differs" not in text
    assert text.count("<circle") > 2 * (len(names) + 10)  # a point for every row and side


def test_page_has_no_external_files(tmp_path, capsys):
    page = tmp_path / "page.html"
    run(capsys, "--random", *TINY, "--out", str(page))
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|src=|@import|url\(|<link|<script", text)
    assert set(re.findall(r'href="([^"]*)"', text)) <= {"#first"}
    assert "1e-10" in text and 'class="bound"' in text and "order of computation" in text


def test_a_full_disk_keeps_the_page_of_before(tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("before")
    with full_disk(1000):
        code, _, err = run(capsys, "--random", *TINY, "--out", str(page))
    assert code == 2 and "page.html cannot be written (File too large)" in err and err.count("\n") == 1
    assert page.read_text() == "before" and list(tmp_path.iterdir()) == [page]


def test_a_fault_in_forward_is_located_with_exit_code_1(tmp_path, capsys, monkeypatch):
    correct = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate: correct(x, "none"))  # erf instead of tanh
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "--random", *TINY, "--out", str(page))
    assert code == 1
    assert (
        "First diverging layer: h.0.mlp.c_proj. The output of h.0.mlp.c_proj differs from that of the twin"
        in out
    )
    assert "Everything up to the output of h.0.mlp.c_fc agrees" in out
    text = page.read_text(encoding="utf-8")
    row = re.search(r'<tr id="first" class=bad><td><code>(.*?)</code><td class=dim>(.*?)<', text)
    assert row.groups() == ("h.0.mlp.c_proj", "output")
    assert "h.0.mlp.c_proj differs</text>" in text


def test_a_fault_in_backward_is_located_with_exit_code_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(F, "layer_norm", scaled_gradient(F.layer_norm, 1 + 1e-8))
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "--random", *TINY, "--out", str(page))
    assert code == 1
    assert "First diverging layer: ln_f.weight. The gradient of ln_f.weight differs" in out
    assert '<tr id="first" class=bad><td><code>ln_f.weight</code>' in page.read_text(encoding="utf-8")


def test_a_difference_from_transformers_alone_is_located(tmp_path, capsys, monkeypatch):
    """Our model and its twin read eps from the same config, so only transformers reveals a mistake there."""
    to_transformers = report.bridge.to_transformers

    def other_eps(model):
        theirs = to_transformers(model)
        theirs.transformer.h[1].ln_2.eps = 1e-6
        return theirs

    monkeypatch.setattr(report.bridge, "to_transformers", other_eps)
    code, out, _ = run(capsys, "--random", *TINY, "--out", str(tmp_path / "page.html"))
    assert code == 1
    assert "First diverging layer: h.1.ln_2. The output of h.1.ln_2 differs from that of transformers" in out


@pytest.mark.parametrize("changes", [{}, dict(lm_head_bias=True, qkv_bias=False, tie_word_embeddings=False)])
def test_report_on_a_folder(tmp_path, capsys, changes):
    random_gpt2(GPT2Config(**SMALL, **changes)).save_pretrained(tmp_path / "model")
    code, out, _ = run(capsys, str(tmp_path / "model"), "--tokens", "8", "--out", str(tmp_path / "page.html"))
    assert code == 0, out
    assert (report.COPIED if changes else report.LOADED) in out
    parameters = "h.*.attn.c_attn.bias (parameter)"
    assert (parameters in out) == bool(changes)  # transformers always has this bias


def test_report_on_given_ids(tmp_path, capsys):
    code, out, _ = run(
        capsys, "--random", *TINY, "--ids", "1", "5", "12", "--out", str(tmp_path / "page.html")
    )
    assert code == 0 and "1 × 2 tokens, 2 targets" in out


def folder_with_config(tmp_path, changes):
    random_gpt2(CONFIG).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


WRONG = {
    "no model": ([], "--random"),
    "two models": (["x", "--random"], "--random"),
    "no folder": (["./nowhere"], "'./nowhere'"),
    "no config": (["."], "config.json"),
    "architecture": (["--random", "--arch", "mamba"], "--arch mamba"),
    "sizes of a folder": (["model", "--n-layer", "3"], "--n-layer"),
    "a bad size": (["--random", "--n-head", "5"], "n_head (5)"),
    "batch": (["--random", "--batch", "0"], "--batch 0"),
    "seed": (["--random", "--seed", "-1"], "--seed -1"),
    "too long": (["--random", "--tokens", "65"], "65 tokens"),
    "outside": (["--random", "--ids", "3", "256"], "--ids[0, 1] is 256"),
    "one id": (["--random", "--ids", "3"], "--ids"),
    "out": (["--random", "--out", "no/page.html"], "--out no/page.html"),
    "dtype": (["--random", "--dtype", "float16"], "--dtype"),
    "option": (["--random", "--colour", "red"], "--colour"),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_give_one_sentence_and_exit_code_2(
    tmp_path, capsys, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_architecture_without_a_twin_is_named(capsys, monkeypatch):
    class Own(GPT2):
        pass

    monkeypatch.setitem(ARCHITECTURES, "own", Own)
    assert main(["report", "--random", "--arch", "own"]) == 2
    printed = capsys.readouterr().err
    assert "Own does not have a PyTorch twin" in printed and "python -m parity check" in printed


def test_unsupported_or_inconsistent_folders_give_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_with_config(tmp_path, {"model_type": "bert"})
    code, _, err = run(capsys, "./model")
    assert code == 2 and "'bert'" in err and "gpt2" in err
    folder_with_config(tmp_path / "shapes", {"n_inner": 5, "n_positions": 9})
    code, _, err = run(capsys, "./shapes/model")
    assert code == 2 and "Wrong shape (7)" in err and "wpe.weight is (8, 12), not (9, 12)" in err


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_library_gives_an_install_command(tmp_path, capsys, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    code, _, err = run(capsys, "--random")
    assert code == 2 and f"{missing}: pip install 'tinyllm-numpy[test]'" in err

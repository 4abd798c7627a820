"""``parity.compare`` and ``python -m parity report`` agree where they should, and find what is planted."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_gpt2 import SMALL, batch, configs, random_gpt2  # noqa: E402

import parity  # noqa: E402
from parity import bridge, report  # noqa: E402
from parity.__main__ import main  # noqa: E402
from parity.layers import FLOAT32_ROUNDING, GRADIENTS, OUTPUTS, PARAMETERS  # noqa: E402
from tinyllm import Error, GPT2Config, Tensor, nn  # noqa: E402
from tinyllm import functional as F  # noqa: E402

CONFIG = GPT2Config(**SMALL)
IDS, TARGETS = batch(CONFIG, (2, 7))


@pytest.fixture
def pair():
    """A GPT-2 and its twin, float64."""
    model = random_gpt2(CONFIG)
    return model, bridge.to_torch(model)


def found(comparison):
    """Kind and name of the first diverging row."""
    return comparison.first and (comparison.first.kind, comparison.first.name)


def scaled_gradient(op, factor):
    """``op`` whose output is right and the gradient that comes back through it too large."""

    def wrong(*args, **kwargs):
        y = op(*args, **kwargs)
        return Tensor.from_op(y.data, (y,), lambda grad: (grad * factor,))

    return wrong


class LearnersBlock(torch.nn.Module):
    """A GPT-2 block as a learner writes it: other names, another order of definition."""

    def __init__(self, C, heads, separate):
        super().__init__()
        self.heads, self.separate = heads, separate
        self.ff = torch.nn.Sequential(
            torch.nn.Linear(C, 4 * C), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(4 * C, C)
        )
        self.out = torch.nn.Linear(C, C)
        if separate:
            self.q, self.k, self.v = (torch.nn.Linear(C, C) for _ in range(3))
        else:
            self.qkv = torch.nn.Linear(C, 3 * C)
        self.norm1, self.norm2 = torch.nn.LayerNorm(C), torch.nn.LayerNorm(C)

    def forward(self, x):
        B, T, C = x.shape
        y = self.norm1(x)
        q, k, v = (self.q(y), self.k(y), self.v(y)) if self.separate else self.qkv(y).split(C, dim=-1)
        q, k, v = (z.view(B, T, self.heads, -1).transpose(1, 2) for z in (q, k, v))
        weights = q @ k.transpose(-2, -1) / (C // self.heads) ** 0.5
        weights = weights.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.ff(self.norm2(x))


class LearnersGPT(torch.nn.Module):
    """Head first, tied, as nobody's checkpoint has it."""

    def __init__(self, V, T, C, layers, heads, separate=False):
        super().__init__()
        self.head = torch.nn.Linear(C, V, bias=False)
        self.tok, self.pos = torch.nn.Embedding(V, C), torch.nn.Embedding(T, C)
        self.tok.weight = self.head.weight
        self.blocks = torch.nn.ModuleList([LearnersBlock(C, heads, separate) for _ in range(layers)])
        self.norm = torch.nn.LayerNorm(C)

    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


NAMES = {"wte": "tok", "wpe": "pos", "ln_f": "norm", "lm_head": "head"} | {
    f"h.{i}.{ours}": f"blocks.{i}.{theirs}"
    for i in range(2)
    for ours, theirs in {
        "ln_1": "norm1", "attn.c_attn": "qkv", "attn.c_proj": "out", "ln_2": "norm2",
        "mlp.c_fc": "ff.0", "mlp.c_proj": "ff.2",
    }.items()
}  # fmt: skip


def learners_gpt(model, separate=False):
    """A LearnersGPT with the weights of ``model``."""
    theirs = LearnersGPT(13, 8, 12, layers=2, heads=3, separate=separate).double()
    state = theirs.state_dict()
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        parts = {NAMES[module]: parameter.data}
        if separate and module.endswith("c_attn"):
            block = NAMES[module].removesuffix("qkv")
            parts = {block + letter: part for letter, part in zip("qkv", np.split(parameter.data, 3))}
        for other, array in parts.items():
            state[f"{other}.{leaf}"].copy_(torch.tensor(array))
    theirs.load_state_dict(state)
    return theirs


# ----------------------------------------------------------------------- compare: where they agree


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


def test_either_side_may_be_either_library(pair):
    model, twin = pair
    other = bridge.from_torch(twin)
    for ours, theirs in [(model, twin), (twin, model), (model, other), (twin, bridge.to_torch(other))]:
        comparison = parity.compare(ours, theirs, IDS)
        assert comparison.first is None
        assert len(comparison.rows) == 2 * len([*model.named_modules()]) - 1 + len([*model.parameters()])
        assert not comparison.only_ours and not comparison.only_theirs
    losses = parity.compare(model, twin, (IDS, TARGETS))
    assert losses.rows[-1].kind == PARAMETERS and losses.first is None


def test_rows_are_in_the_order_of_computation(pair):
    names = [(row.kind, row.name) for row in parity.compare(*pair, IDS).rows]
    order = [
        (OUTPUTS, "wte"), (OUTPUTS, "h.0.ln_1"), (OUTPUTS, "h.0.attn.c_proj"), (OUTPUTS, "h.0.attn"),
        (OUTPUTS, "h.0"), (OUTPUTS, "h.1.mlp.c_fc"), (OUTPUTS, "lm_head"), (OUTPUTS, "(output)"),
        (GRADIENTS, "lm_head"), (GRADIENTS, "ln_f"), (PARAMETERS, "ln_f.weight"), (GRADIENTS, "h.1"),
        (GRADIENTS, "h.1.mlp.c_proj"), (PARAMETERS, "h.1.mlp.c_proj.bias"), (GRADIENTS, "h.1.mlp.c_fc"),
        (GRADIENTS, "h.0"), (GRADIENTS, "wte"), (PARAMETERS, "wte.weight"),
    ]  # fmt: skip
    places = [names.index(item) for item in order]
    assert places == sorted(places)


def test_models_are_left_as_they_were(pair):
    model, twin = pair
    model.train()
    model.h[0].eval()
    twin.h[1].train()
    model.wte.weight.grad = np.full(model.wte.weight.shape, 2.0)
    twin.wpe.weight.grad = torch.full_like(twin.wpe.weight, 3.0)
    before = [parameter.data.copy() for parameter in model.parameters()]
    with pytest.raises(Error):
        parity.compare(model, twin, np.array([[99]]))
    assert parity.compare(model, twin, IDS).first is None  # in eval mode, though the config has dropout
    assert model.training and not model.h[0].training and twin.h[1].training and not twin.training
    assert (model.wte.weight.grad == 2.0).all() and model.wpe.weight.grad is None
    assert (twin.wpe.weight.grad == 3.0).all() and twin.wte.weight.grad is None
    assert all(np.array_equal(a, parameter.data) for a, parameter in zip(before, model.parameters()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())


# --------------------------------------------------------------------- compare: what is planted


def test_a_changed_bias_is_found(pair):
    model, twin = pair
    with torch.no_grad():
        twin.h[1].attn.c_proj.bias[3] += 1e-6
    comparison = parity.compare(model, twin, IDS)
    assert found(comparison) == (OUTPUTS, "h.1.attn.c_proj")
    assert comparison.first.absolute == pytest.approx(1e-6)
    assert "First diverging layer: h.1.attn.c_proj" in str(comparison)
    assert "the last to agree is the output of h.1.attn.c_attn" in comparison.verdict()


def test_another_eps_is_found_and_the_right_one_before_it_is_not_blamed(pair):
    model, twin = pair
    twin.h[1].ln_2.eps = 1e-6
    assert found(parity.compare(model, twin, IDS)) == (OUTPUTS, "h.1.ln_2")


@pytest.mark.parametrize("factor", [1 + 1e-8, 0.0, np.nan])
def test_a_fault_in_a_gradient_only_is_found(pair, factor):
    model, twin = pair
    model.h[1].mlp.forward = scaled_gradient(model.h[1].mlp.forward, factor)
    comparison = parity.compare(model, twin, IDS)
    assert all(row.agrees for row in comparison.rows if row.kind == OUTPUTS)
    assert found(comparison) == (GRADIENTS, "h.1.mlp.dropout")  # the first to get what the block passed on


def test_a_fault_in_one_parameters_gradient_is_found(pair):
    model, twin = pair
    twin.h[0].mlp.c_fc.bias.register_hook(lambda grad: grad * (1 + 1e-8))
    comparison = parity.compare(model, twin, IDS)
    assert [row.name for row in comparison.rows if not row.agrees] == ["h.0.mlp.c_fc.bias"]
    assert found(comparison) == (PARAMETERS, "h.0.mlp.c_fc.bias")


def test_a_missing_gradient_is_a_difference(pair):
    model, twin = pair
    twin.ln_f.weight.requires_grad_(False)
    comparison = parity.compare(model, twin, IDS)
    assert found(comparison) == (PARAMETERS, "ln_f.weight")
    assert comparison.first.relative == np.inf


def test_lost_tying_is_found(pair):
    model, twin = pair
    twin.lm_head.weight = torch.nn.Parameter(twin.wte.weight.detach().clone())
    comparison = parity.compare(model, twin, IDS)
    assert found(comparison) == (PARAMETERS, "wte.weight")
    assert comparison.only_theirs == ["lm_head.weight (parameter)"]


def test_not_a_number_never_agrees(pair):
    model, twin = pair
    for weight in (model.h[0].ln_2.weight.data, twin.h[0].ln_2.weight.detach()):
        weight[0] = np.nan
    assert found(parity.compare(model, twin, IDS)) == (OUTPUTS, "h.0.ln_2")


def test_float32_has_a_bound_that_follows_depth():
    model = random_gpt2(CONFIG, dtype=np.float32)
    twin = bridge.to_torch(model)
    comparison = parity.compare(model, twin, IDS)
    assert comparison.first is None
    bounds = [row.bound for row in comparison.rows]
    assert bounds == sorted(bounds)
    assert bounds[0] == pytest.approx(
        8 * FLOAT32_ROUNDING * 13**0.5
    )  # wte: its longest axis is the vocabulary
    assert 0 < comparison.worst.relative < comparison.worst.bound < 1e-4
    assert parity.compare(model, twin, IDS, bound=1e-12).first is not None
    with torch.no_grad():
        twin.h[0].mlp.c_fc.bias += 1e-3
    assert found(parity.compare(model, twin, IDS)) == (OUTPUTS, "h.0.mlp.c_fc")


# ------------------------------------------------------------------------------ compare: names


@pytest.mark.parametrize("names", [None, NAMES], ids=["guessed", "given"])
def test_a_learners_model_with_other_names(names):
    model = random_gpt2(CONFIG)
    theirs = learners_gpt(model)
    comparison = parity.compare(model, theirs, IDS, names)
    assert comparison.first is None
    pairs = {row.name: row.their_name for row in comparison.rows}
    assert NAMES.items() <= pairs.items()
    assert pairs["h.1"] == "blocks.1" and pairs["h.0.mlp"] == "blocks.0.ff"  # containers, by their content
    assert pairs["wte.weight"] == "head.weight"  # tied: they define the head first
    assert {row.name for row in comparison.rows if row.kind == PARAMETERS} == dict(
        model.named_parameters()
    ).keys()
    assert comparison.only_theirs == ["blocks.0.ff.1", "blocks.1.ff.1"]

    theirs.blocks[1].ff[1].approximate = "none"  # erf for tanh
    assert found(parity.compare(model, theirs, IDS, names)) == (OUTPUTS, "h.1.mlp.c_proj")


def test_a_learners_model_with_separate_queries_keys_and_values():
    model = random_gpt2(CONFIG)
    theirs = learners_gpt(model, separate=True)
    comparison = parity.compare(model, theirs, IDS)
    assert comparison.first is None
    assert {"h.0.attn.c_attn", "h.0.attn.c_attn.bias (parameter)"} <= set(comparison.only_ours)
    assert {"blocks.1.q", "blocks.1.v.weight (parameter)"} <= set(comparison.only_theirs)
    pairs = {row.name: row.their_name for row in comparison.rows}
    assert pairs["h.0.attn.c_proj"] == "blocks.0.out" and pairs["h.1.ln_1"] == "blocks.1.norm1"
    theirs.blocks[0].norm2.eps = 1e-6
    assert found(parity.compare(model, theirs, IDS)) == (OUTPUTS, "h.0.ln_2")


def test_a_name_map_must_be_complete_and_true():
    model = random_gpt2(CONFIG)
    theirs = learners_gpt(model)
    less = {name: other for name, other in NAMES.items() if "ln_1" not in name}
    with pytest.raises(Error, match=r"layers missing from it \(2\): h\.0\.ln_1, h\.1\.ln_1"):
        parity.compare(model, theirs, IDS, less)
    wrong = less | {"h.0.ln_1": "blocks.0.norm", "h.1.ln_1": "blocks.1.norm1", "h.7": None}
    with pytest.raises(Error, match=r"no module or parameter has \(2\): h\.7, blocks\.0\.norm"):
        parity.compare(model, theirs, IDS, wrong)
    with pytest.raises(Error, match=r"names given twice \(1\): tok"):
        parity.compare(model, theirs, IDS, NAMES | {"wpe": "tok"})
    given = parity.compare(model, theirs, IDS, NAMES | {"h.1.ln_2": None})
    assert "h.1.ln_2" in given.only_ours and "blocks.1.norm2" in given.only_theirs


def test_every_shape_that_differs_is_listed():
    model = random_gpt2(CONFIG)
    theirs = learners_gpt(model)
    swapped = NAMES | {"h.0.mlp.c_fc": "blocks.0.ff.2", "h.0.mlp.c_proj": "blocks.0.ff.0"}
    with pytest.raises(Error) as caught:
        parity.compare(model, theirs, IDS, swapped)
    message = str(caught.value)
    assert message.startswith("6 shapes differ")
    for part in ("h.0.mlp.c_fc.weight is (48, 12), not (12, 48)", "h.0.mlp.c_proj.bias is (12,), not (48,)",
                 "the output of h.0.mlp.c_fc is (2, 7, 48), not (2, 7, 12)"):  # fmt: skip
        assert part in message


def test_models_with_nothing_in_common():
    with pytest.raises(Error, match="no layer has parameters of the same shapes"):
        parity.compare(random_gpt2(CONFIG), torch.nn.Sequential(torch.nn.Embedding(13, 5)).double(), IDS)


class Twice(nn.Module):
    def __init__(self, rng):
        self.layer = nn.Linear(4, 4, rng=rng, std=0.5)

    def forward(self, x):
        return self.layer(self.layer(x))


def test_float_inputs_a_layer_called_twice_and_flattened_rows():
    model = Twice(np.random.default_rng(0)).astype(np.float64)
    layer = torch.nn.Linear(4, 4).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(model.layer.weight.data))
        layer.bias.copy_(torch.tensor(model.layer.bias.data))
    theirs = torch.nn.Module()
    theirs.layer = layer
    theirs.forward = lambda x: {"hidden": None, "out": layer(layer(x.reshape(-1, 4)))}
    x = np.random.default_rng(1).standard_normal((2, 3, 4))
    comparison = parity.compare(model, theirs, x)
    assert comparison.first is None
    assert [(row.kind, row.name) for row in comparison.rows] == [
        (OUTPUTS, "layer"), (OUTPUTS, "layer #2"), (OUTPUTS, "(output)"), (GRADIENTS, "layer #2"),
        (GRADIENTS, "layer"), (PARAMETERS, "layer.weight"), (PARAMETERS, "layer.bias"),
        (PARAMETERS, "(input 0)"),
    ]  # fmt: skip


def test_calls_choose_what_is_run_backward_from(pair):
    model, twin = pair
    loss = lambda model, ids: torch.nn.functional.cross_entropy(  # noqa: E731
        model(ids).flatten(0, 1), torch.from_numpy(np.abs(TARGETS) % 13).flatten()
    )
    ours = lambda model, ids: model.loss(ids, np.abs(TARGETS) % 13)  # noqa: E731
    comparison = parity.compare(model, twin, IDS, calls=(ours, loss))
    assert comparison.first is None
    assert next(row for row in comparison.rows if row.name == "(output)").shape == ()


def test_what_cannot_be_compared_is_one_sentence(pair):
    model, twin = pair
    with pytest.raises(Error, match="a dict cannot be captured: pass a tinyllm or a torch module"):
        parity.compare({}, twin, IDS)
    for first, second in [(model, twin), (twin, model)]:
        with pytest.raises(Error, match="99, but token ids run from 0 to 12"):
            parity.compare(first, second, np.array([[1, 99]]))
    with pytest.raises(Error, match="returned a str without a tensor: return one in call="):
        parity.compare(model, twin, IDS, calls=(lambda *args: "text", None))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        parity.nothing  # noqa: B018


def test_import_parity_is_light():
    code = "import sys, parity; assert not {'torch', 'numpy', 'tinyllm'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ----------------------------------------------------------------------------------- the report

TINY = "--n-layer 2 --n-head 3 --n-embd 12 --vocab-size 13 --n-positions 8 --tokens 7".split()


def run(capsys, *arguments):
    """(exit code, what was printed, what was complained) of ``python -m parity report …``."""
    code = main(["report", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_random_model_agrees_and_the_page_says_so(tmp_path, capsys, dtype):
    page = tmp_path / "page.html"
    code, out, err = run(capsys, "--random", *TINY, "--dtype", dtype, "--seed", "3", "--out", str(page))
    assert (code, err) == (0, "")
    assert "comparisons are within their bounds" in out and f"dtype: {dtype}" in out
    assert "computed here, from its logits in float64" in out
    text = page.read_text(encoding="utf-8")
    names = {name for name, _ in random_gpt2(CONFIG).named_modules() if name}
    names |= {name for name, _ in random_gpt2(CONFIG).named_parameters()}
    for name in names:
        assert f"<code>{name}</code>" in text, name
        assert re.search(rf"^{re.escape(name)} ", out, re.MULTILINE), name
    assert "within their bounds" in text and "differs" not in text
    assert text.count("<circle") > 2 * (len(names) + 10)  # a point for every row and side


def test_the_page_needs_nothing_but_itself(tmp_path, capsys):
    page = tmp_path / "page.html"
    run(capsys, "--random", *TINY, "--out", str(page))
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|src=|@import|url\(|<link|<script", text)
    assert set(re.findall(r'href="([^"]*)"', text)) <= {"#first"}
    assert "1e-10" in text and 'class="bound"' in text and "order of computation" in text


def test_a_fault_forward_is_named_with_exit_code_1(tmp_path, capsys, monkeypatch):
    right = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate: right(x, "none"))  # erf for tanh
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "--random", *TINY, "--out", str(page))
    assert code == 1
    assert (
        "First diverging layer: h.0.mlp.c_proj. The output of h.0.mlp.c_proj differs from that of the twin"
        in out
    )
    assert "everything up to the output of h.0.mlp.c_fc agrees" in out
    text = page.read_text(encoding="utf-8")
    row = re.search(r'<tr id="first" class=bad><td><code>(.*?)</code><td class=dim>(.*?)<', text)
    assert row.groups() == ("h.0.mlp.c_proj", "output")
    assert "h.0.mlp.c_proj differs</text>" in text


def test_a_fault_backward_is_named_with_exit_code_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(F, "layer_norm", scaled_gradient(F.layer_norm, 1 + 1e-8))
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, "--random", *TINY, "--out", str(page))
    assert code == 1
    assert "First diverging layer: ln_f.weight. The gradient of ln_f.weight differs" in out
    assert '<tr id="first" class=bad><td><code>ln_f.weight</code>' in page.read_text(encoding="utf-8")


def test_a_fault_that_only_transformers_shows_is_blamed_on_it(tmp_path, capsys, monkeypatch):
    """Both our model and its twin read eps from the same config: a mistake there needs the third."""
    made = report.bridge.to_transformers

    def other_eps(model):
        theirs = made(model)
        theirs.transformer.h[1].ln_2.eps = 1e-6
        return theirs

    monkeypatch.setattr(report.bridge, "to_transformers", other_eps)
    code, out, _ = run(capsys, "--random", *TINY, "--out", str(tmp_path / "page.html"))
    assert code == 1
    assert "First diverging layer: h.1.ln_2. The output of h.1.ln_2 differs from that of transformers" in out


@pytest.mark.parametrize("changes", [{}, dict(lm_head_bias=True, qkv_bias=False, tie_word_embeddings=False)])
def test_a_folder(tmp_path, capsys, changes):
    random_gpt2(GPT2Config(**SMALL, **changes)).save_pretrained(tmp_path / "model")
    code, out, _ = run(capsys, str(tmp_path / "model"), "--tokens", "8", "--out", str(tmp_path / "page.html"))
    assert code == 0, out
    assert (report.COPIED if changes else report.LOADED) in out
    parameters = "h.*.attn.c_attn.bias (parameter)"
    assert (parameters in out) == bool(changes)  # transformers always has one


def test_given_ids(tmp_path, capsys):
    code, out, _ = run(
        capsys, "--random", *TINY, "--ids", "1", "5", "12", "--out", str(tmp_path / "page.html")
    )
    assert code == 0 and "1 × 2 tokens, 2 targets that count" in out


def wrong_folder(tmp_path, changes):
    random_gpt2(CONFIG).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


WRONG = {
    "nothing": ([], "say which model: either its folder or hub id, or --random"),
    "both": (["x", "--random"], "say which model"),
    "no folder": (["./nowhere"], "there is no folder './nowhere'"),
    "no config": (["."], "config.json cannot be read"),
    "architecture": (["--random", "--arch", "mamba"], "--arch mamba is not supported; supported: gpt2"),
    "sizes of a folder": (["model", "--n-layer", "3"], "--n-layer is for --random"),
    "a bad size": (["--random", "--n-head", "5"], r"n_embd (64) must be divisible by n_head (5)"),
    "batch": (["--random", "--batch", "0"], "--batch 0 is too small; give at least 1"),
    "seed": (["--random", "--seed", "-1"], "--seed -1 is too small; give at least 0"),
    "too long": (["--random", "--tokens", "65"], "65 tokens are too many: the model takes at most 64"),
    "outside": (["--random", "--ids", "3", "256"], "--ids[0, 1] is 256, but token ids run from 0 to 255"),
    "one id": (["--random", "--ids", "3"], "--ids needs at least two token ids"),
    "out": (["--random", "--out", "no/page.html"], "cannot be written; name a file in a folder that exists"),
    "dtype": (["--random", "--dtype", "float16"], "--dtype"),
    "option": (["--random", "--colour", "red"], "Unrecognized options: --colour"),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unsupported_or_misshaped_folder_is_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong_folder(tmp_path, {"model_type": "bert"})
    code, _, err = run(capsys, "./model")
    assert code == 2 and "model_type 'bert' is not supported; supported: gpt2" in err
    wrong_folder(tmp_path / "shapes", {"n_inner": 5, "n_positions": 9})
    code, _, err = run(capsys, "./shapes/model")
    assert code == 2 and "Wrong shape (7)" in err and "wpe.weight is (8, 12), not (9, 12)" in err


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_library_names_the_extra(tmp_path, capsys, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else here(name))
    code, _, err = run(capsys, "--random")
    assert code == 2 and err == f"report needs {missing}: pip install 'tinyllm[parity]'\n"

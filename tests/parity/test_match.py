"""``parity.compare``: pairing the layers of a learner's own model with ours, with and without a name map."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.compare import CONFIG, IDS, found  # noqa: E402
from support.models import random_gpt2  # noqa: E402

from parity.compare import compare  # noqa: E402
from parity.compare.layers import OUTPUTS, PARAMETERS  # noqa: E402
from tinyllm import Error  # noqa: E402


class LearnersBlock(torch.nn.Module):
    """A GPT-2 block with other names and another order of definition."""

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
    """A GPT-2 that defines its tied head first, unlike any published checkpoint."""

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


@pytest.mark.parametrize("names", [None, NAMES], ids=["guessed", "given"])
def test_layers_with_other_names_are_paired(names):
    model = random_gpt2(CONFIG)
    theirs = learners_gpt(model)
    comparison = compare(model, theirs, IDS, names)
    assert comparison.first is None
    pairs = {row.name: row.their_name for row in comparison.rows}
    assert NAMES.items() <= pairs.items()
    assert pairs["h.1"] == "blocks.1" and pairs["h.0.mlp"] == "blocks.0.ff"  # containers by their contents
    assert pairs["wte.weight"] == "head.weight"  # tied, and defined first there
    assert {row.name for row in comparison.rows if row.kind == PARAMETERS} == dict(
        model.named_parameters()
    ).keys()
    assert comparison.only_theirs == ["blocks.0.ff.1", "blocks.1.ff.1"]

    theirs.blocks[1].ff[1].approximate = "none"  # erf for tanh
    assert found(compare(model, theirs, IDS, names)) == (OUTPUTS, "h.1.mlp.c_proj")


def test_layers_around_separate_query_key_value_projections_are_paired():
    model = random_gpt2(CONFIG)
    theirs = learners_gpt(model, separate=True)
    comparison = compare(model, theirs, IDS)
    assert comparison.first is None
    assert {"h.0.attn.c_attn", "h.0.attn.c_attn.bias (parameter)"} <= set(comparison.only_ours)
    assert {"blocks.1.q", "blocks.1.v.weight (parameter)"} <= set(comparison.only_theirs)
    pairs = {row.name: row.their_name for row in comparison.rows}
    assert pairs["h.0.attn.c_proj"] == "blocks.0.out" and pairs["h.1.ln_1"] == "blocks.1.norm1"
    theirs.blocks[0].norm2.eps = 1e-6
    assert found(compare(model, theirs, IDS)) == (OUTPUTS, "h.0.ln_2")


def test_an_incomplete_or_wrong_name_map_is_an_error():
    model = random_gpt2(CONFIG)
    theirs = learners_gpt(model)
    less = {name: other for name, other in NAMES.items() if "ln_1" not in name}
    with pytest.raises(Error, match=r"layers missing from it \(2\): h\.0\.ln_1, h\.1\.ln_1"):
        compare(model, theirs, IDS, less)
    wrong = less | {"h.0.ln_1": "blocks.0.norm", "h.1.ln_1": "blocks.1.norm1", "h.7": None}
    with pytest.raises(Error, match=r"no module or parameter has \(2\): h\.7, blocks\.0\.norm"):
        compare(model, theirs, IDS, wrong)
    with pytest.raises(Error, match=r"names given twice \(1\): tok"):
        compare(model, theirs, IDS, NAMES | {"wpe": "tok"})
    given = compare(model, theirs, IDS, NAMES | {"h.1.ln_2": None})
    assert "h.1.ln_2" in given.only_ours and "blocks.1.norm2" in given.only_theirs


def test_error_lists_every_differing_shape():
    model = random_gpt2(CONFIG)
    theirs = learners_gpt(model)
    swapped = NAMES | {"h.0.mlp.c_fc": "blocks.0.ff.2", "h.0.mlp.c_proj": "blocks.0.ff.0"}
    with pytest.raises(Error) as caught:
        compare(model, theirs, IDS, swapped)
    message = str(caught.value)
    assert message.startswith("6 shapes differ")
    for part in ("h.0.mlp.c_fc.weight is (48, 12), not (12, 48)", "h.0.mlp.c_proj.bias is (12,), not (48,)",
                 "the output of h.0.mlp.c_fc is (2, 7, 48), not (2, 7, 12)"):  # fmt: skip
        assert part in message


def test_models_without_common_layers_are_an_error():
    with pytest.raises(Error, match="no layers have parameters of the same shapes"):
        compare(random_gpt2(CONFIG), torch.nn.Sequential(torch.nn.Embedding(13, 5)).double(), IDS)

"""``nn.replace``: matching, order, and errors."""

import re

import numpy as np
import pytest
from support.models import SMALL, Wrapped, random_gpt2

from tinyllm import Error, GPT2Config, Tensor, nn

MODEL = GPT2Config(**SMALL)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("h.*.attn.c_attn", ["h.0.attn.c_attn", "h.1.attn.c_attn"]),
        ("h.1", ["h.1"]),
        ("h.[!0].*.c_proj", ["h.1.attn.c_proj", "h.1.mlp.c_proj"]),
        ("w?e", ["wte", "wpe"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_replace_matches_layers_by_glob(pattern, names):
    model = random_gpt2(MODEL)
    before, seen = dict(model.named_modules()), []

    def make(name, layer):
        seen.append((name, layer))
        return Wrapped(layer)

    assert nn.replace(model, pattern, make) == names
    assert seen == [(name, before[name]) for name in names]
    after = dict(model.named_modules())
    for name in names:
        assert isinstance(after[name], Wrapped) and after[name].layer is before[name]
        assert not after[name].training  # like the layer it replaces
    assert sum(isinstance(module, Wrapped) for module in after.values()) == len(names)


def test_layers_inside_replaced_layers_are_replaced():
    model = random_gpt2(MODEL)
    expected = model(np.array([[1, 2, 3]])).data
    names = nn.replace(model, "h.*", lambda name, layer: Wrapped(layer))
    assert {"h.0", "h.0.attn", "h.0.attn.c_attn"} <= set(names)
    modules = dict(model.named_modules())
    assert isinstance(modules["h.0"], Wrapped) and isinstance(modules["h.0.layer.attn"], Wrapped)
    assert np.array_equal(model(np.array([[1, 2, 3]])).data, expected)


def test_shared_layer_gets_one_shared_replacement():
    class Twice(nn.Module):
        def __init__(self):
            self.parts = {"first": nn.Dropout(0.5), "other": nn.Dropout(0.1)}
            self.again = self.parts["first"]

    model = Twice()
    assert nn.replace(model, "*[rn]*", lambda name, layer: Wrapped(layer)) == [
        "parts.first", "parts.other", "again",
    ]  # fmt: skip
    assert model.parts["first"] is model.again and model.parts["other"] is not model.again


@pytest.mark.parametrize(
    ("pattern", "made", "message"),
    [
        ("h.*.atn.c_attn", None, r"h\.\*\.atn\.c_attn.*h\.0\.attn\.c_attn"),
        ("*", None, "the model itself"),
        ("", None, "the model itself"),
        ("h.*.mlp", lambda name, layer: layer if "0" in name else layer.c_fc.weight, r"Tensor for h\.1\.mlp"),
        ("h.*.mlp", lambda name, layer: None, r"NoneType for h\.0\.mlp"),
    ],
)
def test_failed_replace_leaves_the_model_unchanged(pattern, made, message):
    model = random_gpt2(MODEL)
    before = dict(model.named_modules())
    with pytest.raises(Error, match=message):
        nn.replace(model, pattern, made or (lambda name, layer: Wrapped(layer)))
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("make", [nn.Linear(12, 5, rng=0), None, "Linear"], ids=["a layer", "None", "a name"])
def test_replace_needs_a_function(make):
    model = random_gpt2(MODEL)
    with pytest.raises(Error, match=f"make is a {type(make).__name__}"):
        nn.replace(model, "lm_head", make)


@pytest.mark.parametrize("call", [
    lambda model: nn.replace(model, "lm_head", Wrapped),
    lambda model: nn.add_lora(model, rng=0),
    nn.merge_lora,
    lambda model: nn.observe(print, model).__enter__(),
])  # fmt: skip
@pytest.mark.parametrize(("model", "found"), [("smollm2", "'smollm2'"), (nn.Linear, "the class Linear")])
def test_a_name_or_class_is_not_a_model(call, model, found):
    with pytest.raises(Error, match=f"model is {found}: pass a model"):
        call(model)


@pytest.mark.parametrize(
    "pattern", [re.compile("x"), [re.compile("x")], ["lm_head", 3], 3, None, iter(["lm_head"])]
)
def test_a_pattern_is_a_str_or_several(pattern):
    with pytest.raises(Error, match=re.escape(f"pattern is {pattern!r}")):
        nn.replace(random_gpt2(MODEL), pattern, lambda name, layer: layer)


def test_parameters_in_lists_and_dicts_are_named():
    class Held(nn.Module):
        def __init__(self):
            self.scales = [Tensor(np.ones(1), requires_grad=True), "no parameter"]
            self.heads = {"a": nn.Linear(2, 3, rng=None), "b": Tensor(np.ones(2))}

    names = [name for name, _ in Held().named_parameters()]
    assert names == ["scales.0", "heads.b", "heads.a.weight", "heads.a.bias"]

"""``parity.compare``: equal models agree, and a planted fault is located in its layer."""

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.compare import CONFIG, IDS, TARGETS, found, scaled_gradient  # noqa: E402
from support.models import random_gpt2  # noqa: E402

from parity.compare import compare  # noqa: E402
from parity.compare.layers import FLOAT32_ROUNDING, GRADIENTS, OUTPUTS, PARAMETERS  # noqa: E402
from parity.twins import bridge  # noqa: E402
from tinyllm import Error, nn  # noqa: E402


def loss(model, ids, targets):
    return model.loss(ids, targets)


@pytest.fixture
def pair():
    """A GPT-2 and its twin, float64."""
    model = random_gpt2(CONFIG)
    return model, bridge.to_torch(model)


# ----------------------------------------------------------------------- equal models


def test_either_side_may_be_tinyllm_or_torch(pair):
    model, twin = pair
    other = bridge.from_torch(twin)
    for ours, theirs in [(model, twin), (twin, model), (model, other), (twin, bridge.to_torch(other))]:
        comparison = compare(ours, theirs, IDS)
        assert comparison.first is None
        assert len(comparison.rows) == 2 * len([*model.named_modules()]) - 1 + len([*model.parameters()])
        assert not comparison.only_ours and not comparison.only_theirs
    losses = compare(model, twin, (IDS, TARGETS), calls=(loss, loss))
    assert losses.rows[-1].kind == PARAMETERS and losses.first is None


def test_rows_are_in_the_order_of_computation(pair):
    names = [(row.kind, row.name) for row in compare(*pair, IDS).rows]
    order = [
        (OUTPUTS, "wte"), (OUTPUTS, "h.0.ln_1"), (OUTPUTS, "h.0.attn.c_proj"), (OUTPUTS, "h.0.attn"),
        (OUTPUTS, "h.0"), (OUTPUTS, "h.1.mlp.c_fc"), (OUTPUTS, "lm_head"), (OUTPUTS, "(output)"),
        (GRADIENTS, "lm_head"), (GRADIENTS, "ln_f"), (PARAMETERS, "ln_f.weight"), (GRADIENTS, "h.1"),
        (GRADIENTS, "h.1.mlp.c_proj"), (PARAMETERS, "h.1.mlp.c_proj.bias"), (GRADIENTS, "h.1.mlp.c_fc"),
        (GRADIENTS, "h.0"), (GRADIENTS, "wte"), (PARAMETERS, "wte.weight"),
    ]  # fmt: skip
    places = [names.index(item) for item in order]
    assert places == sorted(places)


def test_models_are_restored(pair):
    model, twin = pair
    model.train()
    model.h[0].eval()
    twin.h[1].train()
    model.wte.weight.grad = np.full(model.wte.weight.shape, 2.0)
    twin.wpe.weight.grad = torch.full_like(twin.wpe.weight, 3.0)
    before = [parameter.data.copy() for parameter in model.parameters()]
    with pytest.raises(Error):
        compare(model, twin, np.array([[99]]))
    assert compare(model, twin, IDS).first is None  # in eval mode, though the config has dropout
    assert model.training and not model.h[0].training and twin.h[1].training and not twin.training
    assert (model.wte.weight.grad == 2.0).all() and model.wpe.weight.grad is None
    assert (twin.wpe.weight.grad == 3.0).all() and twin.wte.weight.grad is None
    assert all(np.array_equal(a, parameter.data) for a, parameter in zip(before, model.parameters()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())


# --------------------------------------------------------------------- planted faults


def test_a_changed_bias_is_located(pair):
    model, twin = pair
    with torch.no_grad():
        twin.h[1].attn.c_proj.bias[3] += 1e-6
    comparison = compare(model, twin, IDS)
    assert found(comparison) == (OUTPUTS, "h.1.attn.c_proj")
    assert comparison.first.absolute == pytest.approx(1e-6)
    assert "First diverging layer: h.1.attn.c_proj" in str(comparison)
    assert "The last to agree is the output of h.1.attn.c_attn" in comparison.verdict()


def test_a_wrong_eps_is_located_in_its_own_norm(pair):
    model, twin = pair
    twin.h[1].ln_2.eps = 1e-6
    assert found(compare(model, twin, IDS)) == (OUTPUTS, "h.1.ln_2")


@pytest.mark.parametrize("factor", [1 + 1e-8, 0.0, np.nan])
def test_a_wrong_gradient_is_located(pair, factor):
    model, twin = pair
    model.h[1].mlp.forward = scaled_gradient(model.h[1].mlp.forward, factor)
    comparison = compare(model, twin, IDS)
    assert all(row.agrees for row in comparison.rows if row.kind == OUTPUTS)
    assert found(comparison) == (GRADIENTS, "h.1.mlp.dropout")  # the first to receive the wrong gradient


def test_a_wrong_gradient_of_one_parameter_is_located(pair):
    model, twin = pair
    twin.h[0].mlp.c_fc.bias.register_hook(lambda grad: grad * (1 + 1e-8))
    comparison = compare(model, twin, IDS)
    assert [row.name for row in comparison.rows if not row.agrees] == ["h.0.mlp.c_fc.bias"]
    assert found(comparison) == (PARAMETERS, "h.0.mlp.c_fc.bias")


def test_a_missing_gradient_differs(pair):
    model, twin = pair
    twin.ln_f.weight.requires_grad_(False)
    comparison = compare(model, twin, IDS)
    assert found(comparison) == (PARAMETERS, "ln_f.weight")
    assert comparison.first.relative == np.inf


def test_untied_weights_are_located(pair):
    model, twin = pair
    twin.lm_head.weight = torch.nn.Parameter(twin.wte.weight.detach().clone())
    comparison = compare(model, twin, IDS)
    assert found(comparison) == (PARAMETERS, "wte.weight")
    assert comparison.only_theirs == ["lm_head.weight (parameter)"]


def test_nan_never_agrees(pair):
    model, twin = pair
    for weight in (model.h[0].ln_2.weight.data, twin.h[0].ln_2.weight.detach()):
        weight[0] = np.nan
    assert found(compare(model, twin, IDS)) == (OUTPUTS, "h.0.ln_2")


def test_float32_bound_grows_with_depth():
    model = random_gpt2(CONFIG, dtype=np.float32)
    twin = bridge.to_torch(model)
    comparison = compare(model, twin, IDS)
    assert comparison.first is None
    bounds = [row.bound for row in comparison.rows]
    assert bounds == sorted(bounds)
    assert bounds[0] == pytest.approx(8 * FLOAT32_ROUNDING * 13**0.5)  # wte: its longest axis is 13 (V)
    assert 0 < comparison.worst.relative < comparison.worst.bound < 1e-4
    assert compare(model, twin, IDS, bound=1e-12).first is not None
    with torch.no_grad():
        twin.h[0].mlp.c_fc.bias += 1e-3
    assert found(compare(model, twin, IDS)) == (OUTPUTS, "h.0.mlp.c_fc")


# -------------------------------------------------------------------------- arguments


class Twice(nn.Module):
    def __init__(self, rng):
        self.layer = nn.Linear(4, 4, rng=rng, std=0.5)

    def forward(self, x):
        return self.layer(self.layer(x))


def test_float_inputs_repeated_layers_and_flattened_rows_are_paired():
    model = Twice(np.random.default_rng(0)).astype(np.float64)
    layer = torch.nn.Linear(4, 4).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(model.layer.weight.data))
        layer.bias.copy_(torch.tensor(model.layer.bias.data))
    theirs = torch.nn.Module()
    theirs.layer = layer
    theirs.forward = lambda x: {"hidden": None, "out": layer(layer(x.reshape(-1, 4)))}
    x = np.random.default_rng(1).standard_normal((2, 3, 4))
    comparison = compare(model, theirs, x)
    assert comparison.first is None
    assert [(row.kind, row.name) for row in comparison.rows] == [
        (OUTPUTS, "layer"), (OUTPUTS, "layer #2"), (OUTPUTS, "(output)"), (GRADIENTS, "layer #2"),
        (GRADIENTS, "layer"), (PARAMETERS, "layer.weight"), (PARAMETERS, "layer.bias"),
        (PARAMETERS, "(input 0)"),
    ]  # fmt: skip


def test_calls_select_the_tensor_to_differentiate(pair):
    model, twin = pair
    loss = lambda model, ids: torch.nn.functional.cross_entropy(  # noqa: E731
        model(ids).flatten(0, 1), torch.from_numpy(np.abs(TARGETS) % 13).flatten()
    )
    ours = lambda model, ids: model.loss(ids, np.abs(TARGETS) % 13)  # noqa: E731
    comparison = compare(model, twin, IDS, calls=(ours, loss))
    assert comparison.first is None
    assert next(row for row in comparison.rows if row.name == "(output)").shape == ()


def test_wrong_arguments_raise_one_sentence(pair):
    model, twin = pair
    with pytest.raises(Error, match="a dict cannot be captured: pass a tinyllm or a torch module"):
        compare({}, twin, IDS)
    for first, second in [(model, twin), (twin, model)]:
        with pytest.raises(Error, match="99, but token ids run from 0 to 12"):
            compare(first, second, np.array([[1, 99]]))
    with pytest.raises(Error, match="returned a str without a tensor: return one in call="):
        compare(model, twin, IDS, calls=(lambda *args: "text", None))


def test_import_parity_loads_no_array_library():
    code = "import sys, parity; assert not {'torch', 'numpy', 'tinyllm'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

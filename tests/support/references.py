"""A model against PyTorch: its twin, or the class of ``transformers``."""

import pytest
from support.models import assert_close

torch = pytest.importorskip("torch")

from parity.ops import cases as ops  # noqa: E402
from parity.twins.base import TorchLanguageModel  # noqa: E402


def check_against(other, model, ids, targets, num_targets=None):
    """Logits, loss and all gradients of ``model`` equal those of ``other``, within 1e-10."""
    side, tensors = type(other).__name__, (torch.from_numpy(ids), torch.from_numpy(targets))
    model.zero_grad()
    loss = model.loss(ids, targets, num_targets=num_targets)
    loss.backward()
    assert loss.shape == ()
    is_twin = isinstance(other, TorchLanguageModel)
    logits = other(tensors[0]) if is_twin else other(tensors[0]).logits
    assert_close(model(ids).data, logits, f"logits of {side}")
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tensors[1].flatten(), reduction="sum")
    expected = total / (num_targets or int((targets != -100).sum()))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    theirs = {name.removeprefix("model."): p.grad for name, p in other.named_parameters()}
    assert theirs.keys() == {name for name, _ in model.named_parameters()}
    # For a single position the gradients of q_proj and k_proj are 0 except for rounding errors.
    floor = ops.FLOOR * max(gradient.abs().max() for gradient in theirs.values()).item()
    for name, parameter in model.named_parameters():
        reference = theirs[name].numpy()
        ops.assert_close(parameter.grad, reference, f"gradient of {name} of {side}", floor=floor)
    if is_twin:
        assert other.loss(*tensors, num_targets).item() == pytest.approx(loss.item(), rel=1e-10)


def check_against_both(model, ids, targets, num_targets=None):
    """``check_against`` the twin and the class of ``transformers``, with the same weights."""
    from parity.twins import bridge

    check_against(bridge.to_torch(model), model, ids, targets, num_targets)
    check_against(bridge.to_transformers(model), model, ids, targets, num_targets)

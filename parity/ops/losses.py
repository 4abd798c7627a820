"""The cases that the losses are proven on; see ``functional.py``, which registers them."""

import numpy as np
import torch
import torch.nn.functional as TF
from hypothesis import strategies as st

from parity.ops import strategies as some
from parity.ops.cases import Case
from tinyllm import functional as F
from tinyllm.functional import composed


@st.composite
def loss_options(draw, lead, classes, reductions):
    """Targets, some of them ignored, and the options of both losses."""
    rng = np.random.default_rng(draw(some.SEEDS))
    ignore_index = draw(st.sampled_from([-100, -1, 0, classes, 10_000]))
    target = rng.integers(0, classes, lead).astype(draw(st.sampled_from([np.int64, np.int32, np.int16])))
    target = np.where(rng.random(lead) < draw(st.sampled_from([0, 0.3])), ignore_index, target)
    divisors = [1, 7, 2.5, np.int64(3), np.float64(2.5)]  # a count is often a NumPy number
    if (target != ignore_index).any():
        divisors.append(None)
    reduction = draw(st.sampled_from(reductions))
    weight = draw(st.none() | st.just(0.5 + rng.random(classes)))
    return target, {
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": draw(st.sampled_from([0, 0.1, 1.0])),
        "num_targets": draw(st.sampled_from(divisors)) if reduction == "mean" else None,
    }


def torch_cross_entropy(logits, target, num_targets=None, weight=None, reduction="mean", **options):
    """torch has no num_targets: its sum, divided by ``num_targets``."""
    flat = torch.tensor(target.reshape(-1).astype(np.int64))
    options |= {"weight": None if weight is None else torch.tensor(weight)}
    options |= {"reduction": "sum" if num_targets is not None else reduction}
    loss = TF.cross_entropy(logits.reshape(len(flat), logits.shape[-1]), flat, **options)
    return loss.reshape(target.shape if reduction == "none" else ()) / float(num_targets or 1)


def cross_entropy(draw):
    lead, classes = draw(some.shapes()), draw(st.integers(1, 6))
    target, options = draw(loss_options(lead, classes, ["mean", "mean", "sum", "none"]))
    return Case(
        f"cross_entropy {lead}, {classes} classes, {options}",
        [draw(some.arrays((*lead, classes)))],
        lambda x: F.cross_entropy(x, target, **options),
        lambda x: torch_cross_entropy(x, target, **options),
        # np.reshape cannot infer an axis (-1) of an empty array.
        (lambda x: composed.cross_entropy(x, target, **options)) if target.size else None,
        seed=draw(some.SEEDS),
    )


def linear_cross_entropy(draw):
    lead, channels, classes = draw(some.shapes()), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    target, options = draw(loss_options(lead, classes, ["mean", "mean", "sum"]))
    inputs = [draw(some.arrays((*lead, channels))), draw(some.arrays((classes, channels)))]
    if draw(st.booleans()):
        inputs.append(draw(some.arrays((classes,))))
    softcap = draw(st.none() | st.sampled_from([0.5, 3.0, np.float64(30)]))
    if softcap is not None:
        options["label_smoothing"] = 0.0  # not both

    def call(function):
        return lambda x, w, b=None: function(x, w, target, linear_bias=b, softcap=softcap, **options)

    def theirs(x, w, b=None):
        logits = TF.linear(x, w, b)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return torch_cross_entropy(logits, target, **options)

    return Case(
        f"linear_cross_entropy {lead}, {channels} -> {classes} classes, softcap {softcap}, {options}",
        inputs,
        call(F.linear_cross_entropy),
        theirs,
        call(composed.linear_cross_entropy) if target.size else None,
        draw(some.subsets(len(inputs))),
        draw(some.SEEDS),
    )

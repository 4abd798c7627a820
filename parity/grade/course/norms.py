"""Exercises on LayerNorm and RMSNorm."""

import numpy as np
import torch.nn.functional as TF
from hypothesis import strategies as st

from parity.grade.exercise import Mistake, Part, arrays, exercise, gradients, sizes, value

EPS = st.sampled_from([1e-5, 0.1])


@st.composite
def layer_norm_inputs(draw, backward: bool):
    rows, channels = draw(sizes()), draw(sizes(2))
    grad = {"grad": draw(arrays(rows, channels))} if backward else {}
    x, weight, bias = draw(arrays(rows, channels)), draw(arrays(channels)), draw(arrays(channels))
    return grad | {"x": x, "weight": weight, "bias": bias, "eps": draw(EPS)}


def torch_layer_norm(eps):
    return lambda x, weight, bias: TF.layer_norm(x, weight.shape, weight, bias, eps)


def normalized(x, weight, bias, eps, axis=-1, ddof=0, inside=True):
    """LayerNorm with the choices that are usually got wrong."""
    centred, variance = x - x.mean(axis, keepdims=True), x.var(axis, ddof=ddof, keepdims=True)
    deviation = np.sqrt(variance + eps) if inside else np.sqrt(variance) + eps
    return centred / deviation * weight + bias


def layer_norm_gradient(
    grad, x, weight, bias, eps, mean_term=1.0, variance_term=1.0, scaled=True, inside=True
):
    """The gradient of LayerNorm, each of its terms times a factor."""
    variance = x.var(-1, keepdims=True)
    deviation = np.sqrt(variance + eps) if inside else np.sqrt(variance) + eps
    x_hat, g = (x - x.mean(-1, keepdims=True)) / deviation, grad * weight if scaled else grad
    dx = g - mean_term * g.mean(-1, keepdims=True)
    dx -= variance_term * x_hat * (g * x_hat).mean(-1, keepdims=True)
    return dx / deviation, (grad * x_hat).sum(0), grad.sum(0)


exercise(
    "layer_norm",
    Part(
        "layer_norm",
        ("y",),
        layer_norm_inputs(backward=False),
        lambda eps, **arrays: value(torch_layer_norm(eps), *arrays.values()),
        (
            Mistake(
                "eps outside the root",
                "eps is added to the variance, inside the square root: sqrt(variance + eps).",
                lambda **given: normalized(**given, inside=False),
            ),
            Mistake(
                "no eps",
                "eps does not affect your result: divide by sqrt(variance + eps).",
                lambda eps, **given: normalized(**given, eps=0.0),
            ),
            Mistake(
                "N - 1",
                "The variance is divided by N - 1; LayerNorm divides by N, the number of channels (ddof=0).",
                lambda **given: normalized(**given, ddof=1),
            ),
            Mistake(
                "the wrong axis",
                "Mean and variance are over the rows; each row is normalized over its own channels: axis=-1.",
                lambda **given: normalized(**given, axis=0),
            ),
            Mistake(
                "all axes",
                "There is one mean and variance for the whole array; each row has its own: axis=-1.",
                lambda **given: normalized(**given, axis=None),
            ),
            Mistake(
                "divided by the variance",
                "You divide by the variance; divide by its square root, the standard deviation.",
                lambda x, weight, bias, eps: (
                    (x - x.mean(-1, keepdims=True)) / (x.var(-1, keepdims=True) + eps) * weight + bias
                ),
            ),
            Mistake(
                "not centred",
                "The mean is not subtracted from x: that is RMSNorm's numerator, not LayerNorm's.",
                lambda x, weight, bias, eps: x / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias,
            ),
            Mistake(
                "weight and bias exchanged",
                "Multiply by weight, then add bias: they are exchanged.",
                lambda x, weight, bias, eps: normalized(x, bias, weight, eps),
            ),
        ),
    ),
    Part(
        "layer_norm_gradient",
        ("dx", "dweight", "dbias"),
        layer_norm_inputs(backward=True),
        lambda grad, eps, **arrays: gradients(torch_layer_norm(eps), grad, *arrays.values()),
        (
            Mistake(
                "eps outside the root",
                "eps is added to the variance, inside the square root: sqrt(variance + eps).",
                lambda **given: layer_norm_gradient(**given, inside=False),
            ),
            Mistake(
                "mean and variance taken for constants",
                "dx is as if mean and variance did not depend on x: two terms are missing.",
                lambda **given: layer_norm_gradient(**given, mean_term=0.0, variance_term=0.0),
            ),
            Mistake(
                "the mean's term missing",
                "The mean depends on x, too: subtract the mean of g, over the channels.",
                lambda **given: layer_norm_gradient(**given, mean_term=0.0),
            ),
            Mistake(
                "the variance's term missing",
                "The standard deviation depends on x, too: subtract x_hat times the mean of g x_hat.",
                lambda **given: layer_norm_gradient(**given, variance_term=0.0),
            ),
            Mistake(
                "weight missing in dx",
                "In dx the incoming gradient is multiplied by weight first: dL/dx_hat = grad * weight.",
                lambda **given: layer_norm_gradient(**given, scaled=False),
            ),
            Mistake(
                "x for x_hat in dweight",
                "dweight is the sum of grad * x_hat, the normalized x, not of grad * x.",
                lambda **given: (
                    layer_norm_gradient(**given)[0], (given["grad"] * given["x"]).sum(0), given["grad"].sum(0)
                ),
            ),
        ),
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------- RMSNorm


@st.composite
def rms_norm_inputs(draw, backward: bool):
    rows, channels = draw(sizes()), draw(sizes(2))
    grad = {"grad": draw(arrays(rows, channels))} if backward else {}
    return grad | {"x": draw(arrays(rows, channels)), "weight": draw(arrays(channels)), "eps": draw(EPS)}


def torch_rms_norm(eps):
    return lambda x, weight: TF.rms_norm(x, weight.shape, weight, eps)


def rms_normalized(x, weight, eps, centred=False, inside=True, root=True, mean=True, axis=-1):
    if centred:
        x = x - x.mean(axis, keepdims=True)
    square = (x**2).mean(axis, keepdims=True) if mean else (x**2).sum(axis, keepdims=True)
    rms = (np.sqrt(square + eps) if inside else np.sqrt(square) + eps) if root else square + eps
    return x / rms * weight


def rms_norm_gradient(grad, x, weight, eps, scaled=True, whole=True):
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    x_hat, g = x / rms, grad * weight if scaled else grad
    dx = g - x_hat * (g * x_hat).mean(-1, keepdims=True) if whole else g
    return dx / rms, (grad * x_hat).sum(0)


exercise(
    "rms_norm",
    Part(
        "rms_norm",
        ("y",),
        rms_norm_inputs(backward=False),
        lambda x, weight, eps: value(torch_rms_norm(eps), x, weight),
        (
            Mistake(
                "centred",
                "RMSNorm does not subtract the mean: that is LayerNorm.",
                lambda **given: rms_normalized(**given, centred=True),
            ),
            Mistake(
                "eps outside the root",
                "eps is added to the mean of the squares, inside the square root.",
                lambda **given: rms_normalized(**given, inside=False),
            ),
            Mistake(
                "no eps",
                "eps does not affect your result: divide by sqrt(mean square + eps).",
                lambda x, weight, eps: rms_normalized(x, weight, 0.0),
            ),
            Mistake(
                "the sum of squares",
                "The mean of the squares, not their sum: divide by the number of channels.",
                lambda **given: rms_normalized(**given, mean=False),
            ),
            Mistake(
                "no root",
                "Divide by the root of the mean square, not by the mean square.",
                lambda **given: rms_normalized(**given, root=False),
            ),
            Mistake(
                "the wrong axis",
                "The mean is over the channels of each row: axis=-1.",
                lambda **given: rms_normalized(**given, axis=0),
            ),
        ),
    ),
    Part(
        "rms_norm_gradient",
        ("dx", "dweight"),
        rms_norm_inputs(backward=True),
        lambda grad, x, weight, eps: gradients(torch_rms_norm(eps), grad, x, weight),
        (
            Mistake(
                "the root taken for a constant",
                "The root depends on x, too: subtract x_hat times the mean of g x_hat.",
                lambda **given: rms_norm_gradient(**given, whole=False),
            ),
            Mistake(
                "weight missing in dx",
                "In dx the incoming gradient is multiplied by weight first: dL/dx_hat = grad * weight.",
                lambda **given: rms_norm_gradient(**given, scaled=False),
            ),
            Mistake(
                "x for x_hat in dweight",
                "dweight is the sum of grad * x_hat, the normalized x, not of grad * x.",
                lambda **given: (rms_norm_gradient(**given)[0], (given["grad"] * given["x"]).sum(0)),
            ),
        ),
    ),
)

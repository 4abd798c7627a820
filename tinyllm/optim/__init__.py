"""Optimizers, clipping, loss scaling and learning-rate schedules."""

from tinyllm.optim.adamw import AdamW
from tinyllm.optim.clipping import clip, clip_grad_norm, scale, sum_of_squares
from tinyllm.optim.loss_scale import LossScale, NoLossScale
from tinyllm.optim.muon import Muon
from tinyllm.optim.parameters import Parameters
from tinyllm.optim.schedules import warmup_cosine, warmup_linear

OPTIMIZERS = {"adamw": AdamW, "muon": Muon}

__all__ = [
    "OPTIMIZERS",
    "AdamW",
    "LossScale",
    "Muon",
    "NoLossScale",
    "Parameters",
    "clip",
    "clip_grad_norm",
    "scale",
    "sum_of_squares",
    "warmup_cosine",
    "warmup_linear",
]

"""Layers with named parameters, and what can be done to a model made of them."""

from tinyllm.nn.hooks import Observation, is_watched, observe
from tinyllm.nn.init import is_meta, normal
from tinyllm.nn.layers import (
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    bias_can_wait,
    fuse_rows,
    fused,
    fused_linears,
    initialize_as_torch,
)
from tinyllm.nn.module import Module, evaluating

__all__ = [
    "Dropout",
    "Embedding",
    "LayerNorm",
    "Linear",
    "Module",
    "Observation",
    "RMSNorm",
    "bias_can_wait",
    "evaluating",
    "fuse_rows",
    "fused",
    "fused_linears",
    "initialize_as_torch",
    "is_meta",
    "is_watched",
    "normal",
    "observe",
]

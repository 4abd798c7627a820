"""Layers with named parameters, and what can be done to a model made of them."""

from tinyllm.nn.hooks import Observation, call, observe
from tinyllm.nn.init import initialize_as_torch, is_meta, normal
from tinyllm.nn.layers import Dropout, Embedding, LayerNorm, Linear, RMSNorm
from tinyllm.nn.module import Module, evaluating
from tinyllm.nn.surgery import replace

__all__ = [
    "Dropout",
    "Embedding",
    "LayerNorm",
    "Linear",
    "Module",
    "Observation",
    "RMSNorm",
    "call",
    "evaluating",
    "initialize_as_torch",
    "is_meta",
    "normal",
    "observe",
    "replace",
]

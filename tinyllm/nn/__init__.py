"""Layers with named parameters, and operations on the models built from them."""

from tinyllm.nn.hooks import Observation, call, observe
from tinyllm.nn.init import as_generator, initialize_as_torch, is_meta, loaded, normal
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
    "as_generator",
    "call",
    "evaluating",
    "initialize_as_torch",
    "is_meta",
    "loaded",
    "normal",
    "observe",
    "replace",
]

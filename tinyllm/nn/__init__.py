"""Layers with named parameters, and operations on the models built from them."""

from tinyllm.nn.hooks import Observation, call, observe
from tinyllm.nn.init import as_generator, initialize_as_torch, initialize_as_zero, is_meta, loaded, normal
from tinyllm.nn.layers import Dropout, Embedding, LayerNorm, Linear, OffsetRMSNorm, RMSNorm
from tinyllm.nn.lora import LoRA, adapter_modules, add_lora, lora_layers, merge_lora, unmerge_lora
from tinyllm.nn.module import Module, evaluating
from tinyllm.nn.surgery import replace

__all__ = [
    "Dropout",
    "Embedding",
    "LayerNorm",
    "Linear",
    "LoRA",
    "Module",
    "Observation",
    "OffsetRMSNorm",
    "RMSNorm",
    "adapter_modules",
    "add_lora",
    "as_generator",
    "call",
    "evaluating",
    "initialize_as_torch",
    "initialize_as_zero",
    "is_meta",
    "loaded",
    "lora_layers",
    "merge_lora",
    "normal",
    "observe",
    "replace",
    "unmerge_lora",
]

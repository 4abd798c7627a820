"""How do the same weights get into tinyllm, its PyTorch twin and ``transformers``?

Everything here copies: two models never share memory, so changing one cannot change the other.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from parity.twins.gpt2 import TorchGPT2
from parity.twins.llama import TorchLlama
from tinyllm.backend.device import to_device
from tinyllm.checks import check_names_and_shapes
from tinyllm.errors import Error
from tinyllm.models import GPT2, GPT2Config, Llama, LlamaConfig, load_model
from tinyllm.nn import Module

TWINS = {GPT2: TorchGPT2, Llama: TorchLlama}  # tinyllm's class -> the same in PyTorch

PUBLISHED = {"GPT2LMHeadModel": (GPT2, GPT2Config), "LlamaForCausalLM": (Llama, LlamaConfig)}

DTYPES = ("float32", "float64")  # what NumPy and torch both compute in


def to_torch(model: Module) -> torch.nn.Module:
    """A PyTorch twin with the weights of a tinyllm model, in its dtype and its mode, on the CPU."""
    if type(model) not in TWINS:
        supported = ", ".join(ours.__name__ for ours in TWINS)
        raise Error(f"{type(model).__name__} has no twin in PyTorch; supported: {supported}")
    arrays = {name: to_device(parameter.data, "cpu") for name, parameter in model.named_parameters()}
    dtype = _dtype(array.dtype.name for array in arrays.values())
    twin = TWINS[type(model)](model.config).to(getattr(torch, dtype))
    parameters = dict(twin.named_parameters())
    _check(parameters, arrays, "the tinyllm model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(np.array(arrays[name])))
    return twin.train(model.training)


def from_torch(twin: torch.nn.Module) -> Module:
    """The tinyllm model with the weights of its PyTorch twin, in its dtype and its mode, on the CPU."""
    ours = {theirs: ours for ours, theirs in TWINS.items()}
    if type(twin) not in ours:
        supported = ", ".join(theirs.__name__ for theirs in ours)
        raise Error(f"{type(twin).__name__} is no twin of a tinyllm model; supported: {supported}")
    tensors = dict(twin.named_parameters())
    dtype = _dtype(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    model = ours[type(twin)](twin.config, rng=None).astype(dtype)
    parameters = dict(model.named_parameters())
    _check(parameters, tensors, "the PyTorch twin")
    for name, parameter in parameters.items():
        parameter.replace(tensors[name].detach().cpu().numpy().copy())
    return model.train(twin.training)


def load_pair(name: str | Path, dtype: str = "float32") -> tuple[Module, torch.nn.Module]:
    """(tinyllm model, PyTorch twin) from a Hugging Face folder or hub id, both in eval mode."""
    model = load_model(name, np.dtype(_dtype([np.dtype(dtype).name])))
    return model, to_torch(model)


def from_transformers(theirs) -> tuple[Module, torch.nn.Module]:
    """(tinyllm model, PyTorch twin) with the weights of a ``transformers`` model of one of ``PUBLISHED``."""
    name = type(theirs).__name__
    if name not in PUBLISHED:
        raise Error(f"{name} is not supported; supported: {', '.join(PUBLISHED)}")
    ours, config = PUBLISHED[name]
    tensors = {name: tensor.detach().cpu() for name, tensor in theirs.named_parameters()}
    dtype = _dtype(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}  # load_state_dict copies
    model = ours(config.from_dict(theirs.config.to_dict()), rng=None).astype(dtype)
    model.load_state_dict(arrays, source="the transformers model")
    model.train(theirs.training)
    return model, to_torch(model)


def to_transformers(model: Module):
    """The class of ``transformers`` with the weights of a tinyllm model, in its dtype and its mode.

    Of a GPT-2 a ``GPT2LMHeadModel`` with eager attention. What it has no option for is put in: with
    ``lm_head_bias`` its head is replaced by one with a bias; without ``qkv_bias`` the bias for Q, K and V,
    which it always has, is zero. Of a Llama a ``LlamaForCausalLM``, see ``in_its_own_dtype``.
    """
    theirs = _their_llama(model.config) if isinstance(model, Llama) else _their_gpt2(model.config)
    arrays = {name: torch.tensor(np.array(to_device(a, "cpu"))) for name, a in model.state_dict().items()}
    theirs = theirs.to(next(iter(arrays.values())).dtype)
    parameters = {_our_name(theirs, name): p for name, p in theirs.named_parameters()}
    if isinstance(model, GPT2) and not model.config.qkv_bias:
        arrays |= {
            f"h.{i}.attn.c_attn.bias": parameters[f"h.{i}.attn.c_attn.bias"].detach() * 0
            for i in range(model.config.n_layer)
        }
    _check(parameters, arrays, "the tinyllm model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(arrays[name])
    return theirs.train(model.training)


def _their_gpt2(ours: GPT2Config):
    import transformers

    # Their default ids of the special tokens would be outside a small vocabulary.
    config = transformers.GPT2Config(**asdict(ours), bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "eager"
    theirs = transformers.GPT2LMHeadModel(config)
    if ours.lm_head_bias:
        theirs.lm_head = torch.nn.Linear(ours.n_embd, ours.vocab_size)
        theirs.tie_weights()
    return theirs


def _their_llama(ours: LlamaConfig):
    import transformers

    config = transformers.LlamaConfig(**asdict(ours), bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "sdpa"
    return in_its_own_dtype(transformers.LlamaForCausalLM(config))


def in_its_own_dtype(theirs):
    """A ``LlamaForCausalLM`` with SDPA attention that computes everything in the dtype of its weights.

    Their RMSNorm, RoPE and eager softmax compute in float32 even in a float64 model, which is off by 1e-7
    and would hide what is smaller. Here the norm is torch's own; the angles and their cosines are float64,
    from the frequencies that *their* function computes when it is told that ``torch.float`` is float64.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary = theirs.model.rotary_emb
    compute = ROPE_INIT_FUNCTIONS.get(rotary.rope_type, rotary.compute_default_rope_parameters)
    with mock.patch.object(torch, "float", torch.float64):
        frequencies, scaling = compute(theirs.config)

    def rms_norm(norm, x):
        return torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    def cos_and_sin(x, position_ids):
        angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return (angles.cos() * scaling).to(x), (angles.sin() * scaling).to(x)

    rotary.forward = cos_and_sin
    for module in theirs.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(rms_norm, module)
    return theirs


def transformers_names(model: Module, theirs) -> dict[str, str | None]:
    """Each module of a tinyllm model -> its name in the ``transformers`` model; None if it has none."""
    known = {_our_name(theirs, name): name for name, _ in theirs.named_modules()}
    return {name: known.get(name) for name, _ in model.named_modules() if name}


def _our_name(theirs, name: str) -> str:
    """Their names less ``transformer.`` or ``model.``."""
    return name.removeprefix(f"{theirs.base_model_prefix}.")


def _dtype(names) -> str:
    found = sorted(set(names))
    if len(found) != 1 or found[0] not in DTYPES:
        both = " or ".join(DTYPES)
        raise Error(f"weights in {' and '.join(found)} cannot be carried over: convert all to {both}")
    return found[0]


def _check(parameters, arrays, source: str) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    check_names_and_shapes(expected, {name: tuple(a.shape) for name, a in arrays.items()}, source)

"""Copying weights between tinyllm, its PyTorch twin and ``transformers``.

Two models never share memory, so changing one cannot change the other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from parity.twins.base import TorchLanguageModel
from parity.twins.classifier import TorchSequenceClassifier
from parity.twins.gemma2 import TorchGemma2
from parity.twins.gemma3 import TorchGemma3
from parity.twins.gpt2 import TorchGPT2
from parity.twins.llama import TorchLlama
from parity.twins.mistral import TorchMistral
from parity.twins.mixture import TorchMixtral, TorchQwen3Moe
from parity.twins.olmo2 import TorchOlmo2
from parity.twins.qwen import TorchQwen2, TorchQwen3
from parity.twins.smollm3 import TorchSmolLM3
from tinyllm.backend.device import to_device
from tinyllm.checks import check_names_and_shapes
from tinyllm.errors import Error
from tinyllm.models import SequenceClassifier, load_model
from tinyllm.nn import Module

TWINS = {  # tinyllm's class -> its twin
    twin.ours: twin
    for twin in (
        TorchGPT2,
        TorchLlama,
        TorchQwen2,
        TorchQwen3,
        TorchMistral,
        TorchMixtral,
        TorchQwen3Moe,
        TorchSmolLM3,
        TorchOlmo2,
        TorchGemma2,
        TorchGemma3,
    )
}

DTYPES = ("float32", "float64")  # both NumPy and torch compute in these


def twin_of(model: Module | type[Module]) -> type[TorchLanguageModel]:
    """The class of the twin of a tinyllm model, or of a class of models."""
    ours = model if isinstance(model, type) else type(model)
    if ours not in TWINS:
        raise Error(
            f"{ours.__name__} does not have a PyTorch twin: compare it with a model of your own "
            f"(python -m parity check), or choose one of {', '.join(each.__name__ for each in TWINS)}"
        )
    return TWINS[ours]


def to_torch(model: Module) -> torch.nn.Module:
    """The PyTorch twin with the weights, dtype and mode of a tinyllm model, on the CPU."""
    arrays = {name: to_device(parameter.data, "cpu") for name, parameter in model.named_parameters()}
    dtype = _dtype(array.dtype.name for array in arrays.values())
    twin = _new_twin(model).to(getattr(torch, dtype))
    parameters = dict(twin.named_parameters())
    _check(parameters, arrays, "the tinyllm model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(np.array(arrays[name])))
    return twin.train(model.training)


def _new_twin(model: Module) -> torch.nn.Module:
    """The twin of a model, with weights of its own."""
    if isinstance(model, SequenceClassifier):
        return TorchSequenceClassifier(_new_twin(model.language_model), len(model.labels), model.pooling)
    return twin_of(model)(model.config)


def from_torch(twin: torch.nn.Module) -> Module:
    """The tinyllm model with the weights, dtype and mode of its PyTorch twin, on the CPU."""
    if type(twin) not in TWINS.values():
        supported = ", ".join(theirs.__name__ for theirs in TWINS.values())
        raise Error(f"{type(twin).__name__} is not the twin of a tinyllm model; supported: {supported}")
    tensors = dict(twin.named_parameters())
    dtype = _dtype(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    model = twin.ours(twin.config, rng=None).astype(dtype)
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
    """(tinyllm model, PyTorch twin) with the weights of a supported ``transformers`` model."""
    name, published = type(theirs).__name__, {twin.published: twin for twin in TWINS.values()}
    if name not in published:
        raise Error(f"{name} is not supported; supported: {', '.join(published)}")
    twin = published[name]
    tensors = {name: tensor.detach().cpu() for name, tensor in theirs.named_parameters()}
    dtype = _dtype(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}  # load_state_dict copies
    config = twin.config_class.from_dict(theirs.config.to_dict())
    model = twin.ours(config, rng=None).astype(dtype)
    model.load_state_dict(arrays, source="the transformers model")
    model.train(theirs.training)
    return model, to_torch(model)


def to_transformers(model: Module):
    """The ``transformers`` model with the weights, dtype and mode of a tinyllm model.

    Parts that their config does not cover are replaced by the twin's ``in_transformers``, and parts that
    compute in float32 even in a float64 model by its ``exact``.
    """
    twin = twin_of(model)
    theirs = twin.exact(twin.in_transformers(model.config))
    arrays = {name: torch.tensor(np.array(to_device(a, "cpu"))) for name, a in model.state_dict().items()}
    theirs, arrays = theirs.to(next(iter(arrays.values())).dtype), twin.as_published(arrays)
    parameters = {_our_name(theirs, name): p for name, p in theirs.named_parameters()}
    arrays |= {name: torch.zeros_like(parameters[name]) for name in twin.only_published(model.config)}
    _check(parameters, arrays, "the tinyllm model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(arrays[name])
    return theirs.train(model.training)


def transformers_names(model: Module, theirs) -> dict[str, str | None]:
    """Each module of a tinyllm model -> its name in the ``transformers`` model, or None."""
    known = {_our_name(theirs, name): name for name, _ in theirs.named_modules()}
    return {name: known.get(name) for name, _ in model.named_modules() if name}


def _our_name(theirs, name: str) -> str:
    """Their name without the prefix ``transformer.`` or ``model.``."""
    return name.removeprefix(f"{theirs.base_model_prefix}.")


def _dtype(names) -> str:
    found = sorted(set(names))
    if len(found) != 1 or found[0] not in DTYPES:
        both = " or ".join(DTYPES)
        raise Error(f"weights in {' and '.join(found)} cannot be copied: convert all of them to {both}")
    return found[0]


def _check(parameters, arrays, source: str) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    check_names_and_shapes(expected, {name: tuple(a.shape) for name, a in arrays.items()}, source)

"""Saving a model as a folder that loads as the same model, here and in ``transformers``, or not at all."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinyllm import nn
from tinyllm.backend.dtypes import dtype_of
from tinyllm.checks import check_range
from tinyllm.errors import Error
from tinyllm.weights import safetensors
from tinyllm.weights.gguf_writer import EARLIER

# Begins the model_type of a saved model that the class of ``transformers`` would compute differently.
OWN = "tinyllm-"


def is_plain(model: nn.Module, original: nn.Module) -> bool:
    """Whether the parameters are those of ``original``. Raises ``Error`` if only the layers differ."""
    models = model, original
    shapes, plain_shapes = ({n: a.shape for n, a in each.state_dict().items()} for each in models)
    if shapes != plain_shapes:
        return False  # loading it reports the names
    kinds, plain_kinds = ({n: type(m) for n, m in each.named_modules()} for each in models)
    replaced = [name for name in kinds | plain_kinds if kinds.get(name) is not plain_kinds.get(name)]
    if replaced:
        raise Error(
            f"the replaced layers {', '.join(replaced)} have the same parameter names and shapes as the "
            "original ones and would be loaded as those: save model.state_dict() instead"
        )
    return True


def check_weights(model: nn.Module, dtype: str, instead: str) -> None:
    """Raise ``Error``, naming a weight and what to choose ``instead``, unless all are finite in ``dtype``."""
    for name, array in model.state_dict().items():
        if not np.isfinite(array).all():
            raise Error(f"{name} has a weight that is not finite: {EARLIER}")
        check_range(name, array, dtype_of(dtype), instead)


def save_model(folder: str | Path, model: nn.Module, config: dict, tensors: Mapping, overwrite: bool) -> None:
    """Write a model's folder; a warning is logged, once, if ``transformers`` refuses the config."""
    for name, parameter in model.named_parameters():
        nn.loaded(parameter, name)
    safetensors.save_folder(folder, config, tensors, overwrite=overwrite)
    if config["model_type"].startswith(OWN):
        _warn_once(config["model_type"], config["architectures"][0].removeprefix(OWN))


@functools.cache
def _warn_once(model_type: str, hub_class: str) -> None:
    logging.getLogger("tinyllm").warning(
        "the model is saved as model_type %s, which only tinyllm loads, because %s of transformers would "
        "compute something else", model_type, hub_class,
    )  # fmt: skip

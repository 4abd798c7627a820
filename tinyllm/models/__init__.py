"""The models, and the choice between them."""

from pathlib import Path

import numpy as np

from tinyllm import pretrained
from tinyllm.errors import Error
from tinyllm.models.gpt2 import GPT2, GPT2Config
from tinyllm.nn import Module

ARCHITECTURES = {"gpt2": GPT2}

__all__ = ["ARCHITECTURES", "GPT2", "GPT2Config", "load_model"]


def load_model(name: str | Path, dtype=np.float32) -> Module:
    """The model in a Hugging Face folder or behind a hub id; its ``config.json`` says which class."""
    folder = pretrained.find_folder(name)
    kind = pretrained.read_config(folder).get("model_type")
    if kind not in ARCHITECTURES:
        raise Error(f"{folder}: model_type {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind].from_pretrained(folder, dtype)

"""The models, and the choice between them."""

from pathlib import Path

import numpy as np

from tinyllm.errors import Error
from tinyllm.models import gpt2, llama
from tinyllm.models.gpt2 import GPT2, GPT2Config
from tinyllm.models.llama import Llama, LlamaConfig
from tinyllm.nn import Module
from tinyllm.weights import hub

ARCHITECTURES = {"gpt2": GPT2, "llama": Llama}
CONFIGS = {"gpt2": GPT2Config, "llama": LlamaConfig}

__all__ = ["ARCHITECTURES", "GPT2", "GPT2Config", "Llama", "LlamaConfig", "empty_model", "load_model"]


def load_model(name: str | Path, dtype=np.float32) -> Module:
    """A trained model, in ``dtype``, in eval mode; its config says which class.

    ``name`` is a folder in Hugging Face's layout, a .gguf file, a name that ``tinyllm pull`` knows, or a hub
    id. Weights are read one at a time, so memory never holds much more than the model.
    """
    path = hub.find_model(name)
    model = _empty(path).astype(dtype)
    model.load_state_dict(hub.open_weights(path), source=str(path))
    return model.eval()


def empty_model(name: str | Path) -> Module:
    """The same model without its weights: stand-ins that take no memory, whatever its size.

    ``name`` may also be a published size, such as "124M" or "Llama-3.2-1B".
    """
    for kind, sizes in (("gpt2", gpt2.SIZES), ("llama", llama.SIZES)):
        if name in sizes:
            return ARCHITECTURES[kind](CONFIGS[kind].preset(name), rng=None)
    return _empty(hub.find_model(name))


def _empty(path: Path) -> Module:
    config = hub.model_config(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise Error(f"{path}: model_type {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    try:
        config = CONFIGS[kind].from_dict(config)
    except Error as error:
        raise Error(f"the config of {path} is refused: {error}") from None
    return ARCHITECTURES[kind](config, rng=None)

"""The models, and ``load_model``, which picks the class that a config names."""

from pathlib import Path

import numpy as np

from tinyllm.errors import Error
from tinyllm.models.base import (
    ARCHITECTURES,
    LanguageModel,
    ModelConfig,
    architecture_of,
    full_name,
    register,
)
from tinyllm.models.classifier import SequenceClassifier, is_classifier
from tinyllm.models.gemma2 import Gemma2, Gemma2Config
from tinyllm.models.gemma3 import Gemma3, Gemma3Config
from tinyllm.models.gpt2 import GPT2, GPT2Config
from tinyllm.models.llama import Llama, LlamaConfig
from tinyllm.models.mistral import Mistral, MistralConfig
from tinyllm.models.mixtral import Mixtral, MixtralConfig
from tinyllm.models.olmo2 import Olmo2, Olmo2Config
from tinyllm.models.qwen import Qwen2, Qwen2Config, Qwen3, Qwen3Config
from tinyllm.models.qwen_moe import Qwen3Moe, Qwen3MoeConfig
from tinyllm.models.smollm3 import SmolLM3, SmolLM3Config
from tinyllm.weights import hub
from tinyllm.weights.adapter_config import base_of, check_causal_lm
from tinyllm.weights.adapters import load_adapter
from tinyllm.weights.safetensors import is_adapter

__all__ = [
    "ARCHITECTURES",
    "GPT2",
    "GPT2Config",
    "Gemma2",
    "Gemma2Config",
    "Gemma3",
    "Gemma3Config",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "Mistral",
    "MistralConfig",
    "Mixtral",
    "MixtralConfig",
    "ModelConfig",
    "Olmo2",
    "Olmo2Config",
    "Qwen2",
    "Qwen2Config",
    "Qwen3",
    "Qwen3Config",
    "Qwen3Moe",
    "Qwen3MoeConfig",
    "SequenceClassifier",
    "SmolLM3",
    "SmolLM3Config",
    "empty_model",
    "full_name",
    "load_model",
    "register",
]


def load_model(name: str | Path, dtype=np.float32) -> LanguageModel:
    """Load a trained model in ``dtype`` and eval mode, of the class that its config names.

    ``name`` is a folder in Hugging Face's layout, a .gguf file, the folder of a run, a model of
    ``tinyllm pull``, or a hub id. Weights are read one at a time, so that little more memory than the model's
    own is needed. In a folder with a LoRA adapter (see ``weights/adapters.py``) the model is the one that the
    adapter's config names, with the adapter on it.
    """
    path = hub.find_model(name)
    if is_adapter(path):
        check_causal_lm(path)
        model = load_model(base_of(path), dtype)
        load_adapter(model, path)
        return model.eval()
    return _architecture(path).from_pretrained(path, dtype)


def empty_model(name: str | Path) -> LanguageModel:
    """The model that ``load_model`` would load, with meta parameters, which take no memory.

    ``name`` may also be a published size, such as "124M" or "Llama-3.2-1B". For an adapter it is the base
    model, without the adapter.
    """
    for architecture in ARCHITECTURES.values():
        if name in architecture.config_class.sizes:
            return architecture(architecture.config_class.preset(name), rng=None)
    path = hub.find_model(name)
    if is_adapter(path):
        path = hub.find_model(base_of(path))
    return _architecture(path).without_weights(path)


def _architecture(path: Path) -> type[LanguageModel]:
    if is_classifier(hub.model_config(path)):
        raise Error(f"{path} contains a classifier, not a language model: use tinyllm classify")
    return architecture_of(path)

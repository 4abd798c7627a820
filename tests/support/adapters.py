"""Models with LoRA whose A and B are random, here and in ``peft``."""

import warnings

import numpy as np
import pytest
from support.models import EVERYTHING, NO_DROPOUT, SMALL, random_model

from tinyllm import GPT2Config, nn

CONFIGS = {"gpt2": GPT2Config(**SMALL, **NO_DROPOUT), "llama": EVERYTHING}


def randomize(model, seed=0):
    """Random numbers in every B, which starts at 0, and added to the layers trained whole."""
    rng = np.random.default_rng(seed)
    for module in nn.adapter_modules(model).values():
        for parameter in module.parameters():
            noise = rng.standard_normal(parameter.shape).astype(parameter.dtype)
            parameter.replace(parameter.data + 0.3 * noise)
    return model


def with_lora(config, **options):
    """A random model with LoRA; the ``options`` are those of ``nn.add_lora``."""
    model = random_model(config)
    nn.add_lora(model, rng=1, **options)
    return randomize(model)


def with_peft(config, **options):
    """The ``transformers`` model with the same base weights, and a random adapter of ``peft``."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    bridge = pytest.importorskip("parity.twins.bridge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, and tied weights
        theirs = bridge.to_transformers(random_model(config))
        model = peft.get_peft_model(theirs, peft.LoraConfig(**{"task_type": "CAUSAL_LM"} | options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def load_in_peft(config, folder):
    """The ``transformers`` model with the same base weights, and the adapter in a folder."""
    peft, bridge = pytest.importorskip("peft"), pytest.importorskip("parity.twins.bridge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(bridge.to_transformers(random_model(config)), folder).eval()

"""LoRA on arrays that are not NumPy's: gradients, merging and files equal those on the host."""

import numpy as np
import pytest
from support.adapters import CONFIGS
from support.cuda_on_cpu import GPUS
from support.models import batch, on_host, random_model

from tinyllm import manual_seed, nn
from tinyllm.backend.dtypes import autocast
from tinyllm.weights.adapters import load_adapter, save_adapter


def results(config, put, folder):
    """Gradients of A and B, and logits in eval mode: of the model, merged, and loaded from its files."""
    rng, (ids, targets) = np.random.default_rng(1), batch(config, (2, 8))
    models = [random_model(config) for _ in range(2)]
    for model in models:
        for parameter in model.parameters():
            parameter.replace(put(parameter.data))
    model, again = models
    nn.add_lora(model.train(), 3, 6, "all-linear", dropout=0.3, modules_to_save=["lm_head"], rng=0)
    for layer in nn.lora_layers(model).values():
        assert isinstance(layer.lora_A.weight.data, type(put(ids)))
        layer.lora_B.weight.replace(put(rng.standard_normal(layer.lora_B.weight.shape)))
    manual_seed(0)
    model.loss(ids, targets).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    found.append(model.eval()(ids).data)
    save_adapter(model, folder, None)
    load_adapter(again, folder)
    found.append(again(ids).data)
    nn.merge_lora(model)
    return [on_host(array) for array in (*found, model(ids).data)]


@pytest.mark.parametrize("put", GPUS, indirect=True)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_lora_with_products_in_half_precision(config, put):
    """s multiplies a bfloat16, which in NumPy and CuPy would become float32."""
    found, (ids, targets) = [], batch(config, (2, 8))
    for dtype in (None, "bfloat16"):
        model = random_model(config).astype(np.float32)
        for parameter in model.parameters():
            parameter.replace(put(parameter.data))
        nn.add_lora(model, 3, 6.3, "all-linear", rng=0)
        with autocast(dtype):
            loss = model.loss(ids, targets)
        loss.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        found.append(np.concatenate([on_host(grad).reshape(-1) for grad in grads]))
    expected, ours = found
    assert 0 < np.linalg.norm(ours - expected) < 6 * 2.0**-8 * np.linalg.norm(expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_lora_on_the_device_equals_numpy(config, put, tmp_path):
    expected = results(config, np.asarray, tmp_path / "host")
    for ours, theirs in zip(results(config, put, tmp_path / "device"), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())

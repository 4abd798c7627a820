"""Every layer and model against its twin in torch: outputs, and the gradients of inputs and parameters.

``CASES`` has one strategy per class. Layers of GPT-2 and Llama are compared with those of the twins, also in
training mode, where torch uses the dropout masks that tinyllm generates.
"""

import contextlib
import importlib
import inspect
import pkgutil
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import (
    batch,
    configs,
    gemma_configs,
    llama_configs,
    our_gradients,
    random_gpt2,
    random_llama,
)
from support.suite import proven
from transformers.pytorch_utils import Conv1D as TheirConv1D

from parity.ops import strategies as some
from parity.ops.attention import addresses, kept_weights, torch_attention
from parity.ops.cases import FLOOR, assert_close, upstream
from parity.twins import bridge
from parity.twins import gemma2 as torch_gemma2
from parity.twins import gemma3 as torch_gemma3
from parity.twins import gpt2 as torch_gpt2
from parity.twins import llama as torch_llama
from parity.twins import mixture as torch_mixture
from parity.twins import olmo2 as torch_olmo2
from parity.twins import qwen as torch_qwen
from parity.twins import smollm3 as torch_smollm3
from parity.twins.classifier import TorchSequenceClassifier
from parity.twins.lora import TorchLoRA
from parity.twins.rope import depends_on_length
from tinyllm import GPT2Config, Tensor, manual_seed, models, nn
from tinyllm import functional as F
from tinyllm.backend.random import next_address
from tinyllm.models import (
    LanguageModel,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    mixtral,
    mixture,
    olmo2,
    qwen,
    qwen_moe,
    smollm3,
)
from tinyllm.models.rope import Rope, rope_frequencies


@dataclass(frozen=True)
class LayerCase:
    """A layer, its twin in torch, and the inputs of both.

    Floating-point inputs get a gradient; those inside a tuple do not.
    """

    ours: nn.Module
    theirs: torch.nn.Module
    inputs: tuple[Any, ...]
    address: tuple[int, ...]  # seed, step and micro-batch of the dropout masks, and a number not used here
    seed: int  # of the upstream gradient


def check_layer(case: LayerCase) -> None:
    """Check output and all gradients against torch in float64, with the same weights."""
    layer, twin = case.ours.astype(np.float64), case.theirs.double().train(case.ours.training)
    as_stored = isinstance(twin, TheirConv1D)  # (in, out), the checkpoint layout
    arrays = layer.state_dict() if as_stored else {name: p.data for name, p in layer.named_parameters()}
    twin.zero_grad()
    parameters = dict(twin.named_parameters())
    assert arrays.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(arrays[name].copy()))

    kinds = [getattr(x, "dtype", np.dtype(int)).kind for x in case.inputs]
    ours = [Tensor(x, requires_grad=True) if kind == "f" else x for x, kind in zip(case.inputs, kinds)]
    theirs = [torch.tensor(x.copy()) if isinstance(x, np.ndarray) else x for x in case.inputs]
    theirs = [x.requires_grad_() if kind == "f" else x for x, kind in zip(theirs, kinds)]
    theirs = [as_torch(x) if isinstance(x, tuple | dict) else x for x in theirs]
    manual_seed(*case.address[:3])
    with_loss = len(ours) > 1 and isinstance(layer, LanguageModel)
    out = layer.loss(*ours) if with_loss else layer(*ours)
    with same_masks(case.address):
        their_out = twin.loss(*theirs) if with_loss else twin(*theirs)
    assert_close(out.data, their_out.detach().numpy(), "output")

    grad = upstream(out.shape, np.float64, case.seed)
    out.backward(grad)
    their_out.backward(torch.tensor(grad.copy()))
    floor = FLOOR * np.abs(grad).max(initial=1)
    for i, (x, their_x) in enumerate(zip(ours, theirs)):
        if isinstance(x, Tensor):
            assert_close(x.grad, their_x.grad.numpy(), f"gradient of input {i}", floor=floor)
    grads = our_gradients(layer) if as_stored else {name: p.grad for name, p in layer.named_parameters()}
    for name, parameter in parameters.items():
        assert (grads[name] is None) == (parameter.grad is None), name  # None: an expert not chosen
        if parameter.grad is not None:
            assert_close(grads[name], parameter.grad.numpy(), f"gradient of {name}", floor=floor)


def as_torch(arrays):
    """A rotation as tensors, or one for each kind of layer."""
    if isinstance(arrays, dict):
        return {kind: as_torch(each) for kind, each in arrays.items()}
    return tuple(map(torch.tensor, arrays))


@contextlib.contextmanager
def same_masks(address):
    """Within this block, torch's dropout uses tinyllm's masks, starting at ``address``."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def dropout(layer, x):
        if not layer.training or layer.p == 0:
            return x
        mask = F.dropout(Tensor(np.ones(x.shape)), layer.p, training=True)  # at the next address
        return x * torch.tensor(mask.data)

    def attention_with_dropout(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        if dropout_p == 0:
            return attention(q, k, v, attn_mask, is_causal=is_causal, **options)
        mask = None if attn_mask is None else attn_mask.numpy()
        # The mask is that of a window: which elements are dropped depends on the blocks, which skip the rest.
        window = None if mask is None else int(mask[-1].sum())
        arrays, given = (x.detach().numpy() for x in (q, k)), {"is_causal": True, "window": window}
        kept = kept_weights(*arrays, options | given, dropout_p, next_address())
        return torch_attention(q, k, v, mask, is_causal, options.get("scale"), kept)

    def dropout_of_weights(weights, p):  # (B, H, T, T): the mask is that of any queries and keys
        if p == 0:
            return weights
        anything = np.zeros((*weights.shape[:3], 1))
        kept = kept_weights(anything, anything, {"is_causal": True}, p, next_address())
        return weights * torch.tensor(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Dropout, "forward", dropout)
        patch.setattr(torch.nn.functional, "dropout", dropout_of_weights)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention_with_dropout)
        manual_seed(*address[:3])
        yield


@st.composite
def layers(draw, ours, theirs, *inputs):
    """A case with ``ours``, its parameters perturbed because biases of 0 hide mistakes, and ``theirs``."""
    layer, rng = ours.train(draw(st.booleans())), np.random.default_rng(draw(some.SEEDS))
    for parameter in layer.parameters():
        parameter.replace(parameter.data + 0.5 * rng.standard_normal(parameter.shape))
    return LayerCase(layer, theirs, inputs, draw(addresses()), draw(some.SEEDS))


# ---------------------------------------------------------------------------------- layers


@st.composite
def linear(draw, ours=nn.Linear):
    lead, c_in = draw(some.shapes(min_side=1)), draw(st.integers(1, 5))
    c_out = draw(st.just(c_in) | st.integers(1, 5))  # in a square matrix a transposition would go unnoticed
    bias = draw(st.booleans()) if ours is nn.Linear else True
    layer = ours(c_in, c_out, bias=bias, rng=np.random.default_rng(0))
    twin = torch.nn.Linear(c_in, c_out, bias=bias) if ours is nn.Linear else TheirConv1D(c_out, c_in)
    return draw(layers(layer, twin, draw(some.arrays((*lead, c_in)))))


@st.composite
def lora(draw):
    """Around a Linear, of which also W and b get a gradient."""
    lead, c_in, c_out, rank = draw(some.shapes(min_side=1)), *(draw(st.integers(1, 5)) for _ in range(3))
    base = nn.Linear(c_in, c_out, bias=draw(st.booleans()), rng=0)
    alpha, dropout = draw(st.sampled_from([rank, 3, 0.5])), draw(st.sampled_from([0.0, 0.3]))
    options = rank, alpha, dropout, draw(st.booleans())
    twin = TorchLoRA(torch.nn.Linear(c_in, c_out, bias=base.bias is not None), *options)
    return draw(layers(nn.LoRA(base, *options, rng=1), twin, draw(some.arrays((*lead, c_in)))))


@st.composite
def embedding(draw, ours=nn.Embedding, theirs=torch.nn.Embedding):
    rows, channels = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    ids = np.random.default_rng(draw(some.SEEDS)).integers(0, rows, draw(some.shapes(min_side=1)))
    layer = ours(rows, channels, rng=np.random.default_rng(0))
    return draw(layers(layer, theirs(rows, channels), np.asarray(ids)))


@st.composite
def layer_norm(draw):
    channels = draw(st.integers(1, 6))
    # Normalizing one channel gives 0, where torch has a rounding error divided by sqrt(eps).
    eps = draw(st.sampled_from([1e-5, 1e-6, 0.1] + [1e-12] * (channels > 1)))
    eps, bias = {"eps": eps} if draw(st.booleans()) else {}, draw(st.booleans())
    x = draw(some.arrays((*draw(some.shapes()), channels), some.spread))
    twin = torch.nn.LayerNorm(channels, bias=bias, **eps)
    return draw(layers(nn.LayerNorm(channels, bias=bias, **eps), twin, x))


@st.composite
def rms_norm(draw, ours=nn.RMSNorm, theirs=torch.nn.RMSNorm):
    channels, eps = draw(st.integers(1, 6)), draw(st.sampled_from([None, 1e-5, 1e-6, 0.1]))
    x = draw(some.arrays((*draw(some.shapes()), channels), some.nonzero))
    return draw(layers(ours(channels, eps), theirs(channels, eps), x))


@st.composite
def dropout(draw):
    p = draw(st.sampled_from([0, 0.1, 0.5, 0.9]))
    return draw(layers(nn.Dropout(p), torch.nn.Dropout(p), draw(some.arrays(draw(some.shapes())))))


# ----------------------------------------------------------------------------------- GPT-2


@st.composite
def gpt2_configs(draw):
    """``configs`` with random dropout probabilities."""
    drops = {name: draw(st.sampled_from([0.0, 0.3])) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    return GPT2Config(**vars(draw(configs())) | drops)


@st.composite
def gpt2_part(draw, ours, theirs, *more):
    """A layer created from a config that maps (B, T, C) to (B, T, C)."""
    config = draw(gpt2_configs())
    shape = draw(st.integers(1, 2)), draw(st.integers(1, config.n_positions)), config.n_embd
    layer = ours(config, np.random.default_rng(0))
    return draw(layers(layer, theirs(config), draw(some.arrays(shape, some.spread))))


@st.composite
def gpt2_model(draw):
    """The logits, or the loss with or without ``num_targets``."""
    config, seed = draw(gpt2_configs()), draw(some.SEEDS)
    model = random_gpt2(config, seed).train(draw(st.booleans()))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, config.n_positions))
    inputs = batch(config, shape, seed)
    inputs = draw(st.sampled_from([inputs[:1], inputs, (*inputs, 7)]))
    return LayerCase(model, torch_gpt2.TorchGPT2(config), inputs, draw(addresses()), seed)


# ----------------------------------------------------------------------------------- Llama


@st.composite
def dropping_llama_configs(draw, kind="llama"):
    config = draw(llama_configs(models.ARCHITECTURES[kind].config_class))
    return replace(config, attention_dropout=draw(st.sampled_from([0.0, 0.3])))


def lengths(config):
    """Up to the context, and half of them past any window."""
    return st.just(min(config.context, 20)) | st.integers(1, config.context)


@st.composite
def llama_part(draw, ours, theirs, rotates=True, kind="llama"):
    """A layer created from a config that maps (B, T, C) and, with ``rotates``, a rotation to (B, T, C).

    It is that of the last block, which has the window if the architecture of this ``kind`` has one.
    """
    config = draw(dropping_llama_configs(kind))
    number = [config.num_hidden_layers - 1] * rotates
    T = draw(lengths(config))
    angles = np.arange(T)[:, None] * rope_frequencies(config)
    x = draw(some.arrays((draw(st.integers(1, 2)), T, config.hidden_size), some.nonzero))
    rotation = [(np.cos(angles), np.sin(angles))] * rotates
    return draw(
        layers(ours(config, np.random.default_rng(0), *number), theirs(config, *number), x, *rotation)
    )


@st.composite
def llama_model(draw, kind="llama"):
    """The logits, or the loss with or without ``num_targets``."""
    config, seed = draw(dropping_llama_configs(kind)), draw(some.SEEDS)
    model = random_llama(config, seed).train(draw(st.booleans()))
    shape = draw(st.integers(1, 3)), draw(lengths(config))
    inputs = batch(config, shape, seed)
    inputs = draw(st.sampled_from([inputs[:1], inputs, (*inputs, 7)]))
    return LayerCase(model, bridge.twin_of(model)(config), inputs, draw(addresses()), seed)


# ----------------------------------------------------------------------------------- Gemma


@st.composite
def dropping_gemma_configs(draw, config_class):
    return replace(draw(gemma_configs(config_class)), attention_dropout=draw(st.sampled_from([0.0, 0.3])))


@st.composite
def gemma_part(draw, config_class, ours, theirs, rotates=True):
    """As ``llama_part``; a layer of Gemma 3 takes a rotation for each kind of layer."""
    config = draw(dropping_gemma_configs(config_class))
    T = draw(st.integers(1, config.max_position_embeddings))
    x = draw(some.arrays((draw(st.integers(1, 2)), T, config.hidden_size), some.nonzero))
    rope = (gemma3.RopeOfKinds if config_class is models.Gemma3Config else Rope)(config)
    rotation = [rope(np.arange(T), x)] * rotates
    return draw(layers(ours(config, np.random.default_rng(0)), theirs(config), x, *rotation))


@st.composite
def gemma_model(draw, config_class, theirs):
    """The logits, or the loss with or without ``num_targets``."""
    config, seed = draw(dropping_gemma_configs(config_class)), draw(some.SEEDS)
    model = random_llama(config, seed).train(draw(st.booleans()))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, config.max_position_embeddings))
    inputs = batch(config, shape, seed)
    inputs = draw(st.sampled_from([inputs[:1], inputs, (*inputs, 7)]))
    return LayerCase(model, theirs(config), inputs, draw(addresses()), seed)


@st.composite
def classifier(draw):
    """Logits of the last real token, of the first, or of the mean of all real tokens."""
    config, seed = draw(dropping_llama_configs()), draw(some.SEEDS)
    pooling, labels = draw(st.sampled_from(models.classifier.POOLINGS)), ["a", "b", "c"]
    model = models.SequenceClassifier(random_llama(config, seed), labels, rng=seed, pooling=pooling)
    twin = TorchSequenceClassifier(torch_llama.TorchLlama(config), len(labels), pooling)
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, config.context))
    ids, lengths = batch(config, (B, T), seed)[0], draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
    # Texts whose angles depend on their lengths pass through the twin one by one, with other dropout masks.
    model.train(draw(st.booleans()) and not depends_on_length(config))
    return LayerCase(model, twin, (ids, np.array(lengths)), draw(addresses()), seed)


CASES = {
    "Linear": linear(),
    "LoRA": lora(),
    "Embedding": embedding(),
    "LayerNorm": layer_norm(),
    "RMSNorm": rms_norm(),
    "OffsetRMSNorm": rms_norm(nn.OffsetRMSNorm, torch_gemma2.OffsetRMSNorm),
    "Dropout": dropout(),
    "Conv1D": linear(gpt2.Conv1D),
    "CausalSelfAttention": gpt2_part(gpt2.CausalSelfAttention, torch_gpt2.CausalSelfAttention),
    "MLP": gpt2_part(gpt2.MLP, torch_gpt2.MLP),
    "Block": gpt2_part(gpt2.Block, torch_gpt2.Block),
    "GPT2": gpt2_model(),
    "GroupedQueryAttention": llama_part(llama.GroupedQueryAttention, torch_llama.GroupedQueryAttention),
    "SwiGLU": llama_part(llama.SwiGLU, torch_llama.SwiGLU, rotates=False),
    "LlamaBlock": llama_part(llama.LlamaBlock, torch_llama.LlamaBlock),
    "Llama": llama_model(),
    "Qwen2Attention": llama_part(qwen.Qwen2Attention, torch_qwen.Qwen2Attention, kind="qwen2"),
    "Qwen2Block": llama_part(qwen.Qwen2Block, torch_qwen.Qwen2Block, kind="qwen2"),
    "Qwen2": llama_model("qwen2"),
    "Qwen3Attention": llama_part(qwen.Qwen3Attention, torch_qwen.Qwen3Attention, kind="qwen3"),
    "Qwen3Block": llama_part(qwen.Qwen3Block, torch_qwen.Qwen3Block, kind="qwen3"),
    "Qwen3": llama_model("qwen3"),
    "MistralBlock": llama_part(mistral.MistralBlock, torch_llama.LlamaBlock, kind="mistral"),
    "Mistral": llama_model("mistral"),
    "SmolLM3Attention": llama_part(smollm3.SmolLM3Attention, torch_smollm3.SmolLM3Attention, kind="smollm3"),
    "SmolLM3Block": llama_part(smollm3.SmolLM3Block, torch_smollm3.SmolLM3Block, kind="smollm3"),
    "SmolLM3": llama_model("smollm3"),
    "Olmo2Attention": llama_part(olmo2.Olmo2Attention, torch_olmo2.Olmo2Attention, kind="olmo2"),
    "Olmo2Block": llama_part(olmo2.Olmo2Block, torch_olmo2.Olmo2Block, kind="olmo2"),
    "Olmo2": llama_model("olmo2"),
    "ScaledEmbedding": embedding(gemma2.ScaledEmbedding, torch_gemma2.ScaledEmbedding),
    "GemmaAttention": gemma_part(models.Gemma2Config, gemma2.GemmaAttention, torch_gemma2.GemmaAttention),
    "GeGLU": gemma_part(models.Gemma2Config, gemma2.GeGLU, torch_gemma2.GeGLU, rotates=False),
    "GemmaBlock": gemma_part(models.Gemma2Config, gemma2.GemmaBlock, torch_gemma2.GemmaBlock),
    "Gemma2": gemma_model(models.Gemma2Config, torch_gemma2.TorchGemma2),
    "Gemma3Attention": gemma_part(models.Gemma3Config, gemma3.Gemma3Attention, torch_gemma3.Gemma3Attention),
    "Gemma3Block": gemma_part(models.Gemma3Config, gemma3.Gemma3Block, torch_gemma3.Gemma3Block),
    "Gemma3": gemma_model(models.Gemma3Config, torch_gemma3.TorchGemma3),
    "Mixture": llama_part(
        lambda config, rng: mixture.Mixture(config, rng, mixtral.MixtralExpert),
        lambda config: torch_mixture.Mixture(config, torch_mixture.MixtralExpert),
        rotates=False,
        kind="mixtral",
    ),
    "MixtralExpert": llama_part(mixtral.MixtralExpert, torch_mixture.MixtralExpert, False, "mixtral"),
    "MixtralBlock": llama_part(mixtral.MixtralBlock, torch_mixture.MixtralBlock, kind="mixtral"),
    "Mixtral": llama_model("mixtral"),
    "Qwen3MoeBlock": llama_part(qwen_moe.Qwen3MoeBlock, torch_mixture.Qwen3MoeBlock, kind="qwen3_moe"),
    "Qwen3Moe": llama_model("qwen3_moe"),
    "SequenceClassifier": classifier(),
}


@proven("layer", CASES)
@given(data=st.data())
def test_outputs_and_gradients_equal_torch(layer, data):
    check_layer(data.draw(CASES[layer]))


def test_every_public_layer_and_model_has_a_case():
    files = [
        importlib.import_module(f"{folder.__name__}.{file.name}")
        for folder in (nn, models)
        for file in pkgutil.iter_modules(folder.__path__)
    ]
    found = [
        name
        for file in files
        for name, value in vars(file).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == file.__name__
    ]
    public = sorted(name for name in found if name not in ("Module", "LanguageModel"))
    assert public == sorted(CASES)

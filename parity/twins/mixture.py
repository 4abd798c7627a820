"""Mixtures of experts in PyTorch: tinyllm/models/mixture.py again, with one expert after the other.

Shapes: B batch, T time, C channels, N = B T tokens, E experts of which each token chooses k.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from parity.twins.llama import LlamaBlock, SwiGLU
from parity.twins.mistral import TorchMistral
from parity.twins.qwen import Qwen3Block, TorchQwen3
from tinyllm.models.mixtral import Mixtral, MixtralConfig
from tinyllm.models.qwen_moe import Qwen3Moe, Qwen3MoeConfig


class Mixture(nn.Module):
    """E experts and their router."""

    def __init__(self, config, expert):
        super().__init__()
        self.per_token, self.renormalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList([expert(config) for _ in range(config.num_experts)])

    def forward(self, x):  # (B, T, C)
        shape, x = x.shape, x.flatten(0, 1)
        p = self.gate(x).softmax(-1)  # (N, E)
        weights, chosen = p.topk(self.per_token)  # (N, k)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        self.routing = p, chosen
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == e)
            if len(token):
                added = expert(x[token]) * weights[token, choice, None]
                y = y.index_add(0, token, added.to(y.dtype))  # autocast gives the experts another dtype
        return y.view(shape)


def load_balancing_loss(routings, counted):
    """E Σ_e f_e P_e, with f_e from one-hot vectors."""
    E = routings[0][0].shape[1]
    p, chosen = (torch.cat([each[counted] for each in parts]) for parts in zip(*routings))
    return E * (F.one_hot(chosen, E).to(p).sum(1).mean(0) * p.mean(0)).sum()


class Balanced:
    """The load-balancing loss in training mode."""

    def loss(self, ids, targets, num_targets=None, weights=None):
        loss = super().loss(ids, targets, num_targets, weights)
        if not (self.training and self.config.output_router_logits):
            return loss
        learned = targets != -100
        counted = learned.flip(1).cummax(1).values.flip(1).flatten()
        share = 1 if num_targets is None else learned.sum().item() / num_targets
        routings = [module.routing for module in self.modules() if isinstance(module, Mixture)]
        if not routings or not counted.any():
            return loss
        return loss + self.config.router_aux_loss_coef * share * load_balancing_loss(routings, counted)

    # ---- The counterpart in transformers ----

    few_experts: dict  # in a random config

    @classmethod
    def random_config(cls, **sizes):
        return replace(super().random_config(**sizes), **cls.few_experts)

    @classmethod
    def as_published(cls, arrays):
        """``transformers`` 5 has one array for all experts, with the rows of gate and up in turn."""
        block, (gate, up, down) = cls.ours.fused_names
        experts = {name for name in arrays if f".{block}.experts." in name}
        arrays, own = dict(arrays), {name: arrays[name] for name in arrays if name in experts}
        for name in experts:
            del arrays[name]
        arrays = {name.replace(f".{block}.gate.", ".mlp.gate."): array for name, array in arrays.items()}
        for prefix in sorted({name.partition(".experts.")[0] for name in experts}):
            numbers = range(sum(name.startswith(f"{prefix}.experts.") for name in experts) // 3)
            each = [
                [own[f"{prefix}.experts.{e}.{part}.weight"] for e in numbers] for part in (gate, up, down)
            ]
            target = f"{prefix.removesuffix(block)}mlp.experts"
            arrays[f"{target}.gate_up_proj"] = torch.cat([torch.stack(part) for part in each[:2]], dim=1)
            arrays[f"{target}.down_proj"] = torch.stack(each[2])
        return arrays

    @staticmethod
    def route(gate, x):
        """Their router in the dtype of its weights: its own softmax is float32 even in a float64 model."""
        logits = F.linear(x.reshape(-1, gate.hidden_dim), gate.weight)
        weights, chosen = logits.softmax(-1).topk(gate.top_k)
        if getattr(gate, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen

    @classmethod
    def exact(cls, theirs):
        theirs.config._experts_implementation = "eager"  # the others have no float64
        for module in super().exact(theirs).modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.forward = partial(cls.route, module)
        return theirs


# ------------------------------------------------------------------------------ the models


class MixtralExpert(nn.Module):
    """The position-wise feed-forward network of one expert."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MixtralBlock(LlamaBlock):
    """Attention, then the mixture."""

    def __init__(self, config, layer: int = 0):
        super().__init__(config, layer)
        del self.mlp
        self.block_sparse_moe = Mixture(config, MixtralExpert)

    def forward(self, x, rotation):  # (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class TorchMixtral(Balanced, TorchMistral):
    """Mixtral with its language-model head: the twin of ``tinyllm.models.Mixtral``."""

    ours, config_class, block_class, published = Mixtral, MixtralConfig, MixtralBlock, "MixtralForCausalLM"
    few_experts: ClassVar = dict(num_local_experts=5)


def mixture(config):
    return Mixture(replace(config, intermediate_size=config.moe_intermediate_size), SwiGLU)


class Qwen3MoeBlock(Qwen3Block):
    """Qwen3's, in most layers with a mixture in place of the one network."""

    def __init__(self, config, layer: int = 0):
        self.mlp_class = mixture if config.has_experts(layer) else SwiGLU
        super().__init__(config, layer)


class TorchQwen3Moe(Balanced, TorchQwen3):
    """Qwen3-MoE with its language-model head: the twin of ``tinyllm.models.Qwen3Moe``."""

    ours, config_class, block_class = Qwen3Moe, Qwen3MoeConfig, Qwen3MoeBlock
    published = "Qwen3MoeForCausalLM"
    few_experts: ClassVar = dict(num_experts=5, num_experts_per_tok=2, decoder_sparse_step=2)

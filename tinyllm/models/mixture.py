"""What is a mixture of experts? A model with E feed-forward networks per block, of which a token uses k.

1. A router, one matrix, gives a token a probability p_e for each of E experts, which are SwiGLU networks f_e.
   The k most probable ones compute, and their outputs are summed with the probabilities as weights:

       y = Σ_e w_e f_e(x),   w_e = p_e for the k largest, else 0,   p = softmax(W x).

   With ``norm_topk_prob``, and always in Mixtral, the weights are divided by their sum, which makes them the
   softmax of the k largest logits. A model has E times the parameters, and a token the cost of k experts.
2. Which experts are chosen has no gradient, but their weights have: a router learns from those it chose. It
   might choose the same ones for all tokens, and the others would never learn. If the config has
   ``output_router_logits``, the loss in training mode therefore includes ``router_aux_loss_coef`` times

       E Σ_e f_e P_e,   f_e the fraction of tokens that chose e, P_e the mean of p_e,

   over all layers: k if both are uniform, and more if some experts are preferred (Fedus et al., "Switch
   Transformers", arXiv 2101.03961, section 2.2). ``transformers`` adds it in eval mode, too.

No token is dropped, however many choose the same expert. ``mixtral.py`` and ``qwen_moe.py`` are the models.

Shapes: B batch, T time, C channels, N = B T tokens, E experts of which each token chooses k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar

import numpy as np

from tinyllm import functional as F
from tinyllm import nn
from tinyllm.errors import Error
from tinyllm.tensor_ops import array_of, concatenate
from tinyllm.weights.fused import per_expert

# The routing of every layer of a forward pass, if the loss asks for it: (probabilities (N, E), chosen (N, k))
ROUTINGS: ContextVar[list | None] = ContextVar("routings", default=None)

MOST_EXPERTS = 2**17  # in all layers: they take memory even in a model without weights


class Mixture(nn.Module):
    """E experts, each made by ``expert(config, rng)``, and their router."""

    def __init__(self, config, rng, expert: Callable):
        C, E, rng = config.hidden_size, config.num_experts, nn.as_generator(rng)
        self.per_token, self.renormalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(C, E, bias=False, rng=rng, std=config.initializer_range)
        self.experts = [expert(config, rng) for _ in range(E)]

    def forward(self, x):
        """(B, T, C) -> (B, T, C), in one product per expert and projection: rows are sorted by expert."""
        (B, T, C), k = x.shape, self.per_token
        x = x.reshape(B * T, C)
        logits = self.gate(x)  # (N, E)
        p, chosen = F.softmax(logits), np.argsort(-logits.data, axis=-1, kind="stable")[:, :k]  # (N, k)
        if (routings := ROUTINGS.get()) is not None:
            routings.append((p, chosen))
        places = chosen + len(self.experts) * np.arange(B * T, like=chosen)[:, None]
        weights = F.embedding(places, p.reshape(-1, 1))  # (N, k, 1), with the router's gradient
        if self.renormalize:
            weights = weights / weights.sum(axis=1, keepdims=True)
        choices = chosen.reshape(-1)  # (N k,): number i is one of token i // k
        order = np.argsort(choices, kind="stable")
        starts = np.searchsorted(choices[order], np.arange(len(self.experts), like=choices)).tolist()
        rows = F.embedding(order // k, x)  # (N k, C): first those of expert 0
        parts = zip(self.experts, starts, [*starts[1:], B * T * k])
        y = concatenate([expert(rows[start:stop]) for expert, start, stop in parts if start < stop])
        y = F.embedding(np.argsort(order), y).reshape(B * T, k, C)  # in the order of the tokens again
        return (y * weights).sum(axis=1).reshape(B, T, C)


def load_balancing_loss(routings, counted):
    """E Σ_e f_e P_e over the layers' routings and the tokens (N,) where ``counted`` is true."""
    E, k, f, P = routings[0][0].shape[1], routings[0][1].shape[1], 0, 0
    for p, chosen in routings:
        mask = np.asarray(counted, p.dtype, like=p.data)
        f = f + np.bincount(chosen.reshape(-1), np.repeat(mask, k), E).astype(p.dtype)  # (E,)
        P = P + (p * mask[:, None]).sum(axis=0)  # (E,)
    tokens = int(counted.sum()) * len(routings)
    return (P * f).sum() * (E / tokens**2)


class Balanced:
    """What a model with a ``Mixture`` in its blocks does differently: its loss, and reading its weights.

    Its parameters have the names of published files, a matrix per expert and projection. It also reads the
    layout of ``transformers`` 5 in memory, in which one array has all experts (``weights/fused.py``).
    """

    fused_names: tuple  # of the mixture in a block, and of an expert's gate, up and down

    def _loss(self, ids, targets, num_targets, weights, cache):
        """With a given ``num_targets``, the balancing loss counts by the share of targets that are here. That
        of a batch computed in parts is the mean of the parts', not that of the whole: a product of two means
        is not a sum over rows. ``transformers`` also has one for each forward pass. Tokens after a row's last
        target, its padding, are not counted.
        """
        if not (self.training and is_balanced(self)):
            return super()._loss(ids, targets, num_targets, weights, cache)
        before = ROUTINGS.set([])
        try:
            loss = super()._loss(ids, targets, num_targets, weights, cache)
            routings = [(p.astype(loss.dtype), chosen) for p, chosen in ROUTINGS.get()]
        finally:
            ROUTINGS.reset(before)
        targets = array_of(targets)
        learned = (np.asarray(targets) if isinstance(targets, list | tuple) else targets) != -100  # (B, T)
        counted = (np.cumsum(learned[:, ::-1], axis=1) > 0)[:, ::-1].reshape(-1)
        share = 1 if num_targets is None else float(learned.sum() / num_targets)
        if not routings or not counted.any():
            return loss
        return loss + load_balancing_loss(routings, counted) * (self.config.router_aux_loss_coef * share)

    def load_state_dict(self, arrays: Mapping, source: str = "the state dict") -> None:
        super().load_state_dict(per_expert(arrays, *self.fused_names), source)


def is_balanced(model) -> bool:
    """Whether the model's loss in training mode has a load-balancing loss, one of each forward pass."""
    return isinstance(model, Balanced) and model.config.output_router_logits


def check_experts(config) -> None:
    """Raise ``Error`` unless a token can choose as many experts as it should, among a plausible number."""
    if config.num_experts * config.num_hidden_layers > MOST_EXPERTS:
        raise Error(f"{config.num_experts:,} experts in {config.num_hidden_layers:,} layers are too many")
    if config.num_experts_per_tok > config.num_experts:
        raise Error(
            f"num_experts_per_tok is {config.num_experts_per_tok}, but there are {config.num_experts} experts"
        )
    if not config.router_aux_loss_coef >= 0:
        raise Error(f"router_aux_loss_coef must be at least 0, not {config.router_aux_loss_coef!r}")

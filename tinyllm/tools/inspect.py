"""What happens inside a model while it reads a text?

A block adds to the residual stream x_l (T, C): x_0 are the embeddings, x_l is the output of the l-th of L
blocks. Elhage et al., "A Mathematical Framework for Transformer Circuits" (transformer-circuits.pub, 2021).
Four views:

    attention      P = softmax(Q Kᵀ · scale + mask), (H, T, T) in every block: where a token looks
    logit lens     softmax(head(norm(x_l))) for every l: what the model would predict if it ended there;
                   nostalgebraist, "interpreting GPT: the logit lens" (lesswrong.com, 2020)
    surprise       p(token | tokens before it), and the token's rank among all by decreasing p
    norms          ‖x_l‖ of every position

Nothing here knows an architecture. ``nn.observe`` reports each block's output and the arguments of the
attention op, whose plain form (``functional/composed.py``) computes P from the same q and k. The lens runs
the model itself with blocks that return x_l, so that whatever follows the blocks is the model's own.

Shapes: T tokens, C channels, L blocks, H heads, V vocabulary or classes, P positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tinyllm.backend.device import to_device
from tinyllm.backend.dtypes import is_half
from tinyllm.checks import check_at_least, check_ids, check_integers
from tinyllm.errors import Error
from tinyllm.functional import composed
from tinyllm.inference.sampling import most_likely, suppress
from tinyllm.models import LanguageModel, SequenceClassifier
from tinyllm.nn import Module, evaluating, observe
from tinyllm.tensor import Tensor, no_grad

ATTENTION = "scaled_dot_product_attention"

LOGITS = 2**24  # at a time: 64 MB in float32


class Lens(NamedTuple):
    """The most likely tokens after every layer, in decreasing order; ``[0]`` is the embeddings' layer."""

    ids: np.ndarray  # (L + 1, P, top)
    probabilities: np.ndarray  # (L + 1, P, top)


@dataclass(frozen=True, eq=False)
class Inspection:
    """The result of ``inspect``, as NumPy arrays.

    ``probability`` and ``rank`` are those of the token at each position, given the tokens before it; rank 1
    is the most likely, which is ``expected``. The first token was not predicted: nan, 0 and -1. They are None
    if they were not asked for, and for a head that scores classes.
    """

    ids: np.ndarray  # (T,)
    positions: np.ndarray  # (P,): those of the lens
    lens: Lens  # of the head's classes, if it scores classes
    probability: np.ndarray | None  # (T,)
    rank: np.ndarray | None  # (T,)
    expected: np.ndarray | None  # (T,): ids
    expected_probability: np.ndarray | None  # (T,)
    norms: np.ndarray  # (L + 1, T)
    blocks: tuple[str, ...]  # their names, such as "layers.0"
    calls: list[list[dict[str, Any]]] = field(repr=False)  # of each block: the arguments of its attention ops

    @property
    def heads(self) -> list[int]:
        """The number of heads in each block; 0 for one whose attention cannot be seen."""
        return [calls[0]["query"].shape[-3] if len(calls) == 1 else 0 for calls in self.calls]

    def attention(self, layer: int, head: int | None = None) -> np.ndarray:
        """The attention weights of a block, numbered from 0: (H, T, T), or (T, T) of one head.

        Element (h, t, s) is how much query t attends to key s. Masks, windows, soft-capping, shared key-value
        heads and position biases are those of the op that ran. A layer takes H·T·T numbers, so it is computed
        on request, head by head.

        Raises ``Error`` for a layer or head that does not exist, and naming the layer if it does not call the
        attention op once, if a row does not sum to 1, or if a token attends to a later one.
        """
        name, H = self.block_name(layer), self.heads[layer]
        if len(self.calls[layer]) != 1:
            raise Error(
                f"the attention of {name} cannot be seen: it calls tinyllm.functional.{ATTENTION} "
                f"{len(self.calls[layer])} times, and once is needed"
            )
        if head is not None and not 0 <= check_at_least(head, 0, "head") < H:
            raise Error(f"head is {head}, but {name} has the heads 0 to {H - 1}")
        arguments, T = self.calls[layer][0], len(self.ids)
        keys = arguments["key"].shape[-2]
        if keys != T:
            raise Error(f"the attention of {name} cannot be shown: it has {keys} keys for {T} tokens")
        found = [_weights_of(arguments, h) for h in (range(H) if head is None else [head])]
        for h, weights in zip(range(H) if head is None else [head], found):
            _check(weights, f"{name}, head {h}")
        return np.stack(found) if head is None else found[0]

    def block_name(self, layer: int) -> str:
        """The name of a block; Error for a number outside 0..L-1."""
        if check_at_least(layer, 0, "layer") >= len(self.blocks):
            raise Error(f"layer is {layer}, but the model has the layers 0 to {len(self.blocks) - 1}")
        return self.blocks[layer]


def inspect(
    model: Module,
    ids: Sequence[int],
    top: int = 10,
    positions: Sequence[int] | None = None,
    surprise: bool = True,
    suppress_ids: Sequence[int] = (),
) -> Inspection:
    """Look inside a language model, or a classifier, that reads the token ``ids`` (T,).

    The lens has the ``top`` most likely tokens at the ``positions`` (default: at all). It costs as many
    products with the head as there are layers; ``positions=()`` omits it, and ``surprise=False`` the
    probability and rank of every token. Ids in ``suppress_ids``, such as a padded vocabulary's unused ones,
    have probability 0. The model is evaluated in eval mode, without gradients; it may be on a GPU and have
    adapters or replaced layers.

    Raises ``Error`` for ids that are empty, outside the vocabulary or longer than the context, for a position
    outside 0..T-1, for a model whose blocks do not run one after the other, and if logits are not finite.
    """
    if isinstance(model, SequenceClassifier):
        classes, model = len(model.labels), model.language_model
    else:
        classes = None
    if not isinstance(model, LanguageModel):
        raise Error(f"model is a {type(model).__name__}: pass a language model, such as GPT2(...)")
    ids = check_ids(ids, model.config.vocab_size)
    if ids.ndim != 1:
        raise Error(f"ids have shape {ids.shape}: inspect one sequence of token ids at a time")
    T, context, top = len(ids), model.context, check_at_least(top, 1, "top")
    if context < T:
        raise Error(
            f"the text has {T:,} tokens, but the model's context is {context:,}: inspect a shorter text"
        )
    at = check_integers(np.arange(T) if positions is None else positions, "positions").astype(np.int64)
    if at.ndim != 1 or not ((at >= 0) & (at < T)).all():
        raise Error(f"positions are {at.tolist()}: give a list of integers from 0 to {T - 1}")
    with evaluating(model), no_grad():
        seen = _Recorder(model)
        with observe(seen.module, on_op=seen.op):
            model.hidden_states(ids[None])
        names = seen.check()
        lens = [_lens(model, x, ids, at, top, suppress_ids) for x in seen.stream]
        each = [None] * 4
        if surprise and classes is None:
            each = _surprise(model, seen.stream[-1], ids, suppress_ids)
    norms = np.stack([np.linalg.norm(_on_host(x)[0], axis=-1) for x in seen.stream])
    return Inspection(ids, at, Lens(*map(np.stack, zip(*lens))), *each, norms, names, seen.calls)


# ------------------------------------------------------------------------------ the forward pass


class _Recorder:
    """Records the residual stream between the blocks, and the attention ops within each."""

    def __init__(self, model: LanguageModel):
        blocks = getattr(model, model.blocks)
        self.names = tuple(f"{model.blocks}.{i}" for i in range(len(blocks)))
        self.blocks = [id(block) for block in blocks]
        self.order: list[int] = []
        self.stream: list[Tensor] = []  # (1, T, C) each
        self.calls: list[list[dict]] = []
        self.ops: list[dict] = []  # of the block that is running

    def op(self, name: str, arguments: dict, out: Tensor) -> None:
        if name == ATTENTION:
            self.ops.append({key: _on_host(x) for key, x in arguments.items() if key != "value"})

    def module(self, observation) -> None:
        if id(observation.module) in self.blocks:
            self.order.append(id(observation.module))
            self.stream += [*observation.inputs[: not self.stream], observation.output]
            self.calls.append(self.ops)
            self.ops = []

    def check(self) -> tuple[str, ...]:
        """The names of the blocks. Raises Error unless they ran in their order, each on the one before."""
        tensors = [isinstance(x, Tensor) for x in self.stream]
        if self.order != self.blocks or len(tensors) != len(self.blocks) + 1 or not all(tensors):
            raise Error(
                f"the model does not run {self.names[0]} to {self.names[-1]} one after the other as layers "
                "that map a Tensor to a Tensor: its layers cannot be told apart"
            )
        return self.names


def _on_host(x):
    """A Tensor's array on the CPU, in at least float32; anything else unchanged."""
    if not isinstance(x, Tensor) and not hasattr(x, "dtype"):
        return x
    array = to_device(x.data if isinstance(x, Tensor) else x, "cpu")
    return array.astype(np.float32) if is_half(array.dtype) else array


# --------------------------------------------------------------------------------- attention


def _weights_of(arguments: dict, head: int) -> np.ndarray:
    """The weights (T, T) of one head, by the op's plain form."""
    query, key = (arguments[name].reshape(-1, *arguments[name].shape[-2:]) for name in ("query", "key"))
    H, T, G, S = *query.shape[:2], *key.shape[:2]
    others = {k: x for k, x in arguments.items() if k not in ("query", "key", "dropout_p", "enable_gqa")}
    mask = others.get("attn_mask")
    if mask is not None:
        mask = np.broadcast_to(mask, (*(1,) * (arguments["query"].ndim - 3), H, T, S)).reshape(H, T, S)[head]
        others["attn_mask"] = mask if mask.dtype == bool else Tensor(mask.astype(query.dtype, copy=False))
    query, key = Tensor(query[head : head + 1]), Tensor(key[head // (H // G)][None])
    return composed.attention_weights(query, key, **others).data[0]


def _check(weights: np.ndarray, where: str) -> None:
    """Raise Error unless each row of (T, T) sums to 1, up to rounding, without a later key."""
    T, eps = len(weights), np.finfo(weights.dtype).eps
    off = np.abs(weights.sum(axis=1) - 1)
    if not (off <= (T + 8) * eps).all():
        raise Error(
            f"the attention weights of {where} do not sum to 1: those of token {int(np.argmax(off))} are off "
            f"by {np.max(off):.1e}; the layer's mask or its numbers are wrong"
        )
    later = np.argwhere(np.triu(weights, 1))
    if len(later):
        query, key = later[0].tolist()
        raise Error(f"the attention of {where} is not causal: token {query} attends to the later token {key}")


# -------------------------------------------------------------------------- the lens, surprise


def _logits(model: LanguageModel, x: Tensor, ids: np.ndarray, suppress_ids) -> np.ndarray:
    """The logits (P, V) if the last block's output were x (1, P, C): the final norm, then the head.

    The model runs with blocks that return x. So all that it does after them is done, in any architecture.
    """
    view = copy.copy(model)
    blocks = [copy.copy(block) for block in getattr(model, model.blocks)]
    for block in blocks:
        block.forward = lambda *args, **kwargs: x
    setattr(view, model.blocks, blocks)
    logits = suppress(_on_host(view(ids[None]))[0], suppress_ids)
    if not np.isfinite(logits.max(axis=-1)).all():
        raise Error(
            "the logits are not finite, so the weights are damaged or training diverged: load them again, or "
            "go back to an earlier checkpoint"
        )
    return logits


def _chunks(model: LanguageModel, count: int) -> list[slice]:
    """Slices of ``count`` positions whose logits are in memory together."""
    step = max(1, LOGITS // model.config.vocab_size)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _lens(model, x, ids, at: np.ndarray, top: int, suppress_ids) -> tuple[np.ndarray, np.ndarray]:
    """The ids and probabilities (P, top) of the most likely tokens at the positions ``at``."""
    top = min(top, model.config.vocab_size)
    found = [(np.zeros((0, top), np.int64), np.zeros((0, top)))]
    for part in _chunks(model, len(at)):
        states = x[:, np.asarray(at[part], like=x.data)]
        logits = _logits(model, states, ids[at[part]], suppress_ids)
        order = most_likely(logits, min(top, logits.shape[1]))
        kept = np.take_along_axis(logits, order, axis=-1)
        found.append((order, np.exp(kept - _log_sum(logits))))
    return tuple(np.concatenate(parts) for parts in zip(*(found[1:] or found)))


def _surprise(model, x, ids: np.ndarray, suppress_ids) -> list[np.ndarray] | list[None]:
    """Of every token (T,): probability, rank, and the most likely token in its place with its probability.

    None for a head that scores classes.
    """
    T = len(ids)
    found = [np.full(T, np.nan), np.zeros(T, np.int64), np.full(T, -1), np.full(T, np.nan)]
    for part in _chunks(model, T - 1):
        logits, target = _logits(model, x[:, part], ids[part], suppress_ids), ids[1:][part][:, None]
        if logits.shape[1] != model.config.vocab_size:
            return [None] * 4
        own, log_sum = np.take_along_axis(logits, target, axis=-1), _log_sum(logits)
        before = (logits > own).sum(axis=-1)  # ties in order of id
        before += ((logits == own) & (np.arange(logits.shape[1]) < target)).sum(axis=-1)
        best = np.exp(logits.max(axis=-1) - log_sum[:, 0])
        values = np.exp(own - log_sum)[:, 0], before + 1, logits.argmax(axis=-1), best
        for array, value in zip(found, values):
            array[part.start + 1 : part.stop + 1] = value
    return found


def _log_sum(logits: np.ndarray) -> np.ndarray:
    """log Σ exp (P, 1)."""
    peak = logits.max(axis=-1, keepdims=True)
    return peak + np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))

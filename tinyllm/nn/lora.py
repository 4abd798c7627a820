"""How is a large model fine-tuned with few parameters?

LoRA freezes the matrix W (out, in) of a layer and learns a matrix of low rank r to add to it:

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ,   A (r, in), B (out, r), s = α / r.

That is a layer with the weight W + s B A, so after training the product can be added to W (``merge_lora``),
and costs nothing. B starts at 0: the model starts as it was. A is random, for otherwise both gradients,
dA = s (g B)ᵀ x and dB = s gᵀ (x Aᵀ) with g = dL/dy, would be 0 for ever. Only A and B, r (in + out) numbers,
have gradients and optimizer state; of GPT-2's ``c_attn`` and r = 8 that is one number for 72 in W. Hu et al.,
"LoRA" (arXiv 2106.09685), section 4.1.

The entries of B A grow with √r if those of A and B are independent, and α / r makes them too small at a large
r: with ``use_rslora`` s is α / √r (Kalajdzievski, "Rank-Stabilized LoRA", arXiv 2312.03732).

Names and defaults are those of the package ``peft``, whose files ``weights/adapters.py`` reads and writes.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Collection, Mapping
from glob import escape

import numpy as np

from tinyllm.backend.device import to_device_of
from tinyllm.backend.dtypes import accumulation_dtype
from tinyllm.checks import MAX_SIZE, as_generator, check_at_least, check_model
from tinyllm.errors import Error
from tinyllm.nn.init import loaded
from tinyllm.nn.layers import Dropout, Linear
from tinyllm.nn.module import Module
from tinyllm.nn.surgery import check_names, first_match, matches, replace
from tinyllm.tensor import Tensor

DEFAULT_TARGETS = ("c_attn", "q_proj", "v_proj")  # of GPT-2, and of Llama and its relatives
ALL_LINEAR = "all-linear"  # as a target: every Linear but the head


class LoRA(Module):
    """y = x Wᵀ + b + s (d(x) Aᵀ) Bᵀ around the ``base_layer`` with W and b, where d is dropout.

    Initially A is from U(-1/√in, 1/√in), He et al.'s uniform initialization for a slope of √5, and B is 0.
    ``rng`` is a generator or a seed; with None A is a meta parameter (see ``normal``).
    """

    def __init__(
        self, base_layer: Linear, rank: int = 8, alpha: float = 8, dropout: float = 0.0,
        use_rslora: bool = False, *, rng,
    ):  # fmt: skip
        W, rng = base_layer.weight, as_generator(rng)
        self.rank, self.alpha = check_at_least(rank, 1, "LoRA's rank"), alpha
        if isinstance(alpha, bool) or not (isinstance(alpha, int | float) and 0 < alpha <= MAX_SIZE):
            raise Error(
                f"LoRA's alpha is {alpha!r}: choose a positive number up to {MAX_SIZE:,}, such as the rank"
            )
        self.use_rslora, self.base_layer, self.dropout = use_rslora, base_layer, Dropout(dropout)
        self.lora_A = Linear(W.shape[1], self.rank, bias=False, rng=None).astype(W.dtype)
        self.lora_B = Linear(self.rank, W.shape[0], bias=False, rng=None).astype(W.dtype)
        self.lora_B.weight.replace(np.zeros(self.lora_B.weight.shape, W.dtype))
        if rng is not None:
            self.lora_A.reset_parameters(rng)
        for layer in (self.lora_A, self.lora_B):
            layer.weight.replace(to_device_of(layer.weight.data, W.data))
            layer.in_adapter = True

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def forward(self, x):  # (..., in) -> (..., out); s multiplies the smallest array, (..., r)
        return self.base_layer(x) + self.lora_B(self.lora_A(self.dropout(x)) * self.scaling)

    def delta(self):
        """s B A (out, in), which merging adds to W; in float32 if A and B are in half precision."""
        A, B = (loaded(layer.weight).data for layer in (self.lora_A, self.lora_B))
        dtype = accumulation_dtype(A.dtype)
        return self.scaling * (B.astype(dtype, copy=False) @ A.astype(dtype, copy=False))


def add_lora(
    model: Module, rank: int = 8, alpha: float = 8, targets: str | Collection[str] | None = None,
    dropout: float = 0.0, use_rslora: bool = False, rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None, modules_to_save: Collection[str] = (), *, rng,
) -> list[str]:  # fmt: skip
    """Freeze the model and wrap the Linear layers that ``targets`` match in ``LoRA``; returns their names.

    ``targets`` is a collection of names or a regular expression (see ``matches``), or "all-linear", which is
    every Linear but the head; by default those of ``DEFAULT_TARGETS`` that the model has. The keys of
    ``rank_pattern`` and ``alpha_pattern`` are regular expressions for the end of a name, and their values
    replace ``rank`` and ``alpha`` there.

    ``modules_to_save`` names further layers, which are trained whole and belong to the adapter. A layer that
    shares a parameter with one of them, as a tied head does with the embedding, is trained with it.

    Raises ``Error``, and changes nothing, if a name or one of ``targets`` matches no layer, if a target is
    not a Linear, or if the model has LoRA layers already.
    """
    if lora_layers(model):
        raise Error("the model has LoRA layers already: merge them into its weights first (nn.merge_lora)")
    modules, rng = dict(model.named_modules()), as_generator(rng)
    layers = ", ".join(name for name in modules if name)
    whole = [name for name in modules if matches([*check_names(modules_to_save, "modules_to_save")], name)]
    for wanted in modules_to_save:
        if not any(matches([wanted], name) for name in whole):
            raise Error(f"modules_to_save: the model has no layer {wanted!r}; its layers are {layers}")
    excluded = {id(inner) for name in whole for inner in modules[name].modules()}
    if targets == ALL_LINEAR:
        excluded |= {id(child) for _, child in model.children()}  # the head
        names = [name for name, layer in modules.items() if isinstance(layer, Linear)]
    else:
        for wanted in () if targets is None or isinstance(targets, str) else check_names(targets, "targets"):
            if not any(matches([wanted], name) for name in modules):
                raise Error(f"the target {wanted!r} matches no layer of the model; the layers are {layers}")
        targets = DEFAULT_TARGETS if targets is None else targets
        names = [name for name in modules if matches(targets, name)]
    names = [name for name in names if id(modules[name]) not in excluded]
    if not names:
        raise Error(
            f"no layer of the model matches the targets {targets!r}: give others, such as {ALL_LINEAR!r}; "
            f"its layers are {layers}"
        )

    def wrapped(name: str, layer: Module) -> LoRA:
        if not isinstance(layer, Linear):
            raise Error(f"the targets match {name} ({type(layer).__name__}): LoRA applies to Linear layers")
        r, a = first_match(rank_pattern, name, rank), first_match(alpha_pattern, name, alpha)
        return LoRA(layer, r, a, dropout, use_rslora, rng=rng)

    replace(model, [escape(name) for name in names], wrapped)
    for name in whole:
        modules[name].in_adapter = True
    model.requires_grad_(False)
    for module in adapter_modules(model).values():
        module.requires_grad_()
    return names


def lora_layers(model: Module) -> dict[str, LoRA]:
    """The LoRA layers of a model by name."""
    check_model(model, "named_modules")
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}


def adapter_modules(model: Module) -> dict[str, Module]:
    """The modules whose parameters are the adapter: A and B of each LoRA, and those trained whole, by name.

    Of a parameter that several layers share, all layers are listed; a layer in two places is listed once.
    """
    modules = {id(module): (name, module) for name, module in reversed([*model.named_modules()])}
    marked = [module for _, module in modules.values() if getattr(module, "in_adapter", False)]
    mine = {id(parameter) for module in marked for parameter in module.parameters()}
    inside = {id(inner) for module in marked for inner in module.modules()} - {*map(id, marked)}
    return {
        name: module
        for key, (name, module) in reversed(modules.items())
        if key not in inside and (module in marked or mine & {id(value) for _, value in module._attributes()})
    }


def merge_lora(model: Module) -> dict[str, LoRA]:
    """Add s B A to each W and put the plain layers back: the same function, up to rounding, at no extra cost.

    Returns the LoRA layers by name, for ``unmerge_lora``. If another layer shares W, as the embedding shares
    that of a tied head, the merged layer gets a matrix of its own, and a warning says so. To a layer in two
    places s B A is added once.
    """
    merged, plain = lora_layers(model), {}
    for name, lora in merged.items():
        if lora not in plain:
            plain[lora] = _merge(model, name, lora)
        replace(model, escape(name), lambda _, __, layer=plain[lora]: layer)
    return merged


def _merge(model: Module, name: str, lora: LoRA) -> Linear:
    layer, W = lora.base_layer, loaded(lora.base_layer.weight, name)
    if sum(value is W for module in {*model.modules()} for _, value in module._attributes()) > 1:
        layer = copy.copy(layer)
        layer.weight = Tensor(W.data, requires_grad=W.requires_grad)
        logging.getLogger("tinyllm").warning("%s is no longer tied: LoRA was merged into it", name)
    _add(layer.weight, lora.delta())
    return layer


def unmerge_lora(model: Module, merged: Mapping[str, LoRA]) -> None:
    """Undo ``merge_lora``, whose result is ``merged``: subtract s B A again, up to rounding."""
    modules = dict(model.named_modules())
    # A layer that was tied is not its base layer, but a copy; one in two places is subtracted from once.
    for lora in {lora for name, lora in merged.items() if modules[name] is lora.base_layer}:
        _add(lora.base_layer.weight, -lora.delta())
    for name, lora in merged.items():
        replace(model, escape(name), lambda _, __, lora=lora: lora)


def _add(W: Tensor, delta) -> None:
    W.replace((W.data.astype(delta.dtype, copy=False) + delta).astype(W.dtype, copy=False))

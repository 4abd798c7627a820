"""How do parameters get names, and layers become a model?

A Module is an object whose attributes are parameters (Tensors), other Modules, or lists of Modules.
An attribute's path is its name: ``model.h[0].attn.c_attn.weight`` is ``h.0.attn.c_attn.weight``.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllm import functional as F
from tinyllm.device import FEW_ROWS, beside, dtype_of, matmul, to_device
from tinyllm.errors import Error
from tinyllm.kernels import is_short, on_gpu
from tinyllm.pretrained import check_names_and_shapes
from tinyllm.tensor import Tensor, as_rows


class Module:
    """Base of every layer and model: subclasses set attributes and define ``forward``."""

    training = True
    product_dtype = None  # what products are computed in, if not in the parameters' type (``multiply_in``)

    def forward(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def __call__(self, *args, **kwargs):
        if _watch.callback is None:
            return self.forward(*args, **kwargs)
        return _observed(self, args, kwargs)

    def children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the modules directly inside this one; a list's are ``name.0``, ``name.1`` …"""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", item) for i, item in enumerate(value) if isinstance(item, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(name, module) of this module (named ``prefix``) and all below, in the order of definition."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def _entries(self) -> Iterator[tuple[str, Module, str, Tensor]]:
        """(full name, owner, its name there, parameter); a shared one once, under its first name."""
        seen = set()
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{prefix}.{name}" if prefix else name), module, name, value

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) of all parameters; a tied one is listed once, under its first name."""
        return ((full_name, parameter) for full_name, _, _, parameter in self._entries())

    def parameters(self) -> Iterator[Tensor]:
        return (parameter for _, parameter in self.named_parameters())

    def num_parameters(self) -> int:
        return sum(parameter.size for parameter in self.parameters())

    def zero_grad(self) -> None:
        """Drop every gradient; the next ``backward()`` starts afresh."""
        for parameter in self.parameters():
            parameter.grad = None

    def train(self, mode: bool = True):
        """Switch dropout on (or, with ``mode=False``, off) here and below."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self):
        return self.train(False)

    def astype(self, dtype):
        """Convert every parameter, in place; gradients are dropped. A stand-in (see ``normal``) stays one."""
        dtype = dtype_of(dtype)
        for parameter in self.parameters():
            data = parameter.data
            if _is_stand_in(data):
                parameter.replace(np.broadcast_to(np.zeros((), dtype), data.shape))
            else:
                parameter.replace(data.astype(dtype, copy=False))
        self.fuse()
        return self

    def multiply_in(self, dtype):
        """Compute products in ``dtype``, bfloat16 or float16, and keep the parameters as they are; on a GPU.

        The norms before the products write that type; sums, norms, softmax and loss stay in float32, and so
        does what runs past them from block to block. None: in the parameters' type again.
        """
        dtype = None if dtype is None else dtype_of(dtype)
        if dtype is not None and not is_short(dtype):
            raise Error(f"products are computed in bfloat16, float16 or the parameters' type, not in {dtype}")
        for _, module in self.named_modules():
            module.product_dtype = dtype
        return self

    def to(self, device: str):
        """Move every parameter to "cpu", "cuda", "cuda:1" …, in place; gradients are dropped."""
        for parameter in self.parameters():
            parameter.replace(to_device(parameter.data, device))
        self.fuse()
        return self

    def fuse(self) -> None:
        """Called when parameters were given new arrays: a module may ``fuse_rows`` of its layers."""
        for _, child in self.children():
            child.fuse()

    def layout(self, name: str, array):
        """Between a parameter as this module computes with it and as a checkpoint stores it.

        Must be its own inverse. Most modules store what they use.
        """
        return array

    def state_dict(self) -> dict[str, Any]:
        """Every parameter's array by name, in the checkpoint's layout; views, not copies."""
        return {full: owner.layout(name, p.data) for full, owner, name, p in self._entries()}

    def checkpoint_keys(self, arrays: Mapping[str, Any]) -> dict[str, str]:
        """Which key of a checkpoint holds which parameter: name -> key. Normally they are the same."""
        return {key: key for key in arrays}

    def load_state_dict(self, arrays: Mapping[str, Any], source: str = "the given arrays") -> None:
        """Copy every array into the parameter of its name, in the parameter's dtype, on its device.

        Strict: if a name is missing or unknown or a shape differs, Error lists all of them and
        nothing is changed. Arrays are taken one at a time, so a lazy mapping (``pretrained.Weights``)
        is never whole in memory.
        """
        try:
            keys = self.checkpoint_keys(arrays)
        except Error as error:
            raise Error(f"{source} does not fit the model: {error}") from None
        entries = list(self._entries())
        expected = {full: owner.layout(name, p.data).shape for full, owner, name, p in entries}
        shapes = arrays.shapes if hasattr(arrays, "shapes") else {k: np.shape(arrays[k]) for k in arrays}
        check_names_and_shapes(expected, {name: shapes[key] for name, key in keys.items()}, source)
        for full, owner, name, parameter in entries:
            array = owner.layout(name, arrays[keys[full]])
            parameter.replace(beside(array.astype(parameter.dtype, order="C", copy=True), parameter.data))
        self.fuse()


@contextlib.contextmanager
def evaluating(model: Module, modules: Iterable[Module] | None = None):
    """Within this block every module is in eval mode; afterwards each is as it was.

    ``modules`` are the model's and all below, for whoever has them: to find 400 of them takes a millisecond.
    """
    if modules is None:
        modules = (module for _, module in model.named_modules())
    before = [(module, module.training) for module in modules]
    for module, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def normal(rng: np.random.Generator | None, shape, std: float) -> Tensor:
    """A float32 parameter drawn from N(0, std²).

    With ``rng=None`` it is a stand-in of that shape that takes no memory, for ``load_state_dict`` to
    replace: a model of any size can be built, counted, and filled tensor by tensor.
    """
    if rng is None:
        return Tensor(np.broadcast_to(np.float32(0), shape), requires_grad=True)
    data = rng.standard_normal(shape, dtype=np.float32)
    data *= std
    return Tensor(data, requires_grad=True)


def _is_stand_in(data) -> bool:
    return data.size > 1 and not any(data.strides)


class Linear(Module):
    """y = x Wᵀ + b; W (out, in) from N(0, std²), b zero. The rng is as in ``normal``."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, rng, std: float = 0.02):
        self.weight = normal(rng, (out_features, in_features), std)
        self.bias = Tensor(np.zeros(out_features, np.float32), requires_grad=True) if bias else None
        self.fused = None  # of ``fused_linears``: the buffer, and the weight's first row in it

    def forward(self, x, dtype=None):
        return F.linear(x, self.weight, self.bias, dtype)


def fused_linears(
    in_features: int, out_features: Sequence[int], bias: bool = True, *, rng, std: float = 0.02
) -> list[Linear]:
    """Linear layers of one input, whose weights lie below each other in one buffer, for ``fused``."""
    layers = [Linear(in_features, size, bias, rng=None) for size in out_features]
    if rng is not None:
        _lay_rows(normal(rng, (sum(out_features), in_features), std).data, layers)
    return layers


def fuse_rows(*layers: Linear) -> None:
    """Lay the weights as ``fused_linears`` does, unless they lie like that or are stand-ins."""
    weights = [layer.weight.data for layer in layers]
    if not any(map(_is_stand_in, weights)) and not _lie_fused(layers):
        _lay_rows(np.concatenate(weights), layers)


def _lay_rows(buffer, layers: Sequence[Linear]) -> None:
    first = 0
    for layer in layers:
        rows = slice(first, first + layer.weight.shape[0])
        layer.weight.data, layer.fused = buffer[rows], (buffer, first)
        first = rows.stop


def _lie_fused(layers: Sequence[Linear]) -> bool:
    """Whether the weights are the whole of one buffer, in this order."""
    first = 0
    for layer in layers:
        if type(layer) is not Linear or layer.fused is None:
            return False
        weight, (buffer, row) = layer.weight.data, layer.fused
        if weight.base is not buffer or buffer is not layers[0].fused[0] or row != first:
            return False
        first += weight.shape[0]
    return first == len(buffer)


def fused(x: Tensor, *layers: Linear) -> list[Tensor]:
    """[layer(x) for layer in layers]; when a text is written token by token, in one product.

    A product of few rows takes the time of reading its matrix, and one large matrix is read faster than
    several small ones. Layers whose weights no longer lie as ``fused_linears`` laid them, because one was
    given another array or another layer took its place, are applied one by one.
    """
    few = x.ndim > 1 and math.prod(x.shape[:-1]) < FEW_ROWS
    gradient = x.wants_grad or any(layer.weight.wants_grad for layer in layers)
    same = x.dtype == layers[0].weight.dtype
    if not few or gradient or not same or is_watched() or not _lie_fused(layers):
        return [layer(x) for layer in layers]
    y = matmul(as_rows(x.data), layers[0].fused[0].T)
    parts = []
    for layer in layers:
        first, rows = layer.fused[1], layer.weight.data.shape[0]
        part = Tensor(y[:, first : first + rows].reshape(*x.shape[:-1], rows))
        parts.append(part if layer.bias is None else part + layer.bias)
    return parts


def bias_can_wait(x: Tensor, *layers: Module) -> bool:
    """Whether the op after these layers may add their biases where it reads: a GPU saves a pass over memory.

    Not if somebody observes, or if a layer is no plain Linear: then it must be called.
    """
    plain = all(type(layer).forward is Linear.forward and layer.bias is not None for layer in layers)
    return plain and on_gpu(x) and not is_watched()


class Embedding(Module):
    """Row i of W (num_embeddings, embedding_dim) for every id i; W from N(0, std²)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, rng, std: float = 0.02):
        self.weight = normal(rng, (num_embeddings, embedding_dim), std)

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class LayerNorm(Module):
    """``F.layer_norm`` over the last axis, with a learned scale (from 1) and, if ``bias``, shift (from 0)."""

    def __init__(self, channels: int, eps: float = 1e-5, bias: bool = True):
        self.weight = Tensor(np.ones(channels, np.float32), requires_grad=True)
        self.bias = Tensor(np.zeros(channels, np.float32), requires_grad=True) if bias else None
        self.eps = eps

    def forward(self, x):
        dtype = self.product_dtype or self.weight.dtype
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps, dtype)


class RMSNorm(Module):
    """``F.rms_norm`` over the last axis, with a learned scale (from 1)."""

    def __init__(self, channels: int, eps: float | None = None):
        self.weight = Tensor(np.ones(channels, np.float32), requires_grad=True)
        self.eps = eps

    def forward(self, x):
        dtype = self.product_dtype or self.weight.dtype
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps, dtype)


class Dropout(Module):
    """``F.dropout`` while training."""

    def __init__(self, p: float):
        if not 0 <= p < 1:
            raise Error(f"dropout probability must be at least 0 and below 1, not {p}")
        self.p = p

    def forward(self, x):
        return F.dropout(x, self.p, self.training)


def initialize_as_torch(model: Module, rng: np.random.Generator) -> None:
    """Draw all parameters again as PyTorch's layers do when nobody says otherwise.

    Embedding: N(0, 1). Linear, with n inputs: weight and bias from U(-1/√n, 1/√n); norms stay. In the
    classic run on "The Verdict", GPT-2 has a training loss of 0.52 after 12 epochs from these values,
    and of 3.46 from its own.
    """
    for _, module in model.named_modules():
        if isinstance(module, Embedding):
            module.weight.data[...] = rng.standard_normal(module.weight.shape, dtype=np.float32)
        elif isinstance(module, Linear):
            bound = 1 / math.sqrt(module.weight.shape[1])
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    parameter.data[...] = rng.uniform(-bound, bound, parameter.shape)


# ------------------------------------------------------------------------------- watching


@dataclass(frozen=True)
class Observation:
    """What ``observe`` reports: a module's output as it was computed, then its gradient as it comes back."""

    name: str  # relative to the outermost module that was called, which is ""
    module: Module
    inputs: tuple
    output: Any
    grad: Any = None  # None on the way forward; dL/d(output), an array to read only, on the way back


class _Watch(threading.local):
    callback = names = None


_watch = _Watch()


def is_watched() -> bool:
    """Whether somebody observes: then every module is called, even where there is a shorter way."""
    return _watch.callback is not None


@contextlib.contextmanager
def observe(callback: Callable[[Observation], None]):
    """Within this block, in this thread, ``callback(observation)`` sees every module's work.

    In the order of computation: forward when a module has finished, backward when the gradient of
    its output is complete. What it sees must not be changed.
    """
    before, _watch.callback = _watch.callback, callback
    try:
        yield
    finally:
        _watch.callback = before


def _observed(module, args, kwargs):
    callback, outermost = _watch.callback, _watch.names is None
    if outermost:
        _watch.names = {id(m): name for name, m in module.named_modules()}
    try:
        name = _watch.names.get(id(module), type(module).__name__)
        output = module.forward(*args, **kwargs)
    finally:
        if outermost:
            _watch.names = None
    callback(Observation(name, module, args, output))
    if not isinstance(output, Tensor):
        return output
    data = output.data

    def vjp(grad):  # an op that does nothing but see the gradient pass
        callback(Observation(name, module, args, data, grad))
        return (grad,)

    return Tensor.from_op(data, (output,), vjp)

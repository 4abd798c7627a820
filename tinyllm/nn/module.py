"""How do parameters get names, and layers become a model?

A Module is an object whose attributes are parameters (Tensors), other Modules, or lists and dicts of them.
An attribute's path is its name: ``model.h[0].attn.c_attn.weight`` is ``h.0.attn.c_attn.weight``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tinyllm.backend.device import to_device, to_device_of
from tinyllm.backend.dtypes import dtype_of, is_floating
from tinyllm.checks import check_names_and_shapes
from tinyllm.errors import Error
from tinyllm.nn.hooks import call
from tinyllm.nn.init import is_meta
from tinyllm.tensor import Tensor


class Module:
    """Base of every layer and model: subclasses set attributes and define ``forward``."""

    training = True

    def forward(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def __call__(self, *args, **kwargs):
        return call(self, self.forward, *args, **kwargs)

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of every attribute; of a list or dict, its items, as ``name.0`` or ``name.key``."""
        for name, value in vars(self).items():
            if isinstance(value, list | dict):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, item in items:
                    self._check_found(f"{name}.{key}", item)
                    yield f"{name}.{key}", item
            else:
                self._check_found(name, value)
                yield name, value

    def _check_found(self, name: str, value) -> None:
        """``Error`` for layers where nobody looks for them: they would not be trained, moved or saved."""
        if isinstance(value, tuple) or (isinstance(value, list | dict) and "." in name):
            held = value.values() if isinstance(value, dict) else value
            if any(isinstance(item, Module | Tensor) for item in held):
                raise Error(
                    f"{type(self).__name__}.{name} holds layers in a {type(value).__name__}: use a list"
                )

    def children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the modules directly inside this one; a list's are ``name.0``, ``name.1`` …"""
        return ((name, value) for name, value in self._attributes() if isinstance(value, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(name, module) of this module (named ``prefix``) and all below, in the order of definition."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def _entries(self) -> Iterator[tuple[str, Module, str, Tensor]]:
        """(full name, owner, its name there, parameter); a shared one once, under its first name."""
        seen = set()
        for prefix, module in self.named_modules():
            for name, value in module._attributes():
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

    def requires_grad_(self, wanted: bool = True):
        """Freeze, with ``False``, or thaw every parameter here and below; one: ``p.requires_grad = True``.

        A frozen parameter gets no gradient, and none is computed for it. The one it had is dropped.
        """
        for parameter in self.parameters():
            if not wanted or is_floating(parameter.dtype):  # tables of integers have no gradient
                parameter.requires_grad = wanted
        return self

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
        """Convert every parameter, in place; gradients are dropped. A meta parameter stays one."""
        dtype = dtype_of(dtype)
        for parameter in self.parameters():
            data = parameter.data
            if not is_floating(data.dtype):  # a table of integers stays one
                continue
            if is_meta(data):
                parameter.replace(np.broadcast_to(np.zeros((), dtype), data.shape))
            else:
                parameter.replace(data.astype(dtype, copy=False))
        return self

    def to(self, device: str):
        """Move every parameter to "cpu", "cuda", "cuda:1" …, in place; gradients are dropped."""
        for parameter in self.parameters():
            parameter.replace(to_device(parameter.data, device))
        return self

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
        nothing is changed. Arrays are taken one at a time, so a lazy mapping (``safetensors.Weights``)
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
            parameter.replace(
                to_device_of(array.astype(parameter.dtype, order="C", copy=True), parameter.data)
            )


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

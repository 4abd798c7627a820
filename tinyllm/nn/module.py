"""How do layers become a model whose parameters have names?

A Module is an object whose attributes are parameters (Tensors), other Modules, or lists and dicts of these.
The name of a parameter is its path: ``model.h[0].attn.c_attn.weight`` is named ``h.0.attn.c_attn.weight``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tinyllm.backend.device import to_device, to_device_of
from tinyllm.backend.dtypes import dtype_of, is_floating
from tinyllm.checks import check_names_and_shapes
from tinyllm.errors import Error
from tinyllm.nn.hooks import call
from tinyllm.nn.init import converted
from tinyllm.tensor import Tensor


class Module:
    """Base class of every layer and model. Subclasses set attributes and define ``forward``."""

    training = True

    def forward(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def __call__(self, *args, **kwargs):
        return call(self, self.forward, *args, **kwargs)

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of every attribute. Items of a list or dict are named ``name.0`` or ``name.key``."""
        for name, value in vars(self).items():
            if isinstance(value, list | dict):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, item in items:
                    self._check_reachable(f"{name}.{key}", item)
                    yield f"{name}.{key}", item
            else:
                self._check_reachable(name, value)
                yield name, value

    def _check_reachable(self, name: str, value) -> None:
        """Raise ``Error`` for layers in a container that is not searched: they would never be trained."""
        if isinstance(value, tuple) or (isinstance(value, list | dict) and "." in name):
            held = value.values() if isinstance(value, dict) else value
            if any(isinstance(item, Module | Tensor) for item in held):
                raise Error(
                    f"{type(self).__name__}.{name} contains layers in a {type(value).__name__}: use a list"
                )

    def children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of this module's direct submodules. Those in a list are ``name.0``, ``name.1`` …"""
        return ((name, value) for name, value in self._attributes() if isinstance(value, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(name, module) of this module (named ``prefix``) and all submodules, in order of definition."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def _entries(self) -> Iterator[tuple[str, Module, str, Tensor]]:
        """(full name, owner, name in the owner, parameter). A tied one is listed once, by its first name."""
        seen = set()
        for prefix, module in self.named_modules():
            for name, value in module._attributes():
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{prefix}.{name}" if prefix else name), module, name, value

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) of all parameters. A tied one is listed once, by its first name."""
        return ((full_name, parameter) for full_name, _, _, parameter in self._entries())

    def parameters(self) -> Iterator[Tensor]:
        return (parameter for _, parameter in self.named_parameters())

    def num_parameters(self) -> int:
        return sum(parameter.size for parameter in self.parameters())

    def requires_grad_(self, requires_grad: bool = True):
        """Freeze (``False``) or unfreeze every parameter of this module and its submodules.

        No gradient is computed for a frozen parameter, and the one it had is dropped. For a single
        parameter set ``p.requires_grad``.
        """
        for parameter in self.parameters():
            if not requires_grad or is_floating(parameter.dtype):  # an integer table has no gradient
                parameter.requires_grad = requires_grad
        return self

    def zero_grad(self) -> None:
        """Drop every gradient, so that the next ``backward()`` starts from zero."""
        for parameter in self.parameters():
            parameter.grad = None

    def train(self, mode: bool = True):
        """Enable dropout (or with ``mode=False`` disable it) in this module and its submodules."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self):
        return self.train(False)

    def astype(self, dtype):
        """Convert every floating-point parameter to ``dtype``, in place. Gradients are dropped."""
        dtype = dtype_of(dtype)
        if not is_floating(dtype):
            raise Error(f"parameters cannot be {dtype}: choose float32, float64, bfloat16 or float16")
        for parameter in self.parameters():
            if is_floating(parameter.dtype):
                parameter.replace(converted(parameter.data, lambda data: data.astype(dtype, copy=False)))
        return self

    def to(self, device: str):
        """Move every parameter to "cpu", "cuda", "cuda:1" …, in place. Gradients are dropped."""
        for parameter in self.parameters():
            parameter.replace(converted(parameter.data, lambda data: to_device(data, device)))
        return self

    def layout(self, name: str, array):
        """Convert a parameter's array between the layout used here and the one stored in checkpoints.

        Must be its own inverse. The default is the identity.
        """
        return array

    def state_dict(self) -> dict[str, Any]:
        """Every parameter's array by name, in the checkpoint layout. These are views, not copies."""
        return {full: owner.layout(name, p.data) for full, owner, name, p in self._entries()}

    def checkpoint_keys(self, arrays: Mapping[str, Any]) -> dict[str, str]:
        """Map parameter names to a checkpoint's keys. By default they are equal."""
        return {key: key for key in arrays}

    def load_state_dict(self, arrays: Mapping[str, Any], source: str = "the state dict") -> None:
        """Copy every array into the parameter of the same name, in the parameter's dtype, on its device.

        Strict: if names are missing or unknown or shapes differ, ``Error`` lists them all and nothing is
        changed. Arrays are read one at a time, so a lazy mapping (``safetensors.Weights``) is never entirely
        in memory.
        """
        if not isinstance(arrays, Mapping):
            raise Error(f"weights must be a dict, such as a state_dict(), not a {type(arrays).__name__}")
        try:
            keys = self.checkpoint_keys(arrays)
        except Error as error:
            raise Error(f"{source} does not fit the model: {error}") from None
        entries = list(self._entries())
        expected = {full: owner.layout(name, p.data).shape for full, owner, name, p in entries}
        shapes = arrays.shapes if hasattr(arrays, "shapes") else {k: _shape(k, arrays[k]) for k in arrays}
        check_names_and_shapes(expected, {name: shapes[key] for name, key in keys.items()}, source)
        for full, owner, name, parameter in entries:
            array = owner.layout(name, arrays[keys[full]])
            parameter.replace(
                to_device_of(array.astype(parameter.dtype, order="C", copy=True), parameter.data)
            )


def _shape(key: str, array) -> tuple[int, ...]:
    """The shape of an array. Raises ``Error`` for a Tensor, here or of PyTorch."""
    if not hasattr(array, "astype") or isinstance(array, Tensor):
        raise Error(f"weights must be NumPy arrays, and {key} is a {type(array).__name__}: pass state_dict()")
    return array.shape


@contextlib.contextmanager
def evaluating(model: Module, modules: Iterable[Module] | None = None):
    """Context manager: every module is in eval mode within the block, and restored to its mode afterwards.

    ``modules``, the model and all its submodules, may be passed to avoid the search: 400 take a millisecond.
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

"""How do layers become a model whose parameters have names?

A Module is an object whose attributes are parameters (Tensors), other Modules, or lists and dicts of these,
nested or not. The name of a parameter is its path: ``model.h[0].attn.c_attn.weight`` is named
``h.0.attn.c_attn.weight``.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np

from tinyllm.backend.device import to_device, to_device_of
from tinyllm.backend.dtypes import dtype_of, is_floating
from tinyllm.checks import check_names_and_shapes, check_range
from tinyllm.errors import Error
from tinyllm.nn.hooks import call
from tinyllm.nn.init import converted, is_meta
from tinyllm.tensor import Tensor


class Module:
    """Base class of every layer and model. Subclasses set attributes and define ``forward``."""

    training = True

    def forward(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def __call__(self, *args, **kwargs):
        return call(self, self.forward, *args, **kwargs)

    def __setattr__(self, name: str, value) -> None:
        """Set an attribute. Raises ``Error`` for an array in the place of a parameter."""
        if isinstance(vars(self).get(name), Tensor) and not isinstance(value, Tensor | Module | None):
            raise Error(
                f"{type(self).__name__}.{name} is a parameter, not a {type(value).__name__}: call "
                f"{name}.replace(array), or set a Tensor"
            )
        super().__setattr__(name, value)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        shared = [name for name, value in vars(cls).items() if _holds_parameters(value)]
        if shared or vars(cls).get("__slots__"):
            raise Error(
                f"{cls.__name__}.{(*shared, '__slots__')[0]} would hide parameters from training: set them "
                "in __init__, as attributes of self"
            )

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of every attribute. Items of a list or dict are named ``name.0`` or ``name.key``."""
        for name, value in vars(self).items():
            if isinstance(value, PLAIN):  # most attributes
                yield name, value
            else:
                yield from _items(f"{type(self).__name__}.", name, value)

    def children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of this module's direct submodules. Those in a list are ``name.0``, ``name.1`` …"""
        return ((name, value) for name, value in self._attributes() if isinstance(value, Module))

    def modules(self) -> Iterator[Module]:
        """This module and all submodules, in order of definition."""
        return (module for _, module in self.named_modules())

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
                    full_name = f"{prefix}.{name}" if prefix else name
                    check_leaf(full_name, value)
                    yield full_name, module, name, value

    def __repr__(self) -> str:
        """The tree of submodules with their parameters' shapes and their numbers; equal ones in one line."""
        return f"{type(self).__name__} ({self.num_parameters():,} parameters){_tree(self)}"

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient, or fill it with zeros: the next ``backward()`` starts from zero."""
        for parameter in self.parameters():
            zero_grad(parameter, set_to_none)

    def train(self, mode: bool = True):
        """Enable dropout (or with ``mode=False`` disable it) in this module and its submodules."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self):
        return self.train(False)

    def astype(self, dtype):
        """Convert every floating-point parameter to ``dtype``, in place. Gradients are dropped.

        Raises ``Error``, and changes nothing, if a weight is too large for it, as 65,520 is for float16.
        """
        dtype = dtype_of(dtype)
        if not is_floating(dtype):
            raise Error(f"parameters cannot be {dtype}: choose float32, float64, bfloat16 or float16")
        for name, parameter in self.named_parameters():
            if is_floating(parameter.dtype) and not is_meta(parameter.data):
                check_range(name, parameter.data, dtype)
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
        in memory. Raises ``Error`` at a weight that is too large for the dtype of its parameter.
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
            check_range(full, array, parameter.dtype)
            parameter.replace(
                to_device_of(array.astype(parameter.dtype, order="C", copy=True), parameter.data)
            )


def check_leaf(name: str, parameter: Tensor) -> None:
    """Raise ``Error`` for a computed Tensor: its gradient is not kept, so it would not be trained."""
    if parameter.node is not None and parameter.node.parents != ():
        raise Error(
            f"parameter {name} is the result of an op: make it with Tensor(array, requires_grad=True) or, if "
            "it is not a parameter, store its .data"
        )


PLAIN = Module, Tensor, int, float, str, type(None)  # the attributes to which no search applies


def zero_grad(parameter: Tensor, set_to_none: bool = True) -> None:
    """Drop the gradient or, with ``set_to_none=False``, fill it with zeros."""
    parameter.grad = None if set_to_none or parameter.grad is None else np.zeros_like(parameter.grad)


def _items(owner: str, name: str, value) -> Iterator[tuple[str, Any]]:
    """(name, value) of an attribute or, for lists and dicts at any depth, of each item.

    Raises ``Error`` for parameters where they would not be found, and so never be trained or saved.
    """
    if isinstance(value, list):
        value = {str(number): item for number, item in enumerate(value)}
    if isinstance(value, dict):
        for key, item in value.items():
            if (not isinstance(key, str) or "." in key) and _holds_parameters(item):
                raise Error(f"{owner}{name} contains layers under the key {key!r}: use a str without a dot")
            yield from _items(owner, f"{name}.{key}", item)
    elif not isinstance(value, PLAIN) and _holds_parameters(value):
        raise Error(
            f"{owner}{name} contains layers in a {type(value).__name__}: use a list, a dict or a Module"
        )
    else:
        yield name, value


def _holds_parameters(value) -> bool:
    """Whether a value is a Module or Tensor, or a container or an object of another class that has one."""
    if isinstance(value, Module | Tensor):
        return True
    if isinstance(value, list | tuple | dict | Set | Mapping | deque):
        return any(map(_holds_parameters, value.values() if isinstance(value, Mapping) else value))
    parts = () if isinstance(value, type) else getattr(value, "__dict__", {}).values()
    return any(isinstance(x, Module) or (isinstance(x, Tensor) and x.requires_grad) for x in parts)


def _tree(module: Module) -> str:
    """What follows the name of a module in ``repr``: its own values, then an indented line per submodule."""
    own, runs = "", []  # runs: [first name, last name, text] of equal neighbours in a list
    for name, value in module._attributes():
        if isinstance(value, Module):
            text = type(value).__name__ + _tree(value)
            in_list = name.rpartition(".")[0]
            same = in_list and runs and runs[-1][2] == text and runs[-1][0].startswith(in_list + ".")
            runs[-1:] = [[runs[-1][0], name, text]] if same else [*runs[-1:], [name, name, text]]
        elif isinstance(value, Tensor):
            own += f" {name}{list(value.shape)}"
        elif isinstance(value, int | float) and not isinstance(value, bool):
            own += f" {name}={value}"
    lines = [(first if first == last else f"{first} … {last}") + f": {text}" for first, last, text in runs]
    return own + "".join("\n  " + line.replace("\n", "\n  ") for line in lines)


def _shape(key: str, array) -> tuple[int, ...]:
    """The shape of an array of real numbers. Raises ``Error`` for others and for Tensors, also PyTorch's."""
    if not hasattr(array, "astype") or isinstance(array, Tensor):
        raise Error(f"weights must be NumPy arrays, and {key} is a {type(array).__name__}: pass state_dict()")
    if not np.can_cast(array.dtype, np.float64, "same_kind"):  # complex, str, object
        raise Error(f"weights must be real numbers, and {key} is an array of {array.dtype}: convert it first")
    return array.shape


_evaluated: dict[int, int] = {}  # id of a module that was in train mode -> number of blocks of ``evaluating``
_evaluated_lock = threading.Lock()


@contextlib.contextmanager
def evaluating(model: Module):
    """Context manager: every module is in eval mode within the block, and restored to its mode afterwards.

    Of several blocks at once, in several threads, the last restores the mode.
    """
    with _evaluated_lock:
        training = [module for module in model.modules() if module.training or id(module) in _evaluated]
        for module in training:  # a loaded model has none
            _evaluated[id(module)] = _evaluated.get(id(module), 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _evaluated_lock:
            for module in training:
                _evaluated[id(module)] -= 1
                if _evaluated[id(module)] == 0:
                    del _evaluated[id(module)]
                    module.training = True

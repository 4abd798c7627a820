"""Observe every module's output and gradient."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinyllm.tensor import Tensor


@dataclass(frozen=True)
class Observation:
    """What ``observe`` reports: a module's output as it was computed, then its gradient as it comes back."""

    name: str  # relative to the outermost module that was called, which is "", or to ``observe``'s model
    module: Any
    inputs: tuple
    output: Any
    grad: Any = None  # None on the way forward; dL/d(output), an array to read only, on the way back


class _Watch(threading.local):
    callback = names = None


_watch = _Watch()


@contextlib.contextmanager
def observe(callback: Callable[[Observation], None], model=None):
    """Within this block, in this thread, ``callback(observation)`` sees every module's work.

    In the order of computation: forward when a module has finished, backward when the gradient of
    its output is complete. What it sees must not be changed. Names are relative to ``model`` if it is given:
    a method such as ``hidden_states`` calls the parts of a model, and not the model.
    """
    before = _watch.callback, _watch.names
    _watch.callback, _watch.names = callback, None if model is None else _names(model)
    try:
        yield
    finally:
        _watch.callback, _watch.names = before


def _names(model) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def call(module, method: Callable, *args, **kwargs):
    """``method(*args, **kwargs)``, which ``observe`` shows as the work of ``module``.

    That is how a module is called, with its ``forward``. A model's ``loss`` is seen in the same way.
    """
    callback, outermost = _watch.callback, _watch.names is None
    if callback is None:
        return method(*args, **kwargs)
    if outermost:
        _watch.names = _names(module)
    try:
        name = _watch.names.get(id(module), type(module).__name__)
        output = method(*args, **kwargs)
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

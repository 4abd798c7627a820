"""Observe every module's output and gradient."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinyllm.tensor import Tensor

# ------------------------------------------------------------------------------- watching


@dataclass(frozen=True)
class Observation:
    """What ``observe`` reports: a module's output as it was computed, then its gradient as it comes back."""

    name: str  # relative to the outermost module that was called, which is ""
    module: Any
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


def observed(module, args, kwargs):
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

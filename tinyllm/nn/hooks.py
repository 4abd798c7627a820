"""Observe every module's output and gradient, and the arguments of every op."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinyllm.checks import check_model
from tinyllm.tensor import Tensor, mode


@dataclass(frozen=True)
class Observation:
    """What ``observe`` reports: a module's output (forward pass), then the gradient of it (backward pass)."""

    name: str  # relative to the module that was called (itself ""), or to the ``model`` of ``observe``
    module: Any
    inputs: tuple
    output: Any
    grad: Any = None  # None in the forward pass; in the backward pass dL/d(output), not to be modified


class _Watch(threading.local):
    callback = names = None


_watch = _Watch()


@contextlib.contextmanager
def observe(
    callback: Callable[[Observation], None],
    model=None,
    on_op: Callable[[str, dict, Tensor], None] | None = None,
):
    """Within this block, in this thread, call ``callback(observation)`` for every module that runs.

    Observations are in the order of computation: a module's output when it returns, its gradient when it
    is complete. The callback must not modify them. Pass ``model`` for names relative to it if you call a
    method such as ``hidden_states``, which calls the model's layers but not the model.

    ``on_op(name, arguments, output)`` is called after the forward pass of every op of ``tinyllm.functional``,
    such as "scaled_dot_product_attention", with the arguments that were given by their names.
    """
    if model is not None:
        check_model(model, "named_modules")
    before = _watch.callback, _watch.names, mode.on_op
    _watch.callback, _watch.names = callback, None if model is None else _names(model)
    mode.on_op = on_op
    try:
        yield
    finally:
        _watch.callback, _watch.names, mode.on_op = before


def is_observed() -> bool:
    """Whether this thread is within a block of ``observe``."""
    return _watch.callback is not None


def _names(model) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def call(module, method: Callable, *args, **kwargs):
    """Return ``method(*args, **kwargs)``, reported to ``observe`` as the output of ``module``.

    ``Module.__call__`` runs ``forward`` through it, and a language model its ``loss``.
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

    def vjp(grad):  # the identity: it only reports the gradient
        callback(Observation(name, module, args, data, grad))
        return (grad,)

    return Tensor.from_op(data, (output,), vjp)

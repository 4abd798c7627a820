"""The outputs and gradients of every layer of a tinyllm or torch module, as NumPy arrays by name.

One forward and one backward pass is recorded: in tinyllm with ``nn.observe``, in torch with hooks. The models
need no changes.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyllm import nn
from tinyllm.backend.device import to_device, to_device_of
from tinyllm.backend.dtypes import is_half
from tinyllm.checks import check_ids
from tinyllm.errors import Error
from tinyllm.tensor import Tensor

OUTPUT = "(output)"  # the name of what the whole call returned

Call = Callable[..., Any]  # call(module, *inputs) -> the tensor to run backward from


@dataclass
class Capture:
    """The record of one run. A name is a module's path; the second call of a module is ``path #2``.

    Tied parameters are one, under the first of their names. Weight matrices are (out, in).
    """

    modules: list[str] = field(default_factory=list)  # every module, called or not
    layers: dict[str, dict[str, str]] = field(default_factory=dict)  # module -> {leaf: own parameter}
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of every parameter
    outputs: dict[str, np.ndarray] = field(default_factory=dict)  # in the order of computation
    gradients: dict[str, np.ndarray] = field(default_factory=dict)  # dL/d(output), in backward order
    parameters: dict[str, np.ndarray | None] = field(default_factory=dict)  # dL/d(parameter), or None
    inputs: dict[str, np.ndarray | None] = field(default_factory=dict)  # dL/d(floating-point input)


def capture(module, inputs, call: Call | None = None, seed: int = 0) -> Capture:
    """Run ``module`` on ``inputs`` forward and backward in eval mode and record every layer.

    ``inputs`` is an array or a tuple of arrays. Floating-point inputs are converted to the parameters' dtype
    and receive a gradient. ``call(module, *inputs)`` returns the tensor on which backward is called (default:
    the first tensor in ``module(*inputs)``). The upstream gradient is 1 for a scalar, otherwise random normal
    numbers from ``seed``. The module's mode, parameters and gradients are restored. Raises Error for other
    kinds of modules, if the call returns no tensor, and for token ids outside an embedding's vocabulary.
    """
    inputs = [to_numpy(x) for x in (inputs if isinstance(inputs, tuple) else (inputs,))]
    call = call or (lambda module, *inputs: module(*inputs))
    if isinstance(module, nn.Module):
        return _capture_tinyllm(module, inputs, call, seed)
    if "torch" in sys.modules and isinstance(module, sys.modules["torch"].nn.Module):
        return _capture_torch(module, inputs, call, seed)
    raise Error(f"a {type(module).__name__} cannot be captured: pass a tinyllm or a torch module")


def _capture_tinyllm(module: nn.Module, inputs, call: Call, seed: int) -> Capture:
    modules, parameters = dict(module.named_modules()), dict(module.named_parameters())
    run = _described(modules, parameters, lambda owner: vars(owner).items())
    run.shapes = {name: parameter.shape for name, parameter in parameters.items()}
    count, labels = Counter(), {}

    def watch(seen: nn.Observation) -> None:
        if seen.grad is not None:
            if (label := labels.get((seen.name, id(seen.output)))) is not None:
                run.gradients[label] = to_numpy(seen.grad)
        elif seen.name and (tensor := _first_tensor(seen.output, Tensor)) is not None:
            label = _label(count, seen.name)
            labels[seen.name, id(tensor.data)] = label  # the tape holds the array until its backward pass
            run.outputs[label] = to_numpy(tensor)

    like = next((parameter.data for parameter in parameters.values()), np.empty(0))  # dtype and device
    inputs = [_leaf(x, like) if x.dtype.kind == "f" else x for x in inputs]
    with _restored(modules.values(), parameters.values()), nn.observe(watch):
        output = _result(call(module, *inputs), Tensor)
        run.outputs[OUTPUT] = to_numpy(output)
        if output.requires_grad:
            output.backward(_leaf(upstream(output.shape, seed), output.data).data)
        run.parameters = {name: to_numpy(parameter.grad) for name, parameter in parameters.items()}
    floats = {f"(input {i})": x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    run.inputs = {name: to_numpy(x.grad) for name, x in floats.items()}
    return run


def _capture_torch(module, inputs, call: Call, seed: int) -> Capture:
    import torch

    modules, parameters = dict(module.named_modules()), dict(module.named_parameters())
    run = _described(modules, parameters, lambda owner: owner.named_parameters(recurse=False))
    # Linear stores (out, in), transformers' Conv1D (in, out).
    conv = {f"{path}.weight" for path, owner in modules.items() if type(owner).__name__ == "Conv1D"}
    run.shapes = {name: tuple(p.shape)[:: -1 if name in conv else 1] for name, p in parameters.items()}
    count, handles = Counter(), []

    def seen(name: str, output) -> None:
        tensor = _first_tensor(output, torch.Tensor)
        if tensor is None or not tensor.is_floating_point():
            return
        label = _label(count, name)
        run.outputs[label] = to_numpy(tensor)
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: run.gradients.update({label: to_numpy(grad)}))

    def check(embedding, args) -> None:  # torch's own message does not name the id
        check_ids(to_numpy(args[0]), embedding.num_embeddings)

    first = next(iter(parameters.values()), torch.empty(0, dtype=torch.float64))
    inputs = [torch.tensor(x.astype(np.int64) if x.dtype.kind in "iu" else x) for x in inputs]
    inputs = [x.to(first) if x.is_floating_point() else x.to(first.device) for x in inputs]
    floats = {f"(input {i})": x.requires_grad_() for i, x in enumerate(inputs) if x.is_floating_point()}
    with _restored(modules.values(), parameters.values()):
        for name, owner in modules.items():
            if name:
                hook = lambda owner, args, output, name=name: seen(name, output)  # noqa: E731
                handles.append(owner.register_forward_hook(hook))
            if isinstance(owner, torch.nn.Embedding):
                handles.append(owner.register_forward_pre_hook(check))
        try:
            output = _result(call(module, *inputs), torch.Tensor)
        finally:
            for handle in handles:
                handle.remove()
        run.outputs[OUTPUT] = to_numpy(output)
        if output.requires_grad:
            output.backward(torch.tensor(upstream(tuple(output.shape), seed)).to(output))
        grads = {name: to_numpy(parameter.grad) for name, parameter in parameters.items()}
    run.parameters = {name: g.T if name in conv and g is not None else g for name, g in grads.items()}
    run.inputs = {name: to_numpy(x.grad) for name, x in floats.items()}
    return run


# ------------------------------------------------------------------------------------ helpers


def _described(modules: dict, parameters: dict, own) -> Capture:
    """A capture with modules and layers only; ``own(module)`` yields (leaf name, value) of its attributes."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    owned = {
        path: {leaf: names[id(value)] for leaf, value in own(module) if id(value) in names}
        for path, module in modules.items()
    }
    return Capture(list(modules), {path: leaves for path, leaves in owned.items() if leaves})


@contextlib.contextmanager
def _restored(modules, parameters):
    """A context in eval mode and without gradients; every mode and gradient is restored afterwards."""
    modes = [(module, module.training) for module in modules]
    grads = [(parameter, parameter.grad) for parameter in parameters]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in grads:
            parameter.grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, grad in grads:
            parameter.grad = grad


def upstream(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The upstream gradient: 1 for a scalar, else normal numbers that are the same for (B, T) and (B·T,)."""
    if math.prod(shape) == 1:
        return np.ones(shape)
    return np.random.default_rng(seed).standard_normal(math.prod(shape)).reshape(shape)


def _leaf(array: np.ndarray, like) -> Tensor:
    return Tensor(to_device_of(array.astype(like.dtype), like), requires_grad=True)


def _first_tensor(output, kind: type):
    """``output`` if it is a tensor, else the first tensor in its tuple, list or mapping, or None."""
    if isinstance(output, kind):
        return output
    items = output.values() if isinstance(output, dict) else output
    items = items if isinstance(output, (dict, tuple, list)) else ()
    return next((item for item in items if isinstance(item, kind)), None)


def _result(returned, kind: type):
    tensor = _first_tensor(returned, kind)
    if tensor is None:
        raise Error(f"the call returned a {type(returned).__name__} without a tensor: return one in call=")
    return tensor


def _label(count: Counter, name: str) -> str:
    count[name] += 1
    return name if count[name] == 1 else f"{name} #{count[name]}"


def to_numpy(x) -> np.ndarray | None:
    """A copy on the host, so that later in-place changes do not affect it."""
    if x is None:
        return None
    if isinstance(x, Tensor):
        x = x.data
    if "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor):
        x = x.detach().cpu()
        return (x.float() if x.is_floating_point() and x.itemsize == 2 else x).numpy().copy()
    x = to_device(x, "cpu") if hasattr(x, "get") else np.array(x)  # CuPy's arrays have get()
    return x.astype(np.float32) if is_half(x.dtype) else x

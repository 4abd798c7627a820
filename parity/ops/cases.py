"""The checks of an op: against PyTorch, its plain form, float32 and central differences.

A ``Case`` is one computation in tinyllm and in torch, with its inputs. Each ``check_`` function tests one
property of a case and raises AssertionError with the numbers if it does not hold. Only ``check_torch`` needs
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinyllm.tensor import Tensor

RELATIVE = 1e-10  # of the reference's largest element, both in float64

# Absolute, where terms cancel: times the scale of the inputs (unit) and of the upstream gradient
FLOOR = 1e-12

FLOAT32 = 1e-5  # both bounds, for float32 against float64: about 100 roundings of 6e-8

STEP = 1e-5  # of the central difference; error: STEP² f'''/6 (truncation) and 1e-16 |f| / STEP (rounding)

DIRECTION = 1e-7  # allows for third derivatives of several hundred

# Set by ``parity.ops.proof``, called for each comparison with (what, error, bound, ``relative``)
witness: Callable[[str, float, float, float], None] | None = None


@dataclass(frozen=True)
class Case:
    """One op on given inputs: ``ours`` is called with Tensors, ``theirs`` with torch tensors."""

    label: str  # the op and its options, for the message
    inputs: Sequence[np.ndarray]  # float64; all that may require a gradient
    ours: Callable[..., Tensor]
    theirs: Callable[..., Any]  # the same with torch
    composed: Callable[..., Tensor] | None = None  # the same with tinyllm.functional.composed
    needs: Sequence[bool] | None = None  # which inputs require a gradient; None: all of them
    seed: int = 0  # of the upstream gradient and the direction

    @property
    def required(self) -> Sequence[bool]:
        """Which inputs require a gradient."""
        return self.needs or [True] * len(self.inputs)


def assert_close(ours, theirs, what: str, relative: float = RELATIVE, floor: float = FLOOR) -> None:
    """No element differs by more than ``relative`` times the reference's largest, plus ``floor``."""
    assert ours.shape == theirs.shape, f"{what}: shape {ours.shape}, but the reference has {theirs.shape}"
    error = np.abs(ours - theirs).max(initial=0)
    bound = relative * np.abs(theirs).max(initial=0) + floor
    if witness is not None:
        witness(what, float(error), float(bound), relative)
    assert error <= bound, f"{what}: off by {error:.3g}, the bound is {bound:.3g}"


def upstream(shape, dtype, seed: int) -> np.ndarray:
    """A random dL/d(output), read-only, in a layout that graphs produce: C, Fortran, or broadcast."""
    grad = np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)
    if seed % 3 == 1 and grad.ndim:
        grad = np.asfortranarray(grad)
    if seed % 3 == 2 and grad.ndim and grad.size:  # like the gradient of a sum: strides of 0
        grad = np.broadcast_to(grad[..., :1], shape)
    grad.flags.writeable = False
    return grad


def run(op, case: Case, dtype=np.float64):
    """(output, gradients, upstream gradient) of ``op`` in tinyllm on the inputs of ``case``."""
    pairs = zip(case.inputs, case.required)
    tensors = [Tensor(x.astype(dtype, copy=False), requires_grad=needed) for x, needed in pairs]
    out = op(*tensors)
    grad = upstream(out.shape, dtype, case.seed)
    assert out.dtype == dtype, f"{case.label}: {np.dtype(dtype)} in, {out.dtype} out"
    out.backward(grad)
    for i, (tensor, needed) in enumerate(zip(tensors, case.required)):
        found, has = tensor.grad, tensor.grad is not None
        assert has == needed, f"{case.label}: input {i}: has a gradient {has}, requires one {needed}"
        if has:
            name = f"{case.label}: gradient {i}"
            assert found.dtype == dtype, f"{name} of {np.dtype(dtype)} is {found.dtype}"
            assert found.shape == tensor.shape, f"{name} has shape {found.shape}"
    return out.data, [tensor.grad for tensor in tensors], grad


def run_torch(case: Case, grad):
    """(output, gradients) of ``case.theirs`` in float64, for the same upstream gradient."""
    import torch

    pairs = zip(case.inputs, case.required)
    inputs = [torch.tensor(x.copy(), requires_grad=needed) for x, needed in pairs]
    out = case.theirs(*inputs)
    assert tuple(out.shape) == grad.shape, (
        f"{case.label}: shape {grad.shape}, but torch has {tuple(out.shape)}"
    )
    out.backward(torch.tensor(grad.copy()))
    return out.detach().numpy(), [None if x.grad is None else x.grad.numpy() for x in inputs]


def _assert_same(case, ours, theirs, grad, relative=RELATIVE, floor=FLOOR):
    (out, grads), (their_out, their_grads) = ours, theirs
    assert_close(out, their_out, f"{case.label}: output", relative, floor)
    floor *= np.abs(grad).max(initial=1)
    for i, (g, their_g) in enumerate(zip(grads, their_grads, strict=True)):
        if g is not None:
            assert_close(g, their_g, f"{case.label}: gradient of input {i}", relative, floor)


def check_torch(case: Case) -> None:
    """Output and all gradients equal torch's in float64."""
    *ours, grad = run(case.ours, case)
    _assert_same(case, ours, run_torch(case, grad), grad)


def check_composed(case: Case) -> None:
    """The fused op equals the plain form, whose gradients the engine derives."""
    *ours, grad = run(case.ours, case)
    *plain, _ = run(case.composed, case)
    _assert_same(case, ours, plain, grad)


def check_float32(case: Case) -> None:
    """With float32 inputs all results are float32 (asserted by ``run``) and close to those in float64."""
    single = replace(case, inputs=[x.astype(np.float32) for x in case.inputs])
    *ours, _ = run(case.ours, single, np.float32)
    # Float64 on the same rounded numbers, the upstream gradient included
    *exact, grad = run(case.ours, single, np.float64)
    _assert_same(case, ours, exact, grad, FLOAT32, FLOAT32)


def check_direction(case: Case) -> None:
    """⟨vjp(w), v⟩ = ⟨w, Jv⟩ for a random direction v.

    Jv is the central difference (f(x + hv) - f(x - hv)) / 2h in float64. The two sides may differ by
    DIRECTION times the sum of the magnitudes of all terms.
    """
    rng = np.random.default_rng(case.seed)
    v = [rng.standard_normal(x.shape) * needed for x, needed in zip(case.inputs, case.required)]
    _, grads, w = run(case.ours, case)

    def moved(h):
        return case.ours(*[Tensor(x + h * direction) for x, direction in zip(case.inputs, v)]).data

    jv = (moved(STEP) - moved(-STEP)) / (2 * STEP)
    ours = [g * direction for g, direction in zip(grads, v) if g is not None]
    error = abs(sum(part.sum() for part in ours) - (w * jv).sum())
    scale = np.abs(w).sum() + np.abs(w * jv).sum() + sum(np.abs(part).sum() for part in ours)
    bound = DIRECTION * scale
    assert error <= bound, (
        f"{case.label}: ⟨vjp(w), v⟩ and ⟨w, Jv⟩ differ by {error:.3g}, the bound is {bound:.3g}"
    )

"""How does a gradient become a step?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from tinyllm.device import each_block
from tinyllm.errors import Error
from tinyllm.nn import Module
from tinyllm.tensor import Tensor


def _named(parameters: Module | Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return list(parameters.named_parameters() if isinstance(parameters, Module) else parameters)


class AdamW:
    """Adam with decoupled weight decay. Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.

    At step t, for every parameter θ with gradient g:

        m = β₁ m + (1 - β₁) g          v = β₂ v + (1 - β₂) g²
        θ = θ - lr λ θ - lr (m / (1 - β₁ᵗ)) / (sqrt(v / (1 - β₂ᵗ)) + ε)

    λ is ``weight_decay`` for parameters of two or more axes, and 0 for biases and norms. ``lr`` may be
    changed between steps. ``parameters`` is a model, or pairs (name, Tensor).
    """

    def __init__(
        self,
        parameters: Module | Iterable[tuple[str, Tensor]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise Error(
                f"AdamW needs lr, eps and weight_decay of at least 0 and betas in [0, 1); got lr={lr}, "
                f"eps={eps}, weight_decay={weight_decay}, betas={betas}."
            )
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.parameters = _named(parameters)
        self.t = 0
        # Made at the first step: as large as the model, and a model may still be moved or converted.
        self.moments: dict[str, tuple] = {}

    def zero_grad(self) -> None:
        for _, parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient, in place."""
        self.t += 1
        beta1, beta2 = self.betas
        # Both bias corrections, folded into the step size and ε: one pass over memory.
        root = math.sqrt(1 - beta2**self.t)
        step_size, eps = self.lr * root / (1 - beta1**self.t), self.eps * root
        for name, parameter in self.parameters:
            if parameter.grad is None:
                continue
            if name not in self.moments:
                self.moments[name] = (np.zeros_like(parameter.data), np.zeros_like(parameter.data))
            decay = 1 - self.lr * self.weight_decay if parameter.ndim >= 2 else 1.0
            theta, g, m, v = (a.reshape(-1) for a in (parameter.data, parameter.grad, *self.moments[name]))

            def update(block, theta=theta, g=g, m=m, v=v, decay=decay):
                g, m, v, theta = g[block], m[block], v[block], theta[block]
                scratch = g * (1 - beta1)
                m *= beta1
                m += scratch
                np.multiply(g, g, out=scratch)
                scratch *= 1 - beta2
                v *= beta2
                v += scratch
                np.sqrt(v, out=scratch)
                scratch += eps
                np.divide(m, scratch, out=scratch)
                scratch *= step_size
                theta *= decay
                theta -= scratch

            each_block(update, theta.size, 1, like=theta)


def clip_grad_norm(parameters: Module | Iterable[tuple[str, Tensor]], max_norm: float) -> float:
    """Scale all gradients, in place, so that their joint L2 norm is at most ``max_norm``.

    Returns the norm before. Pascanu, Mikolov and Bengio, arXiv 1211.5063, algorithm 1. As in torch,
    the factor is max_norm / (norm + 1e-6), and 1 if the norm is already smaller.
    """
    if not max_norm > 0:
        raise Error(f"max_norm must be positive, not {max_norm}.")
    grads = [parameter.grad for _, parameter in _named(parameters) if parameter.grad is not None]
    # Squares of float32 numbers are summed per parameter in float32, then all of them in float64.
    norm = math.sqrt(sum(np.vdot(g, g).item() for g in grads))
    if norm > max_norm:
        for g in grads:
            flat = g.reshape(-1)
            factor = max_norm / (norm + 1e-6)

            def scale(block, flat=flat, factor=factor):
                flat[block] *= factor

            each_block(scale, flat.size, 1, like=flat)
    return norm


def warmup_cosine(
    peak_lr: float, initial_lr: float, min_lr: float, warmup: int, steps: int
) -> Callable[[int], float]:
    """step (from 0) -> learning rate: linear from ``initial_lr`` to ``peak_lr``, then a cosine to ``min_lr``.

    The rate rises by (peak - initial)/warmup a step and stands at the peak at step ``warmup``; then it is
    min + (peak - min) ½ (1 + cos(π x)) with x from 0 there to 1 at step ``steps``. Loshchilov and
    Hutter, "SGDR", arXiv 1608.03983, equation 5, without restarts.
    """
    if not 0 <= warmup < max(steps, 1):
        raise Error(f"warmup ({warmup} steps) must be shorter than the run ({steps} steps).")

    def lr_at(step: int) -> float:
        if step < warmup:
            return initial_lr + (peak_lr - initial_lr) * step / warmup
        progress = min(1.0, (step - warmup) / (steps - warmup))
        return min_lr + (peak_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return lr_at

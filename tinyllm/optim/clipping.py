"""How is the effect of an unusual batch bounded?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tinyllm.backend.cuda import launch
from tinyllm.errors import Error
from tinyllm.optim.parameters import Parameters, each_block_of, named, rows


def clip_grad_norm(parameters: Parameters, max_norm: float) -> float:
    """Scale all gradients, in place, so that their joint L2 norm is at most ``max_norm``.

    With the gradients g₁, g₂, … of all parameters concatenated into one vector g, the norm is
    ‖g‖ = sqrt(Σ ‖gᵢ‖²) and every gᵢ is multiplied by the same factor c = max_norm / (‖g‖ + 1e-6), if c < 1.
    Then ‖c g‖ = c ‖g‖ < max_norm, and c g has the direction of g: the step becomes shorter but still goes
    along the negative gradient. A separate factor per parameter would change the direction.

    Returns the norm before scaling. If it is infinite, finite gradients become 0 and infinite ones NaN; if it
    is NaN, all become NaN, as in torch: check ``math.isfinite(norm)`` before the step. Raises ``Error``
    unless ``max_norm`` is a positive number. Pascanu, Mikolov and Bengio, arXiv 1211.5063, algorithm 1; the
    1e-6 is torch's.
    """
    if not (isinstance(max_norm, int | float | np.number) and max_norm > 0):
        raise Error(f"max_norm must be a positive number, not {max_norm!r}")
    grads = gradients(parameters)
    norm = math.sqrt(sum_of_squares(grads))
    clip(grads, norm, max_norm)
    return norm


def clip(grads: Sequence, norm: float, max_norm: float) -> None:
    """Scale arrays, in place, as ``clip_grad_norm`` does if the norm of all gradients is ``norm``."""
    if not (factor := max_norm / (norm + 1e-6)) >= 1:  # or NaN, as in torch: then all gradients become NaN
        scale(grads, factor)


def sum_of_squares(arrays: Sequence) -> float:
    """Σ x² over all elements of all arrays, each of one axis or more.

    Blocks are summed in their dtype, their sums in float64: float32 would lose small squares in a large sum.
    """
    if launch.fit_for_many(arrays):
        return launch.sum_of_squares(arrays)
    parts = [{} for _ in arrays]  # of each array: the first row of a block -> its sum

    def add(i, block):
        x = arrays[i][block]
        parts[i][block.start] = np.vdot(x, x).item()

    each_block_of(arrays, add)
    # Exactly rounded, so that the order in which the blocks were finished does not matter
    return sum(math.fsum(part.values()) for part in parts)


def gradients(parameters) -> list:
    return [rows(parameter.grad) for _, parameter in named(parameters) if parameter.grad is not None]


def scale(arrays: Sequence, factor: float) -> None:
    """Multiply every array by ``factor``, in place."""
    if launch.fit_for_many(arrays):
        launch.scale(arrays, factor)
        return

    def multiply(i, block):
        arrays[i][block] *= factor

    each_block_of(arrays, multiply)

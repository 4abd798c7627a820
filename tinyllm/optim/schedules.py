"""How does the learning rate change during a run?"""

from __future__ import annotations

import math
from collections.abc import Callable

from tinyllm.errors import Error


def warmup_cosine(
    peak_lr: float, initial_lr: float, min_lr: float, warmup: int, steps: int
) -> Callable[[int], float]:
    """step (from 0) -> learning rate: linear from ``initial_lr`` to ``peak_lr``, then a cosine to ``min_lr``.

    The rate rises by (peak - initial)/warmup per step and reaches the peak at step ``warmup``. Then it is
    min + (peak - min) ½ (1 + cos(π x)), where x goes linearly from 0 at step ``warmup`` to 1 at step
    ``steps``. Loshchilov and Hutter, "SGDR", arXiv 1608.03983, equation 5, without restarts.
    """
    return _schedule(lambda x: 0.5 * (1 + math.cos(math.pi * x)), peak_lr, initial_lr, min_lr, warmup, steps)


def warmup_linear(
    peak_lr: float, initial_lr: float, min_lr: float, warmup: int, steps: int
) -> Callable[[int], float]:
    """``warmup_cosine`` with a straight line to ``min_lr``: min + (peak - min) (1 - x).

    Early steps go fast, late steps average out the noise of single batches. For convex losses the last
    weights of such a run are as good as the average of all, which no constant rate achieves; in experiments
    it is at least as good as the cosine. Defazio et al., arXiv 2310.07831, sections 2 and 4.
    """
    return _schedule(lambda x: 1 - x, peak_lr, initial_lr, min_lr, warmup, steps)


def _schedule(
    decay: Callable[[float], float], peak_lr: float, initial_lr: float, min_lr: float, warmup: int, steps: int
) -> Callable[[int], float]:
    if not 0 <= warmup < steps:
        raise Error(f"warmup ({warmup} steps) must be shorter than the run ({steps} steps)")

    def lr_at(step: int) -> float:
        if step < warmup:
            return initial_lr + (peak_lr - initial_lr) * step / warmup
        progress = min(1.0, (step - warmup) / (steps - warmup))
        return min_lr + (peak_lr - min_lr) * decay(progress)

    return lr_at

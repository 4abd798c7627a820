"""How are small gradients kept in float16?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tinyllm.errors import Error
from tinyllm.optim.clipping import gradients, scale
from tinyllm.optim.parameters import Parameters
from tinyllm.tensor import Tensor


class NoLossScale:
    """A loss scale that does nothing, with the methods of ``LossScale``, for dtypes that need none."""

    scale = 1.0

    def seed(self, loss: Tensor) -> None:
        """The argument for ``loss.backward``: None, its default."""

    def unscale(self, parameters: Parameters) -> None:
        """Do nothing."""

    def update(self, finite: bool) -> None:
        """Do nothing."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        """Do nothing."""


class LossScale(NoLossScale):
    """Dynamic loss scaling for float16. Micikevicius et al., arXiv 1710.03740, section 3.2.

    The smallest positive float16 is 6e-8, and many gradients are smaller. The loss is multiplied by S, and by
    the chain rule so is every gradient; before the update the gradients are divided by S. As in torch's
    GradScaler, S is adjusted by trial: a step with a non-finite gradient is skipped and S halved, and after
    2,000 consecutive finite steps S is doubled.
    """

    GROWTH_STEPS = 2000

    def __init__(self, scale: float = 65536.0):
        self.load_state_dict({"scale": scale, "good_steps": 0})

    def seed(self, loss: Tensor):
        """S as an array of the loss's shape, for ``loss.backward``: it multiplies every gradient by S."""
        return np.full_like(loss.data, self.scale)

    def unscale(self, parameters: Parameters) -> None:
        """Divide all gradients by S, in place."""
        scale(gradients(parameters), 1 / self.scale)  # a power of two, like S: exact

    def update(self, finite: bool) -> None:
        """Choose the next step's S from whether all of this step's gradients were finite."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == self.GROWTH_STEPS:
            self.scale, self.good_steps = 2 * self.scale, 0

    def state_dict(self) -> dict[str, float | int]:
        """S and the number of finite steps since it last changed, as plain numbers."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Resume from the result of ``state_dict``. Raises ``Error`` unless S is positive and finite."""
        if not 0 < state["scale"] < math.inf:
            raise Error(f"a loss scale must be above 0 and finite, not {state['scale']}")
        self.scale, self.good_steps = float(state["scale"]), state["good_steps"]

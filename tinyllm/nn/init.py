"""How are initial weights drawn?"""

from __future__ import annotations

import numpy as np

from tinyllm.tensor import Tensor


def normal(rng: np.random.Generator | None, shape, std: float) -> Tensor:
    """A float32 parameter drawn from N(0, std²).

    With ``rng=None`` it is a stand-in of that shape that takes no memory, for ``load_state_dict`` to
    replace: a model of any size can be built, counted, and filled tensor by tensor.
    """
    if rng is None:
        return Tensor(np.broadcast_to(np.float32(0), shape), requires_grad=True)
    data = rng.standard_normal(shape, dtype=np.float32)
    data *= std
    return Tensor(data, requires_grad=True)


def is_meta(data) -> bool:
    return data.size > 1 and not any(data.strides)

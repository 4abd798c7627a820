"""How are initial weights drawn?"""

from __future__ import annotations

import numpy as np

from tinyllm.tensor import Tensor


def normal(rng: np.random.Generator | None, shape, std: float) -> Tensor:
    """A float32 parameter drawn from N(0, std²).

    With ``rng=None`` it is a meta parameter: of that shape, but without memory, for ``load_state_dict`` to
    replace. So a model of any size can be built, counted, and filled tensor by tensor.
    """
    if rng is None:
        return Tensor(np.broadcast_to(np.float32(0), shape), requires_grad=True)
    data = rng.standard_normal(shape, dtype=np.float32)
    data *= std
    return Tensor(data, requires_grad=True)


def is_meta(data) -> bool:
    """Whether an array is one number repeated, as that of a meta parameter is."""
    return data.size > 1 and not any(data.strides)


def initialize_as_torch(model, rng: np.random.Generator) -> None:
    """Draw the parameters of every Linear and Embedding again, as PyTorch's layers do by default.

    See ``Linear.reset_parameters`` and ``Embedding.reset_parameters``; norms stay. In the classic run on
    "The Verdict", GPT-2 has a training loss of 0.52 after 12 epochs from these values, and of 3.46 from
    its own.
    """
    for _, module in model.named_modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters(rng)

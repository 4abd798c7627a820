"""By what angles does RoPE rotate queries and keys?

Why the attention score then depends on distances only: write a pair of channels as a vector of the plane, and
let R_a = [[cos a, -sin a], [sin a, cos a]] be the rotation by the angle a. Rotations compose, R_a R_b =
R_(a+b), because angles add, and R_aᵀ = R_(-a), because cos is even and sin is odd. With a query q at position
m rotated by m ω and a key k at position n by n ω,

    (R_mω q)ᵀ (R_nω k) = qᵀ R_(-mω) R_nω k = qᵀ R_((n-m)ω) k,

which contains m and n only in n - m. Summed over the D/2 pairs, each with its own ω, this is the score q · k.

Su et al., "RoFormer" (arXiv 2104.09864), section 3.4.2. Extending the context: Chen et al., "Extending
Context Window of Large Language Models via Positional Interpolation" (arXiv 2306.15595), and Llama 3.1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import numpy as np

from tinyllm.errors import Error

# The parameters of a rope_type besides rope_theta. "default" is RoFormer's; "linear" divides every frequency,
# "llama3" only the low ones (Llama 3.1 and later).
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_frequencies(config, parameters: Mapping | None = None) -> np.ndarray:
    """The angle per position, in radians, of each pair of channels: (D/2,) in float64.

    Pair i has the frequency θ^(-2i/D): 1 for the first pair, which resolves neighbouring positions, and
    little more than 1/θ for the last, which varies slowly over the whole context. For contexts longer than
    those in training, "linear" divides every frequency by ``factor``. "llama3" divides those whose wavelength
    exceeds the trained context / ``low_freq_factor``, keeps those whose wavelength is below the trained
    context / ``high_freq_factor``, and interpolates in between. ``factor`` and the other parameters are in
    ``config.rope_parameters``; ``checked_rope``, which the config calls, raises ``Error`` for another type.
    """
    rope, D = config.rope_parameters if parameters is None else parameters, config.head_dim
    frequencies = rope["rope_theta"] ** (-np.arange(0, D, 2) / D)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        # The number of wavelengths in the trained context
        waves = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((waves - low) / (high - low), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / rope["factor"]
    return frequencies


class Rope:
    """``rotation`` with one set of ``rope_parameters``, by default the config's."""

    def __init__(self, config, parameters: Mapping | None = None):
        self.frequencies = rope_frequencies(config, parameters)

    def __call__(self, positions: np.ndarray, like) -> tuple:
        """cos and sin of the positions' angles, in the dtype and array type of ``like``."""
        return rotation(self.frequencies, positions, like)


def rotation(frequencies: np.ndarray, positions: np.ndarray, like) -> tuple:
    """cos and sin of position · frequency for ``F.rope``: (T, D/2) for positions (T,).

    For positions (B, T), which differ by row, the shape is (B, 1, T, D/2). Angles are computed in float64,
    because in float32 those near position 100,000 have errors of up to 0.005; cos and sin are then converted
    to the dtype and array type of ``like``. There is no table of all positions: for the 131,072 of Llama 3.1
    it would take 67 MB and longer to compute.
    """
    positions = positions if positions.ndim == 1 else positions[:, None]
    angles = positions[..., None] * frequencies
    return tuple(np.asarray(f(angles).astype(like.dtype), like=like) for f in (np.cos, np.sin))


def rope_of(config: Mapping) -> dict:
    """``rope_parameters`` of a ``config.json``, in its current or older form, or both if they agree.

    Files written before transformers 5 have ``rope_theta`` and ``rope_scaling`` instead, and the oldest have
    ``type`` for ``rope_type``.
    """
    given = []
    for key in ("rope_scaling", "rope_parameters"):
        parameters = config.get(key) or {}
        if not isinstance(parameters, Mapping):
            raise Error(f"{key} must be an object of parameters, not {parameters!r}")
        given += parameters.items()
    if config.get("rope_theta") is not None:
        given.append(("rope_theta", config["rope_theta"]))
    rope = {}
    for name, value in given:
        name = "rope_type" if name == "type" else name
        if rope.setdefault(name, value) != value:
            raise Error(f"the config gives {name} as {rope[name]!r} and as {value!r}: keep one of them")
    return rope


def with_rope_parameters(config: Mapping) -> dict:
    """A ``config.json`` with ``rope_parameters`` in place of the older keys."""
    others = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    return others | {"rope_parameters": rope_of(config)}


def older_keys(rope: Mapping) -> dict:
    """``rope_parameters`` in the older form, without which transformers 4 would take θ = 10,000, unscaled."""
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }


def checked_rope(given: Mapping) -> dict:
    """``rope_parameters`` with defaults. Raises ``Error`` if one is missing, unknown or not positive."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, **given}
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise Error(f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    needed = {"rope_type", "rope_theta", *ROPE_TYPES[kind]}
    if rope.keys() != needed:
        raise Error(
            f"rope_parameters of rope_type {kind!r} must be {', '.join(sorted(needed))}, "
            f"not {', '.join(sorted(rope))}"
        )
    for name in ("rope_theta", *ROPE_TYPES[kind]):
        number = isinstance(rope[name], (int, float)) and not isinstance(rope[name], bool)
        if not number or not 0 < rope[name] <= sys.float_info.max:
            raise Error(f"{name} in rope_parameters must be a positive number, not {rope[name]!r}")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise Error(
            f"low_freq_factor ({rope['low_freq_factor']}) in rope_parameters must be below "
            f"high_freq_factor ({rope['high_freq_factor']})"
        )
    return rope

"""By what angles does RoPE turn queries and keys? The frequencies of every ``rope_type``.

Su et al., "RoFormer" (arXiv 2104.09864), section 3.4.2; how contexts grow: Chen et al., "Extending Context
Window of Large Language Models via Positional Interpolation" (arXiv 2306.15595), and Llama 3.1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import numpy as np

from tinyllm.errors import Error

# What a rope_type needs besides rope_theta. "default" is RoFormer's; "linear" divides every frequency;
# "llama3" only the low ones (Llama 3.1 and later).
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_frequencies(config) -> np.ndarray:
    """By how much the angle of each pair of channels grows from position to position: (D/2,) in float64.

    Pair i turns by θ^(-2i/D): the first by 1 radian per position, the last by hardly more than 1/θ, so
    that one sees neighbours and the other the whole context. To read contexts longer than it was
    trained on, "linear" divides every frequency by ``factor``. "llama3" divides those whose wave
    is longer than the trained context / ``low_freq_factor``, leaves those whose wave is
    shorter than the trained context / ``high_freq_factor``, and goes over from one to the other between.
    """
    rope, D = config.rope_parameters, config.head_dim
    frequencies = rope["rope_theta"] ** (-np.arange(0, D, 2) / D)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        waves = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in that context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((waves - low) / (high - low), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / rope["factor"]
    return frequencies


def rotation(frequencies: np.ndarray, positions: np.ndarray, like) -> tuple:
    """cos and sin of every angle, position · frequency, for ``F.rope``: (T, D/2) of positions (T,).

    Where rows differ, positions are (B, T) and the result (B, 1, T, D/2). Both are computed in float64 and
    then given the dtype of the array ``like``, and its place: in float32 the angles near position 100,000
    would be off by up to 0.005. Only the positions at hand are: a table of Llama 3.1's 131,072 would take
    longer to make, and 67 MB.
    """
    positions = positions if positions.ndim == 1 else positions[:, None]
    angles = positions[..., None] * frequencies
    return tuple(np.asarray(f(angles).astype(like.dtype), like=like) for f in (np.cos, np.sin))


def rope_of(config: Mapping) -> dict:
    """``rope_parameters`` of a ``config.json``, from either spelling, or both where they agree.

    Files from before transformers 5 have ``rope_theta`` and ``rope_scaling`` instead, the oldest of them
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


def checked_rope(given: Mapping) -> dict:
    """``rope_parameters``, complete. Raises Error if one is missing, unknown, or not a positive number."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, **given}
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise Error(f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    needed = {"rope_type", "rope_theta", *ROPE_TYPES[kind]}
    if rope.keys() != needed:
        raise Error(
            f"rope_parameters of rope_type {kind!r} are {', '.join(sorted(needed))}, "
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

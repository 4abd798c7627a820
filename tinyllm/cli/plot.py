"""``tinyllm plot``: the loss curves of runs in one picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tinyllm.tools.plot import plot_runs, summary


@dataclass(frozen=True)
class PlotConfig:
    """Draw the loss curves of one or more runs into one picture, and print their figures."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path = Path("runs.png")
    """The picture to write."""
    x: Literal["step", "tokens", "time"] = "step"
    """Steps, tokens seen, or seconds of training."""
    y: Literal["loss", "bits-per-byte"] = "loss"
    """Nats per token, or bits per byte, which compares across tokenizers."""


def run(config: PlotConfig) -> None:
    plot_runs(list(config.runs), config.out, x=config.x, y=config.y)
    print(summary(list(config.runs)))
    print(f"the curves are in {config.out}")

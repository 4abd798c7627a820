"""``tinyllm plot``: the loss curves of several runs in one picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tinyllm.cli.options import option
from tinyllm.errors import Error
from tinyllm.tools.plot import plot_runs, summary


@dataclass(frozen=True)
class PlotConfig:
    """Plot the loss curves of runs in one picture, and print a table.

    Example: tinyllm plot runs/small runs/llama --y bits-per-byte --out compared.png
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], option("DIR ...", "")]
    """Run folders, up to eight."""
    out: Annotated[Path, option("FILE")] = Path("runs.png")
    """The picture to write: a .png, .svg or .pdf file."""
    x: Literal["step", "tokens", "time"] = "step"
    """Horizontal axis: steps, tokens trained on, or training time."""
    y: Literal["loss", "bits-per-byte"] = "loss"
    """Vertical axis: nats per token (text, pair), or bits per byte, which compare between tokenizers."""


def run(config: PlotConfig) -> None:
    if not config.runs:
        raise Error("give at least one run folder, such as tinyllm plot runs/python-docs-1")
    plot_runs(list(config.runs), config.out, x=config.x, y=config.y)
    print(summary(list(config.runs)))
    print(f"plot: {config.out}")

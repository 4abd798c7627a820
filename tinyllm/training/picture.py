"""The picture of a run: its losses over its steps."""

import math
from pathlib import Path

from tinyllm.files import replacing
from tinyllm.training.metrics import best_record

PLOT = "loss.png"

# Dark enough to read on white; the first few can be told apart with colour blindness.
COLORS = ("#2f6db0", "#d1622b", "#3d8f5f", "#8a5fb0", "#b8912a", "#2b9aa8", "#b0487a", "#6b6b6b")

GREY, LIGHT = "#6b6b6b", "#e4e4e4"

Y_AXES = {"loss": "loss (nats per token)", "bits-per-byte": "bits per byte"}

FIGURE_SIZE, DPI = (8, 4.5), 150  # inches, and pixels in each


def plot_losses(
    history: list[dict], path: str | Path, vocab_size: int | None = None, bytes_per_token: float | None = None
) -> None:
    """Plot the losses of one run over its steps; without matplotlib, do nothing.

    ``history`` has the records of ``metrics.jsonl``, a dict per step. The loss of each training batch, which
    dropout increases, is a faint line; the losses of evaluations have dots, and the lowest validation loss a
    ring. With ``vocab_size`` a dotted line marks ln V, the loss of guessing; with ``bytes_per_token`` (of the
    validation text) a second axis has the loss in bits per byte.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
    axes = figure.subplots()
    train, validation = COLORS[:2]
    faint, dots = dict(alpha=0.3, linewidth=0.8), dict(marker="o", markersize=3)
    for key, label, style in (
        ("train_loss", "training batch (with dropout and noise, if any)", dict(color=train, **faint)),
        ("train_eval_loss", "training data", dict(color=train, **dots)),
        ("val_loss", "validation data", dict(color=validation, **dots)),
    ):
        points = [(record["step"], record[key]) for record in history if key in record]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    nats_per_bit = None if bytes_per_token is None else math.log(2) * bytes_per_token
    if best := best_record(history, "val_loss"):
        bits = f" ({best['val_loss'] / nats_per_bit:.3f} bits per byte)" if nats_per_bit else ""
        label = f"best: {best['val_loss']:.3f}{bits} at step {best['step']:,}"
        ring(axes, best["step"], best["val_loss"], validation, label)
    if vocab_size is not None:
        guessing = math.log(vocab_size)
        axes.axhline(guessing, color=GREY, linestyle=":", linewidth=1.2)
        where = dict(xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points")
        axes.annotate("ln V: guessing", (1, guessing), ha="right", color=GREY, fontsize="small", **where)
    if nats_per_bit:
        functions = (lambda nats: nats / nats_per_bit, lambda bits: bits * nats_per_bit)
        right = axes.secondary_yaxis("right", functions=functions)
        right.set_ylabel(Y_AXES["bits-per-byte"])
        quiet_axes(right)
    axes.set(xlabel="step", ylabel="loss" if vocab_size is None else Y_AXES["loss"])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", integer=True)
    quiet_axes(axes)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize="small")
    with replacing(Path(path)) as new:
        figure.savefig(new, dpi=DPI)


def ring(axes, x: float, y: float, color: str, label: str | None = None) -> None:
    style = dict(marker="o", markersize=9, markerfacecolor="none", markeredgewidth=1.5, linestyle="none")
    axes.plot([x], [y], color=color, zorder=5, label=label, **style)


def quiet_axes(axes) -> None:
    """A light grid and frame, so that the curves are the darkest part of the picture."""
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(LIGHT)
    axes.tick_params(color=LIGHT, labelcolor=GREY)

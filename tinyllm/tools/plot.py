"""Plots of several runs, and a table of their figures.

A loss by itself says little; these marks make it readable. An untrained model should guess: its loss is
ln V, V the size of the vocabulary. While both curves fall together the model learns what carries over to
text it has not seen; where the validation loss turns up and the training loss goes on falling, it learns
the training text by heart, and the best model lies behind. Runs with different tokenizers compare in bits
per byte only: a token that covers more text is harder to predict.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.training.loggers import COLORS, DPI, FIGURE_SIZE, GREY, Y_AXES, best_record, quiet_axes, ring
from tinyllm.training.metrics import RecordedRun, read_run, same_tokenizer

PICTURES = (".png", ".svg", ".pdf")

X_AXES = ("step", "tokens", "time")

OPTIONS_SHOWN = 5  # of a run in the legend; the summary has all


def _read_runs(folders: Sequence[str | Path]) -> list[RecordedRun]:
    """The runs, each under a name of its own: the folder's, or the whole path where two would be alike."""
    if isinstance(folders, str | Path) or not folders:
        raise Error(f"runs are {folders!r}: give a list of at least one run folder")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    alike = [names.count(name) > 1 for name in names]
    return [replace(run, name=str(f)) if same else run for run, f, same in zip(runs, folders, alike)]


def _differences(runs: list[RecordedRun]) -> list[list[str]]:
    """For each run the options in which the runs differ, such as ``dropout=0.2``."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    differ = [name for name in names if len({json.dumps(run.options.get(name)) for run in runs}) > 1]
    if "text" in differ:  # then their hashes say nothing more
        differ = [name for name in differ if name != "text_sha256"]
    return [[_option(name, run.options.get(name)) for name in differ] for run in runs]


def _option(name: str, value) -> str:
    if value is None:
        return f"{name} not given"
    return f"{name}={' '.join(str(value).split())}"


def plot_runs(runs: Sequence[str | Path], path: str | Path, x: str = "step", y: str = "loss") -> None:
    """Overlay the curves of several run folders in one picture (.png, .svg or .pdf).

    Validation text solid, its best ringed, training text dashed, both as evaluated (without dropout), in
    the run's colour. The legend names what differs between the runs' options. ``x`` is "step", "tokens"
    or "time" (of training, without the evaluations), ``y`` "loss" (nats per token) or "bits-per-byte";
    for the training text the latter takes the validation text's bytes per token.

    Raises ``Error`` for what ``read_run`` refuses, for losses of different tokenizers, for more runs than
    there are colours to tell apart, without matplotlib, and if the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Error("a plot of runs needs matplotlib: pip install 'tinyllm-numpy[plot]'") from None
    path = Path(path)
    _check_request(path, x, y)
    runs = _read_runs(runs)
    if len(runs) > len(COLORS):
        raise Error(f"{len(runs)} runs are too many for one plot: give at most {len(COLORS)}")
    if y == "loss" and not same_tokenizer(runs):
        raise Error(
            "the runs' tokenizers differ, so that their losses per token do not compare: "
            "plot y = bits-per-byte instead"
        )
    unit, x_label = 1, x
    if x == "time":
        unit, x_label = _time_unit(max(run.along("time")[-1] for run in runs))
    legend = [_legend_line(run, options) for run, options in zip(runs, _differences(runs))]
    lines = sum(label.count("\n") + 1 for label in legend)
    figure = Figure(figsize=(FIGURE_SIZE[0], FIGURE_SIZE[1] + 0.19 * lines), layout="constrained")
    axes = figure.subplots()
    for run, label, color in zip(runs, legend, COLORS):
        at, losses = run.curve("train_eval_loss", x, y)
        axes.plot([v / unit for v in at], losses, color=color, linestyle="--", linewidth=1, alpha=0.7)
        at, losses = run.curve("val_loss", x, y)
        axes.plot([v / unit for v in at], losses, color=color, marker="o", markersize=3, label=label)
        best = losses.index(min(losses))
        ring(axes, at[best] / unit, losses[best], color)
    axes.set(xlabel=x_label, ylabel=Y_AXES[y])
    _x_ticks(axes, x)
    quiet_axes(axes)
    axes.set_title(
        "— validation text (○ best)   - - training text", loc="right", fontsize="small", color=GREY
    )
    box = figure.legend(loc="outside lower left", frameon=False, fontsize="small")
    for text in box.get_texts():
        text.set_parse_math(False)  # a $ in a prompt is no formula
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise Error(f"{path} cannot be written ({error.strerror or error}): choose another path") from None


def _check_request(path: Path, x: str, y: str) -> None:
    for name, value, known in (("x", x, X_AXES), ("y", y, Y_AXES)):
        if value not in known:
            raise Error(f"{name} is {value!r}: choose {' or '.join(known)}")
    if path.suffix.lower() not in PICTURES:
        raise Error(f"{path} does not end in {', '.join(PICTURES)}: a plot is written as one of these")


def _time_unit(longest: float) -> tuple[int, str]:
    """Seconds per unit, and its axis label."""
    unit, name = (1, "s") if longest < 180 else (60, "min") if longest < 3 * 3600 else (3600, "h")
    return unit, f"training time ({name}, without evaluations)"


def _x_ticks(axes, x: str) -> None:
    from matplotlib.ticker import EngFormatter

    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1M
    elif x == "step":
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", integer=True)


def _legend_line(run: RecordedRun, options: list[str]) -> str:
    said = options[:OPTIONS_SHOWN]
    if len(options) > OPTIONS_SHOWN:
        said.append(f"and {len(options) - OPTIONS_SHOWN} options more")
    line = f"{run.name}: {', '.join(said)}" if said else run.name
    # matplotlib leaves names that begin with an underscore out of legends.
    return textwrap.fill(line, width=100, subsequent_indent="   ", initial_indent=" " * line.startswith("_"))


def summary(runs: Sequence[str | Path]) -> str:
    """A table of run folders: how long, the losses of the last evaluation, the best, and what differs.

    ``train`` and ``val`` are nats per token, both as evaluated (without dropout); ``time`` is training
    time without the evaluations. Raises ``Error`` for what ``read_run`` refuses.
    """
    runs = _read_runs(runs)
    header = ("run", "step", "tokens", "time", "train", "val", "best val", "at step", "bits/byte", "best")
    rows = [header] + [_row(run) for run in runs]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for name, *figures in rows:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    for run, options in zip(runs, _differences(runs)):
        if options:
            lines.append(f"{run.name}: {', '.join(options)}")
        lines += [f"{run.name}: {note}" for note in run.notes]
    if not same_tokenizer(runs):
        lines.append("the tokenizers differ: compare bits per byte, not losses per token")
    return "\n".join(lines)


def _row(run: RecordedRun) -> tuple[str, ...]:
    end = run.records[-1]
    last = [record for record in run.records if "val_loss" in record][-1]
    best = best_record(run.records, "val_loss")
    losses = (last.get("train_eval_loss"), last["val_loss"], best["val_loss"])
    bits = (last.get("val_bits_per_byte"), best.get("val_bits_per_byte"))
    minutes, seconds = divmod(round(run.along("time")[-1]), 60)
    return (
        run.name,
        f"{end['step']:,}",
        f"{end['tokens']:,}",
        f"{minutes}:{seconds:02}",
        *("–" if loss is None else f"{loss:.4f}" for loss in losses),
        f"{best['step']:,}",
        *("–" if value is None else f"{value:.3f}" for value in bits),
    )

"""Plots of several runs, a table of their losses, and the style of all plots.

How to read a loss: an untrained model guesses uniformly, so its loss is ln V for a vocabulary of V tokens.
While the training and the validation loss fall together, the model generalises. Where the validation loss
rises while the training loss keeps falling, it overfits, and the best checkpoint is an earlier one. Runs
with different tokenizers compare in bits per byte only, since a longer token is harder to predict.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tinyllm.checks import pip_install
from tinyllm.errors import Error
from tinyllm.files import replacing
from tinyllm.training.config import flag
from tinyllm.training.metrics import RecordedRun, best_record, read_run, same_tokenizer
from tinyllm.training.output import LINE
from tinyllm.training.picture import COLORS, DPI, FIGURE_SIZE, GREY, LIGHT, Y_AXES, quiet_axes, ring

__all__ = [
    "COLORS",
    "GREY",
    "LIGHT",
    "check_picture",
    "new_figure",
    "plot_runs",
    "save",
    "show",
    "summary",
    "title",
]

PICTURES = (".png", ".svg", ".pdf")

X_AXES = ("step", "tokens", "time")

OPTIONS_SHOWN = 5  # in the legend; the table lists all


def _read_runs(folders: Sequence[str | Path]) -> list[RecordedRun]:
    """The runs with distinct names: the folder's name, or its whole path where two names are equal."""
    if isinstance(folders, str | Path) or not folders:
        raise Error(f"runs is {folders!r}: give a list of at least one run folder")
    places = [os.path.realpath(Path(folder).expanduser()) for folder in folders]
    if repeated := [str(f) for f, place in zip(folders, places) if places.count(place) > 1]:
        raise Error(f"the run {repeated[-1]} is given more than once: give each run once")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    shared = [names.count(name) > 1 for name in names]
    return [replace(run, name=str(f)) if same else run for run, f, same in zip(runs, folders, shared)]


def _differences(runs: list[RecordedRun]) -> list[list[str]]:
    """For each run, the options in which the runs differ, such as ``dropout=0.2``."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    differ = [name for name in names if len({json.dumps(run.options.get(name)) for run in runs}) > 1]
    if "text" in differ:  # the hashes add nothing
        differ = [name for name in differ if name != "text_sha256"]
    return [[_option(name, run.options.get(name)) for name in differ] for run in runs]


def _option(name: str, value) -> str:
    name = flag(name) if name == "start_from" else name
    if value is None:
        return f"{name} not given"
    return f"{name}={' '.join(str(value).split())}"


def plot_runs(runs: Sequence[str | Path], path: str | Path, x: str = "step", y: str = "loss") -> None:
    """Plot the loss curves of several run folders in one picture (.png, .svg or .pdf).

    The validation loss is solid, with a ring around its minimum, and the training loss dashed. Both were
    evaluated without dropout. The legend names the options in which the runs differ. ``x`` is "step",
    "tokens" or "time" (training time without evaluations), ``y`` "loss" (nats per token, text or pair) or
    "bits-per-byte"; the training loss is converted with the validation text's bytes per token.

    Raises ``Error`` as ``read_run`` does, for losses that do not compare, for more runs than there are
    distinct colours, without matplotlib, and if the picture cannot be written.
    """
    for name, value, known in (("x", x, X_AXES), ("y", y, Y_AXES)):
        if value not in known:
            raise Error(f"{name} is {value!r}: choose {' or '.join(known)}")
    path, runs = check_picture(path), _read_runs(runs)
    if len(runs) > len(COLORS):
        raise Error(f"there are {len(runs)} runs, too many for one plot: give at most {len(COLORS)}")
    if y == "loss" and not same_tokenizer(runs):
        raise Error(
            "the runs' tokenizers differ, so their losses per token do not compare: "
            "plot bits per byte (--y bits-per-byte)"
        )
    units = dict.fromkeys(run.unit for run in runs)
    if len(units) > 1:
        found = " and ".join(f"per {each}" for each in units)
        raise Error(f"the runs' losses are {found}, which do not compare: give runs of one task")
    unit, x_label = 1, x
    if x == "time":
        unit, x_label = _time_unit(max(run.along("time")[-1] for run in runs))
    legend = [_legend_line(run, options) for run, options in zip(runs, _differences(runs))]
    lines = sum(label.count("\n") + 1 for label in legend)
    figure, [[axes]] = new_figure(FIGURE_SIZE[0], FIGURE_SIZE[1] + 0.19 * lines)
    for run, label, color in zip(runs, legend, COLORS):
        at, losses = run.curve("train_eval_loss", x, y)
        axes.plot([v / unit for v in at], losses, color=color, linestyle="--", linewidth=1, alpha=0.7)
        at, losses = run.curve("val_loss", x, y)
        axes.plot([v / unit for v in at], losses, color=color, marker="o", markersize=3, label=label)
        best = losses.index(min(losses))
        ring(axes, at[best] / unit, losses[best], color)
    axes.set(xlabel=x_label, ylabel=Y_AXES[y].replace("token", runs[0].unit))
    _x_ticks(axes, x)
    title(axes, "— validation data (○ best)   - - training data")
    box = figure.legend(loc="outside lower left", frameon=False, fontsize="small")
    for text in box.get_texts():
        text.set_parse_math(False)  # a $ in a prompt does not start a formula
    save(figure, path)


def _figure_class() -> type:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Error(f"plots need matplotlib: {pip_install('plot')}") from None
    return Figure


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure of this size in inches and its axes (rows, columns), in the style of all our plots."""
    figure = _figure_class()(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        quiet_axes(axes)
    return figure, panels


def title(axes, text: str) -> None:
    """A title in small grey letters: the curves are what is dark in the picture."""
    axes.set_title(text, loc="right", fontsize="small", color=GREY)


def save(figure, path: Path) -> None:
    """Write the figure; raises Error if that fails."""
    try:
        with replacing(path) as new:
            figure.savefig(new, dpi=DPI)
    except OSError as error:
        raise Error(f"{path} cannot be written ({error.strerror or error}): choose another path") from None


def show(path: str | Path, figure=None) -> None:
    """Print where a picture is; a notebook shows it as well. With a figure, it is saved there first.

    The folder of the picture is made if it is missing. Raises ``Error`` as ``save`` does.
    """
    path = Path(path)
    if figure is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path)
    print(f"picture: {path.as_posix()}")
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(filename=str(path)))


def check_picture(path: str | Path) -> Path:
    """The path of a picture. Raises ``Error`` unless it ends like one, and matplotlib is installed."""
    path = Path(path)
    if path.suffix.lower() not in PICTURES:
        raise Error(f"the plot {path} must end in {', '.join(PICTURES)}: rename it")
    _figure_class()
    return path


def _time_unit(longest: float) -> tuple[int, str]:
    """Seconds per unit of the time axis, and its label."""
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
    shown = options[:OPTIONS_SHOWN]
    if len(options) > OPTIONS_SHOWN:
        shown.append(f"and {len(options) - OPTIONS_SHOWN} more options")
    line = f"{run.name}: {', '.join(shown)}" if shown else run.name
    # matplotlib omits labels that begin with an underscore from legends.
    return textwrap.fill(line, width=100, subsequent_indent="   ", initial_indent=" " * line.startswith("_"))


def summary(runs: Sequence[str | Path]) -> str:
    """A table of run folders: length, last and best losses, and the options that differ.

    ``train`` and ``val`` are losses in nats per token, text or pair, evaluated without dropout; ``time`` is
    training time without evaluations. Raises ``Error`` as ``read_run`` does.
    """
    runs = _read_runs(runs)
    header = ("run", "step", "tokens", "time", "train", "val", "best val", "at", "bits/byte", "best")
    rows = [header] + [_row(run) for run in runs]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    gap, lines = "  " if sum(widths) + 2 * len(widths[1:]) <= LINE else " ", []
    for name, *numbers in rows:
        cells = gap.join(number.rjust(width) for number, width in zip(numbers, widths[1:]))
        if widths[0] + len(gap + cells) <= LINE:
            lines.append(f"{name.ljust(widths[0])}{gap}{cells}")
        else:  # names too long for a column
            lines += [name, f"    {cells}"]
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

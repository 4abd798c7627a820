"""Pictures of an inspection: attention maps, the logit lens, surprise, and norms of the residual stream.

Colours are on a square-root scale where many weights are small: ¼ looks half as strong as 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tools.inspect import Inspection
from tinyllm.tools.inspect_text import bits, summary, token_label, visible, whole_characters
from tinyllm.tools.plot import COLORS, GREY, LIGHT, check_picture, new_figure, save, title
from tinyllm.training.output import columns_of

BLUES = ("#ffffff", "#c9dcf0", "#7ba9d6", COLORS[0], "#12365f")  # weights and probabilities from 0 to 1
REDS = ("#ffffff", "#fdf0c2", "#f9c98a", "#ee8a62", "#c93b3b")  # bits from 0 to 16

# Fonts that have Chinese, Japanese and Korean characters, if they are installed; matplotlib's own has not.
FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Arial Unicode MS",
)

NAMED = 128  # tokens of a map whose axes have their names; of a longer text, their positions

THUMBNAIL = 120  # pixels of a map in a grid

LENS_COLUMNS, LENS_TOKENS = 20, 120  # positions in a row of panels, and in a picture

LINE, WIDEST = 92, 20  # columns of text; characters of a label


def plot_attention(
    found: Inspection,
    tokenizer: Tokenizer,
    path: str | Path,
    layer: int | None = None,
    head: int | None = None,
) -> None:
    """Draw attention maps: of one head, of all heads of a layer, or a grid of all layers and heads.

    Row t of a map is where token t looks: the weights of the tokens up to t, which sum to 1. Raises ``Error``
    as ``Inspection.attention`` does, for a head without its layer, without matplotlib, and if the picture
    cannot be written.
    """
    path = check_picture(path)
    if layer is None and head is not None:
        raise Error(f"head is {head}, but without a layer: choose the layer, too")
    if layer is not None and head is not None:
        return _one_map(found, tokenizer, path, layer, head)
    layers = range(len(found.blocks)) if layer is None else [layer]
    found.block_name(layers[0])
    return _grid(found, path, list(layers))


def _one_map(found: Inspection, tokenizer: Tokenizer, path: Path, layer: int, head: int) -> None:
    weights = found.attention(layer, head)
    T = len(weights)
    cell = max(min(7 / T, 0.42), 0.115) if T <= NAMED else 10 / T
    labels = _labels(tokenizer, found.ids) if T <= NAMED else []
    margin = 0.085 * max([5, *map(columns_of, labels)])
    side = max(cell * T, 2.4)
    figure, [[axes]] = new_figure(side + margin + 0.9, side + margin + 0.5)
    axes.grid(False)
    shown = np.where(np.tri(T, dtype=bool), weights, np.nan)
    image = axes.imshow(shown, cmap=_colours(BLUES), norm=_square_root(), interpolation="nearest")
    axes.spines[:].set_visible(False)
    if labels:
        size = min(9, 72 * cell * 0.78)
        axes.set_xticks(range(T), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(T), labels, fontsize=size)
        axes.tick_params(length=0, pad=2, labelcolor="black")
        for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            _literal(text)
    axes.set_ylabel("query: the token that looks", color=GREY, fontsize="small")
    axes.set_xlabel("key: the token it looks at", color=GREY, fontsize="small")
    for t in range(T if T <= NAMED else 0):  # the edge between the past and what is masked
        axes.plot([t - 0.5, t + 0.5, t + 0.5], [t - 0.5, t - 0.5, t + 0.5], color=LIGHT, linewidth=0.8)
    bar = axes.inset_axes([0.62, 0.93, 0.34, 0.022])
    figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[0, 0.05, 0.25, 0.5, 1])
    bar.set_xticks([0, 0.05, 0.25, 0.5, 1], ["0", ".05", "¼", "½", "1"], fontsize=7)
    bar.tick_params(color=LIGHT, labelcolor=GREY, length=2)
    bar.spines[:].set_color(LIGHT)
    title(axes, f"attention of {found.blocks[layer]}, head {head}")
    save(figure, path)


def _grid(found: Inspection, path: Path, layers: list[int]) -> None:
    """Thumbnails in one image: a row for each layer, or the heads of one layer in a square."""
    heads = found.heads
    one = len(layers) == 1
    columns = math.ceil(math.sqrt(max(heads[layers[0]], 1))) if one else max(heads)
    places = {}  # (layer, head) -> (row, column)
    for row, layer in enumerate(layers):
        for h in range(heads[layer]):
            places[layer, h] = divmod(h, columns) if one else (row, h)
    if not places:
        found.attention(layers[0])  # raises the error that says why
    rows = max(row for row, _ in places.values()) + 1
    pixels = THUMBNAIL * (3 if one else 1)
    gap = pixels // 10
    canvas = np.full((rows * (pixels + gap), columns * (pixels + gap)), np.nan, np.float32)
    for layer in layers:
        maps = found.attention(layer) if heads[layer] else ()
        for h, weights in enumerate(maps):
            y, x = ((pixels + gap) * n for n in places[layer, h])
            canvas[y : y + pixels, x : x + pixels] = thumbnail(weights, pixels)
    cell = (2.4 if one else max(min(14 / columns, 0.9), 0.4)) * (1 + gap / pixels)
    figure, [[axes]] = new_figure(columns * cell + 1.1, rows * cell + 0.9)
    axes.grid(False)
    axes.imshow(
        canvas, cmap=_colours(BLUES), norm=_square_root(), interpolation="antialiased", aspect="equal"
    )
    axes.spines[:].set_visible(False)
    step, middle = pixels + gap, pixels / 2
    axes.tick_params(length=0, labelcolor=GREY, labelsize=8)
    if one:
        axes.set_xticks([])
        axes.set_yticks([])
        for (_, h), (row, column) in places.items():
            at = column * step + pixels, row * step + pixels * 0.02
            axes.annotate(f"head {h}", at, ha="right", va="top", color=GREY, fontsize=8)
        title(axes, f"attention of {found.blocks[layers[0]]}: row t is where token t looks")
    else:
        axes.xaxis.tick_top()
        axes.set_xticks([h * step + middle for h in range(columns)], range(columns))
        axes.set_yticks([n * step + middle for n in range(rows)], layers)
        axes.set_xlabel("head", color=GREY, fontsize="small")
        axes.xaxis.set_label_position("top")
        axes.set_ylabel("layer", color=GREY, fontsize="small")
        unseen = [layer for layer in layers if not heads[layer]]
        note = f"; the attention of {', '.join(map(str, unseen))} cannot be seen" if unseen else ""
        axes.annotate(
            f"{len(found.ids):,} tokens{note}", (1, 0), xycoords="axes fraction", xytext=(0, -6),
            textcoords="offset points", ha="right", va="top", color=GREY, fontsize=8,
        )  # fmt: skip
    save(figure, path)


def thumbnail(weights: np.ndarray, pixels: int) -> np.ndarray:
    """A map (T, T) as (pixels, pixels): of several weights in a pixel, the largest; nan for later keys."""
    masked = np.where(np.tri(len(weights), dtype=bool), weights, -1.0)
    at = np.arange(pixels) * len(weights) // pixels
    if len(weights) > pixels:
        small = np.maximum.reduceat(np.maximum.reduceat(masked, at, axis=0), at, axis=1)
    else:
        small = masked[at][:, at]
    return np.where(small < 0, np.nan, small)


# ---------------------------------------------------------------------------------- the lens


def plot_lens(found: Inspection, tokenizer: Tokenizer, path: str | Path) -> None:
    """Draw the logit lens: the most likely next token after every layer, the darker the more probable.

    A column is a position, with its token below and the one that came next above; a frame marks where that
    one is the prediction. Of a long text the last 120 positions are drawn. Raises ``Error`` if the lens was
    not computed, without matplotlib, and if the picture cannot be written.
    """
    path = check_picture(path)
    if not len(found.positions):
        raise Error("the lens has no positions: inspect the text with positions=None")
    names = ["embedding", *(name.rpartition(".")[2] for name in found.blocks)]
    shown = list(range(len(found.positions)))[-LENS_TOKENS:]
    columns = max(min(len(shown), LENS_COLUMNS), 6)
    panels = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    height = len(names) * 0.215 + 1.1
    figure, grid = new_figure(columns * 0.86 + 1.2, height * len(panels) + 0.3, rows=len(panels))
    for places, [axes] in zip(panels, grid):
        _lens_panel(axes, found, tokenizer, names, places, columns)
    cut = f" at the last {len(shown)} positions" if len(shown) < len(found.positions) else ""
    came = "" if found.probability is None else "; above what came, framed where predicted"
    heading = f"what each layer would predict{cut}{came}"
    figure.suptitle(heading, x=1, ha="right", fontsize="small", color=GREY)
    save(figure, path)


def _lens_panel(axes, found: Inspection, tokenizer: Tokenizer, names: list[str], places: list[int], columns):
    ids, probabilities = (array[:, places, 0] for array in found.lens)
    layers, count = ids.shape
    at = found.positions[places]
    predicts = found.probability is not None  # ids, not classes
    following = [int(found.ids[t + 1]) if predicts and t + 1 < len(found.ids) else None for t in at]
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.imshow(probabilities, cmap=_colours(BLUES[:4]), vmin=0, vmax=1, aspect="auto", origin="lower")
    for n in range(count):
        labels = _labels(tokenizer, ids[:, n], 10) if predicts else [f"class {i}" for i in ids[:, n]]
        for layer, label in enumerate(labels):
            dark = probabilities[layer, n] > 0.95
            style = dict(ha="center", va="center", fontsize=7, color="white" if dark else "black")
            _literal(axes.text(n, layer, label, in_layout=False, **style))
            if ids[layer, n] == following[n]:
                left, right, low, high = n - 0.47, n + 0.47, layer - 0.42, layer + 0.42
                frame = [left, right, right, left, left], [low, low, high, high, low]
                axes.plot(*frame, color=COLORS[1], linewidth=1.1)
        if following[n] is not None:
            (label,) = _labels(tokenizer, [following[n]], 10)
            style = dict(fontsize=7.5, rotation=30, rotation_mode="anchor", color=COLORS[1])
            _literal(axes.text(n - 0.1, layers - 0.4, label, **style))
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(-0.5, layers - 0.5))
    style = dict(fontsize=7.5, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xticks(range(count), _labels(tokenizer, found.ids[at], 10), **style)
    every = 1 if layers <= 16 else 2
    axes.set_yticks(range(0, layers, every), names[::every], fontsize=7)
    axes.tick_params(length=0, pad=3, labelcolor="black")
    axes.set_ylabel("after layer", color=GREY, fontsize="small")
    for text in axes.get_xticklabels():
        _literal(text)


# -------------------------------------------------------------------------------- the surprise


def plot_surprise(found: Inspection, tokenizer: Tokenizer, path: str | Path) -> None:
    """Draw the text with every token on a colour for its surprise, and its probability and rank below.

    Tokens that share the bytes of a character are one, whose bits are added and whose rank is omitted. Raises
    ``Error`` without probabilities, without matplotlib, and if the picture cannot be written.
    """
    path = check_picture(path)
    if found.probability is None:
        raise Error("the surprise of the tokens is unknown: inspect a language model with surprise=True")
    each, colours = bits(found.probability), _colours(REDS)
    boxes, column, line = [], 0, 0  # (line, first column, columns, text, positions)
    for positions, text in whole_characters(tokenizer, found.ids):
        label = drawable(visible(text))
        columns = max(columns_of(label), 1)
        if column and column + columns > LINE:
            column, line = 0, line + 1
        boxes.append((line, column, columns, label, positions))
        column += columns
        if text.endswith("\n"):
            column, line = 0, line + 1
    widest = max([LINE, *(first + columns for _, first, columns, _, _ in boxes)])
    lines = boxes[-1][0] + 1
    figure, [[axes]] = new_figure(widest * 0.098 + 0.4, lines * 0.36 + 0.75)
    axes.axis("off")
    axes.set(xlim=(0, widest), ylim=(lines + 0.02, -0.1))
    for line, first, columns, label, positions in boxes:
        amount = float(each[list(positions)].sum())
        shade = "none" if math.isnan(amount) else colours(min(amount / 16, 1.0))
        axes.barh(line + 0.34, columns - 0.12, 0.56, first + 0.06, color=shade, linewidth=0)
        style = dict(ha="center", va="center_baseline", fontfamily=fonts(), fontsize=9)
        _literal(axes.text(first + columns / 2, line + 0.36, label, in_layout=False, **style))
        note = _note(found, positions)
        if note and 0.55 * len(note) <= columns:
            style = dict(ha="center", va="center", fontsize=5.2, color=GREY)
            axes.text(first + columns / 2, line + 0.78, note, in_layout=False, **style)
    title(axes, f"surprise (-log₂ p; below: p, or the rank after #). {summary(found)}")
    save(figure, path)


def _note(found: Inspection, positions: Sequence[int]) -> str:
    """The probability of a token, if it is small its rank; nothing for the first one."""
    p, rank = math.prod(found.probability[list(positions)]), found.rank[positions[0]]
    if math.isnan(p):
        return ""
    if p < 0.01:
        return f"#{rank:,}" if len(positions) == 1 else "<1%"
    return f"{p:.0%}"


# ----------------------------------------------------------------------------------- the norms


def plot_norms(found: Inspection, tokenizer: Tokenizer, path: str | Path) -> None:
    """Draw the norm of the residual stream by layer: of every position, their median, and the largest.

    Raises ``Error`` without matplotlib, and if the picture cannot be written.
    """
    path = check_picture(path)
    figure, [[axes]] = new_figure(8, 4.5)
    layers = np.arange(len(found.norms)) - 1
    largest = int(found.norms.max(axis=0).argmax())
    faint = dict(color=COLORS[0], alpha=max(0.05, 1 / math.sqrt(len(found.ids) + 3)), linewidth=0.8)
    axes.plot(layers, found.norms, **faint)
    median = np.median(found.norms, axis=1)
    axes.plot(layers, median, color=COLORS[0], linewidth=2, label="median of the positions")
    (token,) = _labels(tokenizer, found.ids[largest : largest + 1])
    label = f"position {largest}: {token}"
    axes.plot(layers, found.norms[:, largest], color=COLORS[1], linewidth=1.6, label=label)
    axes.set_yscale("log")
    axes.set(xlabel="after layer", ylabel="norm of the residual stream")
    step = max(1, len(found.blocks) // 8)
    ticks = range(0 if step == 1 else step, len(found.blocks), step)
    axes.set_xticks([-1, *ticks], ["emb.", *ticks])
    for text in axes.legend(frameon=False, fontsize="small").get_texts():
        _literal(text)
    title(axes, f"{found.norms.shape[1]:,} positions")
    save(figure, path)


# ------------------------------------------------------------------------------------- helpers


def _colours(stops: Sequence[str]):
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("tinyllm", stops)


def _square_root():
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=1)


def _labels(tokenizer: Tokenizer, ids: Sequence[int], most: int = WIDEST) -> list[str]:
    return [_fit(drawable(token_label(tokenizer, int(i))), most) for i in ids]


def _fit(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


@functools.cache
def fonts() -> list[str]:
    """Matplotlib's own font, and those of ``FONTS`` that are installed."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans Mono", *(name for name in FONTS if name in installed)]


@functools.cache
def _known(character: str) -> bool:
    from matplotlib import font_manager

    files = [font_manager.findfont(font_manager.FontProperties(family=[name])) for name in fonts()]
    return any(font_manager.get_font(file).get_char_index(ord(character)) for file in files)


def drawable(label: str) -> str:
    """The label with every character that no font has escaped as in Python."""
    known = (c if _known(c) else c.encode("ascii", "backslashreplace").decode() for c in label)
    return "".join(known)


def _literal(text) -> None:
    """Draw a text as it is, in fonts that have its characters: a $ does not start a formula."""
    text.set_parse_math(False)
    if text.get_fontfamily() != fonts():
        text.set_fontfamily(["DejaVu Sans", *fonts()])

"""``tinyllm inspect``: what a model does while it reads a text, as a table, pictures and a page."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tinyllm.backend.dtypes import autocast
from tinyllm.cli.generate import check_chat, encode_prompt
from tinyllm.cli.options import DeviceOptions, Flag, SpecialOptions, TextModelOptions, move, option
from tinyllm.errors import Error
from tinyllm.files import check_is_writable, read_text
from tinyllm.nn import Module
from tinyllm.tools.console import wants_colour
from tinyllm.tools.inspect import Inspection, inspect
from tinyllm.tools.inspect_page import check_size, write_page
from tinyllm.tools.inspect_plot import plot_attention, plot_lens, plot_norms, plot_surprise
from tinyllm.tools.inspect_text import show_surprise
from tinyllm.tools.plot import check_picture

PAGES = (".html", ".htm")
PICTURES = {"attention": plot_attention, "lens": plot_lens, "surprise": plot_surprise, "norms": plot_norms}


@dataclass(frozen=True, kw_only=True)
class _Text:
    prompt: Annotated[str | None, option("TEXT", "")] = None
    """The text to read, such as "Once upon a time"."""
    file: Annotated[Path | None, option("PATH", "")] = None
    """Instead of --prompt: a UTF-8 text file. Without either the text is read from a pipe."""
    chat: Flag = False
    """Treat the text as a message to a chat model, in the format the model was trained on."""


@dataclass(frozen=True, kw_only=True)
class _Views:
    html: Annotated[Path | None, option("FILE", "")] = None
    """Write a page to move around in: attention of every head, the logit lens, surprise, norms."""
    attention: Annotated[Path | None, option("FILE", "")] = None
    """Draw attention maps (.png, .svg or .pdf): all layers and heads, or those of --layer and --head."""
    lens: Annotated[Path | None, option("FILE", "")] = None
    """Draw the logit lens: what each layer would predict."""
    surprise: Annotated[Path | None, option("FILE", "")] = None
    """Draw the text with the probability of every token as its colour."""
    norms: Annotated[Path | None, option("FILE", "")] = None
    """Draw the norm of the residual stream by layer."""
    layer: Annotated[int | None, option("N", "all")] = None
    """Of --attention and --html: the layer, counted from 0."""
    head: Annotated[int | None, option("N", "all")] = None
    """Of --attention: the head, counted from 0."""
    top: Annotated[int, option("N")] = 10
    """Of --html: tokens that the lens has for each layer."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig(DeviceOptions, SpecialOptions, TextModelOptions, _Views, _Text):
    """Look inside a model: where each head looks, what each layer predicts, what surprises it.

    Prints the probability and rank of every token, and writes the views that are asked for.

    Example: tinyllm inspect --model smollm2 --prompt "Mary gave a drink to John" --html look.html
    """

    smaller: ClassVar = ["a shorter text"]


def run(config: InspectConfig) -> None:
    pictures = {name: getattr(config, name) for name in PICTURES if getattr(config, name) is not None}
    _check(config, list(pictures.values()))
    check_chat(config)
    config.find()
    text, source = _text(config)
    device = config.open_device()
    model, tokenizer = config.load(config.weights_dtype)
    ids = encode_prompt(config, tokenizer, text, source)
    found = _inspect(config, model, ids, device, tokenizer.unused_ids(model.config.vocab_size))
    if found.probability is not None:
        print(show_surprise(tokenizer, found, wants_colour(sys.stdout)))
    for name, path in pictures.items():
        options = {"layer": config.layer, "head": config.head} if name == "attention" else {}
        PICTURES[name](found, tokenizer, path, **options)
        print(f"{name}: {path}")
    if config.html is not None:
        write_page(found, tokenizer, config.html, config.typed.partition(" ")[2], config.layer)
        print(f"page: {config.html}")


def _check(config: InspectConfig, pictures: list[Path]) -> None:
    """Raise Error for options that do not fit together, before a model is loaded."""
    config.check_least(layer=0, head=0, top=1)
    if config.head is not None and (config.layer is None or config.attention is None):
        raise Error("--head chooses one map of --attention: give --attention FILE and --layer, too")
    if config.layer is not None and config.attention is None and config.html is None:
        raise Error("--layer chooses the maps of --attention or --html: give one of them, too")
    if config.top != InspectConfig.top and config.html is None:
        raise Error("--top chooses what --html shows: give --html FILE, too")
    for path in pictures:
        check_picture(path)
    views = [*pictures] if config.html is None else [*pictures, config.html]
    for path in views:
        check_is_writable(path)
    if config.html is not None and config.html.is_file() and config.html.suffix.lower() not in PAGES:
        raise Error(f"--html {config.html} exists and is not a page: choose a name that ends in .html")
    paths = [os.path.realpath(path) for path in views]
    if repeated := [path for path in paths if paths.count(path) > 1]:
        raise Error(f"{repeated[0]} is to be written twice: choose different files")


def _text(config: InspectConfig) -> tuple[str, str]:
    """The text of --prompt, of --file or of a pipe, and which of these it is."""
    if config.prompt is not None and config.file is not None:
        raise Error("choose what to read with either --prompt TEXT or --file PATH")
    if config.prompt is not None:
        text, source = config.prompt, "--prompt"
    elif config.file is not None:
        text, source = read_text(config.file), f"--file {config.file}"
    elif sys.stdin.isatty():
        raise Error("choose what to read with --prompt TEXT or --file PATH, or pipe a text to the command")
    else:
        text, source = _from_pipe(), "standard input"
    if not text:
        raise Error(f"{source} is empty: give at least one character")
    return text, source


def _from_pipe() -> str:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise Error(f"standard input is not text in UTF-8 ({error}): convert it") from None


def _inspect(config: InspectConfig, model: Module, ids: list[int], device: str, unused) -> Inspection:
    """Look inside, with the lens if a view needs it."""
    move(model, device)
    with autocast(config.dtype):
        if config.html is not None or config.layer is not None:
            # Without the lens, which takes most of the time: what is asked for may not exist.
            first = inspect(model, ids, positions=(), surprise=False)
            if config.layer is not None:
                first.attention(config.layer, config.head or 0)
            if config.html is not None:
                check_size(len(ids), sum(first.heads) if config.layer is None else first.heads[config.layer])
        positions = None if config.html is not None or config.lens is not None else ()
        return inspect(model, ids, config.top, positions, suppress_ids=unused)

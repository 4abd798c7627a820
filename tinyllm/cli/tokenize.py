"""``tinyllm tokenize``: the tokens of a text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tinyllm.cli.options import SpecialOptions, option
from tinyllm.data.corpus import load_text
from tinyllm.data.documents import is_jsonl
from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tools.console import wants_colour
from tinyllm.tools.show import show_tokens


@dataclass(frozen=True, kw_only=True)
class _Text:
    text: Annotated[str | None, option("TEXT", "")] = None
    """The text itself, such as "Every effort moves you"."""
    file: Annotated[Path | None, option("FILE", "")] = None
    """Instead of --text: a UTF-8 text file."""
    tokenizer: Annotated[str, option("NAME")] = "gpt2"
    """gpt2, bytes, a run's or a model's folder, or a tokenizer file."""


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig(SpecialOptions, _Text):
    """Show the tokens of a text in colours, and their ids.

    Example: tinyllm tokenize --text "Every effort moves you"
    """


def run(config: TokenizeConfig) -> None:
    if (config.text is None) == (config.file is None):
        raise Error("choose what to tokenize with either --text TEXT or --file FILE")
    if config.file is not None and (config.file.is_dir() or is_jsonl(config.file)):
        what = "is a folder" if config.file.is_dir() else "has JSON lines"
        raise Error(f"--file {config.file} {what}: give a text file, or a text with --text")
    text = load_text(config.file).text if config.text is None else config.text
    tokenizer = load_tokenizer(config.tokenizer)
    print(show_tokens(tokenizer, tokenizer.encode(text, config.special), wants_colour(sys.stdout)))

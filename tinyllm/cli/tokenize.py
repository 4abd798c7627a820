"""``tinyllm tokenize``: a text cut into its tokens."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tinyllm.data.corpus import load_text
from tinyllm.errors import Error
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tools.console import wants_colour
from tinyllm.tools.show import show_tokens


@dataclass(frozen=True)
class TokenizeConfig:
    """Show how a tokenizer cuts a text: the pieces in colours, and their ids."""

    text: str | None = None
    """The text itself."""
    file: Path | None = None
    """Instead of --text: a UTF-8 text file."""
    tokenizer: str = "gpt2"
    """gpt2, a run's folder, or a tinyllm_tokenizer.json file."""
    special: str = "refuse"
    """Special tokens such as <|endoftext|> in the text: refuse, allow (as their ids), or text."""


def run(config: TokenizeConfig) -> None:
    if (config.text is None) == (config.file is None):
        raise Error("say what to tokenize: either --text TEXT or --file FILE")
    text = load_text(config.file).text if config.text is None else config.text
    tokenizer = load_tokenizer(config.tokenizer)
    print(show_tokens(tokenizer, tokenizer.encode(text, config.special), wants_colour(sys.stdout)))

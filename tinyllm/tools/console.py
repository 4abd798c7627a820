"""The capabilities of a terminal."""

from __future__ import annotations

import os
import sys
import unicodedata
from typing import TextIO

EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")  # of a character cell; a full one is █


def wants_colour(stream: TextIO) -> bool:
    """Whether to print colours: never with ``NO_COLOR``, always with ``FORCE_COLOR``, else on a terminal.

    Empty variables are ignored (no-color.org, force-color.org). On Windows only Windows Terminal counts:
    the older console prints the escape sequences themselves.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    if sys.platform == "win32" and "WT_SESSION" not in os.environ:
        return False
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def shows_blocks(stream: TextIO) -> bool:
    """Whether the stream can encode the characters of the bars; True if it has no encoding."""
    try:
        ("█" + "".join(EIGHTHS)).encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def columns_of(text: str) -> int:
    """The width of a text in a font of fixed width, where a Chinese character, say, takes two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)

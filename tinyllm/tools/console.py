"""The capabilities of a terminal."""

from __future__ import annotations

import os
import sys
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

"""What a terminal can show."""

from __future__ import annotations

import os
import sys
from typing import TextIO

EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")  # of a cell of a bar; a whole one is █


def wants_colour(stream: TextIO) -> bool:
    """Whether to write colours: ``NO_COLOR`` says no, ``FORCE_COLOR`` yes, otherwise a terminal does.

    An empty variable says nothing (no-color.org, force-color.org). On Windows a terminal is Windows
    Terminal: the older console would print the escape sequences.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    if sys.platform == "win32" and "WT_SESSION" not in os.environ:
        return False
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def shows_blocks(stream: TextIO) -> bool:
    """Whether the stream's encoding has the characters of the bars; one without an encoding takes any."""
    try:
        ("█" + "".join(EIGHTHS)).encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True

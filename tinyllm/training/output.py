"""What a run prints: lines above the progress bar, wrapped. What cannot be written never ends a run."""

import io
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TextIO

LINE = 88  # columns


def say(text: str, indent: int | None = None) -> None:
    """Print a text above the progress bar; with an ``indent`` it is wrapped, which would break a command."""
    from tqdm import tqdm

    tqdm.write(text if indent is None else "\n".join(wrap(text, indent)))


class Output:
    """A text stream that drops what cannot be written, so that this never ends a run.

    The reader of a pipe may be gone, a disk full, a terminal or the stream itself (None) closed.
    """

    def __init__(self, stream: TextIO | None):
        self.stream, self.error = stream or io.StringIO(), None if stream else "it is closed"

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except ValueError as error:  # it is closed, or cannot encode the text
            self.error = str(error)
        except OSError as error:
            self.error = str(error.strerror)
            silence(self.stream)
        return len(text)

    def flush(self) -> None:
        """Do nothing: ``write`` flushes."""


def silence(stream: TextIO) -> None:
    """Make the null device of a stream that cannot be written, or Python fails to flush it at exit."""
    with suppress(OSError, AttributeError), open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), stream.fileno())


@contextmanager
def robust_output(*names: str) -> Iterator[None]:
    """Within this context, what stdout and stderr, or one of them, cannot write is dropped."""
    redirect = {"stdout": redirect_stdout, "stderr": redirect_stderr}
    with ExitStack() as stack:
        for name in names or redirect:
            stream = getattr(sys, name)
            stack.enter_context(redirect[name](stream if isinstance(stream, Output) else Output(stream)))
        yield


def output_errors() -> dict[str, str]:
    """Why stdout or stderr could not be written since the last call, as entries of a step's record."""
    found = {}
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if reason := getattr(stream, "error", None):
            found[f"{name}_error"], stream.error = reason, None
    return found


def number(value: float, decimals: int) -> str:
    """The value with these decimals, or four digits if it is large, as in a run that diverges."""
    return f"{value:.{decimals}f}" if value < 1e6 else f"{value:.4g}"


def wrap(line: str, indent: int) -> list[str]:
    """The line broken at spaces into lines of at most ``LINE`` columns, all but the first indented.

    A word that is too long, a path say, is broken only if there is an indent.
    """
    lines, current = [], ""
    for word in re.findall(" *[^ ]+", line):
        if current.strip() and columns_of(current + word) > LINE:
            lines.append(current)
            current, word = " " * indent, word.lstrip()
        for character in word:
            if indent and columns_of(current + character) > LINE:
                lines.append(current)
                current = " " * indent
            current += character
    return [*lines, current]


def columns_of(text: str) -> int:
    """The width of a text in a font of fixed width, where a Chinese character, say, takes two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)

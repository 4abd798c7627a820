"""Tokens as labels, and how surprising each one was, as text for a terminal.

The surprise of a token is -log₂ p in bits: 1 bit for p = ½, 10 for p ≈ 0.1%. A model that is never surprised
would compress the text to nothing: the mean is the number of bits that a token costs (Shannon, "A
Mathematical Theory of Communication", 1948).
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence

import numpy as np

from tinyllm.errors import Error
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tools.inspect import Inspection
from tinyllm.tools.show import characters_of, escaped, quoted
from tinyllm.training.output import columns_of

# From this many bits on, a background of xterm's 256 colours behind black text: pale yellow to red.
LEVELS = ((1, 230), (4, 223), (8, 216), (12, 209))

ROWS = 40  # of the table; of a longer text the most surprising tokens


def token_label(tokenizer: Tokenizer, i: int) -> str:
    """A token as a label: ``·to`` for " to", ``⏎`` for a newline, ``\\xe2`` for a byte of a character.

    A token of spaces only is ``␣``; an id without a token, such as one that pads the vocabulary, ``[50300]``.
    """
    text = visible(characters_of(_piece(tokenizer, i)))
    return text.replace(" ", "·" if text.strip() else "␣")


def visible(text: str, newline: str = "⏎") -> str:
    """The text with every character that is not printable escaped, and with ``newline`` for a newline."""
    return "".join(c if c.isprintable() else newline if c == "\n" else escaped(c) for c in text)


def _piece(tokenizer: Tokenizer, i: int) -> bytes:
    try:
        return tokenizer.decode_bytes([i])
    except Error:
        return f"[{i}]".encode()


def whole_characters(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[range, str]]:
    """The text of the ids as pieces of whole characters: the positions of its tokens, and the piece.

    Most pieces are one token. The tokens that share the bytes of a character are one piece. Bytes that are
    not UTF-8 become lone surrogates, see ``characters_of``.
    """
    pieces, decoder, start, text = [], codecs.getincrementaldecoder("utf-8")("surrogateescape"), 0, ""
    for t, i in enumerate(ids):
        text += decoder.decode(_piece(tokenizer, int(i)), final=t == len(ids) - 1)
        if not decoder.getstate()[0]:
            pieces.append((range(start, t + 1), text))
            start, text = t + 1, ""
    return pieces


def bits(probability) -> np.ndarray:
    """-log₂ p, infinite for p = 0; nan for the first token, which was not predicted."""
    with np.errstate(divide="ignore"):
        return -np.log2(np.asarray(probability, np.float64))


def percent(p: float) -> str:
    """A probability with two digits after the point, or what it is less or more than."""
    if 0 < p < 0.00005:
        return "<0.01%"
    return ">99.99%" if 0.99995 <= p < 1 else f"{p:.2%}"


def show_surprise(tokenizer: Tokenizer, found: Inspection, colour: bool) -> str:
    """The text of an inspection with its surprise, and a table of its tokens.

    With ``colour`` a token has a background the redder, the more bits it took; tokens that share a character
    are one, whose bits are added. The table has a token's probability and rank, and the most likely token
    where another came. Of more than 40 tokens only the most surprising are listed.

    Raises ``Error`` without probabilities, as of a classifier.
    """
    if found.probability is None:
        raise Error("the surprise of the tokens is unknown: inspect a language model with surprise=True")
    lines = []
    if colour:
        lines += [_coloured(tokenizer, found), "", _legend(), ""]
    lines += _table(tokenizer, found)
    return "\n".join([*lines, "", summary(found)])


def summary(found: Inspection) -> str:
    """One line: the number of tokens, the mean of their bits, and how often the most likely token came."""
    each, T = bits(found.probability)[1:], len(found.ids)
    if not len(each):
        return f"{T} token, which was not predicted"
    first = int((found.rank[1:] == 1).sum())
    mean = f"{T:,} tokens, {each.mean():.2f} bits each after the first"
    return f"{mean}; {first:,} of {len(each):,} were the most likely"


def _coloured(tokenizer: Tokenizer, found: Inspection) -> str:
    each, out = bits(found.probability), ""
    for positions, text in whole_characters(tokenizer, found.ids):
        background = background_of(each[list(positions)].sum())
        lines = visible(text, "⏎\n").split("\n")
        # A background colour that is on at a line break would fill the rest of the line.
        out += "\n".join(_paint(line, background) if line else "" for line in lines)
    return out


def background_of(amount: float) -> int | None:
    """The colour of so many bits; None for few, and for nan."""
    return next((colour for least, colour in reversed(LEVELS) if amount >= least), None)


def _paint(text: str, background: int | None) -> str:
    return text if background is None else f"\x1b[38;5;16;48;5;{background}m{text}\x1b[0m"


def _legend() -> str:
    parts = [_paint(f" {least}+ ", colour) for least, colour in LEVELS]
    return f"bits (-log₂ p): {' '.join(parts)}   under 1, p is above ½"


def _table(tokenizer: Tokenizer, found: Inspection) -> list[str]:
    each, T = bits(found.probability), len(found.ids)
    shown, title = list(range(T)), []
    if T > ROWS:
        shown = sorted(np.argsort(-np.nan_to_num(each, nan=-math.inf), kind="stable")[:ROWS].tolist())
        title = [f"The {ROWS} most surprising of {T:,} tokens:"]
    rows = [("#", "token", "p", "rank", "most likely")]
    for t in shown:
        name, expected = (quoted(_piece(tokenizer, int(ids[t]))) for ids in (found.ids, found.expected))
        own = ("–", "–") if t == 0 else (percent(found.probability[t]), f"{found.rank[t]:,}")
        other = f"{expected} {percent(found.expected_probability[t])}" if found.rank[t] > 1 else ""
        rows.append((f"{t}", name, *own, other))
    widths = [max(map(columns_of, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        pad = [" " * (width - columns_of(cell)) for width, cell in zip(widths, row)]
        line = f"{pad[0]}{row[0]}  {row[1]}{pad[1]}  {pad[2]}{row[2]}  {pad[3]}{row[3]}  {row[4]}"
        lines.append(line.rstrip())
    return title + lines

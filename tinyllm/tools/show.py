"""How do tokens and probabilities look in a terminal?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from tinyllm.backend.device import to_device
from tinyllm.checks import check_ids, is_integer
from tinyllm.errors import Error
from tinyllm.inference.sampling import probabilities as drawn_from
from tinyllm.nn import observe
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tools.console import EIGHTHS

# Light blue, peach, green and pink of xterm's 256 colours, under black text: the same in any terminal.
BACKGROUNDS = (153, 223, 157, 225)

BAR_CELLS = 32  # the length of probability 1


def show_tokens(tokenizer: Tokenizer, ids, colour: bool) -> str:
    """A text cut into its tokens, then their ids, then how many tokens and bytes these are: three parts.

    With ``colour`` each token and its id have one background, so that spaces can be seen. What is no
    text in itself is written in reverse: a newline as ``⏎`` (and a real one after it), the bytes of a
    token that is half a character as ``\\xe2\\x82``, and what cannot be seen as Python writes it.
    Without, ``|`` stands between tokens, every newline is ``\\n`` (and a real one), and a ``|`` or ``\\``
    of the text is ``\\|`` or ``\\\\``. Raises ``Error`` naming an id outside the vocabulary.
    """
    size = len(tokenizer.decode_bytes(ids))
    pieces = [tokenizer.decode_bytes([i]) for i in ids]
    if colour:
        text = "".join(_coloured(piece, n) for n, piece in enumerate(pieces))
        numbers = " ".join(_paint(str(i), n) for n, i in enumerate(ids))
    else:
        text = "|".join(_plain(piece) for piece in pieces)
        numbers = " ".join(str(i) for i in ids)
    counts = f"{_count(len(pieces), 'token')}, {_count(size, 'byte')}"
    if pieces:
        counts += f", {size / len(pieces):.2f} bytes per token"
    return f"{text}\n{numbers}\n{counts}"


def _coloured(piece: bytes, n: int) -> str:
    out = ""
    for visible, characters in itertools.groupby(_characters(piece), str.isprintable):
        if visible:
            out += _paint("".join(characters), n)
        else:
            written = "".join("⏎\n" if c == "\n" else _escape(c) for c in characters)
            # A background that is on at a line's end would fill the rest of the line.
            lines = [_paint(line, n, reverse=True) if line else "" for line in written.split("\n")]
            out += "\n".join(lines)
    return out


def _plain(piece: bytes) -> str:
    out = ""
    for character in _characters(piece):
        if character in "|\\":
            out += "\\" + character
        elif character.isprintable():
            out += character
        else:
            out += _escape(character) + ("\n" if character == "\n" else "")
    return out


def _characters(piece: bytes) -> str:
    """The text of a token; a byte that belongs to half a character is a lone surrogate, U+DC80 to U+DCFF."""
    return piece.decode("utf-8", errors="surrogateescape")


def _escape(character: str) -> str:
    """A character that cannot be seen, as Python writes it; ``\\x80`` and above are bytes, not characters."""
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:
        return f"\\x{number - 0xDC00:02x}"
    if number < 0x80:
        return character.encode("unicode_escape").decode("ascii")
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"


def _paint(text: str, n: int, reverse: bool = False) -> str:
    """Black on the n-th background, or that colour on black, as ECMA-48 (8.3.117, SGR) writes it."""
    background = BACKGROUNDS[n % len(BACKGROUNDS)]
    return f"\x1b[{'7;' if reverse else ''}38;5;16;48;5;{background}m{text}\x1b[0m"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def show_probabilities(
    tokenizer: Tokenizer, probabilities: np.ndarray, chosen: int, top: int = 5, blocks: bool = True
) -> str:
    """The ``top`` most likely tokens, one a line: percent, a bar, and the token as Python writes it.

    ``probabilities`` (V,) sum to 1; those that are 0 get no line. A ``>`` marks the ``chosen`` one, which
    gets a line at the end, with its rank, if it is not among the top. Half a character is written as
    bytes. With ``blocks=False`` the bars are of ``#`` (see ``shows_blocks``). Raises ``Error`` for
    probabilities that are none or not of this tokenizer, a chosen id outside the vocabulary, top below 1.
    """
    p = np.asarray(probabilities)
    if p.shape != (tokenizer.vocab_size,):
        raise Error(
            f"probabilities have shape {p.shape}: give one for each of the tokenizer's "
            f"{tokenizer.vocab_size} ids"
        )
    if not (p >= 0).all() or not abs(p.sum() - 1) <= 1e-3:
        raise Error(
            f"probabilities from {p.min():g} to {p.max():g} with sum {p.sum():g} are none: make them of "
            "logits with tinyllm.inference.sampling.probabilities"
        )
    if not is_integer(top) or top < 1:
        raise Error(f"top is {top!r}: choose a whole number of at least 1")
    chosen = int(check_ids([chosen], tokenizer.vocab_size, name="chosen")[0])
    ranked = np.argsort(-p, kind="stable").tolist()  # stable: equal ones stay in order of id
    shown = [i for i in ranked[:top] if p[i] > 0]
    lines = [_candidate(tokenizer, p, i, i == chosen, blocks) for i in shown]
    if chosen not in shown:
        lines.append(
            f"{_candidate(tokenizer, p, chosen, True, blocks)}  (number {ranked.index(chosen) + 1:,})"
        )
    return "\n".join(lines)


def _candidate(tokenizer: Tokenizer, p: np.ndarray, i: int, chosen: bool, blocks: bool) -> str:
    percent = "<0.01%" if 0 < p[i] < 0.00005 else f"{p[i]:.2%}"
    piece = tokenizer.decode_bytes([i])
    try:
        name = repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        name = repr(piece)
    return f"{'>' if chosen else ' '} {percent:>7}  {_bar(p[i], blocks)}  {name}"


def _bar(p: float, blocks: bool) -> str:
    if not blocks:
        return ("#" * round(p * BAR_CELLS)).ljust(BAR_CELLS)
    whole, eighths = divmod(round(p * BAR_CELLS * 8), 8)
    return ("█" * whole + EIGHTHS[eighths]).ljust(BAR_CELLS)


def watch_probabilities(
    tokenizer: Tokenizer,
    steps: Iterator[np.ndarray],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    top: int = 5,
    blocks: bool = True,
) -> Iterator[str]:
    """``show_probabilities`` for every step of ``generate``, with an empty line after it.

    ``steps`` is what ``generate`` returned, and the next three are what it was given. Several rows come
    one below the other.
    """
    logits = []

    def keep(observation):
        if observation.name == "":  # the model itself
            logits[:] = [observation.output.data[:, -1]]

    while True:
        with observe(keep):  # not held across the yield: what the caller computes there is not ours
            tokens = next(steps, None)
        if tokens is None:
            return
        rows = drawn_from(to_device(logits[0], "cpu"), temperature, top_k, top_p)  # (B, V)
        yield "".join(
            show_probabilities(tokenizer, p, token, top, blocks) + "\n" for p, token in zip(rows, tokens)
        )

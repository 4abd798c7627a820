"""Tokens and probabilities as text for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from tinyllm.backend.device import to_device
from tinyllm.checks import check_at_least, check_ids
from tinyllm.errors import Error
from tinyllm.inference.sampling import probabilities as sampling_probabilities
from tinyllm.inference.sampling import suppress
from tinyllm.nn import observe
from tinyllm.tokenizers.base import IMAGE_TOKEN, Tokenizer
from tinyllm.tools.console import EIGHTHS

# Light blue, peach, green and pink of xterm's 256 colours, behind black text: no theme changes these.
BACKGROUNDS = (153, 223, 157, 225)

BAR_CELLS = 32  # the length of the bar for probability 1


def show_tokens(tokenizer: Tokenizer, ids, colour: bool) -> str:
    """The text of ``ids`` split into tokens, then the ids, then the numbers of tokens and bytes.

    With ``colour``, a token and its id have the same background colour, so that spaces are visible. In
    reversed colours are a newline, as ``⏎`` and a line break, the bytes of an incomplete character, such
    as ``\\xe2\\x82``, and characters that are not printable, as Python escapes them. Without ``colour``,
    ``|`` separates the tokens, a newline is ``\\n`` and a line break, and a ``|`` or ``\\`` in the text is
    ``\\|`` or ``\\\\``. Raises ``Error`` naming an id outside the vocabulary.
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
    for visible, characters in itertools.groupby(characters_of(piece), str.isprintable):
        if visible:
            out += _paint("".join(characters), n)
        else:
            written = "".join("⏎\n" if c == "\n" else escaped(c) for c in characters)
            # A background colour that is on at a line break would fill the rest of the line.
            lines = [_paint(line, n, reverse=True) if line else "" for line in written.split("\n")]
            out += "\n".join(lines)
    return out


def _plain(piece: bytes) -> str:
    out = ""
    for character in characters_of(piece):
        if character in "|\\":
            out += "\\" + character
        elif character.isprintable():
            out += character
        else:
            out += escaped(character) + ("\n" if character == "\n" else "")
    return out


def characters_of(piece: bytes) -> str:
    """The text of a token; a byte of an incomplete character becomes a lone surrogate, U+DC80 to U+DCFF."""
    return piece.decode("utf-8", errors="surrogateescape")


def escaped(character: str) -> str:
    """Python's escape of a character that is not printable; ``\\x80`` and above are bytes, not characters."""
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:
        return f"\\x{number - 0xDC00:02x}"
    if number < 0x80:
        return character.encode("unicode_escape").decode("ascii")
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"


def _paint(text: str, n: int, reverse: bool = False) -> str:
    """Text in black on the n-th background, or reversed, by the codes of ECMA-48 (8.3.117, SGR)."""
    background = BACKGROUNDS[n % len(BACKGROUNDS)]
    return f"\x1b[{'7;' if reverse else ''}38;5;16;48;5;{background}m{text}\x1b[0m"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def show_probabilities(
    tokenizer: Tokenizer, probabilities: np.ndarray, chosen: int, top: int = 5, blocks: bool = True
) -> str:
    """The ``top`` most likely tokens, one per line: percentage, bar, and the token's repr.

    ``probabilities`` (V,) sum to 1; tokens of probability 0 are omitted. A ``>`` marks the ``chosen``
    token; if it is not among the top, it follows on its own line with its rank. Incomplete characters are
    shown as bytes. With ``blocks=False`` the bars consist of ``#`` (see ``shows_blocks``). Raises
    ``Error`` for invalid probabilities, another vocabulary size, an id outside it, or top below 1.
    """
    p = np.asarray(probabilities)
    if p.shape != (tokenizer.vocab_size,):
        raise Error(
            f"probabilities have shape {p.shape}: give one for each of the tokenizer's "
            f"{tokenizer.vocab_size} ids"
        )
    if not (p >= 0).all() or not abs(p.sum() - 1) <= 1e-3:
        raise Error(
            f"probabilities range from {p.min():g} to {p.max():g} and sum to {p.sum():g}: compute them from "
            "logits with tinyllm.inference.sampling.probabilities"
        )
    check_at_least(top, 1, "top")
    chosen = int(check_ids([chosen], tokenizer.vocab_size, name="chosen")[0])
    ranked = np.argsort(-p, kind="stable").tolist()  # stable: ties in order of id
    shown = [i for i in ranked[:top] if p[i] > 0]
    lines = [_candidate(tokenizer, p, i, i == chosen, blocks) for i in shown]
    if chosen not in shown:
        lines.append(f"{_candidate(tokenizer, p, chosen, True, blocks)}  (rank {ranked.index(chosen) + 1:,})")
    return "\n".join(lines)


def _candidate(tokenizer: Tokenizer, p: np.ndarray, i: int, chosen: bool, blocks: bool) -> str:
    percent, name = "<0.01%" if 0 < p[i] < 0.00005 else f"{p[i]:.2%}", quoted(tokenizer.decode_bytes([i]))
    return f"{'>' if chosen else ' '} {percent:>7}  {_bar(p[i], blocks)}  {name}"


def quoted(piece: bytes) -> str:
    """The repr of a token's text, or that of its bytes if they are not whole characters."""
    try:
        return repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(piece)


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
    suppress_ids: Sequence[int] = (),
) -> Iterator[str]:
    """``show_probabilities`` for every step of ``generate``, followed by an empty line.

    ``steps`` is the result of ``generate``; the next three arguments and ``suppress_ids`` are those it was
    called with. The rows of a batch follow one another.
    """
    logits = []  # of rows that the model processed together, (≤ B, V)

    def keep(observation):
        if observation.name == "":  # the model itself
            logits.append(to_device(observation.output.data[:, -1], "cpu"))

    while True:
        logits.clear()
        with observe(keep):  # not across the yield, where the caller may compute
            tokens = next(steps, None)
        if tokens is None:
            return
        allowed = suppress(np.concatenate(logits), suppress_ids)
        rows = sampling_probabilities(allowed, temperature, top_k, top_p)  # (B, V)
        rows = rows[:, : tokenizer.vocab_size] if len(suppress_ids) else rows
        if tokenizer.special_tokens.get(IMAGE_TOKEN) == rows.shape[1]:  # a Gemma without images lacks it
            rows = np.pad(rows, ((0, 0), (0, 1)))
        yield "".join(
            show_probabilities(tokenizer, p, token, top, blocks) + "\n" for p, token in zip(rows, tokens)
        )

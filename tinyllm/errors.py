"""The error class for every problem that a user can cause."""

import functools

LONGEST = 10_000  # characters


class Error(Exception):
    """Invalid input. The message is one sentence: what was wrong and how to fix it.

    Library callers catch ``tinyllm.Error``; the command line prints the message without a traceback and
    exits with code 2. Messages may quote the contents of files, so control characters, which could
    manipulate a terminal, are escaped, and messages longer than 10,000 characters are truncated.
    """

    def __init__(self, sentence: str):
        safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in sentence)
        left_out = len(safe) - LONGEST
        if left_out > 0:
            safe = f"{safe[: LONGEST // 2]} ({left_out:,} characters left out) {safe[-LONGEST // 2 :]}"
        super().__init__(safe)


def names_shapes(op):
    """Decorator of an op: NumPy's error about shapes, axes or indices becomes an Error with all shapes."""

    @functools.wraps(op)
    def call(*args, **kwargs):
        try:
            return op(*args, **kwargs)
        except (ValueError, IndexError, OverflowError) as error:
            given = [*args, *kwargs.values()]
            given += [x for sequence in given if isinstance(sequence, list | tuple) for x in sequence]
            shapes = ", ".join(str(tuple(x.shape)) for x in given if hasattr(x, "shape"))
            raise Error(f"{op.__name__.strip('_')} of shapes {shapes or '(none)'}: {error}") from None

    return call

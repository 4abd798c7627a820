"""The one error class for everything a user can cause."""

LONGEST = 10_000  # characters


class Error(Exception):
    """Bad input: the message is one sentence that says what was wrong and what to do about it.

    Library callers catch ``tinyllm.Error``; the command line prints its sentence, without a
    traceback, and leaves with exit code 2. Sentences quote what stands in files, so control characters,
    which could rewrite a terminal, are written as escapes, and more than 10,000 characters are shortened.
    """

    def __init__(self, sentence: str):
        safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in sentence)
        left_out = len(safe) - LONGEST
        if left_out > 0:
            safe = f"{safe[: LONGEST // 2]} ({left_out:,} characters left out) {safe[-LONGEST // 2 :]}"
        super().__init__(safe)

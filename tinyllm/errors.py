"""The one error class for everything a user can cause."""


class Error(Exception):
    """Bad input: the message is one sentence that says what was wrong and what to do about it.

    Library callers catch ``tinyllm.Error``; the command line prints its sentence, without a
    traceback, and leaves with exit code 2.
    """

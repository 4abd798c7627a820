"""Wrong solutions of the exercises, written from the mistake: each mistake is made in at least three ways."""

from support.mistakes import norms


def planted() -> dict:
    """(exercise, function, mistake) -> functions that make it."""
    return norms.PLANTED

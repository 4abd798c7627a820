"""Wrong solutions of the exercises, written from the mistake: each mistake is made in at least three ways."""

import functools

from support.mistakes import activations, attention, layers, losses, norms, positions, sampling, training

TOPICS = norms, losses, layers, activations, attention, positions, training, sampling

VARIANTS = [variants for topic in TOPICS for variants in topic.VARIANTS]


@functools.cache
def planted() -> dict:
    """(exercise, function, mistake) -> functions that make it."""
    return {
        (each.exercise, each.function, mistake): each.wrong(mistake)
        for each in VARIANTS
        for mistake in each.mistakes
    }

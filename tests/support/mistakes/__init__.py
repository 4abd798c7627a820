"""Wrong solutions of the exercises, written from the mistake: each mistake is made in at least three ways."""

import functools

from support.mistakes import activations, layers, losses, norms
from support.mistakes.planting import Variants

VARIANTS: list[Variants] = [*norms.VARIANTS, *losses.VARIANTS, *layers.VARIANTS, *activations.VARIANTS]


@functools.cache
def planted() -> dict:
    """(exercise, function, mistake) -> functions that make it."""
    return {
        (each.exercise, each.function, mistake): each.wrong(mistake)
        for each in VARIANTS
        for mistake in each.mistakes
    }

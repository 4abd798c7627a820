"""Inputs of a small model and a fault to plant, for the tests of ``parity.compare``."""

from support.models import SMALL, batch

from tinyllm import GPT2Config, Tensor

CONFIG = GPT2Config(**SMALL)

IDS, TARGETS = batch(CONFIG, (2, 7))


def found(comparison):
    """(kind, name) of the first differing row, or None."""
    return comparison.first and (comparison.first.kind, comparison.first.name)


def scaled_gradient(op, factor):
    """``op`` with a correct output, but with its upstream gradient multiplied by ``factor``."""

    def wrong(*args, **kwargs):
        y = op(*args, **kwargs)
        return Tensor.from_op(y.data, (y,), lambda grad: (grad * factor,))

    return wrong

"""What the tests of ``parity.compare`` share: a small model's input, and a fault to plant in it."""

from support.models import SMALL, batch

from tinyllm import GPT2Config, Tensor

CONFIG = GPT2Config(**SMALL)

IDS, TARGETS = batch(CONFIG, (2, 7))


def found(comparison):
    """Kind and name of the first diverging row."""
    return comparison.first and (comparison.first.kind, comparison.first.name)


def scaled_gradient(op, factor):
    """``op`` whose output is right and the gradient that comes back through it too large."""

    def wrong(*args, **kwargs):
        y = op(*args, **kwargs)
        return Tensor.from_op(y.data, (y,), lambda grad: (grad * factor,))

    return wrong

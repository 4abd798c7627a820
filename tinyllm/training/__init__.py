"""Training: ``fit`` for any model and data; a run with a folder of its own in ``run.py``."""

from tinyllm.training.loop import fit

__all__ = ["fit"]

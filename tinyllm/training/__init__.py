"""Training: ``fit`` trains any model on any data; ``run.py`` trains with a folder for the run."""

from tinyllm.training.loop import fit

__all__ = ["fit"]

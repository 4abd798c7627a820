"""The exercises' truths and usual mistakes, by topic."""

from parity.grade.course import attention, layers, losses, norms, sampling, training  # noqa: F401
from parity.grade.exercise import COURSE

__all__ = ["COURSE"]

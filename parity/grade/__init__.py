"""Exercises graded against PyTorch: ``python -m parity grade``."""

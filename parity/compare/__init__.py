"""Comparison of two models: the output and gradient of every layer, and the first that differs."""

from parity.compare.layers import compare

__all__ = ["compare"]

"""Two models side by side: every layer's output and gradient, and the first that differs."""

from parity.compare.layers import compare

__all__ = ["compare"]

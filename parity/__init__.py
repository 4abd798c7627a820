"""Proof that tinyllm computes what PyTorch computes.

``import parity`` alone loads neither NumPy nor torch: a process of ``parity.bench`` holds nothing but the
libraries it measures.
"""

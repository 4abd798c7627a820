"""The proof that tinyllm computes what PyTorch computes, and measurements of both.

``import parity`` alone imports neither NumPy nor torch, so that each process of ``parity.bench`` holds only
the libraries that it measures.
"""

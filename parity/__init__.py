"""Proof that tinyllm computes what PyTorch computes."""


def __getattr__(name: str):
    # Looked up when it is asked for: ``import parity`` alone loads neither NumPy nor torch, because a
    # process of parity.bench must hold nothing but the libraries it measures.
    if name == "compare":
        from parity.layers import compare

        return compare
    raise AttributeError(f"module 'parity' has no attribute {name!r}")

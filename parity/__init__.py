"""Proof that tinyllm computes what PyTorch computes."""

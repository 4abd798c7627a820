"""Does every op compute what PyTorch computes? The checks, what they are tried on, the published tables."""

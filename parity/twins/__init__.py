"""tinyllm's models in plain PyTorch, with the same names and the same weights."""

"""tinyllm's models in plain PyTorch, with the same attribute names and the same weights."""

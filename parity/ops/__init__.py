"""The proof of the ops: checks against PyTorch, the cases they run on, and the published tables."""

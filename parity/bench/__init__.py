"""Benchmarks of tinyllm against PyTorch: time and memory."""

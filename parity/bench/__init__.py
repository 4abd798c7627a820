"""How fast is tinyllm beside PyTorch, and in how much memory?"""

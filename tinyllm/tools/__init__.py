"""The cost of a model and what happens inside it, the profile of a step, plots, and output for terminals."""

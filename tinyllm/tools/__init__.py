"""The cost of a model, the profile of a step, plots of runs, and output for terminals."""

"""The tasks that a run can train a model on; each defines batches, a loss, an evaluation and samples."""

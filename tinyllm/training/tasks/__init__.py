"""What can be trained: a task brings batches, a loss, an evaluation and samples."""

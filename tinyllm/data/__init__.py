"""Text for training: documents, token files, batches."""

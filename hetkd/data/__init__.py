"""Images from folders, datasets and tensors, and the seeds that make them reproducible."""

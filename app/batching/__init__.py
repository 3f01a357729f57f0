"""Many callers' items into few batches, and each result back to its caller."""

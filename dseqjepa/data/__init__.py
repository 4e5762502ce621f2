"""Image sources (folders, rendered scenes, benchmark formats), crops and batches."""

"""Rendered scenes in benchmark formats: small, complete, with known ground truth."""

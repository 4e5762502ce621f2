"""Evaluations of a trained encoder; each yields named numbers."""

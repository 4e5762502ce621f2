"""Evaluations of a trained encoder, each returning named metrics."""

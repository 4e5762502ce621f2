"""Benchmark formats, one file per family: from files on disk to a `Source`."""

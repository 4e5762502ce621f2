"""The benchmarks' own formats, one file a family: what is on disk -> a `Source`."""

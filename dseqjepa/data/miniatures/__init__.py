"""The embedded scenes in the benchmarks' own formats: small, complete, and the truth is known."""

"""Studies: variants x seeds x evaluations, and claims frozen before the first run."""

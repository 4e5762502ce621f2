"""Studies: variants x seeds x evaluations, and claims that are written down before they run."""

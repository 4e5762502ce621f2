"""Images in: any folder, the embedded scenes, the benchmarks' own formats; crops and batches."""

"""Turn the files in `benchmarks/results/` into tables, plots and pages."""

"""Benchmarks of the whole model, and counts of its work, launches and memory."""
